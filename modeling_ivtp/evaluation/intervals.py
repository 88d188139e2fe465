"""Intervals of accuracies and of their differences: the bootstrap over questions."""

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def bootstrap_interval(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the 95% percentile interval of a mean.

    The mean of a resample depends only on how often each distinct value was drawn, and these counts are multinomial.
    So counts are drawn instead of questions: the distribution is the same, and it takes no time.

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
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws @ distinct / len(values), [tail, 1 - tail])
    return float(low), float(high)


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
