"""Model cards: metadata and text of a Hub page, filled with counted and measured numbers.

`hub_cards/NAME/` holds `card.json` (the card's subject), `facts.json` (numbers, written by `benchmarks.card_facts`) and
`README.md` (the filled card, for reading here); the text is in the templates beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..checkpoints.recipes import load_recipe
from ..files.shipped import shipped
from ..files.sizes import human_bytes
from ..trained import TrainedMethod
from ..trained.adapter import hub_name, options_of

GENERIC = "generic"
"""The card of a checkpoint that no recipe here built."""
PAPER_LOSS = 3.4
"""Points that LLaVA-1.5-7B loses at 64 tokens without training, as the paper reports (Table 7)."""

_TAGS = ["custom_code", "ivtp", "llava", "token-pruning", "vision-language-model"]


def card_names() -> list[str]:
    """Return the names of the published checkpoints that have a card of their own."""
    return sorted(file.parent.name for file in shipped("hub_cards").glob("*/card.json") if file.parent.name != GENERIC)


def card_images(name: str) -> dict[str, Path]:
    """Return the sample images of a card: the place in the repository, and the file here."""
    return {f"images/{Path(source).name}": shipped(source) for source in _read(name, "card.json")["images"]}


def sample(name: str) -> tuple[str, str]:
    """Return the first of a card's examples: the image's place in the repository, and the question."""
    first = _read(name, "card.json")["widget"][0]
    return first["src"], first["text"]


def preview(name: str) -> str:
    """Fill a card as it looks in a repository of the same name at the paper's budget."""
    recipe = load_recipe(f"{name}-64")
    base = {"base_model": recipe.base_model if "/" in recipe.base_model and recipe.base_model[0] != "/" else None}
    note = recipe.to_dict() | base | {"recipe": recipe.name}
    return render(name, f"OWNER/{name}", recipe.config(), note, weights=(_facts(name)["quality"] or {}).get("weights"))


def render(
    name: str,
    repo_id: str,
    config: Any,
    recipe: Mapping[str, Any] | None,
    *,
    weights: str | None,
    revision: str = "main",
) -> str:
    """Fill a card as the README.md of a repository; it claims only what was counted or measured of this checkpoint.

    Parameters
    ----------
    name : str
        A folder of `hub_cards/`.
    repo_id : str
        The repository's name on the Hub.
    config : IVTPLlavaConfig
        The checkpoint's; the card describes its budget.
    recipe : mapping, optional
        The recipe note in the checkpoint's folder.
    weights : str or None
        Digest of the weights; the card shows accuracies only if they were measured with these.
    revision : str, default "main"
        The branch that it is pushed to.

    Raises
    ------
    ValueError
        For an unknown card.
    """
    if name != GENERIC and name not in card_names():
        raise ValueError(f"there is no card {name!r}; allowed: {', '.join([*card_names(), GENERIC])}")
    card = _read(name, "card.json")
    facts = _facts(name)
    if not _is_of_recipes(name, config):
        facts = {"costs": None, "quality": None}
    if (facts["quality"] or {}).get("weights") != weights:
        facts = facts | {"quality": None}
    recipe = dict(recipe or {})
    small = max((row["tflops"] for row in (facts["costs"] or {"rows": ()})["rows"]), default=1.0) < 0.5
    text = (
        _templates()
        .get_template(card["template"])
        .render(
            card=card,
            costs=facts["costs"],
            unit="GFLOPs" if small else "TFLOPs",
            per_tflop=1000 if small else 1,
            quality=facts["quality"],
            accuracy=_accuracy(facts["quality"]),
            loss=_loss(facts["quality"], config.pruning.visual_tokens),
            paper_loss=PAPER_LOSS,
            repo_id=repo_id,
            revision=revision,
            pruning=config.pruning,
            patches=config.num_patches,
            groups=_groups(config),
            base_model=recipe.get("base_model"),
            clip=recipe.get("clip"),
            recipe=recipe.get("recipe"),
        )
    )
    return f"---\n{_metadata(card, facts, repo_id, config, recipe).to_yaml()}\n---\n\n{text}"


def render_pruner(method: TrainedMethod, repo_id: str, *, revision: str = "main") -> str:
    """Fill the card of a trained pruner; it says what the modules are and fit, and claims no accuracy.

    Parameters
    ----------
    method : TrainedMethod
        With modules, as `trained.load` reads it.
    repo_id : str
        The repository's name on the Hub.
    revision : str, default "main"
        The branch that it is pushed to.
    """
    base, learned = dict(method.base or {}), method.modules_or_raise()
    base_model = hub_name(str(base.get("name_or_path", ""))) or None
    beside = bool(base.get("trained"))
    fits = base_model or "LLaVA"
    weights = list(learned.parameters())
    text = (
        _templates()
        .get_template("pruner.md.jinja")
        .render(
            title=f"{type(method).__name__} for {'a fine-tuned ' if beside else '' if base_model else 'a '}{fits}",
            method=method,
            paper=method.paper,
            base=base,
            base_model=base_model,
            beside=beside,
            modules=len(list(learned.children())),
            size=human_bytes(sum(weight.numel() * weight.element_size() for weight in weights)),
            options=options_of(method),
            repo_id=repo_id,
            revision=revision,
        )
    )
    values: dict[str, Any] = {"pipeline_tag": "image-text-to-text", "tags": [*_TAGS[1:], method.name]}
    if base_model:
        values["base_model"] = base_model
    return f"---\n{ModelCardData(**values).to_yaml()}\n---\n\n{text}"


def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(shipped("hub_cards")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"bytes": human_bytes, "percent": lambda share: f"{100 * share:.1f}"}
    return templates


def _facts(name: str) -> dict[str, Any]:
    has_facts = (_folder(name) / "facts.json").is_file()
    return _read(name, "facts.json") if has_facts else {"costs": None, "quality": None}


def _is_of_recipes(name: str, config: Any) -> bool:
    """Return whether a configuration is that of the card's recipes but for the budget, so that their costs apply."""
    if name == GENERIC:
        return False
    # By its file: the base of a recipe may lie only in a clone, and its card is known everywhere.
    recipe = load_recipe(shipped(f"configuration/{name}-64.json"))
    try:
        recipe.check(config, name)
    except ValueError:
        return False
    pruning = config.pruning
    return pruning.tower_tokens is None and pruning.changed(visual_tokens=64) == recipe.pruning


def _metadata(
    card: Mapping[str, Any], facts: Mapping[str, Any], repo_id: str, config: Any, recipe: Mapping[str, Any]
) -> ModelCardData:
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": _TAGS,
        **{name: card[name] for name in ("license", "license_link", "language", "datasets", "widget") if name in card},
    }
    if recipe.get("base_model"):
        values["base_model"] = recipe["base_model"]
    results = _results(facts["quality"], config.pruning.visual_tokens)
    if results:
        values |= {"model_name": repo_id.partition("/")[2] or repo_id, "eval_results": results}
    return ModelCardData(**values)


def _results(quality: Mapping[str, Any] | None, budget: int) -> list[EvalResult]:
    """Return the results of this budget; none if it was not measured."""
    rows = [
        row
        for row in (quality or {"rows": ()})["rows"]
        if row["method"] not in ("unpruned", "random") and row["visual_tokens"] == budget
    ]
    return [
        EvalResult(
            task_type="visual-question-answering",
            task_name="One-word questions about drawn scenes",
            dataset_type="ivtp-drawn-world",
            dataset_name="IVTP drawn world, held-out test questions",
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"accuracy in % at {budget} visual tokens",
            metric_value=round(100 * row["accuracy"], 1),
            metric_args={"command": quality["command"], "questions": quality["questions"], "date": quality["date"]},
        )
        for row in rows
        if quality is not None
    ]


def _accuracy(quality: Mapping[str, Any] | None) -> dict[Any, str]:
    """Return accuracy and half its interval in %, by budget; the key None is unpruned."""
    return {
        budget: f"{100 * row['accuracy']:.1f} ± {50 * (row['interval'][1] - row['interval'][0]):.1f}"
        for budget, row in _by_budget(quality).items()
    }


def _loss(quality: Mapping[str, Any] | None, budget: int) -> float | None:
    """Return the points of accuracy that a budget loses; None if it was not measured."""
    rows = _by_budget(quality)
    return 100 * (rows[None]["accuracy"] - rows[budget]["accuracy"]) if {None, budget} <= set(rows) else None


def _by_budget(quality: Mapping[str, Any] | None) -> dict[Any, Any]:
    """Return the rows of the card's own pruning by their budget; the key None is unpruned."""
    return {
        None if row["method"] == "unpruned" else row["visual_tokens"]: row
        for row in (quality or {"rows": ()})["rows"]
        if row["method"] != "random"
    }


def _groups(config: Any) -> dict[str, Any]:
    plan = config.pruning_plan()
    if plan is None:
        return {"tower": None, "decoder": None, "handed_over": config.num_patches}
    return {
        "tower": f"{len(plan.tower)} groups" if plan.tower else None,
        "decoder": f"{len(plan.decoder)} groups" if plan.decoder else None,
        "handed_over": plan.tower[-1].keep if plan.tower else config.num_patches,
    }


def _folder(name: str) -> Path:
    return shipped("hub_cards") / name


def _read(name: str, file: str) -> dict[str, Any]:
    return dict(json.loads((_folder(name) / file).read_text(encoding="utf-8")))
