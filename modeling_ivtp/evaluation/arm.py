"""An arm of an evaluation: which method prunes, and how many visual tokens it leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..methods import METHODS, Method
from ..methods.names import OWN, UNPRUNED, current_name
from ..trained import adapter, is_adapter, make


@dataclass(frozen=True)
class Arm:
    """One way of pruning.

    Attributes
    ----------
    method : str, default "ivtp"
        "ivtp" prunes by the checkpoint's own options, "unpruned" not at all, as stock LLaVA; any other name is one of
        `modeling_ivtp.methods`, with the options of its paper, or the folder of a trained pruner.
    visual_tokens : int, optional
        Visual tokens of one image that are left in the end. None: the checkpoint's own number for "ivtp", the saved
        budget of a trained pruner, and 64 for another method.

    Raises
    ------
    ValueError
        For an unknown method, a folder that holds no trained pruner, a number below 1, or a number without pruning.
    """

    method: str = OWN
    visual_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", current_name(self.method))
        if self.method not in (UNPRUNED, *METHODS) and not self.is_trained:
            known = f"{UNPRUNED}, {', '.join(METHODS)}"
            raise ValueError(f"method={self.method!r}; allowed: {known}, or the folder of a trained pruner")
        tokens = self.visual_tokens
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise ValueError(f"visual_tokens={tokens!r}; allowed: a whole number from 1")
        if self.method == UNPRUNED and tokens is not None:
            raise ValueError(f"visual_tokens={tokens} with method={UNPRUNED!r}, which keeps all of them; leave it out")

    @property
    def is_trained(self) -> bool:
        """Return whether the method is the folder of a trained pruner."""
        return self.method not in METHODS and is_adapter(self.method)

    @property
    def name(self) -> str:
        """The name of the arm in files and tables, such as "fastv@64"; of a folder its last part."""
        if self.method == UNPRUNED:
            return UNPRUNED
        label = Path(self.method).resolve().name if self.is_trained else self.method
        return f"{label}@{self.visual_tokens or 'own'}"

    @cached_property
    def pruner(self) -> Method:
        """The method that prunes, where it is not the checkpoint itself; a trained pruner is read once."""
        return make(self.method, self.visual_tokens)

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context in which a model prunes in this way.

        Raises
        ------
        ValueError
            If the method does not fit the model.
        """
        if self.method == UNPRUNED:
            return model.pruning(enabled=False)
        if self.method != OWN:
            return self.pruner(model)
        if self.visual_tokens is None:
            return model.pruning()
        return model.pruning(**model.pruning_config.at_budget(self.visual_tokens))

    def described(self, model: Any) -> dict[str, Any]:
        """Return all that decides how a model prunes in this arm, ready for JSON."""
        if self.is_trained:
            return {"method": adapter.fingerprint(self.method), "visual_tokens": self.visual_tokens}
        if self.method not in (UNPRUNED, OWN):
            return {"method": self.method, **asdict(self.pruner)}
        with self.applied(model):
            return {"method": self.method, **model.pruning_config.to_dict()}


def arms_of(methods: Sequence[str], tokens: Sequence[int]) -> list[Arm]:
    """Return the unpruned arm, and one for each method at each budget; IVTP at 64 if there are none.

    The method "unpruned" adds nothing to the unpruned arm, which is always there.

    Raises
    ------
    ValueError
        As `Arm`, and for two arms of one name.
    """
    named = list(map(current_name, methods)) or [OWN]
    arms = [
        Arm(UNPRUNED),
        *dict.fromkeys(Arm(method, budget) for method in named if method != UNPRUNED for budget in tokens or (64,)),
    ]
    name, often = Counter(arm.name for arm in arms).most_common(1)[0]
    if often > 1:
        raise ValueError(f"{often} methods have the name {name}; give each folder another one")
    return arms
