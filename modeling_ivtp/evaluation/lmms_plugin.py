"""The models that lmms-eval finds by the entry point `lmms_eval.models` of this package."""

from __future__ import annotations

from typing import Any

NAME = "ivtp_llava"


def manifests() -> list[Any]:
    """Return the `ModelManifest` of each model; the class itself is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id=NAME, chat_class_path="modeling_ivtp.evaluation.lmms_model.IVTPLlava")]
