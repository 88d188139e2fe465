"""`python -m modeling_ivtp.cli` is `ivtp`, for what starts modules: accelerate launch."""

import sys

from .running import main

sys.exit(main())
