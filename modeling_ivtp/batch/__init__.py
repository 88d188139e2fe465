"""Answer a data set: `ivtp batch`, and the same from Python.

Ray Data hands the rows to actors, one process for each device, on this machine or a cluster. Consecutive rows form a
shard. An actor answers a shard in batches of similar length that its memory holds. Ray Data writes the answers of each
shard to one file, and beside it a checkpoint: the numbers of its rows. A run that was killed, whatever of it, goes on
with the rows that have no checkpoint. A shard's answers depend only on the data and on the settings in `_run.json`, so
a run that was stopped, however often, ends with the same rows as one that was not.
"""

from .options import Options, Summary
from .run import run

__all__ = ["Options", "Summary", "run"]
