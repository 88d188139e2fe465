"""LVPruning: its modules against NumPy, its training against its inference, one adapter at any ratio."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_ivtp import trained
from modeling_ivtp.trained.lvpruning import DecisionModule
from tests.support.tiny import PATCHES, prompt, randomize, rows_alone, tiny_model
from tests.support.trained import ROWS, answered, exact_norm, positions, ready, slope


def norm(x, layer):
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + layer.eps)
    return centred / scale * layer.weight.detach().double().numpy() + layer.bias.detach().double().numpy()


def linear(x, layer):
    y = x @ layer.weight.detach().double().numpy().T
    return y if layer.bias is None else y + layer.bias.detach().double().numpy()


def by_hand(module, visual, text):
    """Eq. 1 to 4 and the network of Sec. 4.1 for the tokens of one row: (N, 2)."""
    for block in module.blocks:
        query, key, value = linear(visual, block.query), linear(text, block.key), linear(text, block.value)
        width = query.shape[1] // block.heads
        read = np.zeros_like(query)
        for head in range(block.heads):
            part = slice(head * width, (head + 1) * width)
            for n in range(len(visual)):
                logits = [float(query[n, part] @ key[t, part]) / math.sqrt(width) for t in range(len(text))]
                shares = np.exp(np.array(logits) - max(logits))
                shares /= shares.sum()
                read[n, part] = sum(share * value[t, part] for t, share in enumerate(shares))
        output = linear(read, block.output) + query
        first, widen, _, narrow, last = block.network
        inner = linear(norm(output, first), widen)
        visual = output + norm(linear(inner / (1 + np.exp(-inner)), narrow), last)
    return linear(visual, module.scores)


@torch.no_grad()
def test_the_decision_module_is_that_of_the_paper():
    module = randomize(DecisionModule(16, heads=4, blocks=2), 1).double()
    generator = torch.Generator().manual_seed(0)
    visual = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 4, 16, generator=generator, dtype=torch.float64)
    present = torch.tensor([[True] * 4, [True, True, False, False]])
    mine = module(visual, text, present).numpy()
    np.testing.assert_allclose(mine[0], by_hand(module, visual[0].numpy(), text[0].numpy()), atol=1e-10)
    np.testing.assert_allclose(mine[1], by_hand(module, visual[1].numpy(), text[1, :2].numpy()), atol=1e-10)
    assert np.abs(mine[1] - by_hand(module, visual[1].numpy(), text[1].numpy())).max() > 1e-3


@torch.no_grad()
def test_a_row_without_text_has_scores():
    module = DecisionModule(16, heads=4, blocks=1)
    scores = module(torch.randn(1, 5, 16), torch.zeros(1, 2, 16), torch.zeros(1, 2, dtype=torch.bool))
    assert scores.isfinite().all()


class Decided(trained.LVPruning):
    """In training, decides as at inference, on all tokens."""

    def mask(self, step):
        scores = self.scores(step)
        scores = scores[..., 0] - scores[..., 1]
        if step.weights is not None:
            scores = scores.masked_fill(step.weights == 0, float("-inf"))
        kept = scores.sort(dim=-1, descending=True, stable=True).indices[..., : step.group.keep]
        return torch.zeros_like(scores).scatter(2, kept, 1.0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
@torch.no_grad()
def test_masked_training_is_gathered_inference(decoder, attention):
    model = tiny_model(decoder, attention=attention)
    method = ready(Decided(ratio=0.6), model)
    inputs = prompt(ROWS)
    inputs["position_ids"] = positions(inputs)
    with method(model):
        gathered = model(**inputs)
        assert [layer.keys.shape[2] for layer in gathered.past_key_values.layers] == [41, 29, 21, 15, 15, 15]
        method.learned.train()
        masked = model(**inputs, use_cache=False)
        kept = model.model(**inputs).kept_tokens
        method.learned.eval()
        assert torch.equal(kept, model.model(**inputs).kept_tokens)
    assert kept.sum() < inputs["attention_mask"].sum()
    torch.testing.assert_close(masked.logits[kept], gathered.logits[kept], atol=1e-5, rtol=0)
    with Decided(ratio=0.7).with_modules(method.learned, method.base)(model):
        other = model(**inputs)
    assert (other.logits[kept] - gathered.logits[kept]).abs().max() > 1e-3  # the comparison can fail


@torch.no_grad()
def test_a_batch_gives_what_its_rows_give_alone():
    model = tiny_model()
    inputs, method = prompt(ROWS), ready(trained.LVPruning(ratio=0.6), model)
    with method(model):
        batch = model(**inputs, position_ids=positions(inputs))
        for row, single in enumerate(rows_alone(inputs, ROWS)):
            alone = model(**single)
            length = single["input_ids"].shape[1]
            torch.testing.assert_close(alone.logits[0, -1], batch.logits[row, -1], atol=1e-5, rtol=0)
            kept = getattr(model.model(**single), "kept_tokens", None)  # None: a row without a picture
            kept = torch.ones(1, length, dtype=torch.bool) if kept is None else kept
            assert torch.equal(kept[0], model.model(**inputs).kept_tokens[row, -length:])


@torch.no_grad()
def test_the_tokens_with_the_largest_scores_stay_and_one_adapter_serves_any_ratio():
    model = tiny_model()
    inputs, method = prompt([[3, "image", 7]]), ready(trained.LVPruning(ratio=0.5), model)
    for ratio, counts in ((0.6, [10, 6, 3]), (0.5, [8, 5, 2]), (0.45, [7, 4, 1]), (1.0, [16, 13, 10])):
        with method.changed(ratio=ratio)(model):
            groups = model.explain(**inputs).images[0].groups
        assert [len(group.kept) for group in groups] == [count for count in counts if count < PATCHES]
        for group in groups:
            best = np.argsort(-group.importance.numpy(), kind="stable")[: len(group.kept)]
            assert sorted(group.candidates[best].tolist()) == group.kept.tolist()
    with method.changed(keep=4)(model):
        assert model.model.plan().decoder_layer_tokens(6) == (16, 10, 7, 4, 4, 4)
    with method.changed(average=8.5)(model):
        assert model.model.plan().layer_average(6) == pytest.approx(8.5, abs=0.5)
    with method.changed(ratios=(0.25, 0.25, 0.125))(model):
        assert model.model.plan().decoder_layer_tokens(6) == (16, 4, 4, 2, 2, 2)


def test_the_ratio_loss_is_that_of_the_paper():
    model = tiny_model()
    method = ready(trained.LVPruning(ratio=0.5), model)
    inputs = answered()
    with trained.PrunerTraining(model, method) as training:
        outputs = training.train()(**inputs)
        weighed = method.batch.weighed
        language = outputs.loss - method.loss()
        huber = method.changed(ratio_loss="huber", ratio_weight=3.0)
        huber.batch.weighed = weighed
        assert huber.loss().item() == pytest.approx(
            3 * 0.5 / 2 * method.loss().item()
        )  # below β a Huber is half the square
    total = 0.0
    for target, one in zip((0.5, 0.3, 0.1), weighed, strict=True):
        decisions = one.weights.detach().numpy()
        assert set(np.unique(decisions)) <= {0.0, 1.0}
        images = [(0, 0), (2, 0), (2, 1)]
        assert len(one.counts) == len(images)
        total += sum((target - decisions[at].sum() / PATCHES) ** 2 for at in images) / len(images)
    assert method.loss().item() == pytest.approx(2 * total / 3, rel=1e-5)
    assert language.isfinite()
    for lower, upper in pairwise(weighed):
        assert (upper.weights <= lower.weights).all()  # Eq. 10: what is gone never comes back
    assert (weighed[1].weights < weighed[0].weights).any()


@pytest.mark.parametrize(
    ("budget", "shares"),
    [
        ({"average": 8.5}, (0.7125, 0.5125, 0.3125)),
        ({"keep": 14}, (1.0, 1.0, 0.875)),
        ({"ratio": 1.0}, (1.0, 0.8, 0.6)),
    ],
    ids=str,
)
def test_every_module_learns_under_any_budget_towards_its_share(budget, shares):
    model = tiny_model()
    method = ready(trained.LVPruning(**budget), model)
    with trained.PrunerTraining(model, method) as training:
        training.train()(**answered()).loss.backward()
        weighed = method.batch.weighed
        assert [one.group.last for one in weighed] == [0, 1, 2]
        assert all(weight.grad.abs().max() > 0 for weight in training.learned.parameters())
    square = [((one.counts.detach() / PATCHES - share) ** 2).mean() for share, one in zip(shares, weighed, strict=True)]
    assert method.loss().item() == pytest.approx(2 * float(sum(square)) / 3, rel=1e-5)
    with method(model):  # inference drops where the budget does
        counts = [round(share * PATCHES) for share in shares]
        assert [group.keep for group in model.model.plan().decoder] == counts
        assert not any(group.adaptive for group in model.model.plan().decoder)


@pytest.mark.parametrize("budget", [{"keep": PATCHES}, {"average": 99.0}, {"ratios": (1.0, 1.0, 1.0)}], ids=str)
def test_a_budget_that_drops_nothing_is_not_trained(budget):
    model = tiny_model()
    method = ready(trained.LVPruning(**budget), model)
    with pytest.raises(ValueError, match=r"lvpruning: .*=.* leaves all visual tokens, so its modules would learn noth"):
        trained.PrunerTraining(model, method)
    assert model.model.applied_pruner is None
    assert all(weight.requires_grad for weight in model.model.language_model.parameters())


def total_loss(training, inputs, seed=7):
    """The loss of a batch with the same noise each time, in float64: transformers computes its own in float32."""
    torch.manual_seed(seed)
    outputs = training(**inputs)
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    language = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    torch.testing.assert_close(outputs.loss.double(), language + training.method.loss(), atol=1e-5, rtol=0)
    return language + training.method.loss()


def test_gradients_of_soft_decisions_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    model = tiny_model().double()
    method = ready(trained.LVPruning(ratio=0.5, straight_through=False), model)
    method.learned.double()
    inputs = answered(answer=2)  # no label follows a picture: whether it counts would jump
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with trained.PrunerTraining(model, method) as training:
        training.train()
        total_loss(training, inputs).backward()
        checked = 0
        weights = [(name, weight) for name, weight in training.learned.named_parameters() if "0.blocks.1" in name]
        for name, weight in weights:
            place = int(weight.grad.abs().argmax())
            exact = float(weight.grad.flatten()[place])
            found = slope(weight, place, lambda: total_loss(training, inputs))
            assert found == pytest.approx(exact, rel=2e-3, abs=1e-8), name
            checked += abs(exact) > 1e-5
        assert checked > 5


def test_hard_decisions_pass_the_gradient_of_soft_ones():
    """Straight through: 0 or 1 forward, the derivative of the soft decision backward."""
    model = tiny_model()
    method = ready(trained.LVPruning(ratio=0.5), model)
    inputs = answered([[3, "image", 7]])
    captured = []

    class Noted(trained.LVPruning):
        def scores(self, step):
            scores = super().scores(step)
            scores.retain_grad()
            captured.append(scores)
            return scores

        def mask(self, step):
            torch.manual_seed(step.group.last)
            mask = super().mask(step)
            mask.retain_grad()
            captured.append(mask)
            return mask

    noted = Noted(ratio=0.5).with_modules(method.learned, method.base)
    with trained.PrunerTraining(model, noted) as training:
        training.train()(**inputs).loss.backward()
    for layer, scores, mask in zip((0, 1, 2), captured[::2], captured[1::2], strict=True):
        torch.manual_seed(layer)
        noise = -torch.empty_like(scores).exponential_().log()
        soft = (scores.detach() + noise).softmax(-1)[..., 0]
        assert torch.equal(mask.detach(), (soft > 0.5).float())
        expected = mask.grad * soft * (1 - soft)
        torch.testing.assert_close(scores.grad[..., 0], expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(scores.grad[..., 1], -expected, atol=1e-6, rtol=1e-4)
        assert expected.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no budget; give one of keep, average, ratio, ratios"),
        ({"ratio": 0.5, "keep": 4}, "give one of"),
        ({"ratio": 1.5}, "ratio=1.5; allowed: from 0 to 1"),
        ({"ratio": -0.1}, "ratio=-0.1; allowed: from 0 to 1"),
        ({"ratios": (0.5, 0.6, 0.1)}, "ratios=(0.5, 0.6, 0.1); allowed: none above the one before it"),
        ({"ratios": (0.5, 0.0)}, "ratios=(0.5, 0.0); allowed: numbers above 0, up to 1"),
        ({"ratio": 0.5, "heads": 0}, "heads=0; allowed"),
        ({"ratio": 0.5, "temperature": 0}, "temperature=0; allowed: a number above 0"),
        ({"ratio": 0.5, "text": "answer"}, "text='answer'; allowed: prompt, all"),
        ({"ratio": 0.5, "ratio_loss": "cube"}, "ratio_loss='cube'; allowed: square, huber"),
        ({"ratio": 0.5, "ratio_weight": -1}, "ratio_weight=-1; allowed: a number of at least 0"),
        ({"ratio": 0.5, "language_weight": float("nan")}, "language_weight=nan; allowed: a number of at least 0"),
        ({"ratio": 0.5, "straight_through": 1}, "straight_through=1; allowed: True, False"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match="lvpruning") as error:
        trained.LVPruning(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.4}, "ratio=0.4 leaves nothing after 3 modules"),
        ({"ratios": (0.5, 0.3)}, "ratios=(0.5, 0.3); allowed: 3 of them"),
        ({"ratio": 0.9, "layers": (2, 9)}, "layers=(2, 9); allowed: 1 to 6"),
        ({"ratio": 0.9, "heads": 5}, "heads=5; allowed: divisors of the decoder's width, 32"),
    ],
)
def test_what_does_not_fit_the_model_is_named(options, message):
    with pytest.raises(ValueError, match="lvpruning") as error:
        trained.LVPruning(**options).for_model(tiny_model())
    assert message in str(error.value)
