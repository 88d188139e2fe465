"""Outputs of the model: encoded images, and a prompt's hidden states with the tokens that were kept."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

from .compat import CACHE, cache_of
from .schedule import PruningPlan

IMAGES = "image_outputs" if "image_outputs" in LlavaModelOutputWithPast.__dataclass_fields__ else "image_hidden_states"
"""The name of the images in LLaVA's outputs: the former since transformers 5.24."""
ALL = slice(None)
"""All columns of a prompt."""


@dataclass
class IVTPImageFeatures(BaseModelOutputWithPooling):
    """Features of images from which patches were dropped.

    Attributes
    ----------
    pooler_output : list of Tensor (k, d)
        Kept patches of each image, projected for the language model.
    kept_patches : int64 Tensor (I, k)
        Their numbers, 0 to N - 1; N fills up an image that keeps fewer than others.
    cls_features : Tensor (I, d)
        The CLS token, projected the same way.
    image_embeds : Tensor (I, P) or None
        CLIP's embedding of the image (Eq. 6).
    patch_embeds : Tensor (I, k, P) or None
        The kept patches in CLIP's space, for a method that compares them with the instruction.
    """

    kept_patches: torch.Tensor | None = None
    cls_features: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    patch_embeds: torch.Tensor | None = None


@dataclass
class IVTPLlavaModelOutputWithPast(LlavaModelOutputWithPast):
    """LLaVA's output, with the columns of the prompt that went through the whole decoder.

    Attributes
    ----------
    kept_tokens : bool Tensor (B, S) or None
        None: all.
    """

    kept_tokens: torch.Tensor | None = None


def take_images(output: Any, order: list[int]) -> Any:
    """Take the encoder outputs of some images, which may repeat."""
    chosen: dict[str, Any] = {"pooler_output": [output.pooler_output[image] for image in order]}
    # Of images that keep different numbers, the one that kept most may be among those that are left out.
    most = max(len(image) for image in chosen["pooler_output"])
    # Names, and whether there is one value for each patch.
    names = {"kept_patches": True, "patch_embeds": True, "cls_features": False, "image_embeds": False}
    for name, cut in (names | {"last_hidden_state": False}).items():
        if (value := getattr(output, name, None)) is not None:
            value = value[torch.tensor(order, device=value.device)]
            chosen[name] = value[:, :most] if cut else value
    return type(output)(**chosen)


def model_output(outputs: Any, encoded: IVTPImageFeatures, return_dict: bool) -> Any:
    """Turn the decoder's output into the model's."""
    result = IVTPLlavaModelOutputWithPast(
        last_hidden_state=outputs.last_hidden_state,
        hidden_states=outputs.hidden_states,
        attentions=None,
        kept_tokens=outputs.kept_tokens,
        **{CACHE: cache_of(outputs)},
        **{IMAGES: encoded if IMAGES == "image_outputs" else torch.cat(encoded.pooler_output)},
    )
    return result if return_dict else result.to_tuple()


def check_encoded(encoded: Any, plan: PruningPlan) -> None:
    """Refuse images that were encoded under other pruning options."""
    kept = getattr(encoded, "kept_patches", None)
    if kept is None or kept.shape[1] > plan.encoded_tokens or (kept.shape[1] < plan.encoded_tokens and plan.exact):
        raise ValueError(
            f"mm_encoder_outputs holds {'all' if kept is None else kept.shape[1]} patches of an image, the options "
            f"in force {plan.encoded_tokens}: encode it with get_image_features under the same pruning options."
        )


def trimmed(features: torch.Tensor, present: torch.Tensor) -> list[torch.Tensor]:
    """Cut the features (I, k, d) of each image after its last one that is present (bool (I, k))."""
    return [image[:count] for image, count in zip(features, present.sum(1).tolist(), strict=True)]


def kept_columns(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    """Return the columns of a prompt whose logits are kept."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


def answers_of(
    labels: torch.Tensor, images: torch.Tensor, attention_mask: Any, columns: slice | torch.Tensor = ALL
) -> torch.Tensor:
    """Return where an answer stands that is to be learned: bool (B, S).

    Where all text of a row is to be learned, there is no prompt to tell it from, and nothing is an answer.

    Parameters
    ----------
    labels : int64 Tensor (B, S), or of `columns` alone
    images : bool Tensor (B, S)
        Where an image token stands.
    attention_mask : Tensor (B, at least S), any other form, or None
    columns : slice or int64 Tensor
        See `kept_columns`.
    """
    if labels.shape[1] != images.shape[1]:
        whole = labels.new_full(images.shape, -100)
        whole[:, columns] = labels
        labels = whole
    answers = (labels != -100) & ~images.to(labels.device)
    prompt = ~answers & ~images.to(labels.device)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        prompt = prompt & attention_mask[:, -labels.shape[1] :].bool().to(labels.device)
    return answers & prompt.any(-1, keepdim=True)


def training_targets(
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None,
    images: torch.Tensor,
    outputs: Any,
    columns: slice | torch.Tensor = ALL,
) -> dict[str, torch.Tensor]:
    """Leave out image tokens, which no answer holds, and the targets of dropped tokens, which predict nothing.

    Parameters
    ----------
    labels : int64 Tensor (B, S), or of `columns` alone
    shift_labels : int64 Tensor (B, S), or of `columns` alone, or None
        The same, moved up by one.
    images : bool Tensor (B, S)
        Where an image token stands.
    outputs : model output
        Its `kept_tokens` (B, S), if there are any, tell what went through the whole decoder.
    columns : slice or int64 Tensor
        See `kept_columns`.

    Returns
    -------
    dict
        `labels`, and `shift_labels` if they were passed, for the loss function.
    """
    ignored, kept = images, getattr(outputs, "kept_tokens", None)
    if kept is not None:
        ignored = ignored | ~nn.functional.pad(kept[:, :-1], (1, 0), value=True).to(ignored.device)
    return without_targets(ignored, labels, shift_labels, columns)


def without_targets(
    ignored: torch.Tensor,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    columns: slice | torch.Tensor = ALL,
) -> dict[str, torch.Tensor]:
    """Return labels (B, S), and the same moved up by one, without those of ignored tokens (bool (B, S)).

    Both may also come for `columns` alone.
    """
    targets = {}
    shifted = nn.functional.pad(ignored[:, 1:], (0, 1), value=False)
    for name, values, left_out in (("labels", labels, ignored), ("shift_labels", shift_labels, shifted)):
        if values is not None:
            left_out = left_out if values.shape[1] == left_out.shape[1] else left_out[:, columns]
            targets[name] = values.masked_fill(left_out.to(values.device), -100)
    return targets
