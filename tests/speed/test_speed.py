"""The speed benchmark compares like with like, and reports what it measured."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.quality.readme import ROOT, filled
from benchmarks.speed_readme import blocks
from modeling_ivtp import trained
from modeling_ivtp.cli import main
from modeling_ivtp.files.console import shareable_command
from modeling_ivtp.flops import load_shape
from modeling_ivtp.flops.formula import kv_cache_bytes
from modeling_ivtp.model.labels import CHOOSE, SCORE, TEXT_TOWER, label
from modeling_ivtp.serving.answering import load_model
from modeling_ivtp.speed import bench as speed_bench
from modeling_ivtp.speed.bench import Settings, bench, check_largest
from modeling_ivtp.speed.growth import growth
from modeling_ivtp.speed.models import bytes_needed, check_room, prompt, random_model, stock_twin
from modeling_ivtp.speed.products import products, seconds
from modeling_ivtp.speed.report import markdown, reached
from modeling_ivtp.speed.stopwatch import Stopwatch
from modeling_ivtp.speed.timing import Arm, interleaved, ratio, run
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return random_model(load_shape("tiny"), dtype=torch.float32, device=CPU, attention="sdpa")


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Any]:
    return prompt(model, batch=2, text_tokens=20, instruction_tokens=10)


def test_the_baseline_is_stock_llava_on_the_same_weights(model: Any, inputs: dict[str, Any]) -> None:
    twin = stock_twin(model)
    assert type(twin) is LlavaForConditionalGeneration
    assert twin.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert all(tensor.device.type == "cpu" for tensor in [*twin.parameters(), *twin.buffers()])
    known = {name: value for name, value in inputs.items() if not name.startswith("clip_")}
    with model.pruning(enabled=False):
        assert torch.equal(twin(**known).logits, model(**inputs).logits)
    assert not torch.equal(twin(**known).logits, model(**inputs).logits)


def test_prompts_have_the_tokens_that_were_asked_for(model: Any, inputs: dict[str, Any]) -> None:
    assert inputs["input_ids"].shape == (2, 20 + 576)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2 * 576
    spans = inputs["clip_spans"]
    assert (spans[..., 0] < 0).sum(1).tolist() == [10, 10]
    assert spans[0, -1].tolist() == [0, 0]
    two = prompt(model, batch=1, text_tokens=200, instruction_tokens=100)
    assert two["clip_input_ids"].shape == (1, 2, 77)


def test_a_run_reports_its_parts(model: Any, inputs: dict[str, Any]) -> None:
    found = run(Arm("ivtp", model, lambda: model.pruning(visual_tokens=64)), inputs, 4)
    assert 0 < found["tower"] < found["end_to_end"]
    assert found["prefill"] + 3 * found["decode"] == pytest.approx(found["end_to_end"])
    with model.pruning(visual_tokens=64):
        plan = model.model.plan()
    layers = [23 + tokens for tokens in plan.decoder_layer_tokens(6)]
    assert found["kv_bytes"] == 2 * sum(kv_cache_bytes(model.config, layers, 4))


@pytest.mark.slow
def test_arms_take_turns(model: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    arms = [Arm(name, model, lambda name=name: (order.append(name), model.pruning())[1]) for name in "ab"]
    steps: list[int] = []
    runs = interleaved(arms, inputs, new_tokens=2, repeats=3, advance=lambda: steps.append(1))
    assert order == list("ab" + "ab" + "ab" + "ba" + "ab")
    assert len(steps) == 10
    assert [len(runs[name]) for name in "ab"] == [3, 3]


def test_ratios_are_paired() -> None:
    draws = np.random.default_rng(0)
    noise = draws.lognormal(0, 1, 40)
    middle, low, high = ratio(2 * noise, noise)
    assert (middle, low, high) == (2, 2, 2)
    middle, low, high = ratio(2 * noise, draws.permutation(noise))
    assert low < middle < high


@pytest.mark.slow
def test_the_command_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--shape", "tiny", "--arm", "ivtp@64", "--arm", "fastv@64", "--batch", "1", "--batch", "2"]
    arguments += [
        "--new-tokens",
        "3",
        "--repeats",
        "2",
        "--dtype",
        "float32",
        "--out",
        str(tmp_path),
        "--label",
        "first",
    ]
    assert main(arguments) == 0
    (file,) = tmp_path.glob("speed-tiny-float32-first-*.json")
    results = json.loads(file.read_text())
    assert file.with_suffix(".md").read_text() == markdown(results)
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert [(row["arm"], row["batch"]) for row in results["rows"]] == [
        (arm, batch) for batch in (1, 2) for arm in ("stock", "ivtp@64", "fastv@64")
    ]
    for row in results["rows"]:
        assert all(len(row[part]["all"]) == 2 for part in ("tower", "prefill", "decode", "end_to_end"))
        assert (row["implied"] > 1.5) == (row["arm"] != "stock")
        assert row["final_tokens"] == (576 if row["arm"] == "stock" else 64)
        assert (row["selection_share"] is None) == (row["arm"] == "stock")
        assert (row["products"] is None) == (row["arm"] == "fastv@64")
    assert results["machine"]["versions"]["torch"]
    assert "reached" in capsys.readouterr().out
    # A second result stands beside the first.
    assert main(arguments) == 0
    assert len(list(tmp_path.glob("speed-tiny-*.json"))) == 2
    assert str(tmp_path) not in file.read_text()


@pytest.mark.slow
def test_a_trained_pruner_is_timed_from_its_folder(tmp_path: Path) -> None:
    """At its saved budget or another, on the model that its modules fit; results do not say where it lies."""
    base = ROOT / "examples" / "miniature"
    loaded, _ = load_model(base, device="cpu", dtype="float32")
    trained.SparseAttention(keep=64).for_model(loaded).save(tmp_path / "pruner")
    folder = str(tmp_path / "pruner")
    arguments = ["bench", "--model", str(base), "--arm", folder, "--arm", f"{folder}@32"]
    arguments += ["--new-tokens", "2", "--repeats", "1", "--dtype", "float32", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    (file,) = (tmp_path / "out").glob("speed-*.json")
    results = json.loads(file.read_text())
    found = {row["arm"]: row["final_tokens"] for row in results["rows"]}
    assert found == {"stock": 576, "pruner": 64, "pruner@32": 32}
    assert results["settings"]["arms"] == ["pruner", "pruner@32"]
    assert main(["bench", "--shape", "tiny", "--arm", folder, "--dtype", "float32", "--out", str(tmp_path / "no")]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ("ivtp",)}, "arm 'ivtp'; allowed: off, a method and its budget"),
        ({"arms": ("fastw@64",)}, "Unknown method 'fastw'"),
        ({"arms": ("ivtp@0",)}, "arm 'ivtp@0'"),
        ({"batches": (0,)}, "batches"),
        ({"text_tokens": ()}, "text_tokens"),
        ({"new_tokens": 1}, "new_tokens=1; allowed: at least 2"),
        ({"repeats": 0}, "repeats=0"),
        ({"dtype": "int8"}, "dtype='int8'; allowed: float32, bfloat16, float16"),
        ({"arms": ("fastv@64+graphs",)}, "arm 'fastv@64+graphs'; allowed: off"),
        ({"arms": ("stock",)}, "stock always runs and needs another arm beside it"),
        ({"label": "a/b"}, "label='a/b'; allowed: letters"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=".") as raised:  # noqa: RUF043
        Settings(**options)
    assert message in str(raised.value)


def test_a_case_that_the_machine_cannot_hold_is_refused_before_the_model_is_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_shape("llava-1.5-13b")
    needed = bytes_needed(config, dtype=torch.float32, batch=32, text_tokens=64, new_tokens=128)
    assert 53e9 < bytes_needed(config, dtype=torch.float32, batch=1, text_tokens=64, new_tokens=128) < needed
    with pytest.raises(ValueError, match=r"batch 32 needs at least .* TB|GB.* are free on cpu"):
        check_room(10**13, CPU, "batch 32")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was built")

    monkeypatch.setattr("modeling_ivtp.speed.bench.random_model", never)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 8_000_000_000})())
    with pytest.raises(ValueError, match=r"batch 1 in float32 needs at least .* GB, and 8 GB are free"):
        bench(config, Settings(), device=CPU)
    arguments = [
        "bench",
        "--model",
        str(ROOT / "examples" / "miniature"),
        "--dtype",
        "float32",
        "--out",
        str(tmp_path / "x"),
    ]
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 80_000_000})())
    monkeypatch.setattr("modeling_ivtp.serving.answering.load_model", never)
    assert main(arguments) == 1
    assert "batch 1 in float32 needs at least 92.6 MB, and 80 MB are free" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_loaded_weights_need_no_more_room(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    most = {"dtype": torch.float32, "batch": 1, "text_tokens": 64, "new_tokens": 128}
    whole, rest = bytes_needed(model.config, **most), bytes_needed(model.config, **most, weights=0)
    assert whole - rest == sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": rest})())
    check_largest(model.config, Settings(), CPU, weights=0)
    with pytest.raises(ValueError, match="needs at least"):
        check_largest(model.config, Settings(), CPU)


def test_choosing_counts_what_layers_do_for_it(model: Any, inputs: dict[str, Any]) -> None:
    watch = Stopwatch()
    with model.pruning(visual_tokens=64), watch.watching(model), torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)
        spans = len(watch._selection)
        plan = model.model.plan()
    layers = sum(group.last - group.first + 1 for group in plan.decoder)
    # A choice for each group, the reference, a pseudo CLS in each of the decoder's layers, and maps of some heads.
    assert spans > len(plan.tower) + len(plan.decoder) + 1 + layers
    assert 0 < watch.words < watch.selection
    with model.pruning(visual_tokens=64), torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)
    assert len(watch._selection) == spans
    assert not model.model._forward_hooks


def test_work_inside_other_work_is_timed_once(model: Any) -> None:
    watch = Stopwatch()
    with watch.watching(model):
        with label(CHOOSE):
            with label(TEXT_TOWER), label(TEXT_TOWER):
                time.sleep(0.01)
            with label(SCORE):
                pass
        with label(SCORE):
            pass
    assert (len(watch._selection), len(watch._words)) == (2, 1)
    assert 0.01 <= watch.words <= watch.selection
    watch.restart()
    assert (watch.selection, watch.words, watch.first_token) == (0, 0, None)


def test_the_pages_show_the_newest_speeds() -> None:
    for page, texts in blocks().items():
        for text in texts:
            assert filled(page.read_text(), text) == page.read_text(), "python -m benchmarks.speed_readme"
            assert "llava-tinyllama-1.1b" in text or (page.name == "vllm.md" and "| guided |" in text)


@pytest.mark.parametrize("out", [["--out", "x"], ["-o", "x"], ["--out=x"], ["-ox"], []])
def test_a_command_is_reported_without_its_folder(out: list[str]) -> None:
    assert shareable_command("ivtp", ["bench", *out, "--arm", "a b"]) == "ivtp bench --arm 'a b'"


def test_one_of_shape_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 1
    assert "one of --shape and --model" in capsys.readouterr().err
    assert main(["bench", "--shape", "llava"]) == 1
    assert "allowed: llava-1.5-13b" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_is_timed_with_the_attention_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = speed_bench.bench

    def noting(config: Any, settings: Settings, **options: Any) -> Any:
        seen.append(options["model"].config.text_config._attn_implementation)
        return original(config, settings, **options)

    monkeypatch.setattr(speed_bench, "bench", noting)
    arguments = ["bench", "--model", str(ROOT / "examples" / "miniature"), "--attention", "eager", "--arm", "ivtp@64"]
    arguments += ["--new-tokens", "2", "--repeats", "1", "--dtype", "float32", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert seen == ["eager"]


@pytest.mark.slow
def test_memory_that_runs_out_keeps_what_was_measured(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = speed_bench.interleaved

    def full(*arms: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory")
        return original(*arms, **options)

    monkeypatch.setattr(speed_bench, "interleaved", full)
    settings = Settings(arms=("ivtp@64",), batches=(1, 2), new_tokens=2, repeats=1)
    rows = speed_bench.bench(model.config, settings, device=CPU, model=model)
    assert {row["batch"] for row in rows} == {1}
    results = speed_bench.results("tiny", settings, rows, CPU, "ivtp bench")
    assert "Memory ran out at batch 2" in markdown(results)


@pytest.mark.parametrize(
    "own",
    [
        {"enabled": False},
        {"tower_tokens": 16},
        {"visual_tokens": 8, "tower_tokens": None, "coverage": 1.0, "min_visual_tokens": 6},
    ],
    ids=str,
)
def test_a_checkpoint_is_timed_at_a_budget_as_its_numbers_say(own: dict[str, Any]) -> None:
    model = tiny_model(**own)
    settings = Settings(arms=("ivtp@4",), text_tokens=(8,), new_tokens=2, repeats=1)
    stock, pruned = bench(model.config, settings, device=CPU, model=model)
    text = model.config.text_config
    entry = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers * 4
    assert 4 < pruned["layer_averaged_tokens"] < 16
    assert stock["kv_bytes"] - pruned["kv_bytes"] == round((16 - pruned["layer_averaged_tokens"]) * entry)


@pytest.mark.slow
def test_a_model_without_a_text_tower_is_timed() -> None:
    config = load_shape("tiny")
    config.clip_text_config = None
    settings = Settings(arms=("ivtp@64",), new_tokens=2, repeats=1)
    rows = bench(config, settings, device=CPU)
    assert [row["arm"] for row in rows] == ["stock", "ivtp@64"]
    assert all(row["products"]["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_a_run_that_is_cut_short_loses_no_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    original = speed_bench.interleaved

    def stopped(*arms: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(*arms, **options)

    monkeypatch.setattr(speed_bench, "interleaved", stopped)
    batches = [word for batch in (1, 2, 3) for word in ("--batch", str(batch))]
    main(["bench", "--shape", "tiny", "--new-tokens", "2", "--repeats", "1", "--out", str(tmp_path), *batches])
    assert "written: " in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert {row["batch"] for row in results["rows"]} == {1, 2}
    assert results["notes"] == ["2 of 3 cases were measured."]
    assert {part.suffix for part in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "toaster"], "device='toaster' cannot be used"),
        (["--threads", "0"], "--threads=0; allowed: at least 1"),
        (["--arm", "stock+graphs"], "CUDA graphs need a GPU"),
    ],
)
def test_what_cannot_be_timed_here(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--shape", "tiny", "--out", str(tmp_path), *more]) == 1
    assert message in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["bench", "--shape", "tiny", "--out", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err


def test_the_interval_of_few_pairs_is_their_range() -> None:
    assert ratio([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]) == (3.0, 2.0, 4.0)


def test_growth_is_a_line_where_work_counts() -> None:
    def rows(fixed: float, per_tflop: float) -> list[dict[str, Any]]:
        return [
            {
                "arm": "a",
                "batch": n,
                "text_tokens": 64,
                "tflops": 2.0,
                "prefill": {"seconds": fixed + per_tflop * 2 * n},
            }
            for n in (1, 2, 4)
        ]

    (fit,) = growth(rows(0.1, 0.5))
    assert (fit["fixed"], fit["rate"]) == (pytest.approx(0.1), pytest.approx(2.0))
    assert all(abs(case["share"]) < 1e-9 for case in fit["residuals"])
    (bound,) = growth(rows(0.1, 0.001))
    assert bound["rate"] is None


@pytest.mark.parametrize("pruned", [False, True])
def test_products_are_those_that_run(model: Any, inputs: dict[str, Any], pruned: bool) -> None:
    """Every linear layer gets as many rows as in a forward of the same batch."""
    seen: dict[str, int] = {}

    def hook(name: str) -> Any:
        def count(_: Any, args: Any, output: Any) -> None:
            seen[name] = seen.get(name, 0) + output.numel() // output.shape[-1]

        return count

    names = {module: name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    hooks = [module.register_forward_hook(hook(name)) for module, name in names.items()]
    model.model.instruction_cache.clear()
    with torch.no_grad(), model.pruning(enabled=pruned):
        prepared = model.prepare_inputs_for_generation(**inputs, is_first_iteration=True, use_cache=True)
        model(**prepared, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    batch, length = inputs["input_ids"].shape
    plan = model.model.plan() if pruned else None
    words = seen.get("model.clip_text_model.text_projection", 0) // batch
    text = length - model.config.num_patches
    work = products(model, plan, batch=batch, text_tokens=text, words=words)
    expected = {name: count for name, count in seen.items() if not name.endswith("visual_projection")}
    assert {names[module]: rows for module, rows in work} == expected
    taken = seconds({"stock": work, "again": work}, repeats=2)
    assert all(len(times) == 2 and min(times) > 0 for times in taken.values())


@pytest.mark.slow
def test_graphs_are_compared_with_graphs() -> None:
    def row(arm: str, seconds: float) -> dict[str, Any]:
        part = {"seconds": seconds, "speed_up": [4.0 / seconds, 0, 0]}
        return {"arm": arm, "batch": 1, "text_tokens": 64, "implied": 4.0, "prefill": part}

    rows = [row("ivtp@64", 2.0), row("stock+graphs", 3.0), row("ivtp@64+graphs", 1.0)]
    assert reached(rows[0], rows) == "50%"
    assert reached(rows[2], rows) == "75%"
    assert reached(rows[2], rows[2:]) == "100%"
