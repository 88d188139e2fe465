"""What an answer costs, by the closed formula that reproduces the paper's Tables 3 and 9, with a model's own sizes.

Counted are the matrix products of the layers, attention included, and the head over all positions of the prompt; not
the patch embedding, the projector, norms and the few tokens of the answer. Of the vision tower the paper counts the
layers below LLaVA's features; the layer above them is counted here where a method reads it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from modeling_ivtp.token_budget import PruningPlan


def layer_flops(tokens: Any, width: int, inner: int, *, matrices: int, kv_width: int | None = None) -> Any:
    """One layer: `2 n (4 d^2 + 3 d m) + 4 n^2 d` for LLaMA, whose MLP has three matrices; CLIP's has two.

    Parameters
    ----------
    tokens : int or array
        n, in this layer.
    width, inner : int
        d and m.
    matrices : {2, 3}
        Of the MLP.
    kv_width : int, optional
        Width of keys and values, where fewer heads share them.
    """
    projections = 2 * width * width + 2 * width * (width if kv_width is None else kv_width)
    return 2 * tokens * (projections + matrices * width * inner) + 4 * tokens * tokens * width


def tower_flops(config: Any, plan: PruningPlan | None, *, to_the_top: bool) -> int:
    """The vision tower for one image, CLS included.

    Parameters
    ----------
    config : IVTPLlavaConfig
    plan : PruningPlan or None
        None: nothing is dropped.
    to_the_top : bool
        Whether layers above LLaVA's features are needed.
    """
    vision = config.vision_config
    feature_layers = config.vision_feature_layer
    feature_layers = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    needed = max(layer % (vision.num_hidden_layers + 1) for layer in feature_layers)
    total, tokens = 0, config.num_patches
    keeps = {group.last: group.keep for group in plan.tower} if plan is not None else {}
    for layer in range(vision.num_hidden_layers if to_the_top else needed):
        total += layer_flops(tokens + 1, vision.hidden_size, vision.intermediate_size, matrices=2)
        tokens = keeps.get(layer, tokens)
    return total


def text_tower_flops(config: Any, windows: int) -> int:
    """CLIP's text tower over an instruction of so many windows."""
    text = config.clip_text_config
    layer = layer_flops(text.max_position_embeddings, text.hidden_size, text.intermediate_size, matrices=2)
    return windows * text.num_hidden_layers * layer


def decoder_flops(config: Any, text_tokens: np.ndarray, visual_tokens: Sequence[int]) -> np.ndarray:
    """The language model with its head, for prompts of some lengths.

    Parameters
    ----------
    config : IVTPLlavaConfig
    text_tokens : int array (n,)
        Of each prompt, without its image.
    visual_tokens : sequence of int
        In each layer.

    Returns
    -------
    float array (n,)
    """
    text = config.text_config
    texts = np.asarray(text_tokens, dtype=np.float64)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shared = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_dim
    total = 2 * (texts + visual_tokens[-1]) * text.hidden_size * text.vocab_size
    for visual in visual_tokens:
        total = total + layer_flops(
            texts + visual, text.hidden_size, text.intermediate_size, matrices=3, kv_width=shared
        )
    return total
