"""From a prompt to what the decoder prunes: placeholders, features and the pseudo CLS (IVTP Sec. 3.3)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .configuration_ivtp import IVTPPruningConfig
from .instruction_cache import InstructionCache
from .labels import CHOOSE, TEXT_TOWER, label, labelled
from .language_ivtp import VisualPrompt
from .pruner import Choice, FeatureStep, IVTPPruner, PromptStep, Pruner, full_precision
from .schedule import PruningPlan
from .text_relevance import instruction_tokens, key_tokens, map_relevance, pseudo_cls, text_similarity, token_relevance
from .trace import TraceRecorder
from .visual_sequence import VisualSequence, count_rows, locate_images, per_row, uncounted_rows


@dataclass(frozen=True)
class PromptIndex:
    """A prompt as the host knows it.

    Attributes
    ----------
    sequence : VisualSequence
        Its tokens, with nothing dropped yet.
    windows : tuple of tuple of int, or None
        The instruction's windows in CLIP's tokens, row after row, without padding. None: not read.
    """

    sequence: VisualSequence
    windows: tuple[tuple[int, ...], ...] | None = None


def index_prompt(
    placeholders: torch.Tensor,
    valid: torch.Tensor | None,
    *,
    images: int,
    patches: int,
    drafted: int = 0,
    clip_input_ids: torch.Tensor | None = None,
    known: PromptIndex | None = None,
) -> PromptIndex:
    """Read a prompt. The host waits for the device, unless this is being compiled.

    Parameters
    ----------
    placeholders : bool Tensor (B, S)
        Where an image token stands.
    valid : bool Tensor (B, S) or None
        The 2D attention mask; None: no padding.
    images : int
        Images that came with the prompt, over all rows.
    patches : int
        Patches of an image, N.
    drafted : int, default 0
        Last columns that an assistant proposes.
    clip_input_ids : int64 Tensor (B, W, C), optional
        To be read, too.
    known : PromptIndex, optional
        What was read before compiled code began; without it, every row is to have as many images.

    Raises
    ------
    ValueError
        If placeholders and images do not match; when compiled, if the images do not divide among the rows.
    """
    if drafted:
        # What is looked up in the prompt may be image tokens; in the answer they stand for no image.
        answered = torch.arange(placeholders.shape[1], device=placeholders.device) >= placeholders.shape[1] - drafted
        placeholders = placeholders & ~answered
    if torch.compiler.is_compiling():
        if known is not None:
            # Nothing else of it is looked at: a graph is to serve prompts of other words and paddings.
            per_row = tuple(row.images for row in known.sequence.rows)
            valid = None if known.sequence.valid is None else valid
        elif images % placeholders.shape[0]:
            raise ValueError(
                f"{images} images among {placeholders.shape[0]} rows: a prompt that is compiled to one graph needs as "
                "many images in every row. Compile decoding steps only, as generate does with a static cache."
            )
        else:
            per_row = (images // placeholders.shape[0],) * placeholders.shape[0]
        rows = uncounted_rows(placeholders if valid is None else placeholders & valid, per_row, patches)
        sequence = locate_images(placeholders, valid, rows, patches, counted=False)
        return PromptIndex(replace(sequence, drafted=drafted))
    rows = count_rows(placeholders, valid, images, patches)
    if all(row.tokens == placeholders.shape[1] for row in rows):
        valid = None
    sequence = replace(locate_images(placeholders, valid, rows, patches), drafted=drafted)
    windows = None
    if clip_input_ids is not None:
        windows = tuple(_without_padding(window) for row in clip_input_ids.tolist() for window in row)
    return PromptIndex(sequence, windows)


def _without_padding(window: list[int]) -> tuple[int, ...]:
    """A window up to the first of the equal tokens it ends with: CLIP is causal, so what follows changes nothing."""
    end = len(window)
    while end > 1 and window[end - 2] == window[-1]:
        end -= 1
    return tuple(window[:end])


logger = logging.get_logger(__name__)


class PromptPruning:
    """Mixin for the model that has both towers."""

    config: Any
    clip_text_model: Any
    get_input_embeddings: Any
    training: bool
    instruction_cache: InstructionCache
    """CLIP's features of the last instructions; not asked in training."""
    applied_pruner: Pruner | None = None
    """What prunes instead of the model's own options, for a while; `modeling_ivtp.methods` sets it."""

    @property
    def pruner(self) -> Pruner:
        """What prunes: the model's own options, unless a method was applied."""
        return self.applied_pruner or IVTPPruner(self.config.pruning)

    def plan(self) -> PruningPlan | None:
        """What stays where; None if nothing is to be dropped.

        Raises
        ------
        ValueError
            If the options, or the applied method, do not fit the model.
        """
        return self.pruner.plan(self.config, self.config.num_patches)

    @property
    def has_text_tower(self) -> bool:
        """Whether CLIP's text tower is part of this model."""
        return hasattr(self, "clip_text_model")

    def read(
        self,
        *,
        plan: PruningPlan,
        images: int,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: Any,
        past: int,
        clip_input_ids: torch.Tensor | None,
        drafted: int = 0,
        known: PromptIndex | None = None,
    ) -> PromptIndex:
        """What the host has to know of a prompt; see `index_prompt`."""
        placeholders = self.placeholders(input_ids, inputs_embeds)
        length, valid = placeholders.shape[1], None
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(
                    f"Under pruning attention_mask must be 2D (batch, length), not {attention_mask.dim()}D."
                )
            if attention_mask.shape[1] < past + length:
                raise ValueError(
                    f"attention_mask has {attention_mask.shape[1]} columns; the cache and the new tokens need "
                    f"{past} + {length}."
                )
            valid = attention_mask[:, past : past + length].to(device=placeholders.device, dtype=torch.bool)
        pruner = self.pruner
        words = pruner.needs.patch_embeds or (
            pruner.needs.pseudo_cls and pruner.needs.options.guidance == "clip" and self.has_text_tower
        )
        return index_prompt(
            placeholders,
            valid,
            images=images,
            patches=plan.patches,
            drafted=drafted,
            clip_input_ids=clip_input_ids if words else None,
            known=known,
        )

    def visual_prompt(
        self,
        *,
        plan: PruningPlan,
        prompt_index: PromptIndex,
        encoded: Any,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None,
        past: int,
        clip_input_ids: torch.Tensor | None,
        clip_spans: torch.Tensor | None,
        recorder: TraceRecorder | None,
    ) -> tuple[VisualPrompt, torch.Tensor]:
        """Leave out the placeholders of dropped patches, fill in the features, and make the pseudo CLS."""
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        whole = prompt_index.sequence.to(device)
        kept, features = _by_row(encoded, whole)
        sequence, index = whole.keep(kept, ragged=not plan.exact)
        left = inputs_embeds.gather(1, index[..., None].expand(-1, -1, inputs_embeds.shape[-1]))
        pruner = self.pruner
        observers: dict[str, Any] = {}
        spans = _spans_of(clip_spans, length, past, inputs_embeds)
        if pruner.needs.pseudo_cls:
            reference, relevance, keys = self._reference(
                encoded, whole, inputs_embeds, clip_input_ids, spans, prompt_index.windows
            )
            if recorder is not None:
                recorder.prompt(input_ids, whole, relevance, keys)
            if position_ids is None:
                position_ids = (torch.arange(length, device=device) + past)[None]
            last_patch = whole.columns[..., -1].clamp_max(length - 1)
            ends = position_ids.to(device).expand(last_patch.shape[0], -1).gather(1, last_patch) + 1
            pool = pruner.needs.options.pseudo_cls == "pool" and keys is not None
            observers = {"reference": reference, "end_positions": ends, "key_tokens": keys if pool else None}
        elif recorder is not None:
            recorder.prompt(input_ids, whole, None, None)
        if plan.prompt is not None and plan.prompt < sequence.patches.shape[2]:
            choice = self._in_prompt(plan.prompt, features, encoded, whole, clip_input_ids, prompt_index.windows)
            if recorder is not None:
                recorder.chosen("prompt", plan.prompt, sequence.patches, choice)
            features = choice.of(features)
            sequence, index = sequence.keep(choice.kept, choice.ragged)
            left = left.gather(1, index[..., None].expand(-1, -1, left.shape[-1]))
        left = sequence.with_visual(left, features.to(left.device))
        with torch.no_grad(), label(CHOOSE):
            state = pruner.prepare(sequence, left)
        prompt = VisualPrompt(
            sequence=sequence,
            pruner=pruner,
            groups=plan.decoder,
            state=state,
            scores=None if recorder is None else recorder.decoder,
            **observers,
        )
        return prompt, left

    @labelled(CHOOSE)
    def _in_prompt(
        self,
        keep: int,
        features: torch.Tensor,
        encoded: Any,
        whole: VisualSequence,
        clip_input_ids: torch.Tensor | None,
        read: tuple[tuple[int, ...], ...] | None,
    ) -> Choice:
        """Ask the pruner before the decoder; `read` are the windows of `clip_input_ids` as the host knows them."""
        text = windows = patches = None
        if self.pruner.needs.patch_embeds:
            if clip_input_ids is None:
                raise ValueError(
                    "This method compares patches with the instruction, and clip_input_ids is missing: prepare inputs "
                    "with IVTPLlavaProcessor and a CLIP tokenizer."
                )
            windows = clip_input_ids.any(-1)
            tokens = self.text_features(clip_input_ids, read).unflatten(1, clip_input_ids.shape[1:])
            # As transformers finds the token that stands for a text, old configurations included.
            eos = self.clip_text_model.config.eos_token_id
            ends = clip_input_ids.argmax(-1) if eos == 2 else (clip_input_ids == eos).int().argmax(-1)
            place = ends.to(tokens.device)[..., None, None].expand(-1, -1, 1, tokens.shape[-1])
            text = tokens.gather(2, place)[:, :, 0].to(features.device)
            patches = per_row(encoded.patch_embeds.to(features.device), whole)
        with torch.no_grad(), full_precision(features.device):
            return self.pruner.in_prompt(PromptStep(keep, features, patches, text, windows))

    def placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where an image token stands, as a number or as its embedding: bool Tensor (B, S)."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        assert inputs_embeds is not None
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @labelled(CHOOSE)
    def _reference(
        self,
        encoded: Any,
        whole: Any,
        inputs_embeds: torch.Tensor,
        clip_input_ids: torch.Tensor | None,
        clip_spans: torch.Tensor | None,
        windows: tuple[tuple[int, ...], ...] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The pseudo CLS of every image (Eq. 5 to 8): (B, M, d), relevance (B, M, S) and key tokens (B, M, S)."""
        pruning: IVTPPruningConfig = self.pruner.needs.options
        device = inputs_embeds.device
        fallback = per_row(encoded.cls_features.to(device), whole).to(inputs_embeds.dtype)
        if pruning.guidance == "visual_cls" or not self._has_guidance(clip_input_ids, clip_spans):
            return fallback, None, None
        assert clip_spans is not None
        with torch.no_grad():
            if pruning.guidance == "mean_text":
                words = instruction_tokens(clip_spans)[:, None].expand(-1, whole.image_present.shape[1], -1)
                relevance, keys = None, words
            elif pruning.guidance == "text_similarity":
                relevance = text_similarity(inputs_embeds, fallback, clip_spans)
                keys = key_tokens(relevance, pruning.relevance_threshold)
            else:
                assert clip_input_ids is not None
                if encoded.image_embeds is None:
                    raise ValueError(
                        'mm_encoder_outputs holds no image_embeds, which guidance="clip" needs: encode the images with '
                        "get_image_features under the same pruning options."
                    )
                text = self.text_features(clip_input_ids, windows)
                embeds = per_row(encoded.image_embeds, whole).to(device)
                relevance = map_relevance(token_relevance(text.to(device), embeds), clip_spans)
                keys = key_tokens(relevance, pruning.relevance_threshold)
            if whole.valid is not None:
                keys = keys & whole.valid[:, None]
            return pseudo_cls(inputs_embeds, keys, fallback), relevance, keys

    @labelled(TEXT_TOWER)
    def text_features(
        self, clip_input_ids: torch.Tensor, windows: tuple[tuple[int, ...], ...] | None = None
    ) -> torch.Tensor:
        """CLIP's features of the instruction's tokens (Eq. 5): (B, W, C) to (B, W x C, P).

        With `windows`, which the host has read, padding is not run through the tower and gets zeros, and outside of
        training what is known is not run again.
        """
        tower, ids = self.clip_text_model, clip_input_ids.flatten(0, 1)

        def encode(ids: torch.Tensor) -> torch.Tensor:
            return tower.text_projection(tower.text_model(input_ids=ids).last_hidden_state)

        if windows is None:
            features = encode(ids)
        else:
            cache = InstructionCache(0) if self.training else self.instruction_cache
            features = cache.features(tower, ids, windows, encode)
        return features.unflatten(0, clip_input_ids.shape[:2]).flatten(1, 2)

    def _has_guidance(self, clip_input_ids: torch.Tensor | None, clip_spans: torch.Tensor | None) -> bool:
        guidance = self.pruner.needs.options.guidance
        missing = []
        if clip_spans is None:
            missing.append("clip_spans")
        if guidance == "clip":
            if clip_input_ids is None:
                missing.append("clip_input_ids")
            if not self.has_text_tower:
                missing.append("CLIP's text tower (from_llava(..., clip=...) joins it)")
        if not missing:
            return True
        message = (
            f'guidance="{guidance}" needs {" and ".join(missing)}, so the question cannot guide the pruning. Prepare '
            "inputs with IVTPLlavaProcessor and a CLIP tokenizer."
        )
        if self.pruner.needs.options.strict:
            raise ValueError(message)
        logger.warning_once(message + " The image's own CLS token is the reference instead (Eq. 8).")
        return False


def choose_features(
    pruner: Pruner, step: FeatureStep, recorder: TraceRecorder | None
) -> tuple[Choice | None, torch.Tensor, torch.Tensor]:
    """Ask the pruner about features: the choice, None where all stay; the patches left (I, k'), and their features."""
    if step.keep >= step.patches.shape[1]:
        return None, step.patches, step.projected
    with torch.no_grad(), full_precision(step.features.device), label(CHOOSE):
        choice = pruner.in_features(step)
    for record in step.records.values():
        record.seal()
    if recorder is not None:
        recorder.chosen("features", step.keep, step.patches, choice)
    patches = step.patches
    if choice.ragged:
        patches = nn.functional.pad(patches, (0, 1), value=step.grid[0] * step.grid[1])
    return choice, patches.gather(1, choice.kept), step.apply(choice)


def _by_row(encoded: Any, whole: VisualSequence) -> tuple[torch.Tensor, torch.Tensor]:
    """The patches that images come with, and their features, by row: int64 (B, M, k) and (B, M, k, d)."""
    device = whole.columns.device
    images = list(encoded.pooler_output)
    alike = len({image.shape[0] for image in images}) == 1
    features = (torch.stack(images) if alike else nn.utils.rnn.pad_sequence(images, batch_first=True)).to(device)
    return per_row(encoded.kept_patches.to(device), whole), per_row(features, whole)


def _spans_of(spans: torch.Tensor | None, length: int, past: int, like: torch.Tensor) -> torch.Tensor | None:
    """The part of `clip_spans` that speaks of the new tokens: (B, length, 2).

    Spans may cover the conversation from its start, the new tokens, or the last of them; they end where the tokens end.
    """
    if spans is None:
        return None
    if spans.dim() != 3 or spans.shape[0] != like.shape[0] or spans.shape[2] != 2:
        raise ValueError(f"clip_spans has shape {tuple(spans.shape)}; expected ({like.shape[0]}, tokens, 2).")
    if spans.shape[1] > past + length:
        raise ValueError(f"clip_spans speaks of {spans.shape[1]} tokens; there are {past + length}.")
    spans = spans[:, -length:].to(like.device)
    return nn.functional.pad(spans, (0, 0, length - spans.shape[1], 0))
