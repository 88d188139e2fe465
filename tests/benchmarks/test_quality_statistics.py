"""Intervals, the metric, and FLOPs of the quality benchmark."""

import numpy as np
import pytest

from benchmarks.quality.findings import findings, method_findings
from benchmarks.quality.report import pack, right_answers, unpack
from modeling_ivtp.evaluation.intervals import bootstrap_interval, paired_interval


def test_the_interval_is_that_of_a_bootstrap_that_draws_questions() -> None:
    draws = np.random.default_rng(5)
    values = (draws.random(300) < 0.8).astype(float) - (draws.random(300) < 0.75)
    means = values[draws.integers(300, size=(10_000, 300))].mean(1)
    assert bootstrap_interval(values) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.005)


def test_a_95_percent_interval_covers_the_truth_about_95_times_in_100() -> None:
    draws = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        low, high = bootstrap_interval(draws.random(200) < 0.7, resamples=1000)
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_pairs_tell_apart_what_single_intervals_do_not() -> None:
    draws = np.random.default_rng(2)
    reference = draws.random(2000) < 0.8
    worse = reference & (draws.random(2000) > 0.02)
    low, high = paired_interval(worse, reference)
    assert low < high < 0
    assert bootstrap_interval(worse)[1] > bootstrap_interval(reference)[0]
    assert paired_interval(reference, reference) == (0, 0)
    with pytest.raises(ValueError, match="same questions"):
        paired_interval(worse, reference[:5])
    with pytest.raises(ValueError, match="at least one question"):
        bootstrap_interval(np.array([]))


def test_right_answers_are_those_whose_first_word_is_right() -> None:
    assert right_answers(["Yes.", " yes it is"], ["yes", "no"]).tolist() == [True, False]


def test_right_and_wrong_can_be_packed() -> None:
    right = np.random.default_rng(0).random(2001) < 0.5
    assert len(pack(right)) < 600
    assert (unpack(pack(right), 2001) == right).all()


@pytest.mark.slow
def test_findings_leave_out_what_was_not_measured() -> None:
    row = {"mode": "inference", "table": "", "options": {}}
    unpruned = row | {"method": "unpruned", "visual_tokens": 576, "accuracy": 0.95}
    ivtp = row | {"method": "ivtp", "visual_tokens": 64, "accuracy": 0.9}
    wide = row | {"method": "ivtp tower_tokens=192", "visual_tokens": 64, "accuracy": 0.93, "table": "hand-over"}
    wide["options"] = {"tower_tokens": 192}
    assert findings({"rows": []}) == []
    assert method_findings({"rows": [unpruned, ivtp]}) == []
    loss, hand_over = findings({"rows": [unpruned, ivtp, wide]})
    assert "IVTP loses 5.0 points" in loss
    assert "retrained" not in loss
    assert "5.0 points with 120 and 2.0 points with 192 tokens" in hand_over
    accuracies = (("tome", 0.5), ("tome+", 0.8))
    both = [row | {"method": name, "visual_tokens": 64, "accuracy": share} for name, share in accuracies]
    assert method_findings({"rows": [unpruned, *both]}) == ["The decoder's stage adds 30 points to ToMe."]


def test_findings_tell_what_followed_objects_showed() -> None:
    followed = {
        name: {"steps": [{"share": share}], "accuracy": {"left": 0.9, "gone": gone}}
        for name, share, gone in (("ivtp", 0.96, 0.23), ("cls-topk", 0.8, 0.18), ("cls-topk-all-layers", 1.0, None))
    }
    assert findings({"rows": [], "survival": {"methods": followed}}) == [
        "With IVTP, an object that the question needs is gone for good in 4.0% of the questions that were followed. "
        "If all objects are left, at least in parts, 90.0% are answered.",
        "If no patch of an object is left, 23% with `ivtp` and 18% with `cls-topk` are answered.",
        "`cls-topk-all-layers` leaves a part of every object.",
    ]
