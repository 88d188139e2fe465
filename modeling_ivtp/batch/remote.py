"""Files at addresses that fsspec reads: object stores, archives, other machines."""

from __future__ import annotations

import posixpath
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from ..files.images import shortened

_WEB = ("http", "https")


def is_address(name: str) -> bool:
    """Return whether a name is an address, not a path: one of the kinds that fsspec knows."""
    return "://" in name and name.partition("://")[0].rpartition("::")[2] in fsspec.available_protocols()


@dataclass(frozen=True)
class Remote:
    """A file that is not read yet.

    Attributes
    ----------
    path : str
        Its address, or its path on `files`.
    files : fsspec.AbstractFileSystem, optional
    """

    path: str
    files: Any = None

    @classmethod
    def picture(cls, address: str) -> Remote | str:
        """Return what a picture's address stands for; of the web's, `load_image` takes care."""
        return cls(address) if is_address(address) and address.partition("://")[0] not in _WEB else address

    def read(self) -> bytes:
        """Return the file's bytes.

        Raises
        ------
        OSError
            If it cannot be read, for whatever reason a file system has.
        """
        try:
            files, path = (self.files, self.path) if self.files else fsspec.core.url_to_fs(self.path)
            return bytes(files.cat_file(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no image {shortened(repr(self.path))}") from error
        except Exception as error:
            why = f"{type(error).__name__}: {shortened(str(error))}"
            raise OSError(f"{shortened(self.path)} cannot be read ({why})") from error


@dataclass(frozen=True)
class RemoteFolder:
    """A folder that relative paths start from.

    Attributes
    ----------
    path : str
    files : fsspec.AbstractFileSystem
    copies : tempfile.TemporaryDirectory
        Where copies of the data are, which are removed with this folder.
    """

    path: str
    files: Any
    copies: tempfile.TemporaryDirectory[str]

    def joined(self, name: str) -> Remote:
        """Return a file by its path in the folder."""
        return Remote(posixpath.normpath(posixpath.join(self.path, name)), self.files)


def fetch(address: str, endings: tuple[str, ...]) -> tuple[list[Path], RemoteFolder]:
    """Copy the files at an address, or at a pattern of addresses, to this machine.

    Parameters
    ----------
    address : str
    endings : tuple of str
        Endings that files may have.

    Returns
    -------
    files : list of Path
        The copies, in the order of their names.
    folder : RemoteFolder
        The deepest folder that holds them all; the copies last as long as it.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If the address is of a folder.
    """
    files, path = fsspec.core.url_to_fs(address)
    found = sorted(files.glob(path)) if any(sign in path for sign in "*?[") and not files.exists(path) else [path]
    if not found or not files.exists(found[0]):
        raise FileNotFoundError(f"there are no data at {address}")
    if files.isdir(found[0]):
        raise ValueError(f"{address} is a folder; of addresses allowed: files in {', '.join(endings)}, or a pattern")
    copies = tempfile.TemporaryDirectory(prefix="ivtp-data-")
    copied = []
    for number, name in enumerate(found):
        copied.append(Path(copies.name) / f"{number:06d}-{posixpath.basename(name)}")
        files.get_file(name, str(copied[-1]))
    return copied, RemoteFolder(posixpath.commonpath([posixpath.dirname(name) for name in found]), files, copies)
