"""Intervals of scores and of their differences, by the bootstrap over questions; a test for few questions."""

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95

Statistic = Callable[[np.ndarray], np.ndarray]
"""From sums over questions, (m, c), to a score of each of the m samples, (m,)."""


def interval_of(
    columns: np.ndarray, statistic: Statistic, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the 95% percentile interval of a score that depends on sums over questions.

    The sums of a resample depend only on how often each distinct question was drawn, and these counts are multinomial.
    So counts are drawn instead of questions: the distribution is the same, and it takes no time.

    Parameters
    ----------
    columns : float array (n, c)
        What each question adds to the sums, with few distinct rows.
    statistic : callable
    resamples : int
    seed : int

    Raises
    ------
    ValueError
        If there is no question.
    """
    if columns.ndim != 2 or not len(columns):
        raise ValueError(f"An interval needs numbers of at least one question; got shape {columns.shape}.")
    distinct, counts = np.unique(columns, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(columns), counts / len(columns), size=resamples)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(statistic(draws @ distinct), [tail, 1 - tail])
    return float(low), float(high)


def difference_interval(columns: np.ndarray, reference: np.ndarray, statistic: Statistic) -> tuple[float, float]:
    """Return the 95% interval of the difference of two scores on the same questions, paired by question.

    Parameters
    ----------
    columns, reference : float array (n, c)
        As in `interval_of`.
    statistic : callable

    Raises
    ------
    ValueError
        If the numbers of questions differ.
    """
    if columns.shape != reference.shape:
        raise ValueError(f"Pairs need the same questions; got {columns.shape} and {reference.shape}.")
    width = columns.shape[1]
    both = np.concatenate([columns, reference], axis=1)
    return interval_of(both, lambda sums: statistic(sums[:, :width]) - statistic(sums[:, width:]))


def bootstrap_interval(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the 95% percentile interval of a mean, as `interval_of`.

    Parameters
    ----------
    values : Tensor-like (n,)
        One number per question, with few distinct values.
    resamples : int
    seed : int

    Returns
    -------
    tuple of float

    Raises
    ------
    ValueError
        If there is no question.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"An interval needs one number for each of at least one question; got shape {values.shape}.")
    return interval_of(values[:, None], lambda sums: sums[:, 0] / len(values), resamples=resamples, seed=seed)


def score_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of a mean of numbers from 0 to 1: the bootstrap's, or Wilson's if all are 0 or all are 1.

    There the bootstrap finds no spread, however few questions were asked.

    Parameters
    ----------
    values : float array (n,)
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) and values.min() == values.max() and values[0] in (0, 1):
        z_squared = 1.959964**2
        width = z_squared / (len(values) + z_squared)
        return (1 - width, 1.0) if values[0] else (0.0, width)
    return bootstrap_interval(values)


def sign_test(right: np.ndarray, reference: np.ndarray) -> float:
    """Return the p-value of the exact two-sided sign test that neither of two is right more often, paired by question.

    It holds for any number of questions; intervals of the bootstrap are too narrow where few pairs differ.

    Parameters
    ----------
    right, reference : bool array (n,)
    """
    gained = int(np.sum(right & ~reference))
    differing = gained + int(np.sum(~right & reference))
    fewer = min(gained, differing - gained)
    return min(1.0, 2 * sum(math.comb(differing, k) for k in range(fewer + 1)) / 2**differing)


def paired_interval(right: np.ndarray, reference: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of the difference of two accuracies on the same questions, paired by question.

    Parameters
    ----------
    right, reference : bool array (n,)
        Whether each question was answered right.

    Raises
    ------
    ValueError
        If the numbers of questions differ.
    """
    right, reference = np.asarray(right), np.asarray(reference)
    if right.shape != reference.shape:
        raise ValueError(f"Pairs need the same questions; got {right.shape} and {reference.shape}.")
    return bootstrap_interval(right.astype(np.float64) - reference.astype(np.float64), seed=seed)
