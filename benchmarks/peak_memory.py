"""The most memory that a piece of work holds at once, beyond what was held before it."""

import ctypes
import gc
import sys
from pathlib import Path
from types import TracebackType

import torch

_SELF = Path("/proc/self")


class PeakMemory:
    """A context that measures what is done in it: of a GPU its tensors, of a CPU the whole process (Linux alone).

    Parameters
    ----------
    device : torch.device

    Attributes
    ----------
    bytes : int or None
        After the context; None on a CPU under another system.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif sys.platform == "linux":
            if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
                trim(0)  # what earlier work freed but C keeps would hide as much of this work
            (_SELF / "clear_refs").write_text("5")  # VmHWM starts anew
            self._before = _status("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif sys.platform == "linux":
            self.bytes = _status("VmHWM") - self._before


def _status(name: str) -> int:
    """Return bytes that the kernel tells of this process."""
    (line,) = [line for line in (_SELF / "status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
