"""python -m nanosafe.plan runs nanosafe/tools/plan.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("nanosafe.tools.plan", run_name="__main__")
