"""The text half of a CLIP on the disk, under the names that IVTP gives its tensors, whatever the source's format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ..model.checkpoint_ivtp import ClipText
from .clip_bpe import clip_tokenizer_from_open_clip
from .weights import Checkpoint

TEXT = "clip_text_model."
VISUAL_PROJECTION = "visual_projection.weight"
_CLIP_VOCABULARY = 49408

TensorReader = Callable[[Checkpoint], Tensor]
"""A function that makes one of our tensors from a checkpoint's own."""


@dataclass(frozen=True)
class StoredClipText:
    """The text half of a CLIP checkpoint under the names it has in `IVTPLlavaModel`.

    Attributes
    ----------
    source : str
        The name or path that the user gave.
    text_config : CLIPTextConfig
        The tower's architecture; `projection_dim` is the width P of CLIP's common space.
    vision_width : int
        Width of the vision tower that `visual_projection` belongs to.
    tokenizer : CLIPTokenizer
        CLIP's own BPE tokenizer.
    checkpoint : Checkpoint
        The weights' files.
    """

    source: str
    text_config: CLIPTextConfig
    vision_width: int
    tokenizer: CLIPTokenizer
    checkpoint: Checkpoint
    _readers: Mapping[str, TensorReader] = field(repr=False)
    _class_embedding: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that `tensors` yields, by name."""
        shapes = {TEXT + name: shape for name, shape in text_shapes(self.text_config).items()}
        return shapes | {VISUAL_PROJECTION: (int(self.text_config.projection_dim or 0), self.vision_width)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Read the weights one by one, in their stored type.

        Yields
        ------
        tuple of str and Tensor
            `clip_text_model.text_model.…`, `clip_text_model.text_projection.weight` (P, text width) and
            `visual_projection.weight` (P, vision width): the names of transformers' `CLIPTextModelWithProjection` and
            of a `Linear` without bias.
        """
        for name in self.shapes:
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        """Read one tensor by its name in `shapes`."""
        return self._readers[name](self.checkpoint)

    def class_embedding(self) -> Tensor | None:
        """Read the vision tower's class embedding (vision width,), which identifies the tower; None if it is absent."""
        if self._class_embedding not in self.checkpoint.tensors or self.checkpoint.folder is None:
            return None
        return self.checkpoint.read(self._class_embedding)

    def load(self) -> ClipText:
        """Read all weights into memory."""
        state = dict(self.tensors())
        projection = state.pop(VISUAL_PROJECTION)
        return ClipText(
            source=self.source,
            text_config=self.text_config,
            vision_width=self.vision_width,
            text_model={name.removeprefix(TEXT): tensor for name, tensor in state.items()},
            visual_projection=projection,
            class_embedding=self.class_embedding(),
        )


def text_shapes(config: CLIPTextConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the weights of transformers' `CLIPTextModelWithProjection`."""
    with torch.device("meta"):
        model = CLIPTextModelWithProjection._from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_shapes(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError if a checkpoint lacks one of the `expected` tensors, or has it in another shape."""
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise ValueError(
            f"{checkpoint.source} lacks {missing[0]} ({len(missing)} tensors of CLIP's text half are missing)"
        )
    for name, shape in expected.items():
        found = checkpoint.tensors[name].shape
        if found != shape:
            raise ValueError(f"{name} in {checkpoint.source} has shape {found}, but its config asks for {shape}")


def clip_tokenizer(folder: Path | None, config: CLIPTextConfig, source: str) -> CLIPTokenizer:
    """Load the tokenizer in `folder`, or CLIP's own from open_clip if there is none, with the tower's context length.

    Raises
    ------
    ValueError
        If there is no tokenizer for a vocabulary of that size.
    """
    context = config.max_position_embeddings
    layouts = ("tokenizer.json",), ("vocab.json", "merges.txt")
    if folder is not None and any(all((folder / name).is_file() for name in names) for names in layouts):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    elif config.vocab_size == _CLIP_VOCABULARY:
        # Every CLIP of that size was trained with OpenAI's BPE, which open_clip carries.
        tokenizer = clip_tokenizer_from_open_clip(context)
    else:
        raise ValueError(
            f"{source} has {config.vocab_size} text tokens, not CLIP's {_CLIP_VOCABULARY}, and no tokenizer beside it"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens, its text tower only {config.vocab_size}"
        )
    return tokenizer


def read_stored(name: str) -> TensorReader:
    """Return a reader of one of the checkpoint's tensors as it is stored."""
    return lambda checkpoint: checkpoint.read(name)
