"""Methods whose choices are learned: modules beside a frozen or trained base, kept as folders of their own.

method = trained.load("folder")
with method(model):
    model.generate(**inputs)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..methods import make as make_untrained
from .adapter import TRAINED, is_adapter, load, register
from .atp import ATPLLaVA
from .lvpruning import LVPruning
from .method import TrainedMethod
from .sparse_attention import SparseAttention
from .training import PrunerTraining

if TYPE_CHECKING:
    from ..methods import Method

register(LVPruning)
register(ATPLLaVA)
register(SparseAttention)


def make(name: str, keep: int | None = None) -> Method:
    """Make a method by its name, or read a trained one from its folder.

    Parameters
    ----------
    name : str
    keep : int, optional
        Visual tokens in the end; default: 64 of an untrained method, the saved budget of a trained one.

    Raises
    ------
    ValueError
        For an unknown name, naming the known ones, or a budget out of range.
    """
    if is_adapter(name):
        return load(name) if keep is None else load(name, keep=keep)
    return make_untrained(name, 64 if keep is None else keep)


__all__ = [
    "TRAINED",
    "ATPLLaVA",
    "LVPruning",
    "PrunerTraining",
    "SparseAttention",
    "TrainedMethod",
    "is_adapter",
    "load",
    "make",
]
