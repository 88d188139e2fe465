"""The command line, one file per command.

Nothing here imports torch, transformers or the package at the top of a file: a command imports what it needs when it
runs, so that `--help` answers at once.
"""

from .app import app
from .running import main

__all__ = ["app", "main"]
