"""A miniature LLaVA with LLaVA-1.5's geometry and random weights, in the formats that the real ones are published in.

It stands in where a checkpoint cannot be downloaded: every file, size and step is as with the real thing, and only the
answers mean nothing.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from modeling_ivtp.hub.clip_bpe import clip_tokenizer_from_open_clip

TEXT = """
What is the colour of the bird that sits on the left branch of the tree? Describe the image in detail, please. How many
people are standing in front of the red building, and which of them is wearing a hat? Is there a dog or a cat in the
picture? Answer the question using a single word or phrase. The man in the photograph is riding a brown horse along
the beach. There are two cups, a plate of food and a small bottle of water on the wooden table. Which animal is behind
the fence? Where was this photo taken: in a kitchen, at a station, or on the street? Read the sign above the door and
tell me what it says. The assistant gives helpful, detailed and polite answers to the human's questions. Write a short
story about what you see, then list every object with its position, size and colour. Why does the woman look at the
clock? What might happen next, and what would you do if you were there? def count(items): return sum(1 for item in x)
"""
ROLES = "USER: ASSISTANT: user assistant system"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif -%}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{%- if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}
{%- else %}{{ part['text'] + ' ' }}{% endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}
"""


@lru_cache
def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*TEXT.split("\n"), ROLES], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def llama_tokenizer(*special: str, **options: object) -> LlamaTokenizer:
    """A tokenizer of LLaVA-1.5's kind with 900 words: Metaspace, byte fallback; `special` tokens beside `<image>`."""
    vocabulary, merges = _bpe()
    tokenizer = LlamaTokenizer(
        vocab=dict(vocabulary), merges=list(merges), pad_token="<pad>", **{"padding_side": "left"} | options
    )
    names = ["<pad>", "<image>", *special]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    return tokenizer


def write_checkpoints(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write an official-format LLaVA and the CLIP it sees with.

    Parameters
    ----------
    folder : Path
        Gets the sub-folders `llava` (about 60 MB) and `clip` (about 70 MB).
    seed : int, default 0

    Returns
    -------
    tuple of Path
        The two folders.
    """
    torch.manual_seed(seed)
    tokenizer = llama_tokenizer()
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 4}
    vision |= {"image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu"}
    text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 16,
            "num_attention_heads": 4,
            "vocab_size": len(tokenizer),
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    llava.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_convert_rgb=True
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    llava.save_pretrained(folder / "llava")
    processor.save_pretrained(folder / "llava")
    clip.save_pretrained(folder / "clip")
    clip_tokenizer_from_open_clip().save_pretrained(folder / "clip")
    return folder / "llava", folder / "clip"
