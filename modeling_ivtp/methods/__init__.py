"""The methods that IVTP is compared with, on one engine: `with FastV(keep=64)(model): model.generate(...)`.

The checklist for a new one is in CONTRIBUTING.md.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .atp import ATPSpatial
from .cdpruner import CDPruner
from .cenprune import CenCDPruner, CenDivPrune
from .divprune import DivPrune
from .evit import EViT
from .fastv import FastV
from .hiprune import HiPrune
from .ivtp import IVTP, IVTPV
from .ivtp_extended import IVTPExtended, IVTPExtendedFlat, IVTPExtendedLate
from .lvpruning import LVPruningTopK
from .method import Method
from .prumerge import PruMergePlus
from .prunesid import PruneSID
from .pyramiddrop import PyramidDrop
from .random import Random
from .sparsevlm import SparseVLM
from .spatial_pooling import SpatialPooling
from .text_attention import TextAttention
from .tome import ToMe, ToMePlus
from .topk import TopK, TopKPlus
from .tops import TOPS
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vscan import VScan

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Random, TopK, TopKPlus, SpatialPooling, EViT, ToMe, ToMePlus, IVTP, IVTPV, IVTPExtended, IVTPExtendedFlat,
        IVTPExtendedLate, TextAttention, FastV, PyramidDrop, SparseVLM, PruMergePlus, VisionZip, DivPrune, CDPruner,
        LVPruningTopK, ATPSpatial,
        HiPrune, VisPruner, PruneSID, VScan, TOPS, CenDivPrune, CenCDPruner,
    )
}  # fmt: skip
"""Every method by its name."""


def make(name: str, keep: int | None = None, **options: Any) -> Method:
    """Make a method by its name.

    Raises
    ------
    ValueError
        For an unknown name or option, naming the known ones, or an option out of range.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"Unknown method {name!r}; allowed: {', '.join(METHODS)}.")
    known = [field.name for field in fields(METHODS[name]) if field.name != "keep"]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; allowed: {', '.join(known)}.")
    return METHODS[name](keep, **options)


__all__ = [
    "IVTP",
    "IVTPV",
    "METHODS",
    "TOPS",
    "ATPSpatial",
    "CDPruner",
    "CenCDPruner",
    "CenDivPrune",
    "DivPrune",
    "EViT",
    "FastV",
    "HiPrune",
    "IVTPExtended",
    "IVTPExtendedFlat",
    "IVTPExtendedLate",
    "LVPruningTopK",
    "Method",
    "PruMergePlus",
    "PruneSID",
    "PyramidDrop",
    "Random",
    "SparseVLM",
    "SpatialPooling",
    "TextAttention",
    "ToMe",
    "ToMePlus",
    "TopK",
    "TopKPlus",
    "VScan",
    "VisPruner",
    "VisionZip",
    "make",
]
