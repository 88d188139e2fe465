"""Sentences with numbers that follow from quality results; `benchmarks.quality.readme` puts them on a page."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.quality.methods import ADAPTIVE

BUDGET = 64
"""Visual tokens of the paper's main comparison."""
FEW = (64, 32, 16)
"""The budgets at which methods are compared."""
BOUNDS = ("unpruned", "blind", "oracle")
"""Rows that are no methods."""
EXTENDED = ("ivtp-extended", "ivtp-extended-flat", "ivtp-extended-late")
"""The methods beyond the paper, from both stages to a single choice before the decoder."""
PAPER_LOSS, PAPER_LOSS_RETRAINED = 3.4, 1.0
"""Points that LLaVA-1.5-7B loses at `BUDGET` tokens, averaged over the paper's twelve benchmarks."""


def findings(results: Mapping[str, Any]) -> list[str]:
    """Return sentences on IVTP; what was not measured is left out."""
    parts = (_losses, _extended, _rivals, _absent, _question, _ahead, _adaptive, _oracle, _survival, _hand_over)
    return [sentence for part in (*parts, _other_seed) for sentence in part(results)]


def method_findings(results: Mapping[str, Any]) -> list[str]:
    """Return sentences on the other methods at `BUDGET` tokens; what was not measured is left out."""
    gains = [
        f"{100 * (both - alone):.0f} points to {name}"
        for name, one, two in (("ToMe", "tome", "tome+"), ("TopK", "topk", "topk+"), ("IVTP", "ivtp-v", "ivtp"))
        if (alone := accuracy(results, one)) is not None and (both := accuracy(results, two)) is not None
    ]
    sentences = [f"The decoder's stage adds {_listed(gains)}."] if gains else []
    for method, option in (("cdpruner", "negated=False"), ("fastv", "layer=6")):
        default, changed = accuracy(results, method), accuracy(results, f"{method} {option}")
        if default is not None and changed is not None:
            sentences.append(
                f"`{method}` reaches {default:.1%} with its paper's default and {changed:.1%} with `{option}`."
            )
    return sentences


def accuracy(
    results: Mapping[str, Any], method: str, mode: str = "inference", budget: int | None = None, table: str = ""
) -> float | None:
    """Return the accuracy of one row; None if it was not measured."""
    tokens = budget or (unpruned_tokens(results) if method == "unpruned" else BUDGET)
    for row in results["rows"]:
        if (row["method"], row["mode"], row["visual_tokens"], row["table"]) == (method, mode, tokens, table):
            return row["accuracy"]
    return None


def unpruned_tokens(results: Mapping[str, Any]) -> int | None:
    """Return the visual tokens of the unpruned model."""
    return next((row["visual_tokens"] for row in results["rows"] if row["method"] == "unpruned"), None)


def _loss(results: Mapping[str, Any], *row: Any, **options: Any) -> float | None:
    """Return the points that a row loses against the unpruned model."""
    unpruned, pruned = accuracy(results, "unpruned"), accuracy(results, *row, **options)
    return None if unpruned is None or pruned is None else 100 * (unpruned - pruned)


def _losses(results: Mapping[str, Any]) -> Iterator[str]:
    loss, retrained = _loss(results, "ivtp"), _loss(results, "ivtp", "retrained")
    if loss is not None:
        again = f"; retrained, {retrained:.1f} instead of {PAPER_LOSS_RETRAINED}" if retrained is not None else ""
        yield (
            f"At {BUDGET} tokens IVTP loses {loss:.1f} points, where the paper reports {PAPER_LOSS} for "
            f"LLaVA-1.5-7B{again}."
        )


def _extended(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield which share of the unpruned accuracy is left at each budget."""
    unpruned = accuracy(results, "unpruned")
    for name in ("ivtp", *EXTENDED):
        found = [(tokens, accuracy(results, name, budget=tokens)) for tokens in FEW]
        shares = [f"{share / unpruned:.1%} at {tokens}" for tokens, share in found if share is not None and unpruned]
        if shares and accuracy(results, EXTENDED[0]) is not None:
            yield f"`{name}` keeps {_listed(shares)} tokens, as shares of the unpruned accuracy."


def _rivals(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield which other methods answer more than the extended ones from at most as much computation."""
    rows = [row for row in results["rows"] if not row["table"] and row["mode"] == "inference"]
    for name in EXTENDED:
        better, budgets = [], []
        for own in rows:
            if own["method"] != name or own["visual_tokens"] not in FEW:
                continue
            budgets.append(str(own["visual_tokens"]))
            better += [
                f"`{row['method']}` at {row['visual_tokens']} ({row['accuracy']:.1%}, its {own['accuracy']:.1%})"
                for row in rows
                if row["method"] not in (*EXTENDED, *BOUNDS)
                and row["visual_tokens"] == own["visual_tokens"]
                and row["tflops"] <= own["tflops"]
                and row["accuracy"] > own["accuracy"]
            ]
        if better:
            yield f"From at most the computation of `{name}`, these answer more: {_listed(better)}."
        elif budgets:
            yield (
                f"No method of others answers more than `{name}` from at most its computation, at {_listed(budgets)} "
                "tokens."
            )


def _absent(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield how questions about what is not there are answered."""
    rows = {
        (row["method"], row["visual_tokens"]): row.get("existence")
        for row in results["rows"]
        if not row["table"] and row["mode"] == "inference"
    }
    shown = [("unpruned", unpruned_tokens(results)), *((name, FEW[-1]) for name in ("ivtp", *EXTENDED[:1]))]
    said = [
        f"{found['no']['accuracy']:.1%} with `{name}` at {tokens} tokens"
        for name, tokens in shown
        if (found := rows.get((name, tokens))) and found["no"]["n"]
    ]
    if len(said) == len(shown):
        yield f"Whether something is there that is not: answered with no in {_listed(said)}."


def _question(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the question's guidance adds to the extended method."""
    yield from _beside(results, "ivtp-extended guidance=visual_cls", "without the question, guided by CLS,")


def _ahead(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a choice ahead of the decoder costs."""
    yield from _beside(results, "ivtp-extended decoder_choice=ahead", "choosing ahead of the decoder")


def _beside(results: Mapping[str, Any], method: str, how: str) -> Iterator[str]:
    pairs = [
        (row["visual_tokens"], row["accuracy"], own)
        for row in results["rows"]
        if row["method"] == method and (own := accuracy(results, EXTENDED[0], budget=row["visual_tokens"])) is not None
    ]
    if pairs:
        each = [f"{share:.1%} instead of {own:.1%} at {tokens}" for tokens, share, own in pairs]
        yield f"`{EXTENDED[0]}` {how} answers {_listed(each)} tokens."


def _adaptive(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a budget of its own for every picture answers, with the average that it keeps."""
    rows = [row for row in results["rows"] if row["table"] == ADAPTIVE and "coverage" in row["options"]]
    said = [
        f"{row['accuracy']:.1%} from {row['final_tokens']:.1f} tokens on average, at most {row['visual_tokens']}"
        for row in sorted(rows, key=lambda row: row["final_tokens"])
    ]
    if said:
        yield f"With a budget of its own for every picture it answers {'; '.join(said)}."


def _oracle(results: Mapping[str, Any]) -> Iterator[str]:
    oracle, unpruned = accuracy(results, "oracle"), accuracy(results, "unpruned")
    if oracle is not None and unpruned is not None and oracle >= unpruned:
        yield (
            f"The choice costs, not the number of tokens: an oracle answers {oracle:.1%} from {BUDGET} tokens, the "
            f"unpruned model {unpruned:.1%}."
        )


def _survival(results: Mapping[str, Any]) -> Iterator[str]:
    followed = results.get("survival")
    methods = {} if followed is None else followed["methods"]
    if "ivtp" not in methods:
        return
    ivtp = methods["ivtp"]
    yield (
        f"With IVTP, an object that the question needs is gone for good in {1 - ivtp['steps'][-1]['share']:.1%} of the "
        f"questions that were followed. If all objects are left, at least in parts, {ivtp['accuracy']['left']:.1%} "
        "are answered."
    )
    gone = {name: method["accuracy"]["gone"] for name, method in methods.items() if name != "random"}
    shares = [f"{share:.0%} with `{name}`" for name, share in gone.items() if share is not None]
    if shares:
        yield f"If no patch of an object is left, {_listed(shares)} are answered."
    for name, share in gone.items():
        if share is None:
            yield f"`{name}` leaves a part of every object."


def _hand_over(results: Mapping[str, Any]) -> Iterator[str]:
    losses = {
        row["options"]["tower_tokens"]: _loss(results, row["method"], table="hand-over")
        for row in results["rows"]
        if row["table"] == "hand-over" and row["visual_tokens"] == BUDGET
    }
    if losses and accuracy(results, "unpruned") is not None:
        losses[round(1.875 * BUDGET)] = _loss(results, "ivtp")
        measured = sorted((tokens, loss) for tokens, loss in losses.items() if loss is not None)
        each = _listed([f"{loss:.1f} points with {tokens}" for tokens, loss in measured])
        yield f"The hand-over matters most: IVTP loses {each} tokens from the tower."


def _other_seed(results: Mapping[str, Any]) -> Iterator[str]:
    other = results.get("other_seed")
    if other is None:
        return
    rows = {row["method"]: row["accuracy"] for row in other["rows"] if row["visual_tokens"] == BUDGET}
    agrees = not any(found["disagree"] for found in other["budgets"].values())
    each = _listed([f"{name} {share:.1%}" for name, share in sorted(rows.items(), key=lambda item: item[1])])
    verdict = "puts the methods in the same order" if agrees else "does not put all methods in the same order"
    note = f", {other['note']}," if other.get("note") else ""
    yield f"A second training seed{note} {verdict}; at {BUDGET} tokens: {each}."


def _listed(parts: list[str]) -> str:
    """Return parts as an enumeration: "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
