"""python -m nanosafe.scorers runs nanosafe/phf/scorers.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("nanosafe.phf.scorers", run_name="__main__")
