"""Files that lie beside the package in a clone and inside of it once it is installed; pyproject.toml lists them."""

from __future__ import annotations

from pathlib import Path

_CLONE = Path(__file__).resolve().parents[2]
_INSTALLED = Path(__file__).resolve().parents[1] / "shipped"


def shipped(name: str) -> Path:
    """Where a file or folder such as `"configuration"` is.

    Raises
    ------
    FileNotFoundError
        If the installation lacks it.
    """
    for root in (_INSTALLED, _CLONE):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"this installation of ivtp-llava lacks {name}; install it again")
