"""The processor: stock LLaVA's, which also gives the model the instruction in CLIP's tokens.

It adds two inputs to `LlavaProcessor`'s. `clip_input_ids` (B, W, C) int64 is the instruction in windows of CLIP's
context length C. `clip_spans` (B, S, 2) int64 holds for each prompt token the CLIP tokens that share a character with
it (IVTP Eq. 7), as a half-open range over the row's W * C tokens, counted from the end; (0, 0) stands for none, and
(1, 1) for padding, so that padding which is moved later is noticed. Shorter rows of both have zeros on the left, which
is also what left-padding an unknown input gives.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, LlavaProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.utils import cached_file, logging

from .adapter import HUB_ACCESS, naming_adapter
from .configuration_ivtp import IVTPLlavaConfig, is_whole
from .instruction import (
    KNOWN_FORMATS,
    SYSTEM_INSIDE_TURN,
    Range,
    cover_combining,
    move_to_prompt,
    role_markers,
    template_markers,
    user_turns,
    window_bounds,
    window_spans,
)
from .placeholders import COUNTED_BY, complete_processor
from .spelling import spell
from .text_relevance import PADDING_SPAN, overlapping_spans

logger = logging.get_logger(__name__)

LONGEST = 100
"""Most times that a picture may be as long as wide to be scaled; 34 MB at 336 pixels."""
_OF_SIZE = {"size", "crop_size", "do_resize", "do_center_crop"}

_STOCK_ARGUMENTS = (
    "image_processor",
    "tokenizer",
    "patch_size",
    "vision_feature_select_strategy",
    "chat_template",
    "image_token",
    "num_additional_image_tokens",
)


class _PresentComponents:
    """`ProcessorMixin.get_attributes` without the CLIP tokenizer for an instance that has none.

    The mixin checks, saves and prints every component that it lists; none is optional for it.
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
        Tokenizer of CLIP's text tower, in the folder `clip_tokenizer/` of a checkpoint. Without it the processor is a
        stock `LlavaProcessor`.
    instruction_pattern : str, optional
        Regular expression (`.` matches newlines too) for the instruction in a prompt: its first group, or the whole
        match if it has none; every match counts. By default the user turns are found by the role markers of the chat
        template, else by those of the known LLaVA formats; a prompt without role markers is all instruction. Special
        tokens and image placeholders never belong to it.
    clip_inputs : bool, default True
        False: return stock LLaVA's inputs only; the model then reads the same question from the prompt's tokens, with
        the processor saved beside its weights. For clients that hand every input to a function of fixed arguments, as
        TRL's GRPO and RLOO do.
    connector_tokens : int, optional
        Placeholders of an image for a model with a connector: its `config.connector.tokens`. None: one per patch.

    Raises
    ------
    ValueError
        If `connector_tokens` is no whole number of at least 1; if the CLIP tokenizer, or with it the language model's,
        has no character offsets; if the CLIP tokenizer lacks a start or end token or room between them; if
        `instruction_pattern` is not a regular expression.
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
        clip_inputs: bool = True,
        connector_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        if connector_tokens is not None and not (is_whole(connector_tokens) and connector_tokens >= 1):
            raise ValueError(f"connector_tokens={connector_tokens!r}; allowed: an integer of at least 1, or None.")
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
        self.clip_inputs = clip_inputs
        self.connector_tokens = connector_tokens
        self._markers_of_template: dict[str, tuple[str, str] | None] = {}

    @classmethod
    def from_llava(
        cls,
        llava: str | os.PathLike,
        clip_tokenizer: Any = None,
        instruction_pattern: str | None = None,
        connector_tokens: int | None = None,
        **kwargs: Any,
    ) -> "IVTPLlavaProcessor":
        """Join a stock LLaVA processor with CLIP's tokenizer.

        Parameters
        ----------
        llava : str or path
            Folder or Hub id of a LLaVA checkpoint.
        clip_tokenizer : fast tokenizer, str or path, optional
            CLIP's tokenizer, or the folder or Hub id of a CLIP checkpoint. Default: that of `llava`, if it is an IVTP
            checkpoint; a stock LLaVA has none.
        instruction_pattern, connector_tokens
            As for the class.
        **kwargs
            Passed on to `LlavaProcessor.from_pretrained`; access to the Hub (`token`, ...) holds for CLIP too. What an
            old folder lacks for counting an image's placeholders is taken from the model's configuration beside it.

        Returns
        -------
        IVTPLlavaProcessor
        """
        with naming_adapter(llava, **kwargs):
            stock = LlavaProcessor.from_pretrained(llava, **kwargs)
        if isinstance(clip_tokenizer, (str, os.PathLike)):
            access = {name: kwargs[name] for name in HUB_ACCESS if name in kwargs}
            with naming_adapter(clip_tokenizer, **access):
                clip_tokenizer = AutoTokenizer.from_pretrained(clip_tokenizer, **access)
        elif clip_tokenizer is None:
            clip_tokenizer = _stored_clip_tokenizer(llava, **kwargs)
        processor = cls(
            **{name: getattr(stock, name) for name in _STOCK_ARGUMENTS},
            clip_tokenizer=clip_tokenizer,
            instruction_pattern=instruction_pattern,
            connector_tokens=connector_tokens,
        )
        if connector_tokens is None and not any(name in kwargs for name in COUNTED_BY):
            with suppress(OSError):  # a processor without a model beside it is taken as it is
                access = {name: kwargs[name] for name in (*HUB_ACCESS, "revision") if name in kwargs}
                complete_processor(processor, IVTPLlavaConfig.from_pretrained(llava, **access))
        return processor

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, processor_dict: dict | None = None, **kwargs: Any
    ) -> list:
        if "clip_tokenizer" in kwargs:  # the mixin would store it in the config of every other component
            raise ValueError(
                f"IVTPLlavaProcessor.from_llava joins a CLIP tokenizer, got clip_tokenizer={kwargs['clip_tokenizer']!r}"
            )
        with naming_adapter(pretrained_model_name_or_path, **kwargs):
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
        # The mixin would fall back to the language model's own tokenizer, and relevances would be noise.
        found = _stored_clip_tokenizer(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if found is None:
            logger.warning_once(
                f"{pretrained_model_name_or_path} has no clip_tokenizer/, so the image alone guides the pruning, not "
                "the question. To join CLIP's tokenizer: IVTPLlavaProcessor.from_llava(llava, clip_tokenizer=clip) in "
                "Python, `ivtp convert LLAVA --clip CLIP --out FOLDER` on the command line."
            )
        return found

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of an image: LLaVA's, or as many as a connector makes tokens."""
        if self.connector_tokens is None:
            return str(super().replace_image_token(image_inputs, image_idx, **kwargs))
        return str(self.image_token) * self.connector_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        if self.connector_tokens is not None and image_sizes is not None:
            data.num_image_tokens = [self.connector_tokens] * len(image_sizes)
        return data

    @property
    def _adds_inputs(self) -> bool:
        return self.clip_tokenizer is not None and self.clip_inputs

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the processor returns for the model."""
        if not self._adds_inputs:
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
            `LlavaProcessor`'s, and `clip_input_ids` (B, W, C) and `clip_spans` (B, S, 2), int64, as the module
            describes them, of the type of `input_ids`: tensors, arrays or lists.

        Raises
        ------
        ValueError
            For what `LlavaProcessor` rejects, and for options that leave a token without a range in the prompt
            (`text_pair`, `is_split_into_words`, `return_overflowing_tokens`).
        """
        own_size = {*kwargs, *(kwargs.get("images_kwargs") or {})} & _OF_SIZE
        images = images if own_size else self._crop_all(images, kwargs.get("input_data_format"))
        if not self._adds_inputs or text is None:
            return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        text_kwargs = dict(kwargs.pop("text_kwargs", None) or {})
        kwargs |= {"images": images, "text": text, "videos": videos, "audio": audio, "text_kwargs": text_kwargs}
        for name in ("text_pair", "is_split_into_words", "return_overflowing_tokens"):
            if value := kwargs.get(name) or text_kwargs.get(name):
                raise ValueError(f"{name} is not possible together with a CLIP tokenizer, got {value!r}")
        if kwargs.get("sanitize_control_tokens") or text_kwargs.get("sanitize_control_tokens"):
            logger.warning_once(
                "sanitize_control_tokens=True leaves no character offsets, so the instruction cannot be matched with "
                "CLIP's tokens: pruning is guided by the image alone."
            )
            return super().__call__(**kwargs)
        returned = {
            output: any([kwargs.pop(option, False), text_kwargs.pop(option, False)])
            for output, option in (
                ("offset_mapping", "return_offsets_mapping"),
                ("text_replacement_offsets", "return_text_replacement_offsets"),
            )
        }
        text_kwargs["return_offsets_mapping"] = True
        outputs = super().__call__(**kwargs, return_text_replacement_offsets=True)
        windows, spans = self._clip_inputs(
            [text] if isinstance(text, str) else text,
            outputs["text_replacement_offsets"],
            _as_list(outputs["input_ids"]),
            _as_list(outputs["offset_mapping"]),
            _as_list(outputs["attention_mask"]) if "attention_mask" in outputs else None,
        )
        for output, wanted in returned.items():
            if not wanted:
                del outputs[output]
        outputs["clip_input_ids"] = _as_type_of(outputs["input_ids"], windows, _context_length(self.clip_tokenizer))
        outputs["clip_spans"] = _as_type_of(outputs["input_ids"], spans, 2)
        return outputs

    def read_instruction(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> BatchFeature:
        """Read the instruction from the tokens of prompts, for inputs that come without it.

        The tokens are spelled out, not decoded and encoded again, so answers that were sampled token by token, or
        appended to a prompt, move nothing.

        Parameters
        ----------
        input_ids : int64 Tensor (B, S)
            Prompts with their image placeholders expanded; answers may follow.
        attention_mask : Tensor (B, S), optional
            0 for padding.

        Returns
        -------
        BatchFeature
            `clip_input_ids` (B, W, C) and `clip_spans` (B, S, 2), int64, on the CPU.

        Raises
        ------
        ValueError
            Without a CLIP tokenizer.
        """
        if self.clip_tokenizer is None:
            raise ValueError("read_instruction needs clip_tokenizer, and this processor has none.")
        whole = input_ids.tolist()
        masks = [[1] * len(row) for row in whole] if attention_mask is None else attention_mask.tolist()
        image = self.tokenizer.convert_tokens_to_ids(self.image_token)
        rows, valid, spelled, places = [], [], [], []
        for tokens, mask in zip(whole, masks, strict=True):
            # One placeholder of an image says as much as all of them, which would be most of the text.
            kept, places_of = _without_runs(tokens, mask, image)
            rows.append([tokens[column] for column in kept])
            valid.append([mask[column] for column in kept])
            names = self.tokenizer.convert_ids_to_tokens(rows[-1])
            spelled.append(spell([name or "" if here else "" for name, here in zip(names, valid[-1], strict=True)]))
            places.append(places_of)
        texts, offsets = zip(*spelled, strict=True)
        windows, found = self._clip_inputs(texts, [[]] * len(rows), rows, offsets, valid)
        spans = [[row[place] for place in columns] for row, columns in zip(found, places, strict=True)]
        example = torch.empty(0)
        return BatchFeature(
            {
                "clip_input_ids": _as_type_of(example, windows, _context_length(self.clip_tokenizer)),
                "clip_spans": _as_type_of(example, spans, 2),
            }
        )

    def turn_ends(self, input_ids: Sequence[int]) -> list[int]:
        """Find for each token of a prompt where the user turn ends that it stands in, with the marker that closes it.

        Parameters
        ----------
        input_ids : sequence of int
            A prompt without padding.

        Returns
        -------
        list of int
            The column after the turn. The number of tokens for those outside of turns, in one that is still open, and
            for all if `instruction_pattern` finds the instruction.
        """
        length = len(input_ids)
        text, offsets = spell([token or "" for token in self.tokenizer.convert_ids_to_tokens(list(input_ids))])
        markers = role_markers(text, self._formats()) if self.instruction_pattern is None else []
        ends, start = [length] * length, None if any(opens for opens, _, _ in markers) else 0
        for opens, _, last in markers:
            if start is not None:
                after = next((column for column, (first, _) in enumerate(offsets) if first >= last), length)
                for column, (first, _) in enumerate(offsets):
                    if start <= first < last:
                        ends[column] = after
            start = last if opens else None
        return ends

    def instruction_ranges(self, text: str) -> list[Range]:
        """Find the characters of a prompt that the person wrote.

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
            turns = user_turns(text, self._formats())
        foreign = re.compile(f"{self._special_tokens()}|{SYSTEM_INSIDE_TURN}", re.DOTALL)
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
        valid: Sequence[Sequence[int]] | None,
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
        valid : sequence (per row) of sequence of int, or None
            0 for padding; None: nothing says.

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
            split_special_tokens=True,  # a person's words are text, even if they look like CLIP's end token
            return_offsets_mapping=True,
            verbose=False,
        )
        context = _context_length(self.clip_tokenizer)
        windows, spans = [], []
        for row, pieces in enumerate(ranges):
            bounds = window_bounds(encoded.word_ids(row), context - 2)
            covered = cover_combining(instructions[row], encoded["offset_mapping"][row])
            placeholders = [(*item["span"], *item["new_span"]) for item in replacements[row]]
            in_prompt = move_to_prompt(covered, pieces, placeholders)
            tokens = self.tokenizer.convert_ids_to_tokens(input_ids[row])
            # Metaspace tokenizers begin a text with a mark of their own, whose range is the first character's.
            own = [
                (0, 0) if not (token or "").strip("▁") else pair
                for token, pair in zip(tokens, offsets[row], strict=True)
            ]
            windows.append([self._window(encoded["input_ids"][row][slice(*bound)]) for bound in bounds])
            spans.append(window_spans(overlapping_spans(own, in_prompt), bounds, context))
            for column in () if valid is None else (at for at, here in enumerate(valid[row]) if not here):
                spans[row][column] = list(PADDING_SPAN)
        longest = max(1, *map(len, windows))
        return [[[0] * context] * (longest - len(row)) + row for row in windows], spans

    def _window(self, tokens: list[int]) -> list[int]:
        """Put at most C - 2 of CLIP's tokens between start and end token and pad them to C."""
        clip = self.clip_tokenizer
        pad = clip.eos_token_id if clip.pad_token_id is None else clip.pad_token_id
        window = [clip.bos_token_id, *tokens, clip.eos_token_id]
        return window + [pad] * (_context_length(clip) - len(window))

    def _special_tokens(self) -> str:
        """Return a regular expression for the prompt's special tokens, image placeholders included."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        names = {self.image_token, *self.tokenizer.all_special_tokens, *added}
        return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))

    def crop_thin(self, image: Any, channels: str | ChannelDimension | None = None) -> Any:
        """Crop a long and thin picture, whose ends the model never sees, before it is scaled.

        CLIP's processor scales the short edge to 336 pixels and then crops the middle: 1 x 20,000 pixels would become
        336 x 6,720,000. From a picture more than `LONGEST` times as long as wide, as much is cut off at both ends as
        leaves every pixel of the middle where it was.

        Parameters
        ----------
        image : PIL image, array or tensor
            Arrays and tensors may be pictures (3 dimensions) or batches (4).
        channels : {"channels_first", "channels_last"}, optional
            Where an array has its channels. Default: where transformers finds 1 or 3 of them.
        """
        size, crop = self.image_processor.size, self.image_processor.crop_size
        edge = size.get("shortest_edge") if self.image_processor.do_resize else None
        rows_axis = _rows_axis(image, channels)
        if rows_axis is None or not (edge and self.image_processor.do_center_crop):
            return image
        is_array = not isinstance(image, Image.Image)
        height, width = image.shape[rows_axis : rows_axis + 2] if is_array else (image.height, image.width)
        short, long = sorted((height, width))
        if not short:
            return image
        # Where the length that is cut off scales to whole pixels, the middle does not move.
        step = short // math.gcd(short, edge)
        margin = (long - LONGEST * short) // 2 // step * step
        if margin <= 0 or max(crop["height"], crop["width"]) > edge:
            return image
        left, top = (margin, 0) if width == long else (0, margin)
        if is_array:
            return image[(slice(None),) * rows_axis + (slice(top, height - top), slice(left, width - left))]
        return image.crop((left, top, width - left, height - top))

    def as_seen(self, image: Image.Image) -> Image.Image:
        """Scale and crop a picture to the pixels that the model sees; to process it again changes nothing."""
        cropped = self.crop_thin(image)
        pixels = self.image_processor(cropped, do_rescale=False, do_normalize=False, return_tensors="np")
        return Image.fromarray(pixels["pixel_values"][0].astype("uint8").transpose(1, 2, 0))

    def _crop_all(self, images: Any, channels: Any) -> Any:
        if isinstance(images, list | tuple):
            return [self._crop_all(image, channels) for image in images]
        return self.crop_thin(images, channels)

    def is_whole_prompt(self, text: str) -> bool:
        """Return whether a text has role markers, so that it needs no chat template.

        A text that only begins with a user's marker may be a question, unless it has a place for an image.
        """
        markers = role_markers(text, self._formats())
        return bool(markers) and (self.image_token in text or not all(opens for opens, _, _ in markers))

    def split_at_images(self, text: str) -> list[str | None]:
        """Split a text at its image tokens, for a chat template; None stands for an image.

        Line breaks at an image are left out, since templates set their own, and white space at the text's ends.
        """
        pieces: list[str | None] = []
        for piece in re.split(rf"\n*{re.escape(self.image_token)}\n*", text.strip()):
            words = piece if any(pieces) else piece.lstrip()
            pieces += [words, None] if words.strip() else [None]
        return pieces[:-1]

    def _formats(self) -> list[tuple[str, str]]:
        """Return the role markers of the chat templates, and `KNOWN_FORMATS` after them."""
        templates = self.chat_template or getattr(self.tokenizer, "chat_template", None) or {}
        known = self._markers_of_template
        formats = []
        for template in [templates] if isinstance(templates, str) else templates.values():
            if template not in known:
                known[template] = template_markers(partial(self._render, template), self._special_tokens())
            if (markers := known[template]) is not None:
                formats.append(markers)
        return [*formats, *KNOWN_FORMATS]

    def _render(self, template: str, chat: list[Any], prompted: bool) -> str:
        return self.apply_chat_template(chat, chat_template=template, add_generation_prompt=prompted)


def _stored_clip_tokenizer(source: str | os.PathLike, *, subfolder: str = "", **kwargs: Any) -> Any:
    """Load the CLIP tokenizer of an IVTP checkpoint; None if there is none."""
    folder = f"{subfolder}/clip_tokenizer" if subfolder else "clip_tokenizer"
    access = {name: kwargs[name] for name in (*HUB_ACCESS, "revision") if name in kwargs}
    found = cached_file(
        source,
        "tokenizer_config.json",
        subfolder=folder,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **access,
    )
    return None if found is None else AutoTokenizer.from_pretrained(source, subfolder=folder, **access)


def _check_tokenizers(tokenizer: Any, clip_tokenizer: Any) -> None:
    """Raise ValueError for tokenizers that an instruction cannot be aligned with."""
    for name, value in (("clip_tokenizer", clip_tokenizer), ("tokenizer", tokenizer)):
        if not isinstance(value, PreTrainedTokenizerBase) or not value.is_fast:
            raise ValueError(
                f"{name} must be a fast tokenizer (one that knows character offsets), "
                f"got {type(value).__name__}: {value!r}"
            )
    if clip_tokenizer.bos_token_id is None or clip_tokenizer.eos_token_id is None:
        raise ValueError(f"clip_tokenizer must have a start and an end token, got {clip_tokenizer!r}")
    if len(clip_tokenizer) < 300:  # bytes and end marks alone are 512
        raise ValueError(f"clip_tokenizer knows {len(clip_tokenizer)} words only: is its tokenizer.json missing?")
    if _context_length(clip_tokenizer) < 3:
        raise ValueError(f"clip_tokenizer must take 3 tokens or more, got {clip_tokenizer.model_max_length}")


def _context_length(clip_tokenizer: Any) -> int:
    """Return CLIP's context length; a tokenizer that was saved without it has a huge number instead."""
    return int(clip_tokenizer.model_max_length) if clip_tokenizer.model_max_length < 1_000_000 else 77


def _without_runs(tokens: Sequence[int], mask: Sequence[int], image_token: int) -> tuple[list[int], list[int]]:
    """Leave out image tokens that follow another: the columns that stay, and for every column its place among them."""
    kept: list[int] = []
    places = []
    for column, pair in enumerate(zip(tokens, mask, strict=True)):
        if pair[0] != image_token or column == 0 or pair != (tokens[column - 1], mask[column - 1]):
            kept.append(column)
        places.append(len(kept) - 1)
    return kept, places


def _rows_axis(image: Any, channels: str | ChannelDimension | None) -> int | None:
    """Return the axis of a picture's rows, before that of its columns; None for what is no picture."""
    if isinstance(image, Image.Image):
        return 0
    if not isinstance(image, np.ndarray | torch.Tensor) or image.ndim not in (3, 4):
        return None
    if channels is None:
        with suppress(ValueError):  # the image processor says so, too
            channels = infer_channel_dimension_format(image)
    return None if channels is None else image.ndim - (2 if channels == ChannelDimension.FIRST else 3)


def _as_list(values: Any) -> list:
    return values if isinstance(values, list) else values.tolist()


def _as_type_of(example: Any, values: list, width: int) -> Any:
    """Convert nested lists (B, n, width) to what `example` is: a tensor, an array, or lists as they are."""
    if isinstance(example, list):
        return values
    tensor = torch.tensor(values, dtype=torch.int64).reshape(len(values), len(values[0]), width)
    return tensor if isinstance(example, torch.Tensor) else tensor.numpy()


IVTPLlavaProcessor.register_for_auto_class("AutoProcessor")
