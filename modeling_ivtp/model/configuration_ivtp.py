"""Configuration of IVTP-LLaVA: LLaVA's own, CLIP's text tower, and the pruning options."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Any

from transformers import LlavaConfig
from transformers.models.clip.configuration_clip import CLIPTextConfig

from .adapter import naming_adapter
from .connector_options import ConnectorConfig, check_connector
from .schedule import PruningPlan, plan_pruning

CHOICES: dict[str, tuple[str, ...]] = {
    "aggregation": ("rollout", "mean", "max", "multiply", "last"),
    "importance": ("own", "accumulated"),
    "choice": ("top", "diverse"),
    "guidance": ("clip", "mean_text", "text_similarity", "visual_cls"),
    "pseudo_cls": ("propagate", "pool"),
    "positions": ("original", "compact"),
    "decoder_choice": ("within", "ahead"),
}
"""The allowed values of the options that are words."""

AUTO = "auto"
AUTO_COVERAGE = {"top": 0.9, "diverse": 0.999}
"""The coverage of `visual_tokens="auto"`, by `choice`. A few diverse tokens cover most of what all have in common."""
AUTO_CEILING = 64
AUTO_FLOOR = 16
"""The floor of every coverage that sets none."""

AUTO_MAP = {
    "AutoConfig": "configuration_ivtp.IVTPLlavaConfig",
    "AutoModel": "modeling_ivtp.IVTPLlavaForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_ivtp.IVTPLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_ivtp.IVTPLlavaForConditionalGeneration",
}
"""Our classes by Auto class. Saving adds the saved class alone; a folder that loads through any of them needs all."""


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number, one of NumPy's included."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a number, one of NumPy's included."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_weight(value: Any) -> bool:
    """Return whether a value is a finite number of at least 0."""
    return is_number(value) and 0 <= value < float("inf")


@dataclass(frozen=True)
class IVTPPruningConfig:
    """The pruning options of IVTP. Immutable: change them with `changed` or `model.set_pruning`.

    Attributes
    ----------
    enabled : bool, default True
        False runs stock LLaVA, operation for operation.
    visual_tokens : int or "auto", default 64
        Visual tokens of one image that are left in the end. A number above the image's patches keeps all. `"auto"`
        stands for `visual_tokens=64` with a coverage of 0.9, with the diverse choice of 0.999, where none is given.
    coverage : float or None, default None
        The share of importance, from 0 to 1, that the tokens of a picture have to cover for its question. The last
        group of the decoder then keeps as few tokens as reach it, at most `visual_tokens`. With the diverse choice, a
        token also covers what others have in common with it. None: every picture keeps `visual_tokens`.
    min_visual_tokens : int or None, default None
        The fewest tokens that a picture keeps, whatever they cover; it needs `coverage`. None: 16, at most
        `visual_tokens`.
    tower_tokens : int or None, default None
        Visual tokens that the vision tower hands over to the language model. None: 1.875 x `visual_tokens` (120 for
        64), at most all; the ratio follows from the FLOPs in the paper's Tables 3 and 9.
    layers_per_group : int or None, default 3
        Layers that are rolled out together (Table 8). None: each stage is one group.
    tower_layers : int or None, default None
        Layers of the vision tower that take part, counted from the first. None: all. 0: the tower drops nothing.
    decoder_layers : int, default 12
        Layers of the language model that take part, counted from the first. 0: IVTP-V, vision only (Table 7).
    relevance_threshold : float, default 0.2
        The threshold tau of Eq. 8 on the cosine of Eq. 6.
    aggregation : {"rollout", "mean", "max", "multiply", "last"}, default "rollout"
        How a group's attention maps are combined: Eq. 3, the rows of Table 5, or the last layer alone (Table 4).
    importance : {"own", "accumulated"}, default "own"
        Whether a group of the vision tower ranks by its own attention alone, or by that of all groups so far.
        `"accumulated"` adds up rows that sum to one, so it needs an aggregation other than `max` and `multiply`.
    choice : {"top", "diverse"}, default "top"
        Whether the tokens with the highest importance stay, or a set that is important and diverse.
    sharpness : float or None, default None
        The exponent of importance in the diverse choice, 0 or more; 0 is diversity alone. None: 0.25. A number needs
        `choice="diverse"`.
    guidance : {"clip", "mean_text", "text_similarity", "visual_cls"}, default "clip"
        What the pseudo-CLS token is made of (Table 6, from the last row to the first but one).
    pseudo_cls : {"propagate", "pool"}, default "propagate"
        Whether the pseudo-CLS token runs through the layers itself, or is pooled from the key words at each layer.
    positions : {"original", "compact"}, default "original"
        Whether kept tokens keep their RoPE positions or are renumbered without gaps.
    decoder_choice : {"within", "ahead"}, default "within"
        Whether the second stage drops tokens while the decoder runs, as in the paper, or ahead of it: what stands
        before the end of the images runs through the first `decoder_layers` layers alone, which makes the same choice.
        The decoder then gets the final tokens from its first layer on, and the cache holds as many in every layer.
        `"ahead"` needs `pseudo_cls="propagate"`.
    strict : bool, default False
        Raise, instead of warning once, when the inputs that text guidance needs are missing.

    Raises
    ------
    ValueError
        For a value that is not allowed; the message names it and the allowed ones.
    """

    enabled: bool = True
    visual_tokens: int = 64
    coverage: float | None = None
    min_visual_tokens: int | None = None
    tower_tokens: int | None = None
    layers_per_group: int | None = 3
    tower_layers: int | None = None
    decoder_layers: int = 12
    relevance_threshold: float = 0.2
    aggregation: str = "rollout"
    importance: str = "own"
    choice: str = "top"
    sharpness: float | None = None
    guidance: str = "clip"
    pseudo_cls: str = "propagate"
    positions: str = "original"
    decoder_choice: str = "within"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.visual_tokens == AUTO:
            object.__setattr__(self, "visual_tokens", AUTO_CEILING)
            # A choice that is not allowed is refused below.
            usual = AUTO_COVERAGE.get(self.choice)
            object.__setattr__(self, "coverage", usual if self.coverage is None else self.coverage)
        for name in ("enabled", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"pruning.{name}={getattr(self, name)!r}; allowed: True, False.")
        for name, minimum, optional in (
            ("visual_tokens", 1, False),
            ("min_visual_tokens", 1, True),
            ("tower_tokens", 1, True),
            ("layers_per_group", 1, True),
            ("tower_layers", 0, True),
            ("decoder_layers", 0, False),
        ):
            value = getattr(self, name)
            if not (value is None and optional) and not (is_whole(value) and value >= minimum):
                allowed = f"an integer of at least {minimum}" + (", or None" if optional else "")
                allowed += f', or "{AUTO}"' if name == "visual_tokens" else ""
                raise ValueError(f"pruning.{name}={value!r}; allowed: {allowed}.")
            object.__setattr__(self, name, None if value is None else int(value))
        if self.tower_tokens is not None and self.tower_tokens < self.visual_tokens:
            raise ValueError(
                f"pruning.tower_tokens={self.tower_tokens} is below visual_tokens={self.visual_tokens}: the language "
                "model cannot keep more than the vision tower hands over."
            )
        threshold = self.relevance_threshold
        if not is_number(threshold) or not -1 <= threshold <= 1:
            raise ValueError(f"pruning.relevance_threshold={threshold!r}; allowed: a cosine, from -1 to 1.")
        object.__setattr__(self, "relevance_threshold", float(threshold))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"pruning.{name}={getattr(self, name)!r}; allowed: {', '.join(choices)}.")
        self._check_extension()
        self._check_coverage()

    def _check_coverage(self) -> None:
        """Refuse bounds that cross, and a coverage that nothing would follow."""
        fewest, coverage = self.min_visual_tokens, self.coverage
        if coverage is None:
            if fewest is not None:
                raise ValueError(f"pruning.min_visual_tokens={fewest} without coverage; allowed: None, or a coverage.")
            return
        if not is_number(coverage) or not 0 < coverage <= 1:
            raise ValueError(f"pruning.coverage={coverage!r}; allowed: a share above 0, at most 1, or None.")
        object.__setattr__(self, "coverage", float(coverage))
        if fewest is not None and fewest > self.visual_tokens:
            raise ValueError(
                f"pruning.min_visual_tokens={fewest} is above visual_tokens={self.visual_tokens}; allowed: 1 to "
                f"{self.visual_tokens}, or None."
            )
        if self.decoder_layers == 0:
            raise ValueError(
                "pruning.decoder_layers=0 with a coverage: the decoder decides how many tokens a question needs; "
                "allowed: 1 or more, or coverage=None."
            )

    @property
    def fewest_tokens(self) -> int:
        """The fewest tokens that a picture keeps, where `coverage` decides."""
        floor = AUTO_FLOOR if self.min_visual_tokens is None else self.min_visual_tokens
        return min(floor, self.visual_tokens)

    def _check_extension(self) -> None:
        """Refuse a sharpness that is out of range, and options that exclude each other."""
        sharpness = self.sharpness
        if sharpness is not None:
            if not is_weight(sharpness):
                raise ValueError(f"pruning.sharpness={sharpness!r}; allowed: a number of at least 0, or None.")
            if self.choice != "diverse":
                raise ValueError(
                    f'pruning.sharpness={sharpness!r} with choice={self.choice!r}; allowed: None, or choice="diverse".'
                )
            object.__setattr__(self, "sharpness", float(sharpness))
        if self.importance == "accumulated" and self.aggregation in ("max", "multiply"):
            raise ValueError(
                f'pruning.aggregation={self.aggregation!r} with importance="accumulated", which adds up rows that sum '
                "to one; allowed: rollout, mean, last."
            )
        if self.decoder_choice == "ahead" and self.pseudo_cls == "pool":
            raise ValueError(
                'pruning.decoder_choice="ahead" with pseudo_cls="pool", which pools words that stand after the image '
                'anew at every layer; allowed: pseudo_cls="propagate", or decoder_choice="within".'
            )

    @classmethod
    def create(cls, value: Any = None, **changes: Any) -> "IVTPPruningConfig":
        """Make a config from None (all defaults), a mapping or another config, with `changes` on top.

        Raises
        ------
        ValueError
            For an unknown option, a value that is not allowed, or a `value` of another type.
        """
        if value is None:
            options: dict[str, Any] = {}
        elif isinstance(value, Mapping):
            options = dict(value)
        elif is_dataclass(value) and not isinstance(value, type):
            options = asdict(value)
        else:
            raise ValueError(f"pruning={value!r}; allowed: a mapping of options or an IVTPPruningConfig.")
        options |= changes
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"Unknown pruning option(s) {', '.join(unknown)}; allowed: {', '.join(known)}.")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values, ready for JSON."""
        return asdict(self)

    def changed(self, **changes: Any) -> "IVTPPruningConfig":
        """Return a copy with `changes`; raises ValueError as the class does.

        `visual_tokens="auto"` stands for the same coverage as in a new configuration, whatever was set before. That
        coverage follows a change of `choice`.
        """
        if changes.get("visual_tokens") == AUTO:
            changes = {"coverage": None} | changes
        elif self.coverage is not None and self.coverage == AUTO_COVERAGE[self.choice]:
            changes = {"coverage": AUTO_COVERAGE.get(changes.get("choice", self.choice), self.coverage)} | changes
        return type(self).create(self, **changes)

    def at_budget(self, visual_tokens: int | str) -> dict[str, Any]:
        """Return the changes that prune to another final number of tokens, or to `"auto"`.

        A hand-over below it follows from it instead, and a minimum above it is lowered. With a number, a coverage
        stays, with it as ceiling.

        Examples
        --------
        >>> options = IVTPPruningConfig(visual_tokens=64, tower_tokens=120)
        >>> options.changed(**options.at_budget(192)).tower_tokens is None
        True
        """
        handed_over, fewest = self.tower_tokens, self.min_visual_tokens
        most = AUTO_CEILING if visual_tokens == AUTO else int(visual_tokens)
        return {
            "enabled": True,
            "visual_tokens": visual_tokens,
            "tower_tokens": None if handed_over is None or handed_over < most else handed_over,
            "min_visual_tokens": None if fewest is None else min(fewest, most),
        }


class IVTPLlavaConfig(LlavaConfig):
    """`LlavaConfig` with CLIP's text tower, the pruning options, and a connector where there is one.

    Parameters
    ----------
    clip_text_config : CLIPTextConfig or dict, optional
        CLIP's text tower; its `projection_dim` is the width in which words and image are compared (Eq. 6). None: the
        model has no text tower, and the visual CLS token takes the place of the pseudo-CLS token.
    pruning : IVTPPruningConfig or dict, optional
        The pruning options; default: the paper's setting for LLaVA-1.5, 576 to 64 tokens. With a connector: no pruning.
    connector : ConnectorConfig, dict or str, optional
        A trained module that makes fewer tokens of an image before LLaVA's projector, such as
        `{"name": "c_abstractor", "tokens": 64}`. None: LLaVA as it is. It excludes pruning.
    **kwargs
        Everything `LlavaConfig` takes.

    Raises
    ------
    ValueError
        For an unknown option of pruning or connector, or a value that is not allowed.
    """

    model_type = "ivtp_llava"
    # Attention implementation and dtype reach the parts through this table.
    sub_configs = {**LlavaConfig.sub_configs, "clip_text_config": CLIPTextConfig}  # noqa: RUF012

    clip_text_config: dict | CLIPTextConfig | None = None
    pruning: Any = None
    connector: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pruning is None and self.connector is not None:
            self.pruning = {"enabled": False}
        self.pruning = IVTPPruningConfig.create(self.pruning)
        if isinstance(self.clip_text_config, dict):
            self.clip_text_config = CLIPTextConfig(**self.clip_text_config)
        # Ours win: folders of version 0.1.0 map AutoModel to the class that cannot generate.
        super().__post_init__(**kwargs | {"auto_map": (kwargs.get("auto_map") or {}) | AUTO_MAP})

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a configuration as transformers does; a stock LLaVA's becomes ours with default pruning options."""
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        with naming_adapter(source, **kwargs):
            config, rest = super().get_config_dict(*args, **kwargs)
            if not config:
                # transformers would build LLaVA-1.5-7B from the defaults.
                raise FileNotFoundError(f"{source} has no config.json")
        if config.get("model_type") == LlavaConfig.model_type:
            config["model_type"] = cls.model_type
        if config.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"{source or 'The configuration'} is of model_type {config['model_type']!r}; allowed: "
                f"{LlavaConfig.model_type!r} (LLaVA-1.5 in transformers' format) and {cls.model_type!r}."
            )
        return config, rest

    def __setattr__(self, name: str, value: Any) -> None:
        unset = value is None and "pruning" not in self.__dict__  # `__post_init__` chooses the default
        if name == "pruning" and not unset and not isinstance(value, IVTPPruningConfig):
            # A mapping changes some of a checkpoint's options and leaves the others; None changes none.
            current = self.__dict__.get("pruning")
            if isinstance(current, IVTPPruningConfig) and value is None:
                return
            if isinstance(current, IVTPPruningConfig) and isinstance(value, Mapping):
                value = current.changed(**value)
            else:
                value = IVTPPruningConfig.create(value)
        if name == "connector":
            value = ConnectorConfig.create(value)
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, `pruning` and, if there is one, `connector` included."""
        output = super().to_dict()
        output["pruning"] = self.pruning.to_dict()
        output.pop("connector", None)
        if self.connector is not None:
            output["connector"] = self.connector.to_dict()
        return output

    def check_connector(self) -> None:
        """Refuse a connector that does not fit this model; see `connector_options.check_connector`."""
        check_connector(self)

    @property
    def num_patches(self) -> int:
        """Patches of one image, N: 576 for 336 pixels and patches of 14."""
        rows, columns = self.grid
        return rows * columns

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of one image: (24, 24) for 336 pixels and patches of 14."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    @property
    def feature_depth(self) -> int:
        """Number of layers of the vision tower below the features that LLaVA reads: 23 of 24."""
        layers = self.vision_feature_layer
        states = self.vision_config.num_hidden_layers + 1
        return max(layer % states for layer in ([layers] if isinstance(layers, int) else layers))

    def pruning_plan(self) -> PruningPlan | None:
        """Plan the groups of both stages for this model; None when nothing is to be dropped.

        Raises
        ------
        ValueError
            If the options do not fit the model's layers.
        """
        return plan_pruning(
            self.pruning,
            self.num_patches,
            self.vision_config.num_hidden_layers,
            self.text_config.num_hidden_layers,
        )


IVTPLlavaConfig.register_for_auto_class()
