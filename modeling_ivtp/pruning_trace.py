"""What was pruned, where and why: the record that `explain` returns, and its picture (Fig. 5 of IVTP, ECCV 2024)."""

from __future__ import annotations

import codecs
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    try:  # an unguarded import, even this one, would count among what a checkpoint's code requires
        from matplotlib.figure import Figure
    except ImportError:
        raise


@dataclass(frozen=True, eq=False, repr=False)
class GroupTrace:
    """One group of layers of one stage, for one image.

    Attributes
    ----------
    stage : str
        `"tower"` or `"decoder"`.
    layers : tuple of int
        First and last layer of the group, counted from 0, both included.
    candidates : Tensor
        (k_in,) int64, ascending: the patches of the original grid, row by row, that stood before.
    importance : Tensor
        (k_in,) float32, Eq. 4: one value per candidate, their sum is 1.
    kept : Tensor
        (k_out,) int64, ascending: the patches that stayed.
    """

    stage: str
    layers: tuple[int, int]
    candidates: Tensor
    importance: Tensor
    kept: Tensor

    def __repr__(self) -> str:
        return (
            f"GroupTrace({self.stage}, layers {self.layers[0]} to {self.layers[1]}: "
            f"{len(self.candidates)} → {len(self.kept)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: tensors become lists, a number that is not finite None."""
        return {
            "stage": self.stage,
            "layers": list(self.layers),
            "candidates": self.candidates.tolist(),
            "importance": [_finite(value) for value in self.importance.tolist()],
            "kept": self.kept.tolist(),
        }


@dataclass(frozen=True)
class TokenTrace:
    """One token of the instruction.

    Attributes
    ----------
    position : int
        Logical column in the prompt.
    token_id : int
        Its id in the language model's vocabulary.
    text : str
        The tokenizer's text of it, in any of the common spellings: `"▁how"`, `"Ġhow"`, `" how"`, `"<0xE4>"`; or
        `"<id>"` where no tokenizer was to be had.
    relevance : float
        C_s of Eq. 7; nan where the guidance does not compute one.
    is_key : bool
        Whether it passed the threshold.
    """

    position: int
    token_id: int
    text: str
    relevance: float
    is_key: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: a relevance that is not finite becomes None."""
        return {
            "position": self.position,
            "token_id": self.token_id,
            "text": self.text,
            "relevance": _finite(self.relevance),
            "is_key": self.is_key,
        }


@dataclass(frozen=True, eq=False, repr=False)
class ImageTrace:
    """One image: its groups in the order they ran, and the instruction it was pruned for.

    Attributes
    ----------
    row : int
        Row of the batch.
    grid : tuple of int
        Rows and columns of patches.
    groups : tuple of GroupTrace
    tokens : tuple of TokenTrace
        Empty where there was no instruction to go by.
    reference : str
        What the decoder measured importance against: `"pseudo_cls"` or `"visual_cls"`.
    """

    row: int
    grid: tuple[int, int]
    groups: tuple[GroupTrace, ...]
    tokens: tuple[TokenTrace, ...]
    reference: str

    def __repr__(self) -> str:
        counts = " → ".join(map(str, self.counts))
        return f"ImageTrace(row {self.row}, {counts} tokens, {self.reference}, key words: {_listed(self.key_words)})"

    @property
    def patches(self) -> int:
        """Patches of the grid, which is the number of visual tokens without pruning."""
        return self.grid[0] * self.grid[1]

    @property
    def counts(self) -> tuple[int, ...]:
        """Visual tokens at first, after the tower and after the decoder; a stage that did not run is left out."""
        last = {group.stage: len(group.kept) for group in self.groups}
        return (self.patches, *last.values())

    @property
    def key_words(self) -> tuple[str, ...]:
        """The words that hold a key token, in reading order.

        A word counts as a whole when any of its tokens is key; in scripts without spaces adjacent key characters
        are joined instead.
        """
        text, owners = _characters(self.tokens)
        key = [any(self.tokens[token].is_key for token in owner) for owner in owners]
        for word in re.finditer(rf"[^\W{_UNSPACED}]+(?:['’-][^\W{_UNSPACED}]+)*", text):
            key[word.start() : word.end()] = [any(key[word.start() : word.end()])] * len(word[0])
        runs = "".join(letter if marked else " " for letter, marked in zip(text, key, strict=True)).split()
        return tuple(re.sub(r"^[^\w]+(?=\w)|(?<=\w)[^\w]+$", "", run) for run in runs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the derived numbers included."""
        return {
            "row": self.row,
            "grid": list(self.grid),
            "reference": self.reference,
            "counts": list(self.counts),
            "key_words": list(self.key_words),
            "groups": [group.to_dict() for group in self.groups],
            "tokens": [token.to_dict() for token in self.tokens],
        }


@dataclass(frozen=True, eq=False, repr=False)
class PruningTrace:
    """All images of one prefill.

    Attributes
    ----------
    images : tuple of ImageTrace
    kv_bytes, kv_bytes_unpruned : int
        Size of the KV cache after the prefill, and what it would have been without pruning, over the whole batch.
    decoder_layer_tokens : tuple of int
        Visual tokens of one image that each decoder layer saw.
    """

    images: tuple[ImageTrace, ...]
    kv_bytes: int
    kv_bytes_unpruned: int
    decoder_layer_tokens: tuple[int, ...]

    @property
    def final_tokens(self) -> tuple[int, ...]:
        """Visual tokens left at the end, per image."""
        return tuple(image.counts[-1] for image in self.images)

    @property
    def layer_averaged_tokens(self) -> float:
        """Visual tokens of one image that a decoder layer saw on average; 0 without an image."""
        return sum(self.decoder_layer_tokens) / max(1, len(self.decoder_layer_tokens))

    @property
    def kv_bytes_saved(self) -> int:
        """Bytes of KV cache that pruning spared."""
        return self.kv_bytes_unpruned - self.kv_bytes

    def __repr__(self) -> str:
        return f"PruningTrace({self.summary()})"

    def summary(self) -> str:
        """The whole trace on one line."""
        parts = []
        if self.images:
            parts.append(f"{_plural(len(self.images), 'image')}: {self._counts()}")
        else:
            parts.append("no image")
        if self.kv_bytes_unpruned:
            parts.append(f"KV cache {_size(self.kv_bytes)} of {_size(self.kv_bytes_unpruned)}")
        words = list(dict.fromkeys(word for image in self.images for word in image.key_words))
        if words:
            parts.append(f"key words: {_listed(words)}")
        elif self.images:
            parts.append("no key words")
        return "; ".join(parts)

    def _counts(self) -> str:
        wording = {"tower": "in the tower", "decoder": "in the decoder"}
        first = self.images[0]
        stages = list(dict.fromkeys(group.stage for group in first.groups))
        text = _span([image.patches for image in self.images])
        for place, stage in enumerate(stages, 1):
            counts = [image.counts[place] for image in self.images if len(image.counts) > place]
            text += f"{',' if place > 1 else ''} → {_span(counts)} {wording.get(stage, stage)}"
        return f"{text} ({self.layer_averaged_tokens:.1f} layer-averaged)"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the derived numbers included: ints, floats, strings and lists only, None for nan."""
        return {
            "images": [image.to_dict() for image in self.images],
            "final_tokens": list(self.final_tokens),
            "layer_averaged_tokens": self.layer_averaged_tokens,
            "decoder_layer_tokens": list(self.decoder_layer_tokens),
            "kv_bytes": self.kv_bytes,
            "kv_bytes_unpruned": self.kv_bytes_unpruned,
            "kv_bytes_saved": self.kv_bytes_saved,
        }

    def plot(
        self,
        image: Any,
        index: int = 0,
        *,
        stages: str | int | Sequence[int] | None = None,
        title: str | None = None,
        size: float | None = None,
    ) -> Figure:
        """Draw what one image lost on its way, under the instruction with its key words marked (Fig. 5).

        Parameters
        ----------
        image : PIL.Image.Image, numpy.ndarray or path
            The picture that was given to the processor; an array is (H, W), (H, W, C) or (C, H, W), in 0 to 255 or, for
            floats, 0 to 1. It is cut to the centre square as CLIP's image processor does.
        index : int
            Which image of the trace it is.
        stages : str, int or sequence of int, optional
            The groups to show: `"all"`, `"tower"`, `"decoder"`, or places in `images[index].groups`. By default the end
            of the tower, half of the decoder's pruning and its end.
        title : str, optional
            A line above the instruction.
        size : float, optional
            Width in inches; the height follows, and everything grows or shrinks with it.

        Returns
        -------
        matplotlib.figure.Figure
            Unknown to pyplot, so nothing has to be closed. Notebooks show it; `figure.savefig("trace.png")` writes it.

        Raises
        ------
        ImportError
            Without matplotlib.
        ValueError
            If `index`, `stages`, `size` or `image` is not what is said above.
        """
        if index not in range(len(self.images)):
            raise ValueError(f"index={index!r}: the trace holds {_plural(len(self.images), 'image')}, counted from 0")
        if size is not None and not (isinstance(size, int | float) and math.isfinite(size) and size > 0):
            raise ValueError(f"size={size!r}: expected the width in inches, a positive number")
        chosen = self.images[index]
        groups = _choose(chosen.groups, stages)
        return _draw(chosen, groups, _square(image, chosen.grid), self._caption(index), title, size)

    def _caption(self, index: int) -> list[str]:
        image = self.images[index]
        facts = [f"image {index + 1} of {len(self.images)}"] if len(self.images) > 1 else []
        facts.append(" → ".join(map(str, image.counts)) + " visual tokens")
        if self.decoder_layer_tokens:
            facts.append(f"{self.layer_averaged_tokens:.1f} averaged over the decoder's layers")
        if self.kv_bytes_unpruned:
            facts.append(f"KV cache {_size(self.kv_bytes)} of {_size(self.kv_bytes_unpruned)}")
        if image.reference == "visual_cls" and any(group.stage == "decoder" for group in image.groups):
            scored = any(math.isfinite(token.relevance) for token in image.tokens)
            facts.append(f"decoder guided by the visual CLS{' (no key words)' if scored else ''}")
        return facts


_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts written without spaces, as the inside of a regular expression's brackets: Thai to Khmer, kana, Han."""

_BREAKABLE = re.compile(rf"\s+|[{_UNSPACED}]|[^\s{_UNSPACED}]{{1,32}}(?![^\s{_UNSPACED}])|[^\s{_UNSPACED}]{{1,8}}")
"""White space, or what a line may end after: such a character, a word, a piece of what is too long for a word."""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _span(counts: Sequence[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _listed(words: Sequence[str], most: int = 12) -> str:
    return " ".join(words[:most]) + (" …" if len(words) > most else "") if words else "none"


def _size(count: float) -> str:
    if count < 1000:
        return f"{count} B"
    power = 3 if count >= 1e9 else 2 if count >= 1e6 else 1
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB')[power - 1]}"


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes, by which byte-level tokenizers write a space as `Ġ`: character to byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _token_bytes(tokens: Sequence[TokenTrace]) -> list[bytes]:
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


def _characters(tokens: Sequence[TokenTrace]) -> tuple[str, list[tuple[int, ...]]]:
    """The text the tokens spell and, for each of its characters, the places of the tokens it came from.

    Tokens that are not neighbours in the prompt, and words whose tokenizer text has lost its spaces, are set apart.
    """
    pieces = _token_bytes(tokens)
    spaced = any(re.search(rb"\s", piece) for piece in pieces)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    letters: list[str] = []
    owners: list[tuple[int, ...]] = []
    pending: list[int] = []
    for place, piece in enumerate(pieces):
        lost = not spaced and re.match(rb"[0-9A-Za-z<]", piece)
        if place and (lost or tokens[place].position != tokens[place - 1].position + 1):
            letters.append(" ")
            owners.append(())
        for byte in piece:
            pending.append(place)
            for letter in decoder.decode(bytes([byte])):
                letters.append(letter)
                owners.append(tuple(dict.fromkeys(pending)))
                pending = []
    return "".join(letters), owners


def _strengths(tokens: Sequence[TokenTrace], owners: Sequence[tuple[int, ...]]) -> list[float | None]:
    """How deep to tint every character: 1 for the most relevant key token, 0 for the least, None for the others."""
    low, high = _relevance_range(tokens)

    def strength(token: TokenTrace) -> float:
        return (token.relevance - low) / (high - low) if high > low and math.isfinite(token.relevance) else 0.5

    keys = [[strength(tokens[place]) for place in owner if tokens[place].is_key] for owner in owners]
    return [max(key) if key else None for key in keys]


def _relevance_range(tokens: Sequence[TokenTrace]) -> tuple[float, float]:
    known = [token.relevance for token in tokens if token.is_key and math.isfinite(token.relevance)]
    return min(known, default=math.nan), max(known, default=math.nan)


def _choose(groups: Sequence[GroupTrace], stages: str | int | Sequence[int] | None) -> list[GroupTrace]:
    """The groups that get a panel."""
    if stages is None:
        tower, decoder = ([group for group in groups if group.stage == stage] for stage in ("tower", "decoder"))
        halfway = (len(decoder) - 1) // 2
        return [*tower[-1:], *decoder[halfway:-1][:1], *decoder[-1:]]
    allowed = f"expected 'all', 'tower', 'decoder' or places from 0 to {len(groups) - 1}"
    if isinstance(stages, str):
        if stages not in ("all", "tower", "decoder"):
            raise ValueError(f"stages={stages!r}: {allowed}")
        return [group for group in groups if stages in ("all", group.stage)]
    for place in (stages := [stages] if isinstance(stages, int) else stages):
        if place not in range(-len(groups), len(groups)):
            raise ValueError(f"stages={stages!r} holds {place!r}: {allowed}")
    return [groups[place] for place in stages]


def _module(name: str) -> Any:
    """A module that only a picture needs."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError("PruningTrace.plot needs matplotlib: pip install ivtp-llava[plot]") from error


def _square(image: Any, grid: tuple[int, int]) -> Any:
    """The part of the picture that the grid covers, as (rows * c, columns * c, 3) floats in 0 to 1, c pixels a patch.

    Resizing the shortest side and cutting out the centre, as CLIP's image processor does, takes the largest centred
    square; here it is cut from the original, so that it is as sharp as the original allows.
    """
    np, pil, ops = _module("numpy"), _module("PIL.Image"), _module("PIL.ImageOps")
    if isinstance(image, str | os.PathLike):
        try:
            with pil.open(image) as file:
                picture = ops.exif_transpose(file).convert("RGB")
        except pil.UnidentifiedImageError as error:
            raise ValueError(f"image={os.fspath(image)!r} is not an image file") from error
    elif isinstance(image, pil.Image):
        picture = image.convert("RGB")
    elif isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
            array = np.moveaxis(array, 0, 2)
        if array.size == 0 or array.ndim != 3 or array.shape[2] not in (1, 3, 4):
            raise ValueError(f"image of shape {image.shape}: expected (H, W), (H, W, C) or (C, H, W), C = 1, 3 or 4")
        top = 1 if np.issubdtype(array.dtype, np.floating) else 255
        if array.min() < 0 or not array.max() <= top:
            raise ValueError(
                f"image of {array.dtype} from {array.min():.4g} to {array.max():.4g}: expected integers in 0 to 255 or "
                "floats in 0 to 1, a picture as it is before the processor normalises it"
            )
        colors = array[..., :3].repeat(3 if array.shape[2] == 1 else 1, axis=2)
        picture = pil.fromarray(np.round(colors * (255 / top)).astype(np.uint8))
    else:
        raise ValueError(f"image of type {type(image).__name__}: expected a PIL image, a NumPy array or a path")
    rows, columns = grid
    cell = math.ceil(768 / max(grid))
    side = min(picture.width / columns, picture.height / rows)
    left, upper = (picture.width - side * columns) / 2, (picture.height - side * rows) / 2
    cut = (left, upper, left + side * columns, upper + side * rows)
    return np.asarray(picture.resize((columns * cell, rows * cell), pil.Resampling.LANCZOS, box=cut)) / 255


# Lengths are in inches; at 144 dots each, a panel of 24 x 24 patches has 16 whole dots to a patch.
_DPI = 144
_PANEL, _GAP, _MARGIN, _FOOT = 384 / _DPI, 24 / _DPI, 40 / _DPI, 66 / _DPI
_COLUMNS, _LINES, _LEADING = 5, 4, 1.62  # panels in a row, lines of an instruction, line height in em
_INK, _MUTED, _FAINT, _ACCENT = "#1c2128", "#656d76", "#e7e9ec", "#f59e0b"
_TINTS = (1.0, 0.937, 0.776), (1.0, 0.729, 0.169)
_ASIAN_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Source Han Sans SC", "PingFang SC"),
    *("Hiragino Sans GB", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Apple SD Gothic Neo"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Arial Unicode MS", "Droid Sans Fallback"),
)


@dataclass
class _Paragraph:
    """A text broken into lines: words with their line and x, and stretches to tint, as line, left, right, strength."""

    words: list[tuple[int, float, str]]
    tints: list[tuple[int, float, float, float]]
    lines: int = 0


class _Type:
    """A font in one size, and widths by it.

    What no installed font can draw is set as a box, so that nothing warns when the figure is drawn.
    """

    def __init__(self, points: float, text: str, weight: str = "normal") -> None:
        fonts = _module("matplotlib.font_manager")

        def drawable(path: Any) -> set[str]:
            font = fonts.get_font(path)
            return {letter for letter in set(text) if font.get_char_index(ord(letter))}

        text += "□…"
        path = fonts.findfont(fonts.FontProperties(weight=weight))
        families, self.drawable = [fonts.get_font(path).family_name], drawable(path)
        installed = {entry.name for entry in fonts.fontManager.ttflist}
        for name in _ASIAN_FONTS:
            if name in installed and not set(text) <= self.drawable:
                more = drawable(fonts.findfont(fonts.FontProperties(family=name, weight=weight))) - self.drawable
                families += [name] if more else []
                self.drawable |= more
        self.em = points / 72
        self.properties = fonts.FontProperties(family=families, size=points, weight=weight)
        self._measure = _module("matplotlib.textpath").text_to_path.get_text_width_height_descent
        self._widths: dict[str, float] = {}

    def spell(self, letter: str) -> str:
        """`letter` as it can be drawn; joiners and selectors of emoji vanish, and so do control characters."""
        if letter.isspace():
            return " "
        if letter in "\ufe0e\ufe0f" or not letter.isprintable():
            return ""
        return letter if letter in self.drawable else "□" if "□" in self.drawable else "?"

    def width(self, text: str) -> float:
        """Advance width; measured between bars, because spaces at the ends would count for nothing."""
        if text not in self._widths:
            bars, both = (self._measure(f"|{inner}|", self.properties, False)[0] for inner in ("", text))
            self._widths[text] = (both - bars) / 72
        return self._widths[text]

    def set(self, text: str, strengths: Sequence[float | None], width: float, lines: int) -> _Paragraph:
        """Break `text` into at most `lines` lines of `width`, cut with an ellipsis; tint what has a strength."""
        letters = [(spelt, tint) for letter, tint in zip(text, strengths, strict=True) if (spelt := self.spell(letter))]
        text, strengths = "".join(letter for letter, _ in letters), [tint for _, tint in letters]
        made, x, gap = _Paragraph([], []), 0.0, 0.0
        for word in _BREAKABLE.finditer(text):
            if word[0].isspace():
                gap = self.width(" ") if x else 0.0
                continue
            start = word.start()
            while start < word.end():
                end = word.end()
                if not x or x + gap + self.width(text[start:end]) > width:
                    if made.lines == lines:
                        self._cut(made, width)
                        return made
                    made.lines, x, gap = made.lines + 1, 0.0, 0.0
                while end - start > 1 and self.width(text[start:end]) > width:
                    end -= 1
                self._place(made, x + gap, text[start:end], strengths[start:end])
                x, gap, start = x + gap + self.width(text[start:end]), 0.0, end
        return made

    def pack(self, facts: Sequence[str], width: float) -> list[str]:
        """Lines of `width` that hold as many whole facts as fit; a fact is broken only where it alone is too long."""
        lines: list[str] = []
        for fact in facts:
            longer = f"{lines[-1]}  ·  {fact}" if lines else fact
            if lines and self.width(longer) <= width:
                lines[-1] = longer
            else:
                words = self.set(fact, [None] * len(fact), width, 9).words
                lines += [" ".join(word for _, _, word in line) for _, line in groupby(words, key=lambda word: word[0])]
        return lines

    def _place(self, made: _Paragraph, x: float, text: str, strengths: Sequence[float | None]) -> None:
        line = made.lines - 1
        made.words.append((line, x, text))
        for marked, stretch in groupby(range(len(text)), key=lambda place: strengths[place] is not None):
            places = list(stretch)
            left, right = x + self.width(text[: places[0]]), x + self.width(text[: places[-1] + 1])
            if marked:
                strength = max(strengths[place] or 0.0 for place in places)
                if made.tints and made.tints[-1][0] == line and made.tints[-1][2] > left - 1e-6:
                    _, left, _, other = made.tints.pop()
                    strength = max(strength, other)
                made.tints.append((line, left, right, strength))

    def _cut(self, made: _Paragraph, width: float) -> None:
        """End the last line with an ellipsis, at the cost of the words it takes the place of."""
        room = width - self.width("…")
        line, x, text = made.words.pop()
        while x and x + self.width(text) > room:
            line, x, text = made.words.pop()
        while len(text) > 1 and x + self.width(text) > room:
            text = text[:-1]
        end = x + self.width(text)
        made.words += [(line, x, text), (line, end, "…")]
        made.tints = [
            (at, left, right if at < line else min(right, end), strength)
            for at, left, right, strength in made.tints
            if at < line or left < end - 1e-6
        ]


def _outline(mask: list[list[bool]]) -> list[list[tuple[int, int]]]:
    """Where a True cell of a mask meets a False one or the rim: straight segments, in cells, as long as can be."""
    segments = []
    for upright, cells in ((False, mask), (True, [list(column) for column in zip(*mask, strict=True)])):
        rim = [False] * len(cells[0])
        for y, (above, below) in enumerate(pairwise([rim, *cells, rim])):
            edges = [False, *(a != b for a, b in zip(above, below, strict=True)), False]
            turns = [x for x, (a, b) in enumerate(pairwise(edges)) if a != b]
            for ends in zip(turns[::2], turns[1::2], strict=True):
                segments.append([(y, x) if upright else (x, y) for x in ends])
    return segments


def _label(group: GroupTrace, groups: Sequence[GroupTrace]) -> str:
    if group.stage == "tower":
        last = next(other for other in reversed(groups) if other.stage == "tower")
        return "after the vision tower" if group is last else f"after {_plural(group.layers[1] + 1, 'vision layer')}"
    return f"after {_plural(group.layers[1] + 1, f'{group.stage} layer')}"


class _Page:
    """A figure of `width` by `height` inches, in which all else is told, drawn `size` inches wide."""

    def __init__(self, width: float, height: float, size: float | None) -> None:
        self.width, self.height, self.scale = width, height, (size or width) / width
        measures = (width * self.scale, height * self.scale)
        self.figure = _module("matplotlib.figure").Figure(measures, dpi=_DPI, facecolor="white", layout="none")
        self._inches = _module("matplotlib.transforms").Affine2D().scale(self.scale) + self.figure.dpi_scale_trans
        self._box = _module("matplotlib.patches").FancyBboxPatch

    def write(self, font: _Type, x: float, y: float, words: str, color: str, align: str = "left") -> None:
        properties = font.properties.copy()
        properties.set_size(font.em * 72 * self.scale)
        style = {"color": color, "ha": align, "va": "baseline", "parse_math": False, "usetex": False}
        self.figure.text(x, y, words, fontproperties=properties, transform=self._inches, **style)

    def fill(self, x: float, y: float, width: float, height: float, color: Any, corner: float = 0.0) -> None:
        box = self._box((x, y), width, height, f"round,pad=0,rounding_size={corner}")
        box.set(facecolor=color, edgecolor="none", transform=self._inches, zorder=0)
        self.figure.add_artist(box)

    def paragraph(self, font: _Type, paragraph: _Paragraph, top: float) -> None:
        """Lines of text downwards from `top`, over the tint of what is marked in them."""
        for line, left, right, strength in paragraph.tints:
            pad, y = 0.06 * font.em, top - font.em * (1.27 + _LEADING * line)
            self.fill(_MARGIN + left - pad, y, right - left + 2 * pad, 1.24 * font.em, _tint(strength), 0.2 * font.em)
        for line, x, words in paragraph.words:
            self.write(font, _MARGIN + x, top - font.em * (1 + _LEADING * line), words, _INK)

    def panel(self, left: float, bottom: float, shown: Any, mask: Tensor) -> None:
        """The picture, the kept regions of `mask` (rows, columns) outlined, and the kept share as a bar below."""
        rows, columns = mask.shape
        height = _PANEL * rows / columns
        place = (left / self.width, bottom / self.height, _PANEL / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set_axis_off()
        axes.imshow(shown, extent=(0, columns, rows, 0), aspect="auto", interpolation="antialiased")
        if not mask.all():
            lines = _module("matplotlib.collections").LineCollection(_outline(mask.tolist()), snap=True, clip_on=False)
            lines.set(color="white", linewidth=0.9 * self.scale, capstyle="projecting")
            axes.add_collection(lines, autolim=False)
        self.fill(left, bottom - 0.1, _PANEL, 0.045, _FAINT)
        self.fill(left, bottom - 0.1, _PANEL * float(mask.float().mean()), 0.045, _ACCENT)

    def legend(self, font: _Type, right: float, bottom: float, ends: tuple[str, str]) -> None:
        """From the palest to the deepest tint, with what these stand for at the two ends."""
        self.write(font, right, bottom, ends[1], _MUTED, "right")
        right -= font.width(ends[1]) + 0.08
        for step in range(5):
            self.fill(right - 0.13 * (5 - step), bottom - 0.02, 0.13, 0.14, _tint(step / 4))
        self.write(font, right - 5 * 0.13 - 0.08, bottom, ends[0], _MUTED, "right")


def _tint(strength: float) -> list[float]:
    return [pale + (deep - pale) * strength for pale, deep in zip(*_TINTS, strict=True)]


def _draw(
    trace: ImageTrace,
    groups: Sequence[GroupTrace],
    picture: Any,
    caption: Sequence[str],
    title: str | None,
    size: float | None,
) -> Figure:
    """Set title, instruction and caption, which tells how tall the page is, then draw from the top down."""
    panels = 1 + len(groups)
    rows = math.ceil(panels / _COLUMNS)
    columns = math.ceil(panels / rows)
    block = columns * _PANEL + (columns - 1) * _GAP
    tall = _PANEL * trace.grid[0] / trace.grid[1]

    text, owners = _characters(trace.tokens)
    low, high = _relevance_range(trace.tokens)
    ends = (f"relevance {low:.2f}", f"{high:.2f}")
    bold, plain = _Type(17, title or "", "bold"), _Type(17, text)
    small, number = _Type(10.5, "".join([*caption, *ends, "·"])), _Type(15, "0123456789", "bold")
    heading = bold.set(title or "", [None] * len(title or ""), block, 2)
    question = plain.set(text, _strengths(trace.tokens, owners), block, _LINES)
    footer = small.pack(caption, block)
    if high > low and small.width(footer[-1] + "".join(ends)) + 1.1 > block:
        footer.append("")
    leading = _LEADING * plain.em
    head = leading * (heading.lines + question.lines) + (0.16 if heading.lines + question.lines else 0.0)
    height = 2 * _MARGIN + head + rows * (tall + _FOOT) + 0.06 + _LEADING * small.em * len(footer)

    page = _Page(block + 2 * _MARGIN, height, size)
    page.paragraph(bold, heading, height - _MARGIN)
    page.paragraph(plain, question, height - _MARGIN - leading * heading.lines)
    for place in range(panels):
        left = _MARGIN + place % columns * (_PANEL + _GAP)
        bottom = height - _MARGIN - head - place // columns * (tall + _FOOT) - tall
        mask, label = torch.ones(trace.grid, dtype=torch.bool), "as the model sees it"
        if place:
            mask.fill_(False).view(-1)[groups[place - 1].kept.cpu()] = True
            label = _label(groups[place - 1], trace.groups)
        page.panel(left, bottom, _dim(picture, mask), mask)
        page.write(number, left, bottom - 0.32, str(int(mask.sum())), _INK)
        page.write(small, left + _PANEL, bottom - 0.32, label, _MUTED, "right")
    for line, words in enumerate(reversed(footer)):
        page.write(small, _MARGIN, _MARGIN + _LEADING * small.em * line, words, _MUTED)
    if high > low:
        page.legend(small, _MARGIN + block, _MARGIN, ends)
    # IPython knows figures only once pyplot is imported, which a plot should not need
    page.figure._repr_png_ = partial(_png, page.figure)
    return page.figure


def _dim(picture: Any, mask: Tensor) -> Any:
    """`picture` (rows * c, columns * c, 3), grey and dark but still legible where `mask` (rows, columns) is False."""
    cell = picture.shape[0] // mask.shape[0]
    kept = mask.numpy().repeat(cell, 0).repeat(cell, 1)[..., None]
    grey = (picture @ [0.299, 0.587, 0.114])[..., None]
    return picture * kept + (0.38 * (0.82 * grey + 0.18 * picture) + 0.08) * ~kept


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
