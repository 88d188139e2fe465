"""Growth of time with FLOPs: a line through the prefills of each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def growth(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Fit `seconds = fixed + work / rate` to the prefills of every arm, by least squares of relative errors.

    Parameters
    ----------
    rows : sequence of mapping
        The rows that `bench` returns.

    Returns
    -------
    list of dict
        For each arm of at least three cases: `fixed` (seconds), `rate` (TFLOP/s), and `residuals`: how far the median
        of each case lies above the line, as a share of it. `rate` is None where the fixed time is more than half of
        the longest case, so that work hardly counts.
    """
    fits = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cases = [row for row in rows if row["arm"] == arm]
        if len(cases) < 3:
            continue
        work = np.array([row["batch"] * row["tflops"] for row in cases])
        seconds = np.array([row["prefill"]["seconds"] for row in cases])
        system = np.stack([1 / seconds, work / seconds], axis=1)
        fixed, slope = np.linalg.lstsq(system, np.ones(len(cases)), rcond=None)[0]
        line = fixed + slope * work
        rate = float(1 / slope) if slope > 0 and fixed < seconds.max() / 2 else None
        residuals = [
            {"batch": row["batch"], "text_tokens": row["text_tokens"], "share": float(share)}
            for row, share in zip(cases, seconds / line - 1, strict=True)
        ]
        fits.append({"arm": arm, "fixed": float(fixed), "rate": rate, "residuals": residuals})
    return fits
