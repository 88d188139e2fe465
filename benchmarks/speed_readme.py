"""Write the newest speed results of every name into the project's README, between two marks.

python -m benchmarks.speed_readme
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.readme import RESULTS, ROOT, filled
from benchmarks.quality.report import write_atomically
from modeling_ivtp.files.tables import markdown_table
from modeling_ivtp.speed.report import interval, name_of, products, reached, times

BEGIN, END = "<!-- speed: written by benchmarks/speed_readme.py -->", "<!-- /speed -->"


def excerpt(folder: Path = RESULTS) -> str:
    """The newest result of every name: a table for each model and machine, a sentence for each of its other results."""
    newest: dict[str, Path] = {}
    for file in sorted(folder.glob("speed-*.json"), key=_age):
        told = json.loads(file.read_text())
        newest[name_of(told) + told["machine"]["device"]] = file
    every = [(json.loads(file.read_text()), file) for file in newest.values()]
    every.sort(key=lambda one: ("NVIDIA" in one[0]["machine"]["device"], one[0]["settings"]["label"], one[1].name))
    tables: list[str] = []
    short: list[str] = []
    shown: set[tuple[str, ...]] = set()
    for results, file in every:
        settings = results["settings"]
        what = results["shape"], settings["dtype"], results["machine"]["device"]
        if settings["label"] in _IN_SHORT:
            short.append(_IN_SHORT[settings["label"]](results, file))
        elif what in shown:
            short.append(_brief(results, file))
        else:
            shown.add(what)
            tables.append(_told(results, file))
    head = "Times as fast as stock LLaVA with SDPA attention, on the same weights, run by turns.\n"
    return "\n".join([BEGIN, head, *tables, *short, END])


def _age(file: Path) -> tuple[str, int]:
    """Date, and number on that day: speed-NAME-2026-11-28-2 is later than speed-NAME-2026-11-28."""
    found = re.search(r"(\d{4}-\d\d-\d\d)(?:-(\d+))?$", file.stem)
    assert found is not None, file
    return found[1], int(found[2] or 1)


def _where(results: Mapping[str, Any], file: Path) -> str:
    settings = results["settings"]
    link = f"{file.parent.relative_to(ROOT)}/{file.stem}.md"
    return f"[{results['shape']}, {settings['dtype']}, {results['machine']['device']}]({link})"


def _brief(results: Mapping[str, Any], file: Path) -> str:
    """What is told at length of another result of the same model and machine."""
    rows = [row for row in results["rows"] if row["arm"] != "stock"]
    answers = results["settings"]["new_tokens"]
    parts = {"prefill": "", "decode": "decode per token ", "end_to_end": "end to end "}
    if answers == 2:
        del parts["decode"], parts["end_to_end"]  # a single step tells little

    def told(arm: str) -> str:
        of = [row for row in rows if row["arm"] == arm]
        return ", ".join(
            name + " / ".join(f"{row[part]['speed_up'][0]:.2f}" for row in of) for part, name in parts.items()
        )

    arms = "; ".join(f"{arm} {told(arm)}" for arm in dict.fromkeys(row["arm"] for row in rows))
    batches = " / ".join(str(batch) for batch in dict.fromkeys(row["batch"] for row in rows))
    kind = "Prefill" if answers == 2 else f"Prefill and answers of {answers} tokens"
    return f"- {kind} at batch {batches}: {arms} ({_where(results, file)})."


def _off(results: Mapping[str, Any], file: Path) -> str:
    """That our class costs nothing when it prunes nothing."""
    told = [
        f"{times(row['prefill'])} at batch {row['batch']}" for row in results["rows"] if row["arm"] == "off"
    ]  # fmt: skip
    pairs = results["settings"]["repeats"]
    return f"- Prefill with pruning off, over {pairs} pairs: {', '.join(told)} ({_where(results, file)})."


def _growth(results: Mapping[str, Any], file: Path) -> str:
    """That time grows as FLOPs say."""
    texts, batches = (results["settings"][name] for name in ("text_tokens", "batches"))
    told = []
    for fit in results["growth"]:
        shares = [one["share"] for one in fit["residuals"]]
        fixed, rate = round(1000 * fit["fixed"]), "" if fit["rate"] is None else f"{fit['rate']:.3g} TFLOP/s"
        # A line that begins below nothing tells of a rate that falls with size.
        line = (
            f"runs at {rate}, less {-fixed} ms" if fixed < 0 else f"takes {fixed} ms{f' and then {rate}' * bool(rate)}"
        )
        told.append(
            f"{fit['arm']} {line}, its {len(shares)} cases within {min(shares):+.0%} and {max(shares):+.0%} of that "
            "line"
        )
    text, batch = (
        f"{min(values)} to {max(values)}" if len(values) > 1 else f"{values[0]}" for values in (texts, batches)
    )
    return (
        f"- Prefills of {text} text tokens at batch {batch} as a line over their FLOPs: {'; '.join(told)} "
        f"({_where(results, file)})."
    )


_IN_SHORT = {"off": _off, "growth": _growth, "batches": _growth}
"""Labels of results that are told in a sentence."""


def _choosing(results: Mapping[str, Any]) -> str:
    """What scoring and the question's words take of IVTP's prefills."""
    rows = [row for row in results["rows"] if row["selection_share"] is not None]
    if not rows:
        return ""
    choosing, words = (sorted(row[share] for row in rows) for share in ("selection_share", "words_share"))
    limits = []
    if "NVIDIA" in results["machine"]["device"]:
        limits.append("where they are launched and not replayed")
    if not all(row.get("in_layers") for row in rows):
        limits.append("what observers do within layers left out")
    told = f", {', '.join(limits)}," if limits else ""
    return (
        f"Scoring and selecting take {choosing[0]:.1%} to {choosing[-1]:.1%} of these prefills{told} and CLIP's "
        f"text tower {words[0]:.1%} to {words[-1]:.1%}. "
    )


def _told(results: Mapping[str, Any], file: Path) -> str:
    machine, settings = results["machine"], results["settings"]
    texts = " or ".join(map(str, settings["text_tokens"]))
    several = len(settings["text_tokens"]) > 1
    measured = any(row.get("products") for row in results["rows"])
    rows = [
        (row["arm"], row["batch"], *([row["text_tokens"]] if several else []),
         *(times(row[part]) for part in ("prefill", "decode", "end_to_end")), f"{row['implied']:.2f}",
         reached(row, results["rows"]), *([products(row)] if measured else []))
        for row in results["rows"] if row["arm"] != "stock"
    ]  # fmt: skip
    header = ("arm", "batch", *(["text"] if several else []), "prefill", "decode per token", "end to end",
              "prefill implied by FLOPs", "reached", *(["products alone"] if measured else []))  # fmt: skip
    return (
        f"{results['shape']} in {settings['dtype']}, random weights{', compiled' * settings['compiled']}; one image "
        f"and {texts} text tokens, answers of {settings['new_tokens']} tokens; {machine['device']}, "
        f"{machine['threads']} threads, {results['date']}; medians of {settings['repeats']} interleaved pairs, "
        f"{interval(settings['repeats'])}:\n\n{markdown_table(header, rows)}\n{_choosing(results)}"
        f"[What each part takes, and the command]({file.parent.relative_to(ROOT)}/{file.stem}.md).\n"
    )


if __name__ == "__main__":
    page = ROOT / "README.md"
    write_atomically(page, filled(page.read_text(), excerpt()).encode())
