"""The rows of the table of retrained systems, in the order in which they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.methods import Row, ablation_rows, main_rows
from modeling_ivtp.methods import METHODS, Method
from modeling_ivtp.model.pruner import Pruner
from modeling_ivtp.training.parts import UNPRUNED, PrunedBy

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
            Retrained(
                f"atp-llava target={target}",
                "Table 1",
                PrunedBy("atp-llava", None, {"target": target}),
                (*LEARNS, "pruner"),
                untrained=Applied(
                    f"atp-spatial average={target}", TOKENS, {}, method_object=METHODS["atp-spatial"](average=target)
                ),
            )
            for target in (144, 88)
        ),
        *(
            Retrained(name, "Table 1", PrunedBy(UNPRUNED), connector={"name": name, "tokens": TOKENS})
            for name in ("c_abstractor", "context_attention", "resampler")
        ),
        *(of(name) for name in _REST),
        *(
            Retrained(
                f"sparse-attention {term}",
                "001",
                PrunedBy("sparse-attention", TOKENS, {"sparsity": term}),
                (*LEARNS, "pruner"),
                untrained=Row("text_attention", TOKENS, {}, system="text_attention"),
            )
            for term in ("l1", "entropy", "l1_over_l2", "none")
        ),
        *(of(name, "Table 7") for name in _TABLE_7),
    ]
    ablations, _ = ablation_rows(config, (TOKENS,))
    for table in TABLES:
        for row in ablations:
            if row.table != table:
                continue
            options = {name: value for name, value in row.options.items() if name not in ("enabled", "visual_tokens")}
            rows.append(Retrained(row.method, table, PrunedBy("ivtp", TOKENS, options), untrained=row))
    return rows


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
