"""Real tokenizers for tests, built offline: CLIP's own BPE, and the examples' BPE of LLaMA's kind.

(Not named `tokenizers.py`: the tests' folder is on the import path, and the library of that name must stay importable.)
"""

from functools import lru_cache
from typing import Any

from transformers import CLIPImageProcessor, CLIPTokenizer

from examples.untrained import CHAT_TEMPLATE as LLAVA_TEMPLATE
from examples.untrained import TEXT, llama_tokenizer
from modeling_ivtp.hub.clip_bpe import clip_tokenizer_from_open_clip
from modeling_ivtp.processing_ivtp import IVTPLlavaProcessor

__all__ = ["CHATML_TEMPLATE", "LLAVA_TEMPLATE", "MISTRAL_TEMPLATE", "TEXT", "clip_tokenizer", "llama_tokenizer"]
MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages -%}
{%- if message['role'] == 'user' %}{{ '[INST] ' }}
{%- for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor -%}
{{ ' [/INST]' }}
{%- else %}{{ ' ' + message['content'][0]['text'] + eos_token }}{% endif -%}
{%- endfor -%}
"""
CHATML_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif -%}
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{%- for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""


@lru_cache
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer; shared between tests, so leave it as it is."""
    return clip_tokenizer_from_open_clip()


def processor(*special: str, size: int = 28, clip: Any = "real", **kwargs: Any) -> IVTPLlavaProcessor:
    """A processor of LLaVA-1.5's kind for images of `size` pixels, (size / 14)² placeholders each."""
    return IVTPLlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=True
        ),
        clip_tokenizer=clip_tokenizer() if clip == "real" else clip,
        **{
            "tokenizer": llama_tokenizer(*special),
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "chat_template": LLAVA_TEMPLATE,
            **kwargs,
        },
    )
