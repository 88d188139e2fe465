"""Write the newest speed results of every name into the project's README, between two marks.

python -m benchmarks.speed_readme
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.readme import RESULTS, ROOT, filled
from benchmarks.quality.report import write_atomically
from modeling_ivtp.hub.tables import markdown_table
from modeling_ivtp.speed.report import name_of, reached, times

BEGIN, END = "<!-- speed: written by benchmarks/speed_readme.py -->", "<!-- /speed -->"


def excerpt(folder: Path = RESULTS) -> str:
    """One table for each newest result of its name, a CPU's before a GPU's."""
    newest: dict[str, Path] = {}
    for file in sorted(folder.glob("speed-*.json")):
        newest[name_of(json.loads(file.read_text()))] = file
    told = [(json.loads(file.read_text()), file) for file in newest.values()]
    told.sort(key=lambda one: ("NVIDIA" in one[0]["machine"]["device"], one[0]["settings"]["label"], one[1].name))
    return "\n".join([BEGIN, *(_told(*one) for one in told), END])


def _told(results: Mapping[str, Any], file: Path) -> str:
    machine, settings = results["machine"], results["settings"]
    texts = " or ".join(map(str, settings["text_tokens"]))
    several = len(settings["text_tokens"]) > 1
    rows = [
        (row["arm"], row["batch"], *([row["text_tokens"]] if several else []),
         *(times(row[part]) for part in ("prefill", "decode", "end_to_end")), f"{row['implied']:.2f}", reached(row))
        for row in results["rows"] if row["arm"] != "stock"
    ]  # fmt: skip
    header = ("arm", "batch", *(["text"] if several else []), "prefill", "decode per token", "end to end",
              "prefill implied by FLOPs", "reached")  # fmt: skip
    return (
        f"{results['shape']} in {settings['dtype']}, random weights{', compiled' * settings['compiled']}; one image "
        f"and {texts} text tokens, answers of {settings['new_tokens']} tokens; {machine['device']}, "
        f"{machine['threads']} threads, {results['date']}; medians of {settings['repeats']} interleaved pairs with 95% "
        f"intervals:\n\n{markdown_table(header, rows)}\n"
        f"[What each part takes, and the command]({file.parent.relative_to(ROOT)}/{file.stem}.md).\n"
    )


if __name__ == "__main__":
    page = ROOT / "README.md"
    write_atomically(page, filled(page.read_text(), excerpt()).encode())
