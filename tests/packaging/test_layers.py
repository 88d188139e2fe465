"""Imports run downwards only, and `model/` is a flat folder of which exactly the files that it holds travel."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

import modeling_ivtp
from tests.support.text_tokenizers import processor as make_processor
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "modeling_ivtp" / "model"
FILES = sorted(path for path in MODEL.rglob("*.py") if path.name != "__init__.py")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter in a folder with the package and its pyproject.toml."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the package and of the layers that are written down."""
    for package in ("ivtp_cli", "modeling_ivtp"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


@pytest.mark.subprocess
def test_no_import_runs_upwards() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("model/schedule.py", "from ..methods import METHODS", "Imports run downwards"),
        ("flops/shapes.py", "from ..checkpoints import recipes", "Imports run downwards"),
        ("files/folder.py", "def late():\n    from ..model import rollout", "Imports run downwards"),
        ("serving/server.py", "import ivtp_cli", "Nothing below imports the command line"),
    ],
)
def test_an_upward_import_is_found(clone: Path, file: str, line: str, contract: str) -> None:
    with open(clone / "modeling_ivtp" / file, "a") as source:
        source.write(f"\n{line}\n")
    done = lint(clone)
    assert done.returncode == 1
    assert f"{contract} BROKEN" in done.stdout
    assert f"modeling_ivtp.{file.replace('/', '.').removesuffix('.py')} -> " in done.stdout


@pytest.mark.subprocess
def test_a_folder_without_a_layer_is_found(clone: Path) -> None:
    (clone / "modeling_ivtp" / "elsewhere.py").write_text("")
    done = lint(clone)
    assert done.returncode == 1
    assert "elsewhere" in done.stdout


def _imported(file: Path) -> Iterator[tuple[int, str]]:
    """The relative level and the module of every import of a file, wherever it stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, name.name) for name in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "import_module",
            "__import__",
        ):
            yield from ((0, part.value) for part in node.args if isinstance(part, ast.Constant))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_model_imports_its_own_flat_files_and_nothing_else_of_the_package(file: Path) -> None:
    own = {path.stem for path in FILES}
    assert file.parent == MODEL
    for level, module in _imported(file):
        if level:
            assert level == 1, f"{file.name}: {'.' * level}{module}"
            assert module in own, f"{file.name}: .{module}"
        else:
            assert not str(module).startswith("modeling_ivtp"), f"{file.name}: {module}"


@pytest.mark.slow
def test_what_is_saved_with_a_model_is_the_model_folder(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    make_processor(size=56).save_pretrained(tmp_path)
    assert [path.name for path in sorted(tmp_path.rglob("*.py"))] == [path.name for path in FILES]
    for path in FILES:
        assert (tmp_path / path.name).read_text() == path.read_text()
    assert Path(modeling_ivtp.__file__).parent == MODEL.parent


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by their names alone: one of two would not run, or spawn the other's processes."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_the_picture_of_the_layers_shows_each_in_its_row_and_cuts_none_off() -> None:
    written = re.search(r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert written is not None
    rows = [row.split(" | ") for row in re.findall(r'"([^"]+)"', written[1])]
    expected = [["ivtp_cli"], *(row for row in rows if row not in (["cli"], ["_moved"]))]
    picture = ElementTree.parse(ROOT / "docs" / "images" / "layers.svg").getroot()
    bottom = float(picture.attrib["height"])
    boxes = [each.attrib for each in picture.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert all(float(box["y"]) + float(box["height"]) < bottom for box in boxes)
    shown: dict[float, list[str]] = {}
    for text in picture.iter("{http://www.w3.org/2000/svg}text"):
        if text.attrib.get("font-weight") == "600":
            shown.setdefault(float(text.attrib["y"]), []).append(str(text.text))
    assert [sorted(shown[y]) for y in sorted(shown)] == [sorted(row) for row in expected]
