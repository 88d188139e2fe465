"""Answer a data set: `ivtp batch`, and the same from Python.

Work is claimed, not dealt out: consecutive rows make a shard, and whoever locks a shard's file answers its rows. Any
number of processes on any number of machines that share the output's folder work on it, and nobody waits for anybody.
One that dies leaves its shard to the others, as long as whatever launched them lets them live (`accelerate launch` ends
them all, and the same command goes on). What a shard's answers are depends on the data and on the settings
in `_run.json` alone, so a run that was stopped, however often, ends with the rows of one that was not.
"""

from .options import Options, Summary
from .process import run

__all__ = ["Options", "Summary", "run"]
