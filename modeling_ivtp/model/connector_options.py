"""Options of a connector: what makes fewer tokens of an image's patches before LLaVA's projector."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from numbers import Integral
from typing import Any

DEFAULTS: dict[str, dict[str, Any]] = {
    "c_abstractor": {"tokens": 64, "depth": 3, "positions": True},
    "context_attention": {"tokens": 65, "strict": False},
    "resampler": {"tokens": 64, "heads": None},
}
"""The connectors, with the options that each has."""

_SMALLEST = {"tokens": 1, "depth": 0, "heads": 1}
HEAD_WIDTH = 128
"""Width of one head of the resampler, in Qwen-VL."""

_EXCLUDES = (
    "connector={name!r} with pruning.enabled=True: pruning chooses among patches, and a connector leaves none. "
    "Allowed: pruning.enabled=False, or connector=None."
)


@dataclass(frozen=True)
class ConnectorConfig:
    """The options of a connector. An option of another connector stays None.

    Attributes
    ----------
    name : {"c_abstractor", "context_attention", "resampler"}
        That of Honeybee, of LLaMA-VID or of Qwen-VL (the rows of IVTP's Tables 1 to 3).
    tokens : int
        Tokens that the language model gets of an image, default 64; 65 for `"context_attention"`. `"c_abstractor"` and
        `"resampler"` need a square; `"context_attention"` has one token of context, and a grid as square as possible of
        the others: 65 is 8 x 8 and one, 64 is 7 x 9 and one.
    depth : int, default 3
        Of `"c_abstractor"`: bottleneck blocks before the pooling, and as many after it. 0: pooling alone.
    positions : bool, default True
        Of `"c_abstractor"`: whether a learned position is added to each patch.
    heads : int or None
        Of `"resampler"`: heads of its attention. None: one for each 128 of the features' width, at least one.
    strict : bool, default False
        Of `"context_attention"`: raise, instead of warning once, when the question is missing.

    Raises
    ------
    ValueError
        For a name or value that is not allowed, or an option of another connector.
    """

    name: str
    tokens: int | None = None
    depth: int | None = None
    positions: bool | None = None
    heads: int | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        if self.name not in DEFAULTS:
            raise ValueError(f"connector.name={self.name!r}; allowed: {', '.join(DEFAULTS)}.")
        own = DEFAULTS[self.name]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name not in own:
                if value is not None:
                    raise ValueError(
                        f"connector.{field.name}={value!r} is no option of {self.name!r}; allowed: {', '.join(own)}."
                    )
                continue
            value = own[field.name] if value is None else value
            object.__setattr__(self, field.name, self._checked(field.name, value))
        if self.name != "context_attention" and math.isqrt(self.places) ** 2 != self.places:
            raise ValueError(f"connector.tokens={self.tokens} with name={self.name!r}; allowed: squares, such as 64.")
        if self.name == "context_attention" and self.places < 1:
            raise ValueError(f"connector.tokens={self.tokens} with name={self.name!r}; allowed: at least 2.")

    @staticmethod
    def _checked(name: str, value: Any) -> Any:
        if name in ("positions", "strict"):
            if not isinstance(value, bool):
                raise ValueError(f"connector.{name}={value!r}; allowed: True, False.")
            return value
        if name == "heads" and value is None:
            return None
        if not isinstance(value, Integral) or isinstance(value, bool) or value < _SMALLEST[name]:
            raise ValueError(f"connector.{name}={value!r}; allowed: an integer of at least {_SMALLEST[name]}.")
        return int(value)

    @classmethod
    def create(cls, value: Any) -> "ConnectorConfig | None":
        """Make a config from a name, a mapping or another config; None stays None.

        Raises
        ------
        ValueError
            For an unknown option, a value that is not allowed, or a `value` of another type.
        """
        if value is None:
            return None
        if isinstance(value, str):
            value = {"name": value}
        elif is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if not isinstance(value, Mapping) or "name" not in value:
            raise ValueError(
                f'connector={value!r}; allowed: None, a name, or a mapping with "name"; names: {", ".join(DEFAULTS)}.'
            )
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(value) - set(known)):
            raise ValueError(f"Unknown connector option(s) {', '.join(unknown)}; allowed: {', '.join(known)}.")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """Return the connector's own options as plain values, ready for JSON."""
        return {"name": self.name} | {name: getattr(self, name) for name in DEFAULTS[self.name]}

    @property
    def places(self) -> int:
        """Tokens that stand for places of the image: all, but for the token of context."""
        assert self.tokens is not None
        return self.tokens - (self.name == "context_attention")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of these tokens, as nearly equal as their number allows."""
        rows = next(rows for rows in range(math.isqrt(self.places), 0, -1) if self.places % rows == 0)
        return rows, self.places // rows

    @property
    def reads_question(self) -> bool:
        """Return whether the tokens of an image depend on the question."""
        return self.name == "context_attention"


def feature_width(config: Any) -> int:
    """Return the width D of the features that a connector gets, several layers of the tower side by side."""
    layers = config.vision_feature_layer
    return int(config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers)))


def resampler_heads(options: ConnectorConfig, width: int) -> int:
    """Return the heads of the resampler's attention."""
    return max(1, width // HEAD_WIDTH) if options.heads is None else options.heads


def without_pruning(connector: Any, pruning: Any) -> dict[str, Any]:
    """Return the pruning options of a model that gets a connector, before it is loaded: pruning is off.

    Raises
    ------
    ValueError
        If the connector's options are not allowed, or pruning was asked for.
    """
    options = ConnectorConfig.create(connector)
    if pruning is None:
        return {"enabled": False}
    wanted = dict(pruning) if isinstance(pruning, Mapping) else asdict(pruning)
    if options is not None and wanted.get("enabled", True):
        raise ValueError(_EXCLUDES.format(name=options.name))
    return wanted


def check_connector(config: Any) -> None:
    """Refuse a connector that does not fit its LLaVA.

    Raises
    ------
    ValueError
        If there are more tokens than patches, by row or by column; if the CLS token is among the features; if the
        width cannot be divided among heads or positions; if the question cannot be read; or if pruning is on.
    """
    options: ConnectorConfig | None = config.connector
    if options is None:
        return
    if config.pruning.enabled:
        raise ValueError(_EXCLUDES.format(name=options.name))
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with a connector, which takes "
            "patches alone; allowed: 'default'."
        )
    if any(ours > theirs for ours, theirs in zip(options.grid, config.grid, strict=True)):
        shapes = " x ".join(map(str, options.grid)), " x ".join(map(str, config.grid))
        raise ValueError(f"connector.tokens={options.tokens} are {shapes[0]} places; allowed: at most {shapes[1]}.")
    width = feature_width(config)
    if options.name == "resampler":
        heads = resampler_heads(options, width)
        if width % heads:
            raise ValueError(f"connector.heads={heads}; allowed: divisors of the features' width, {width}.")
        if width % 4:
            raise ValueError(f"connector.name='resampler' needs a features' width that 4 divides; it is {width}.")
    if options.reads_question and config.clip_text_config is None:
        raise ValueError(
            f"connector.name={options.name!r} reads the question with CLIP's text tower, and clip_text_config is None: "
            "from_llava(..., clip=...) joins it."
        )
