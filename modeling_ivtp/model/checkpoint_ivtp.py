"""Loading: official LLaVA weights under our class names, and CLIP's text half joined to them."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

from .configuration_ivtp import IVTPLlavaConfig
from .language_ivtp import DECODERS


class LlavaCheckpoint:
    """Mixin for the class that users load."""

    config: Any
    model: Any
    dtype: torch.dtype
    name_or_path: str

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a weights file that is damaged or cut short is named.

        Raises
        ------
        OSError
            If a weights file cannot be read.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        except SafetensorError as error:
            names = [str(file) for file in _unreadable(pretrained_model_name_or_path)]
            which = ", ".join(names) or f"a weights file of {pretrained_model_name_or_path}"
            raise OSError(f"{which} is damaged or cut short ({error}); fetch it again.") from error

    @classmethod
    def from_llava(
        cls,
        llava: Any,
        clip: Any = None,
        *,
        pruning: Any = None,
        clip_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Join a LLaVA checkpoint with CLIP's text tower and projections.

        Parameters
        ----------
        llava : str or path
            A LLaVA folder or Hub id in transformers' format, or one of ours.
        clip : str or path, optional
            Where CLIP's text half comes from: a transformers CLIP folder or Hub id, an open_clip name such as
            "open_clip:ViT-L-14-336/openai", or an open_clip weights file (safetensors). None: no text tower, and the
            image's CLS token guides the language model.
        pruning : IVTPPruningConfig or dict, optional
        clip_options : dict, optional
            For `hub.clip_checkpoint.load_clip_text`: revision, activation (default: the vision tower's), … Access to
            the Hub (token, cache_dir, local_files_only) is that of `kwargs` unless given here.
        **kwargs
            For `from_pretrained`: dtype, device_map, attn_implementation, quantization_config, …

        Raises
        ------
        ValueError
            If tower and CLIP do not fit, or the LLaVA checkpoint has missing or unexpected weights.
        """
        config = kwargs.pop("config", None)
        if config is None:
            hub = {
                name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs
            }
            config = IVTPLlavaConfig.from_pretrained(llava, **hub)
        if pruning is not None:
            config.pruning = pruning
        config.pruning_plan()
        kwargs.pop("output_loading_info", None)
        text = None
        if clip is not None:
            try:
                load_clip_text = import_module("modeling_ivtp.checkpoints.clip_checkpoint").load_clip_text
            except ImportError as error:
                raise ImportError("Joining CLIP needs the installed package: pip install ivtp-llava") from error
            options: dict[str, Any] = {"activation": config.vision_config.hidden_act}
            options |= {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
            text = load_clip_text(clip, **options | (clip_options or {}))
            text.check_width(config.vision_config.hidden_size, llava)
        model, info = cls.from_pretrained(llava, config=config, output_loading_info=True, **kwargs)
        wrong = {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys") if info.get(name)}
        if wrong:
            raise ValueError(f"{llava} is not a complete LLaVA checkpoint: {wrong}.")
        if text is not None:
            model.join_clip(text)
        return model

    def join_clip(self, clip: Any) -> None:
        """Add CLIP's text tower and projections to this model, on the vision tower's device and in its dtype.

        Parameters
        ----------
        clip : hub.clip_checkpoint.ClipText

        Raises
        ------
        ValueError
            If CLIP's vision tower is not as wide as LLaVA's.
        """
        clip.check_width(self.config.vision_config.hidden_size, self.name_or_path)
        body = self.model
        weight = body.vision_tower.post_layernorm.weight
        offloaded = weight.device.type == "meta"
        device = torch.device("cpu") if offloaded else weight.device
        dtype = self.dtype if offloaded else weight.dtype
        if not offloaded:
            clip.warn_of_another_clip(body.vision_tower.embeddings.class_embedding.detach(), self.name_or_path)
        with torch.device("meta"):
            text = CLIPTextModelWithProjection._from_config(clip.text_config)
            projection = nn.Linear(clip.vision_width, clip.text_config.projection_dim, bias=False)
        state = dict(clip.tensors())
        text_state = {
            name.removeprefix("clip_text_model."): tensor.to(device, dtype)
            for name, tensor in state.items()
            if name.startswith("clip_text_model.")
        }
        text.load_state_dict(text_state, strict=True, assign=True)
        projection.load_state_dict(
            {"weight": state["visual_projection.weight"].to(device, dtype)}, strict=True, assign=True
        )
        positions = text.text_model.embeddings
        positions.position_ids = torch.arange(clip.text_config.max_position_embeddings, device=device)[None]
        self.config.clip_text_config = text.config
        body.clip_text_model = text.eval()
        body.visual_projection = projection
        if hasattr(self, "hf_device_map") and "" not in self.hf_device_map:
            for name in ("clip_text_model", "visual_projection"):
                self.hf_device_map[f"model.{name}"] = device


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
