"""The command line, one file per command."""

from .app import app
from .running import main

__all__ = ["app", "main"]
