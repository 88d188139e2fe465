"""The number of visual tokens that a request gets: its own number, the server's, or the checkpoint's."""

from collections.abc import Mapping
from typing import Any

from ..model.configuration_ivtp import IVTPPruningConfig, is_whole
from ..model.schedule import PruningPlan, plan_pruning

BUDGET, CEILING = "visual_tokens", "max_visual_tokens"
"""Names in vLLM's `mm_processor_kwargs`: of a request or of the server, and of the server alone."""


def options_for(config: Any, visual_tokens: int) -> IVTPPruningConfig:
    """Return a configuration's pruning options with another budget, and with the choice ahead of the decoder.

    With a budget of its own a request lets the hand-over follow from it, even if the checkpoint fixes one.

    Raises
    ------
    ValueError
        For options that a server cannot follow.
    """
    if config.pruning.coverage is not None:
        how = '{"pruning": {"coverage": null, "min_visual_tokens": null}}'
        raise ValueError(
            f"pruning.coverage={config.pruning.coverage}: vLLM lays a prompt out before it sees the pictures, so their "
            f"budgets are fixed; allowed: None, as by --hf-overrides '{how}'."
        )
    options: IVTPPruningConfig = config.pruning.changed(decoder_choice="ahead")
    if visual_tokens == options.visual_tokens:
        return options
    return options.changed(visual_tokens=visual_tokens, tower_tokens=None)


def plan_for(config: Any, visual_tokens: int) -> PruningPlan | None:
    """Plan the pruning of a request; None: nothing is dropped."""
    layers = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    return plan_pruning(options_for(config, visual_tokens), config.num_patches, *layers)


def moves_positions(config: Any) -> bool:
    """Return whether kept tokens stand at their original positions, which are known once an image is encoded."""
    return bool(config.pruning.enabled and config.pruning.positions == "original")


def check_positions(config: Any, tokens: int, images: int, room: int) -> None:
    """Refuse a prompt whose original positions the decoder was not made for, however few tokens of it stay.

    Parameters
    ----------
    config : IVTPLlavaConfig
    tokens : int
        Of the prompt, one for each image.
    images : int
    room : int
        Positions that the server's decoder takes; beyond a multiple of them vLLM's table of angles ends, and the
        engine with it.

    Raises
    ------
    ValueError
        With the numbers.
    """
    length = tokens + images * (config.num_patches - 1)
    if moves_positions(config) and length > room:
        raise ValueError(
            f"the prompt has {length} positions, {config.num_patches} for each of {images} image(s), whatever is kept "
            f"of them; the model was made for {room}. Ask about fewer images."
        )


class Budgets:
    """The budgets of a server.

    Parameters
    ----------
    config : IVTPLlavaConfig
    server : mapping or None
        The server's `mm_processor_kwargs`: `visual_tokens` replaces the checkpoint's budget, and `max_visual_tokens`,
        by default that budget, is the most that a request may ask for. There are no other names.

    Attributes
    ----------
    default, ceiling : int

    Raises
    ------
    ValueError
        For numbers and names that are not allowed.
    """

    def __init__(self, config: Any, server: Mapping[str, Any] | None = None) -> None:
        self.config, server = config, server or {}
        _check_names(server, f"{BUDGET} and {CEILING}")
        patches, options = config.num_patches, config.pruning
        own = min(options.visual_tokens, patches) if options.enabled else patches
        self.default = self._number(BUDGET, server.get(BUDGET, own), patches)
        self.ceiling = self._number(CEILING, server.get(CEILING, self.default), patches)
        if self.ceiling < self.default:
            raise ValueError(f"{CEILING}={self.ceiling} is below the server's {BUDGET}={self.default}.")
        if not options.enabled and self.default != patches:
            raise ValueError(f"{BUDGET}={self.default}, and pruning is off (pruning.enabled=False) in this checkpoint.")
        plan_for(config, self.default)

    def of(self, request: Mapping[str, Any]) -> int:
        """Return the visual tokens of each image of a request, by the request's `mm_processor_kwargs`.

        Raises
        ------
        ValueError
            For a number that is not allowed, or above the ceiling, which the message names; and for any other name,
            since pixels of another size would end the engine.
        """
        _check_names(request, BUDGET)
        if CEILING in request and request[CEILING] != self.ceiling:
            raise ValueError(f"{CEILING}={request[CEILING]!r}; a request cannot change the server's {self.ceiling}.")
        if BUDGET not in request:
            return self.default
        patches = self.config.num_patches
        number = self._number(BUDGET, patches if request[BUDGET] is None else request[BUDGET], None)
        number = min(number, patches)
        if number > self.ceiling:
            raise ValueError(
                f"{BUDGET}={request[BUDGET]!r} is above this server's ceiling of {self.ceiling}; allowed: 1 to "
                f"{self.ceiling}. Start the server with --mm-processor-kwargs '{{\"{CEILING}\": N}}' to allow more."
            )
        if not self.config.pruning.enabled and number != patches:
            raise ValueError(f"{BUDGET}={number}, and pruning is off (pruning.enabled=False) on this server.")
        plan_for(self.config, number)
        return number

    @staticmethod
    def _number(name: str, value: Any, most: int | None) -> int:
        if not is_whole(value) or value < 1 or (most is not None and value > most):
            allowed = "a whole number from 1" + ("" if most is None else f" to {most}")
            raise ValueError(f"{name}={value!r}; allowed: {allowed}.")
        return int(value)


def _check_names(given: Mapping[str, Any], allowed: str) -> None:
    """Refuse names in `mm_processor_kwargs` that are not the plug-in's own."""
    if unknown := [name for name in given if name not in (BUDGET, CEILING)]:
        raise ValueError(f"mm_processor_kwargs has {', '.join(map(repr, unknown))}; allowed: {allowed}.")
