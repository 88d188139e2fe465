"""From a prompt to what the decoder prunes: image tokens, features and the pseudo CLS (IVTP Sec. 3.3)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .labels import CHOOSE, label, labelled
from .pruner import Choice, FeatureStep, PromptStep, Pruner, full_precision
from .schedule import PruningPlan
from .text_relevance import (
    instruction_tokens,
    key_tokens,
    map_relevance,
    misplaced_spans,
    pseudo_cls,
    text_similarity,
    token_relevance,
)
from .trace import TraceRecorder
from .visual_prompt import PseudoCLSTokens, VisualPrompt
from .visual_sequence import VisualSequence, count_rows, locate_images, per_row, uncounted_rows

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PromptInputs:
    """The tensors of a prompt, as `forward` got them.

    Attributes
    ----------
    input_ids : int64 Tensor (B, S) or None
    inputs_embeds : Tensor (B, S, d) or None
        One of the two is given.
    attention_mask : Tensor (B, at least past + S) or None
        None: no padding.
    position_ids : int64 Tensor (B or 1, S) or None
    clip_input_ids : int64 Tensor (B, W, C) or None
        The instruction in CLIP's tokens.
    clip_spans : int64 Tensor (B, up to past + S, 2) or None
        Which of them overlap each token of the prompt, counted from the end.
    past : int, default 0
        Tokens in the cache before the prompt.
    drafted : int, default 0
        Last columns that an assistant proposes: they are no words of the prompt, and choose nothing.
    """

    input_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    attention_mask: Any = None
    position_ids: torch.Tensor | None = None
    clip_input_ids: torch.Tensor | None = None
    clip_spans: torch.Tensor | None = None
    past: int = 0
    drafted: int = 0

    def __post_init__(self) -> None:
        if (self.input_ids is None) == (self.inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

    @property
    def length(self) -> int:
        """New tokens, S."""
        tokens = self.input_ids if self.input_ids is not None else self.inputs_embeds
        assert tokens is not None
        return tokens.shape[1]

    def valid_tokens(self, device: torch.device) -> torch.Tensor | None:
        """Return which new tokens are no padding: bool (B, S), or None if nothing says.

        Raises
        ------
        ValueError
            If the mask is not 2D, or too short.
        """
        mask = self.attention_mask
        if mask is None:
            return None
        if mask.dim() != 2:
            raise ValueError(f"Under pruning attention_mask must be 2D (batch, length), not {mask.dim()}D.")
        if mask.shape[1] < self.past + self.length:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns; the cache and the new tokens need {self.past} + "
                f"{self.length}."
            )
        return mask[:, self.past : self.past + self.length].to(device=device, dtype=torch.bool)

    def new_spans(self, like: torch.Tensor) -> torch.Tensor | None:
        """Return the part of `clip_spans` that belongs to the new tokens: (B, S, 2), on the device of `like`.

        Spans may cover the conversation from its start, the new tokens, or the last of them; they end where the tokens
        end.

        Raises
        ------
        ValueError
            If their shape fits neither.
        """
        spans = self.clip_spans
        if spans is None:
            return None
        if spans.dim() != 3 or spans.shape[0] != like.shape[0] or spans.shape[2] != 2:
            raise ValueError(f"clip_spans has shape {tuple(spans.shape)}; expected ({like.shape[0]}, tokens, 2).")
        if spans.shape[1] > self.past + self.length:
            raise ValueError(f"clip_spans covers {spans.shape[1]} tokens; there are {self.past + self.length}.")
        spans = spans[:, -self.length :].to(like.device)
        return nn.functional.pad(spans, (0, 0, self.length - spans.shape[1], 0))


@dataclass(frozen=True)
class PromptIndex:
    """Facts about a prompt on the host: read once, before the device has work, so that nothing later waits for them.

    Attributes
    ----------
    sequence : VisualSequence
        The prompt's tokens, with nothing dropped yet.
    windows : tuple of tuple of int, or None
        The instruction's windows in CLIP's tokens, row after row, without padding. None: not read.
    misplaced : bool, default False
        Whether `clip_spans` do not belong to the prompt's tokens.
    """

    sequence: VisualSequence
    windows: tuple[tuple[int, ...], ...] | None = None
    misplaced: bool = False


def index_prompt(
    placeholders: torch.Tensor,
    valid: torch.Tensor | None,
    *,
    images: int,
    patches: int,
    drafted: int = 0,
    clip_input_ids: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
    known: PromptIndex | None = None,
) -> PromptIndex:
    """Find images and words of a prompt. The host waits for the device, unless this is being compiled.

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
        The instruction, to be read too.
    spans : int64 Tensor (B, S, 2), optional
        Which of its tokens overlap each of the prompt's; to be checked.
    known : PromptIndex, optional
        The index that was made before compiled code began; without it, every row needs as many images.

    Raises
    ------
    ValueError
        If placeholders and images do not match; when compiled, if the images do not divide among the rows.
    """
    if drafted:
        # Prompt lookup may propose image tokens; in an answer they stand for no image.
        answer = torch.arange(placeholders.shape[1], device=placeholders.device) >= placeholders.shape[1] - drafted
        placeholders = placeholders & ~answer
    if torch.compiler.is_compiling():
        return _index_compiled(placeholders, valid, images, patches, drafted, known)
    flags = None if spans is None else misplaced_spans(spans, placeholders, valid)
    rows, misplaced = count_rows(placeholders, valid, images, patches, flags)
    if all(row.tokens == placeholders.shape[1] for row in rows):
        valid = None
    sequence = replace(locate_images(placeholders, valid, rows, patches), drafted=drafted)
    windows = None
    if clip_input_ids is not None:
        windows = instruction_windows(clip_input_ids)
    return PromptIndex(sequence, windows, misplaced)


def _index_compiled(
    placeholders: torch.Tensor,
    valid: torch.Tensor | None,
    images: int,
    patches: int,
    drafted: int,
    known: PromptIndex | None,
) -> PromptIndex:
    """Index a prompt by shapes alone, so that one graph serves prompts of other words and paddings."""
    if known is not None:
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


def instruction_windows(clip_input_ids: torch.Tensor) -> tuple[tuple[int, ...], ...] | None:
    """Read the windows (B, W, C) of an instruction, row after row, without padding; None while this is compiled."""
    if torch.compiler.is_compiling():
        return None
    return tuple(_without_padding(window) for row in clip_input_ids.tolist() for window in row)


def window_ends(clip_text_config: Any, clip_input_ids: torch.Tensor) -> torch.Tensor:
    """Find the token that stands for a whole text in each window (..., C), as transformers does: int64 (...)."""
    eos = clip_text_config.eos_token_id
    return clip_input_ids.argmax(-1) if eos == 2 else (clip_input_ids == eos).int().argmax(-1)  # 2: old configurations


def _without_padding(window: list[int]) -> tuple[int, ...]:
    """Cut a window after the first of the equal tokens it ends with: CLIP is causal, so the rest changes nothing."""
    end = len(window)
    while end > 1 and window[end - 2] == window[-1]:
        end -= 1
    return tuple(window[:end])


def build_prompt(
    model: Any,
    prompt: PromptInputs,
    index: PromptIndex,
    encoded: Any,
    inputs_embeds: torch.Tensor,
    plan: PruningPlan,
    recorder: TraceRecorder | None = None,
) -> tuple[VisualPrompt, torch.Tensor]:
    """Leave out the placeholders of dropped patches, fill in the features, and make the pseudo CLS.

    Parameters
    ----------
    model : IVTPLlavaModel
    prompt : PromptInputs
    index : PromptIndex
        Of this prompt.
    encoded : IVTPImageFeatures
        Of its images.
    inputs_embeds : Tensor (B, S, d)
        Its input embeddings.
    plan : PruningPlan
    recorder : TraceRecorder, optional

    Returns
    -------
    VisualPrompt
    Tensor (B, n, d)
        Embeddings of the tokens that the decoder gets.
    """
    pruner = model.pruner
    prompt = replace(prompt, clip_spans=prompt.new_spans(inputs_embeds))
    whole = index.sequence.to(inputs_embeds.device)
    kept, features = _by_row(encoded, whole)
    sequence, columns = whole.keep(kept, ragged=not plan.exact)
    embeds = _gather(inputs_embeds, columns)
    pseudo, relevance, keys = None, None, None
    if pruner.needs.pseudo_cls:
        pseudo, relevance, keys = make_pseudo_cls(model, prompt, index, encoded, whole, inputs_embeds)
    if recorder is not None:
        recorder.prompt(prompt.input_ids, whole, relevance, keys)
    if plan.prompt is not None and plan.prompt < sequence.patches.shape[2]:
        choice = choose_for_prompt(model, plan.prompt, features, encoded, prompt, index, whole)
        if recorder is not None:
            recorder.chosen("prompt", plan.prompt, sequence.patches, choice)
        features = choice.of(features)
        sequence, columns = sequence.keep(choice.kept, choice.ragged)
        embeds = _gather(embeds, columns)
    embeds = sequence.with_visual(embeds, features.to(embeds.device))
    with torch.no_grad(), label(CHOOSE):
        state = pruner.prepare(sequence, embeds)
    scores = None if recorder is None else recorder.decoder
    spans = prompt.clip_spans
    words = instruction_tokens(spans) if pruner.needs.instruction and spans is not None else None
    return VisualPrompt(sequence, pruner, plan.decoder, state, scores, pseudo, words), embeds


def _gather(embeds: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return embeds.gather(1, columns[..., None].expand(-1, -1, embeds.shape[-1]))


def make_pseudo_cls(
    model: Any,
    prompt: PromptInputs,
    index: PromptIndex,
    encoded: Any,
    whole: VisualSequence,
    inputs_embeds: torch.Tensor,
) -> tuple[PseudoCLSTokens, torch.Tensor | None, torch.Tensor | None]:
    """Make the pseudo CLS of every image from the words that CLIP finds visible in it (Eq. 5 to 8).

    Returns
    -------
    PseudoCLSTokens
    relevance : float32 Tensor (B, M, S) or None
        Of each token of the prompt to each image; None where `guidance` compares nothing.
    keys : bool Tensor (B, M, S) or None
        The key tokens; None where the image's own CLS is the reference.
    """
    length, device = inputs_embeds.shape[1], inputs_embeds.device
    embeds, relevance, keys = _reference(model, prompt, index, encoded, whole, inputs_embeds)
    positions = prompt.position_ids
    if positions is None:
        positions = (torch.arange(length, device=device) + prompt.past)[None]
    last_patch = whole.columns[..., -1].clamp_max(length - 1)
    ends = positions.to(device).expand(last_patch.shape[0], -1).gather(1, last_patch) + 1
    pools = model.pruner.needs.options.pseudo_cls == "pool"
    return PseudoCLSTokens(embeds, ends, keys if pools else None), relevance, keys


@labelled(CHOOSE)
def _reference(
    model: Any,
    prompt: PromptInputs,
    index: PromptIndex,
    encoded: Any,
    whole: VisualSequence,
    inputs_embeds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the reference token of every image (B, M, d), relevance (B, M, S) and key tokens (B, M, S)."""
    options, device = model.pruner.needs.options, inputs_embeds.device
    visual_cls = per_row(encoded.cls_features.to(device), whole).to(inputs_embeds.dtype)
    if options.guidance == "visual_cls" or not _has_guidance(model, prompt):
        return visual_cls, None, None
    spans = prompt.clip_spans
    assert spans is not None
    with torch.no_grad():
        relevance = None
        if options.guidance == "mean_text":
            keys = instruction_tokens(spans)[:, None].expand(-1, whole.image_present.shape[1], -1)
        else:
            if options.guidance == "text_similarity":
                relevance = text_similarity(inputs_embeds, visual_cls, spans)
            else:
                relevance = _clip_relevance(model, prompt, index, encoded, whole)
            keys = key_tokens(relevance, options.relevance_threshold)
        if whole.valid is not None:
            keys = keys & whole.valid[:, None]
        return pseudo_cls(inputs_embeds, keys, visual_cls), relevance, keys


def _clip_relevance(
    model: Any, prompt: PromptInputs, index: PromptIndex, encoded: Any, whole: VisualSequence
) -> torch.Tensor:
    """Return the relevance of the prompt's tokens to each image, by CLIP's text tower (Eq. 5 to 7): (B, M, S)."""
    if encoded.image_embeds is None:
        raise ValueError(
            'mm_encoder_outputs holds no image_embeds, which guidance="clip" needs: encode the images with '
            "get_image_features under the same pruning options."
        )
    spans, text = prompt.clip_spans, model.text_features(prompt.clip_input_ids, index.windows)
    assert spans is not None
    embeds = per_row(encoded.image_embeds, whole).to(spans.device)
    return map_relevance(token_relevance(text.to(spans.device), embeds), spans)


def _has_guidance(model: Any, prompt: PromptInputs) -> bool:
    """Check that the question can guide; warn once, or raise under `strict`, if it cannot."""
    options = model.pruner.needs.options
    missing = [] if prompt.clip_spans is not None else ["clip_spans"]
    if options.guidance == "clip":
        if prompt.clip_input_ids is None:
            missing.append("clip_input_ids")
        if not model.has_text_tower:
            missing.append("CLIP's text tower (from_llava(..., clip=...) joins it)")
    if not missing:
        return True
    message = (
        f'guidance="{options.guidance}" needs {" and ".join(missing)}, so the question cannot guide the pruning. '
        "Prepare inputs with IVTPLlavaProcessor and a CLIP tokenizer."
    )
    if options.strict:
        raise ValueError(message)
    logger.warning_once(message + " The image's own CLS token is the reference instead (Eq. 8).")
    return False


@labelled(CHOOSE)
def choose_for_prompt(
    model: Any,
    keep: int,
    features: torch.Tensor,
    encoded: Any,
    prompt: PromptInputs,
    index: PromptIndex,
    whole: VisualSequence,
) -> Choice:
    """Ask the pruner which `keep` of the features (B, M, k, d) of each image stay, before the decoder."""
    text = windows = patches = None
    if model.pruner.needs.patch_embeds:
        if prompt.clip_input_ids is None:
            raise ValueError(
                "This method compares patches with the instruction, and clip_input_ids is missing: prepare inputs "
                "with IVTPLlavaProcessor and a CLIP tokenizer."
            )
        windows = prompt.clip_input_ids.any(-1)
        text = _window_embeds(model, prompt.clip_input_ids, index).to(features.device)
        patches = per_row(encoded.patch_embeds.to(features.device), whole)
    with torch.no_grad(), full_precision(features.device):
        return model.pruner.in_prompt(PromptStep(keep, features, patches, text, windows))


def _window_embeds(model: Any, clip_input_ids: torch.Tensor, index: PromptIndex) -> torch.Tensor:
    """Return CLIP's embedding of each window of the instruction: (B, W, P)."""
    tokens = model.text_features(clip_input_ids, index.windows).unflatten(1, clip_input_ids.shape[1:])
    ends = window_ends(model.clip_text_model.config, clip_input_ids)
    columns = ends.to(tokens.device)[..., None, None].expand(-1, -1, 1, tokens.shape[-1])
    return tokens.gather(2, columns)[:, :, 0]


def choose_features(
    pruner: Pruner, step: FeatureStep, recorder: TraceRecorder | None
) -> tuple[Choice | None, torch.Tensor, torch.Tensor]:
    """Ask the pruner about the features of images.

    Returns
    -------
    Choice or None
        None: all stay.
    patches : int64 Tensor (I, k')
        Those that stay.
    features : Tensor (I, k', d)
        Theirs, projected.
    """
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
    """Arrange the images' patches and features by row: int64 (B, M, k) and (B, M, k, d)."""
    device = whole.columns.device
    images = list(encoded.pooler_output)
    alike = len({image.shape[0] for image in images}) == 1
    features = (torch.stack(images) if alike else nn.utils.rnn.pad_sequence(images, batch_first=True)).to(device)
    return per_row(encoded.kept_patches.to(device), whole), per_row(features, whole)
