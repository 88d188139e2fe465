"""Tokens in every spelling, as the words a reader knows."""

import pytest
from traces import QUESTION, spell

from modeling_ivtp.trace_words import key_words


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
        (["How", "many", "clocks", "?"], {1, 3}, ("many", "?")),
        (["▁don", "'", "t", "▁go"], {2}, ("don't",)),
        (["▁", "墙", "上", "有", "几", "个", "钟"], {1, 2, 4, 5, 6}, ("墙上", "几个钟")),
        (["▁a", "<0xF0>", "<0x9F>", "<0x90>", "<0xB6>"], {3}, ("🐶",)),
        (["<0xE9>", "<0x92>", "<0x9F>"], {0}, ("钟",)),
        (["caf", "Ã©", "Ġau", "Ġlait"], {1}, ("café",)),
        (["▁café", "▁x"], {0}, ("café",)),
        (["café"], {0}, ("café",)),
        (["<319>", "<29871>"], {1}, ("29871",)),
        ([], set(), ()),
    ],
)
def test_key_tokens_join_to_words(texts, key, expected):
    assert key_words(spell(texts, key)) == expected


def test_words_do_not_join_across_a_gap_in_the_prompt():
    tokens = (*spell(["▁red"], {0}), *spell(["cup"], {0}, start=900))
    assert key_words(tokens) == ("red", "cup")
