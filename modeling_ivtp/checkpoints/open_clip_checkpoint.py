"""CLIP's text half from open_clip's checkpoints: by model and tag, from its Hub repositories and its weights files.

open_clip keeps query, key and value in one matrix and multiplies by its projections from the other side.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig

from ..model.checkpoint_ivtp import OPEN_CLIP
from .clip_text import (
    TEXT,
    VISUAL_PROJECTION,
    StoredClipText,
    TensorReader,
    check_shapes,
    clip_tokenizer,
    read_stored,
)
from .sources import HubOptions, hub_headers
from .weights import Checkpoint

_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")


def from_name(clip: str, activation: str | None, options: HubOptions, headers_only: bool) -> StoredClipText:
    """Find CLIP's text half by open_clip's name for it.

    Parameters
    ----------
    clip : str
        `"open_clip:MODEL/PRETRAINED"`, `"open_clip:hf-hub:OWNER/NAME"` or `"open_clip:local-dir:FOLDER"`.
    activation : str or None
        For weights given as a file, where open_clip does not name the activation.
    options : HubOptions
        Options of a download.
    headers_only : bool
        Download the weights' headers alone.
    """
    from open_clip import get_model_config, get_pretrained_cfg, list_models, list_pretrained_tags_by_model

    name = clip.removeprefix(OPEN_CLIP)
    pretrained = ""
    if not name.startswith(("hf-hub:", "local-dir:")):
        name, _, pretrained = name.partition("/")
    try:
        config = get_model_config(name)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{clip}: {error}") from error
    if config is None:
        raise ValueError(f"open_clip has no model {name!r}; CLIP models with a ViT are, e.g., {_some(list_models())}")
    tag = get_pretrained_cfg(name, pretrained) if pretrained else {}

    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        found = [folder / file for file in _HUB_FILES if (folder / file).is_file()]
        if not found:
            raise ValueError(f"{folder} has none of {', '.join(_HUB_FILES)}; only safetensors are read")
        checkpoint = Checkpoint.from_file(found[0])
    elif name.startswith("hf-hub:"):
        checkpoint = _from_hub(name.removeprefix("hf-hub:"), _HUB_FILES, options, headers_only)
    elif tag:
        checkpoint = _from_tag(clip, tag, options, headers_only)
    elif pretrained and Path(pretrained).expanduser().is_file():
        checkpoint = _weights_file(Path(pretrained).expanduser())
    else:
        raise ValueError(
            f"{pretrained!r} is neither a file nor pretrained weights of open_clip's {name}; "
            f"those are {', '.join(list_pretrained_tags_by_model(name)) or 'none'}"
        )

    quick_gelu = tag.get("quick_gelu", False) or config.get("quick_gelu", False)
    # A file given by hand may be OpenAI's under the plain model name, whose config does not mention quick_gelu.
    known = bool(tag) or quick_gelu or not pretrained
    if known or activation is None:
        activation = "quick_gelu" if quick_gelu else "gelu"
    text_config = _text_config(clip, config, activation)
    return _from_tensors(clip, checkpoint, text_config)


def _from_tag(clip: str, tag: dict[str, Any], options: HubOptions, headers_only: bool) -> Checkpoint:
    if tag.get("file"):
        return _weights_file(Path(tag["file"]))
    repo, _, file = tag.get("hf_hub", "").rpartition("/")
    if repo:
        files = (re.sub(r"\.(bin|pt|pth)$", ".safetensors", file),) if file else _HUB_FILES[:1]
        return _from_hub(repo, files, options, headers_only)
    raise ValueError(
        f"{clip} is published as {tag.get('url') or 'nothing'} only; files that are not safetensors can run code when "
        "they are opened and are not read: load it with open_clip and save it with safetensors.torch.save_model"
    )


def _from_hub(repo: str, files: tuple[str, ...], options: HubOptions, headers_only: bool) -> Checkpoint:
    # open_clip's own download silently falls back to the pickled file; this one must not.
    if headers_only and not options.local_files_only:
        from huggingface_hub import HfApi

        api = HfApi(token=options.token)
        for file in files:
            if api.file_exists(repo, file, revision=options.revision):
                return hub_headers(repo, options, file=file)
    else:
        folder = options.snapshot(repo, files)
        for file in files:
            if (folder / file).is_file():
                return Checkpoint.from_file(folder / file)
    raise ValueError(f"the Hub repository {repo} has none of {', '.join(files)}; only safetensors are read")


def from_file(path: Path, activation: str | None) -> StoredClipText:
    """Find CLIP's text half in a weights file of open_clip, and read its architecture from the shapes."""
    checkpoint = _weights_file(path)
    prefix = _text_prefix(checkpoint)
    shape = {name: info.shape for name, info in checkpoint.tensors.items()}
    try:
        vocabulary, width = shape[prefix + "token_embedding.weight"]
        context = shape[prefix + "positional_embedding"][0]
        projection = shape[prefix + "text_projection"][1]
        inner = shape[prefix + "transformer.resblocks.0.mlp.c_fc.weight"][0]
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]}: it holds no text tower of CLIP's layout") from error
    if width % 64:
        raise ValueError(
            f"the text tower in {path} is {width} wide, no multiple of CLIP's head width 64: "
            f"name its model too, as {OPEN_CLIP}MODEL/{path}"
        )
    pattern = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    layers = {int(match[1]) for name in shape if (match := pattern.match(name))}
    text_config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        projection_dim=projection,
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        max_position_embeddings=context,
        hidden_act=activation or "quick_gelu",
    )
    return _from_tensors(str(path), checkpoint, text_config)


def _from_tensors(source: str, checkpoint: Checkpoint, text_config: CLIPTextConfig) -> StoredClipText:
    prefix = _text_prefix(checkpoint)
    root = prefix.removesuffix("text.")
    projection = root + "visual.proj"
    if projection not in checkpoint.tensors:
        raise ValueError(
            f"{source} lacks {projection}: its image tower is not the ViT with a projection of LLaVA's CLIP"
        )
    vision_width = checkpoint.tensors[projection].shape[0]
    check_shapes(
        checkpoint,
        _open_clip_shapes(prefix, text_config) | {projection: (vision_width, int(text_config.projection_dim or 0))},
    )
    readers = {TEXT + name: reader for name, reader in _text_readers(prefix, text_config).items()}
    return StoredClipText(
        source,
        text_config,
        vision_width,
        clip_tokenizer(None, text_config, source),
        checkpoint,
        readers | {VISUAL_PROJECTION: _transposed(projection)},
        root + "visual.class_embedding",
    )


def _open_clip_shapes(prefix: str, config: CLIPTextConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the text tower's tensors in open_clip."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (config.vocab_size, width),
        "positional_embedding": (config.max_position_embeddings, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, int(config.projection_dim or 0)),
    }
    for layer in range(config.num_hidden_layers):
        block = f"transformer.resblocks.{layer}."
        shapes |= {
            block + "attn.in_proj_weight": (3 * width, width),
            block + "attn.in_proj_bias": (3 * width,),
            block + "attn.out_proj.weight": (width, width),
            block + "attn.out_proj.bias": (width,),
            block + "mlp.c_fc.weight": (inner, width),
            block + "mlp.c_fc.bias": (inner,),
            block + "mlp.c_proj.weight": (width, inner),
            block + "mlp.c_proj.bias": (width,),
        }
        shapes |= {f"{block}{norm}.{end}": (width,) for norm in ("ln_1", "ln_2") for end in ("weight", "bias")}
    return {prefix + name: shape for name, shape in shapes.items()}


def _text_readers(prefix: str, config: CLIPTextConfig) -> dict[str, TensorReader]:
    """Return a reader for each tensor of transformers' text tower, by the name that it has there."""
    readers: dict[str, TensorReader] = {
        "text_model.embeddings.token_embedding.weight": read_stored(prefix + "token_embedding.weight"),
        "text_model.embeddings.position_embedding.weight": read_stored(prefix + "positional_embedding"),
        "text_model.final_layer_norm.weight": read_stored(prefix + "ln_final.weight"),
        "text_model.final_layer_norm.bias": read_stored(prefix + "ln_final.bias"),
        "text_projection.weight": _transposed(prefix + "text_projection"),
    }
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"{prefix}transformer.resblocks.{layer}.", f"text_model.encoder.layers.{layer}."
        for end in ("weight", "bias"):
            readers |= {
                f"{ours}layer_norm1.{end}": read_stored(f"{theirs}ln_1.{end}"),
                f"{ours}layer_norm2.{end}": read_stored(f"{theirs}ln_2.{end}"),
                f"{ours}mlp.fc1.{end}": read_stored(f"{theirs}mlp.c_fc.{end}"),
                f"{ours}mlp.fc2.{end}": read_stored(f"{theirs}mlp.c_proj.{end}"),
                f"{ours}self_attn.out_proj.{end}": read_stored(f"{theirs}attn.out_proj.{end}"),
            }
            for third, name in enumerate(("q_proj", "k_proj", "v_proj")):
                reader = _third(f"{theirs}attn.in_proj_{end}", third, config.hidden_size)
                readers[f"{ours}self_attn.{name}.{end}"] = reader
    return readers


def _text_config(clip: str, config: dict[str, Any], activation: str) -> CLIPTextConfig:
    """Return open_clip's config as transformers' own; refuse a tower that transformers' CLIP cannot be."""
    from open_clip import CLIPTextCfg

    values = config["text_cfg"].items()
    text = CLIPTextCfg(**{key: value for key, value in values if key in CLIPTextCfg.__dataclass_fields__})
    unsupported = {
        "hf_model_name": text.hf_model_name,
        "hf_tokenizer_name": text.hf_tokenizer_name,
        "embed_cls": text.embed_cls,
        "no_causal_mask": text.no_causal_mask,
        "ls_init_value": text.ls_init_value,
        "proj_bias": text.proj_bias,
        "proj_type": text.proj_type != "linear" and text.proj_type,
        "block_type": text.block_type not in (None, "default") and text.block_type,
        "attention": any(
            (
                text.qk_norm,
                text.scaled_cosine_attn,
                text.scale_heads,
                text.scale_attn_inner,
                text.scale_attn,
                text.scale_fc,
            )
        ),
    }
    found = [f"{name}={value!r}" for name, value in unsupported.items() if value]
    if found:
        raise ValueError(f"{clip} has a text tower unlike CLIP's own ({', '.join(found)}), which IVTP cannot use")
    if (text.act_kwargs or {}).get("approximate") == "tanh":
        activation = "gelu_pytorch_tanh"
    return CLIPTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        intermediate_size=int(text.width * text.mlp_ratio),
        projection_dim=config["embed_dim"],
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.context_length,
        hidden_act=activation,
        layer_norm_eps=(text.norm_kwargs or {}).get("eps", 1e-5),
    )


def _weights_file(path: Path) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no .safetensors file; other formats can run code when they are opened and are not read: "
            "load it with open_clip and save it with safetensors.torch.save_model"
        )
    return Checkpoint.from_file(path)


def _text_prefix(checkpoint: Checkpoint) -> str:
    """Return the prefix of the text tower's names: `""`, or `"text."` in open_clip's newer layout."""
    for name in checkpoint.tensors:
        prefix = name.removesuffix("token_embedding.weight")
        if prefix != name and prefix in ("", "text.", "module.", "module.text."):
            return prefix
    if any(name.startswith("text_model.") for name in checkpoint.tensors):
        raise ValueError(
            f"{checkpoint.source} is a file of transformers' CLIP; give its folder, which has the config.json too"
        )
    raise ValueError(f"{checkpoint.source} lacks token_embedding.weight: it holds no text tower of CLIP's layout")


def _transposed(name: str) -> TensorReader:
    return lambda checkpoint: checkpoint.read(name).T.contiguous()


def _third(name: str, third: int, width: int) -> TensorReader:
    """Return a reader of the query, key or value rows, which open_clip keeps in one matrix."""
    return lambda checkpoint: checkpoint.read(name)[third * width : (third + 1) * width].clone()


def _some(names: list[str]) -> str:
    return ", ".join([name for name in names if name.startswith("ViT-L-14")][:4])
