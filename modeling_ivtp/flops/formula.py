"""The closed formula for a prompt's FLOPs, by the counting rule that reproduces IVTP's Tables 3 and 9.

A multiplication with its addition counts as two operations. A layer of a decoder of LLaMA's kind on n tokens, d wide
with an MLP of m, takes `2 n (4 d² + 3 d m) + 4 n² d`, a layer of CLIP's the same with two matrices in its MLP. The
paper counts the tower's layers up to the features, 23 of 24, and the head on every token that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..model.connector_options import feature_width
from ..model.placeholders import features_of_image
from ..model.pruned_cache import key_value_shape
from ..model.pruner import Pruner
from ..model.schedule import PruningPlan
from ..trained import TrainedMethod

PARTS = ("tower", "connector", "projector", "text_tower", "scoring", "selection", "decoder", "head")


def layer_flops(
    tokens: Any,
    width: int,
    inner: int,
    *,
    matrices: int,
    kv_width: int | None = None,
    mlp_tokens: Any = None,
    products: bool = True,
) -> Any:
    """Count one layer.

    Parameters
    ----------
    tokens : int or array
        n.
    width, inner : int
        d and m.
    matrices : {2, 3}
        Matrices of the MLP.
    kv_width : int, optional
        Width of keys and values, where fewer heads share them.
    mlp_tokens : int or array, optional
        Tokens that the MLP sees, where some are dropped before it; default: n.
    products : bool, default True
        False leaves out the products of queries with keys and of weights with values, as module counters do.
    """
    projections = 2 * width * width + 2 * width * (width if kv_width is None else kv_width)
    mlp = matrices * width * inner
    total = 2 * tokens * projections + 2 * (tokens if mlp_tokens is None else mlp_tokens) * mlp
    return total + 4 * tokens * tokens * width if products else total


def tower_depth(config: Any, plan: PruningPlan, pruner: Pruner | None) -> int:
    """Return how many layers of the tower run: up to the last that makes features, drops patches or is recorded."""
    layers = config.vision_config.num_hidden_layers
    if pruner is None or (pruner.needs.image_embeds and config.clip_text_config is not None):
        return layers
    recorded = [layer % layers + 1 for layer in pruner.needs.recorded_layers]
    return max([config.feature_depth, *(group.last + 1 for group in plan.tower), *recorded])


def tower_flops(config: Any, plan: PruningPlan, layers: int) -> int:
    """Count the first `layers` layers of the vision tower for one image, CLS included."""
    vision = config.vision_config
    middle = {group.last for group in plan.tower if group.middle}
    tokens = plan.tower_layer_tokens(layers + 1)
    return sum(
        layer_flops(
            tokens[layer] + 1,
            vision.hidden_size,
            vision.intermediate_size,
            matrices=2,
            mlp_tokens=tokens[layer + 1] + 1 if layer in middle else None,
        )
        for layer in range(layers)
    )


def patch_embedding_flops(config: Any) -> int:
    """Count the convolution from pixels to patches, which the paper leaves out."""
    vision = config.vision_config
    return 2 * config.num_patches * 3 * vision.patch_size**2 * vision.hidden_size


def projector_flops(config: Any, tokens: int) -> int:
    """Count LLaVA's projector, two layers, over `tokens` features, CLS included; the paper leaves it out."""
    feature_layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    width = config.text_config.hidden_size
    return 2 * tokens * (config.vision_config.hidden_size * feature_layers * width + width * width)


def connector_flops(config: Any, words: int) -> int:
    """Count a connector for one image and a question of `words` CLIP tokens, padding included; 0 without one.

    Sums and means are no products; they count as 0.
    """
    options, patches, width = config.connector, config.num_patches, feature_width(config)
    if options is None:
        return 0
    square = width * width
    if options.name == "c_abstractor":
        # Two 1 x 1 convolutions and a 3 x 3 one for each place; squeeze and excitation for each block.
        squeezed = 2 * 2 * width * max(1, round(width / 4))
        return options.depth * sum(
            2 * places * (2 * square + 9 * width) + squeezed for places in (patches, options.places)
        )
    if options.name == "resampler":
        # Keys and values of patches; queries, output and the last matrix; the products of attention.
        return 2 * (2 * patches + 3 * options.places) * square + 4 * options.places * patches * width
    if not words:  # all patches have the same weight
        return 2 * patches * width + 2 * width * config.text_config.hidden_size
    queries = 2 * words * config.clip_text_config.projection_dim * width
    attention = 2 * patches * square + 2 * words * patches * width + 2 * patches * width
    return queries + attention + 2 * width * config.text_config.hidden_size


def text_tower_flops(config: Any, windows: int) -> int:
    """Count CLIP's text tower over the windows of an instruction, without its projection, as the paper does."""
    text = config.clip_text_config
    layer = layer_flops(text.max_position_embeddings, text.hidden_size, text.intermediate_size, matrices=2)
    return windows * text.num_hidden_layers * layer


def kv_width(config: Any) -> int:
    """Return the width of one layer's keys: key heads times their width."""
    heads, width = key_value_shape(config.text_config)
    return heads * width


def decoder_flops(config: Any, text_tokens: Any, visual_tokens: Sequence[float]) -> Any:
    """Count the decoder's layers for prompts of `text_tokens` (int or array) and the visual tokens of each layer."""
    text = config.text_config
    total = 0.0 * text_tokens
    for visual in visual_tokens:
        total = total + layer_flops(
            text_tokens + visual, text.hidden_size, text.intermediate_size, matrices=3, kv_width=kv_width(config)
        )
    return total


def head_flops(config: Any, tokens: Any) -> Any:
    """Count the head over `tokens` tokens."""
    return 2 * tokens * config.text_config.hidden_size * config.text_config.vocab_size


def kv_cache_bytes(config: Any, tokens: Sequence[float], value_bytes: int) -> list[int]:
    """Return the bytes of each layer's keys and values, for its number of tokens and the bytes of a value."""
    return [round(2 * number * kv_width(config) * value_bytes) for number in tokens]


def spanning_flops(tokens: int, width: int, keep: int) -> int:
    """Count `diversity.spanning` for one image: the products of all pairs of vectors, and a factor's row per pick."""
    return 2 * tokens * tokens * width + keep * keep * tokens


def farthest_flops(tokens: int, keep: int) -> int:
    """Count `diversity.farthest` for one image: a minimum and a maximum over all tokens per pick."""
    return 2 * keep * tokens


def _selection_flops(plan: PruningPlan, config: Any, pruner: Pruner) -> int:
    """Count IVTP's diverse choices in tower and decoder; a choice of the highest scores multiplies nothing."""
    if pruner.needs.options.choice != "diverse":
        return 0
    total = 0
    for groups, tokens, sizes in (
        (plan.tower, plan.patches, config.vision_config),
        (plan.decoder, plan.tower_tokens, config.text_config),
    ):
        for group in groups:
            total += spanning_flops(tokens, sizes.hidden_size, group.keep)
            tokens = group.keep
    return total


def _rollout_flops(plan: PruningPlan, config: Any, pruner: Pruner, text_before: int) -> int:
    """Count IVTP's rollout (Eq. 3) in tower and decoder: queries with keys, and rows with maps, down every group."""
    options, total = pruner.needs.options, 0
    stages = [
        (plan.tower, plan.patches, config.vision_config, 0),
        (plan.decoder, plan.tower_tokens, config.text_config, text_before + 1),
    ]
    for groups, tokens, sizes, more in stages:
        for group in groups:
            keys = 1 + tokens + more - (1 if more else 0)
            for layer in range(group.first, group.last + 1):
                if options.aggregation == "last" and layer < group.last:
                    continue
                reference_only = layer == group.last or options.aggregation != "rollout"
                # A single row of a map is averaged over heads directly; several are weighted with the row from above.
                weighted = 0 if reference_only else sizes.num_attention_heads
                total += 2 * (1 if reference_only else 1 + tokens) * keys * (sizes.hidden_size + weighted)
            tokens = group.keep
    return total


def closed_formula(
    config: Any,
    plan: PruningPlan | None,
    pruner: Pruner | None,
    *,
    text_tokens: int,
    windows: int,
    text_before: int = 1,
) -> dict[str, int]:
    """Count everything that runs for one image and its prompt, by part.

    Parameters
    ----------
    config : IVTPLlavaConfig
    plan : PruningPlan or None
        None: nothing is dropped, and stock LLaVA runs.
    pruner : Pruner or None
        What prunes. Only IVTP's scoring and selection have formulas; those of other methods, and the sums that merging
        methods make, count as 0.
    text_tokens : int
        Of the prompt, without the image.
    windows : int
        Windows of the instruction for CLIP's text tower.
    text_before : int, default 1
        How many of the text tokens stand before the image.
    """
    pruned = plan is not None
    schedule, connector = plan or PruningPlan(config.num_patches), config.connector
    depth = config.feature_depth if connector else tower_depth(config, schedule, pruner if pruned else None)
    layers = config.text_config.num_hidden_layers
    visual = (PruningPlan(features_of_image(config)) if connector else schedule).decoder_layer_tokens(layers)
    clip = config.clip_text_config
    asks_clip = (
        pruned and clip is not None and pruner is not None and (pruner.needs.image_embeds or pruner.needs.patch_embeds)
    )
    reads_question = connector is not None and connector.reads_question
    parts = dict.fromkeys(PARTS, 0)
    parts["tower"] = patch_embedding_flops(config) + tower_flops(config, schedule, depth)
    projected = schedule.encoded_tokens if connector is None else connector.places
    if pruner is not None and pruner.needs.all_projected:
        projected = schedule.tower[-1].keep if schedule.tower else schedule.patches
    parts["projector"] = projector_flops(config, projected + (1 if pruned else 0))
    words = windows * clip.max_position_embeddings if reads_question else 0
    parts["connector"] = connector_flops(config, words)
    if asks_clip or reads_question:
        parts["text_tower"] = text_tower_flops(config, windows) + 2 * windows * (
            clip.max_position_embeddings * clip.hidden_size * clip.projection_dim
        )
    if asks_clip:
        parts["tower"] += 2 * config.vision_config.hidden_size * clip.projection_dim
    parts["decoder"] = round(decoder_flops(config, text_tokens, visual))
    if pruned and pruner is not None and pruner.needs.pseudo_cls:
        parts["scoring"] = _rollout_flops(schedule, config, pruner, text_before)
        parts["selection"] = _selection_flops(schedule, config, pruner)
        # The pseudo CLS is one more token in the layers of the groups.
        text = config.text_config
        pseudo_cls = layer_flops(
            1, text.hidden_size, text.intermediate_size, matrices=3, kv_width=kv_width(config), products=False
        )
        ahead = schedule.choosing_layer_tokens()
        seen = ahead or visual[: schedule.decoder[-1].last + 1 if schedule.decoder else 0]
        for tokens in seen:
            parts["decoder"] += pseudo_cls + 4 * (text_before + tokens + 1) * text.hidden_size
        # A pass ahead runs what stands up to the end of the image.
        parts["decoder"] += round(decoder_flops(config, text_before, ahead))
    if pruned and isinstance(pruner, TrainedMethod):
        parts["scoring"] = sum(pruner.module_flops(int(visual[group.last]), text_tokens) for group in schedule.decoder)
    if pruned and pruner is not None and pruner.needs.next_record:
        # Queries and keys of the layer after each group, before anything is dropped.
        width = config.text_config.hidden_size + kv_width(config)
        for group in schedule.decoder:
            parts["decoder"] += 2 * (text_tokens + visual[group.last]) * config.text_config.hidden_size * width
    parts["head"] = round(head_flops(config, text_tokens + visual[-1]))
    return parts
