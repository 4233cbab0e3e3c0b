"""python -m nanosafe.demo runs nanosafe/tools/demo.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("nanosafe.tools.demo", run_name="__main__")
