"""`python -m ivtp_cli` is `ivtp`."""

import sys

from .running import main

sys.exit(main())
