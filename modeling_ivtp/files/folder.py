"""Folders that appear complete or not at all.

Everything is written into a hidden folder beside the target, which takes the target's place as the very last step: a
full disk, an error, Ctrl-C, a SIGTERM or a closed terminal before that leaves nothing that looks like a result.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from uuid import uuid4

from safetensors import SafetensorError

from .sizes import human_bytes

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
# Windows has no SIGHUP.
_STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def new_folder(target: str | os.PathLike[str], *, needed_bytes: int = 0, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write into, which becomes `target` if the block ends well and vanishes otherwise.

    Parameters
    ----------
    target : str or path
        The folder to be. Its parents are made if they do not exist.
    needed_bytes : int
        Size of the content; checked against the free disk space beforehand.
    overwrite : bool
        Replace an existing folder. Its content stays untouched until the new one is complete; where the system can
        exchange two folders (Linux), there is no moment without one or the other.

    Yields
    ------
    Path
        An empty folder on the same file system.

    Raises
    ------
    FileExistsError
        If `target` is a file, or a folder that is not empty and `overwrite` is False, or that holds the current one.
    ValueError
        If `target` is empty.
    OSError
        If `target` leads through a link to nowhere, or the disk has too little room or gets full in the middle.
    """
    final = check_target(target, needed_bytes=needed_bytes, overwrite=overwrite)
    missing_parents = [parent for parent in final.parents if not parent.exists()]
    temporary = _hidden_sibling(final, "partial")
    with _terminated_as_exception():
        try:
            temporary.mkdir(parents=True)
            yield temporary
            _sync(*sorted(temporary.rglob("*")), temporary)
            _move(temporary, final)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                message = f"no room left on the disk while writing {final}; nothing was kept"
                raise OSError(error.errno, message) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in missing_parents:
                with suppress(OSError):  # it holds the new folder
                    parent.rmdir()


@contextmanager
def system_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise errors of the system in the block as OSError, which safetensors and torch tell in words alone.

    safetensors gives the error's number; torch's writer of zip files says that fewer bytes were written than it gave.

    Parameters
    ----------
    path : str or path
        What is written, for the message.

    Raises
    ------
    OSError
        If the disk is full, for one.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in _TORCH_WRITER):
            raise
        message = "a file was cut short: no room left on the disk, or files of this size are not allowed"
        raise OSError(errno.ENOSPC, message, str(path)) from error
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def check_target(target: str | os.PathLike[str], *, needed_bytes: int = 0, overwrite: bool = False) -> Path:
    """Check that `new_folder` could write, and return the absolute target with links resolved."""
    if not os.fspath(target):  # a variable of the shell that is not set; as a path it would be the current folder
        raise ValueError("the folder to write has no name; give one, such as ivtp-llava")
    absolute = Path(os.path.abspath(Path(target).expanduser()))
    for path in (absolute, *absolute.parents):
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist; remove the link")
    final = Path(os.path.realpath(absolute))
    if final.exists() and not final.is_dir():
        raise FileExistsError(f"{target} is a file, not a folder to write into")
    filled = final.is_dir() and any(final.iterdir())
    if filled and not overwrite:
        raise FileExistsError(f"{target} exists and is not empty; choose another folder or set overwrite")
    if filled and Path(os.path.realpath(os.curdir)).is_relative_to(final):
        raise FileExistsError(f"{final} is the current folder or holds it, and would be replaced; choose another one")
    existing = next(folder for folder in final.parents if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; {target} cannot be made below it")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write in {existing}")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{target} needs {human_bytes(needed_bytes)}, but only {human_bytes(free)} are free in {existing}",
        )
    return final


@contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """Let SIGTERM, and the SIGHUP of a closed terminal, unwind the stack like Ctrl-C does.

    A signal that has another handler, or that is ignored as below `nohup`, is left alone.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handled = [number for number in _STOPS if is_main and signal.getsignal(number) is signal.SIG_DFL]

    def stop(number: int, frame: FrameType | None) -> None:
        # A second signal must not interrupt the cleaning up.
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _hidden_sibling(final: Path, ending: str) -> Path:
    return final.with_name(f".{final.name}.{uuid4().hex[:8]}.{ending}")


def _sync(*paths: Path) -> None:
    """Wait until files and folders are on the disk."""
    if os.name != "posix":
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(temporary: Path, final: Path) -> None:
    """Put `temporary` in the place of `final`, which may exist."""
    if not final.exists():
        os.rename(temporary, final)
    elif not _exchange(temporary, final):
        old = _hidden_sibling(final, "old")
        os.rename(final, old)
        try:
            os.rename(temporary, final)
        except BaseException:
            os.rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    # After an exchange `temporary` is the old folder, which the caller removes.
    _sync(final.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; return False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(result == 0)
