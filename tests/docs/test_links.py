"""What pages point at exists: files, headings, paths in code, names of the package. External addresses are listed."""

import ast
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from typer.main import get_command

import ivtp_cli
from modeling_ivtp import IVTPLlavaForConditionalGeneration, _moved, methods
from modeling_ivtp.flops import load_shape
from modeling_ivtp.training import preset_names

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "hub_cards/*.md", "examples/**/*.md", ".github/**/*.md")
    for page in ROOT.glob(pattern)
)
EXTERNAL = {
    "127.0.0.1": "the server's own address in examples",
    "docs.ray.io": "Ray Data",
    "download.pytorch.org": "PyTorch's index of CPU builds",
    "filesystem-spec.readthedocs.io": "kinds of addresses",
    "flic.kr": "the source of a photograph",
    "github.com": "the drawings' source",
    "huggingface.co": "checkpoints",
    "keepachangelog.com": "the format of the changes",
    "scikit-image.org": "the source of the photographs",
    "semver.org": "the meaning of versions",
    "…": "an address for the reader to fill in",
}
"""Hosts that pages link to, and why. Nothing is fetched from them here."""
FOLDERS = "modeling_ivtp|ivtp_cli|tests|docs|benchmarks|examples|configuration|hub_cards|.github"
MADE = {"benchmarks/results/quality-DATE.json", "benchmarks/results/retrained.json"}
"""Paths on pages that only a command makes."""


def text_of(page: str) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)


def heading_anchors(text: str) -> set[str]:
    """Return the anchors that hosts and the documentation's generator give a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def links(page: str) -> list[str]:
    """Return the targets of a page's links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", text_of(page))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target in links(page):
        if urlsplit(target).scheme:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        # Names in the API reference are checked by `make docs`, which makes them.
        if anchor and "modeling_ivtp." not in anchor:
            assert anchor in heading_anchors(file.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_external_addresses_are_listed(page: str) -> None:
    for address in re.findall(r"https?://[^\s)>\"'`]+", (ROOT / page).read_text()):
        assert urlsplit(address).hostname in EXTERNAL, address


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_paths_in_code_exist(page: str) -> None:
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text_of(page)):
        assert path in MADE or "NAME" in path or (ROOT / path).exists(), path


def test_the_design_names_every_file_that_travels() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    table = page.partition("## The code that travels to the Hub")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`(\w+\.py)`", row)}
    files = {file.name for file in (ROOT / "modeling_ivtp" / "model").glob("*.py")}
    assert named == files - {"__init__.py"}


def test_the_design_names_every_folder() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    folders = {file.parent.name for file in (ROOT / "modeling_ivtp").glob("*/__init__.py")}
    assert folders == set(re.findall(r"\| `modeling_ivtp/(\w+)/` \|", page))


def test_checklists_name_what_is_in_their_files() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    items = re.findall(r"^- \[ \] (.*?)(?=^- \[ \]|^\n)", page, re.DOTALL | re.MULTILINE)
    assert len(items) == 23
    for item in items:
        codes = re.findall(r"`(.+?)`", item)
        text = "".join((ROOT / code).read_text() for code in codes if "/" in code and (ROOT / code).is_file())
        for name in codes:
            if re.fullmatch(r"[A-Z_]{3,}|__all__|__post_init__", name) and "NAME" not in name:
                assert name in text or name in item.partition("in the order of")[2], name


def test_functions_are_as_short_as_the_guide_says() -> None:
    found = re.search(r"body of a function .* has at most (\d+) lines", (ROOT / "CONTRIBUTING.md").read_text())
    assert found
    for file in (file for folder in ("modeling_ivtp", "ivtp_cli") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = 1 + int(body[-1].end_lineno or 0) - body[0].lineno if body else 0
                assert lines <= int(found[1]), (file, node.name)


@pytest.mark.parametrize("page", ["docs/design.md", "docs/glossary.md"])
def test_names_in_code_are_names_of_the_code(page: str) -> None:
    words = {word for file in (ROOT / "modeling_ivtp").rglob("*.py") for word in re.findall(r"\w+", file.read_text())}
    for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\(.*?\))?`", text_of(page)):
        if not name.endswith(".py") and not (ROOT / name).exists():
            assert set(name.split(".")) <= words, name


def test_the_reference_has_every_method() -> None:
    page = (ROOT / "docs" / "api" / "methods.md").read_text()
    named = re.findall(r"::: modeling_ivtp\.methods\.(\w+)$", page, re.MULTILINE)
    names = [method.__name__ for method in methods.METHODS.values()]
    assert [name for name in named if name in names] == names


def test_the_page_on_upgrading_has_every_old_name() -> None:
    page = (ROOT / "docs" / "upgrading.md").read_text()
    for old, new in (_moved.NAMES | _moved.NEEDS).items():
        assert f"| `{old}` | `{new}` |" in page
    for (_, owner, old), new in _moved.ATTRIBUTES.items():
        assert f"| `{owner}` | `{old}` | `{new}` |" in page
    for old in _moved.MODULES:
        assert f"`{old}`" in page


def test_the_page_on_usage_has_every_command() -> None:
    table = (ROOT / "docs" / "usage.md").read_text().partition("## On the command line")[2].partition("```")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `ivtp")]
    named = [name for row in rows for name in re.findall(r"`ivtp (\w+)`", row)]
    assert sorted(named) == sorted(get_command(ivtp_cli.app).commands)


def test_the_page_on_serving_has_every_parameter() -> None:
    code = (ROOT / "hub_cards" / "handler.py").read_text().partition("PARAMETERS = {")[2].partition("}")[0]
    sentence = (ROOT / "docs" / "serving.md").read_text().partition("- `parameters` are ")[2].partition(". ")[0]
    names = re.findall(r'^    "(\w+)":', code, re.MULTILINE)
    assert re.findall(r"`(\w+)`", sentence) == [*names, "visual_tokens"]


def test_the_page_on_training_has_every_preset() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    assert sorted(re.findall(r"^\| `([\w.-]+)`.*\|$", page, re.MULTILINE)) == preset_names()


@pytest.mark.parametrize("page", ["docs/design.md", "docs/trained.md"])
def test_a_list_of_contents_is_complete(page: str) -> None:
    head, *sections = re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE)
    assert re.findall(r"\(#([\w-]+)\)", head) == [
        heading_anchors(f"# {section.splitlines()[0]}").pop() for section in sections
    ]


def test_the_losses_by_type_are_those_of_the_results() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "quality-2026-11-20.json").read_text())["rows"]
    wanted = {("unpruned", 576, "", "inference"), ("ivtp", 64, "", "inference")}
    asked = (row for row in rows if (row["method"], row["visual_tokens"], row["table"], row["mode"]) in wanted)
    found = {row["method"]: row["by_type"] for row in asked}
    lost = {
        name: round(100 * (unpruned["accuracy"] - found["ivtp"][name]["accuracy"]))
        for name, unpruned in found["unpruned"].items()
    }
    page = (ROOT / "docs" / "usage.md").read_text()
    said = re.search(
        r"loses (\d+) to (\d+) points\s+on\s.*?, (\d+) on colours and corners, and (\d+) on", page, re.DOTALL
    )
    assert said
    relations = [lost[name] for name in ("left_of", "right_of", "above", "below")]
    assert [min(relations), max(relations), lost["colour"], lost["existence"]] == list(map(int, said.groups()))
    assert lost["corner"] == lost["colour"]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "zensical.toml").read_text()
    for page in PAGES:
        if page.startswith("docs/"):
            assert f'"{page}"' in navigation, page


@pytest.mark.parametrize(
    ("page", "sentence", "results"),
    [
        ("docs/speed.md", r"takes ([\d.]+) TFLOPs unpruned and ([\d.]+) with IVTP", "flops.md"),
        ("docs/speed.md", r"the paper prints ([\d.]+)\s+and ([\d.]+)\.", "flops.md"),
        (
            "docs/training.md",
            r"take\s+([\d.]+) times less time under IVTP than unpruned and ([\d.]+) .*?keeps ([\d.]+) and ([\d.]+) "
            r"times\s+less.*?step is ([\d.]+) times",
            "training-speed-2026-11-30.md",
        ),
    ],
)
def test_numbers_in_prose_are_those_of_the_results(page: str, sentence: str, results: str) -> None:
    found = re.search(sentence, (ROOT / page).read_text(), re.DOTALL)
    assert found is not None
    for number in found.groups():
        assert number in (ROOT / "benchmarks" / "results" / results).read_text()


@pytest.mark.slow
def test_what_a_model_needs_in_memory_is_what_its_shape_has() -> None:
    page = (ROOT / "docs" / "speed.md").read_text()
    weights = re.search(r"has ([\d.]+) GB of weights .*?13B model ([\d.]+) GB; CLIP's text half adds ([\d.]+) GB", page)
    cache = re.search(r"takes (\d+) MB unpruned and ([\d.]+) MB at 64", page)
    assert weights
    assert cache
    for shape, said in (("llava-1.5-7b", weights[1]), ("llava-1.5-13b", weights[2])):
        with torch.device("meta"):
            model = IVTPLlavaForConditionalGeneration(load_shape(shape))
        sizes = {name: 2e-9 * weight.numel() for name, weight in model.named_parameters()}
        clip = sum(size for name, size in sizes.items() if "clip_text" in name or "visual_projection" in name)
        assert (f"{sum(sizes.values()) - clip:.1f}", f"{clip:.2f}") == (said, weights[3])
    rows = json.loads((ROOT / "hub_cards" / "ivtp-llava-1.5-7b" / "facts.json").read_text())["costs"]["rows"]
    found = {row["visual_tokens"]: row["kv_cache_bytes"] / 1e6 for row in rows}
    assert (f"{found[None]:.0f}", f"{found[64]:.1f}") == cache.groups()


@pytest.mark.slow
def test_the_readme_is_short_and_begins_with_what_a_newcomer_needs() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) < 2000
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == [
        "Install",
        "Use",
        "Budget and explanation",
        "Results",
        "Other methods",
        "Limits",
        "Documentation",
        "Citation and licence",
    ]
