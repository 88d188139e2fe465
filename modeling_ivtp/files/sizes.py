"""Sizes in bytes, written for people and read from them."""

from __future__ import annotations

import re

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def human_bytes(count: int) -> str:
    """Write `count` bytes with three digits, in the largest unit that keeps it at one or above, as in `"13.5 GB"`."""
    if count < 1000:
        return f"{count} bytes"
    size = float(count)
    for unit in ("KB", "MB", "GB"):
        size /= 1000
        if size < 999.5:  # from there on, three digits would be those of 1000
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} TB"


def byte_count(size: int | str, name: str) -> int:
    """Return the bytes of a size such as `"5GB"`, or of a number of bytes.

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
