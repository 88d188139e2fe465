"""The text that a tokenizer's tokens stand for, token by token."""

import codecs
import re
from collections.abc import Sequence
from functools import cache


def spell(tokens: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Put tokens together to a text, and tell which characters each of them stands for.

    Parameters
    ----------
    tokens : sequence of str
        As `convert_ids_to_tokens` returns them.

    Returns
    -------
    str
    list of (int, int)
        Half-open character ranges. Tokens that hold the bytes of one character share it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    letters: list[str] = []
    ranges = []
    for piece in token_bytes(tokens):
        first = len(letters)
        for byte in piece:
            letters += decoder.decode(bytes([byte]))
        unfinished = bool(decoder.getstate()[0])
        ranges.append((first, len(letters) + unfinished))
    letters += decoder.decode(b"", final=True)
    return "".join(letters), ranges


def token_bytes(tokens: Sequence[str]) -> list[bytes]:
    """Encode every token in UTF-8, however its tokenizer spells spaces and parts of characters."""
    parts = [re.fullmatch("<0x([0-9A-Fa-f]{2})>", token) for token in tokens]
    plain = [
        bytes.fromhex(part[1]) if part else token.replace("▁", " ").encode("utf-8", "replace")
        for token, part in zip(tokens, parts, strict=True)
    ]
    alphabet = _byte_alphabet()
    if any(parts) or not all(letter in alphabet for token in tokens for letter in token):
        return plain
    spelt = [bytes(alphabet[letter] for letter in token) for token in tokens]
    try:
        b"".join(spelt).decode()
    except UnicodeDecodeError:
        # "café" is written in that alphabet too, but there it is no UTF-8.
        return spelt if any("Ġ" in token for token in tokens) else plain
    return spelt


@cache
def _byte_alphabet() -> dict[str, int]:
    """Map characters to bytes by GPT-2's table, in which a space is `Ġ`."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
