"""The command `python -m nanosafe.plot`: see nanosafe/tools/plot.py."""

import sys

from nanosafe.tools.plot import main

if __name__ == "__main__":
    main(sys.argv[1:])
