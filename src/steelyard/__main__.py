"""`python -m steelyard`: the command line without its script."""

import sys

from steelyard.cli import main

if __name__ == "__main__":
    sys.exit(main())
