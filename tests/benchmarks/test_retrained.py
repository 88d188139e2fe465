"""Retraining all systems of the tables: the same data for all, what learns, and results that go on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality import retrain, retrain_all
from benchmarks.quality.evaluate_quality import MINIATURE
from benchmarks.quality.plots import plot_kept, tokens_of_pictures
from benchmarks.quality.retrain import Course, draw_questions, load_base, prepared
from benchmarks.quality.retrained_rows import LEARNS, chosen_rows, retrained_rows
from modeling_ivtp import IVTPLlavaConfig
from modeling_ivtp.trained.adapter import describe_shape
from modeling_ivtp.training.parts import PrunedBy, training_module

SMALL = Course(steps=2, scenes=1, questions=2)


@pytest.fixture(scope="module")
def config() -> Any:
    return IVTPLlavaConfig.from_pretrained(MINIATURE)


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_base(MINIATURE, None, 0, "cpu")


def test_the_rows_are_those_of_the_tables_in_their_order(config: Any) -> None:
    rows = retrained_rows(config)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert names[:8] == [
        "unpruned", "ivtp", "lvpruning", "atp-llava target=144", "atp-llava target=88", "c_abstractor",
        "context_attention", "resampler",
    ]  # fmt: skip
    table_1 = {row.name for row in rows if row.table == "Table 1"}
    assert {"random", "topk", "spatial_pooling", "evit", "tome", "tome+", "ivtp-v", "pyramiddrop"} <= table_1
    tables = list(dict.fromkeys(row.table for row in rows))
    assert [table for table in tables if table in ("Table 4", "Table 6", "Table 5", "Table 8")] == [
        "Table 4", "Table 6", "Table 5", "Table 8",
    ]  # fmt: skip
    for row in rows:
        if row.connector is None:
            row.pruned_by.plan(config)  # fits the miniature
            if row.pruned_by.is_trained:
                row.pruned_by.make().build(describe_shape(config))
            asked = row.rows(config, row.pruned_by.make() if row.pruned_by.is_trained else None)
            assert all(one.method for one in asked)
    asked = [row.method for row in chosen_rows(config, ["lvpruning"])[0].rows(config, PrunedBy("lvpruning", 64).make())]
    assert asked == ["lvpruning", "lvpruning ratio=0.6", "lvpruning ratio=0.5", "lvpruning ratio=0.45"]
    fixed = chosen_rows(config, ["atp-llava fixed ratios"])[0].pruned_by
    assert fixed.plan(config).layer_average(config.text_config.num_hidden_layers) == pytest.approx(144, abs=0.5)
    with pytest.raises(ValueError, match="No system fastw; allowed: unpruned, ivtp, lvpruning"):
        chosen_rows(config, ["fastw"])


def test_what_stands_in_for_a_system_before_training_keeps_as_many_tokens(config: Any) -> None:
    depth = config.text_config.num_hidden_layers
    for row in retrained_rows(config):
        if row.untrained is not None:
            plan = row.untrained.pruner(config).plan(config, config.num_patches)
            if (target := row.pruned_by.options.get("target")) is not None:
                assert plan.layer_average(depth) == pytest.approx(target, abs=1), row.name


def test_scenes_and_questions_depend_on_seed_and_step_alone() -> None:
    first, again = (draw_questions(3, course=Course(scenes=2, questions=3)) for _ in range(2))
    assert [question.prompt for _, question in first] == [question.prompt for _, question in again]
    assert len(first) == 6
    other = draw_questions(3, course=Course(scenes=2, questions=3, seed=1))
    assert not np.array_equal(first[0][0].pixels, other[0][0].pixels)
    later = draw_questions(4, course=Course(scenes=2, questions=3))
    assert not np.array_equal(first[0][0].pixels, later[0][0].pixels)
    assert {id(scene) for scene, _ in first[:3]} == {id(first[0][0])}


@pytest.mark.parametrize("changes", [{"steps": 0}, {"scenes": 0}, {"questions": 1.5}, {"seed": -1}])
def test_a_course_out_of_range_is_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.*; allowed: a whole number of at least"):
        Course(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unpruned", "ivtp", "evit", "cdpruner", "fastv"])
def test_scenes_that_are_encoded_once_give_the_loss_of_those_encoded_for_each_question(
    name: str, base: tuple[Any, Any], tmp_path: Path
) -> None:
    llava, processor = base
    pruned_by = PrunedBy(name, None if name == "unpruned" else 64)
    inputs, labels = prepared(processor, draw_questions(0, course=SMALL))
    with training_module(llava, pruned_by, LEARNS) as module, torch.no_grad():
        step = retrain._Step(llava, processor, module, torch.nn.ModuleDict(), [], SMALL, 0)
        module.train()
        shared = module(**step._seen(dict(inputs)), labels=labels).loss
        alone = module(**inputs, labels=labels).loss
        module.eval()
    assert "mm_encoder_outputs" in step._seen(dict(inputs))
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("halves", [1, 2])
def test_a_connector_learns_with_the_projector_first_and_then_with_the_language_model(
    halves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llava, processor = load_base(MINIATURE, {"name": "c_abstractor", "tokens": 16, "depth": 1}, 0, "cpu")
    before = {name: weight.clone() for name, weight in llava.state_dict().items()}
    optimize, calls = retrain.optimize, []

    def stopped(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        return optimize(*arguments) if len(calls) <= halves else {"loss": 0.0, "right": 0.0}

    monkeypatch.setattr(retrain, "optimize", stopped)
    course = Course(steps=2, scenes=1, questions=1)
    retrain.retrain(llava, processor, PrunedBy("unpruned"), LEARNS, course, tmp_path, MINIATURE)
    after = llava.state_dict()
    changed = {name.split(".")[1] for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed - {"weight"} == {"connector", "multi_modal_projector"} | (
        {"language_model"} if halves == 2 else set()
    )
    assert ("weight" in changed) == (halves == 2)  # that of lm_head


@pytest.mark.slow
def test_results_come_as_they_are_measured_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results" / "retrained.json"
    options = {
        "model": MINIATURE, "states": tmp_path / "states", "out": out, "steps": 2, "scenes": 1, "questions": 1,
        "asked": 3, "batch": 1, "threads": 1,
    }  # fmt: skip
    retrain_all.main(**options, system=["unpruned"])
    first = json.loads(out.read_text())
    assert [(row["system"], row["mode"], row["seed"]) for row in first["rows"]] == [
        ("unpruned", "inference", None), ("unpruned", "retrained", 0),
    ]  # fmt: skip
    original = retrain_all.retrain

    def far(llava: Any, *rest: Any) -> Any:
        trained = original(llava, *rest)
        llava.get_input_embeddings().weight.data.mul_(1.5)  # further from the base than modules of another one may be
        return trained

    with monkeypatch.context() as patch:
        patch.setattr(retrain_all, "retrain", far)
        retrain_all.main(**options, system=["atp-llava target=144"])
    results = json.loads(out.read_text())
    assert results["rows"][:2] == first["rows"]
    trained = results["rows"][-1]
    assert trained["method"] == "atp-llava target=144"
    assert all(len(counts) == 3 for counts in trained["kept"].values())  # of every picture
    assert 0 < trained["final_tokens"] < 576
    assert (tmp_path / "states" / "Table-1-atp-llava-target=144-0" / "pruner" / "model.safetensors").is_file()
    assert (out.parent / "retrained-kept.png").stat().st_size > 10_000
    page = out.with_suffix(".md").read_text()
    assert "Not measured with seed 0: ivtp (Table 1); lvpruning (Table 1); " in page
    assert "| control | unpruned | 0 | 576 |" in page
    content = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(retrain_all, "retrain", None)  # nothing is trained again
        retrain_all.main(**options, system=["unpruned", "atp-llava target=144"])
    assert out.read_bytes() == content
    with pytest.raises(ValueError, match=r"has course=.*allowed: .*or another --out"):
        retrain_all.main(**options | {"steps": 3}, system=["unpruned"])
    with pytest.raises(ValueError, match="asked=0, batch=1; allowed: 1 to 2000 questions"):
        retrain_all.main(**options | {"asked": 0})
    assert out.read_bytes() == content


def test_differences_are_paired_and_those_that_are_not_measured_are_named(config: Any) -> None:
    from benchmarks.quality.report import pack

    right = np.arange(40) % 4 > 0
    better = right | (np.arange(40) < 8)

    def row(system: str, mode: str, answers: np.ndarray) -> dict[str, Any]:
        return {
            "system": system, "method": system, "table": "", "mode": mode, "seed": None if mode == "inference" else 0,
            "final_tokens": 64, "layer_averaged_tokens": 80.0, "tflops": 0.01, "seconds_per_step": 1.0,
            "accuracy": float(answers.mean()), "right": pack(answers),
        }  # fmt: skip

    rows = [row("unpruned", "retrained", better), row("ivtp", "inference", right), row("ivtp", "retrained", right)]
    rows += [row("lvpruning", "inference", right), row("lvpruning", "retrained", better)]
    rows.append(row("lvpruning", "retrained", better) | {"method": "lvpruning ratio=0.6"})
    measured = {"unpruned", "ivtp", "lvpruning"}
    results = {
        "date": "2026-01-01", "checkpoint": "x", "asked": 40, "rows": rows,
        "course": {"steps": 1, "scenes": 1, "questions": 1}, "learning_rates": {"model": 2e-5, "new": 1e-3},
    }  # fmt: skip
    page = retrain_all.markdown(results, retrained_rows(config), ["existence"] * 40)
    (line,) = [line for line in page.splitlines() if line.startswith("| Table 1 | ivtp |")]
    assert "| 75.0 ± " in line
    assert "| +0.0 [+0.0, +0.0] | -5.0 [" in line
    (missing,) = [line for line in page.splitlines() if line.startswith("Not measured with seed 0: ")]
    named = [f"{row.name} ({row.table})" for row in retrained_rows(config) if row.name not in measured]
    assert missing.removeprefix("Not measured with seed 0: ").removesuffix(".").split("; ") == named
    at_64, at_another = [line for line in page.splitlines() if line.startswith("| Table 1 | lvpruning")]
    assert "| +5.0 [" in at_64
    assert "| – | 80.0 ± " in at_another  # the stand-in has 64 tokens


def test_tokens_of_pictures_are_averaged_over_all_layers() -> None:
    """ATP-LLaVA's Table 2: 576 tokens in 4 layers, 126 in 10, 88 in 10 and 20 in 8."""
    kept = {"3": [126, 576], "13": [88, 576], "23": [20, 576]}
    assert tokens_of_pictures(kept, 576, 32) == [(4 * 576 + 10 * 126 + 10 * 88 + 8 * 20) / 32, 576]
    assert plot_kept([{"method": "fastv", "kept": {}}], ["count"], 576, 32) is None
    figure = plot_kept([{"method": "atp", "kept": kept}] * 2, ["count", "colour"], 576, 32)
    (first, second) = figure.axes
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["colour", "count"]
    assert second.get_title(loc="left") == "atp"
    dots = [line.get_xdata()[0] for line in first.lines if line.get_marker() == "o"]
    assert dots == [576, 143.875]
