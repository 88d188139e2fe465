"""The rows of the table of retrained systems, in the order in which they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.methods import Row, ablation_rows, main_rows
from modeling_ivtp.methods import METHODS, Method
from modeling_ivtp.methods.method import scaled_layers
from modeling_ivtp.methods.names import UNPRUNED
from modeling_ivtp.model.pruner import Pruner
from modeling_ivtp.trained.atp import LAYERS
from modeling_ivtp.training.parts import PrunedBy

TOKENS = 64
LEARNS = ("projector", "language_model")
TABLES = ("Table 4", "Table 6", "Table 5", "Table 8")
"""The tables of ablations, the most wanted first."""
_FIRST = ("ivtp",)
_REST = (
    "random", "topk", "spatial_pooling", "evit", "tome", "tome+", "ivtp-v", "pyramiddrop", "fastv", "text_attention",
)  # fmt: skip
_TABLE_7 = ("topk+",)


@dataclass(frozen=True)
class Applied(Row):
    """A row of the quality benchmark that a method made ahead prunes, such as one with modules.

    Attributes
    ----------
    method_object : Method or None
        None: nothing is pruned.
    """

    method_object: Method | None = field(default=None, compare=False)

    def pruner(self, config: Any) -> Pruner:
        """Return the pruner of the row."""
        return super().pruner(config) if self.method_object is None else self.method_object.bind(config)

    def applied(self, model: Any) -> Any:
        """Return a context in which a model prunes as the row says."""
        return super().applied(model) if self.method_object is None else self.method_object(model)


@dataclass(frozen=True)
class Retrained:
    """A system that is trained, and what is asked of it.

    Attributes
    ----------
    name : str
    table : str
        The table it belongs to; `"control"` is the unpruned model, trained as long.
    pruned_by : PrunedBy
    learns : tuple of str
        As `trains` of a preset.
    connector : mapping or None
        A connector to join. It is trained in two stages: half of the steps without the language model, half with it.
    answers : mapping
        What the trained system is asked as: a name, and options in place of those it was trained with.
    untrained : Row or None
        The row of the quality benchmark that shows the system without training. None: there is none.
    """

    name: str
    table: str
    pruned_by: PrunedBy
    learns: tuple[str, ...] = LEARNS
    connector: Mapping[str, Any] | None = None
    answers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    untrained: Row | None = None

    def rows(self, config: Any, method: Method | None) -> list[Row]:
        """Return the rows as which the trained system is asked; `method` has modules where it learned some."""
        if method is not None and self.pruned_by.is_trained:
            asked = self.answers or {self.name: {}}
            return [
                Applied(name, TOKENS, {}, table=self.table, method_object=method.changed(**options))  # type: ignore[attr-defined]
                for name, options in asked.items()
            ]
        if self.pruned_by.method == UNPRUNED:
            tokens = config.num_patches if self.connector is None else config.connector.tokens
            return [Row(self.name, tokens, {"enabled": False}, table=self.table)]
        assert self.untrained is not None
        return [self.untrained]


def retrained_rows(config: Any) -> list[Retrained]:
    """List all systems in the order of their training: control, IVTP, what learns to choose, connectors, the rest."""
    main = {row.key: row for row in main_rows(config, (TOKENS,))}
    depth = config.text_config.num_hidden_layers

    def of(name: str, table: str = "Table 1") -> Retrained:
        row = main.get(f"{name}@{TOKENS}") if name in ("ivtp", "ivtp-v") else None
        row = row or Row(name, TOKENS, {}, system=name)
        return Retrained(name, table, PrunedBy(name, TOKENS), untrained=row)

    rows = [
        Retrained("unpruned", "control", PrunedBy(UNPRUNED), untrained=main[f"unpruned@{config.num_patches}"]),
        *(of(name) for name in _FIRST),
        Retrained(
            "lvpruning",
            "Table 1",
            PrunedBy("lvpruning", None, {"ratio": 0.5}),
            ("pruner",),
            answers={
                "lvpruning": {"keep": TOKENS},
                **{f"lvpruning ratio={ratio}": {"ratio": ratio} for ratio in (0.6, 0.5, 0.45)},
            },
            untrained=Row("lvpruning-topk", TOKENS, {}, system="lvpruning-topk"),
        ),
        *(
            _atp(f"target={target}", "Table 1", config, target=target, layers=scaled_layers(layers, 32, depth))
            for target, layers in ((144, LAYERS), (88, (1, 13, 25)))
        ),
        *(
            Retrained(name, "Table 1", PrunedBy(UNPRUNED), connector={"name": name, "tokens": TOKENS})
            for name in ("c_abstractor", "context_attention", "resampler")
        ),
        *(of(name) for name in _REST),
        *(_sparse(term, {"sparsity": term}) for term in ("l1", "entropy", "l1_over_l2", "none")),
        *(of(name, "Table 7") for name in _TABLE_7),
    ]
    ablations, _ = ablation_rows(config, (TOKENS,))
    for table in TABLES:
        for row in ablations:
            if row.table != table:
                continue
            options = {name: value for name, value in row.options.items() if name not in ("enabled", "visual_tokens")}
            rows.append(Retrained(row.method, table, PrunedBy("ivtp", TOKENS, options), untrained=row))
    return rows + _claims(config)


def _claims(config: Any) -> list[Retrained]:
    """List the ablations of ATP-LLaVA's paper, at an average of 144, and those of the summary."""
    depth = config.text_config.num_hidden_layers
    first, late, early = (scaled_layers((layer,), 32, depth) for layer in (8, 16, 4))
    return [
        _atp("fixed ratios", "ATP's Table 2", config, ratios=(fixed_ratio(config, 144),) * len(LAYERS)),
        _atp("frozen, rope=1d", "ATP's Table 3", config, ("pruner",), rope="1d"),
        *(_atp(f"scores={one}", "ATP's Table 4", config, scores=one) for one in ("redundancy", "spatial")),
        _atp("rope=1d", "ATP's Table 4", config, rope="1d"),
        *(_atp(f"attention={one}", "ATP's Table 5", config, attention=one) for one in ("self", "cross")),
        _sparse("readers=vision", {"readers": "vision"}),
        _sparse("fuse=1", {"fuse": 1}),
        _sparse("fusion=fixed", {"fusion": "fixed"}, {}),
        *(_sparse(f"one step, layers={layers}", {"layers": layers}) for layers in (early, first, late)),
    ]


def _atp(
    name: str, table: str, config: Any, learns: tuple[str, ...] = (*LEARNS, "pruner"), **options: Any
) -> Retrained:
    """Return ATP-LLaVA with options, beside its untrained stand-in with as many tokens on average."""
    average = options.get("target", 144)
    stand_in = METHODS["atp-spatial"](average=average, layers=options.get("layers"))
    if "ratios" not in options:
        options = {"target": average} | options
    untrained = Applied(f"atp-spatial average={average}", TOKENS, {}, method_object=stand_in)
    return Retrained(f"atp-llava {name}", table, PrunedBy("atp-llava", None, options), learns, untrained=untrained)


def _sparse(name: str, options: dict[str, Any], untrained: dict[str, Any] | None = None) -> Retrained:
    """Return sparse attention with options, beside text attention with those that it knows."""
    if untrained is None:
        untrained = {option: value for option, value in options.items() if option != "sparsity"}
    row = Row(f"text_attention {name}" if untrained else "text_attention", TOKENS, untrained, system="text_attention")
    pruned_by = PrunedBy("sparse-attention", TOKENS, options)
    return Retrained(f"sparse-attention {name}", "sparse attention", pruned_by, (*LEARNS, "pruner"), untrained=row)


def fixed_ratio(config: Any, average: float) -> float:
    """Return the ratio of all three drops that leaves this many tokens per layer on average (ATP-LLaVA, Table 2)."""
    depth, patches = config.text_config.num_hidden_layers, config.num_patches
    tops = scaled_layers(LAYERS, 32, depth)
    spans = [after - top for top, after in zip(tops, [*tops[1:], depth], strict=True)]
    low, high = 0.0, 1.0
    for _ in range(40):
        ratio = (low + high) / 2
        total = tops[0] + sum(span * ratio ** (drop + 1) for drop, span in enumerate(spans))
        low, high = (low, ratio) if total * patches / depth > average else (ratio, high)
    return round(ratio, 4)


def chosen_rows(config: Any, names: tuple[str, ...] | list[str]) -> list[Retrained]:
    """Return the systems of some names, all for none.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    rows = retrained_rows(config)
    known = [row.name for row in rows]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"No system {', '.join(unknown)}; allowed: {', '.join(known)}.")
    return [row for row in rows if not names or row.name in names]
