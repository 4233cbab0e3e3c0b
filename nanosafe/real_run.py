"""python -m nanosafe.real_run runs nanosafe/tools/real_run.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("nanosafe.tools.real_run", run_name="__main__")
