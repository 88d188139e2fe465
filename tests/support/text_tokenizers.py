"""Real tokenizers for tests, built offline: CLIP's own BPE, and a BPE of LLaMA's kind.

(Not named `tokenizers.py`: the tests' folder is on the import path, and the library of that name must stay importable.)
"""

from functools import lru_cache
from typing import Any

from transformers import CLIPImageProcessor, CLIPTokenizer, LlamaTokenizer

from benchmarks.quality import tokenizer
from modeling_ivtp.checkpoints.clip_bpe import clip_tokenizer_from_open_clip
from modeling_ivtp.model.processing_ivtp import IVTPLlavaProcessor

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
LLAVA_TEMPLATE = """\
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
def _learned() -> dict[str, Any]:
    return tokenizer.learn_bpe([*TEXT.split("\n"), ROLES], pieces=900)


def llama_tokenizer(*special: str, **options: Any) -> LlamaTokenizer:
    """A tokenizer of LLaVA-1.5's kind with 900 pieces; `special` tokens beside `<pad>` and `<image>`."""
    return tokenizer.llama_tokenizer(_learned(), *special, **options)


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
