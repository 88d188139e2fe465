"""Fine-tune and retrain: LLaVA's two stages on a data set in LLaVA's format, under any method or with a connector.

From the data to the loss: `data` reads rows, `conversation` writes them as prompts and marks the answers, `batches`
makes tensors of them. `parts` says what learns, `plan` counts a run before it begins, `folder` keeps it, `run` does it.
"""

from .options import Options, Preset, load_preset, preset_names
from .plan import Plan
from .run import Summary, train

__all__ = ["Options", "Plan", "Preset", "Summary", "load_preset", "preset_names", "train"]
