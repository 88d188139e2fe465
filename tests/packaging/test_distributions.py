"""The sdist and the wheel are complete, and the command line works from either, outside of a clone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.checkpoints import sparse_clip, sparse_llava

ROOT = Path(__file__).parents[2]
SHIPPED = {
    "LICENSE",
    "configuration/ivtp-llava-1.5-13b-16.json",
    "configuration/shapes/llava-1.5-7b.json",
    "examples/images/LICENSES.md",
    "examples/images/coffee.jpg",
    "hub_cards/generic/card.json",
    "hub_cards/handler.py",
    "hub_cards/ivtp-llava-miniature/facts.json",
    "hub_cards/ivtp-llava-miniature/images/scene.png",
    "hub_cards/llava.md.jinja",
}
"""Some of what the package reads beside its modules: one of each folder and kind."""

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]


def run(*command: object, folder: Path, **environment: str) -> str:
    """Run a command in a folder, as somebody who knows nothing of the clone; returns what it printed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "COLUMNS": "120"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both distributions: `build` makes the sdist of the clone and the wheel of the sdist."""
    out = tmp_path_factory.mktemp("distributions")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, folder=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return SimpleNamespace(sdist=sdist, wheel=wheel, folder=out)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5-7B and its CLIP, with true headers and without numbers."""
    folder = tmp_path_factory.mktemp("sources")
    sparse_llava(folder / "llava", "llava-1.5-7b")
    sparse_clip(folder / "clip", "llava-1.5-7b")
    return folder


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_what_the_package_reads(built: Any) -> None:
    names = _names(built.wheel)
    assert {f"modeling_ivtp/shipped/{name}" for name in SHIPPED} <= names
    packages = (ROOT / "ivtp_cli", ROOT / "modeling_ivtp")
    modules = {path.relative_to(ROOT).as_posix() for package in packages for path in package.rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks")) or "__pycache__" in name]


def test_the_wheel_of_the_sdist_is_the_wheel_of_the_clone(built: Any, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT, folder=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert _names(wheel) == _names(built.wheel)


def test_the_sdist_holds_sources_and_no_weights(built: Any) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    assert {"pyproject.toml", "README.md"} | SHIPPED <= names
    assert not [name for name in names if name.endswith(".safetensors") or "__pycache__" in name]
    assert built.sdist.stat().st_size < 2e6


def test_the_metadata_names_extras_and_entry_point(built: Any) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = archive.read(metadata).decode()
        points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    for extra in ("batch", "plot", "serve", "space"):
        assert f"Provides-Extra: {extra}" in told
    assert "ivtp = " in points


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """The interpreter of an environment of its own, in which neither this package nor the clone is known.

    The packages that this one depends on are not downloaded anew: a `.pth` file lets the environment see those of the
    environment that runs the test. A `.pth` file in a folder that is added this way is not read, so an editable
    installation of the clone stays unseen. What this does not show is that the dependencies in the metadata suffice.
    """
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", folder=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (_site(python) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _site(python: Path) -> Path:
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=python.parent)
    return Path(where.strip())


def _install(python: Path, distribution: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, distribution, folder=python.parent)
    where = run(python, "-c", "import modeling_ivtp; print(modeling_ivtp.__file__)", folder=python.parent)
    assert Path(where.strip()).is_relative_to(_site(python))


def _ivtp(python: Path, *arguments: object) -> str:
    folder = python.parents[2]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    return run(python.with_name("ivtp"), *arguments, folder=folder, **offline)


def test_the_command_line_works_from_the_wheel(built: Any, sources: Path, empty: Path, tmp_path: Path) -> None:
    """It finds shapes, recipes, cards and sample images without a clone."""
    _install(empty, built.wheel)
    assert "8.618" in _ivtp(empty, "flops", "--preset", "llava-1.5-7b", "--method", "fastv")
    joined = ["convert", sources / "llava", "--clip", sources / "clip", "--recipe", "ivtp-llava-1.5-7b-64"]
    told = _ivtp(empty, *joined, "--out", tmp_path / "joined", "--dry-run", "--no-progress")
    assert "would write" in told
    assert not (tmp_path / "joined").exists()
    _ivtp(empty, "convert", ROOT / "examples" / "miniature", "--out", tmp_path / "miniature", "--no-progress")
    for card in ("generic", "ivtp-llava-miniature"):
        told = _ivtp(empty, "push", tmp_path / "miniature", "owner/mine", "--card", card, "--dry-run")
        assert f"card: {card}" in told
        assert "would upload to owner/mine; nothing was sent" in told


def test_the_sdist_installs_and_works(built: Any, empty: Path) -> None:
    _install(empty, built.sdist)
    assert "8.618" in _ivtp(empty, "flops", "--preset", "llava-1.5-7b", "--method", "fastv")
