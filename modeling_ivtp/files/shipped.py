"""Files that lie beside the package in a clone and inside it once it is installed; pyproject.toml lists them."""

from __future__ import annotations

from pathlib import Path

_CLONE = Path(__file__).resolve().parents[2]
_INSTALLED = Path(__file__).resolve().parents[1] / "shipped"


def shipped(name: str) -> Path:
    """Return the path of a file or folder that ships with the package, such as `"configuration"`.

    Raises
    ------
    FileNotFoundError
        If the installation lacks it.
    """
    for root in (_INSTALLED, _CLONE):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"this installation of ivtp-llava lacks {name}; install it again")
