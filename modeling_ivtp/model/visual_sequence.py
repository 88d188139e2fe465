"""The tokens of a prompt that are left, and the columns in which each image's visual tokens stand.

Rows of a batch may be padded and hold no, one or several images. After visual tokens were dropped, rows are aligned on
the right and filled up on the left. *Logical* columns count the whole prompt, *physical* columns what is left of it.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class RowCounts:
    """Counts of one row that the host knows, so that no step of a prompt waits for the device.

    Attributes
    ----------
    tokens : int
        Tokens of the row without padding.
    images : int
        Images of the row.
    text_after : int
        Tokens after the last image.
    trailing_text : int
        Columns at the end of the prompt that hold tokens after the last image, without a gap.
    """

    tokens: int
    images: int
    text_after: int
    trailing_text: int


@dataclass(frozen=True)
class VisualSequence:
    """The tokens that are left of a prompt.

    Attributes
    ----------
    length : int
        Number of logical columns, S.
    rows : tuple of RowCounts
        Counts of each row; `tokens` counts what is left.
    slots : int64 Tensor (B, n)
        Logical column of each physical one; S for filler.
    valid : bool Tensor (B, n) or None
        False for filler. None: there is no filler.
    columns : int64 Tensor (B, M, k)
        Physical columns of each image's visual tokens, in order. n for an image that a row does not have, and after
        the last token of an image that has fewer than others.
    patches : int64 Tensor (B, M, k)
        The patch of the original grid that each visual token is; -1 for none.
    image_present : bool Tensor (B, M)
        Which images exist.
    order : int64 Tensor (B, M) or None
        Number of each image within the batch, and any number where a row has no such image. None: images in order.
    ends : int64 Tensor (B, 1)
        Logical column of each row's last token.
    ragged : bool
        Whether images may have different numbers of visual tokens.
    drafted : int
        Columns at the end that an assistant proposed; they do not belong to the prompt.
    answers : bool Tensor (B, S) or None
        Logical columns of answers that are to be learned: they follow their prompt, and choose nothing. None: none.
    counted : bool
        Whether `rows` was counted. False: the host read nothing from the device, so `tokens` is the largest possible
        number, `text_after` and `trailing_text` the smallest.
    """

    length: int
    rows: tuple[RowCounts, ...]
    slots: torch.Tensor
    valid: torch.Tensor | None
    columns: torch.Tensor
    patches: torch.Tensor
    image_present: torch.Tensor
    order: torch.Tensor | None
    ends: torch.Tensor
    ragged: bool = False
    drafted: int = 0
    counted: bool = True
    answers: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Number of physical columns, n."""
        return self.slots.shape[1]

    @property
    def prompt_end(self) -> int:
        """Physical columns up to and with the prompt's last token; drafted ones follow."""
        return self.size - self.drafted

    @property
    def image_end(self) -> int:
        """Physical columns up to the end of the last image of any row."""
        text_after = [row.text_after for row in self.rows if row.images]
        return self.size - min(text_after) if text_after else 0

    @property
    def trailing_text(self) -> int:
        """Columns at the end that are one logical token each, in every row."""
        return min(row.trailing_text for row in self.rows)

    @property
    def token_present(self) -> torch.Tensor:
        """Return which of `columns` are visual tokens: bool (B, M, k)."""
        return self.columns < self.size

    def to(self, device: torch.device) -> "VisualSequence":
        """Move the tensors to a device."""
        if self.slots.device == device:
            return self
        return replace(
            self,
            slots=self.slots.to(device),
            valid=None if self.valid is None else self.valid.to(device),
            columns=self.columns.to(device),
            patches=self.patches.to(device),
            image_present=self.image_present.to(device),
            order=None if self.order is None else self.order.to(device),
            ends=self.ends.to(device),
            answers=None if self.answers is None else self.answers.to(device),
        )

    def visual(self, hidden: torch.Tensor) -> torch.Tensor:
        """Pick each image's visual tokens from hidden states: (B, n, d) to (B, M, k, d), any for absent ones."""
        index = self.columns.to(hidden.device).clamp_max(hidden.shape[1] - 1)
        flat = hidden.gather(1, index.flatten(1)[..., None].expand(-1, -1, hidden.shape[2]))
        return flat.unflatten(1, index.shape[1:])

    def with_visual(self, hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """Replace each image's visual tokens in hidden states (B, n, d) by `visual` (B, M, k, d)."""
        wide = torch.cat([hidden, hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2])], 1)
        index = self.columns.to(hidden.device).flatten(1)[..., None].expand(-1, -1, hidden.shape[2])
        return wide.scatter(1, index, visual.to(hidden.dtype).flatten(1, 2))[:, :-1]

    def keep(self, kept: torch.Tensor, ragged: bool = False) -> tuple["VisualSequence", torch.Tensor]:
        """Drop all visual tokens of every image except some.

        Parameters
        ----------
        kept : int64 Tensor (B, M, k')
            Indices into the k visual tokens of each image, ascending; k for none, at the end.
        ragged : bool, default False
            Whether images may keep different numbers. The host then waits for the device to count them.

        Returns
        -------
        VisualSequence
        index : int64 Tensor (B, n')
            The physical columns to gather; filler repeats column 0.

        Raises
        ------
        ValueError
            If images keep different numbers in a prompt that is compiled to one graph.
        """
        kept, ragged = kept.to(self.columns.device), ragged or self.ragged
        if ragged and not self.counted:
            raise ValueError(
                "This method keeps different numbers of tokens of images, so shapes depend on what is in them, and the "
                "prompt cannot be compiled to one graph: compile with fullgraph=False, or decoding steps only."
            )
        columns, patches = self.columns, self.patches
        if ragged:
            columns, patches = pad(columns, (0, 1), value=self.size), pad(patches, (0, 1), value=-1)
        chosen = columns.gather(2, kept)
        stays = self._staying(chosen)
        rows = self._rows_after(kept.shape[2], stays if ragged else None)
        full = self.valid is None if not self.counted else len({row.tokens for row in rows}) == 1
        index, target, valid = _align_right(stays, max(row.tokens for row in rows), full)
        slots = self.slots.gather(1, index)
        if valid is not None:
            slots = slots.masked_fill(~valid, self.length)
        # Column n, where absent images stand, moves along to the new end.
        moved = torch.cat([target, target.new_full((target.shape[0], 1), index.shape[1])], 1)
        columns = moved.gather(1, chosen.flatten(1)).view_as(chosen)
        sequence = replace(
            self,
            rows=rows,
            slots=slots,
            valid=valid,
            columns=columns,
            patches=patches.gather(2, kept),
            ragged=ragged,
        )
        return sequence, index

    def up_to_images(self) -> "VisualSequence":
        """Leave out the columns after the last image of any row."""
        end = self.image_end
        cut = self.size - end
        rows = tuple(
            replace(
                row,
                tokens=max(0, row.tokens - cut),
                text_after=max(0, row.text_after - cut),
                trailing_text=max(0, row.trailing_text - cut),
            )
            for row in self.rows
        )
        return replace(
            self,
            rows=rows,
            slots=self.slots[:, :end],
            valid=None if self.valid is None else self.valid[:, :end],
            columns=self.columns.clamp_max(end),
            drafted=0,
        )

    def _staying(self, chosen: torch.Tensor) -> torch.Tensor:
        """Mark the columns that stay, text and the `chosen` visual tokens (B, M, k'): bool (B, n)."""
        stays = torch.ones(self.slots.shape[0], self.size + 1, dtype=torch.bool, device=self.slots.device)
        if self.valid is not None:
            stays[:, :-1] = self.valid
        stays.scatter_(1, self.columns.flatten(1), False)
        stays.scatter_(1, chosen.flatten(1), True)
        return stays[:, :-1]

    def _rows_after(self, keep: int, stays: torch.Tensor | None) -> tuple[RowCounts, ...]:
        """Count rows when every image keeps `keep` tokens, or the columns that `stays` marks."""
        if stays is not None:
            left = stays.sum(1).tolist()
        else:
            fewer = self.columns.shape[2] - keep
            left = [row.tokens - row.images * fewer for row in self.rows]
        return tuple(replace(row, tokens=tokens) for row, tokens in zip(self.rows, left, strict=True))

    def restore(self, hidden: torch.Tensor) -> torch.Tensor:
        """Put hidden states back to their logical columns: (B, n, d) to (B, S, d).

        Dropped tokens are zeros. A row's last column is the exception: it predicts the next token, so the last token
        that is left stands there, too.
        """
        full = hidden.new_zeros(hidden.shape[0], self.length + 1, hidden.shape[2])
        slots, ends = self.slots.to(hidden.device), self.ends.to(hidden.device) - self.drafted
        full = full.scatter(1, slots[..., None].expand_as(hidden), hidden)
        last = hidden[:, self.prompt_end - 1 : self.prompt_end]
        return full.scatter(1, ends[..., None].expand(-1, -1, hidden.shape[2]), last)[:, :-1]

    def kept_tokens(self) -> torch.Tensor:
        """Mark the logical columns that are left: bool (B, S)."""
        full = torch.zeros(self.slots.shape[0], self.length + 1, dtype=torch.bool, device=self.slots.device)
        return full.scatter(1, self.slots, True)[:, :-1]

    def at_slots(self, values: torch.Tensor) -> torch.Tensor:
        """Pick the physical columns from values per logical column: (B, ..., S) to (B, ..., n); filler gets any."""
        index = self.slots.clamp_max(self.length - 1).to(values.device)
        while index.dim() < values.dim():
            index = index.unsqueeze(1)
        return values.gather(-1, index.expand(*values.shape[:-1], -1))


def _align_right(stays: torch.Tensor, size: int, full: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Move the staying columns of each row to its right end.

    Parameters
    ----------
    stays : bool Tensor (B, n)
    size : int
        Columns afterwards, n'.
    full : bool
        Whether every row keeps `size` columns.

    Returns
    -------
    index : int64 Tensor (B, n')
        The columns to gather.
    target : int64 Tensor (B, n)
        Where each column goes; n' for one that is dropped.
    valid : bool Tensor (B, n') or None
        False for filler.
    """
    rank = stays.cumsum(1)
    target = rank - 1 if full else rank - 1 + (size - rank[:, -1:])
    target = torch.where(stays, target, size)
    source = torch.arange(stays.shape[1], device=stays.device).expand_as(target)
    index = torch.zeros(stays.shape[0], size + 1, dtype=torch.int64, device=stays.device).scatter(1, target, source)
    valid = None if full else torch.arange(size, device=stays.device) >= size - rank[:, -1:]
    return index[:, :-1], target, valid


def count_rows(
    placeholders: torch.Tensor,
    valid: torch.Tensor | None,
    images: int,
    patches: int,
    flags: torch.Tensor | None = None,
) -> tuple[tuple[RowCounts, ...], bool]:
    """Count the tokens and images of each row.

    The host waits for the device here, so call it before work for the device is queued.

    Parameters
    ----------
    placeholders : bool Tensor (B, S)
        Where an image token stands.
    valid : bool Tensor (B, S) or None
        The 2D attention mask; None: no padding.
    images : int
        Images that came with the prompt, over all rows.
    patches : int
        Patches of an image, N: each image needs as many placeholders.
    flags : bool Tensor (B,), optional
        Read along, so that the host waits once.

    Returns
    -------
    rows : tuple of RowCounts
    flagged : bool
        Whether any of the flags is set.

    Raises
    ------
    ValueError
        If placeholders and images do not match.
    """
    length = placeholders.shape[1]
    present = torch.ones_like(placeholders) if valid is None else valid
    placeholders = placeholders & present
    number = torch.arange(1, length + 1, device=placeholders.device)
    last_image = (placeholders * number).amax(1, keepdim=True)
    last_gap = torch.maximum(last_image, (~present * number).amax(1, keepdim=True))
    text_after = (present & (number > last_image)).sum(1)
    columns = [present.sum(1), placeholders.sum(1), text_after, length - last_gap[:, 0]]
    if flags is not None:
        columns.append(flags.to(text_after))
    counts = torch.stack(columns, 1).tolist()
    if sum(count[1] for count in counts) != images * patches or any(count[1] % patches for count in counts):
        raise ValueError(
            f"Image features and image tokens do not match: {images} image(s) need {images * patches} image tokens, "
            f"{patches} each, and the rows of the prompt have {[count[1] for count in counts]}. The processor needs "
            "the model's patch_size and num_additional_image_tokens=1 (the tower's CLS), and truncation must not cut "
            "into an image."
        )
    rows = tuple(RowCounts(count[0], count[1] // patches, count[2], count[3]) for count in counts)
    return rows, flags is not None and any(count[4] for count in counts)


def uncounted_rows(placeholders: torch.Tensor, images: tuple[int, ...], patches: int) -> tuple[RowCounts, ...]:
    """Describe rows by their number of images alone, for a prompt that is compiled to one graph.

    Shapes then depend only on the prompt's length. A row with another number of image tokens fails when the graph runs.
    """
    expected = torch.tensor(images, device=placeholders.device) * patches
    torch._assert_async((placeholders.sum(1) == expected).all(), "Image features and image tokens do not match.")
    return tuple(RowCounts(placeholders.shape[1], count, 0, 0) for count in images)


def locate_images(
    placeholders: torch.Tensor,
    valid: torch.Tensor | None,
    rows: tuple[RowCounts, ...],
    patches: int,
    counted: bool = True,
) -> VisualSequence:
    """Find the visual tokens of a prompt.

    Parameters
    ----------
    placeholders : bool Tensor (B, S)
        Where an image token stands.
    valid : bool Tensor (B, S) or None
        The 2D attention mask; None: no padding.
    rows : tuple of RowCounts
        From `count_rows`, or `uncounted_rows` with `counted=False`.
    patches : int
        Patches of an image, N.

    Returns
    -------
    VisualSequence
        With nothing dropped yet.
    """
    length = placeholders.shape[1]
    present = torch.ones_like(placeholders) if valid is None else valid
    placeholders = placeholders & present
    number = torch.arange(1, length + 1, device=placeholders.device)
    most = max(row.images for row in rows)
    visual = torch.where(placeholders, placeholders.long().cumsum(1) - 1, most * patches)
    columns = torch.full((placeholders.shape[0], most * patches + 1), length, device=placeholders.device)
    columns = columns.scatter(1, visual, (number - 1).expand_as(visual))[:, :-1].unflatten(1, (most, patches))
    order = _image_order(rows)
    return VisualSequence(
        length=length,
        rows=rows,
        slots=(number - 1).expand_as(visual),
        valid=valid,
        columns=columns,
        patches=torch.arange(patches, device=placeholders.device).expand_as(columns),
        image_present=columns[..., 0] < length,
        order=None if order is None else torch.tensor(order, device=placeholders.device),
        ends=(present * number).amax(1, keepdim=True) - 1,
        counted=counted,
    )


def _image_order(rows: tuple[RowCounts, ...]) -> list[list[int]] | None:
    """Return the numbers of each row's images, as in `VisualSequence.order`; None if all rows have as many."""
    most, images = max(row.images for row in rows), sum(row.images for row in rows)
    if images == most * len(rows):
        return None
    order, first = [], 0
    for row in rows:
        order.append([min(first + image, images - 1) for image in range(most)])
        first += row.images
    return order


def per_row(values: torch.Tensor, sequence: VisualSequence) -> torch.Tensor:
    """Arrange values per image, in the order of the prompt, by row: (I, ...) to (B, M, ...).

    An image that a row does not have gets the values of some other image; `VisualSequence.image_present` marks it.
    """
    if sequence.order is None:
        return values.unflatten(0, sequence.image_present.shape)
    return values[sequence.order.to(values.device)]
