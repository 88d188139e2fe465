"""Write the newest speed results of every shape into the project's README, between two marks.

python -m benchmarks.speed_readme
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.readme import RESULTS, ROOT, filled
from benchmarks.quality.report import write_atomically
from modeling_ivtp.hub.tables import markdown_table
from modeling_ivtp.speed.report import reached, times

BEGIN, END = "<!-- speed: written by benchmarks/speed_readme.py -->", "<!-- /speed -->"


def excerpt(folder: Path = RESULTS) -> str:
    """One table for each shape that was timed."""
    newest: dict[str, Path] = {}
    for file in sorted(folder.glob("speed-*.json")):
        newest[json.loads(file.read_text())["shape"]] = file
    return "\n".join([BEGIN, *(_told(json.loads(file.read_text()), file) for file in newest.values()), END])


def _told(results: Mapping[str, Any], file: Path) -> str:
    machine, settings = results["machine"], results["settings"]
    rows = [
        (row["arm"], row["batch"], *(times(row[part]) for part in ("prefill", "decode", "end_to_end")),
         f"{row['implied']:.2f}", reached(row))
        for row in results["rows"] if row["arm"] != "stock"
    ]  # fmt: skip
    header = ("arm", "batch", "prefill", "decode per token", "end to end", "prefill implied by FLOPs", "reached")
    return (
        f"Times as fast as stock LLaVA on the same weights, both with {settings['attention']} attention in "
        f"{settings['dtype']}: {results['shape']} with random weights, one image and {settings['text_tokens'][0]} text "
        f"tokens, answers of {settings['new_tokens']} tokens; {machine['device']}, {machine['threads']} threads, "
        f"{results['date']}; medians of {settings['repeats']} interleaved pairs with 95% intervals.\n\n"
        f"{markdown_table(header, rows)}\n"
        f"[What each part takes, and the command]({file.parent.relative_to(ROOT)}/{file.stem}.md)."
    )


if __name__ == "__main__":
    page = ROOT / "README.md"
    write_atomically(page, filled(page.read_text(), excerpt()).encode())
