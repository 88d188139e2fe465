"""The number of visual tokens that stay after each layer (IVTP Sec. 3.4 and 4.1).

The paper prunes every three layers from 576 to 64 tokens but does not print the counts in between. A constant keep
ratio per group, with a hand-over of 120 between the stages, reproduces its FLOPs (Tables 3 and 9).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Group:
    """Consecutive layers whose attention is rolled out together; tokens are dropped from the output of the last one.

    Attributes
    ----------
    first, last : int
        Layer numbers, 0-based, both inside the group.
    keep : int
        Visual tokens of one image that stay after `last`; the largest number if a method adapts it to the image.
    middle : bool
        Drop between attention and MLP of `last` instead of after it; in the vision tower only.
    adaptive : bool
        The pruner is asked even where `keep` leaves all tokens, since it decides how many stay; in the decoder only.
    """

    first: int
    last: int
    keep: int
    middle: bool = False
    adaptive: bool = False


@dataclass(frozen=True)
class PruningPlan:
    """The number of tokens of an image that stay at each step.

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
        Whether every image keeps exactly these numbers; otherwise they are the largest possible ones.
    ahead : bool
        Whether the decoder's groups choose in a pass of their own, before the decoder.
    """

    patches: int
    tower: tuple[Group, ...] = ()
    decoder: tuple[Group, ...] = ()
    features: int | None = None
    prompt: int | None = None
    exact: bool = True
    ahead: bool = False

    @property
    def encoded_tokens(self) -> int:
        """Tokens of one image after the tower and the choice among its features."""
        if self.features is not None:
            return self.features
        return self.tower[-1].keep if self.tower else self.patches

    @property
    def tower_tokens(self) -> int:
        """Tokens of one image that the language model gets."""
        return self.encoded_tokens if self.prompt is None else self.prompt

    @property
    def drops(self) -> bool:
        """Return whether anything may be dropped."""
        return self.final_tokens < self.patches or any(group.adaptive for group in self.decoder)

    @property
    def final_tokens(self) -> int:
        """Tokens of one image that are left in the end."""
        return self.decoder[-1].keep if self.decoder else self.tower_tokens

    def tower_layer_tokens(self, num_layers: int) -> tuple[int, ...]:
        """Return the patches of one image that each of the `num_layers` tower layers gets."""
        return _layer_tokens(self.tower, self.patches, num_layers)

    def layer_average(self, num_layers: int) -> float:
        """Return the visual tokens of one image per decoder layer, averaged over all `num_layers` of them."""
        return sum(self.decoder_layer_tokens(num_layers)) / num_layers

    def decoder_layer_tokens(self, num_layers: int) -> tuple[int, ...]:
        """Return the visual tokens of one image that each of the `num_layers` decoder layers gets, and caches."""
        if self.ahead:
            return (self.final_tokens,) * num_layers
        return _layer_tokens(self.decoder, self.tower_tokens, num_layers)

    def choosing_layer_tokens(self) -> tuple[int, ...]:
        """Return the visual tokens of one image in each decoder layer of the pass ahead; empty if there is none."""
        if not self.ahead or not self.decoder:
            return ()
        return _layer_tokens(self.decoder, self.tower_tokens, self.decoder[-1].last + 1)


def _layer_tokens(groups: Iterable[Group], tokens: int, num_layers: int) -> tuple[int, ...]:
    """Return how many tokens each layer gets when the first gets `tokens`; a group drops after its last layer."""
    counts: list[int] = []
    for group in groups:
        counts += [tokens] * (group.last + 1 - len(counts))
        tokens = min(tokens, group.keep)
    return tuple(counts + [tokens] * (num_layers - len(counts)))


def geometric_schedule(start: int, end: int, groups: int) -> tuple[int, ...]:
    """Return token counts after each of `groups` groups: a constant keep ratio from `start` down to exactly `end`.

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
    """Plan the groups of both stages for a model.

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
        None when nothing is to be dropped: pruning is off, or the budget is not below N and no coverage decides.

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
    for name, layers, available in (
        ("tower_layers", in_tower, tower_layers),
        ("decoder_layers", pruning.decoder_layers, decoder_layers),
    ):
        if layers > available:
            raise ValueError(
                f"{name}={layers}, but the model has only {available} such layers; allowed: 0 to {available}, as in "
                f"from_pretrained(..., pruning={{{name!r}: {available}}})."
            )
    # A stage without layers drops nothing, so the other one has to reach the budget.
    possible = {patches} if in_tower == 0 else set()
    possible |= {final} if pruning.decoder_layers == 0 else set()
    if len(possible) > 1:
        raise ValueError(f"visual_tokens={final} cannot be reached with tower_layers=0 and decoder_layers=0.")
    if possible:
        (required,) = possible
        if pruning.tower_tokens is not None and handed_over != required:
            raise ValueError(
                f"tower_tokens={pruning.tower_tokens} contradicts tower_layers={in_tower}, decoder_layers="
                f"{pruning.decoder_layers}, visual_tokens={final}: a stage of 0 layers drops nothing; allowed: "
                f"{required} or None."
            )
        handed_over = required
    decoder = grouped(pruning.decoder_layers, pruning.layers_per_group, handed_over, final, name="decoder_layers")
    fixed = getattr(pruning, "coverage", None) is None
    if not fixed:
        # Where the ceiling leaves all tokens, the coverage still decides.
        decoder = (*decoder[:-1], replace(decoder[-1], adaptive=True))
    plan = PruningPlan(
        patches,
        tower=grouped(in_tower, pruning.layers_per_group, patches, handed_over, name="tower_layers"),
        decoder=decoder,
        exact=fixed,
        ahead=getattr(pruning, "decoder_choice", "within") == "ahead",
    )
    return plan if plan.drops else None
