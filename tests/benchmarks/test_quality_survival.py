"""Where patches are lost: followed on a tiny model with random weights, and counted by hand."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality import report, survival
from benchmarks.quality.evaluate_quality import evaluate_checkpoint
from benchmarks.quality.examination import Examination
from benchmarks.quality.methods import main_rows
from benchmarks.quality.world import PATCH, TYPES, sample_questions
from modeling_ivtp.serving.answering import load_model
from tests.support.untaught import SIDE, untaught

KEPT = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untaught(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return load_model(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def followed(loaded: tuple[Any, Any]) -> dict[str, Any]:
    rows = [row for row in main_rows(loaded[0].config, [KEPT]) if row.method in survival.FOLLOWED]
    return survival.follow(*loaded, rows, number=11, batch=4)


def test_patches_are_followed_through_every_group(followed: dict[str, Any]) -> None:
    steps = {method: [(one["step"], one["tokens"]) for one in found] for method, found in followed.items()}
    assert all(steps[name] == [("before the decoder", KEPT)] for name in ("random", "cls-topk", "cls-topk-all-layers"))
    tower = ["tower, layers 1 to 2", "tower, layers 3 to 4"]
    assert [step for step, _ in steps["ivtp-v"]] == tower
    assert [step for step, _ in steps["ivtp"]] == [*tower, "decoder, layers 1 to 2"]
    assert {found[-1]["tokens"] for found in followed.values()} == {KEPT}
    for found in followed.values():
        assert all(len(step["left"]) == 11 for step in found)
        for earlier, later in pairwise(found):
            assert np.all(np.array(earlier["left"]) >= np.array(later["left"]))  # what is gone is gone
    assert 0 < sum(followed["random"][0]["left"]) < 11


@pytest.mark.parametrize("name", ["random", "cls-topk", "cls-topk-all-layers"])
def test_the_patches_followed_are_those_that_are_answered_from(loaded: tuple[Any, Any], name: str) -> None:
    model, processor = loaded
    examination = Examination(model, processor, list(sample_questions("test", 4, side=SIDE)), 0)
    row = next(row for row in main_rows(model.config, [KEPT]) if row.method == name)
    with row.applied(model):
        image, _ = examination._image(row)
    (kept,) = survival.whats_left(examination, row).values()
    assert torch.equal(kept.sort(1).values, image["mm_encoder_outputs"]["image"].kept_patches)


def test_an_object_is_left_where_a_patch_that_shows_it_is_kept() -> None:
    scene, question = next(iter(sample_questions("test", 1, types=["left_of"], side=SIDE)))
    objects = question.subjects + question.sources
    assert len(objects) == 2
    patches = []
    for number in objects:
        covered = {
            row * scene.grid + column: scene.coverage[number, row, column]
            for row in range(scene.grid)
            for column in range(scene.grid)
        }
        patches.append(max(covered, key=covered.__getitem__))
        assert covered[patches[-1]] >= PATCH * PATCH / 4
    pair = [(scene, question)]
    assert survival.all_left(pair, torch.tensor([patches])) == [True]
    assert survival.all_left(pair, torch.tensor([patches[:1]])) == [False]
    assert survival.all_left(pair, torch.tensor([patches[1:]])) == [False]


@pytest.mark.slow
def test_shares_are_of_questions_that_ask_about_something(followed: dict[str, Any]) -> None:
    asked = [question for _, question in sample_questions("test", 11, side=SIDE)]
    right = {method: np.arange(11) % 2 == 0 for method in followed}
    headline = [kind for kind in TYPES if kind != "count"]
    told = survival.summary(followed, asked, right, headline)
    left = followed["random"][0]["left"]
    counted = [
        place
        for place, question in enumerate(asked)
        if question.type != "count" and (question.subjects or question.sources)
    ]
    share = sum(left[place] for place in counted) / len(counted)
    assert told["random"]["steps"][0]["share"] == pytest.approx(share)
    with_all = [place for place in counted if left[place]]
    assert told["random"]["accuracy"]["left"] == pytest.approx(sum(1 - place % 2 for place in with_all) / len(with_all))


@pytest.mark.slow
def test_results_learn_where_patches_were_lost(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = evaluate_checkpoint(checkpoint, tmp_path, number=12, batch=8, budgets=(KEPT,), device="cpu")
    before = json.loads(file.read_text())
    survival.main(file, checkpoint, KEPT, 11, 4, "cpu")
    after = json.loads(file.read_text())
    assert after.pop("survival")["methods"].keys() == set(survival.FOLLOWED)
    assert after == before
    table = file.with_suffix(".md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "## Where patches are lost" in table
    assert "| ivtp | tower, layers 3 to 4 |" in table
    with pytest.raises(
        ValueError, match="no rows of random, cls-topk, cls-topk-all-layers, ivtp-v, ivtp at 7 visual tokens"
    ):
        survival.main(file, checkpoint, 7, 11, 4, "cpu")
    before["checkpoint"] = "another"
    report.write(file, before)
    with pytest.raises(ValueError, match="holds results of another"):
        survival.main(file, checkpoint, KEPT, 11, 4, "cpu")
