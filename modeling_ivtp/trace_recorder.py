"""Collects what one forward pass decided, and turns it into a `PruningTrace`."""

from typing import Any

import torch
from transformers import AutoTokenizer

from .group_rollout import GroupScores
from .pruning_trace import GroupTrace, ImageTrace, PruningTrace, TokenTrace
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
    decoder : list of GroupScores
        Tensors by row and image, (B, M, ...).
    """

    def __init__(self, processor: Any = None) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.tower: list[GroupScores] = []
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
                groups += [_group(scores, (row, image)) for scores in self.decoder]
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
            decoder_layer_tokens=model.config.pruning_plan().decoder_layer_tokens(layers),
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
    return GroupTrace(
        stage=scores.stage,
        layers=(scores.group.first, scores.group.last),
        candidates=scores.candidates[at].cpu(),
        importance=scores.importance[at].float().cpu(),
        kept=scores.kept[at].cpu(),
    )


def _saved_tokenizer(name_or_path: str) -> Any:
    """The tokenizer next to the checkpoint, if it is on disk; explaining is no reason to download anything."""
    if not name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return None
