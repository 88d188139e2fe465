"""A folder is written whole or not at all."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_ivtp.files import folder as folders
from modeling_ivtp.files.folder import new_folder, system_errors


def write(path, text="new"):
    (path / "sub").mkdir()
    (path / "sub" / "file").write_text(text)
    (path / "config.json").write_text(text)


def write_and_fail(path, error, **options):
    with new_folder(path, **options) as temporary:
        write(temporary)
        raise error


def content(path):
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def parent(tmp_path):
    """A folder in which nothing may remain but what a test expects."""
    path = tmp_path / "parent"
    path.mkdir()
    return path


def test_it_appears_at_the_end(parent):
    with new_folder(parent / "deep" / "out") as temporary:
        write(temporary)
        assert not (parent / "deep" / "out").exists()
    assert content(parent / "deep" / "out") == {"config.json": "new", "sub/file": "new"}
    assert os.listdir(parent / "deep") == ["out"]


def test_others_may_read_it_as_any_new_folder(parent):
    (parent / "usual").mkdir()
    with new_folder(parent / "out"):
        assert os.listdir(parent) != ["usual"]
    modes = {name: stat.S_IMODE((parent / name).stat().st_mode) for name in ("usual", "out")}
    assert modes["usual"] == modes["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("there", [False, True], ids=["new", "overwrite"])
def test_nothing_changes_when_the_block_fails(parent, error, there):
    out = parent / "above" / "out"
    if there:
        out.mkdir(parents=True)
        (out / "old").write_text("old")
    with pytest.raises(error):
        write_and_fail(out, error, overwrite=True)
    assert content(parent) == ({"above/out/old": "old"} if there else {})
    assert os.listdir(parent) == (["above"] if there else [])


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two steps"])
def test_overwriting_replaces_everything(parent, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    out = parent / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with new_folder(out, overwrite=True) as temporary:
        write(temporary)
        assert content(out) == {"old": "old"}
    assert content(out) == {"config.json": "new", "sub/file": "new"}
    assert os.listdir(parent) == ["out"]


def test_the_old_folder_comes_back_when_the_second_step_fails(parent, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    out = parent / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="broken"), new_folder(out, overwrite=True) as temporary:
        write(temporary)
    assert content(parent) == {"out/old": "old"}
    assert os.listdir(parent) == ["out"]


def test_a_link_is_followed(parent):
    (parent / "real").mkdir()
    (parent / "link").symlink_to(parent / "real")
    with new_folder(parent / "link") as temporary:
        write(temporary)
    assert (parent / "link").is_symlink()
    assert (parent / "real" / "config.json").exists()


@pytest.mark.parametrize("below", ["", "deep/out"])
def test_a_link_to_nowhere_is_not_followed(parent, below):
    (parent / "link").symlink_to(parent / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"link is a link to .*nowhere, which does not exist"):
        write_and_fail(parent / "link" / below, AssertionError("never entered"))
    assert os.listdir(parent) == ["link"]


def test_what_is_there_is_left_alone(parent):
    (parent / "file").write_text("x")
    (parent / "full").mkdir()
    (parent / "full" / "x").write_text("x")
    for name, message in (("full", "exists and is not empty"), ("file", "is a file"), ("file/out", "is a file")):
        with pytest.raises(OSError, match=message):
            write_and_fail(parent / name, AssertionError("never entered"))
    assert content(parent) == {"file": "x", "full/x": "x"}


@pytest.mark.parametrize("out", [".", "..", "../here"])
def test_the_current_folder_is_not_replaced(parent, monkeypatch, out):
    (parent / "here").mkdir()
    (parent / "here" / "precious").write_text("x")
    monkeypatch.chdir(parent / "here")
    with pytest.raises(FileExistsError, match="is the current folder or holds it"):
        write_and_fail(out, AssertionError("never entered"), overwrite=True)
    assert content(parent) == {"here/precious": "x"}


def test_a_folder_without_a_name_is_not_the_current_one(parent, monkeypatch):
    monkeypatch.chdir(parent)
    with pytest.raises(ValueError, match="the folder to write has no name"):
        write_and_fail("", AssertionError("never entered"), overwrite=True)


def test_too_little_room_is_noticed_beforehand(parent, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with pytest.raises(OSError, match=r"needs 13\.5 GB, but only 2 MB are free") as caught:
        write_and_fail(parent / "a" / "out", AssertionError("never entered"), needed_bytes=13_500_000_000)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(parent) == []


def test_a_disk_that_gets_full_leaves_nothing(parent):
    with pytest.raises(OSError, match=r"no room left on the disk while writing .*out; nothing was kept"):
        write_and_fail(parent / "out", OSError(errno.ENOSPC, "No space left on device"))
    assert os.listdir(parent) == []


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])  # the package itself takes seconds to import
from files.folder import new_folder
with new_folder(sys.argv[2]) as temporary:
    (temporary / "config.json").write_text("{}")
    print("writing", flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)]
)
def test_a_signal_leaves_nothing(parent, number, status):
    package = Path(folders.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, package, parent / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Tests that run under nohup hand their deafness down.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        assert [name.endswith(".partial") for name in os.listdir(parent)] == [True]
        process.send_signal(number)
        assert process.wait(10) == status
    assert os.listdir(parent) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_handler_of_somebody_else_stays(parent, number):
    seen = []
    before = signal.signal(number, lambda number, frame: seen.append(number))
    try:
        with new_folder(parent / "out"):
            os.kill(os.getpid(), number)
        assert seen == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.slow
def test_a_hangup_that_is_ignored_stays_ignored(parent):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with new_folder(parent / "out"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert (parent / "out").is_dir()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_is_told_where_torch_tells_it_in_words_alone():
    with pytest.raises(OSError, match=r"a file was cut short: no room left .*'here'") as error, system_errors("here"):
        torch.save({"weights": torch.zeros(1000)}, "/dev/full")
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="other"), system_errors("here"):
        raise RuntimeError("other")
