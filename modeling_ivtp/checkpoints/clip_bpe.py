"""CLIP's tokenizer, built offline from the BPE table that open_clip ships."""

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

_TABLE = "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY = 49408
# 256 bytes, the same 256 as ends of a word, and two special tokens; the table holds more merges than CLIP was given.
_MERGES = _VOCABULARY - 2 * 256 - 2


def clip_tokenizer_from_open_clip(context_length: int = 77) -> CLIPTokenizer:
    """Build CLIP's BPE tokenizer from the table inside the installed `open_clip_torch`.

    Parameters
    ----------
    context_length : int
        Longest sequence the text tower takes, start and end token included: 77 in all of OpenAI's CLIP models.

    Returns
    -------
    CLIPTokenizer
        The tokenizer of OpenAI's CLIP, with its 49408 ids.

    Raises
    ------
    ImportError
        If open_clip_torch, or the table in it, is missing.
    ValueError
        If the table is not CLIP's.
    """
    spec = find_spec("open_clip")  # importing open_clip itself takes seconds
    folders = (spec and spec.submodule_search_locations) or []
    table = next((path for path in (Path(folder) / _TABLE for folder in folders) if path.is_file()), None)
    if table is None:
        raise ImportError(f"CLIP's BPE table ({_TABLE}) comes with open_clip: pip install open_clip_torch")
    with gzip.open(table, "rt", encoding="utf-8") as lines:
        merges: list[Any] = [tuple(line.split()) for line in lines.read().split("\n")[1 : _MERGES + 1]]
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    if len(set(tokens)) != _VOCABULARY:
        raise ValueError(f"{table} holds {len(set(tokens))} tokens, CLIP has {_VOCABULARY}")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)


def _byte_letters() -> list[str]:
    """Name the 256 bytes in CLIP's order: printable ones by their own letter, then the others by one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
