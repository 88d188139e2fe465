"""Help answers at once: no command imports torch, or anything that does, before it runs."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import ivtp_cli
from modeling_ivtp.training import preset_names

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "convert",
    "push",
    "serve",
    "generate",
    "batch",
    "train",
    "explain",
    "flops",
    "bench",
    "quality",
    "evaluate",
    "check",
)
MOST = 4
"""CPU time of a help page, in that of a process that imports what draws it."""
HEAVY = ("torch", "transformers", "open_clip", "datasets", "pyarrow", "matplotlib", "numpy", "PIL", "modeling_ivtp")


def entry_point():
    """The module and the function that `ivtp` runs."""
    return re.search(r'^ivtp = "(\w+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).groups()


def python(code, *arguments):
    """The output of a fresh process, and the seconds of CPU time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result.stdout, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_all_commands_are_here():
    assert tuple(get_command(ivtp_cli.app).commands) == COMMANDS


def test_paragraphs_of_help_are_broken_by_the_terminal_alone():
    for name, command in get_command(ivtp_cli.app).commands.items():
        assert not any("\n" in paragraph for paragraph in command.help.split("\n\n")), name


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_takes_a_few_times_what_importing_typer_does(arguments):
    module, function = entry_point()
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    pages, seconds = zip(*(python(code, *arguments) for _ in range(3)), strict=True)
    assert all("Usage: ivtp" in page for page in pages)
    least = min(python("import typer, typer.rich_utils")[1] for _ in range(3))
    assert min(seconds) < MOST * least, (seconds, least)


@pytest.mark.slow
def test_help_imports_nothing_heavy():
    pages = [["--help"], *([command, "-h"] for command in COMMANDS)]
    code = f"import sys, ivtp_cli\nfor page in {pages}: assert ivtp_cli.main(page) == 0\n"
    out, _ = python(code + f"print('imported:', *sorted(set({HEAVY}) & set(sys.modules)))")
    assert out.splitlines()[-1] == "imported:"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is(command):
    for parameter in get_command(ivtp_cli.app).commands[command].params:
        assert parameter.help or parameter.name == "help", parameter.name


def test_the_help_of_training_names_every_preset():
    (preset,) = [option for option in get_command(ivtp_cli.app).commands["train"].params if option.name == "preset"]
    assert all(name in preset.help for name in preset_names())


@pytest.mark.slow
def test_the_package_still_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "modeling_ivtp.cli", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip()
