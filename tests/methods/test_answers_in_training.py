"""Retraining under a method: answers that are to be learned choose nothing, as they are not there at inference."""

import pytest
import torch

from modeling_ivtp import methods
from modeling_ivtp.methods.selecting import prompt_ends
from modeling_ivtp.model.outputs import answers_of
from tests.support.tiny import IMAGE_TOKEN, PAD_TOKEN, prompt, tiny_model

ROWS = [[3, "image", 7], [2, "image", 4]]
ANSWER = 3


def with_answers(inputs, seed=0):
    """The prompts with an answer each, and where it stands."""
    rows, length = inputs["input_ids"].shape
    generator = torch.Generator().manual_seed(seed)
    answer = torch.randint(3, 120, (rows, ANSWER), generator=generator)
    whole = dict(inputs)
    whole["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
    whole["clip_spans"] = torch.nn.functional.pad(inputs["clip_spans"], (0, 0, 0, ANSWER))
    return whole, (torch.arange(length + ANSWER) >= length).expand(rows, -1)


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "random"])
@torch.no_grad()
def test_every_method_keeps_in_training_what_it_keeps_at_inference(name):
    model, inputs = tiny_model(), prompt(ROWS)
    whole, answers = with_answers(inputs)
    with methods.make(name, 4)(model):
        alone = model.model(**inputs).kept_tokens
        trained = model.model(**whole, answers=answers).kept_tokens
    assert torch.equal(trained[:, :-ANSWER], alone)
    assert alone.sum() < inputs["attention_mask"].sum()


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "text_attention"])
@torch.no_grad()
def test_without_labels_the_answer_would_choose(name):
    model, inputs = tiny_model(), prompt(ROWS)
    options = {"readers": "text"} if name == "text_attention" else {}
    scores = []
    for seed in range(2):
        whole, answers = with_answers(inputs, seed)
        with methods.make(name, 4, **options)(model):
            told = [group.importance for group in model.explain(**whole, answers=answers).images[0].groups]
            untold = [group.importance for group in model.explain(**whole).images[0].groups]
        scores.append((told, untold))
    (told, untold), (other_told, other_untold) = scores
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(told, other_told, strict=True))
    assert not torch.allclose(untold[0], other_untold[0], atol=1e-6)


def test_pyramiddrop_reads_before_every_answer():
    """Of a conversation with two answers, the tokens right before each, averaged: its query rows in training."""
    model, seen = tiny_model(), []
    inputs = prompt([[3, "image", 9]])
    length = inputs["input_ids"].shape[1]
    labels = torch.full_like(inputs["input_ids"], -100)
    for column in (-6, -5, -2, -1):  # two words of the first answer, two of the second
        labels[:, column] = inputs["input_ids"][:, column]
    method = methods.PyramidDrop(keep=4, layers=(2,), next_layer=False)

    class Noted(methods.PyramidDrop):
        def in_decoder(self, step):
            choice = super().in_decoder(step)
            record = step.decoder_records[-1]
            seen.append((record.attention_map(0)[0], step.sequence, choice.scores[0, 0]))
            return choice

    with Noted(keep=4, layers=(2,), next_layer=False)(model):
        loss = model(**inputs, labels=labels).loss
        attention, sequence, scores = seen[0]
    loss.backward()
    assert torch.nonzero(prompt_ends(sequence)[0]).flatten().tolist() == [length - 7, length - 3]
    expected = [sum(attention[row, 3 + patch] for row in (length - 7, length - 3)) / 2 for patch in range(16)]
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-6, rtol=1e-5)
    assert not scores.requires_grad  # it trains with scores that have no gradient, and without a mask
    with method(model):
        assert torch.isfinite(model(**inputs, labels=labels).loss)


def test_rows_that_are_all_answer_have_none_and_padding_is_no_prompt():
    ids = torch.tensor([[PAD_TOKEN, 5, IMAGE_TOKEN, 7, 8], [4, 5, IMAGE_TOKEN, 7, 8]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = ids.clone()
    labels[0, 0] = labels[1, :2] = -100
    answers = answers_of(labels, ids == IMAGE_TOKEN, mask)
    assert answers.tolist() == [[False] * 5, [False, False, False, True, True]]
