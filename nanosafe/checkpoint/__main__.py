"""python -m nanosafe.checkpoint SOURCE TARGET [--dtype=bfloat16]: whatever opens -> a Hugging Face folder."""

import sys

from nanosafe.checkpoint.convert import main

main(sys.argv[1:])
