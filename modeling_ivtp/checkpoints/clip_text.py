"""The text half of a CLIP as IVTP needs it, wherever it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from ..model.checkpoint_ivtp import ClipText
from .clip_bpe import clip_tokenizer_from_open_clip
from .weights import Checkpoint

TEXT = "clip_text_model.text_model."
TEXT_PROJECTION = "clip_text_model.text_projection.weight"
VISUAL_PROJECTION = "visual_projection.weight"
CLIP_VOCABULARY = 49408

# For every tensor its shape and how it is made from the checkpoint's own tensors.
Recipe = dict[str, tuple[tuple[int, ...], Callable[[Checkpoint], Tensor]]]


@dataclass(frozen=True)
class StoredClipText:
    """The text half of a CLIP checkpoint under the names it has in `IVTPLlavaModel`.

    Attributes
    ----------
    source : str
        What the person named.
    text_config : CLIPTextConfig
        The tower's architecture; `projection_dim` is the width P of CLIP's common space.
    vision_width : int
        Width of the vision tower that `visual_projection` belongs to.
    tokenizer : CLIPTokenizer
        CLIP's own BPE tokenizer.
    checkpoint : Checkpoint
        Where the weights are.
    """

    source: str
    text_config: CLIPTextConfig
    vision_width: int
    tokenizer: CLIPTokenizer
    checkpoint: Checkpoint
    _recipe: Recipe = field(repr=False)
    _class_embedding: str | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that `tensors` yields, by name."""
        return {name: shape for name, (shape, _) in self._recipe.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights one by one, in their stored type.

        Yields
        ------
        tuple of str and Tensor
            `clip_text_model.text_model.…`, `clip_text_model.text_projection.weight` (P, text width) and
            `visual_projection.weight` (P, vision width): the names of transformers' `CLIPTextModelWithProjection` and
            of a `Linear` without bias.
        """
        for name in self._recipe:
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        """One of the tensors by the name it has here."""
        return self._recipe[name][1](self.checkpoint)

    def class_embedding(self) -> Tensor | None:
        """The vision tower's class embedding (vision width,), by which the tower can be told from another CLIP's."""
        if self._class_embedding is None or self.checkpoint.folder is None:
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
            text_model={name.removeprefix("clip_text_model."): tensor for name, tensor in state.items()},
            visual_projection=projection,
            class_embedding=self.class_embedding(),
        )


def tower_shapes(config: CLIPTextConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of transformers' `CLIPTextModel`, below `text_model.`."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (config.vocab_size, width),
        "embeddings.position_embedding.weight": (config.max_position_embeddings, width),
    }
    for layer in range(config.num_hidden_layers):
        name = f"encoder.layers.{layer}."
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes[f"{name}self_attn.{part}.weight"] = (width, width)
            shapes[f"{name}self_attn.{part}.bias"] = (width,)
        for part in ("layer_norm1", "layer_norm2"):
            shapes[f"{name}{part}.weight"] = shapes[f"{name}{part}.bias"] = (width,)
        shapes[f"{name}mlp.fc1.weight"], shapes[f"{name}mlp.fc1.bias"] = (inner, width), (inner,)
        shapes[f"{name}mlp.fc2.weight"], shapes[f"{name}mlp.fc2.bias"] = (width, inner), (width,)
    shapes["final_layer_norm.weight"] = shapes["final_layer_norm.bias"] = (width,)
    return shapes


def check_shapes(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
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
    """The tokenizer in `folder`, or CLIP's own from open_clip if there is none, with the tower's context length."""
    context = config.max_position_embeddings
    own = ("tokenizer.json",), ("vocab.json", "merges.txt")
    if folder is not None and any(all((folder / name).is_file() for name in names) for names in own):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    elif config.vocab_size == CLIP_VOCABULARY:
        # Every CLIP of that size was trained with OpenAI's BPE, which open_clip carries.
        tokenizer = clip_tokenizer_from_open_clip(context)
    else:
        raise ValueError(
            f"{source} has {config.vocab_size} text tokens, not CLIP's {CLIP_VOCABULARY}, and no tokenizer beside it"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens, its text tower only {config.vocab_size}"
        )
    return tokenizer


def stored(name: str) -> Callable[[Checkpoint], Tensor]:
    return lambda checkpoint: checkpoint.read(name)
