"""Settings of vLLM's own process; it reads them when it is imported."""

import os

from benchmarks.serving.engines import IN_PROCESS

os.environ |= IN_PROCESS
