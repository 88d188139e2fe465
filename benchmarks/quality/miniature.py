"""The miniature LLaVA: real geometry, small widths.

576 patches of 14 pixels and CLS, a CLIP tower that LLaVA reads one layer before the last, CLIP's own BPE for the text
tower and another BPE of LLaMA's kind for the decoder, two layers of projection. A recipe says how many layers there
are. Both stages have four groups, as LLaVA-1.5's twelve pruned decoder layers do, and four decoder layers stay above
them to answer from what is left.
"""

from transformers import CLIPTextConfig, CLIPVisionConfig, LlamaConfig

from benchmarks.quality.recipes import Recipe

WIDTH, TEXT_WIDTH, HEADS, PROJECTION = 192, 128, 3, 128


def vision_config(recipe: Recipe) -> CLIPVisionConfig:
    """Return the configuration of the vision tower: a ViT at 336 pixels."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=recipe.tower_layers,
        num_attention_heads=HEADS,
        image_size=336,
        patch_size=14,
        projection_dim=PROJECTION,
        hidden_act="gelu",
    )


def clip_text_config() -> CLIPTextConfig:
    """Return the configuration of CLIP's text tower, with its real vocabulary of 49408."""
    return CLIPTextConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        projection_dim=PROJECTION,
        max_position_embeddings=77,
        hidden_act="gelu",
    )


def decoder_config(recipe: Recipe, vocabulary: int) -> LlamaConfig:
    """Return the configuration of the decoder: a LLaMA, its RoPE period long enough for 576 patches."""
    return LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=recipe.decoder_layers,
        num_attention_heads=HEADS,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=1,
        eos_token_id=2,
    )
