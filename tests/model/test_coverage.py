"""A budget of its own for every picture: as few tokens as cover a share of importance, between two bounds."""

from typing import Any

import numpy as np
import pytest
import torch

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration, IVTPPruningConfig, methods
from modeling_ivtp.model.diversity import quality, spanned, spanning
from modeling_ivtp.model.pruner import Choice, DecoderStep, PrunerWrapper
from modeling_ivtp.model.rollout import covered
from tests.support.tiny import IMAGE_TOKEN, PRUNING, prompt, rows_alone, tiny_model

CEILING = 4
ROWS: list[list[Any]] = [[3, "image", 6], [1, "image", 9], [5, "image", 4], [2, "image", 2]]
DIVERSE = {"importance": "accumulated", "choice": "diverse"}
EVERY_CHOICE = pytest.mark.parametrize("options", [{}, DIVERSE], ids=["top", "diverse"])


class Watching(PrunerWrapper):
    """Notes what the decoder's groups are asked and what they answer."""

    def __init__(self, pruner: Any) -> None:
        super().__init__(pruner)
        self.seen: list[tuple[torch.Tensor, Choice]] = []

    def in_decoder(self, step: DecoderStep) -> Choice:
        choice = super().in_decoder(step)
        self.seen.append((step.sequence.visual(step.hidden), choice))
        return choice


def counts(model: Any, inputs: Any) -> list[int]:
    """The visual tokens that each row keeps."""
    kept = model.model(**inputs).kept_tokens
    return (kept & (inputs["input_ids"] == IMAGE_TOKEN)).sum(1).tolist()


def left_by_loops(features: np.ndarray, weights: np.ndarray, picked: list[int]) -> list[float]:
    """What share of squared lengths the tokens picked so far span, by Gram-Schmidt on what is left of every vector."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    left = weights[:, None] * (unit - unit.mean(0))
    total, shares = (left**2).sum(), []
    for token in picked:
        direction = left[token].copy()
        if (length := np.linalg.norm(direction)) > 1e-9:
            direction /= length
            left = left - np.outer(left @ direction, direction)
        shares.append(1 - (left**2).sum() / total)
    return shares


@pytest.mark.parametrize(("tokens", "width"), [(9, 6), (9, 20), (5, 2)])
def test_what_tokens_span_is_what_projections_leave_out(tokens, width):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, tokens, width, generator=generator) + 2
    features[2] = features[2, :1]  # a picture of equal tokens
    weights = torch.rand(3, tokens, generator=generator, dtype=torch.float64)
    picked = spanning(features, weights, weights, 4)
    shares = spanned(features, weights, picked)
    for image in range(2):
        expected = left_by_loops(features[image].double().numpy(), weights[image].numpy(), picked[image].tolist())
        np.testing.assert_allclose(shares[image], expected, atol=1e-9)
    assert (shares.diff(dim=1) >= 0).all()
    # The control: another order covers other shares.
    assert not torch.allclose(shares[:2], spanned(features, weights, picked.flip(1))[:2])


def test_importance_is_covered_in_the_order_of_the_tokens():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    order = torch.tensor([[1, 2, 3], [0, 1, 2]])
    np.testing.assert_allclose(covered(scores, order), [[0.4, 0.7, 0.9], [1, 1, 1]])


@EVERY_CHOICE
def test_a_picture_keeps_the_fewest_tokens_that_cover_enough(options):
    model, inputs = tiny_model(**options), prompt(ROWS)
    found = set()
    for coverage in (0.3, 0.5, 0.7, 0.9):
        with model.pruning(coverage=coverage, min_visual_tokens=1):
            model.model.applied_pruner = watching = Watching(model.model.pruner)
            kept = counts(model, inputs)
            model.model.applied_pruner = None
        features, choice = watching.seen[-1]
        for row in range(len(kept)):
            scores = choice.scores[row, 0].double()
            if options:
                weights = quality(scores[None], 0.25)
                picked = spanning(features[row], weights, scores[None], CEILING)[0]
                shares = left_by_loops(features[row, 0].double().numpy(), weights[0].numpy(), picked.tolist())
            else:
                picked = scores.argsort(descending=True)[:CEILING]
                shares = (scores[picked].cumsum(0) / scores.sum()).tolist()
            enough = next((n for n, share in enumerate(shares, 1) if share >= coverage), CEILING)
            assert kept[row] == enough
            assert set(choice.kept[row, 0, :enough].tolist()) == set(picked[:enough].tolist())
        found |= set(kept)
    assert len(found) > 1


@EVERY_CHOICE
def test_floor_and_ceiling_hold(options):
    model, inputs = tiny_model(**options), prompt(ROWS)
    rows = len(inputs["input_ids"])
    with model.pruning(coverage=1e-9, min_visual_tokens=3):
        assert counts(model, inputs) == [3] * rows
    with model.pruning(coverage=1.0):
        assert counts(model, inputs) == [CEILING] * rows
    assert counts(model, inputs) == [CEILING] * rows


@EVERY_CHOICE
@pytest.mark.parametrize("where", ["within", "ahead"])
@pytest.mark.parametrize("ceiling", [9, 16])
def test_it_decides_where_the_ceiling_drops_nothing(options, where, ceiling):
    model, inputs = tiny_model(**options, decoder_choice=where), prompt(ROWS)
    rows, hand_over = len(inputs["input_ids"]), {"visual_tokens": ceiling, "tower_tokens": ceiling}
    with model.pruning(**hand_over, coverage=0.3, min_visual_tokens=1):
        assert max(counts(model, inputs)) < ceiling
    with model.pruning(**hand_over, coverage=1e-9, min_visual_tokens=2):
        assert counts(model, inputs) == [2] * rows
    with model.pruning(**hand_over, coverage=1.0):
        assert counts(model, inputs) == [ceiling] * rows


@pytest.mark.parametrize("method", [methods.IVTP, methods.IVTPExtended, methods.IVTPV, methods.IVTPExtendedFlat])
def test_methods_take_a_model_whose_pictures_have_budgets_of_their_own(method):
    model, inputs = tiny_model(coverage=1e-9, min_visual_tokens=3), prompt(ROWS)
    rows = len(inputs["input_ids"])
    with method(2)(model):
        assert counts(model, inputs) == [2] * rows
    # Without the second stage there is nothing that a coverage could decide.
    with method(4)(model):
        assert counts(model, inputs) == [4 if issubclass(method, methods.IVTPV) else 3] * rows


@EVERY_CHOICE
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_batch_answers_as_its_rows_alone(options, cache):
    model, inputs = tiny_model(**options, coverage=0.6, min_visual_tokens=1), prompt(ROWS)
    assert len(set(counts(model, inputs))) > 1
    logits = model(**inputs).logits[:, -1]
    generation = {"max_new_tokens": 4, "do_sample": False} | ({} if cache is None else {"cache_implementation": cache})
    together = model.generate(**inputs, **generation)
    for row, alone in enumerate(rows_alone(inputs, ROWS)):
        torch.testing.assert_close(model(**alone).logits[0, -1], logits[row], atol=1e-5, rtol=1e-4)
        assert torch.equal(model.generate(**alone, **generation)[0, -4:], together[row, -4:])


def test_beams_and_traces_follow_each_pictures_own_budget():
    model, inputs = tiny_model(**DIVERSE, coverage=0.6, min_visual_tokens=1), prompt(ROWS)
    model.generate(**inputs, num_beams=3, max_new_tokens=3)
    assert [model.explain(**row).final_tokens[0] for row in rows_alone(inputs, ROWS)] == counts(model, inputs)


def test_auto_stands_for_a_coverage_with_a_floor_and_a_ceiling(tmp_path):
    auto = IVTPPruningConfig(visual_tokens="auto")
    assert (auto.visual_tokens, auto.coverage, auto.fewest_tokens) == (64, 0.9, 16)
    assert IVTPPruningConfig(visual_tokens="auto", choice="diverse").coverage == 0.999
    with pytest.raises(ValueError, match="choice='best'; allowed: top, diverse"):
        IVTPPruningConfig(visual_tokens="auto", choice="best")
    assert IVTPPruningConfig(visual_tokens="auto", coverage=0.5).coverage == 0.5
    assert IVTPPruningConfig(visual_tokens=8, coverage=0.5).fewest_tokens == 8
    # Said again, it stands for what it stands for in a new configuration, whatever was set before.
    diverse = auto.changed(visual_tokens="auto", choice="diverse")
    assert (diverse.visual_tokens, diverse.coverage) == (64, 0.999)
    assert diverse.changed(visual_tokens="auto", coverage=0.5).coverage == 0.5
    assert diverse.changed(visual_tokens=32).coverage == 0.999
    # And so does a change of the choice alone, if the coverage is the one of the choice before.
    assert (auto.changed(choice="diverse").coverage, diverse.changed(choice="top").coverage) == (0.999, 0.9)
    assert auto.changed(choice="diverse", coverage=0.9).coverage == 0.9
    assert auto.changed(visual_tokens=32, coverage=0.5).changed(choice="diverse").coverage == 0.5
    assert auto.changed(coverage=None).changed(choice="diverse").coverage is None
    with pytest.raises(ValueError, match="choice='best'; allowed: top, diverse"):
        auto.changed(choice="best")
    config = tiny_model(visual_tokens="auto", tower_tokens=None).config
    assert methods.IVTPExtended(CEILING).pruner(config).options.coverage == 0.999
    handed = IVTPPruningConfig(visual_tokens=32, tower_tokens=48, coverage=0.5, min_visual_tokens=20)
    changes = handed.at_budget("auto")
    assert (changes["tower_tokens"], handed.changed(**changes).coverage) == (None, 0.9)
    assert handed.changed(**changes).min_visual_tokens == 20
    model = tiny_model(**DIVERSE, coverage=0.6, min_visual_tokens=1)
    model.save_pretrained(tmp_path)
    again = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.pruning_config == model.pruning_config
    assert IVTPLlavaConfig.from_pretrained(tmp_path).pruning.coverage == 0.6
    inputs = prompt(ROWS)
    assert counts(again, inputs) == counts(model, inputs)
    plain = tiny_model()
    with methods.IVTPExtended(CEILING, {"coverage": 0.6, "min_visual_tokens": 1})(plain):
        assert counts(plain, inputs) == counts(model, inputs)
    assert model.config.pruning_plan().exact is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coverage": 0}, r"coverage=0; allowed: a share above 0, at most 1, or None"),
        ({"coverage": 1.5}, r"coverage=1\.5; allowed"),
        ({"coverage": float("nan")}, r"coverage=nan; allowed"),
        ({"coverage": "much"}, r"coverage='much'; allowed"),
        ({"min_visual_tokens": 4}, r"min_visual_tokens=4 without coverage; allowed: None, or a coverage"),
        (
            {"coverage": 0.5, "min_visual_tokens": 65},
            r"min_visual_tokens=65 is above visual_tokens=64; allowed: 1 to 64",
        ),
        ({"coverage": 0.5, "min_visual_tokens": 0}, r"min_visual_tokens=0; allowed: an integer of at least 1"),
        ({"visual_tokens": "auto", "decoder_layers": 0}, r"decoder_layers=0 with a coverage"),
        ({"visual_tokens": "many"}, r'visual_tokens=\'many\'; allowed: an integer of at least 1, or "auto"'),
    ],
)
def test_what_cannot_be_covered_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IVTPPruningConfig(**options)


def test_a_compiled_prompt_says_that_rows_differ():
    model, inputs = tiny_model(**DIVERSE, coverage=0.6), prompt(ROWS)
    with pytest.raises(Exception, match="keeps different numbers of tokens of images"):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs, use_cache=False)


def test_the_tiny_model_leaves_something_to_decide():
    assert PRUNING["visual_tokens"] == CEILING
