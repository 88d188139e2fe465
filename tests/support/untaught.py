"""A tiny model of the drawn world, with its words and its fingerprint, that was never trained."""

from pathlib import Path

from benchmarks.quality.tokenizer import processor as processor_of_the_miniature
from benchmarks.quality.world import fingerprint
from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration
from tests.support.tiny import randomize

SIDE, PATCHES = 168, 144


def untaught(folder: Path) -> Path:
    """Writes it; returns the folder."""
    processor = processor_of_the_miniature()
    processor.image_processor.size = {"shortest_edge": SIDE}
    processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = IVTPLlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", **sizes, "num_hidden_layers": 4, "image_size": SIDE, "patch_size": 14,
            "projection_dim": 16,
        },
        text_config={
            "model_type": "llama", **sizes, "num_hidden_layers": 4, "vocab_size": len(processor.tokenizer),
            "pad_token_id": processor.tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": 2,
        },
        clip_text_config={
            **sizes, "num_hidden_layers": 1, "projection_dim": 16, "vocab_size": 49408, "max_position_embeddings": 77,
        },
        image_token_index=processor.image_token_id,
        image_seq_length=PATCHES,
        pruning={"layers_per_group": 2, "decoder_layers": 2},
    )  # fmt: skip
    config.world_fingerprint = fingerprint()
    model = randomize(IVTPLlavaForConditionalGeneration(config))
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
