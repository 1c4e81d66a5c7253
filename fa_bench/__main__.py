"""Entry point of ``python -m fa_bench``."""

import sys

from fa_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
