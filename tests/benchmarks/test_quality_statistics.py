"""Intervals, the metric, and FLOPs of the quality benchmark."""

import numpy as np
import pytest

from benchmarks.quality.intervals import bootstrap_interval, paired_interval
from benchmarks.quality.report import METRIC, pack, right_answers, unpack


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


def test_the_metric_compares_first_words(monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    said = ["Yes.", " yes it is", "no yes", "", "red, I think", "northwestern"]
    result = metric.compute(predictions=said, references=["yes", "yes", "yes", "yes", "red", "northwest"])
    assert result == {"accuracy": 0.5, "right": [True, True, False, False, True, False]}
    assert right_answers(said[:2], ["yes", "no"]).tolist() == [True, False]


def test_right_and_wrong_can_be_packed() -> None:
    right = np.random.default_rng(0).random(2001) < 0.5
    assert len(pack(right)) < 600
    assert (unpack(pack(right), 2001) == right).all()
