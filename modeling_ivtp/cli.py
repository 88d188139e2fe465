"""The command line under the package's name: `python -m modeling_ivtp.cli` is `ivtp`, for what starts modules.

The commands themselves are in `ivtp_cli`, outside the package: importing anything from here imports torch and
transformers, and `ivtp --help` should not wait for them.
"""

import sys

from ivtp_cli import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    sys.exit(main())
