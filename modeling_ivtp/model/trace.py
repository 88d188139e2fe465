"""The record of what was pruned, where and why: `explain` returns it, and a forward pass fills it.

The record is `PruningTrace`: an `ImageTrace` for every image, a `GroupTrace` for every group of layers and a
`TokenTrace` for every token of the instruction. Its figure is Fig. 5 of IVTP (ECCV 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

from .pruner import Choice
from .rollout import GroupScores
from .schedule import Group
from .trace_plot import MarkedText, Panel, as_image, dim, draw, key_words, mark, square
from .visual_sequence import VisualSequence

if TYPE_CHECKING:
    from .trace_plot import Figure


IN_LAYERS = ("decoder", "ahead")
"""The stages whose groups are layers of the decoder."""


@dataclass(frozen=True, eq=False, repr=False)
class GroupTrace:
    """One group of layers of one stage, for one image.

    Attributes
    ----------
    stage : str
        `"tower"`, `"features"` (after the tower), `"prompt"` (before the decoder), `"decoder"`, or `"ahead"`: layers of
        the decoder, in a pass ahead of it.
    layers : tuple of int
        First and last layer of the group, counted from 0, both included; -1 outside of any layer.
    candidates : Tensor
        (k_in,) int64, ascending: the patches of the original grid, row by row, before this group.
    importance : Tensor
        (k_in,) float32: one value per candidate. Of IVTP it is Eq. 4, with sum 1, or accumulated importance; nan for a
        method that ranks nothing.
    kept : Tensor
        (k_out,) int64, ascending: the patches that stayed.
    """

    stage: str
    layers: tuple[int, int]
    candidates: Tensor
    importance: Tensor
    kept: Tensor

    def __repr__(self) -> str:
        layers = f", layers {self.layers[0]} to {self.layers[1]}" if self.layers[0] >= 0 else ""
        return f"GroupTrace({self.stage}{layers}: {len(self.candidates)} → {len(self.kept)})"

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready: tensors become lists, a number that is not finite becomes None."""
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
        `"<id>"` without a tokenizer.
    relevance : float
        C_s of Eq. 7; nan for a guidance that computes none.
    is_key : bool
        Whether it passed the threshold.
    """

    position: int
    token_id: int
    text: str
    relevance: float
    is_key: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready: a relevance that is not finite becomes None."""
        return {**vars(self), "relevance": _finite(self.relevance)}


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
        Empty without an instruction.
    reference : str or None
        The token whose attention is the importance in the decoder: `"pseudo_cls"`, or `"visual_cls"` where no key word
        guides. None for a method that has neither.
    """

    row: int
    grid: tuple[int, int]
    groups: tuple[GroupTrace, ...]
    tokens: tuple[TokenTrace, ...]
    reference: str | None

    def __repr__(self) -> str:
        guide = f", {self.reference}, key words: {_listed(self.key_words)}" if self.reference else ""
        return f"ImageTrace(row {self.row}, {' → '.join(map(str, self.counts))} tokens{guide})"

    @property
    def patches(self) -> int:
        """Patches of the grid, which is the number of visual tokens without pruning."""
        return self.grid[0] * self.grid[1]

    @property
    def counts(self) -> tuple[int, ...]:
        """Visual tokens at first, and after every stage that ran."""
        last = {group.stage: len(group.kept) for group in self.groups}
        return (self.patches, *last.values())

    @property
    def key_words(self) -> tuple[str, ...]:
        """The words that hold a key token, in reading order."""
        return key_words(self.tokens)

    @property
    def instruction(self) -> MarkedText:
        """The text that the image was pruned for, with its key words marked by relevance."""
        return mark(self.tokens)

    def panels(self, stages: str | int | Sequence[int] | None = None) -> list[Panel]:
        """Return the whole image, then what each of the chosen groups keeps of it.

        Parameters
        ----------
        stages : str, int or sequence of int, optional
            `"all"`, `"tower"`, `"decoder"`, or places in `groups`. By default the end of the tower, what enters the
            decoder if a method chooses there, half of the decoder's pruning and its end.

        Raises
        ------
        ValueError
            If `stages` is none of these.
        """
        whole = Panel("as the model sees it", torch.ones(self.grid, dtype=torch.bool))
        return [whole, *(self._panel(group, _label(group, self.groups)) for group in _chosen(self.groups, stages))]

    def final_panel(self, label: str) -> Panel:
        """Return what is kept in the end."""
        return self._panel(self.groups[-1], label)

    def _panel(self, group: GroupTrace, label: str) -> Panel:
        mask = torch.zeros(self.grid, dtype=torch.bool)
        mask.view(-1)[group.kept.cpu()] = True
        return Panel(label, mask)

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready, derived numbers included."""
        return {
            "row": self.row,
            "grid": list(self.grid),
            "reference": self.reference,
            "counts": list(self.counts),
            "key_words": list(self.key_words),
            "groups": [group.to_dict() for group in self.groups],
            "tokens": [token.to_dict() for token in self.tokens],
        }


class StagePicture(NamedTuple):
    """A panel of `plot` as a picture: its label, the number of visual tokens, the picture (PIL.Image.Image)."""

    label: str
    tokens: int
    image: Any


@dataclass(frozen=True, eq=False, repr=False)
class PruningTrace:
    """All images of one prefill.

    Attributes
    ----------
    images : tuple of ImageTrace
    kv_bytes, kv_bytes_unpruned : int
        Size of the whole batch's KV cache after the prefill, and its size without pruning.
    decoder_layer_tokens : tuple of int or float
        Visual tokens of one image in each decoder layer.
    method : str, default "ivtp"
        What pruned: `"ivtp"`, or the methods that were applied, such as `"topk"` or `"topk + fastv"`.
    """

    images: tuple[ImageTrace, ...]
    kv_bytes: int
    kv_bytes_unpruned: int
    decoder_layer_tokens: tuple[float, ...]
    method: str = "ivtp"

    @property
    def final_tokens(self) -> tuple[int, ...]:
        """Visual tokens left at the end, per image."""
        return tuple(image.counts[-1] for image in self.images)

    @property
    def layer_averaged_tokens(self) -> float:
        """Visual tokens of one image, averaged over the decoder's layers; 0 without an image."""
        return sum(self.decoder_layer_tokens) / max(1, len(self.decoder_layer_tokens))

    @property
    def kv_bytes_saved(self) -> int:
        """Bytes of KV cache that pruning saved."""
        return self.kv_bytes_unpruned - self.kv_bytes

    def __repr__(self) -> str:
        return f"PruningTrace({self.summary()})"

    def summary(self) -> str:
        """Tell the whole trace on one line; a method other than IVTP is named."""
        parts = [f"{_plural(len(self.images), 'image')}: {self._counts()}" if self.images else "no image"]
        if self.kv_bytes_unpruned:
            parts.append(f"KV cache {_size(self.kv_bytes)} of {_size(self.kv_bytes_unpruned)}")
        words = list(dict.fromkeys(word for image in self.images for word in image.key_words))
        if words:
            parts.append(f"key words: {_listed(words)}")
        elif any(image.reference for image in self.images):
            parts.append("no key words")
        return ("" if self.method == "ivtp" else f"{self.method}: ") + "; ".join(parts)

    def _counts(self) -> str:
        first = self.images[0]
        stages = list(dict.fromkeys(group.stage for group in first.groups))
        text = _span([image.patches for image in self.images])
        for place, stage in enumerate(stages, 1):
            counts = [image.counts[place] for image in self.images if len(image.counts) > place]
            text += f"{',' if place > 1 else ''} → {_span(counts)} {_PLACES[stage]}"
        return f"{text} ({self.layer_averaged_tokens:.1f} layer-averaged)"

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready, derived numbers included: ints, floats, strings and lists only, None for nan."""
        return {
            "method": self.method,
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
        beside: Sequence[PruningTrace] = (),
    ) -> Figure:
        """Draw what stays of one image, under the instruction with its key words marked (Fig. 5).

        Parameters
        ----------
        image : PIL.Image.Image, numpy.ndarray or path
            The picture that the processor got; an array is (H, W), (H, W, C) or (C, H, W), in 0 to 255 or, for
            floats, 0 to 1. It is cut to the centre square as CLIP's image processor does.
        index : int, default 0
            The image's number in the trace.
        stages : str, int or sequence of int, optional
            The groups to show, as for `ImageTrace.panels`.
        title : str, optional
            A line above the instruction.
        size : float, optional
            Width in inches; the height follows, and everything grows or shrinks with it.
        beside : sequence of PruningTrace, optional
            What other methods do to the same prompt. The figure then has the whole picture and a panel for every
            method, this trace's first, with what each keeps in the end; `stages` does not apply.

        Returns
        -------
        matplotlib.figure.Figure
            pyplot does not hold it, so nothing has to be closed. Notebooks show it; `savefig("trace.png")` writes it.

        Raises
        ------
        ImportError
            Without matplotlib.
        ValueError
            If `index`, `stages`, `size`, `image` or `beside` is none of the above.
        """
        chosen = self._image(index)
        if size is not None and not (isinstance(size, int | float) and math.isfinite(size) and size > 0):
            raise ValueError(f"size={size!r}: expected the width in inches, a positive number")
        panels, caption, instruction = chosen.panels(stages), self._caption(index), chosen.instruction
        if beside:
            if stages is not None:
                raise ValueError(f"stages={stages!r}: only the end of every method is shown side by side")
            traces = (self, *beside)
            panels = [panels[0], *(trace._final_panel(index, chosen.grid) for trace in traces)]
            caption = self._comparison(index, traces)
            instruction = next(
                (text for trace in traces if (text := trace.images[index].instruction).text), instruction
            )
        return draw(square(image, chosen.grid), panels, instruction, caption, title, size)

    def pictures(
        self, image: Any, index: int = 0, *, stages: str | int | Sequence[int] | None = None
    ) -> list[StagePicture]:
        """Return the panels of `plot` as separate pictures: the whole image, then what each chosen group keeps.

        Parameters
        ----------
        image, index, stages
            As for `plot`.

        Raises
        ------
        ValueError
            As for `plot`.
        """
        chosen = self._image(index)
        panels = chosen.panels(stages)
        whole = square(image, chosen.grid)
        return [StagePicture(label, int(mask.sum()), as_image(dim(whole, mask))) for label, mask in panels]

    def _final_panel(self, index: int, grid: tuple[int, int]) -> Panel:
        image = self._image(index)
        if image.grid != grid:
            raise ValueError(f"beside: a trace of grid {image.grid}; expected {grid}")
        return image.final_panel(self.method)

    def _image(self, index: int) -> ImageTrace:
        if index not in range(len(self.images)):
            raise ValueError(f"index={index!r}: the trace holds {_plural(len(self.images), 'image')}, counted from 0")
        return self.images[index]

    def _number(self, index: int) -> list[str]:
        return [f"image {index + 1} of {len(self.images)}"] if len(self.images) > 1 else []

    def _comparison(self, index: int, traces: Sequence[PruningTrace]) -> list[str]:
        averages = ", ".join(f"{trace.method} {trace.layer_averaged_tokens:.1f}" for trace in traces)
        caches = ", ".join(f"{trace.method} {_size(trace.kv_bytes)}" for trace in traces)
        facts = [*self._number(index), f"visual tokens averaged over the decoder's layers: {averages}"]
        return [*facts, f"KV cache: {caches} of {_size(self.kv_bytes_unpruned)}"]

    def _caption(self, index: int) -> list[str]:
        image = self.images[index]
        method = "" if self.method == "ivtp" else f"{self.method}: "
        facts = [*self._number(index), f"{method}{' → '.join(map(str, image.counts))} visual tokens"]
        if self.decoder_layer_tokens:
            facts.append(f"{self.layer_averaged_tokens:.1f} averaged over the decoder's layers")
        if self.kv_bytes_unpruned:
            facts.append(f"KV cache {_size(self.kv_bytes)} of {_size(self.kv_bytes_unpruned)}")
        if image.reference == "visual_cls" and any(group.stage in IN_LAYERS for group in image.groups):
            scored = any(math.isfinite(token.relevance) for token in image.tokens)
            facts.append(f"decoder guided by the visual CLS{' (no key words)' if scored else ''}")
        return facts


class TraceRecorder:
    """Collects the decisions of one forward pass; `explain` hands it through the model.

    Parameters
    ----------
    processor : processor or tokenizer, optional
        Turns token ids into text. Default: the tokenizer saved next to the model, if it is on disk.

    Attributes
    ----------
    tower : list of GroupScores
        Tensors by image, (I, ...).
    prompted, decoder : list of GroupScores
        Tensors by row and image, (B, M, ...).
    """

    def __init__(self, processor: Any = None) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.tower: list[GroupScores] = []
        self.prompted: list[GroupScores] = []
        self.decoder: list[GroupScores] = []
        self._input_ids: torch.Tensor | None = None
        self._sequence: VisualSequence | None = None
        self._relevance: torch.Tensor | None = None
        self._keys: torch.Tensor | None = None

    def prompt(
        self,
        input_ids: torch.Tensor | None,
        sequence: VisualSequence,
        relevance: torch.Tensor | None,
        keys: torch.Tensor | None,
    ) -> None:
        """Note the prompt before anything is dropped, and the relevance (B, M, S) of its tokens for each image."""
        self._input_ids, self._sequence, self._relevance, self._keys = input_ids, sequence, relevance, keys

    def chosen(self, stage: str, keep: int, candidates: torch.Tensor, choice: Choice) -> None:
        """Note a choice outside of any layer: among features (I, k) or for a prompt (B, M, k)."""
        kept = torch.nn.functional.pad(candidates, (0, 1), value=-1).gather(-1, choice.kept)
        scores = GroupScores(stage, Group(-1, -1, keep), candidates, choice.scores, kept, choice.mixture)
        (self.tower if stage == "features" else self.prompted).append(scores)

    def trace(self, model: Any, cache: Any) -> PruningTrace:
        """Return all that was collected; `model` and the `cache` after the pass give the sizes."""
        if self.tokenizer is None:
            self.tokenizer = _saved_tokenizer(model.name_or_path)
        assert self._sequence is not None
        pruner = model.model.pruner
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        images, flat = [], 0
        for row, counts in enumerate(self._sequence.rows):
            for image in range(counts.images):
                groups = [_group(scores, (flat,)) for scores in self.tower]
                groups += [_group(scores, (row, image)) for scores in (*self.prompted, *self.decoder)]
                tokens = self._tokens(row, image)
                reference = None
                if pruner.needs.pseudo_cls:
                    reference = "pseudo_cls" if any(token.is_key for token in tokens) else "visual_cls"
                images.append(ImageTrace(row, (side, side), tuple(groups), tokens, reference))
                flat += 1
        layers = model.config.text_config.num_hidden_layers
        # A static cache has room for more than it holds.
        held = [getattr(layer, "entries", int(layer.get_seq_length())) for layer in cache.layers]
        first = cache.layers[0]
        per_entry = first.keys[:, :, :1].nbytes + first.values[:, :, :1].nbytes
        return PruningTrace(
            images=tuple(images),
            kv_bytes=per_entry * sum(held),
            kv_bytes_unpruned=per_entry * layers * int(cache.get_seq_length()),
            decoder_layer_tokens=_layer_tokens(images, model.model.plan().tower_tokens, layers),
            method=pruner.label,
        )

    def _tokens(self, row: int, image: int) -> tuple[TokenTrace, ...]:
        if self._keys is None:
            return ()
        relevance = self._relevance[row, image].tolist() if self._relevance is not None else None
        keys = self._keys[row, image].tolist()
        ids = self._input_ids[row].tolist() if self._input_ids is not None else [-1] * len(keys)
        tokens = []
        for position, is_key in enumerate(keys):
            value = float("nan") if relevance is None else relevance[position]
            if is_key or value > float("-inf"):
                text = self._text(ids[position])
                tokens.append(TokenTrace(position, ids[position], text, value, is_key))
        return tuple(tokens)

    def _text(self, token: int) -> str:
        if self.tokenizer is None or token < 0:
            return f"<{token}>"
        return self.tokenizer.convert_ids_to_tokens(token)


def _chosen(groups: Sequence[GroupTrace], stages: str | int | Sequence[int] | None) -> list[GroupTrace]:
    tower = [group for group in groups if group.stage in ("tower", "features")]
    prompt = [group for group in groups if group.stage == "prompt"]
    decoder = [group for group in groups if group.stage in IN_LAYERS]
    if stages is None:
        halfway = (len(decoder) - 1) // 2
        return [*tower[-1:], *prompt, *decoder[halfway:-1][:1], *decoder[-1:]]
    allowed = f"expected 'all', 'tower', 'decoder' or places from 0 to {len(groups) - 1}"
    if isinstance(stages, str):
        if stages not in ("all", "tower", "decoder"):
            raise ValueError(f"stages={stages!r}: {allowed}")
        return {"all": list(groups), "tower": tower, "decoder": [*prompt, *decoder]}[stages]
    for place in (stages := [stages] if isinstance(stages, int) else stages):
        if place not in range(-len(groups), len(groups)):
            raise ValueError(f"stages={stages!r} holds {place!r}: {allowed}")
    return [groups[place] for place in stages]


def _label(group: GroupTrace, groups: Sequence[GroupTrace]) -> str:
    if group.stage == "prompt":
        return "before the decoder"
    tower = [other for other in groups if other.stage in ("tower", "features")]
    if tower and group is tower[-1]:
        return "after the vision tower"
    stage, count = "vision" if group.stage == "tower" else "decoder", group.layers[1] + 1
    return f"after {count} {stage} layer{'' if count == 1 else 's'}"


_PLACES = {
    "tower": "in the tower",
    "features": "after the tower",
    "prompt": "before the decoder",
    "decoder": "in the decoder",
    "ahead": "ahead of the decoder",
}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _span(counts: Sequence[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _listed(words: Sequence[str], most: int = 12) -> str:
    return " ".join(words[:most]) + (" …" if len(words) > most else "") if words else "none"


def _size(count: int) -> str:
    """Write a number of bytes with three digits, as all commands do."""
    if count < 1000:
        return f"{count} bytes"
    power = 1 if count < 999_500 else 2 if count < 999_500_000 else 3
    return f"{count / 1000**power:.3g} {('KB', 'MB', 'GB')[power - 1]}"


def _group(scores: GroupScores, at: tuple[int, ...]) -> GroupTrace:
    candidates, kept = scores.candidates[at].cpu(), scores.kept[at].cpu()
    present = candidates >= 0
    if scores.importance is None:
        importance = torch.full(candidates.shape, float("nan"))
    else:
        importance = scores.importance[at].float().cpu()
    return GroupTrace(
        stage=scores.stage,
        layers=(scores.group.first, scores.group.last),
        candidates=candidates[present],
        importance=importance[present],
        kept=kept[kept >= 0],
    )


def _layer_tokens(images: list[ImageTrace], handed_over: int, layers: int) -> tuple[float, ...]:
    """Count the visual tokens of one image in each decoder layer, averaged over the images."""
    totals = [0] * layers
    for image in images:
        before = [group for group in image.groups if group.stage != "decoder"]
        tokens, start = len(before[-1].kept) if before else handed_over, 0
        for group in image.groups[len(before) :]:
            totals[start : group.layers[1] + 1] = [total + tokens for total in totals[start : group.layers[1] + 1]]
            tokens, start = len(group.kept), group.layers[1] + 1
        totals[start:] = [total + tokens for total in totals[start:]]
    return tuple(total // len(images) if total % len(images) == 0 else total / len(images) for total in totals)


def _saved_tokenizer(name_or_path: str) -> Any:
    """Load the tokenizer saved next to the checkpoint, if it is on disk; nothing is downloaded."""
    if not name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return None
