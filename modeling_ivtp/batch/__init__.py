"""Answer a data set: `ivtp batch`, and the same from Python.

Work is claimed, not dealt out: consecutive rows make a shard, and whoever locks a shard's file answers its rows. Any
number of processes on any number of machines that share the output's folder work on it, one that dies leaves its
shard to the others, and nobody waits for anybody. What a shard's answers are depends on the data and on the settings
in `_run.json` alone, so a run that was stopped, however often, ends with the rows of one that was not.
"""

from .options import Options, Summary
from .process import run

__all__ = ["Options", "Summary", "run"]
