"""`python -m prumerge_fast`: the same as the command `prumerge-fast`."""

import sys

from prumerge_fast.cli import main

sys.exit(main())
