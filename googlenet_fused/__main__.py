"""``python -m googlenet_fused``: the command line, where the console script is not on PATH."""

import sys

from googlenet_fused.cli import main

if __name__ == "__main__":
    sys.exit(main())
