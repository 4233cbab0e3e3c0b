"""The command `python -m nanosafe.bench`: see nanosafe/tools/bench.py."""

from nanosafe.tools.bench import main

if __name__ == "__main__":
    main()
