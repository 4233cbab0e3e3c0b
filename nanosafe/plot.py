"""python -m nanosafe.plot runs nanosafe/tools/plot.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("nanosafe.tools.plot", run_name="__main__")
