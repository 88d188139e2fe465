"""Folders that are either whole or not there.

Everything is written into a hidden folder beside the target, which is renamed onto it as the very last step: a full
disk, an error, Ctrl-C, a SIGTERM or a closed terminal in the middle leaves nothing that could be taken for a
checkpoint.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Windows has no SIGHUP.
_STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@contextmanager
def new_folder(target: str | os.PathLike[str], *, needed_bytes: int = 0, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `target` if the block ends well and vanishes otherwise.

    Parameters
    ----------
    target : str or path
        The folder to be. Its parents are made if they do not exist.
    needed_bytes : int
        What will be written; checked against the free disk space beforehand.
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
        If `target` is a file, or a folder that is not empty and `overwrite` is False.
    OSError
        If `target` leads through a link to nowhere, or the disk has too little room or gets full in the middle.
    """
    final = check_target(target, needed_bytes=needed_bytes, overwrite=overwrite)
    made = [parent for parent in final.parents if not parent.exists()]
    temporary = None
    with _terminated_as_exception():
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
            yield temporary
            _sync(temporary)
            # mkdtemp makes folders that nobody else may read; the result gets what any new folder here would get.
            temporary.chmod(0o777 & ~_umask())
            _move(temporary, final)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                message = f"no room left on the disk while writing {final}; nothing was kept"
                raise OSError(error.errno, message) from error
            raise
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            if not final.exists():
                for folder in made:
                    with suppress(OSError):
                        folder.rmdir()


def check_target(target: str | os.PathLike[str], *, needed_bytes: int = 0, overwrite: bool = False) -> Path:
    """The checks `new_folder` makes before it writes anything; returns the absolute target with links resolved."""
    stated = Path(os.path.abspath(Path(target).expanduser()))
    for path in (stated, *stated.parents):
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist; remove the link")
    final = Path(os.path.realpath(stated))
    if final.exists() and not final.is_dir():
        raise FileExistsError(f"{target} is a file, not a folder to write into")
    if final.is_dir() and any(final.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} exists and is not empty; choose another folder or overwrite it")
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


def human_bytes(count: int) -> str:
    """`count` bytes in the largest unit that keeps it above one, as in `"13.5 GB"`."""
    size = float(count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        size /= 1000
    return f"{size:.3g} TB"


def byte_count(size: int | str, name: str) -> int:
    """The bytes of a size such as `"5GB"`, or of a number of bytes.

    Raises
    ------
    ValueError
        If `size`, the value of the option `name`, is not of that form or not above zero.
    """
    count = 0
    if isinstance(size, int):
        count = size
    elif match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]B)", size.strip().upper()):
        count = int(float(match[1]) * _UNITS[match[2]])
    if count < 1:
        raise ValueError(f"{name}={size!r}; allowed: a number above zero with KB, MB, GB or TB, such as 5GB or 300MB")
    return count


@contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """Let SIGTERM, and the SIGHUP of a closed terminal, unwind the stack like Ctrl-C does.

    One that somebody else handles, or that is ignored as below `nohup`, is left alone.
    """
    main = threading.current_thread() is threading.main_thread()
    ours = [number for number in _STOPS if main and signal.getsignal(number) is signal.SIG_DFL]

    def stop(number: int, frame: FrameType | None) -> None:
        # A second one must not interrupt the cleaning up.
        for one in ours:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _sync(folder: Path) -> None:
    if os.name != "posix":
        return
    for path in (*sorted(folder.rglob("*")), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _move(temporary: Path, final: Path) -> None:
    """Put `temporary` in the place of `final`, which may exist."""
    if not final.exists():
        os.rename(temporary, final)
    elif not _exchange(temporary, final):
        old = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old", dir=final.parent))
        os.rename(final, old / final.name)
        try:
            os.rename(temporary, final)
        except BaseException:
            os.rename(old / final.name, final)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    # After an exchange `temporary` is the old folder, which the caller removes.
    if os.name == "posix":
        _sync_one(final.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(result == 0)
