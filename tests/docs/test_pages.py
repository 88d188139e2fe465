"""Every command and every piece of Python on README, pages and cards is run, against a Hub on loopback."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard
from nbclient import NotebookClient
from PIL import Image

from benchmarks.card_facts import costs, method_of, quality
from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.checkpoints.recipes import load_recipe, recipe_names
from modeling_ivtp.publish.cards import card_images, card_names, preview
from modeling_ivtp.publish.staging import stage
from tests.support.checkpoints import clip_folder, llava_folder
from tests.support.hub_server import TOKEN, Hub, running_hub
from tests.support.stranger import HIDE
from tests.support.text_tokenizers import clip_tokenizer

ROOT = Path(__file__).parents[2]
LLAVA, CLIP = "llava-hf/llava-1.5-7b-hf", "openai/clip-vit-large-patch14-336"
PAGES = [
    "README.md",
    "docs/usage.md",
    "docs/options.md",
    "docs/training.md",
    "docs/trained.md",
    "docs/methods.md",
    "docs/checkpoints.md",
    "docs/batch.md",
    "docs/serving.md",
    "docs/speed.md",
    "docs/evaluation.md",
    "docs/trust.md",
]
"""Pages whose blocks run, in this order and in one process: later ones go on from the README's names."""

ELSEWHERE = {
    "accelerate launch": "tests/training/test_processes.py",
    "cd ": "a folder",
    "ivtp check": "tests/evaluation/test_check.py, on the miniature; it takes minutes",
    "ivtp evaluate": "tests/evaluation/, with a harness in an environment of its own",
    "lmms-eval": "tests/evaluation/, with make eval-test",
    "mkdir -p out/gqa": "copies what lmms_task wrote, for ivtp evaluate",
    "git clone": "needs this repository's address",
    "ivtp bench --shape llava": "takes hours; docs/speed.md has a small shape",
    "ivtp train -m": "needs LLaVA's data and GPUs; tests/training/ trains a tiny model",
    "ivtp quality": "tests/benchmarks/, with fewer questions: two thousand of them take hours",
    "make ": "tests/examples/, test_make_help_lists_every_target, and .ci/run",
    "pip install": "tests/packaging/test_distributions.py",
    "python -m vllm.": "needs vLLM; tests/vllm_plugin/ runs its engine and its server",
    "vllm serve": "needs vLLM; tests/vllm_plugin/ runs its engine and its server",
    "python -m benchmarks.": "tests/benchmarks/, tests/speed/, tests/flops/, and the tests of pages and cards",
}
"""How the commands begin that no page's test runs, and what runs them."""


def runs_pages(test: Any) -> Any:
    """Mark a test that takes long and starts a process."""
    return pytest.mark.slow(pytest.mark.subprocess(test))


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the shell and Python blocks of a page that run here, in their order."""
    kept = []
    for kind, block in re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL):
        if kind == "bash":
            commands = block.replace("\\\n", " ").splitlines()
            block = "\n".join(line for line in commands if not line.startswith(tuple(ELSEWHERE)))
        # An address to fill in: tests/serving/test_server.py asks the same.
        if block.strip() and "https://…" not in block:
            kept.append((kind, block))
    return kept


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Small models under the names that the pages use: LLaVA-1.5's geometry, few and narrow layers."""
    root = tmp_path_factory.mktemp("pages")
    layers = {"num_hidden_layers": 24, "image_size": 336}
    stock = llava_folder(root / "llava", side=336, tower_layers=24, decoder_layers=12)
    (root / "llava" / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    clip_folder(root / "clip", stock, **layers)
    tokenizer = copy.deepcopy(clip_tokenizer())
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(root / "clip")
    pruning = {"tower_layers": None}
    convert(root / "llava", root / "clip", root / "ours", pruning=pruning, progress=False)
    convert(None, None, root / "miniature", recipe="ivtp-llava-miniature-64", progress=False)
    with running_hub() as server:
        for name in (LLAVA, CLIP):
            server.publish(name, _files(root / name.split("/")[1].split("-")[0]))
        for name in card_names():
            target = root / f"repo-{name}"
            target.mkdir()
            stage(root / ("miniature" if "miniature" in name else "ours"), f"OWNER/{name}", target, card=name)
            server.publish(f"OWNER/{name}", _files(target))
        yield SimpleNamespace(server=server, root=root)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def run(hub: Any, folder: Path, pages: dict[str, list[tuple[str, str]]], *, stranger: bool = False) -> dict[str, Any]:
    """Run the blocks of pages in a fresh process, in a folder with the pictures that they name: page to outcome."""
    for name in ("photo.jpg", "another.jpg"):
        Image.effect_noise((90, 60), 80).convert("RGB").save(folder / name)
    for card in card_names():
        for place, image in card_images(card).items():
            (folder / Path(place).name).write_bytes(image.read_bytes())
    rows = [{"image": name, "question": "What is this?"} for name in ("photo.jpg", "another.jpg")]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [[page, kind, block] for page, found in pages.items() for kind, block in found]
    (folder / "steps.json").write_text(json.dumps(steps))
    server: Hub = hub.server
    environment = {
        "HF_HOME": str(folder / "home"),
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    runner = (ROOT / "tests" / "support" / "runner.py").read_text()
    done = subprocess.run(
        [sys.executable, "-c", (HIDE if stranger else "") + runner, "steps.json", "outcomes.json"],
        cwd=folder,
        env=environment | ({"PYTHONSAFEPATH": "1"} if stranger else {}),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return json.loads((folder / "outcomes.json").read_text())


@pytest.fixture(scope="module")
def ran(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All pages, run in one process: their outcomes, and the folder where they ran."""
    folder = tmp_path_factory.mktemp("ran")
    outcomes = run(hub, folder, {page: blocks((ROOT / page).read_text()) for page in PAGES})
    return SimpleNamespace(outcomes=outcomes, folder=folder)


@runs_pages
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(ran: Any, page: str) -> None:
    assert ran.outcomes[page]["error"] is None, ran.outcomes[page]["error"]


@runs_pages
def test_what_pages_show_gives_what_they_say(hub: Any, ran: Any) -> None:
    output = {page: outcome["output"] for page, outcome in ran.outcomes.items()}
    assert (ran.folder / "kept.png").is_file()
    assert 'revision="' in output["docs/checkpoints.md"]
    assert "would serve at 8000" in output["docs/serving.md"]
    assert "[(3, 24)]" in output["docs/usage.md"]
    answers = pq.read_table(ran.folder / "answers").to_pylist()
    assert [(row["row"], row["error"]) for row in answers] == [(0, None), (1, None)]
    # The push of one page replaced what later pages load, and it still loads.
    assert "ivtp_recipe.json" in hub.server.head("OWNER/ivtp-llava-1.5-7b")


def test_every_page_with_commands_is_run() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
    pages += (ROOT / "docs").rglob("*.md")
    names = {page.relative_to(ROOT).as_posix() for page in pages if blocks(page.read_text())}
    assert names == set(PAGES)


@runs_pages
@pytest.mark.parametrize("name", card_names())
def test_a_card(hub: Any, tmp_path: Path, name: str) -> None:
    """Its Python as somebody who has transformers and nothing else; its commands with the package."""
    steps = blocks(preview(name))
    python = [step for step in steps if step[0] == "python"]
    assert len(python) == 3
    outcomes = run(hub, tmp_path, {name: python}, stranger=True)
    assert outcomes[name]["error"] is None, outcomes[name]["error"]
    assert (tmp_path / "kept.png").is_file()
    inline = re.findall(r"`(ivtp [^`]*)`", preview(name))
    assert {line.split()[1] for line in inline} == {"serve", "convert"}
    outcomes = run(hub, tmp_path, {name: [("bash", "\n".join(inline))]})
    assert outcomes[name]["error"] is None, outcomes[name]["error"]


@runs_pages
def test_the_notebook(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    saved = [
        out["text"] for cell in notebook.cells for out in cell.get("outputs", []) if out["output_type"] == "stream"
    ]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    said = "".join(out["text"] for out in outputs if out["output_type"] == "stream" and out["name"] == "stdout")
    assert said == "".join(saved)
    assert any("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", card_names())
def test_a_card_is_what_was_counted_and_measured(name: str) -> None:
    folder = ROOT / "hub_cards" / name
    assert (folder / "README.md").read_text() == preview(name), "make cards"
    facts = json.loads((folder / "facts.json").read_text())
    recipes = {
        recipe.pruning.visual_tokens: recipe for recipe in map(load_recipe, recipe_names()) if recipe.card == name
    }
    some = {budget: recipes[budget] for budget in (64, 16)}
    counted = costs(some)
    assert [row for row in facts["costs"]["rows"] if row["visual_tokens"] in (None, 64, 16)] == counted["rows"]
    base = Path(recipes[64].base_model)
    assert facts["quality"] == (quality(base, method_of(recipes[64])) if base.is_dir() else None)


@pytest.mark.parametrize("name", card_names())
def test_a_cards_metadata(name: str) -> None:
    card = ModelCard(preview(name))
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert {"custom_code", "llava", "token-pruning"} <= set(data.tags)
    assert data.license == ("apache-2.0" if "miniature" in name else "llama2")
    assert data.language == ["en"]
    for example in data.widget:
        assert example["src"] in card_images(name)
        assert example["text"].endswith("?")
    # Results stand only where they were measured here, with the command that measured them.
    if "miniature" not in name:
        assert data.base_model.startswith("llava-hf/")
        assert data.eval_results is None
        assert "was **not measured**" in card.text
        return
    measured = json.loads((ROOT / "hub_cards" / name / "facts.json").read_text())["quality"]
    if measured is None:
        assert data.eval_results is None
        return
    (result,) = data.eval_results
    assert result.metric_args["command"].startswith("ivtp quality")
    wanted = method_of(load_recipe(f"{name}-64")), 64
    (row,) = [row for row in measured["rows"] if (row["method"], row["visual_tokens"]) == wanted]
    assert result.metric_value == round(100 * row["accuracy"], 1)


@pytest.mark.slow
def test_nobody_types_numbers_into_a_card() -> None:
    """Templates hold no figure of cost or accuracy but those that the paper is quoted with."""
    for template in (ROOT / "hub_cards").glob("*.jinja"):
        text = re.sub(r"```.*?```", "", template.read_text(), flags=re.DOTALL)
        assert not re.findall(r"\d+(?:\.\d+)? ?(?:TFLOPs|GFLOPs|MB KV|% of)", text), template


@pytest.mark.subprocess
def test_make_help_lists_every_target() -> None:
    output = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "space", "cards", "quality", "test", "lint", "docs"} <= set(targets)
    for target in targets:
        assert f"make {target}" in output
