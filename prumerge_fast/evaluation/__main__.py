"""`python -m prumerge_fast.evaluation`: the command `prumerge-fast evaluate`."""

import sys

from prumerge_fast.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
