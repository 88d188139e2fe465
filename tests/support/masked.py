"""The engine's choices, applied with masks alone: full-length sequences, no cache, nothing gathered.

A dropped token is never seen again; a token that others were merged into is overwritten where it stands. The choices
are taken from the engine, so this checks everything else: gathering, positions, masks, cache, batches.
"""

from typing import Any

import numpy as np
import torch

from modeling_ivtp.model.trace import TraceRecorder
from tests.support.reference import attend, decoder_layer, project


def choices_of(model: Any, inputs: dict[str, Any]) -> tuple[TraceRecorder, Any]:
    """The engine's choices for a prompt, and its output."""
    recorder = TraceRecorder()
    return recorder, model(**inputs, recorder=recorder, use_cache=True)


class _Slots:
    """The tokens of one image: which are left, what they are, how many patches each stands for."""

    def __init__(self, patches: int) -> None:
        self.alive = np.ones(patches, dtype=bool)
        self.sizes = torch.ones(patches)

    def apply(
        self, states: list[torch.Tensor], scores: Any, at: tuple[int, ...], cls: torch.Tensor | None = None
    ) -> None:
        """One step on several lists of states (N, d), in place; `cls` (d,) is a further token to mix."""
        candidates, kept = scores.candidates[at].cpu(), scores.kept[at].cpu()
        assert (candidates[candidates >= 0] == torch.from_numpy(np.flatnonzero(self.alive))).all()
        present = candidates >= 0
        if scores.mixture is not None:
            mixture = scores.mixture[at][: int((kept >= 0).sum())]
            mixture, of_cls = mixture[:, : len(present)][:, present], mixture[:, len(present) :]
            for state in states:
                mixed = mixture.to(state.dtype) @ state[candidates[present]]
                if of_cls.shape[1]:
                    assert cls is not None
                    mixed = mixed + of_cls.to(state.dtype) * cls
                state[kept[kept >= 0]] = mixed
            self.sizes[kept[kept >= 0]] = (mixture != 0).float() @ self.sizes[candidates[present]]
        self.alive[:] = False
        self.alive[kept[kept >= 0].numpy()] = True


def tower_features(
    model: Any, recorder: TraceRecorder, pixels: torch.Tensor, image: int
) -> tuple[torch.Tensor, _Slots]:
    """Projected features (N, d) of one image and what is left of it, before the prompt is looked at."""
    tower, config, pruner = model.model.vision_tower, model.config, model.model.pruner
    x = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0].clone()
    slots = _Slots(len(x) - 1)
    layers = len(tower.encoder.layers)
    wanted = config.vision_feature_layer % (layers + 1)
    steps = {scores.group.last: scores for scores in recorder.tower if scores.stage == "tower"}
    features: list[torch.Tensor] = []
    for index, layer in enumerate(tower.encoder.layers):
        visible = np.tile(np.concatenate([[True], slots.alive]), (len(x), 1))
        (q, k, v), _ = project(layer.self_attn, layer.layer_norm1(x))
        if pruner.needs.proportional_attention:
            # softmax(QK^T / sqrt(d) + log s): the bias as one more dimension of queries and keys
            bias = torch.cat([torch.zeros(1), slots.sizes.log()]) * q.shape[-1] ** 0.5
            logits = q @ k.transpose(1, 2) + bias
            logits = logits / q.shape[-1] ** 0.5
            out = logits.masked_fill(~torch.from_numpy(visible), float("-inf")).softmax(-1) @ v
            out = out.transpose(0, 1).flatten(1)
        else:
            out, _ = attend(q, k, v, visible)
        x = x + layer.self_attn.out_proj(out)
        step = steps.get(index)
        if step is not None and step.group.middle:
            slots.apply([x[1:], *(feature[1:] for feature in features)], step, (image,))
        x = x + layer.mlp(layer.layer_norm2(x))
        if step is not None and not step.group.middle:
            slots.apply([x[1:], *(feature[1:] for feature in features)], step, (image,))
        if index + 1 == wanted:
            features.append(x.clone())
    (feature,) = features
    of_projected = pruner.needs.all_projected
    if of_projected:
        feature = model.model.multi_modal_projector(feature)
    for scores in recorder.tower:
        if scores.stage == "features":
            slots.apply([feature[1:]], scores, (image,), feature[0])
    return feature[1:] if of_projected else model.model.multi_modal_projector(feature[1:]), slots


@torch.no_grad()
def masked_logits(
    model: Any, recorder: TraceRecorder, inputs: dict[str, Any], extra: torch.Tensor | None = None
) -> tuple[torch.Tensor, np.ndarray]:
    """Logits (B, S, V) of a prompt with tokens after it, and which of them mean something (B, S)."""
    language = model.model.language_model
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    if extra is not None:
        ids, mask = torch.cat([ids, extra], 1), torch.cat([mask, torch.ones_like(extra, dtype=torch.bool)], 1)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    logits, alive_rows, first = [], [], 0
    for row in range(len(ids)):
        columns = torch.nonzero((ids[row] == model.config.image_token_id) & mask[row]).flatten()
        columns = columns.unflatten(0, (-1, model.config.num_patches)) if len(columns) else columns.view(0, 1)
        x = language.embed_tokens(ids[row : row + 1])[0].clone()
        alive, images = mask[row].numpy().copy(), []
        for image, where in enumerate(columns):
            features, slots = tower_features(model, recorder, inputs["pixel_values"][first + image], first + image)
            for scores in recorder.prompted:
                slots.apply([features], scores, (row, image))
            x[where] = features
            images.append(slots)
        first += len(columns)
        cos, sin = language.rotary_emb(x[None], position_ids=positions[row : row + 1])
        steps = {scores.group.last: scores for scores in recorder.decoder}
        for index, layer in enumerate(language.layers):
            for where, slots in zip(columns, images, strict=True):
                alive[where.numpy()] = slots.alive
            visible = np.tril(np.ones((len(x), len(x)), dtype=bool)) & alive
            visible[np.arange(len(x)), np.arange(len(x))] = True  # so that what is dropped stays a number
            x, _, _ = decoder_layer(layer, x, visible, cos[0], sin[0])
            if index in steps:
                for image, (where, slots) in enumerate(zip(columns, images, strict=True)):
                    visual = x[where].clone()
                    slots.apply([visual], steps[index], (row, image))
                    x[where] = visual
        for where, slots in zip(columns, images, strict=True):
            alive[where.numpy()] = slots.alive
        logits.append(model.lm_head(language.norm(x)))
        alive_rows.append(alive)
    return torch.stack(logits), np.stack(alive_rows)
