"""Where the visual tokens of each image stand in a sequence from which tokens were dropped.

Rows of a batch may be padded, and have no, one or several images; once visual tokens go, rows are aligned on the right
and filled up on the left. *Logical* columns count the prompt as it was given, *physical* ones what is left.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class RowCounts:
    """What the host knows of one row, so that no step of a prompt waits for the device.

    Attributes
    ----------
    tokens : int
        Tokens of the row, padding left out.
    images : int
        Images of the row.
    after : int
        Tokens after the last image.
    tail : int
        Last columns of the prompt that are tokens after the last image, without a gap.
    """

    tokens: int
    images: int
    after: int
    tail: int


@dataclass(frozen=True)
class VisualSequence:
    """The tokens that are left of a prompt.

    Attributes
    ----------
    length : int
        Logical columns, S.
    rows : tuple of RowCounts
        `tokens` counts what is left.
    slots : int64 Tensor (B, n)
        Logical column of each physical one; S for filler.
    valid : bool Tensor (B, n) or None
        False for filler. None: there is none.
    columns : int64 Tensor (B, M, k)
        Physical columns of each image's visual tokens, in order; n for an image that a row does not have, and after
        the tokens of an image that has fewer than others.
    patches : int64 Tensor (B, M, k)
        The patches of the original grid that they are; -1 for none.
    image_present : bool Tensor (B, M)
        Which images exist.
    order : int64 Tensor (B, M) or None
        Which of the images of the batch they are; some other one where a row does not have so many. None: in order.
    ends : int64 Tensor (B, 1)
        Logical column of each row's last token.
    ragged : bool
        Whether images may have different numbers of visual tokens.
    drafted : int
        Last columns that are no words of the prompt: what an assistant proposes to go on with.
    counted : bool
        Whether `rows` was read from the prompt. False: nothing was, and `tokens` is the most there can be, `after` and
        `tail` the least.
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

    @property
    def size(self) -> int:
        """Physical columns, n."""
        return self.slots.shape[1]

    @property
    def asked(self) -> int:
        """Physical columns up to the prompt's last token, which answers."""
        return self.size - self.drafted

    @property
    def tail(self) -> int:
        """Last columns that are one logical token each, in every row."""
        return min(row.tail for row in self.rows)

    @property
    def reach(self) -> int:
        """Physical columns up to the end of the last image of any row."""
        after = [row.after for row in self.rows if row.images]
        return self.size - min(after) if after else 0

    @property
    def token_present(self) -> torch.Tensor:
        """Which of `columns` are visual tokens: bool (B, M, k)."""
        return self.columns < self.size

    def to(self, device: torch.device) -> "VisualSequence":
        """The same with its tensors on another device."""
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
        )

    def visual(self, hidden: torch.Tensor) -> torch.Tensor:
        """The visual tokens of each image among hidden states (B, n, d): (B, M, k, d); in the place of none, any."""
        index = self.columns.to(hidden.device).clamp_max(hidden.shape[1] - 1)
        flat = hidden.gather(1, index.flatten(1)[..., None].expand(-1, -1, hidden.shape[2]))
        return flat.unflatten(1, index.shape[1:])

    def with_visual(self, hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, n, d) with the visual tokens of each image replaced by others (B, M, k, d)."""
        wide = torch.cat([hidden, hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2])], 1)
        index = self.columns.to(hidden.device).flatten(1)[..., None].expand(-1, -1, hidden.shape[2])
        return wide.scatter(1, index, visual.to(hidden.dtype).flatten(1, 2))[:, :-1]

    def keep(self, kept: torch.Tensor, ragged: bool = False) -> tuple["VisualSequence", torch.Tensor]:
        """Drop all but some visual tokens of every image.

        Parameters
        ----------
        kept : int64 Tensor (B, M, k')
            Indices into the k visual tokens of each image, ascending; k for none, at the end.
        ragged : bool, default False
            Whether images may keep different numbers. The host then has to wait for the device, to count them.

        Returns
        -------
        VisualSequence
        index : int64 Tensor (B, n')
            The physical columns to gather; filler repeats column 0.
        """
        kept, ragged = kept.to(self.columns.device), ragged or self.ragged
        if ragged and not self.counted:
            raise ValueError(
                "This method keeps different numbers of tokens of images, so shapes depend on what is in them, and the "
                "prompt cannot be compiled to one graph: compile with fullgraph=False, or decoding steps only."
            )
        stay = torch.ones(self.slots.shape[0], self.size + 1, dtype=torch.bool, device=self.slots.device)
        if self.valid is not None:
            stay[:, :-1] = self.valid
        columns, patches = self.columns, self.patches
        if ragged:
            columns, patches = pad(columns, (0, 1), value=self.size), pad(patches, (0, 1), value=-1)
        chosen = columns.gather(2, kept)
        stay.scatter_(1, self.columns.flatten(1), False)
        stay.scatter_(1, chosen.flatten(1), True)
        stay = stay[:, :-1]
        if ragged:
            left = stay.sum(1).tolist()
        else:
            fewer = self.columns.shape[2] - kept.shape[2]
            left = [row.tokens - row.images * fewer for row in self.rows]
        rows = tuple(replace(row, tokens=tokens) for row, tokens in zip(self.rows, left, strict=True))
        full = self.valid is None if not self.counted else len({row.tokens for row in rows}) == 1
        index, target, valid = _align_right(stay, max(row.tokens for row in rows), full)
        slots = self.slots.gather(1, index)
        if valid is not None:
            slots = slots.masked_fill(~valid, self.length)
        # Column n, the place of images that are not there, moves along to the new end.
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

    def restore(self, hidden: torch.Tensor) -> torch.Tensor:
        """Put hidden states (B, n, d) back to their logical columns: (B, S, d).

        A dropped token leaves zeros, but for the last one of a row's prompt: what the prompt ends with predicts the
        next token, so the last token that is left stands there, too.
        """
        full = hidden.new_zeros(hidden.shape[0], self.length + 1, hidden.shape[2])
        slots, ends = self.slots.to(hidden.device), self.ends.to(hidden.device) - self.drafted
        full = full.scatter(1, slots[..., None].expand_as(hidden), hidden)
        last = hidden[:, self.asked - 1 : self.asked]
        return full.scatter(1, ends[..., None].expand(-1, -1, hidden.shape[2]), last)[:, :-1]

    def kept_tokens(self) -> torch.Tensor:
        """Which logical columns are left: bool Tensor (B, S)."""
        full = torch.zeros(self.slots.shape[0], self.length + 1, dtype=torch.bool, device=self.slots.device)
        return full.scatter(1, self.slots, True)[:, :-1]

    def at_slots(self, values: torch.Tensor) -> torch.Tensor:
        """Pick values given per logical column (B, ..., S) at the physical columns: (B, ..., n); filler gets any."""
        index = self.slots.clamp_max(self.length - 1).to(values.device)
        while index.dim() < values.dim():
            index = index.unsqueeze(1)
        return values.gather(-1, index.expand(*values.shape[:-1], -1))


def _align_right(stay: torch.Tensor, size: int, full: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Columns to gather (B, n'), where each old column goes (B, n), and which new ones are tokens; `full`: all are."""
    rank = stay.cumsum(1)
    place = rank - 1 if full else rank - 1 + (size - rank[:, -1:])
    target = torch.where(stay, place, size)
    source = torch.arange(stay.shape[1], device=stay.device).expand_as(target)
    index = torch.zeros(stay.shape[0], size + 1, dtype=torch.int64, device=stay.device).scatter(1, target, source)
    valid = None if full else torch.arange(size, device=stay.device) >= size - rank[:, -1:]
    return index[:, :-1], target, valid


def count_rows(
    placeholders: torch.Tensor, valid: torch.Tensor | None, images: int, patches: int
) -> tuple[RowCounts, ...]:
    """Count what is in each row. The host waits for the device: ask before there is work for it.

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

    Raises
    ------
    ValueError
        If placeholders and images do not match.
    """
    length = placeholders.shape[1]
    there = torch.ones_like(placeholders) if valid is None else valid
    placeholders = placeholders & there
    place = torch.arange(1, length + 1, device=placeholders.device)
    last_image = (placeholders * place).amax(1, keepdim=True)
    last_gap = torch.maximum(last_image, (~there * place).amax(1, keepdim=True))
    after = (there & (place > last_image)).sum(1)
    counts = torch.stack([there.sum(1), placeholders.sum(1), after, length - last_gap[:, 0]], 1).tolist()
    if sum(count[1] for count in counts) != images * patches or any(count[1] % patches for count in counts):
        raise ValueError(
            f"Image features and image tokens do not match: {images} image(s) need {images * patches} image tokens, "
            f"{patches} each, and the rows of the prompt have {[count[1] for count in counts]}."
        )
    return tuple(RowCounts(count[0], count[1] // patches, count[2], count[3]) for count in counts)


def uncounted_rows(placeholders: torch.Tensor, images: tuple[int, ...], patches: int) -> tuple[RowCounts, ...]:
    """Rows of which nothing but the number of their images is known, for a prompt that is compiled to one graph.

    Shapes then depend on nothing but the prompt's length. A row with other image tokens fails when the graph runs.
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
    there = torch.ones_like(placeholders) if valid is None else valid
    placeholders = placeholders & there
    place = torch.arange(1, length + 1, device=placeholders.device)
    most = max(row.images for row in rows)
    images = sum(row.images for row in rows)
    shown, first = None, 0
    if images != most * len(rows):
        shown = []
        for row in rows:
            shown.append([min(first + image, images - 1) for image in range(most)])
            first += row.images
    order = torch.where(placeholders, placeholders.long().cumsum(1) - 1, most * patches)
    columns = torch.full((placeholders.shape[0], most * patches + 1), length, device=placeholders.device)
    columns = columns.scatter(1, order, (place - 1).expand_as(order))[:, :-1].unflatten(1, (most, patches))
    return VisualSequence(
        length=length,
        rows=rows,
        slots=(place - 1).expand_as(order),
        valid=valid,
        columns=columns,
        patches=torch.arange(patches, device=placeholders.device).expand_as(columns),
        image_present=columns[..., 0] < length,
        order=None if shown is None else torch.tensor(shown, device=placeholders.device),
        ends=(there * place).amax(1, keepdim=True) - 1,
        counted=counted,
    )


def per_row(values: torch.Tensor, sequence: VisualSequence) -> torch.Tensor:
    """Arrange what is given per image, in the order of the prompt, by row: (I, ...) to (B, M, ...).

    An image that a row does not have gets the values of some other image; `VisualSequence.image_present` tells.
    """
    if sequence.order is None:
        return values.unflatten(0, sequence.image_present.shape)
    return values[sequence.order.to(values.device)]
