"""What the paper's benchmarks make of rows, without the harness."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from ivtp_cli.evaluate import _write_blocks
from modeling_ivtp.evaluation import paper, tables


def rows_of(name: str, limit: int, **columns: list[Any]) -> list[int]:
    (benchmark,) = paper.chosen([name])
    return benchmark.first_rows(datasets.Dataset.from_dict(columns), limit)


def test_a_limit_takes_the_first_rows() -> None:
    assert rows_of("gqa", 2, id=["a", "b", "c"]) == [0, 1]
    assert rows_of("gqa", 9, id=["a", "b", "c"]) == [0, 1, 2]


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_a_limit_takes_all_rotations_of_a_question_of_mmbench(name: str) -> None:
    apart = [1, 2, 3, 1_000_001, 1_000_002, 1_000_003, 2_000_002]
    assert rows_of(name, 2, index=apart) == [0, 1, 3, 4, 6]
    assert rows_of(name, 1, index=[1, 1_000_001, 2]) == [0, 1]


def test_a_limit_takes_both_questions_about_a_picture_of_mme() -> None:
    columns = {"category": ["color"] * 4 + ["count"] * 2, "question_id": ["1", "1", "2", "2", "1", "1"]}
    assert rows_of("mme", 3, **columns) == [0, 1, 2, 3]
    assert rows_of("mme", 1, **columns) == [0, 1]


def test_rows_of_mme_without_perception_are_told() -> None:
    doc = {"answer": "Yes", "category": "code_reasoning", "question_id": "1"}
    with pytest.raises(ValueError, match="no row is of a category of perception, which are existence, count"):
        paper._mme([{"doc": doc, "filtered_resps": ["yes"]}] * 2)


def test_a_question_of_mmbench_is_right_if_all_its_rotations_are() -> None:
    rows = [
        {"index": 1, "answer": "A", "A": "cat", "B": "dog"},
        {"index": 1_000_001, "answer": "B", "A": "dog", "B": "cat"},
    ]
    asked = [rows[place] for place in rows_of("mmbench", 1, index=[row["index"] for row in rows])]
    assert paper._mmbench([{"doc": row, "filtered_resps": ["A"]} for row in asked]).value == 0


def test_a_card_s_scores_say_what_was_asked() -> None:
    scores = {name: {"value": 100.0, "questions": 3} for name in ("vqav2", "gqa")}
    results = {"limit": None, "arms": {"ivtp@64": {"scores": scores}}}
    (model,) = yaml.safe_load(tables.model_index(results, "mine", "ivtp@64"))["model-index"]
    vqav2, gqa = (entry["dataset"] for entry in model["results"])
    assert (vqav2["split"], vqav2["args"]["questions"]) == ("validation", 3)
    assert vqav2["args"]["note"].startswith("the validation split; Table 1's is a test split")
    assert (gqa["split"], gqa["args"]) == ("testdev", {"questions": 3})


def test_scores_of_some_questions_are_none_of_a_card() -> None:
    results = {"limit": 3, "arms": {"ivtp@64": {"scores": {"gqa": {"value": 100.0, "questions": 3}}}}}
    assert tables.model_index(results, "mine", "ivtp@64") == ""


def test_blocks_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    arms = {"ivtp@64": {"scores": {"gqa": {"value": 100.0, "questions": 3}}}}
    for name in ("model-index-ivtp@32.yaml", "notes.yaml"):
        (tmp_path / name).write_text("earlier")
    _write_blocks(tmp_path, {"limit": None, "arms": arms}, "mine")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model-index-ivtp@64.yaml", "notes.yaml"]
    _write_blocks(tmp_path, {"limit": 3, "arms": arms}, "mine")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.yaml"]
