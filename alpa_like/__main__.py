"""`python -m alpa_like`, the same as the command `alpa-like`."""

import sys

from alpa_like.cli import main

if __name__ == "__main__":
    sys.exit(main())
