"""Alpaca, and anything in its layout (LIMA, Alpaca-zh, ...): demonstrations.

$ python data/alpaca/prepare.py                                  # 52,002 demonstrations
$ python data/alpaca/prepare.py --raw=FOLDER --out=data/lima     # another set in the same layout"""

from configurator import configure
from nanosafe.data.layouts import to_raw_sample
from nanosafe.tools import download

config = configure(globals(), vars(download))

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"

# Instruction and input make the prompt, joined by a space (Safe-RLHF); earlier turns go first.
download.prepare(__file__, to_raw_sample, config, download.Release(url=URL))
