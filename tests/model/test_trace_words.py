"""Tokens in every spelling, as the words a reader knows."""

import dataclasses
import math

import pytest

from modeling_ivtp.model.trace_plot import key_words, mark
from tests.support.text_tokenizers import llama_tokenizer
from tests.support.traces import QUESTION, spell


@pytest.mark.parametrize(
    ("texts", "key", "expected"),
    [
        (QUESTION, {0, 1, 2, 3, 7}, ("How", "many", "clocks", "wall")),
        (QUESTION, {3}, ("clocks",)),
        (QUESTION, {7, 8}, ("wall",)),
        (QUESTION, {8}, ("?",)),
        (QUESTION, set(), ()),
        (["How", "Ġmany", "Ġclo", "cks", "?"], {1, 2}, ("many", "clocks")),
        (["How", " many", " clo", "cks"], {2}, ("clocks",)),
        (["Des", "cribe"], {1}, ("Describe",)),
        (["Trans", "cribe", "."], {0}, ("Transcribe",)),
        (["<0x50>", "h", "otos", "yn", "thesis", "?"], {3}, ("Photosynthesis",)),
        (["▁don", "'", "t", "▁go"], {2}, ("don't",)),
        (["▁", "墙", "上", "有", "几", "个", "钟"], {1, 2, 4, 5, 6}, ("墙上", "几个钟")),
        (["▁a", "<0xF0>", "<0x9F>", "<0x90>", "<0xB6>"], {3}, ("🐶",)),
        (["<0xE9>", "<0x92>", "<0x9F>"], {0}, ("钟",)),
        (["caf", "Ã©", "Ġau", "Ġlait"], {1}, ("café",)),
        (["▁café", "▁x"], {0}, ("café",)),
        (["café"], {0}, ("café",)),
        (["<319>", "<29871>", "<-1>"], {1}, ("29871",)),
        ([], set(), ()),
    ],
)
def test_key_tokens_join_to_words(texts, key, expected):
    assert key_words(spell(texts, key)) == expected


@pytest.mark.parametrize("word", ["Describe", "Transcribe.", "Photosynthesis?"])
def test_a_question_of_one_word_stays_one_word(word):
    """After the line break that follows the image, its first token has no mark of a space."""
    tokenizer = llama_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(f"USER: <image>\n{word} ASSISTANT:").input_ids)
    pieces = tokens[tokens.index("<0x0A>") + 1 : tokens.index("▁ASSISTANT:")]
    assert len(pieces) > 1
    assert mark(spell(pieces)).text == word
    assert key_words(spell(pieces, {1})) == (word.rstrip(".?"),)


def test_numbers_of_tokens_are_set_apart():
    assert mark(spell(["<319>", "<29871>"])).text == "<319> <29871>"


def test_words_do_not_join_across_a_gap_in_the_prompt():
    tokens = (*spell(["▁red"], {0}), *spell(["cup"], {0}, start=900))
    assert key_words(tokens) == ("red", "cup")


def test_characters_of_key_tokens_are_marked_by_relevance():
    marked = mark(spell(["▁a", "▁cat", "▁or", "▁dog", "gy"], {1, 2, 4}))
    assert marked.text == " a cat or doggy"
    assert (marked.low, marked.high) == (pytest.approx(0.26), pytest.approx(0.29))
    third = pytest.approx(1 / 3)
    assert marked.strengths == (*[None] * 2, *[0] * 4, *[third] * 3, *[None] * 4, *[1] * 2)


def test_a_character_of_several_tokens_is_marked_by_the_most_relevant():
    marked = mark(spell(["▁so", "<0xE9>", "<0x92>", "<0x9F>"], {0, 1, 2}))
    assert (marked.text, marked.strengths[-1]) == (" so钟", 1)


@pytest.mark.parametrize("relevance", [math.nan, 0.3])
def test_equal_or_unknown_relevance_marks_all_key_tokens_alike(relevance):
    tokens = [dataclasses.replace(token, relevance=relevance) for token in spell(["▁a", "▁b"], {0, 1})]
    assert mark(tokens).strengths == (0.5,) * 4
    assert not mark(tokens).high > mark(tokens).low


def test_no_instruction_is_no_text():
    assert (mark(()).text, mark(()).strengths) == ("", ())
