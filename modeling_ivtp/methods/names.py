"""Names that stand beside those of methods: the model's own pruning, and no pruning."""

import warnings

OWN = "ivtp"
"""IVTP by the model's own options."""
UNPRUNED = "unpruned"
"""Nothing is dropped, as in stock LLaVA."""


def current_name(name: str) -> str:
    """Return a method's name as it is now: `none`, until version 0.3, is `unpruned`."""
    if name != "none":
        return name
    warnings.warn("method 'none' is now 'unpruned'; the old name works until version 0.3.", FutureWarning, stacklevel=4)
    return UNPRUNED
