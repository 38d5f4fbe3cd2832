"""``python -m modlib``: the command, as processes start it that have no path to it."""

import sys

from modlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
