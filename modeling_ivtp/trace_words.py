"""The instruction's tokens as the text they spell: its characters, its key words, and how relevant each was."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts written without spaces, as the inside of a regular expression's brackets: Thai to Khmer, kana, Han."""


class Token(Protocol):
    """What is read of a token of the instruction."""

    @property
    def position(self) -> int:
        """Logical column in the prompt."""

    @property
    def text(self) -> str:
        """The tokenizer's text of it, in any of the common spellings."""

    @property
    def relevance(self) -> float:
        """C_s of Eq. 7, or nan."""

    @property
    def is_key(self) -> bool:
        """Whether it passed the threshold."""


@dataclass(frozen=True)
class MarkedText:
    """The text that tokens spell, its key words marked by relevance (C_s, Eq. 7).

    Attributes
    ----------
    text : str
    strengths : tuple of float or None
        One per character: 1 for the most relevant key token, 0 for the least, 0.5 where all are alike or their
        relevance is not known, None for what is no key token.
    low, high : float
        Relevance of the least and of the most relevant key token; nan where no relevance is known.
    """

    text: str
    strengths: tuple[float | None, ...]
    low: float
    high: float


def mark(tokens: Sequence[Token]) -> MarkedText:
    """The text of `tokens`, with what a reader needs to see which words were key, and how much so."""
    text, owners = _characters(tokens)
    known = [token.relevance for token in tokens if token.is_key and math.isfinite(token.relevance)]
    low, high = min(known, default=math.nan), max(known, default=math.nan)

    def strength(token: Token) -> float:
        return (token.relevance - low) / (high - low) if high > low and math.isfinite(token.relevance) else 0.5

    keys = [[strength(tokens[place]) for place in owner if tokens[place].is_key] for owner in owners]
    return MarkedText(text, tuple(max(key) if key else None for key in keys), low, high)


def key_words(tokens: Sequence[Token]) -> tuple[str, ...]:
    """The words that hold a key token, in reading order.

    A word counts as a whole when any of its tokens is key; in scripts without spaces adjacent key characters are
    joined instead.
    """
    text, owners = _characters(tokens)
    key = [any(tokens[token].is_key for token in owner) for owner in owners]
    for word in re.finditer(rf"[^\W{UNSPACED}]+(?:['’-][^\W{UNSPACED}]+)*", text):
        key[word.start() : word.end()] = [any(key[word.start() : word.end()])] * len(word[0])
    runs = "".join(letter if marked else " " for letter, marked in zip(text, key, strict=True)).split()
    return tuple(re.sub(r"^[^\w]+(?=\w)|(?<=\w)[^\w]+$", "", run) for run in runs)


def _characters(tokens: Sequence[Token]) -> tuple[str, list[tuple[int, ...]]]:
    """The text the tokens spell and, for each of its characters, the places of the tokens it came from.

    Tokens that are not neighbours in the prompt are set apart, and so are bare numbers of tokens, `<id>`. Otherwise a
    space is where a tokenizer put its mark: the first word of a line has none, however many tokens it is cut into.
    """
    pieces = _token_bytes(tokens)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    letters: list[str] = []
    owners: list[tuple[int, ...]] = []
    pending: list[int] = []
    for place, piece in enumerate(pieces):
        bare = re.fullmatch(r"<-?\d+>", tokens[place].text)
        if place and (bare or tokens[place].position != tokens[place - 1].position + 1):
            letters.append(" ")
            owners.append(())
        for byte in piece:
            pending.append(place)
            for letter in decoder.decode(bytes([byte])):
                letters.append(letter)
                owners.append(tuple(dict.fromkeys(pending)))
                pending = []
    return "".join(letters), owners


def _token_bytes(tokens: Sequence[Token]) -> list[bytes]:
    """UTF-8 of every token, whichever spelling the tokenizer has for spaces and for parts of characters."""
    texts = [token.text for token in tokens]
    parts = [re.fullmatch("<0x([0-9A-Fa-f]{2})>", text) for text in texts]
    plain = [
        bytes.fromhex(part[1]) if part else text.replace("▁", " ").encode("utf-8", "replace")
        for text, part in zip(texts, parts, strict=True)
    ]
    alphabet = _byte_alphabet()
    if any(parts) or not all(letter in alphabet for text in texts for letter in text):
        return plain
    spelt = [bytes(alphabet[letter] for letter in text) for text in texts]
    try:
        b"".join(spelt).decode()
    except UnicodeDecodeError:
        # "café" is written in that alphabet too, but there it is no UTF-8
        return spelt if any("Ġ" in text for text in texts) else plain
    return spelt


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes, by which byte-level tokenizers write a space as `Ġ`: character to byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
