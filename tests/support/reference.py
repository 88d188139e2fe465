"""Reference mode: the oracle of the pruning engine, written from the paper (IVTP, ECCV 2024, Sec. 3) and nothing else.

Every sequence keeps its full length, there is no cache, and a token that was pruned is only *masked*: from then on no
query sees it. Attention is softmax(Q K^T / sqrt(d) + A_mask) (Eq. 2) spelt out, rollout is a product of whole matrices
(Eq. 3), and images, rows and layers are plain loops. Of the model only its small parts are called (norms, projections,
MLPs, embeddings, RoPE table, heads), never the ``forward`` of an attention, a layer or a tower.

What decides (attention maps, value norms, relevance) leaves the autograd graph as float64 NumPy. What is compared
(features, hidden states, logits) stays in the model's dtype and is differentiable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class GroupReference:
    """What one group of layers did to one image; the indices are patches on the original grid, ascending."""

    layers: tuple[int, int]  # first and last layer of the group, 0-based, inclusive
    candidates: np.ndarray  # (k_in,) int64
    importance: np.ndarray  # (k_in,) float64, Eq. 4
    kept: np.ndarray  # (k_out,) int64


@dataclass
class Selection:
    """The kept patches of one image after every group of the tower and of the decoder, to replace the choice."""

    tower: list[np.ndarray]
    decoder: list[np.ndarray]


@dataclass
class VisionReference:
    """Stage 1 for ``n`` images of ``N`` patches."""

    groups: list[list[GroupReference]]  # [image][group]
    kept: list[np.ndarray]  # [image] -> what the tower hands over
    projected: Tensor  # (n, N, width of the LLM): every patch, the dropped ones too
    projected_cls: Tensor  # (n, width of the LLM): Eq. 8, first case
    image_embeds: Tensor | None  # (n, P): x_cls^V of Eq. 6; None without ``visual_projection``


@dataclass
class ImageReference:
    """Both stages for one image of the batch."""

    row: int
    columns: np.ndarray  # (N,) logical columns of the placeholders
    tower: list[GroupReference]
    decoder: list[GroupReference]
    relevance: dict[int, float]  # column of an instruction token of the image's turn -> C_s (Eq. 7), or nan
    key_columns: list[int]  # those that count as key tokens; none: the projected visual CLS is the reference
    pseudo_cls: Tensor  # (width,) Eq. 8

    @property
    def kept(self) -> np.ndarray:
        """The patches that stand so far."""
        groups = self.tower + self.decoder
        return groups[-1].kept if groups else np.arange(len(self.columns))

    @property
    def dropped_columns(self) -> np.ndarray:
        return np.delete(self.columns, self.kept)


@dataclass
class DecoderReference:
    """The whole model on ``B`` rows of ``S`` logical columns. Outside ``alive`` the numbers mean nothing."""

    logits: Tensor  # (B, S, V)
    hidden: Tensor  # (B, S, width) after the final norm
    alive: np.ndarray  # (B, S) bool: valid, and never dropped
    layer_alive: list[np.ndarray]  # [layer] (B, S) bool: what the layer saw, which is what its KV cache keeps
    images: list[ImageReference]  # in the order of ``pixel_values``
    vision: VisionReference | None = field(repr=False, default=None)

    @property
    def selection(self) -> list[Selection]:
        return [Selection([g.kept for g in im.tower], [g.kept for g in im.decoder]) for im in self.images]


def geometric_schedule(start: int, final: int, groups: int) -> list[int]:
    """Tokens left behind each of ``groups`` groups at a constant keep ratio: k_g = round(start (final/start)^(g/G))."""
    final = min(final, start)
    return [round(start * (final / start) ** (g / groups)) for g in range(1, groups)] + [final] * (groups > 0)


def stage_groups(pruning: Any, layers: int | None, available: int) -> list[tuple[int, int]]:
    """(first, last) of the groups over the first ``layers`` (None: all) layers; the last group may be shorter.

    No groups with pruning off; one group where ``layers_per_group`` is None.
    """
    end = available if layers is None else min(layers, available)
    if not pruning.enabled or end == 0:
        return []
    size = pruning.layers_per_group or end
    return [(first, min(first + size, end) - 1) for first in range(0, end, size)]


def rollout(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Eq. 3: A~ = A^l1, then A~^l = (A^l + I) A~^(l-1), where the rows of A^l + I are renormalised from 2 to 1."""
    rolled = maps[0]
    for attention in maps[1:]:
        rolled = (attention + np.eye(len(attention))) / 2 @ rolled
    return rolled


def aggregate(maps: Sequence[np.ndarray], reference: int, how: str) -> np.ndarray:
    """The reference token's row over the group: Eq. 3, or one of the alternatives of Tables 4 and 5."""
    rows = np.stack([attention[reference] for attention in maps])
    if how == "rollout":
        return rollout(maps)[reference]
    if how == "last":
        return rows[-1]
    return {"mean": np.mean, "max": np.max, "multiply": np.prod}[how](rows, axis=0)


def importance_scores(row: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Eq. 4: S_i = A~_cls,i ||V_i|| / sum_j A~_cls,j ||V_j||, both arguments over the candidate patches only."""
    weighted = row * norms
    return weighted / weighted.sum()


def keep_most_important(candidates: np.ndarray, importance: np.ndarray, k: int) -> np.ndarray:
    """The ``k`` best candidates in spatial order; of equals the one with the lower index."""
    return np.sort(candidates[np.argsort(-importance, kind="stable")[:k]])


def keep_diverse(
    candidates: np.ndarray, importance: np.ndarray, features: np.ndarray, k: int, sharpness: float | None
) -> np.ndarray:
    """The ``k`` candidates that a greedy search for the largest determinant of L_ij = q_i <u_i, u_j> q_j finds.

    q is importance from 0 to 1 within the image, to the power of the sharpness. Every step computes the determinants of
    all sets that have one candidate more. Where all are 0, the most important candidates fill up.
    """
    spread = importance.max() - importance.min()
    stretched = (importance - importance.min()) / spread if spread > 0 else np.ones(len(importance))
    vectors = features / np.linalg.norm(features, axis=1, keepdims=True)
    vectors = vectors * (stretched ** (0.25 if sharpness is None else sharpness))[:, None]
    chosen: list[int] = []
    while len(chosen) < k:
        volumes = np.full(len(candidates), -np.inf)
        for i in range(len(candidates)):
            if i not in chosen and np.linalg.matrix_rank(vectors[[*chosen, i]]) == len(chosen) + 1:
                volumes[i] = np.linalg.slogdet(vectors[[*chosen, i]] @ vectors[[*chosen, i]].T)[1]
        if np.isinf(volumes.max()):
            rest = np.argsort(-importance, kind="stable")
            chosen += [int(i) for i in rest if i not in chosen][: k - len(chosen)]
        else:
            chosen.append(int(volumes.round(9).argmax()))  # of equals the one with the lower index
    return np.sort(candidates[chosen])


def prune_group(
    pruning: Any,
    layers: tuple[int, int],
    candidates: np.ndarray,
    importance: np.ndarray,
    features: np.ndarray,
    k: int,
    prescribed: Any,
) -> GroupReference:
    """The top of a group, from the candidates' scores (k_in,) and features (k_in, d); ``prescribed`` replaces it."""
    if prescribed is not None:
        kept = np.sort(np.asarray(prescribed, np.int64))
    elif pruning.choice == "diverse":
        kept = keep_diverse(candidates, importance, features, k, pruning.sharpness)
    else:
        kept = keep_most_important(candidates, importance, k)
    return GroupReference(layers, candidates, importance, kept)


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def attend(q: Tensor, k: Tensor, v: Tensor, visible: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Eq. 2 for ``q`` (H, n, dh), ``k`` and ``v`` (H_kv, n, dh), ``visible[query, key]``: (n, H dh) and mean map."""
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill(~torch.as_tensor(visible, device=q.device), float("-inf"))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask
    maps = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return (maps.to(v.dtype) @ v).transpose(0, 1).flatten(1), to_numpy(maps.mean(0))


def project(attention: nn.Module, normed: Tensor) -> tuple[list[Tensor], np.ndarray]:
    """Q, K, V by head, each (heads, n, dh), and ||V_i|| over all heads together (shared KV heads count once)."""
    flat = [projection(normed) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    norms = np.linalg.norm(to_numpy(flat[2]), axis=-1)
    return [x.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1) for x in flat], norms


def clip_layer(layer: nn.Module, x: Tensor, visible: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """One CLIP layer (vision or text) on ``x`` (n, d): output, mean map (n, n), value norms (n,), keys (n, d)."""
    (q, k, v), norms = project(layer.self_attn, layer.layer_norm1(x))
    out, attention_map = attend(q, k, v, visible)
    x = x + layer.self_attn.out_proj(out)
    return x + layer.mlp(layer.layer_norm2(x)), attention_map, norms, to_numpy(k.transpose(0, 1).flatten(1))


def decoder_layer(
    layer: nn.Module, x: Tensor, visible: np.ndarray, cos: Tensor, sin: Tensor
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The same for a Llama, Mistral or Qwen2 layer with RoPE table ``cos``, ``sin`` (n, dh)."""
    (q, k, v), norms = project(layer.self_attn, layer.input_layernorm(x))
    q, k = (y * cos + torch.cat((-y.chunk(2, -1)[1], y.chunk(2, -1)[0]), dim=-1) * sin for y in (q, k))
    out, attention_map = attend(q, k, v, visible)
    x = x + layer.self_attn.o_proj(out)
    return x + layer.mlp(layer.post_attention_layernorm(x)), attention_map, norms


def vision_reference(
    model: Any, pixel_values: Tensor, selection: Sequence[Selection | None] | None = None, pruning: Any = None
) -> VisionReference:
    """Stage 1 (Sec. 3.2) on ``pixel_values`` (n, 3, H, W), one image after the other, dropped patches masked.

    ``selection`` replaces the choice for the images where it is not None, ``pruning`` replaces the config's.
    """
    tower, config = model.model.vision_tower, model.config
    pruning = pruning or config.pruning
    if config.vision_feature_select_strategy != "default":
        raise ValueError("The reference knows vision_feature_select_strategy='default' only: features without the CLS.")
    bounds = stage_groups(pruning, pruning.tower_layers, len(tower.encoder.layers))
    budget = pruning.tower_tokens if pruning.tower_tokens is not None else round(1.875 * pruning.visual_tokens)
    groups, features, last_cls = [], [], []
    for i, pixels in enumerate(pixel_values):
        x = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]
        prescribed = selection[i] if selection is not None else None
        schedule = geometric_schedule(len(x) - 1, budget, len(bounds))
        candidates, visible = np.arange(len(x) - 1), np.ones((len(x), len(x)), dtype=bool)
        done, maps, hidden_states, accumulated = [], [], [x], np.zeros(len(x) - 1)
        for index, layer in enumerate(tower.encoder.layers):
            x, attention_map, norms, keys = clip_layer(layer, x, visible)
            hidden_states.append(x)
            maps.append(attention_map)
            g = len(done)
            if g < len(bounds) and index == bounds[g][1]:
                row = aggregate(maps, 0, pruning.aggregation)[1:][candidates]
                scores = importance_scores(row, norms[1:][candidates])
                if pruning.importance == "accumulated" and schedule[g] < len(candidates):
                    accumulated[candidates] += len(maps) * len(candidates) / len(accumulated) * row
                    scores = accumulated[candidates]
                choice = prescribed.tower[g] if prescribed is not None else None
                features_of = keys[1:][candidates]
                done.append(prune_group(pruning, bounds[g], candidates, scores, features_of, schedule[g], choice))
                candidates, maps = done[-1].kept, []
                visible[:, 1 + np.delete(np.arange(len(x) - 1), candidates)] = False
        features.append(torch.cat([hidden_states[layer] for layer in np.atleast_1d(config.vision_feature_layer)], -1))
        last_cls.append(tower.post_layernorm(x[0]))
        groups.append(done)
    projected = model.model.multi_modal_projector(torch.stack(features))
    kept = [done[-1].kept if done else np.arange(projected.shape[1] - 1) for done in groups]
    visual_projection = getattr(model.model, "visual_projection", None)
    image_embeds = None if visual_projection is None else visual_projection(torch.stack(last_cls))
    return VisionReference(groups, kept, projected[:, 1:], projected[:, 0], image_embeds)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Eq. 6 between the rows of ``a`` (n, P) and ``b`` (P,)."""
    return a @ b / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b))


def clip_text_features(clip_text_model: Any, windows: Tensor) -> np.ndarray:
    """Eq. 5 and CLIP's projection for every token of the (W, C) windows, each read by itself: (W * C, P)."""
    text, projection = clip_text_model.text_model, clip_text_model.text_projection
    causal = np.tril(np.ones((windows.shape[1],) * 2, dtype=bool))
    features = []
    for window in windows:
        x = text.embeddings(input_ids=window[None])[0]
        for layer in text.encoder.layers:
            x = clip_layer(layer, x, causal)[0]
        features.append(projection(text.final_layer_norm(x)))
    return to_numpy(torch.cat(features))


def instruction_relevance(
    guidance: str, spans: dict[int, tuple[int, int]], c: np.ndarray | None, embeds: Tensor, cls: Tensor
) -> dict[int, float]:
    """C_s (Eq. 7) by column: the mean of ``c`` (Eq. 6, (T,)) over the CLIP tokens of its span; nan if not computed."""
    if guidance == "clip" and c is not None:
        return {s: float(c[len(c) + first : len(c) + last].mean()) for s, (first, last) in spans.items()}
    if guidance == "text_similarity":
        return {s: float(cosine(to_numpy(embeds[s]), to_numpy(cls))) for s in spans}
    return dict.fromkeys(spans, float("nan"))


def guide_image(
    pruning: Any,
    row: int,
    columns: np.ndarray,
    tower: list[GroupReference],
    relevance: dict[int, float],
    embeds: Tensor,
    cls: Tensor,
) -> ImageReference:
    """Eq. 8: the mean of the key tokens' input embeddings, or the projected visual CLS ``cls`` where there is none."""
    keys = [s for s in relevance if pruning.guidance == "mean_text" or relevance[s] >= pruning.relevance_threshold]
    return ImageReference(row, columns, tower, [], relevance, keys, embeds[keys].mean(0) if keys else cls)


def turn_spans(spans: Tensor, turns: Sequence[int], column: int) -> dict[int, tuple[int, int]]:
    """Instruction tokens (those with a CLIP span) of the turn that ``column`` is in, by column."""
    turn = max(t for t in turns if t <= column)
    end = min((t for t in turns if t > turn), default=len(spans))
    return {s: (first, last) for s, (first, last) in enumerate(spans.tolist()) if first < last and turn <= s < end}


def decoder_reference(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    clip_input_ids: Tensor | None = None,
    clip_spans: Tensor | None = None,
    turns: Sequence[int] = (0,),
    selection: Sequence[Selection | None] | None = None,
    pruning: Any = None,
) -> DecoderReference:
    """Both stages and the LLM on (B, S) rows; the inputs are the processor's.

    ``turns`` are the columns where the turns start: an image is guided by the instruction tokens of its own turn.
    ``clip_spans`` may be shorter than S: columns after it (generated tokens) have no span. ``selection`` (one per
    image, None: choose) replaces the choices; importance is computed all the same. ``pruning`` replaces the config's.
    """
    language, pruning = model.model.language_model, pruning or model.config.pruning
    window = getattr(language.config, "sliding_window", None)
    if window is not None and input_ids.shape[1] > window:
        raise ValueError(f"The reference has no sliding window, and {input_ids.shape[1]} columns exceed {window}.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if position_ids is None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    position_ids = position_ids.expand_as(input_ids).cpu().numpy()
    all_spans = torch.zeros((*input_ids.shape, 2), dtype=torch.long)
    if clip_spans is not None:
        all_spans[:, : clip_spans.shape[1]] = clip_spans
    vision = None if pixel_values is None else vision_reference(model, pixel_values, selection, pruning)
    clip_text_model = getattr(model.model, "clip_text_model", None)
    compares = pruning.guidance == "clip" and clip_input_ids is not None and clip_text_model is not None
    rows, images = [], []
    for row, ids in enumerate(input_ids):
        embeds = language.embed_tokens(ids)
        inputs, first = embeds.clone(), len(images)
        text_features = clip_text_features(clip_text_model, clip_input_ids[row]) if compares else None
        placeholders = np.flatnonzero((ids == model.config.image_token_id).cpu().numpy())
        for columns in placeholders.reshape(-1, vision.projected.shape[1]) if len(placeholders) else ():
            i = len(images)
            cls, tower = vision.projected_cls[i], vision.groups[i]
            c = cosine(text_features, to_numpy(vision.image_embeds[i])) if compares else None
            spans = turn_spans(all_spans[row], turns, columns[0])
            relevance = instruction_relevance(pruning.guidance, spans, c, embeds, cls)
            images.append(guide_image(pruning, row, columns, tower, relevance, embeds, cls))
            inputs[columns] = vision.projected[i].to(inputs.dtype)
        prescribed = selection[first : len(images)] if selection is not None else [None] * (len(images) - first)
        valid = attention_mask[row].bool().cpu().numpy()
        decode = decode_row_ahead if pruning.decoder_choice == "ahead" else decode_row
        rows.append(decode(language, pruning, inputs, valid, position_ids[row], images[first:], prescribed, turns))
    hidden = torch.stack([out for out, _ in rows])
    seen = [np.stack(layer) for layer in zip(*(alive for _, alive in rows), strict=True)]
    return DecoderReference(model.lm_head(hidden), hidden, seen[-1], seen[:-1], images, vision)


def decode_row_ahead(
    language: nn.Module,
    pruning: Any,
    inputs: Tensor,
    valid: np.ndarray,
    position_ids: np.ndarray,
    images: list[ImageReference],
    prescribed: Sequence[Selection | None],
    turns: Sequence[int],
) -> tuple[Tensor, list[np.ndarray]]:
    """Stage 2 ahead of the decoder: `decode_row` chooses for the images of one turn after the other, then every layer
    sees what they keep in the end, and of earlier turns nothing else was ever seen.
    """
    exists = valid.copy()
    for turn, end in zip(turns, [*turns[1:], len(inputs)], strict=True):
        here = [m for m, image in enumerate(images) if turn <= image.columns[0] < end]
        chosen = [images[m] for m in here]
        decode_row(language, pruning, inputs, exists, position_ids, chosen, [prescribed[m] for m in here], turns, valid)
        for image in chosen:
            exists[image.dropped_columns] = False
    return decode_row(language, pruning, inputs, exists, position_ids, [], [], turns, valid)


def decode_row(
    language: nn.Module,
    pruning: Any,
    inputs: Tensor,
    valid: np.ndarray,
    position_ids: np.ndarray,
    images: list[ImageReference],
    prescribed: Sequence[Selection | None],
    turns: Sequence[int] = (0,),
    tokens: np.ndarray | None = None,
) -> tuple[Tensor, list[np.ndarray]]:
    """Stage 2 (Sec. 3.3) on the embeddings (S, d) of one row; fills in ``image.decoder``.

    `valid` marks the columns (S,) that exist at first, `tokens` those that are no padding, if they are others.

    Returns the final hidden states (S, d) and, for every layer and after the last one, which columns exist (S,).
    The pseudo-CLS tokens are rows S, S + 1, ... of the matrices; for RoPE and A_mask (Eq. 2) they stand right after
    their images.
    """
    bounds = stage_groups(pruning, pruning.decoder_layers, len(language.layers))
    schedules = [geometric_schedule(len(image.kept), pruning.visual_tokens, len(bounds)) for image in images]
    ends = [image.columns[-1] + 1 for image in images]
    exists, length = valid.copy(), len(inputs)
    for image in images:
        exists[image.dropped_columns] = False
    x = torch.cat([inputs, *(image.pseudo_cls[None].to(inputs.dtype) for image in images)])
    maps, alive, g = [], [], 0
    for index, layer in enumerate(language.layers):
        alive.append(exists.copy())
        if pruning.pseudo_cls == "pool":
            pooled = [x[im.key_columns].mean(0) if im.key_columns else x[length + m] for m, im in enumerate(images)]
            x = torch.cat([x[:length], *(token[None] for token in pooled)])
        whole = valid if tokens is None else tokens
        positions = rope_positions(pruning.positions, exists, whole, position_ids, ends)
        cos, sin = language.rotary_emb(x[None], position_ids=torch.as_tensor(positions[None], device=x.device))
        x, attention_map, norms = decoder_layer(layer, x, causal_visibility(exists, ends), cos[0], sin[0])
        maps.append(attention_map)
        if g < len(bounds) and index == bounds[g][1]:
            for m, image in enumerate(images):
                row = aggregate(maps, length + m, pruning.aggregation)
                choice = prescribed[m].decoder[g] if prescribed[m] is not None else None
                at = image.columns[image.kept]
                scores, states = importance_scores(row[at], norms[at]), to_numpy(x[at])
                group = prune_group(pruning, bounds[g], image.kept, scores, states, schedules[m][g], choice)
                image.decoder.append(group)
                exists[image.dropped_columns] = False
            maps, g = [], g + 1
    return language.norm(x[:length]), [*alive, exists]


def rope_positions(
    how: str, exists: np.ndarray, valid: np.ndarray, position_ids: np.ndarray, ends: Iterable[int]
) -> np.ndarray:
    """RoPE positions of the S columns and the pseudo-CLS tokens after them, which have that of the column ``end``.

    "original": the positions of the unpruned sequence. "compact": how many valid tokens still exist before the column.
    """
    if how == "compact":
        return np.append(np.cumsum(exists) - exists, [exists[:end].sum() for end in ends]).astype(np.int64)
    after = [position_ids[e] if e < len(valid) and valid[e] else position_ids[e - 1] + 1 for e in ends]
    return np.append(position_ids, after).astype(np.int64)


def causal_visibility(exists: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """A_mask of Eq. 2 as ``visible[query, key]`` for S columns and the pseudo-CLS tokens after them.

    A column sees what exists up to itself. A pseudo-CLS token sees what exists before the end of its image, and itself;
    nothing else sees it. A query that would see nothing (padding) sees itself, for a finite softmax; nobody reads it.
    """
    length, total = len(exists), len(exists) + len(ends)
    visible = np.zeros((total, total), dtype=bool)
    visible[:length, :length] = np.tril(np.ones((length, length), dtype=bool)) & exists
    for m, end in enumerate(ends):
        visible[length + m, :end] = exists[:end]
        visible[length + m, length + m] = True
    blind = np.flatnonzero(~visible.any(axis=1))
    visible[blind, blind] = True
    return visible


def reference_loss(reference: DecoderReference, labels: Tensor) -> Tensor:
    """Next-token cross entropy: the mean over those of ``labels`` (B, S) that are not -100 and whose predicting column
    (the one before) was not dropped. The choice of patches has no gradient.

    A label after a padding column counts, as in transformers, though its logits mean nothing.
    """
    dropped = np.zeros(labels.shape, dtype=bool)
    for image in reference.images:
        dropped[image.row, image.dropped_columns] = True
    targets = labels[:, 1:].masked_fill(torch.as_tensor(dropped[:, :-1], device=labels.device), -100)
    logits = reference.logits[:, :-1].flatten(0, 1).to(torch.promote_types(reference.logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100)
