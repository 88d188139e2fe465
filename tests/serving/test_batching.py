"""Text comes piece by piece, without what may still change, and adds up to the whole answer."""

import random
import time

import pytest

from modeling_ivtp.serving.batching import Listener, cut_at
from tests.support.text_tokenizers import llama_tokenizer

TEXTS = ["What is it? A bird.", "  two words ", "Grüße aus Köln, 東京 and 😀!", "line\n\nline", "", "STO and STOP it"]


@pytest.fixture(scope="module")
def tokenizer():
    return llama_tokenizer()


def listen(tokenizer, text, stops=()):
    pieces = []
    listener = Listener(stops, pieces.append)
    listener.begin()
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        listener.put(token, tokenizer)
    before = list(pieces)
    whole = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip()
    listener.end(whole)
    return before, pieces, whole, listener


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_whole_answer(tokenizer, text):
    before, pieces, whole, listener = listen(tokenizer, text)
    assert "".join(pieces) == whole == listener.sent
    assert "".join(before).strip() == whole
    assert not listener.finished
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(before) > 2 or len(whole) < 10


def test_a_long_stop_costs_no_more_than_the_text(tokenizer):
    """Every beginning of the stop would be 45 gigabytes for each token."""
    start = time.monotonic()
    _, pieces, whole, _ = listen(tokenizer, TEXTS[0], ["x" * 300_000])
    assert "".join(pieces) == whole
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("stop", ["STOP", "and", "o", "TOP it", "nowhere"])
def test_nothing_of_a_stop_gets_out(tokenizer, stop):
    _, pieces, whole, listener = listen(tokenizer, TEXTS[-1], [stop, ""])
    assert "".join(pieces) == cut_at(whole, [stop])[0]
    assert listener.finished == (stop in whole)


def test_of_several_stops_the_first_in_the_text_counts(tokenizer):
    assert cut_at("one two three", ["three", "two"]) == ("one ", True)
    assert cut_at("one", []) == ("one", False)
    _, pieces, _, _ = listen(tokenizer, "one two three", ["three", "two"])
    assert "".join(pieces).strip() == "one"


def test_bytes_that_are_no_text_do_not_stop_the_answer(tokenizer):
    pieces = []
    listener = Listener([], pieces.append)
    listener.begin()
    tokens = random.Random(0).choices(range(len(tokenizer)), k=300)
    for token in tokens:
        listener.put(token, tokenizer)
    assert pieces
    whole = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    listener.end(whole)
    if whole.startswith(pieces[0]):
        assert listener.sent


@pytest.mark.slow
def test_an_answer_that_began_does_not_begin_again(tokenizer):
    listener = Listener([], lambda piece: None)
    listener.begin()
    listener.begin()
    listener.put(tokenizer("bird", add_special_tokens=False)["input_ids"][0], tokenizer)
    assert listener.sent
    with pytest.raises(RuntimeError, match="broke off"):
        listener.begin()
