"""The numbers of the model cards, counted and measured: hub_cards/NAME/facts.json and README.md.

    python -m benchmarks.card_facts

Costs are counted by running each recipe's configuration without data; accuracies come from the newest results of the
quality benchmark on the card's checkpoint. No number in a card is typed by hand.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.quality.checkpoint import checkpoint_fingerprint
from benchmarks.quality.report import counted, results_in, when, write_atomically
from modeling_ivtp.checkpoints.recipes import Recipe, load_recipe, recipe_names
from modeling_ivtp.checkpoints.weights import Checkpoint
from modeling_ivtp.flops import count_named
from modeling_ivtp.publish.cards import card_names, preview

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "hub_cards"
RESULTS = ROOT / "benchmarks" / "results"
COMMAND = "python -m benchmarks.card_facts"
TEXT_TOKENS = 64
"""Text tokens of the prompt whose cost the cards state: LLaVA's template around a question of a sentence or two."""


def costs(recipes: Mapping[int, Recipe]) -> dict[str, Any]:
    """Count the cost of one image and its prompt, unpruned and at every budget, as executed."""
    config = next(iter(recipes.values())).config()
    rows = []
    for budget in (None, *sorted(recipes, reverse=True)):
        if budget is None:
            found = count_named(config, "unpruned", config.num_patches, text_tokens=TEXT_TOKENS)
        else:
            found = count_named(recipes[budget].config(), "ivtp", budget, text_tokens=TEXT_TOKENS)
        counts = found.to_dict()
        rows.append(
            {
                "visual_tokens": budget,
                "final_tokens": counts["final_tokens"],
                "layer_averaged_tokens": round(counts["layer_averaged_tokens"], 1),
                "tflops": float(f"{counts['total_tflops']:.4g}"),
                "kv_cache_bytes": counts["kv_cache_bytes"],
            }
        )
    return {"text_tokens": TEXT_TOKENS, "cache_dtype": "float16", "command": COMMAND, "rows": rows}


def quality(checkpoint: Path, method: str) -> dict[str, Any] | None:
    """Return the accuracies of a checkpoint under a method, from its newest results; None if they were not measured."""
    fingerprint = checkpoint_fingerprint(checkpoint)
    for file in reversed(results_in(RESULTS)):
        results = json.loads(file.read_text())
        if results["checkpoint"] == fingerprint and any(row["method"] == method for row in results["rows"]):
            return _accuracies(results, file, method) | {
                "weights": Checkpoint.from_folder(checkpoint, str(checkpoint)).digest()
            }
    return None


def method_of(recipe: Recipe) -> str:
    """Return the name under which results have a recipe's pruning."""
    return "ivtp" if recipe.pruning.choice == "top" else "ivtp-extended"


def _accuracies(results: Mapping[str, Any], file: Path, method: str) -> dict[str, Any]:
    rows = [
        row
        for row in results["rows"]
        if row["method"] in ("unpruned", method, "random") and not row["table"] and row["mode"] == "inference"
    ]
    asked = results["questions"]
    return {
        "results": str(file.relative_to(ROOT)),
        "date": when(results, rows),
        "questions": counted(asked),
        "types": asked["headline"],
        "chance": asked["chance"],
        "command": _command(rows),
        "rows": [{name: row[name] for name in ("method", "visual_tokens", "accuracy", "interval")} for row in rows],
    }


def _command(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the command that measures rows: the unpruned model is always among its own."""
    pruned = [row for row in rows if row["method"] != "unpruned"]
    methods = dict.fromkeys(row["method"] for row in pruned)
    budgets = sorted({row["visual_tokens"] for row in pruned}, reverse=True)
    return " ".join(
        [
            "ivtp quality --model examples/miniature --out out/quality --rows systems",
            *(f"--method {method}" for method in methods),
            *(f"--tokens {budget}" for budget in budgets),
        ]
    )


def main() -> None:
    """Write facts and cards."""
    for name in track(card_names(), "counting"):
        recipes = {
            recipe.pruning.visual_tokens: recipe for recipe in map(load_recipe, recipe_names()) if recipe.card == name
        }
        recipe = next(iter(recipes.values()))
        base = Path(recipe.base_model)
        measured = quality(base, method_of(recipe)) if base.is_dir() else None
        facts = {"costs": costs(recipes), "quality": measured}
        write_atomically(CARDS / name / "facts.json", (json.dumps(facts, indent=1) + "\n").encode())
        write_atomically(CARDS / name / "README.md", preview(name).encode())


if __name__ == "__main__":
    main()
