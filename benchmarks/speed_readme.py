"""Write the newest speed results into the pages that show them, between their marks; no number there is typed.

    python -m benchmarks.speed_readme

`README.md` gets a short table, `docs/speed.md` all results, `docs/vllm.md` those of serving on vLLM.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.readme import README, RESULTS, ROOT, link_base, write_pages
from benchmarks.serving import page as serving
from modeling_ivtp.files.tables import markdown_table
from modeling_ivtp.speed.report import interval, name_of, products, reached, times
from modeling_ivtp.speed.timing import ratio

SPEED_PAGE = ROOT / "docs" / "speed.md"
VLLM_PAGE = ROOT / "docs" / "vllm.md"
ARM = "ivtp@64"
"""The arm in the README's table."""

Result = tuple[Mapping[str, Any], Path]
"""A result and the file that holds it."""


def marks(name: str) -> tuple[str, str]:
    """Return the two comments that enclose a block of a page."""
    return f"<!-- {name}: written by benchmarks/speed_readme.py -->", f"<!-- /{name} -->"


def newest(folder: Path = RESULTS) -> list[Result]:
    """Return the newest result of every name: CPUs first, then GPUs, the main result of a model before the others."""
    found: dict[str, Result] = {}
    for file in sorted(folder.glob("speed-*.json"), key=_age):
        results = json.loads(file.read_text())
        found[name_of(results) + results["machine"]["device"]] = results, file
    return sorted(
        found.values(),
        key=lambda result: ("NVIDIA" in _device(result[0]), result[0]["settings"]["label"], result[1].name),
    )


def _age(file: Path) -> tuple[str, int]:
    """Return the date, and the number on that day: speed-NAME-2026-11-28-2 is later than speed-NAME-2026-11-28."""
    found = re.search(r"(\d{4}-\d\d-\d\d)(?:-(\d+))?$", file.stem)
    assert found is not None, file
    return found[1], int(found[2] or 1)


def _device(results: Mapping[str, Any]) -> str:
    return results["machine"]["device"]


def divided(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """Split results into those that get a table, one for each model, dtype and machine, and those that get a line."""
    tables: dict[tuple[str, ...], Result] = {}
    lines: list[Result] = []
    for result in results:
        settings = result[0]["settings"]
        key = result[0]["shape"], settings["dtype"], _device(result[0])
        if settings["label"] in _LINES or key in tables:
            lines.append(result)
        else:
            tables[key] = result
    return list(tables.values()), lines


def short_excerpt(folder: Path = RESULTS) -> str:
    """Return the README's block: the speed-up of `ARM` on each model and machine."""
    tables, _ = divided(newest(folder))
    rows = [
        (f"{results['shape']}, {results['settings']['dtype']}", _device(results), row["batch"],
         *(f"{row[part]['speed_up'][0]:.2f}" for part in ("prefill", "decode", "end_to_end")),
         f"{results['settings']['new_tokens']} tokens")
        for results, _ in tables for row in results["rows"] if row["arm"] == ARM
    ]  # fmt: skip
    header = ("model, random weights", "machine", "batch", "prompt", "decoding step", "whole answer", "answer of")
    begin, end = marks("speed-short")
    return "\n".join(
        [
            begin,
            f"Speed-up of 64 visual tokens over stock LLaVA on the same weights, for one image and {_texts(tables)} "
            "text tokens:",
            "",
            markdown_table(header, rows) + end,
        ]
    )


def _texts(results: Sequence[Result]) -> str:
    """Return the lengths of the texts that were timed, such as "64" or "64 or 512"."""
    lengths = {length for result, _ in results for length in result["settings"]["text_tokens"]}
    return " or ".join(map(str, sorted(lengths)))


def excerpt(folder: Path = RESULTS, page: Path = SPEED_PAGE) -> str:
    """Return the block with all results: a table for each model and machine, then a line for each other result."""
    tables, lines = divided(newest(folder))
    begin, end = marks("speed")
    return "\n".join(
        [
            begin,
            *(_table(results, link_base(page, file)) for results, file in tables),
            "Other measurements:\n",
            *(_line(results, link_base(page, file)) for results, file in lines),
            end,
        ]
    )


def _table(results: Mapping[str, Any], base: str) -> str:
    """Return the table of a result, with a sentence on what was timed and one on what choosing costs."""
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
    header = ("arm", "batch", *(["text"] if several else []), "prompt", "decoding step", "whole answer",
              "implied by FLOPs", "reached", *(["products alone"] if measured else []))  # fmt: skip
    return (
        f"**{results['shape']} in {settings['dtype']} on {machine['device']}**, random weights"
        f"{', compiled' * settings['compiled']}, {machine['threads']} threads, {results['date']}: one image and "
        f"{texts} text tokens, answers of {settings['new_tokens']} tokens; medians of {settings['repeats']} "
        f"interleaved pairs, {interval(settings['repeats'])}.\n\n{markdown_table(header, rows)}\n{_choosing(results)}"
        f"[The time of each part, and the command]({base}.md).\n"
    )


def _choosing(results: Mapping[str, Any]) -> str:
    """Return a sentence on the share of IVTP's prompts that scoring and CLIP's text tower take; empty without them."""
    rows = [row for row in results["rows"] if row["selection_share"] is not None]
    if not rows:
        return ""
    choosing, words = (sorted(row[share] for row in rows) for share in ("selection_share", "words_share"))
    limits = []
    if "NVIDIA" in _device(results):
        limits.append("timed without replay")
    if not all(row.get("in_layers") for row in rows):
        limits.append("without the pseudo-CLS token's own attention")
    limited = f" ({', '.join(limits)})" if limits else ""
    return (
        f"Scoring and selecting take {choosing[0]:.1%} to {choosing[-1]:.1%} of these prompts{limited}, CLIP's text "
        f"tower {words[0]:.1%} to {words[-1]:.1%}. "
    )


def _line(results: Mapping[str, Any], base: str) -> str:
    """Return the line of a result that gets no table."""
    settings = results["settings"]
    sentence = _LINES.get(settings["label"], _brief)(results)
    return f"- {sentence} ([{results['shape']}, {settings['dtype']}, {_device(results)}]({base}.md))"


def _brief(results: Mapping[str, Any]) -> str:
    """Return the speed-ups of all arms in one sentence."""
    rows = [row for row in results["rows"] if row["arm"] != "stock"]
    answers = results["settings"]["new_tokens"]
    parts = {"prefill": "", "decode": "decoding step ", "end_to_end": "whole answer "}
    if answers == 2:
        del parts["decode"], parts["end_to_end"]  # a single step says little

    def speed_ups(arm: str) -> str:
        own = [row for row in rows if row["arm"] == arm]
        return ", ".join(
            name + " / ".join(f"{row[part]['speed_up'][0]:.2f}" for row in own) for part, name in parts.items()
        )

    arms = "; ".join(f"{arm} {speed_ups(arm)}" for arm in dict.fromkeys(row["arm"] for row in rows))
    batches = " / ".join(str(batch) for batch in dict.fromkeys(row["batch"] for row in rows))
    kind = "Prompts" if answers == 2 else f"Prompts and answers of {answers} tokens"
    return f"{kind} at batch {batches}: {arms}."


def _off(results: Mapping[str, Any]) -> str:
    """Return the speed of our class with pruning off."""
    speeds = [f"{times(row['prefill'])} at batch {row['batch']}" for row in results["rows"] if row["arm"] == "off"]
    return f"Prompts with pruning off, over {results['settings']['repeats']} pairs: {', '.join(speeds)}."


def _growth(results: Mapping[str, Any]) -> str:
    """Return how time grows with FLOPs, as a line through all cases."""
    texts, batches = (results["settings"][name] for name in ("text_tokens", "batches"))
    lines = []
    for fit in results["growth"]:
        shares = [case["share"] for case in fit["residuals"]]
        fixed, rate = round(1000 * fit["fixed"]), "" if fit["rate"] is None else f"{fit['rate']:.3g} TFLOP/s"
        # A line that begins below zero means that the rate falls with size.
        line = f"runs at {rate}, less {-fixed} ms" if fixed < 0 else f"takes {fixed} ms{f' plus {rate}' * bool(rate)}"
        lines.append(
            f"{fit['arm']} {line}, and its {len(shares)} cases lie within {min(shares):+.0%} and {max(shares):+.0%} of "
            "that line"
        )
    text, batch = (
        f"{min(values)} to {max(values)}" if len(values) > 1 else f"{values[0]}" for values in (texts, batches)
    )
    return f"Time of prompts with {text} text tokens at batch {batch} against their FLOPs: {'; '.join(lines)}."


def _extended(results: Mapping[str, Any]) -> str:
    """Return how much longer prompts take under extended IVTP than under IVTP, and what the choice takes of both."""
    rows = {(row["arm"], row["batch"]): row for row in results["rows"]}
    ratios, shares = [], []
    for (arm, batch), row in rows.items():
        name, _, tokens = arm.partition("@")
        if name == "ivtp-extended":
            own = rows["ivtp@" + tokens, batch]
            longer, low, high = ratio(row["prefill"]["all"], own["prefill"]["all"])
            ratios.append(f"{longer:.2f} [{low:.2f}, {high:.2f}] at {tokens} tokens and batch {batch}")
            shares.append(f"{row['selection_share']:.1%} instead of {own['selection_share']:.1%}")
    return (
        f"Time of prompts under ivtp-extended over that under ivtp, in {results['settings']['repeats']} pairs: "
        f"{', '.join(ratios)}. Of these prompts the choice takes {', '.join(shares)}."
    )


_LINES = {"off": _off, "growth": _growth, "batches": _growth, "extended": _extended}
"""Labels of results that get a line instead of a table."""


def blocks(folder: Path = RESULTS) -> dict[Path, list[str]]:
    """Return the blocks of each page."""
    return {README: [short_excerpt(folder)], SPEED_PAGE: [excerpt(folder)], VLLM_PAGE: [serving.excerpt(folder)]}


if __name__ == "__main__":
    write_pages(blocks())
