"""FLOPs of one prompt under a configuration: counted from shapes alone, and by the closed formula."""

from .executed import Count, count, count_named
from .formula import closed_formula
from .shapes import load_shape, shape_names

__all__ = ["Count", "closed_formula", "count", "count_named", "load_shape", "shape_names"]
