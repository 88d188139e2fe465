"""The decoder's tokenizer: a BPE of LLaMA's kind, trained on the world's own wording."""

import copy
import json
from collections.abc import Iterable
from functools import cache
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AddedToken, CLIPImageProcessor, LlamaTokenizer

from benchmarks.quality.world import all_words, answer_words, draw_scene, questions
from modeling_ivtp import IVTPLlavaProcessor
from modeling_ivtp.checkpoints.clip_bpe import clip_tokenizer_from_open_clip

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif -%}
{%- for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ eos_token }}
{%- endgeneration -%}
{%- else -%}
{%- for part in parts if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}
"""


def learn_bpe(texts: Iterable[str], pieces: int) -> dict[str, Any]:
    """Train a BPE of LLaMA's kind (Metaspace, byte fallback): vocabulary and merges, arguments of `LlamaTokenizer`."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=pieces, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def llama_tokenizer(learned: dict[str, Any], *special: str, **options: Any) -> LlamaTokenizer:
    """Build a tokenizer of LLaVA-1.5's kind from trained pieces, with `special` tokens beside `<pad>` and `<image>`."""
    tokenizer = LlamaTokenizer(**copy.deepcopy(learned), pad_token="<pad>", **{"padding_side": "left"} | options)
    names = ["<pad>", "<image>", *special]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    return tokenizer


@cache
def decoder_tokenizer() -> LlamaTokenizer:
    """Train the decoder's tokenizer: about 800 pieces, so that longer words of a question are split.

    Answers are whole pieces, because the benchmark measures sight, not spelling.
    """
    asked = [question.prompt for index in range(400) for question in questions(draw_scene("train", index), 8)]
    # More often than anything else, so that merges reach whole answers first.
    answers = [" ".join(answer_words())] * 4000
    return llama_tokenizer(learn_bpe([*asked, *answers, " ".join(all_words())], pieces=820))


def processor() -> IVTPLlavaProcessor:
    """Build LLaVA-1.5's processor with both tokenizers of the miniature."""
    return IVTPLlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_convert_rgb=True
        ),
        tokenizer=decoder_tokenizer(),
        clip_tokenizer=clip_tokenizer_from_open_clip(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
