"""Instruction-guided visual token pruning for LLaVA, native to Hugging Face transformers."""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import AutoModelForMultimodalLM

from ._moved import keep_old_attributes, old_module
from .model.checkpoint_ivtp import CLIP_READERS, ClipText
from .model.configuration_ivtp import IVTPLlavaConfig, IVTPPruningConfig
from .model.modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaModel
from .model.processing_ivtp import IVTPLlavaProcessor
from .model.trace import PruningTrace

__version__ = "0.2.0"

# Importing the package is enough for the Auto classes to know its checkpoints, without trust_remote_code.
AutoConfig.register(IVTPLlavaConfig.model_type, IVTPLlavaConfig, exist_ok=True)
AutoModel.register(IVTPLlavaConfig, IVTPLlavaForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(IVTPLlavaConfig, IVTPLlavaForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(IVTPLlavaConfig, IVTPLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(IVTPLlavaConfig, IVTPLlavaProcessor, exist_ok=True)


def _read_open_clip(clip: Any, **options: Any) -> ClipText:
    """Read CLIP's text half from a name, folder or weights file of open_clip."""
    from .checkpoints.clip_checkpoint import load_clip_text

    return load_clip_text(clip, **options).load()


CLIP_READERS["open_clip"] = _read_open_clip

keep_old_attributes()
if not TYPE_CHECKING:  # a type checker is to miss what is not there
    __getattr__ = old_module

__all__ = [
    "IVTPLlavaConfig",
    "IVTPLlavaForConditionalGeneration",
    "IVTPLlavaModel",
    "IVTPLlavaProcessor",
    "IVTPPruningConfig",
    "PruningTrace",
    "__version__",
]
