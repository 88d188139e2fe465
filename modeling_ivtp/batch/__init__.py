"""Answer a data set: `ivtp batch`, and the same from Python.

Processes claim work; none is assigned. Consecutive rows form a shard, and the process that locks a shard's file
answers its rows. Any number of processes, on any number of machines that share the output's folder, work in this way
without waiting for each other. If a process dies, the others take over its shard, unless their launcher ends them too
(`accelerate launch` does; the same command then continues the run). A shard's answers depend only on the data and on
the settings in `_run.json`, so a run that was stopped, however often, ends with the same rows as one that was not.
"""

from .options import Options, Summary
from .process import run

__all__ = ["Options", "Summary", "run"]
