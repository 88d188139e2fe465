"""Collects what one forward pass decided, and turns it into a `PruningTrace`."""

from typing import Any

import torch
from transformers import AutoTokenizer

from .group_rollout import GroupScores
from .pruning_policy import Choice
from .pruning_trace import GroupTrace, ImageTrace, PruningTrace, TokenTrace
from .token_budget import Group
from .visual_sequence import VisualSequence


class TraceRecorder:
    """Handed through the model by `explain`.

    Parameters
    ----------
    processor : processor or tokenizer, optional
        Puts token numbers into words.

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
        """Note what was chosen among features (I, k) or for a prompt (B, M, k), outside of any layer."""
        kept = torch.nn.functional.pad(candidates, (0, 1), value=-1).gather(-1, choice.kept)
        scores = GroupScores(stage, Group(-1, -1, keep), candidates, choice.scores, kept, choice.mixture)
        (self.tower if stage == "features" else self.prompted).append(scores)

    def trace(self, model: Any, cache: Any) -> PruningTrace:
        """Everything that was collected; `model` and the `cache` after the pass give the sizes."""
        if self.tokenizer is None:
            self.tokenizer = _saved_tokenizer(model.name_or_path)
        assert self._sequence is not None
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        images, flat = [], 0
        for row, counts in enumerate(self._sequence.rows):
            for image in range(counts.images):
                groups = [_group(scores, (flat,)) for scores in self.tower]
                groups += [_group(scores, (row, image)) for scores in (*self.prompted, *self.decoder)]
                tokens = self._tokens(row, image)
                reference = "pseudo_cls" if any(token.is_key for token in tokens) else "visual_cls"
                images.append(
                    ImageTrace(row=row, grid=(side, side), groups=tuple(groups), tokens=tokens, reference=reference)
                )
                flat += 1
        layers = model.config.text_config.num_hidden_layers
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        first = cache.layers[0]
        per_entry = first.keys[:, :, :1].nbytes + first.values[:, :, :1].nbytes
        return PruningTrace(
            images=tuple(images),
            kv_bytes=stored,
            kv_bytes_unpruned=per_entry * layers * int(cache.get_seq_length()),
            decoder_layer_tokens=_layer_tokens(images, model.model.plan().tower_tokens, layers),
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


def _group(scores: GroupScores, at: tuple[int, ...]) -> GroupTrace:
    candidates, kept = scores.candidates[at].cpu(), scores.kept[at].cpu()
    there = candidates >= 0
    if scores.importance is None:
        importance = torch.full(candidates.shape, float("nan"))
    else:
        importance = scores.importance[at].float().cpu()
    return GroupTrace(
        stage=scores.stage,
        layers=(scores.group.first, scores.group.last),
        candidates=candidates[there],
        importance=importance[there],
        kept=kept[kept >= 0],
    )


def _layer_tokens(images: list[ImageTrace], handed_over: int, layers: int) -> tuple[float, ...]:
    """Visual tokens of one image in each decoder layer; of images that keep different numbers, the mean."""
    totals = [0] * layers
    for image in images:
        before = [group for group in image.groups if group.stage != "decoder"]
        tokens, start = len(before[-1].kept) if before else handed_over, 0
        for group in image.groups[len(before) :]:
            totals[start : group.layers[1] + 1] = [one + tokens for one in totals[start : group.layers[1] + 1]]
            tokens, start = len(group.kept), group.layers[1] + 1
        totals[start:] = [one + tokens for one in totals[start:]]
    return tuple(total // len(images) if total % len(images) == 0 else total / len(images) for total in totals)


def _saved_tokenizer(name_or_path: str) -> Any:
    """The tokenizer next to the checkpoint, if it is on disk; explaining is no reason to download anything."""
    if not name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return None
