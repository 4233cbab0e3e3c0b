"""python -m nanosafe.checkpoint SOURCE TARGET [--to=hf|classifier] [--dtype=bfloat16]"""

import sys

from nanosafe.checkpoint.convert import main

main(sys.argv[1:])
