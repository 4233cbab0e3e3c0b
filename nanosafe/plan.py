"""The command `python -m nanosafe.plan`: see nanosafe/tools/plan.py."""

import sys

from nanosafe.tools.plan import main

if __name__ == "__main__":
    main(sys.argv[1:])
