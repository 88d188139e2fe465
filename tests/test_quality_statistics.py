"""Intervals, the metric, and FLOPs of the quality benchmark."""

import numpy as np
import pytest

from benchmarks.quality.flops import decoder_flops, text_tower_flops, tower_flops
from benchmarks.quality.intervals import bootstrap_interval, paired_interval
from benchmarks.quality.report import METRIC, pack, right_answers, unpack
from modeling_ivtp import IVTPLlavaConfig


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


def test_flops_are_those_of_the_papers_tables() -> None:
    """LLaVA-1.5-7B: Table 9's 0.202 for the pruned tower and 7.946 for the language model at 512 text tokens."""
    config = IVTPLlavaConfig(
        text_config={
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "vocab_size": 32000,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
        clip_text_config={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    )  # fmt: skip
    plan = config.pruning_plan()
    assert plan is not None
    decoder = decoder_flops(config, np.array([512, 128]), plan.decoder_layer_tokens(32)) / 1e12
    assert decoder[0] == pytest.approx(7.946, abs=0.01)
    assert tower_flops(config, plan, to_the_top=False) / 1e12 == pytest.approx(0.202, rel=0.01)
    top = tower_flops(config, plan, to_the_top=True) - tower_flops(config, plan, to_the_top=False)
    assert 0 < top < 0.02 * tower_flops(config, plan, to_the_top=True)
    assert tower_flops(config, None, to_the_top=False) / 1e12 == pytest.approx(0.366, abs=0.01)
    assert text_tower_flops(config, 2) == 2 * text_tower_flops(config, 1) > 0
