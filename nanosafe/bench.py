"""python -m nanosafe.bench runs nanosafe/tools/bench.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("nanosafe.tools.bench", run_name="__main__")
