"""The results of `benchmarks.serving.speed`, as a page and as a block of docs/vllm.md."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling_ivtp.files.tables import markdown_table

STOCK = "stock"
PARTS = {"_encode": "vision tower", "_read": "pseudo CLS", "_prepare": "pseudo CLS", "_choose": "choice"}
"""Methods of the encoder that are timed apart, and what they do."""

Row = dict[str, Any]


def ratios(rows: Sequence[Row], arm: str, concurrency: int, what: str) -> list[float]:
    """Return how many times as much of `what` stock takes as an arm, for each round."""
    by_round = {(row["round"], row["arm"]): row[what] for row in rows if row["concurrency"] == concurrency}
    rounds = sorted({number for number, _ in by_round})
    return [by_round[number, STOCK] / by_round[number, arm] for number in rounds]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _arms(rows: Sequence[Row]) -> list[str]:
    return [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != STOCK]


def tables(rows: Sequence[Row]) -> str:
    """Return the table of ratios, and that of the parts of a request at the highest concurrency."""
    concurrencies = sorted({row["concurrency"] for row in rows})
    speeds = [
        (
            arm,
            concurrency,
            *(_spread(ratios(rows, arm, concurrency, what)) for what in ("cpu_seconds", "seconds")),
        )
        for arm in sorted(_arms(rows), reverse=True)
        for concurrency in concurrencies
    ]
    header = ("arm", "concurrency", "stock's CPU time over its own", "requests per second over stock's")
    parts, shares = [*dict.fromkeys(PARTS.values())], []
    for arm in (STOCK, *sorted(_arms(rows), reverse=True)):
        found = [row for row in rows if row["arm"] == arm and row["concurrency"] == concurrencies[-1]]
        own = [statistics.median(row["parts"].get(part, 0.0) for row in found) * 1000 for part in parts]
        whole = statistics.median(row["cpu_seconds"] for row in found) * 1000
        cells = ["–" if arm == STOCK else f"{value:.0f}" for value in own]
        shares.append((arm, *cells, f"{whole - sum(own):.0f}", f"{whole:.0f}"))
    return (
        f"{markdown_table(header, speeds)}\n"
        f"CPU milliseconds of a request at concurrency {concurrencies[-1]}, medians:\n\n"
        f"{markdown_table(('arm', *parts, 'all else', 'whole'), shares)}"
    )


def _run(results: Mapping[str, Any]) -> str:
    """Return a sentence on the run."""
    host = results["machine"]
    shared = " The machine was shared with other work, so only ratios count." * (results["load"] > 1)
    return (
        f"The {results['model']} in {results['dtype']}{', eager' * results['eager']}, on {host['device']}, "
        f"{host['cpus']} CPUs; {results['new_tokens']} tokens out, new pictures in every request, medians of "
        f"{len({row['round'] for row in results['rows']})} interleaved rounds (least to most).{shared}"
    )


def excerpt(folder: Path) -> str:
    """Return the newest result as the block of docs/vllm.md."""
    file = max(folder.glob("serving-*.json"))
    results = json.loads(file.read_text())
    begin = "<!-- serving: written by benchmarks/speed_readme.py -->"
    link = f"[The run and its command](../benchmarks/results/{file.stem}.md)."
    return f"{begin}\n{_run(results)} {link}\n\n{tables(results['rows'])}<!-- /serving -->"


def markdown(results: Mapping[str, Any]) -> str:
    """Return the page of the results."""
    host = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    return "\n".join(
        [
            f"# Pruned serving on vLLM beside stock LLaVA, {results['date']}\n",
            f"{_run(results)} Load average {results['load']:.2f} before; {versions}.\n",
            f"`{results['command']}`\n",
            tables(results["rows"]),
        ]
    )
