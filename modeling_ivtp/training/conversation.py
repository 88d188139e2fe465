"""From a conversation to the text that the model reads, and the answers in it, by the chat template's turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from .data import IMAGE, Conversation

TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ message['role'].upper() + ': ' if message['role'] != 'system' }}"
    "{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor -%}"
    "{%- endfor -%}{{ 'ASSISTANT:' if add_generation_prompt }}"
)
"""LLaVA-1.5's turns, for a processor that has no template."""


@dataclass(frozen=True)
class Written:
    """A conversation as text.

    Attributes
    ----------
    name : str
        Of the row.
    text : str
        With one image token for each picture.
    answers : tuple of (int, int)
        Half-open character ranges of what is to be learned: every answer, and the token that ends it.
    images : tuple
        The pictures.
    """

    name: str
    text: str
    answers: tuple[tuple[int, int], ...]
    images: tuple[Any, ...]


def write(processor: Any, conversation: Conversation) -> Written:
    """Write a conversation by the processor's chat template.

    Pictures stand before the words of their turn, where LLaVA's templates put them. An answer that the template ends
    with no special token is ended with the tokenizer's end of text, as LLaVA trains, so that the model learns to stop.

    Parameters
    ----------
    processor : LlavaProcessor
    conversation : Conversation

    Raises
    ------
    ValueError
        If the template cannot render the conversation, or renders earlier turns otherwise once later ones follow.
    """
    messages = [_message(role, text) for role, text in conversation.messages]
    text, answers, rendered = "", [], ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render(processor, messages[:turn], True, conversation.name)
        answered = _render(processor, messages[: turn + 1], False, conversation.name)
        if not (asked.startswith(rendered) and answered.startswith(asked)):
            raise ValueError(
                f"{conversation.name}: the chat template changes earlier turns when later ones follow, so that no "
                "answer can be told from its question"
            )
        text += asked[len(rendered) :]
        answer, start = answered[len(asked) :], len(text)
        words = message["content"][-1]["text"]
        # The first match: a short answer, an `s` say, may come again in the end token after it.
        after = answer.partition(words)[2] if words else answer
        if not _ends(processor.tokenizer, after):
            answer = answer.rstrip() + processor.tokenizer.eos_token
        text, rendered = text + answer, answered
        answers.append((start, start + len(answer.rstrip())))
    return Written(conversation.name, text, tuple(answers), conversation.images)


def _message(role: str, text: str) -> dict[str, Any]:
    words = text.replace(IMAGE, "").strip()
    pictures = [{"type": "image"}] * (text.count(IMAGE) if role == "user" else 0)
    return {"role": role, "content": [*pictures, {"type": "text", "text": words}]}


def _render(processor: Any, messages: Sequence[Any], asks: bool, name: str) -> str:
    template = processor.chat_template or TEMPLATE
    try:
        text = processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=asks, tokenize=False
        )
    except TemplateError as error:
        raise ValueError(f"{name}: the chat template cannot render it: {error}") from error
    return str(text)


def _ends(tokenizer: Any, after: str) -> bool:
    """Return whether a special token ends an answer, from what the template wrote after its words."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return after.rstrip().endswith(tuple(special))
