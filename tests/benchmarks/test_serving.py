"""What the benchmarks of serving say of results, and where they go on after a stop; nothing here needs vLLM."""

import json

import pytest

from benchmarks.serving import check, page, speed
from benchmarks.serving.engines import MINIATURE, held_out


def rows(factor=1.0):
    """Stock takes three times as much as the tower and twice as much as the guided arm, in every round."""
    costs = {"stock": 6.0, "tower": 2.0, "guided": 3.0}
    return [
        {
            "round": number,
            "concurrency": concurrency,
            "arm": arm,
            "seconds": (number + 1) * cost,
            "cpu_seconds": (number + 1) * cost * factor,
            "parts": {} if arm == "stock" else {"vision tower": 0.5, "choice": 0.25},
        }
        for number in range(3)
        for concurrency in speed.CONCURRENCIES
        for arm, cost in costs.items()
    ]


def test_ratios_are_taken_within_a_round():
    assert page.ratios(rows(), "tower", 8, "seconds") == [3.0, 3.0, 3.0]
    assert page.ratios(rows(), "guided", 1, "cpu_seconds") == [2.0, 2.0, 2.0]
    uneven = [
        row | {"seconds": row["seconds"] * (2 if row["arm"] == "stock" and row["round"] else 1)} for row in rows()
    ]
    assert page.ratios(uneven, "tower", 8, "seconds") == [3.0, 6.0, 6.0]


def test_the_page_has_every_ratio_and_every_part():
    host = {"device": "a CPU", "cpus": 2, "versions": {"torch": "2"}}
    run = {"date": "today", "load": 9.5, "command": "c", "machine": host, "rows": rows()}
    text = page.markdown(run | {"model": "m", "dtype": "float32", "eager": True, "new_tokens": 4})
    assert "3 interleaved rounds (least to most). The machine was shared" in text
    assert text.count("3.00 (3.00 to 3.00)") == 2 * len(speed.CONCURRENCIES)
    assert text.count("2.00 (2.00 to 2.00)") == 2 * len(speed.CONCURRENCIES)
    # Medians of the second round: 4 seconds of the tower arm, of which the parts take 0.5 and 0.25.
    assert "| tower | 500 | 0 | 250 | 3250 | 4000 |" in text


def test_questions_are_the_same_however_many_are_asked_for():
    few, more = held_out(3), held_out(5)
    assert [text for text, _, _ in more[:3]] == [text for text, _, _ in few]
    assert all(one.tobytes() == other.tobytes() for (_, [one], _), (_, [other], _) in zip(few, more, strict=False))
    assert len({image.tobytes() for _, [image], _ in more}) == 5


def test_a_finished_step_is_known_for_its_model_and_questions_alone(tmp_path):
    steps = check.Steps(MINIATURE, 60, tmp_path)
    name = next(iter(steps.all))
    assert steps.result(name) is None
    with pytest.raises(ValueError, match="is not finished"):
        steps.known(name)
    steps.all[name] = lambda: {"passed": True, "says": "x", "answers": [[1]]}
    steps.run(name)
    assert steps.known(name)["answers"] == [[1]]
    assert check.Steps(MINIATURE, 61, tmp_path).result(name) is None
    assert check.Steps(tmp_path, 60, tmp_path).result(name) is None
    assert json.loads(steps.path(name).read_text())["questions"] == 60
    assert len({steps.path(name) for name in steps.all}) == len(steps.all)


def test_a_folder_without_an_ivtp_llava_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: object())
    for config in (None, {"model_type": "llava"}):
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"is no folder of an IVTP-LLaVA"):
            check.main(model=tmp_path, folder=tmp_path)


def test_the_tests_among_the_steps_are_there(tmp_path):
    named = [name.removeprefix("tests of ") for name in check.Steps(MINIATURE, 60, tmp_path).all if "tests of" in name]
    files = {path.stem.removeprefix("test_") for path in (check.ROOT / check.TESTS).glob("test_*.py")}
    assert named
    assert set(named) <= files


def test_claims_fail_where_they_do_not_hold(tmp_path):
    steps = check.Steps(MINIATURE, 60, tmp_path)
    right = [[1, 2]] * 60
    steps.expected = lambda: right
    assert steps.same(right)["passed"]
    assert not steps.same([[1, 3], *right[1:]])["passed"]
    assert not steps.same(right, passed=False)["passed"]
    assert check.agreement([[1], [2], [3], [4]], [[1], [2], [3], [5]]) == 0.75
