"""How many visual tokens stay behind which layer (IVTP Sec. 3.4 and 4.1).

The paper prunes every three layers from 576 to 64 tokens but does not print the counts in between. A constant keep
ratio per group, with a hand-over of 120 between the stages, reproduces its FLOPs (Tables 3 and 9).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """Consecutive layers that are looked at together; pruning happens on the output of the last of them.

    Attributes
    ----------
    first, last : int
        Layer numbers, 0-based, both inside the group.
    keep : int
        Visual tokens of one image that stay behind `last`; the most, where a method adapts the count to the image.
    middle : bool
        Prune between attention and MLP of `last` instead of after it; in the vision tower only.
    """

    first: int
    last: int
    keep: int
    middle: bool = False


@dataclass(frozen=True)
class PruningPlan:
    """What stays of an image where.

    Attributes
    ----------
    patches : int
        Patches of one image before any pruning, N.
    tower, decoder : tuple of Group
        The groups of the vision tower and of the language model, in order.
    features : int or None
        Tokens that stay of the tower's features. None: as many as there are.
    prompt : int or None
        Tokens that stay before the decoder. None: as many as there are.
    exact : bool
        Whether every image keeps just so many; otherwise these are the most.
    """

    patches: int
    tower: tuple[Group, ...] = ()
    decoder: tuple[Group, ...] = ()
    features: int | None = None
    prompt: int | None = None
    exact: bool = True

    @property
    def encoded_tokens(self) -> int:
        """What comes of an image before its prompt is looked at."""
        if self.features is not None:
            return self.features
        return self.tower[-1].keep if self.tower else self.patches

    @property
    def tower_tokens(self) -> int:
        """What is handed to the language model, per image."""
        return self.encoded_tokens if self.prompt is None else self.prompt

    @property
    def final_tokens(self) -> int:
        """What is left of one image above the last pruned layer."""
        return self.decoder[-1].keep if self.decoder else self.tower_tokens

    def tower_layer_tokens(self, num_layers: int) -> tuple[int, ...]:
        """Patches of one image that each of the `num_layers` tower layers sees."""
        return _layer_tokens(self.tower, self.patches, num_layers)

    def decoder_layer_tokens(self, num_layers: int) -> tuple[int, ...]:
        """Visual tokens of one image that each of the `num_layers` decoder layers sees, and its KV cache holds."""
        return _layer_tokens(self.decoder, self.tower_tokens, num_layers)


def _layer_tokens(groups: Iterable[Group], tokens: int, num_layers: int) -> tuple[int, ...]:
    """What each layer sees of `tokens` that come to the first; a group drops after its last layer."""
    counts: list[int] = []
    for group in groups:
        counts += [tokens] * (group.last + 1 - len(counts))
        tokens = min(tokens, group.keep)
    return tuple(counts + [tokens] * (num_layers - len(counts)))


def geometric_schedule(start: int, end: int, groups: int) -> tuple[int, ...]:
    """Token counts after each of `groups` groups: a constant keep ratio from `start` down to exactly `end`.

    Examples
    --------
    >>> geometric_schedule(120, 64, 4)
    (103, 88, 75, 64)
    """
    ratio = end / start
    return (*(round(start * ratio ** (g / groups)) for g in range(1, groups)), end)


def grouped(num_layers: int, layers_per_group: int | None, start: int, end: int, *, name: str) -> tuple[Group, ...]:
    """Cut the first `num_layers` layers of a stage into groups that lead from `start` to `end` tokens.

    Raises
    ------
    ValueError
        If `layers_per_group` does not divide `num_layers`.
    """
    if num_layers == 0:
        return ()
    size = num_layers if layers_per_group is None else layers_per_group
    if num_layers % size:
        divisors = [d for d in range(1, num_layers + 1) if num_layers % d == 0]
        raise ValueError(
            f"layers_per_group={size} does not divide {name}={num_layers}; allowed: {divisors} or None (one group)."
        )
    counts = geometric_schedule(start, end, num_layers // size)
    return tuple(Group(g * size, (g + 1) * size - 1, keep) for g, keep in enumerate(counts))


def plan_pruning(pruning: Any, patches: int, tower_layers: int, decoder_layers: int) -> PruningPlan | None:
    """Lay out the groups of both stages for a model.

    Parameters
    ----------
    pruning : IVTPPruningConfig
        The options. Duck-typed, because remote code may load the configuration class twice.
    patches : int
        Patches of one image, N.
    tower_layers, decoder_layers : int
        Layers that the vision tower and the language model have.

    Returns
    -------
    PruningPlan or None
        None when nothing is to be dropped: pruning is off, or the budget is not below N.

    Raises
    ------
    ValueError
        If the options do not fit the model: more layers than it has, or groups that do not divide.
    """
    if not pruning.enabled:
        return None
    final = min(pruning.visual_tokens, patches)
    handed_over = pruning.tower_tokens if pruning.tower_tokens is not None else round(1.875 * pruning.visual_tokens)
    handed_over = min(handed_over, patches)
    in_tower = tower_layers if pruning.tower_layers is None else pruning.tower_layers
    for name, wanted, there in (
        ("tower_layers", in_tower, tower_layers),
        ("decoder_layers", pruning.decoder_layers, decoder_layers),
    ):
        if wanted > there:
            raise ValueError(
                f"{name}={wanted}, but the model has only {there} such layers; allowed: 0 to {there}, as in "
                f"from_pretrained(..., pruning={{{name!r}: {there}}})."
            )
    # A stage without layers drops nothing, so the other one has to lead to the budget.
    needed = {patches} if in_tower == 0 else set()
    needed |= {final} if pruning.decoder_layers == 0 else set()
    if len(needed) > 1:
        raise ValueError(f"visual_tokens={final} cannot be reached with tower_layers=0 and decoder_layers=0.")
    if needed:
        (required,) = needed
        if pruning.tower_tokens is not None and handed_over != required:
            raise ValueError(
                f"tower_tokens={pruning.tower_tokens} contradicts tower_layers={in_tower}, decoder_layers="
                f"{pruning.decoder_layers}, visual_tokens={final}: a stage of 0 layers drops nothing; allowed: "
                f"{required} or None."
            )
        handed_over = required
    plan = PruningPlan(
        patches,
        tower=grouped(in_tower, pruning.layers_per_group, patches, handed_over, name="tower_layers"),
        decoder=grouped(pruning.decoder_layers, pruning.layers_per_group, handed_over, final, name="decoder_layers"),
    )
    return plan if plan.final_tokens < patches else None
