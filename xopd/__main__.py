"""``python -m xopd``: the same as the ``xopd`` command."""

import sys

from xopd.cli import main

sys.exit(main())
