"""CLIP's text half: the text tower and both projections, read from every format in which CLIP is published.

LLaVA's checkpoints hold CLIP's vision tower without the projection after it and nothing of the text tower. Eq. 5 and 6
of IVTP need the rest. Only those tensors are read; the vision tower beside them stays on the disk.
"""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoConfig
from transformers.activations import ACT2CLS

from ..model.checkpoint_ivtp import OPEN_CLIP, is_open_clip
from . import open_clip_checkpoint
from .clip_text import (
    TEXT,
    VISUAL_PROJECTION,
    StoredClipText,
    check_shapes,
    clip_tokenizer,
    read_stored,
    text_shapes,
)
from .sources import HubOptions, naming_damaged_file, open_checkpoint

__all__ = ["StoredClipText", "load_clip_text"]

_SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


def load_clip_text(
    clip: str | os.PathLike[str],
    *,
    activation: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    headers_only: bool = False,
) -> StoredClipText:
    """Find and check CLIP's text tower, its projection and the projection of the image.

    Parameters
    ----------
    clip : str or path
        One of

        - a folder or Hub repository that transformers' `CLIPModel` loads, e.g. `"openai/clip-vit-large-patch14-336"`;
        - `"open_clip:MODEL/PRETRAINED"`, a model and a tag or local weights file of open_clip, e.g.
          `"open_clip:ViT-L-14-336/openai"`; also `"open_clip:hf-hub:OWNER/NAME"` and `"open_clip:local-dir:FOLDER"`;
        - an open_clip weights file, `….safetensors`. The architecture is read from the shapes, with heads of 64 as in
          every CLIP.
    activation : str, optional
        The towers' activation (`"quick_gelu"`, `"gelu"`) where the source does not name it. Both towers of a CLIP share
        it, so LLaVA's vision tower has the right one. Default `"quick_gelu"`, OpenAI's.
    revision, token, cache_dir, local_files_only
        As for `from_pretrained`.
    headers_only : bool
        Download no weights from the Hub, only their headers; `tensors` cannot be called then.

    Returns
    -------
    StoredClipText

    Raises
    ------
    ValueError
        If the source is no CLIP, has a text tower of another layout than CLIP's, or is not in safetensors.
    OSError
        If files are missing or damaged.
    """
    if activation is not None and activation not in ACT2CLS:
        raise ValueError(
            f"activation={activation!r}; allowed: quick_gelu, gelu or another of transformers' activations"
        )
    options = HubOptions(revision, token, cache_dir, local_files_only)
    if isinstance(clip, str) and clip.startswith(OPEN_CLIP):
        return open_clip_checkpoint.from_name(clip, activation, options, headers_only)
    if not is_open_clip(clip):
        return _from_transformers(clip, options, headers_only)
    path = Path(clip).expanduser()
    if path.is_file():
        return open_clip_checkpoint.from_file(path, activation)
    if not path.exists():
        raise FileNotFoundError(f"{clip} does not exist")
    return open_clip_checkpoint.from_name(f"{OPEN_CLIP}local-dir:{path}", activation, options, headers_only)


def _from_transformers(clip: str | os.PathLike[str], options: HubOptions, headers_only: bool) -> StoredClipText:
    try:
        checkpoint, folder = open_checkpoint(clip, options, headers_only=headers_only, extra=_SMALL_FILES)
    except ValueError as error:
        raise ValueError(
            f"{error}; OpenAI's CLIP is available in safetensors as {OPEN_CLIP}ViT-L-14-336/openai"
        ) from error
    if not (folder / "config.json").is_file():
        raise OSError(f"{clip} has no config.json")
    with naming_damaged_file(clip, folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type != "clip":
        raise ValueError(
            f"{clip} is of model_type {config.model_type!r}; CLIP's text tower comes from one of type 'clip'"
        )
    text_config, vision_width = config.text_config, config.vision_config.hidden_size
    text_config.projection_dim = config.projection_dim
    shapes = text_shapes(text_config)
    check_shapes(checkpoint, shapes | {VISUAL_PROJECTION: (config.projection_dim, vision_width)})
    with naming_damaged_file(clip, folder):
        tokenizer = clip_tokenizer(folder, text_config, str(clip))
    return StoredClipText(
        str(clip),
        text_config,
        vision_width,
        tokenizer,
        checkpoint,
        {TEXT + name: read_stored(name) for name in shapes} | {VISUAL_PROJECTION: read_stored(VISUAL_PROJECTION)},
        "vision_model.embeddings.class_embedding",
    )
