"""Questions of a benchmark, as messages of a chat, turned into a model's prompts and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from ..files.images import load_image
from ..serving.answering import as_prompt

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The system prompt that LLaVA-1.5 was trained with and published its scores with; llava-hf's template lacks it."""
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """A prompt with its pictures.

    Attributes
    ----------
    text : str
        With an image token for each picture.
    images : tuple of PIL.Image.Image
    """

    text: str
    images: tuple[Image.Image, ...]


def prompt_of(
    messages: Sequence[Mapping[str, Any]], processor: Any, *, system_prompt: str = "", pad: bool = False
) -> Prompt:
    """Turn a chat into a prompt.

    Parameters
    ----------
    messages : sequence of mapping
        Each with `role` and `content`, which is a text or a list of parts: `{"type": "text", "text": …}` and
        `{"type": "image", "url": …}`, where the picture is a PIL image, a path or an address.
    processor : IVTPLlavaProcessor
    system_prompt : str
        Stands before everything else, unless the chat has a system message.
    pad : bool
        Pad pictures to squares, as `as_square` does.

    Raises
    ------
    ValueError
        For a role or part that is unknown, a video or a sound, or a wrong number of image tokens in a text.
    """
    turns = [_turn(message) for message in messages]
    images = tuple(load_image(source) for _, sources, _ in turns for source in sources)
    if pad:
        images = tuple(as_square(image, processor.image_processor.image_mean) for image in images)
    if [role for role, _, _ in turns] == ["user"]:
        text = as_prompt(processor, turns[0][2], len(images))
    else:
        text = _rendered(turns, processor)
    if system_prompt and turns[0][0] != "system":
        text = f"{system_prompt} {text}"
    return Prompt(text, images)


def _turn(message: Mapping[str, Any]) -> tuple[str, list[Any], str]:
    """Return the role, the pictures and the text of a message."""
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise ValueError(f"role={role!r}; allowed: {', '.join(_ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    images, texts = [], []
    for part in parts:
        kind = part["type"]
        if kind in ("video", "audio"):
            raise ValueError(f"a question comes with {kind}; LLaVA reads text and pictures only")
        if kind == "image":
            images.append(part["url"])
        elif kind == "text":
            texts.append(part["text"])
        else:
            raise ValueError(f"type={kind!r} of a part; allowed: text, image")
    return role, images, "\n".join(texts)


def _rendered(turns: Sequence[tuple[str, list[Any], str]], processor: Any) -> str:
    """Return the prompt of a chat of several messages, by the checkpoint's template."""
    if not processor.chat_template:
        raise ValueError("the checkpoint has no chat template, so it can be asked single questions only")
    chat = [
        {"role": role, "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}
        for role, images, text in turns
    ]
    try:
        return str(processor.apply_chat_template(chat, add_generation_prompt=True))
    except TemplateError as error:
        raise ValueError(f"the checkpoint's chat template cannot write this chat: {error}") from error


def as_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Pad a picture to a square with the mean colour, in the middle.

    LLaVA-1.5 was trained and published with padded pictures. The processors of the checkpoints in transformers' format
    cut off what lies outside the middle square instead.

    Parameters
    ----------
    image : PIL.Image.Image
        In RGB.
    mean : sequence of three floats
        The colour by which the processor normalises, from 0 to 1.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    red, green, blue = (int(value * 255) for value in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
