"""The quality benchmark on a tiny model with random weights: what is computed, not how well it answers."""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import modeling_ivtp
from benchmarks.quality import checkpoint as checkpoints
from benchmarks.quality import evaluate_quality, findings, readme, report, retrain
from benchmarks.quality.answer_log import AnswerLog, Answers
from benchmarks.quality.checkpoint import check_world, checkpoint_fingerprint
from benchmarks.quality.evaluate_quality import MINIATURE, _rows, _well_answered, evaluate_checkpoint
from benchmarks.quality.examination import Asked, Examination, row_cost, row_signature
from benchmarks.quality.methods import (
    ADAPTIVE,
    CHOOSERS,
    COMPACT,
    Row,
    ablation_rows,
    compact_rows,
    encode_whole,
    main_rows,
    patch_order,
    system_rows,
)
from benchmarks.quality.plots import apart
from benchmarks.quality.seeds import agreement
from benchmarks.quality.tokenizer import processor as miniature_processor
from benchmarks.quality.world import (
    TYPES,
    answer_words,
    draw_scene,
    fingerprint,
    needed_patches,
    questions,
    sample_questions,
)
from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration, IVTPLlavaProcessor
from modeling_ivtp.evaluation.intervals import bootstrap_interval, paired_interval
from modeling_ivtp.flops.formula import decoder_flops
from modeling_ivtp.methods import METHODS, make
from modeling_ivtp.speed.stopwatch import Taken
from tests.support.untaught import PATCHES, SIDE, untaught


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untaught(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    model = IVTPLlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    return model, IVTPLlavaProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def asked() -> list[Any]:
    return list(sample_questions("test", 11, side=SIDE))


@pytest.fixture(scope="module")
def examination(loaded: tuple[Any, Any], asked: list[Any]) -> Examination:
    return Examination(*loaded, asked, 0)


def evaluate(checkpoint: Path, out: Path, **options: Any) -> Path:
    return evaluate_checkpoint(
        checkpoint, out, **{"number": 12, "batch": 8, "budgets": (24,), "device": "cpu"} | options
    )


@pytest.mark.slow
def test_whole_images_have_the_features_of_the_stock_model_and_the_attention_that_eager_attention_shows(
    loaded: tuple[Any, Any], examination: Examination
) -> None:
    model, pixels = loaded[0], examination.pixels
    whole = encode_whole(model, pixels)
    with torch.no_grad(), model.pruning(enabled=False):
        stock = torch.stack(list(model.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(whole.features, stock.view_as(whole.features), rtol=0, atol=1e-6)
    eager = IVTPLlavaForConditionalGeneration._from_config(model.config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        attentions = eager.model.vision_tower(pixels, output_attentions=True).attentions
    expected = torch.stack(attentions).mean(2)[:, :, 0, 1:]
    torch.testing.assert_close(whole.cls_attention, expected, rtol=0, atol=1e-6)
    last_group = model.config.pruning.layers_per_group
    assert 1 < last_group < len(attentions)
    for chooser, layers in (("cls-topk", last_group), ("cls-topk-all-layers", len(attentions))):
        order = patch_order(chooser, whole, examination.asked, range(len(examination.asked)), last_group=last_group)
        attention = expected[-layers:].mean(0).gather(1, order)
        assert (attention.diff(dim=1) <= 1e-6).all(), chooser


def test_cls_looks_from_the_last_group_of_the_checkpoint_whatever_a_row_changes(
    loaded: tuple[Any, Any], examination: Examination
) -> None:
    """The options of a row that chooses before the decoder make the whole tower one group."""
    model = loaded[0]
    assert examination.last_group == model.config.pruning.layers_per_group == 2
    rows = {row.method: row for row in main_rows(model.config, (24,))}
    assert rows["cls-topk"].options["layers_per_group"] is None
    whole, places = encode_whole(model, examination.pixels), range(len(examination.asked))
    kept = {name: examination.kept_patches(rows[name]) for name in ("cls-topk", "cls-topk-all-layers")}
    for name in kept:
        order = patch_order(name, whole, examination.asked, places, last_group=2)
        assert torch.equal(kept[name], order[:, :24].sort(1).values), name
    assert not torch.equal(*kept.values())


def test_patches_handed_over_are_what_a_tower_that_had_kept_them_hands_over(
    loaded: tuple[Any, Any], examination: Examination
) -> None:
    """A tower that is one group chooses at its top: it hands over features of the whole image."""
    model, row = loaded[0], Row("random", 24, main_rows(loaded[0].config, (24,))[2].options, chooser="random")
    with torch.no_grad(), model.pruning(**row.options):
        own = model.model.get_image_features(examination.pixels)
        rest = torch.stack([torch.tensor(sorted(set(range(PATCHES)) - set(k.tolist()))) for k in own.kept_patches])
        order = torch.cat([own.kept_patches.flip(1), rest], 1)
        handed = encode_whole(model, examination.pixels).keep(order, 24)
        assert torch.equal(handed.kept_patches, own.kept_patches)
        torch.testing.assert_close(torch.stack(handed.pooler_output), torch.stack(own.pooler_output), rtol=0, atol=1e-6)
        logits = [
            model(**examination.inputs, mm_encoder_outputs={"image": one}, logits_to_keep=1).logits
            for one in (handed, own)
        ]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_more_patches_hold_the_fewer_and_random_ones_depend_on_the_question_alone(
    loaded: tuple[Any, Any], examination: Examination, asked: list[Any]
) -> None:
    whole = encode_whole(loaded[0], examination.pixels)
    for chooser in ("random", "cls-topk", "cls-topk-all-layers", "oracle"):
        order = patch_order(chooser, whole, asked, range(len(asked)), last_group=2)
        assert torch.equal(order.sort(1).values, torch.arange(PATCHES).expand_as(order)), chooser
        few, many = (whole.keep(order, k).kept_patches for k in (16, 64))
        assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(few, many, strict=True))
    random = patch_order("random", whole, asked, range(11), last_group=2)
    assert torch.equal(random[3:5], patch_order("random", whole, asked[3:5], (3, 4), last_group=2))
    assert not torch.equal(random, patch_order("random", whole, asked, range(11), last_group=2, seed=1))
    oracle = patch_order("oracle", whole, asked, range(11), last_group=2)
    for (scene, question), row in zip(asked, oracle, strict=True):
        needed = needed_patches(scene, question).flatten()
        assert needed[row[: min(16, int(needed.sum()))].numpy()].all()
    with pytest.raises(ValueError, match="allowed: random, cls-topk, cls-topk-all-layers, oracle"):
        patch_order("luck", whole, asked, range(11), last_group=2)


def test_rows_of_one_name_are_one_row(loaded: tuple[Any, Any]) -> None:
    """Results of one name replace each other, and what is followed or compared under it is the same."""
    config = loaded[0].config
    rows = [*main_rows(config, (24,)), *system_rows(config, (24,))[0], *compact_rows(config, (24,))[0]]
    signatures: dict[str, set[str]] = {}
    for row in (*rows, *ablation_rows(config, (24,))[0]):
        signatures.setdefault(row.key, set()).add(row_signature(row, config))
    assert not {name for name, found in signatures.items() if len(found) > 1}


@pytest.mark.parametrize("name", ["unpruned", "blind", *CHOOSERS, "ivtp", "ivtp-v"])
def test_a_question_gets_the_same_answer_alone_and_in_a_batch(
    loaded: tuple[Any, Any], examination: Examination, asked: list[Any], name: str
) -> None:
    row = next(row for row in main_rows(loaded[0].config, (24,)) if row.method == name)
    together = examination.answers(row).said
    alone = [Examination(*loaded, asked[n : n + 1], n).answers(row)[0][0] for n in (0, 4)]
    assert alone == [together[0], together[4]]
    assert loaded[0].pruning_config.visual_tokens == 64


def test_unpruned_answers_are_those_of_stock_generate_and_blind_ones_do_not_see(
    loaded: tuple[Any, Any], examination: Examination, asked: list[Any]
) -> None:
    model, processor = loaded
    unpruned, blind = main_rows(model.config, ())
    with model.pruning(enabled=False):
        tokens = model.generate(
            **examination.inputs, pixel_values=examination.pixels, max_new_tokens=4, do_sample=False
        )
    start = examination.inputs["input_ids"].shape[1]
    assert examination.answers(unpruned)[0] == processor.tokenizer.batch_decode(
        tokens[:, start:], skip_special_tokens=True
    )
    elsewhere = [(draw_scene("test", 900 + n, SIDE), question) for n, (_, question) in enumerate(asked)]
    assert examination.answers(blind)[0] == Examination(model, processor, elsewhere, 0).answers(blind)[0]


def test_rows_cost_what_their_plans_say(loaded: tuple[Any, Any]) -> None:
    config, told = loaded[0].config, Asked([], [20, 30], [1, 1], [1, 3])
    cost = {row.key: row_cost(row, config, told) for row in main_rows(config, (64, 16))}
    assert cost["unpruned@144"] == cost["blind@144"]
    assert cost["unpruned@144"]["layer_averaged_tokens"] == cost["unpruned@144"]["final_tokens"] == PATCHES
    assert cost["ivtp@16"]["final_tokens"] == cost["random@16"]["layer_averaged_tokens"] == 16
    assert cost["ivtp@16"]["layer_averaged_tokens"] == (30 + 30 + 16 + 16) / 4
    assert cost["ivtp-v@16"]["tflops"] < cost["ivtp@16"]["tflops"] < cost["random@64"]["tflops"]
    assert cost["random@64"]["tflops"] == cost["oracle@64"]["tflops"] < cost["cls-topk@64"]["tflops"]
    assert cost["cls-topk@64"] == cost["cls-topk-all-layers@64"]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("ivtp", "ivtp-v")])
def test_every_system_answers_as_it_does_when_applied_by_hand(
    loaded: tuple[Any, Any], examination: Examination, name: str
) -> None:
    model, processor = loaded
    rows, skipped = system_rows(model.config, (24,))
    assert not skipped
    row = next(row for row in rows if row.method == name)
    if name == "random":  # the benchmark's own draws depend on the question, the method's on the picture
        assert row.chooser == name
        row = Row(name, 24, {}, system=name)
    before = set(vars(model.model))
    said, taken, _ = examination.answers(row)
    assert set(vars(model.model)) == before
    assert 0 < taken.selection < taken.prefill < taken.answer
    with make(name, 24)(model):
        tokens = model.generate(
            **examination.inputs, pixel_values=examination.pixels, max_new_tokens=4, do_sample=False
        )
    start = examination.inputs["input_ids"].shape[1]
    assert said == processor.tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)


def test_a_row_that_adapts_its_budget_tells_what_it_kept(
    loaded: tuple[Any, Any], examination: Examination, asked: list[Any]
) -> None:
    model, _ = loaded
    rows, _ = ablation_rows(model.config, (24,))
    row = next(row for row in rows if row.method == "ivtp-extended coverage=0.9")
    before = set(vars(model.model))
    kept = examination.answers(row).kept
    assert set(vars(model.model)) == before
    ((layer, counts),) = kept.items()
    with model.pruning(**row.options):
        trace = [
            model.explain(
                **Examination(*loaded, asked[n : n + 1], n).inputs, pixel_values=examination.pixels[n : n + 1]
            )
            for n in range(len(asked))
        ]
    assert counts == [one.final_tokens[0] for one in trace]
    cost = row_cost(row, model.config, Asked([], [20] * len(asked), [1] * len(asked), [1] * len(asked)), kept)
    assert cost["final_tokens"] == np.mean(counts)
    assert cost["layer_averaged_tokens"] == pytest.approx(np.mean([one.layer_averaged_tokens for one in trace]))
    assert int(layer) == row.plan(model.config).decoder[-1].last
    fixed = next(row for row in main_rows(model.config, (24,)) if row.method == "ivtp")
    assert examination.answers(fixed).kept == {}
    assert cost["tflops"] < row_cost(fixed, model.config, Asked([], [20], [1], [1]))["tflops"]


def test_a_choice_ahead_costs_a_pass_and_leaves_the_final_tokens_to_the_decoder(
    loaded: tuple[Any, Any], examination: Examination
) -> None:
    config, told = loaded[0].config, Asked([], [20], [1], [2])
    within = next(row for row in main_rows(config, (24,)) if row.method == "ivtp")
    ahead = next(row for row in ablation_rows(config, (24,))[0] if row.method == "ivtp decoder_choice=ahead")
    cost, before = row_cost(ahead, config, told), row_cost(within, config, told)
    assert cost["layer_averaged_tokens"] == cost["final_tokens"] == 24
    layers = config.text_config.num_hidden_layers
    choosing, dropping = ahead.plan(config).choosing_layer_tokens(), within.plan(config).decoder_layer_tokens(layers)
    extra = decoder_flops(config, 2, choosing) + decoder_flops(config, 20, (24,) * layers)
    extra -= decoder_flops(config, 20, dropping)
    assert 1e12 * (cost["tflops"] - before["tflops"]) == pytest.approx(extra)
    assert examination.text_before == [
        (row == config.image_token_id).nonzero()[0].item() - (mask == 0).sum().item()
        for row, mask in zip(examination.inputs["input_ids"], examination.inputs["attention_mask"], strict=True)
    ]


def test_selection_takes_time_in_every_row_that_selects(loaded: tuple[Any, Any], examination: Examination) -> None:
    for row in main_rows(loaded[0].config, (24,)):
        taken = examination.answers(row).taken
        assert (taken.selection > 0) == (row.method not in ("unpruned", "blind")), row.method
        assert 0 < taken.prefill < taken.answer


def test_systems_that_do_not_fit_are_told(loaded: tuple[Any, Any]) -> None:
    rows, skipped = system_rows(loaded[0].config, (29,))
    assert list(skipped) == ["spatial_pooling at 29"]
    assert "nearest: 27, 28, 30" in skipped["spatial_pooling at 29"]
    assert "fastv" in {row.method for row in rows}


def test_every_method_has_a_row_with_renumbered_positions(loaded: tuple[Any, Any]) -> None:
    config = loaded[0].config
    rows, skipped = compact_rows(config, (24, 29))
    assert list(skipped) == ["spatial_pooling positions=compact at 29"]
    assert {row.table for row in rows} == {COMPACT}
    assert [row.method for row in rows if row.visual_tokens == 24] == [f"{name} positions=compact" for name in METHODS]
    assert all(row.pruner(config).needs.compact_positions for row in rows)


def test_renumbered_positions_are_a_column_beside_the_methods() -> None:
    results = results_of({("unpruned", 576): share(390), ("ivtp", 64): share(330), ("random", 64): share(200)}, "a")
    asked = [question for _, question in sample_questions("test", 400)]
    compact = results["rows"][1] | {
        "method": "ivtp positions=compact", "table": COMPACT, "right": report.pack(share(100))
    }  # fmt: skip
    page = report.markdown(results)
    assert "renumbered" not in page
    results["rows"] = report.summarised([*results["rows"], compact], asked, TYPES)
    page = report.markdown(results)
    lines = {line.split(" |")[0]: line for line in page.split("## All systems at 64")[1].split("##")[0].splitlines()}
    assert lines["| method"].endswith("| accuracy | renumbered |")
    assert lines["| ivtp"].rstrip(" |").endswith(f"| {100 * 100 / 400:.1f} ± 4.2")
    assert lines["| random"].endswith("|  |")
    assert "Ablations of IVTP" not in page
    assert "positions=compact" not in page


def test_ablations_that_do_not_fit_are_told(loaded: tuple[Any, Any]) -> None:
    rows, skipped = ablation_rows(loaded[0].config, (64, 16))
    tables = {f"Table {number}" for number in (4, 5, 6, 8)}
    tables |= {"pseudo CLS", "positions", "threshold", "hand-over", "beyond the paper", "ahead of the decoder"}
    tables |= {"a budget of its own"}
    assert {row.table for row in rows} == tables
    assert {row.visual_tokens for row in rows} == {64, 16}
    assert "does not divide" in skipped["ivtp layers_per_group=3"]


def test_a_hand_over_below_the_budget_is_no_row(loaded: tuple[Any, Any]) -> None:
    rows, skipped = ablation_rows(loaded[0].config, (64, 100))
    handed = [(row.visual_tokens, row.options["tower_tokens"]) for row in rows if row.table == "hand-over"]
    assert handed == [(64, 96)]
    assert not [name for name in skipped if "tower_tokens" in name]


@pytest.mark.parametrize("budget", [512, 384, 256])
def test_budgets_of_the_papers_figures_have_rows_of_every_kind(budget: int) -> None:
    config = IVTPLlavaConfig.from_pretrained(MINIATURE)
    rows, skipped = _rows(config, "all", (budget, 192), (budget,))
    unfit = {f"spatial_pooling{how} at {budget}" for how in ("", " positions=compact")}
    assert set(skipped) <= unfit | {"ivtp layers_per_group=3", "ivtp layers_per_group=6"}
    found = {row.key: row_cost(row, config, Asked([], [20], [1], [1])) for row in rows if row.visual_tokens == budget}
    assert {cost["final_tokens"] for cost in found.values()} == {budget}
    fewer = {row.method: row_cost(row, config, Asked([], [20], [1], [1])) for row in rows if row.visual_tokens == 192}
    main = [*CHOOSERS, "ivtp", "ivtp-v"]
    assert all(found[f"{name}@{budget}"]["tflops"] > fewer[name]["tflops"] for name in main)
    assert any(row.table == "Table 8" for row in rows)


def test_ticks_of_a_plot_do_not_touch() -> None:
    assert apart([16, 32, 64, 128, 192, 256, 384, 512, 576]) == [16, 32, 64, 128, 192, 256, 384, 576]
    assert apart([16, 32, 64, 128, 192]) == [16, 32, 64, 128, 192]
    assert apart([]) == []


def test_ablations_are_compared_with_each_other_question_by_question() -> None:
    draws = np.random.default_rng(3)
    last = draws.random(400) < 0.8
    mean = last ^ (draws.random(400) < 0.05)
    results = results_of({("unpruned", 576): share(390), ("ivtp", 64): share(330)}, "a")
    asked = [question for _, question in sample_questions("test", 400)]
    ablations = [
        results["rows"][1] | {"method": f"ivtp aggregation={how}", "table": table, "right": report.pack(right)}
        for how, table, right in (("last", "Table 4", share(330)), ("mean", "Table 5", mean), ("max", "Table 5", last))
    ]
    results["rows"] = report.summarised([*results["rows"], *ablations], asked, TYPES)
    low, high = (100 * end for end in paired_interval(last, mean))
    table = report.markdown(results).split("### Table 5 at 64 visual tokens")[1].split("##")[0]
    assert "| setting | ivtp | aggregation=mean |" in table
    (line,) = [line for line in table.splitlines() if line.startswith("| aggregation=max |")]
    assert line.endswith(f"| {100 * (last.mean() - mean.mean()):+.1f} [{low:+.1f}, {high:+.1f}] |")
    single = [end - start for start, end in (bootstrap_interval(last), bootstrap_interval(mean))]
    assert (high - low) / 100 < min(single)
    # The setting of Table 4 is IVTP itself here.
    assert "| aggregation=last | +0.0 [+0.0, +0.0] |" in report.markdown(results)


@pytest.mark.slow
def test_an_evaluation_writes_results_a_table_and_plots(checkpoint: Path, tmp_path: Path) -> None:
    file = evaluate(checkpoint, tmp_path, rows="all", ablation_budgets=(24,), headline=("existence", "colour"))
    results = json.loads(file.read_text())
    needed = {
        "method", "visual_tokens", "accuracy", "interval", "by_type", "by_held_out", "tflops", "final_tokens",
        "layer_averaged_tokens", "mode", "seconds", "difference", "difference_interval", "date", "threads",
    }  # fmt: skip
    assert all(needed <= set(row) and row["mode"] == "inference" for row in results["rows"])
    assert {"versions", "machine", "checkpoint", "world", "commands", "date"} <= set(results)
    asked = [question for _, question in sample_questions("test", 12, side=SIDE)]
    for row in results["rows"]:
        right = report.unpack(row["right"], 12)
        counted = [hit for hit, question in zip(right, asked, strict=True) if question.type in ("existence", "colour")]
        assert row["accuracy"] == pytest.approx(np.mean(counted))
        assert sum(part["n"] for part in row["by_type"].values()) == 12
    same = {row["method"]: row["right"] for row in results["rows"]}
    assert same["ivtp"] == same["ivtp relevance_threshold=0.2"] == same["ivtp guidance=clip"]
    assert "## Ablations of IVTP" in file.with_suffix(".md").read_text()
    endings = ("-systems-tflops.png", "-systems-tokens.png", "-tflops.png", "-tokens.png", ".json", ".md")
    written = {f"quality-{results['date']}{ending}" for ending in endings}
    assert {path.name for path in tmp_path.iterdir()} == written | {".results.lock"}


def test_questions_about_what_is_not_there_are_rows_of_their_own() -> None:
    asked = [question for _, question in sample_questions("test", 400)]
    there = {"yes": [], "no": []}
    for place, question in enumerate(asked):
        if question.type == "existence":
            there[question.answer].append(place)
    right = np.ones(len(asked), dtype=bool)
    right[there["no"][0]] = False
    results = results_of({("unpruned", 576): np.ones(len(asked), dtype=bool), ("ivtp", 64): right}, "a")
    (_, row) = results["rows"]
    assert row["existence"]["yes"] == {"accuracy": 1.0, "n": len(there["yes"])}
    assert row["existence"]["no"] == {"accuracy": 1 - 1 / len(there["no"]), "n": len(there["no"])}
    table = report.markdown(results).split("## Existence")[1].split("##")[0]
    assert f"| ivtp | 64 | 100.0 | {100 * row['existence']['no']['accuracy']:.1f} |" in table
    assert f"no (n = {len(there['no'])})" in table


def test_budgets_of_their_own_are_paired_with_fixed_ones() -> None:
    results = results_of({("unpruned", 576): share(390), ("ivtp-extended", 64): share(380)}, "a")
    assert "against fixed ones" not in report.markdown(results)
    asked = [question for _, question in sample_questions("test", 400)]
    own = results["rows"][1] | {
        "method": "ivtp-extended coverage=0.9", "table": ADAPTIVE, "options": {"tower_tokens": None, "coverage": 0.9},
        "right": report.pack(share(360)), "final_tokens": 41.5,
    }  # fmt: skip
    alike = own | {
        "method": "ivtp-extended tower_tokens=120", "options": {"tower_tokens": 120}, "visual_tokens": 42,
        "right": report.pack(share(350)),
    }  # fmt: skip
    results["rows"] = report.summarised([*results["rows"], own, alike], asked, TYPES)
    table = report.markdown(results).split("against fixed ones")[1].split("##")[0]
    assert "| to 64 for each (10 GFLOPs) | to 42 for each of 120 from the tower (10 GFLOPs) |" in table
    (low, high), more = (paired_interval(share(360), share(number)) for number in (380, 350))
    differences = f"-5.0 [{100 * low:+.1f}, {100 * high:+.1f}] | +2.5 [{100 * more[0]:+.1f}, {100 * more[1]:+.1f}] |"
    assert f"| 0.9 | 64 | 41.5 | 10 | 90.0 ± 3.0 | {differences}" in table


def test_types_that_are_not_answered_well_stay_out_of_the_headline(asked: list[Any]) -> None:
    right = np.array([question.type not in ("count", "next_to") for _, question in asked])
    rows = [{"method": "unpruned", "mode": "inference", "right": report.pack(right)}]
    told = Asked([question for _, question in asked])
    assert _well_answered(rows, told) == [kind for kind in TYPES if kind not in ("count", "next_to")]
    nothing = [rows[0] | {"right": report.pack(np.zeros(len(asked), dtype=bool))}]
    assert _well_answered(nothing, told) == list(TYPES)


@pytest.mark.slow
def test_results_can_be_told_again_under_another_headline(checkpoint: Path, tmp_path: Path) -> None:
    every = json.loads(evaluate(checkpoint, tmp_path / "every").read_text())
    few = json.loads(evaluate(checkpoint, tmp_path / "few", headline=("corner", "larger")).read_text())
    again = report.retold(every, ("corner", "larger"))
    assert again["questions"] == few["questions"]
    for one, other in zip(again["rows"], few["rows"], strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }
    with pytest.raises(ValueError, match="another world"):
        report.retold(every | {"world": "0"}, ("corner",))
    with pytest.raises(ValueError, match="allowed: existence"):
        report.retold(every, ("smell",))


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_where_it_was(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads(evaluate(checkpoint, tmp_path / "whole").read_text())
    answers, calls = Examination.answers, []

    def interrupted(self: Examination, row: Row) -> Any:
        calls.append((self.first, row.method))
        if len(calls) == 10:
            raise KeyboardInterrupt
        return answers(self, row)

    monkeypatch.setattr(Examination, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, tmp_path / "parts")
    (partial,) = (tmp_path / "parts").iterdir()
    with partial.open("ab") as log:
        log.write(b'{"row": "cut o')
    file = evaluate(checkpoint, tmp_path / "parts")
    assert len(calls) == 2 * 8 + 1
    assert not partial.exists()
    rows = json.loads(file.read_text())["rows"]
    assert [row["right"] for row in rows] == [row["right"] for row in whole["rows"]]


@pytest.mark.slow
def test_rows_that_another_process_joins_in_the_meantime_stay(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(checkpoint, tmp_path, methods=["unpruned"])
    ask = evaluate_quality.ask

    def ask_slowly(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(evaluate_quality, "ask", ask)
        evaluate(checkpoint, tmp_path, methods=["random"], batch=3, join=True)
        return ask(*arguments, **options)

    monkeypatch.setattr(evaluate_quality, "ask", ask_slowly)
    file = evaluate(checkpoint, tmp_path, methods=["blind"], join=True)
    rows = json.loads(file.read_text())["rows"]
    assert sorted(row["method"] for row in rows) == ["blind", "random", "unpruned"]


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_results(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = evaluate(checkpoint, tmp_path, methods=["blind"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(checkpoint, tmp_path, methods=["random"])
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.endswith(".partial.jsonl")}
    assert after == before
    monkeypatch.undo()
    assert evaluate(checkpoint, tmp_path, methods=["random"]) == file
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows] == ["unpruned", "blind", "random"]


@pytest.mark.slow
def test_other_questions_and_damaged_files_get_files_of_their_own(checkpoint: Path, tmp_path: Path) -> None:
    first = evaluate(checkpoint, tmp_path, methods=["blind"])
    second = evaluate(checkpoint, tmp_path, methods=["blind"], number=11)
    assert second.name == f"{first.stem}-2.json"
    second.write_text("{")
    assert evaluate(checkpoint, tmp_path, methods=["blind"], number=11).name == f"{first.stem}-3.json"
    assert second.read_text() == "{"


@pytest.mark.slow
def test_a_retrained_checkpoint_joins_the_results_of_the_one_it_came_from(
    checkpoint: Path, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="evaluate it first"):
        evaluate(checkpoint, tmp_path / "none", methods=["ivtp"], reference=checkpoint)
    file = evaluate(checkpoint, tmp_path, methods=["ivtp"])
    file = file.replace(file.with_stem("quality-2026-01-02"))  # retraining takes days
    file.write_text(json.dumps(json.loads(file.read_text()) | {"date": "2026-01-02"}))
    again = tmp_path / "again"
    shutil.copytree(checkpoint, again)
    told = json.loads((again / "generation_config.json").read_text())
    (again / "generation_config.json").write_text(json.dumps(told | {"retrained": True}))
    kept = {"note": "what other commands wrote into the results"}
    file.write_text(json.dumps(json.loads(file.read_text()) | kept))
    assert evaluate(again, tmp_path, methods=["ivtp"], reference=checkpoint) == file
    assert json.loads(file.read_text())["note"] == kept["note"]
    rows = json.loads(file.read_text())["rows"]
    assert [(row["method"], row["mode"]) for row in rows] == [
        ("unpruned", "inference"), ("ivtp", "inference"), ("ivtp", "retrained"),
    ]  # fmt: skip
    assert rows[1]["right"] == rows[2]["right"]
    assert rows[1]["checkpoint"] != rows[2]["checkpoint"]
    assert "ivtp (retrained)" in file.with_suffix(".md").read_text()


def test_the_pages_show_the_newest_results() -> None:
    for page, texts in readme.blocks(readme.newest(), readme.second()).items():
        for text in texts:
            assert readme.filled(page.read_text(), text) == page.read_text(), "python -m benchmarks.quality.readme"


def results_of(right: dict[tuple[str, int], np.ndarray], checkpoint: str) -> dict[str, Any]:
    asked = [question for _, question in sample_questions("test", 400)]
    rows = [
        {"method": method, "visual_tokens": tokens, "table": "", "mode": "inference", "checkpoint": checkpoint,
         "right": report.pack(answers), "tflops": 0.01, "final_tokens": tokens, "layer_averaged_tokens": tokens,
         "code": "one"}
        for (method, tokens), answers in right.items()
    ]  # fmt: skip
    return {
        "date": "2026-01-01",
        "checkpoint": checkpoint,
        "checkpoint_name": "some",
        "world": fingerprint(),
        "sample": {"split": "test", "number": 400, "side": 336, "seed": 0},
        "questions": report.describe_questions(asked, TYPES),
        "rows": report.summarised(rows, asked, TYPES),
    }


def share(number: int) -> np.ndarray:
    return np.arange(400) < number


@pytest.mark.slow
def test_seeds_that_agree_and_seeds_that_do_not(tmp_path: Path) -> None:
    first = results_of({("ivtp", 64): share(300), ("random", 64): share(200), ("topk", 64): share(201)}, "a")
    same = results_of({("ivtp", 64): share(280), ("random", 64): share(205), ("topk", 64): share(200)}, "b")
    other = results_of({("ivtp", 64): share(100), ("random", 64): share(200), ("topk", 64): share(200)}, "c")
    agreed = agreement(first, same)["budgets"]["64"]
    assert agreed["order"] == ["ivtp", "topk", "random"]
    assert agreed["other_order"] == ["ivtp", "random", "topk"]
    assert agreed["disagree"] == []
    assert agreed["open"] == [["random", "topk"]]
    assert agreement(first, other)["budgets"]["64"]["disagree"] == [["ivtp", "random"], ["ivtp", "topk"]]
    for second, says in ((same, "The seeds agree on the order."), (other, "at 64 tokens ivtp and random, ivtp and")):
        told = report.markdown(first | {"other_seed": agreement(first, second)})
        assert says in told
    assert "75.0 / 25.0" in told


def test_a_page_tells_the_newest_results_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="make quality"):
        readme.newest(folder)
    for date, right in (("2026-01-01", 100), ("2026-02-01", 300)):
        rows = {("unpruned", 576): share(400), ("ivtp", 64): share(right)}
        results = results_of(rows, checkpoint_fingerprint(MINIATURE))
        (folder / f"quality-{date}.json").write_text(json.dumps(results))
    text = readme.excerpt(readme.newest(folder), tmp_path / "docs" / "quality.md")
    assert "| ivtp |  | 75.0 ± " in text
    assert "measured on 2026-01-01 with" in text
    results["rows"][1]["date"] = "2026-01-05"
    (folder / "quality-2026-02-01.json").write_text(json.dumps(results))
    text = readme.excerpt(readme.newest(folder), tmp_path / "docs" / "quality.md")
    assert "measured from 2026-01-01 to 2026-01-05 with" in text
    assert "At 64 tokens IVTP loses 25.0 points" in readme.findings_excerpt(readme.newest(folder))
    assert "](../benchmarks/results/quality-2026-02-01-tokens.png)" in text
    others = results_of({("unpruned", 576): share(200), ("ivtp", 64): share(50)}, "somebody's")
    (folder / "quality-2026-03-01.json").write_text(json.dumps(others))
    assert readme.newest(folder).name == "quality-2026-02-01.json"
    begin, end = readme.marks("quality")
    page = f"before\n{begin}\nold\n{end}\nafter\n"
    once = readme.filled(page, text)
    assert once == f"before\n{text}\nafter\n"
    assert readme.filled(once, text) == once
    with pytest.raises(ValueError, match="has no <!-- quality"):
        readme.filled("nothing", text)


def test_the_first_page_leaves_large_budgets_to_the_other(tmp_path: Path) -> None:
    file = tmp_path / "quality-2026-01-01.json"
    results = results_of({("unpruned", 576): share(400), ("ivtp", 256): share(390), ("ivtp", 64): share(350)}, "a")
    file.write_text(json.dumps(results))
    assert "| method | 576 | 64 |" in readme.short_excerpt(file)
    assert "| method | 576 | 256 | 64 |" in readme.excerpt(file)


def test_a_second_instrument_has_a_section_of_its_own(tmp_path: Path) -> None:
    begin, end = readme.marks("second")
    assert readme.second(tmp_path) is None
    assert readme.second_excerpt(None) == f"{begin}\n{end}"
    for date, right in (("2026-01-02", 380), ("2026-01-01", 100)):
        results = results_of(
            {("unpruned", 576): share(400), ("tome+", 64): share(right), ("ivtp", 64): share(350)}, "b"
        )
        (tmp_path / f"quality-{date}.json").write_text(json.dumps(results))
    text = readme.second_excerpt(readme.second(tmp_path), tmp_path / "quality.md")
    assert text.startswith(f"{begin}\n## A second instrument\n")
    assert "| tome+ |  | 95.0 ± " in text
    assert "](quality-2026-01-02.md)" in text
    assert "- At 64 tokens IVTP loses 12.5 points" in text


def test_retrained_rows_do_not_speak_for_the_published_method() -> None:
    shown = (("unpruned", 576), ("ivtp", 16), ("ivtp-extended", 16))
    results = results_of({name: share(400 - place) for place, name in enumerate(shown)}, "a")
    told = list(findings._absent(results))
    assert len(told) == 1
    # A retrained row comes after, and answers nothing.
    again = results_of({("ivtp", 16): share(0)}, "b")["rows"]
    mixed = results | {"rows": results["rows"] + [row | {"mode": "retrained"} for row in again]}
    assert list(findings._absent(mixed)) == told


def test_a_row_that_was_retrained_again_replaces_the_one_before() -> None:
    published = results_of({("ivtp", 64): share(300)}, "a")["rows"]
    first, second = (
        [row | {"mode": "retrained"} for row in results_of({("ivtp", 64): share(right)}, name)["rows"]]
        for name, right in (("b", 310), ("c", 320))
    )
    rows = report.joined(report.joined(published, first), second)
    assert [(row["mode"], row["checkpoint"]) for row in rows] == [("inference", "a"), ("retrained", "c")]
    assert findings.accuracy({"rows": rows}, "ivtp", "retrained") == second[0]["accuracy"]


def test_seeds_are_compared_on_the_same_questions_only() -> None:
    first, second = (results_of({("ivtp", 64): share(300)}, name) for name in "ab")
    with pytest.raises(ValueError, match="different questions: sample is"):
        agreement(first, second | {"sample": {"number": 7}})
    with pytest.raises(ValueError, match="compare two seeds"):
        agreement(first, first)
    with pytest.raises(ValueError, match="no row in common"):
        agreement(first, second | {"rows": []})


@pytest.mark.slow
def test_retraining_changes_what_answers_and_not_what_chooses_and_goes_on_where_it_was(
    checkpoint: Path, tmp_path: Path
) -> None:
    before = load_file(checkpoint / "model.safetensors")
    options = {"model": checkpoint, "visual_tokens": 24, "steps": 3, "seed": 0, "threads": 1}
    retrain.main(**options, state=tmp_path / "state", out=tmp_path / "new")
    after = load_file(tmp_path / "new" / "model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model", "multi_modal_projector"}
    model = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert model.pruning_config.visual_tokens == 24
    assert model.pruning_config.strict is False
    assert len((tmp_path / "state" / "log.jsonl").read_text().splitlines()) == 1
    with pytest.raises(FileExistsError):
        retrain.main(**options, state=tmp_path / "state", out=tmp_path / "new")
    retrain.main(**options, state=tmp_path / "state", out=tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(after[name], again[name]) for name in after)
    with pytest.raises(ValueError, match="visual_tokens"):
        retrain.main(**options | {"visual_tokens": 12}, state=tmp_path / "state", out=tmp_path / "other")


def test_retraining_learns_from_the_answer_and_the_end_alone(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    asked = retrain.draw_questions(0, SIDE)
    inputs, labels = retrain.prepared(processor, asked)
    for row, (_, question) in enumerate(asked):
        told = labels[row][labels[row] != -100]
        assert processor.tokenizer.decode(told[:1]).strip() == question.answer
        assert told[1:].tolist() == [processor.tokenizer.eos_token_id]
        at = int(inputs["attention_mask"][row].sum())
        assert labels[row, at - 2 : at].tolist() == told.tolist()


def test_a_checkpoint_of_another_world_is_refused(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded
    check_world(model, processor)
    monkeypatch.setattr(model.config, "world_fingerprint", "0" * 16)
    with pytest.raises(ValueError, match="another world"):
        check_world(model, processor)
    monkeypatch.setattr(model.config, "world_fingerprint", None)
    with pytest.warns(UserWarning, match="no world_fingerprint"):
        check_world(model, processor)


def test_a_model_that_does_not_read_the_processors_words_is_refused(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    for target, value, message in (
        (f"{__name__}.IVTPLlavaForConditionalGeneration.get_input_embeddings", few_words, "language model reads 100"),
        ("benchmarks.quality.checkpoint.answer_words", lambda: ["antidisestablishmentarianism"], "cannot say"),
    ):
        with monkeypatch.context() as change:
            change.setattr(target, value)
            with pytest.raises(ValueError, match=message):
                check_world(model, processor)
    other = miniature_processor()
    other.image_token = "<pad>"
    with pytest.raises(ValueError, match="image token is number"):
        check_world(model, other)


def few_words(_: Any) -> torch.nn.Module:
    return torch.nn.Embedding(100, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 0}, "at least 1"),
        ({"rows": "some"}, "allowed: main, systems, compact, ablations, all"),
        ({"budgets": (0,)}, "visual_tokens=0"),
        ({"methods": ["magic"]}, "No row of .* at these numbers of tokens; allowed: unpruned, blind"),
        ({"headline": ["smell"]}, "Unknown question type"),
    ],
)
def test_options_out_of_range_are_told(checkpoint: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_all_code_that_answers_is_fingerprinted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(modeling_ivtp.__file__).parent
    files = checkpoints.code_files()
    assert {*(package / "model").glob("*.py"), *(package / "methods").glob("*.py")} < set(files)
    assert {"methods.py", "examination.py"} <= {file.name for file in files if file.parent.name == "quality"}
    before = checkpoints.code_fingerprint()
    changed = tmp_path / "rollout.py"
    changed.write_text((package / "model" / "rollout.py").read_text() + "\n")
    others = [changed if file.name == changed.name else file for file in files]
    monkeypatch.setattr(checkpoints, "code_files", lambda: others)
    assert checkpoints.code_fingerprint() != before


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        evaluate(tmp_path, tmp_path / "out")


def test_answers_of_the_log_come_in_order_and_survive(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, {"a": 1}) as log:
        log.add("row", 1, Answers(["c"], Taken(2.0, 1.0, 0.5), {"7": [3]}))
        log.add("row", 0, Answers(["a", "b"], Taken(1.0, 0.5, 0.25), {"7": [1, 2]}))
    with AnswerLog(tmp_path, {"a": 1}) as log:
        assert log.has("row", 1)
        assert not log.has("row", 2)
        assert log.answers("row") == (["a", "b", "c"], Taken(3.0, 1.5, 0.75), {"7": [1, 2, 3]})
    with AnswerLog(tmp_path, {"a": 2}) as log:
        assert not log.has("row", 1)


@pytest.mark.slow
def test_the_miniatures_tokenizer_says_every_answer_in_one_token() -> None:
    tokenizer = miniature_processor().tokenizer
    assert all(len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in answer_words())
    scene = draw_scene("test", 0)
    assert all(question.answer in answer_words() for question in islice(questions(scene), 8))
