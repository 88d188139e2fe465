"""Tiny models with trained pruners, whose modules decide anything but alike."""

import torch

from tests.support.tiny import IMAGE_TOKEN, prompt, randomize, rows_alone

ROWS = [[3, "image", 7], [5], [2, "image", 4, "image", 3]]


def ready(method, model, seed=3):
    """The method with random modules for a model."""
    method = method.for_model(model)
    randomize(method.learned, seed)
    return method


def answered(rows=ROWS, answer=3, seed=1):
    """A batch whose last `answer` tokens of each row are to be learned."""
    inputs = prompt(rows, seed)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -answer:] = inputs["input_ids"][:, -answer:]
    inputs["labels"] = labels.masked_fill(labels == IMAGE_TOKEN, -100)
    return inputs


def exact_norm(norm, hidden):
    """LLaMA's norm in the precision of its input; its own is in float32, too coarse for finite differences."""
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def positions(inputs):
    return (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)


def bits(model):
    """Every tensor of a model, for a comparison bit by bit."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def slope(weight, place, total, step=1e-5):
    """Return the central difference of a total by one entry of a weight."""
    values = []
    with torch.no_grad():
        for sign in (step, -step):
            weight.view(-1)[place].add_(sign)
            values.append(float(total()))
            weight.view(-1)[place].sub_(sign)
    return (values[0] - values[1]) / (2 * step)


@torch.no_grad()
def assert_a_batch_is_its_rows(method, model, chosen_by, tolerance):
    """Each row of a batch is what it is alone: its logits at inference, and in training what `chosen_by` finds.

    `chosen_by` takes the method's batch and returns, for each place where it chooses, a tensor (B, M, ...).
    """
    inputs = prompt(ROWS)
    with method(model):
        batch = model(**inputs, position_ids=positions(inputs)).logits[:, -1]
        method.learned.train()
        with method.running(None):
            model(**inputs, position_ids=positions(inputs), use_cache=False)
        together = chosen_by(method.batch)
        for row, single in enumerate(rows_alone(inputs, ROWS)):
            method.learned.eval()
            torch.testing.assert_close(model(**single).logits[0, -1], batch[row], atol=1e-5, rtol=0)
            if "image" not in ROWS[row]:
                continue
            method.learned.train()
            with method.running(None):
                model(**single, use_cache=False)
            images = ROWS[row].count("image")
            for whole, alone in zip(together, chosen_by(method.batch), strict=True):
                torch.testing.assert_close(whole[row, :images], alone[0], atol=tolerance, rtol=0)
        method.learned.eval()
