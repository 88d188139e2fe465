"""How sure an accuracy and a difference of accuracies are: the bootstrap over questions."""

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def bootstrap_interval(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of a mean.

    A resample of n questions is fully told by how often each distinct value was drawn, and these counts are
    multinomial: so counts are drawn, not questions, which is the same distribution and takes no time.

    Parameters
    ----------
    values : Tensor-like (n,)
        One number per question, of few distinct ones.
    resamples : int
    seed : int

    Returns
    -------
    tuple of float

    Raises
    ------
    ValueError
        Without any question.
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
    """The 95% interval of the difference of two accuracies on the same questions, question by question.

    Parameters
    ----------
    right, reference : bool array (n,)
        Whether each question was answered right.

    Raises
    ------
    ValueError
        If these are not the same questions.
    """
    right, reference = np.asarray(right), np.asarray(reference)
    if right.shape != reference.shape:
        raise ValueError(f"Pairs need the same questions; got {right.shape} and {reference.shape}.")
    return bootstrap_interval(right.astype(np.float64) - reference.astype(np.float64), seed=seed)
