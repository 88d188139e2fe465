"""The processor: stock LLaVA's, which also hands the model the instruction as CLIP's text tower reads it.

Two inputs come on top of `LlavaProcessor`'s. `clip_input_ids` (B, W, C) int64: the instruction in windows of CLIP's
context length C. `clip_spans` (B, S, 2) int64: for each prompt token the CLIP tokens that share a character with it
(paper, Eq. 7), as a half-open range over the row's W * C places counted from the end, (0, 0) for none. What is missing
is zeros on the left in both, which is also what left-padding an unknown input gives.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, takewhile
from typing import Any

import torch
from transformers import AutoTokenizer, BatchFeature, LlavaProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file, logging

from .text_relevance import overlapping_spans

logger = logging.get_logger(__name__)

Range = tuple[int, int]

# Regular expressions of what opens and what closes a user turn: the formats of the LLaVA checkpoints on the Hub.
_KNOWN_FORMATS = (
    (r"<\|im_start\|>user\b", r"<\|im_end\|>"),
    (r"<\|start_header_id\|>user<\|end_header_id\|>", r"<\|eot_id\|>"),
    (r"<start_of_turn>user\b", r"<end_of_turn>"),
    (r"<\|user\|>", r"<\|end\|>|<\|assistant\|>"),
    (r"\[INST\]", r"\[/INST\]"),
    (r"###\s*Human:", r"###\s*Assistant:"),
    (r"(?<!\w)USER:", r"(?<!\w)ASSISTANT:"),
)
_SYSTEM_INSIDE_TURN = r"<<SYS>>.*?<</SYS>>"
_NEVER = r"(?!)"
_HUB_ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


class _PresentComponents:
    """`ProcessorMixin.get_attributes`, which leaves out the CLIP tokenizer for an instance that has none.

    The mixin checks, saves and prints every component it lists, and takes none of them for optional.
    """

    def __get__(self, processor: ProcessorMixin | None, owner: type[ProcessorMixin]) -> Callable[[], list[str]]:
        names = vars(ProcessorMixin)["get_attributes"].__get__(None, owner)()
        present = processor is None or getattr(processor, "clip_tokenizer", None) is not None
        return lambda: [name for name in names if present or name != "clip_tokenizer"]


class IVTPLlavaProcessor(LlavaProcessor):
    """LLaVA's processor with CLIP's tokenizer beside the language model's.

    Parameters
    ----------
    image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token, \
num_additional_image_tokens
        As in `LlavaProcessor`.
    clip_tokenizer : fast tokenizer, optional
        Tokenizer of CLIP's text tower, kept in its own folder `clip_tokenizer/` of a checkpoint. Without it the
        processor is a stock `LlavaProcessor`.
    instruction_pattern : str, optional
        Regular expression (`.` matches newlines too) for what in a prompt is the instruction: its first group, or the
        whole match if it has none; every match counts. By default the user turns are found by the role markers of the
        chat template, else by those of the known LLaVA formats; a prompt without role markers is all instruction.
        Special tokens and image placeholders never are.

    Raises
    ------
    ValueError
        If the CLIP tokenizer, or with it the language model's, cannot tell character offsets; if the CLIP tokenizer
        lacks a start or end token or room between them; if `instruction_pattern` is not a regular expression.
    """

    get_attributes = _PresentComponents()

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        clip_tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        instruction_pattern: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        if clip_tokenizer is not None:
            _check_tokenizers(tokenizer, clip_tokenizer)
        if instruction_pattern is not None:
            try:
                re.compile(instruction_pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"instruction_pattern must be a regular expression, got {instruction_pattern!r}: {error}"
                ) from error
        self.clip_tokenizer = clip_tokenizer
        self.instruction_pattern = instruction_pattern
        self._markers_of_template: dict[str, tuple[str, str] | None] = {}

    @classmethod
    def from_llava(
        cls, llava: str | os.PathLike, clip_tokenizer: Any = None, instruction_pattern: str | None = None, **kwargs: Any
    ) -> "IVTPLlavaProcessor":
        """Join a stock LLaVA processor with CLIP's tokenizer.

        Parameters
        ----------
        llava : str or path
            Folder or Hub id of a LLaVA checkpoint.
        clip_tokenizer : fast tokenizer, str or path, optional
            CLIP's tokenizer, or the folder or Hub id of a CLIP checkpoint.
        instruction_pattern : str, optional
            As for the class.
        **kwargs
            Passed on to `LlavaProcessor.from_pretrained`; access to the Hub (`token`, ...) holds for CLIP too.

        Returns
        -------
        IVTPLlavaProcessor
        """
        stock = LlavaProcessor.from_pretrained(llava, **kwargs)
        if isinstance(clip_tokenizer, (str, os.PathLike)):
            access = {name: kwargs[name] for name in _HUB_ACCESS if name in kwargs}
            clip_tokenizer = AutoTokenizer.from_pretrained(clip_tokenizer, **access)
        return cls(
            image_processor=stock.image_processor,
            tokenizer=stock.tokenizer,
            clip_tokenizer=clip_tokenizer,
            patch_size=stock.patch_size,
            vision_feature_select_strategy=stock.vision_feature_select_strategy,
            chat_template=stock.chat_template,
            image_token=stock.image_token,
            num_additional_image_tokens=stock.num_additional_image_tokens,
            instruction_pattern=instruction_pattern,
        )

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, processor_dict: dict | None = None, **kwargs: Any
    ) -> list:
        if "clip_tokenizer" in kwargs:  # the mixin would store it in the config of every other component
            raise ValueError(
                f"IVTPLlavaProcessor.from_llava joins a CLIP tokenizer, got clip_tokenizer={kwargs['clip_tokenizer']!r}"
            )
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls,
        sub_processor_type: str,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str = "",
        **kwargs: Any,
    ) -> Any:
        if sub_processor_type != "clip_tokenizer":
            return super()._load_tokenizer_from_pretrained(
                sub_processor_type, pretrained_model_name_or_path, subfolder=subfolder, **kwargs
            )
        # The mixin would fall back to the language model's own tokenizer, and every relevance would be noise.
        folder = f"{subfolder}/{sub_processor_type}" if subfolder else sub_processor_type
        found = cached_file(
            pretrained_model_name_or_path,
            "tokenizer_config.json",
            subfolder=folder,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **{name: kwargs[name] for name in (*_HUB_ACCESS, "revision") if name in kwargs},
        )
        if found is None:
            logger.warning_once(
                f"{pretrained_model_name_or_path} has no {folder}/: prompts are processed as by LlavaProcessor, and "
                "pruning is guided by the image alone. IVTPLlavaProcessor.from_llava joins a CLIP tokenizer."
            )
            return None
        return AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=folder, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the processor returns for the model."""
        if self.clip_tokenizer is None:
            return super().model_input_names
        return [*dict.fromkeys(super().model_input_names), "clip_input_ids", "clip_spans"]

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Process images and prompts.

        Parameters
        ----------
        images, text, videos, audio, **kwargs
            As in `LlavaProcessor`.

        Returns
        -------
        BatchFeature
            `LlavaProcessor`'s, and `clip_input_ids` (B, W, C) and `clip_spans` (B, S, 2), int64, as this file's head
            describes them. They have the type of `input_ids`: tensors, arrays, or lists.

        Raises
        ------
        ValueError
            For what `LlavaProcessor` rejects, and for arguments after which a token has no place in the prompt
            (`text_pair`, `is_split_into_words`, `return_overflowing_tokens`).
        """
        if self.clip_tokenizer is None or text is None:
            return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        text_kwargs = dict(kwargs.pop("text_kwargs", None) or {})
        for name in ("text_pair", "is_split_into_words", "return_overflowing_tokens"):
            if value := kwargs.get(name) or text_kwargs.get(name):
                raise ValueError(f"{name} is not possible together with a CLIP tokenizer, got {value!r}")
        if kwargs.get("sanitize_control_tokens") or text_kwargs.get("sanitize_control_tokens"):
            logger.warning_once(
                "sanitize_control_tokens=True leaves no character offsets, so the instruction cannot be matched with "
                "CLIP's tokens: pruning is guided by the image alone."
            )
            return super().__call__(
                images=images, text=text, videos=videos, audio=audio, text_kwargs=text_kwargs, **kwargs
            )
        wanted = {
            output: any([kwargs.pop(option, False), text_kwargs.pop(option, False)])
            for output, option in (
                ("offset_mapping", "return_offsets_mapping"),
                ("text_replacement_offsets", "return_text_replacement_offsets"),
            )
        }
        text_kwargs["return_offsets_mapping"] = True
        outputs = super().__call__(
            images=images,
            text=text,
            videos=videos,
            audio=audio,
            text_kwargs=text_kwargs,
            return_text_replacement_offsets=True,
            **kwargs,
        )
        windows, spans = self._clip_inputs(
            [text] if isinstance(text, str) else text,
            outputs["text_replacement_offsets"],
            _as_list(outputs["input_ids"]),
            _as_list(outputs["offset_mapping"]),
        )
        for output, keep in wanted.items():
            if not keep:
                del outputs[output]
        outputs["clip_input_ids"] = _as_type_of(outputs["input_ids"], windows, _context_length(self.clip_tokenizer))
        outputs["clip_spans"] = _as_type_of(outputs["input_ids"], spans, 2)
        return outputs

    def instruction_ranges(self, text: str) -> list[Range]:
        """Find what the person wrote in a prompt.

        Parameters
        ----------
        text : str
            The prompt, before its image placeholders are expanded.

        Returns
        -------
        list of (int, int)
            Half-open character ranges, ascending and disjoint, without white space at their ends: the user turns, cut
            where a special token, an image placeholder or a system prompt stands in them.
        """
        if self.instruction_pattern is not None:
            matches = re.finditer(self.instruction_pattern, text, re.DOTALL)
            turns = [match.span(min(match.re.groups, 1)) for match in matches]
            if not turns:
                logger.warning_once(f"instruction_pattern {self.instruction_pattern!r} matches nothing in a prompt.")
        else:
            turns = _user_turns(text, [*self._template_formats(), *_KNOWN_FORMATS])
        foreign = re.compile(f"{self._special_tokens()}|{_SYSTEM_INSIDE_TURN}", re.DOTALL)
        ranges = []
        for start, end in turns:
            if start < 0:  # the pattern's group took no part in the match
                continue
            cuts = [(start, start), *(cut.span() for cut in foreign.finditer(text, start, end)), (end, end)]
            for (_, first), (last, _) in pairwise(cuts):
                words = text[first:last]
                first, last = last - len(words.lstrip()), first + len(words.rstrip())
                if first < last:
                    ranges.append((first, last))
        return ranges

    def _clip_inputs(
        self,
        texts: Sequence[str],
        replacements: Sequence[Sequence[dict[str, Any]]],
        input_ids: Sequence[Sequence[int]],
        offsets: Sequence[Sequence[Range]],
    ) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
        """Tokenize the instruction of each prompt for CLIP and align it with the prompt's tokens.

        Parameters
        ----------
        texts : sequence of str
            Prompts before their placeholders were expanded.
        replacements : sequence (per row) of sequence (per placeholder) of dict
            The mixin's record of that expansion.
        input_ids, offsets : sequence (per row) of sequence
            The tokens of the expanded prompts and their character ranges in it.

        Returns
        -------
        windows : list (B, W, C) of int
        spans : list (B, S, 2) of int
        """
        ranges = [self.instruction_ranges(text) for text in texts]
        # White space between the pieces keeps CLIP's words, and the characters that compose, apart.
        instructions = [
            " ".join(text[slice(*piece)] for piece in pieces) for text, pieces in zip(texts, ranges, strict=True)
        ]
        encoded = self.clip_tokenizer(
            instructions,
            add_special_tokens=False,
            split_special_tokens=True,  # what a person wrote is text, even where it looks like CLIP's end token
            return_offsets_mapping=True,
            verbose=False,
        )
        context = _context_length(self.clip_tokenizer)
        windows, spans = [], []
        for row, pieces in enumerate(ranges):
            bounds = _window_bounds(encoded.word_ids(row), context - 2)
            covered = _with_composed(instructions[row], encoded["offset_mapping"][row])
            moved = _moved(covered, pieces, [(*one["span"], *one["new_span"]) for one in replacements[row]])
            tokens = self.tokenizer.convert_ids_to_tokens(input_ids[row])
            # Metaspace tokenizers begin a text with a mark of their own, whose range is the first character's.
            own = [(0, 0) if token.strip("▁") == "" else pair for token, pair in zip(tokens, offsets[row], strict=True)]
            windows.append([self._window(encoded["input_ids"][row][slice(*bound)]) for bound in bounds])
            spans.append(_places(overlapping_spans(own, moved), bounds, context))
        longest = max(1, *map(len, windows))
        return [[[0] * context] * (longest - len(row)) + row for row in windows], spans

    def _window(self, tokens: list[int]) -> list[int]:
        """Frame at most C - 2 of CLIP's tokens with start and end token and pad them to C."""
        clip = self.clip_tokenizer
        pad = clip.eos_token_id if clip.pad_token_id is None else clip.pad_token_id
        window = [clip.bos_token_id, *tokens, clip.eos_token_id]
        return window + [pad] * (_context_length(clip) - len(window))

    def _special_tokens(self) -> str:
        """Give a regular expression for the special tokens of the prompt, image placeholders included."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        names = {self.image_token, *self.tokenizer.all_special_tokens, *added}
        return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))

    def _template_formats(self) -> list[tuple[str, str]]:
        """Give the role markers of the chat templates, as in `_KNOWN_FORMATS`."""
        template = self.chat_template or getattr(self.tokenizer, "chat_template", None) or {}
        formats = []
        for one in [template] if isinstance(template, str) else template.values():
            if one not in self._markers_of_template:
                self._markers_of_template[one] = self._probe_template(one)
            if (markers := self._markers_of_template[one]) is not None:
                formats.append(markers)
        return formats

    def _probe_template(self, template: str) -> tuple[str, str] | None:
        """Learn a chat template's role markers from how it renders a conversation.

        Returns
        -------
        (str, str) or None
            Regular expressions of what stands before every user's words and of what follows them; None if the template
            cannot render a plain conversation or sets no words before the user's.
        """
        words = ["probequestion", "probeanswer", "probefollowup"]
        roles = ["user", "assistant", "user"]
        for content in (lambda word: [{"type": "text", "text": word}], lambda word: word):
            chat: Any = [{"role": role, "content": content(word)} for role, word in zip(roles, words, strict=True)]
            try:
                whole = self.apply_chat_template(chat, chat_template=template, add_generation_prompt=True)
                answered = self.apply_chat_template(chat[:2], chat_template=template)
            except Exception as error:  # a template is a program and may raise whatever it likes
                logger.info(f"The chat template cannot render a plain conversation: {error}")
                continue
            if re.findall("|".join(words), whole) == words:
                break
        else:
            return None
        before, between, again, after = re.split("|".join(words), whole)
        again = again.removeprefix(answered.split(words[1])[-1])
        # Special tokens count as one letter: "<s>[INST]" and "</s>[INST]" have "[INST]" in common.
        letters = re.compile(f"{self._special_tokens()}|.", re.DOTALL)
        opening = "".join(reversed(_common_start(letters.findall(before)[::-1], letters.findall(again)[::-1])))
        after = after.strip() or between  # a template need not know generation prompts
        closing = _common_start(letters.findall(between.lstrip()), letters.findall(after.lstrip()))
        if closing and len(closing[0]) > 1:
            closing = closing[:1]  # a special token closes the turn, whoever speaks next
        if not re.search(r"\w", opening):
            return None
        return _marker(opening), _marker("".join(closing))


def _check_tokenizers(tokenizer: Any, clip_tokenizer: Any) -> None:
    """Raise ValueError for tokenizers that an instruction cannot be aligned with."""
    for name, one in (("clip_tokenizer", clip_tokenizer), ("tokenizer", tokenizer)):
        if not isinstance(one, PreTrainedTokenizerBase) or not one.is_fast:
            raise ValueError(
                f"{name} must be a fast tokenizer (one that knows character offsets), got {type(one).__name__}: {one!r}"
            )
    if clip_tokenizer.bos_token_id is None or clip_tokenizer.eos_token_id is None:
        raise ValueError(f"clip_tokenizer must have a start and an end token, got {clip_tokenizer!r}")
    if _context_length(clip_tokenizer) < 3:
        raise ValueError(f"clip_tokenizer must take 3 tokens or more, got {clip_tokenizer.model_max_length}")


def _context_length(clip_tokenizer: Any) -> int:
    """Give CLIP's context length; a tokenizer that was saved without one has an absurdly large number there."""
    return int(clip_tokenizer.model_max_length) if clip_tokenizer.model_max_length < 1_000_000 else 77


def _user_turns(text: str, formats: Sequence[tuple[str, str]]) -> list[Range]:
    """Find the user turns of a prompt by the first format whose markers stand in it; without any, it is one turn."""
    opened = next((markers for markers in formats if re.search(markers[0], text)), None)
    # A prompt that only closes a turn begins inside of it.
    markers = opened or next((markers for markers in formats if re.search(markers[1], text)), None)
    if markers is None:
        return [(0, len(text))]
    turns, start = [], None if opened else 0
    for match in re.finditer(f"(?P<opening>{markers[0]})|{markers[1]}", text):
        if start is not None:
            turns.append((start, match.start()))
        start = match.end() if match["opening"] else None
    return turns if start is None else [*turns, (start, len(text))]


def _marker(text: str) -> str:
    """Turn a role marker into a regular expression, free in its white space and never inside of a word."""
    text = text.strip()
    if not re.search(r"\w", text):
        return _NEVER
    pattern = r"\s*".join(re.escape(part) for part in text.split())
    return (r"(?<!\w)" if re.match(r"\w", text) else "") + pattern + (r"(?!\w)" if re.search(r"\w$", text) else "")


def _common_start(one: list[str], other: list[str]) -> list[str]:
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _with_composed(text: str, offsets: Iterable[Range]) -> list[Range]:
    """Extend CLIP's character ranges over the combining characters that its Unicode normalization left out.

    "e" and a combining accent become one letter, whose range is then that of the "e". CLIP's tokens leave nothing but
    white space uncovered, so whatever else is uncovered belongs to the token before it.
    """
    offsets = list(offsets)
    covered = bytearray(len(text))
    for start, end in offsets:
        covered[start:end] = b"\1" * (end - start)
    extended = []
    for start, end in offsets:
        while end < len(text) and not covered[end] and not text[end].isspace():
            end += 1
        extended.append((start, end))
    return extended


def _moved(
    offsets: Sequence[Range], pieces: Sequence[Range], replacements: Sequence[tuple[int, int, int, int]]
) -> list[Range]:
    """Move ranges from the joined pieces of an instruction into the prompt with its placeholders expanded.

    Parameters
    ----------
    offsets : sequence of (int, int)
        Ranges in the pieces joined by one character each.
    pieces : sequence of (int, int)
        Ranges of the pieces in the prompt.
    replacements : sequence of (int, int, int, int)
        Range of each placeholder in the prompt, and of what replaced it in the expanded prompt, ascending.

    Returns
    -------
    list of (int, int)
    """
    ends = [end for _, end, _, _ in replacements]
    growth = [0, *(new_end - end for _, end, _, new_end in replacements)]
    joined, shifts, place = [], [], 0
    for start, end in pieces:
        joined.append(place)
        shifts.append(start + growth[bisect_right(ends, start)] - place)
        place += end - start + 1
    moves = [shifts[bisect_right(joined, start) - 1] for start, _ in offsets]
    return [(start + move, end + move) for (start, end), move in zip(offsets, moves, strict=True)]


def _window_bounds(words: Sequence[int | None], room: int) -> list[Range]:
    """Divide CLIP's tokens into windows of at most `room`, between words where a word fits into one window."""
    bounds, start = [], 0
    while len(words) - start > room:
        cut = start + room
        while cut > start and words[cut - 1] == words[cut]:
            cut -= 1
        bounds.append((start, cut if cut > start else start + room))
        start = bounds[-1][1]
    return [*bounds, (start, len(words))] if words else []


def _places(spans: Sequence[Range], bounds: Sequence[Range], context: int) -> list[list[int]]:
    """Turn ranges of CLIP's tokens into places in the row's windows, counted from the end.

    A range that crosses into another window is confined to the window that holds most of it, the first of equals.
    """
    starts = [start for start, _ in bounds]
    places = []
    for first, last in spans:
        if first == last:
            places.append([0, 0])
            continue
        touched = range(bisect_right(starts, first) - 1, bisect_right(starts, last - 1))
        window = max(touched, key=lambda number: min(last, bounds[number][1]) - max(first, bounds[number][0]))
        start, end = bounds[window]
        shift = (window - len(bounds)) * context + 1 - start
        places.append([max(first, start) + shift, min(last, end) + shift])
    return places


def _as_list(values: Any) -> list:
    return values if isinstance(values, list) else values.tolist()


def _as_type_of(example: Any, values: list, width: int) -> Any:
    """Convert nested lists (B, n, width) to what `example` is: a tensor, an array, or lists as they are."""
    if isinstance(example, list):
        return values
    tensor = torch.tensor(values, dtype=torch.int64).reshape(len(values), len(values[0]), width)
    return tensor if isinstance(example, torch.Tensor) else tensor.numpy()


IVTPLlavaProcessor.register_for_auto_class("AutoProcessor")
