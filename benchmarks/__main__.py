"""``python -m benchmarks``: the same as ``xopd bench``, from a clone."""

import sys

from xopd_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
