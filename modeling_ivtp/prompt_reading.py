"""What the host has to know of a prompt: read once, before the device has work, so that nothing later waits for it."""

from dataclasses import dataclass, replace

import torch

from .visual_sequence import VisualSequence, count_rows, locate_images, uncounted_rows


@dataclass(frozen=True)
class PromptReading:
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


def read_prompt(
    placeholders: torch.Tensor,
    valid: torch.Tensor | None,
    *,
    images: int,
    patches: int,
    drafted: int = 0,
    clip_input_ids: torch.Tensor | None = None,
    known: PromptReading | None = None,
) -> PromptReading:
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
    known : PromptReading, optional
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
        return PromptReading(replace(sequence, drafted=drafted))
    rows = count_rows(placeholders, valid, images, patches)
    if all(row.tokens == placeholders.shape[1] for row in rows):
        valid = None
    sequence = replace(locate_images(placeholders, valid, rows, patches), drafted=drafted)
    windows = None
    if clip_input_ids is not None:
        windows = tuple(_without_padding(window) for row in clip_input_ids.tolist() for window in row)
    return PromptReading(sequence, windows)


def _without_padding(window: list[int]) -> tuple[int, ...]:
    """A window up to the first of the equal tokens it ends with: CLIP is causal, so what follows changes nothing."""
    end = len(window)
    while end > 1 and window[end - 2] == window[-1]:
        end -= 1
    return tuple(window[:end])
