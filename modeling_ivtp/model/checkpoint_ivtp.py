"""Loading: official LLaVA weights under our class names, and CLIP's text half joined to them."""

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel, CLIPTextModel, CLIPTextModelWithProjection

from .adapter import naming_adapter
from .configuration_ivtp import IVTPLlavaConfig
from .language_ivtp import DECODERS

OPEN_CLIP = "open_clip:"
"""Beginning of an open_clip model's name, as in `"open_clip:ViT-L-14-336/openai"`."""

_HUB_ACCESS = ("token", "cache_dir", "local_files_only")
_CLASS_EMBEDDING = "vision_model.embeddings.class_embedding"


@dataclass(frozen=True)
class ClipText:
    """The text half of a CLIP, loaded and ready to be joined to a LLaVA.

    Attributes
    ----------
    source : str
        The name or path that it was read from.
    text_config : CLIPTextConfig
        The tower's architecture; `projection_dim` is the width P of CLIP's common space.
    vision_width : int
        Width of the vision tower that CLIP was trained with.
    text_model : dict of str to Tensor
        The state of a `CLIPTextModelWithProjection`.
    visual_projection : Tensor (P, vision width)
        CLIP's projection of the image.
    class_embedding : Tensor (vision width,) or None
        The vision tower's class embedding, which identifies the tower; None where the source lacks it.
    """

    source: str
    text_config: CLIPTextConfig
    vision_width: int
    text_model: dict[str, Tensor]
    visual_projection: Tensor
    class_embedding: Tensor | None = None


CLIP_READERS: dict[str, Callable[..., ClipText]] = {}
"""Readers of CLIPs in other formats than transformers'. The installed package adds `"open_clip"`."""


def sparing(quantization_config: Any, names: Iterable[str]) -> Any:
    """Return a copy of a quantisation config that leaves out the named modules and the language model's head.

    Parameters
    ----------
    quantization_config : QuantizationConfigMixin or dict
        One that has a list of modules to leave out; others are returned as they are.
    names : iterable of str
    """
    config, as_dict = copy.deepcopy(quantization_config), isinstance(quantization_config, dict)
    options = config if as_dict else vars(config)
    bitsandbytes = "llm_int8_skip_modules" in options or "load_in_8bit" in options or "load_in_4bit" in options
    field = "llm_int8_skip_modules" if bitsandbytes else "modules_to_not_convert"
    if not as_dict and field not in options:
        return quantization_config
    options[field] = list(dict.fromkeys([*(options.get(field) or ["lm_head"]), *names]))
    return config


def load_llava(
    cls: Any,
    llava: Any,
    clip: Any = None,
    *,
    pruning: Any = None,
    clip_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Load a LLaVA checkpoint and join CLIP's text half to it; `from_llava` documents the parameters."""
    config = kwargs.pop("config", None)
    if config is None:
        hub = {name: kwargs[name] for name in ("revision", *_HUB_ACCESS) if name in kwargs}
        config = IVTPLlavaConfig.from_pretrained(llava, **hub)
    if pruning is not None:
        config.pruning = pruning
    config.pruning_plan()
    clip_text = None
    if clip is not None:
        options: dict[str, Any] = {"activation": config.vision_config.hidden_act}
        options |= {name: kwargs[name] for name in _HUB_ACCESS if name in kwargs}
        clip_text = read_clip(clip, **options | (clip_options or {}))
        check_clip_width(clip_text, llava, config.vision_config.hidden_size)
    model, info = cls.from_pretrained(llava, config=config, **kwargs | {"output_loading_info": True})
    _check_complete(info, f"{llava} is not a complete LLaVA checkpoint")
    if clip_text is not None:
        join_clip(model, clip_text)
    return model


def read_clip(
    clip: str | os.PathLike[str],
    *,
    activation: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> ClipText:
    """Read CLIP's text tower, its projection and the projection of the image.

    Parameters
    ----------
    clip : str or path
        A folder or Hub id that transformers' `CLIPModel` loads; with the package installed also a name or file of
        open_clip.
    activation : str, optional
        The activation of an open_clip model that does not name its own.
    revision, token, cache_dir, local_files_only
        As for `from_pretrained`.

    Raises
    ------
    ImportError
        If the source is of open_clip and the package is not installed.
    ValueError
        If the source is no CLIP, or lacks a part of it.
    OSError
        If a file is missing or damaged.
    """
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    if not is_open_clip(clip):
        return _read_transformers_clip(clip, hub | {"revision": revision or "main"})
    reader = CLIP_READERS.get("open_clip")
    if reader is None:
        raise ImportError(
            f"{clip} is a CLIP of open_clip, which only the installed package reads: pip install ivtp-llava, and "
            "import IVTPLlavaForConditionalGeneration from modeling_ivtp"
        )
    return reader(clip, activation=activation, **hub)


def _read_transformers_clip(clip: str | os.PathLike[str], hub: dict[str, Any]) -> ClipText:
    folder = Path(clip).expanduser()
    source = folder if folder.is_dir() else clip
    with naming_adapter(source, **hub):
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)
    if config.model_type != CLIPConfig.model_type:
        raise ValueError(
            f"{clip} is of model_type {config.model_type!r}; CLIP's text tower comes from one of type 'clip'"
        )
    config.text_config.projection_dim = config.projection_dim
    with naming_damaged_weights(source):
        # Other formats than safetensors can run code when they are opened.
        half, info = _ClipTextHalf.from_pretrained(
            source,
            config=config,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **hub,
        )
    identified = _CLASS_EMBEDDING not in info["missing_keys"]
    missing = set(info["missing_keys"]) - {_CLASS_EMBEDDING}
    _check_complete(
        {"missing_keys": missing, "mismatched_keys": info["mismatched_keys"]}, f"{clip} is not a complete CLIP"
    )
    state = half.state_dict()
    class_embedding = state.pop(_CLASS_EMBEDDING)
    visual_projection = state.pop("visual_projection.weight")
    return ClipText(
        source=str(clip),
        text_config=config.text_config,
        vision_width=config.vision_config.hidden_size,
        text_model=state,
        visual_projection=visual_projection,
        class_embedding=class_embedding if identified else None,
    )


def is_open_clip(clip: str | os.PathLike[str]) -> bool:
    """Return whether a CLIP is open_clip's: by the name's beginning, a weights file, or the folder's config."""
    if str(clip).startswith(OPEN_CLIP):
        return True
    path = Path(clip).expanduser()
    if path.is_file() or path.suffix == ".safetensors":
        return True
    return (path / "open_clip_config.json").is_file() and not (path / "config.json").is_file()


class _ClipTextHalf(CLIPPreTrainedModel):
    """transformers' `CLIPModel` without the vision tower, of which the class embedding alone is read."""

    config_class = CLIPConfig
    _keys_to_ignore_on_load_unexpected = (".*",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        self.text_model = CLIPTextModel._from_config(text)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        embeddings = nn.ParameterDict({"class_embedding": nn.Parameter(torch.empty(vision.hidden_size))})
        self.vision_model = nn.ModuleDict({"embeddings": embeddings})
        self.post_init()


def check_clip_width(clip: Any, llava: object, width: int) -> None:
    """Raise ValueError if LLaVA's vision tower has another `width` than that of a CLIP (`source`, `vision_width`)."""
    if clip.vision_width != width:
        raise ValueError(
            f"{clip.source} projects a vision tower {clip.vision_width} wide, that of {llava} is {width}: take "
            "the CLIP whose vision tower this LLaVA has"
        )


def warn_of_another_clip(clip: str, clip_embedding: Tensor | None, llava: object, llava_embedding: Tensor) -> None:
    """Warn if LLaVA's vision tower is not the one of a CLIP, by their class embeddings (vision width,)."""
    if clip_embedding is None:
        return
    if torch.allclose(llava_embedding.float().cpu(), clip_embedding.float(), rtol=0.02, atol=1e-3):
        return
    warnings.warn(
        f"the vision tower of {llava} is not that of {clip} (their class embeddings differ): unless LLaVA's "
        "training changed it, the text tower does not fit and relevance will be noise",
        stacklevel=3,
    )


def join_clip(model: Any, clip: ClipText) -> None:
    """Add CLIP's text tower and projections to a model, on its vision tower's device and in its dtype."""
    body = model.model
    weight = body.vision_tower.post_layernorm.weight
    offloaded = weight.device.type == "meta"
    device = torch.device("cpu") if offloaded else weight.device
    dtype = model.dtype if offloaded else weight.dtype
    if not offloaded:
        embedding = body.vision_tower.embeddings.class_embedding.detach()
        warn_of_another_clip(clip.source, clip.class_embedding, model.name_or_path, embedding)
    with torch.device("meta"):
        text = CLIPTextModelWithProjection._from_config(clip.text_config)
        projection = nn.Linear(clip.vision_width, clip.text_config.projection_dim, bias=False)
    state = {name: tensor.to(device, dtype) for name, tensor in clip.text_model.items()}
    text.load_state_dict(state, strict=True, assign=True)
    projection.load_state_dict({"weight": clip.visual_projection.to(device, dtype)}, strict=True, assign=True)
    positions = text.text_model.embeddings
    positions.position_ids = torch.arange(clip.text_config.max_position_embeddings, device=device)[None]
    model.config.clip_text_config = text.config
    body.clip_text_model, body.visual_projection = text, projection
    body.guide.clip = clip.source
    body.train(body.training)
    if hasattr(model, "hf_device_map") and "" not in model.hf_device_map:
        for name in ("clip_text_model", "visual_projection"):
            model.hf_device_map[f"model.{name}"] = device


def _check_complete(info: dict[str, Any], message: str) -> None:
    """Raise ValueError if transformers found tensors missing, unexpected or of another shape."""
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(info[kind]) for kind in kinds if info.get(kind)}
    if wrong:
        raise ValueError(f"{message}: {wrong}.")


@contextmanager
def naming_damaged_weights(source: Any) -> Iterator[None]:
    """Name the weights file of `source` that safetensors cannot read, as an OSError."""
    try:
        yield
    except SafetensorError as error:
        names = [str(file) for file in _unreadable(source)]
        which = ", ".join(names) or f"a weights file of {source}"
        raise OSError(f"{which} is damaged or cut short ({error}); fetch it again.") from error


def _unreadable(folder: Any) -> Iterator[Path]:
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                continue
        except SafetensorError:
            yield file


def register_weight_names() -> None:
    """Load official LLaVA weights under our class names: transformers looks its renamings up by class name.

    Both the model type and the classes are needed, because an official folder says `model_type: llava`.
    """
    stock_of = {
        "ivtp_llava": "llava",
        "IVTPLlavaForConditionalGeneration": "llava",
        "IVTPLlavaModel": "LlavaModel",
        "GroupedCLIPVisionModel": "CLIPVisionModel",
        **{decoder.__name__: decoder.__name__.removeprefix("Grouped") for decoder in DECODERS.values()},
    }
    for ours, stock in stock_of.items():
        mapping = get_checkpoint_conversion_mapping(stock)
        if mapping is not None:
            register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


def with_our_names(model: PreTrainedModel, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return weights by a model's own names; those of official names, as `save_pretrained` writes them, are renamed."""
    own = model.state_dict()
    if own.keys() >= state_dict.keys():
        return state_dict
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    return {
        name if name in own else rename_source_key(name, renamings, [], model.base_model_prefix, own)[0]: weight
        for name, weight in state_dict.items()
    }
