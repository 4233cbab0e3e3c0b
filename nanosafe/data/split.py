"""Split one's own rows into a training file and a held-out file that have no prompt in common.

$ python -m nanosafe.data.split --data=mine.jsonl --out=data/mine --holdout=0.1
$ python train_sft.py --data=mine --eval_data=mine/test

A prompt is all that stands before the last answer; of a document, it is the document. The same rows
and the same holdout always give the same two files."""

import os

from configurator import configure
from nanosafe.data.examples import make_prompt_key
from nanosafe.data.reader import load, split_train_test
from nanosafe.errors import stop
from nanosafe.ranges import check_ranges
from nanosafe.storage import write_jsonl

data = ""  # the rows: NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl, comma separated
holdout = 0.1  # share of the prompts that goes to test.jsonl, with all their rows
out = ""  # folder to write train.jsonl and test.jsonl to
config = configure(globals())
check_ranges(config)

if not out:
    stop("out is empty: name the folder to write to, for example --out=data/mine")
out = os.path.expanduser(out)
paths = {split: os.path.join(out, split + ".jsonl") for split in ("train", "test")}
for path in paths.values():
    if os.path.exists(path):
        stop(f"{path!r} is there already: remove it, or name another folder with --out")

rows_of_prompt = {}  # key -> its rows
for record in load(data):
    rows_of_prompt.setdefault(make_prompt_key(record), []).append(record)
prompts = list(rows_of_prompt)
held_out = round(len(prompts) * holdout)
if not 0 < held_out < len(prompts):
    stop(
        f"holdout={holdout} of {len(prompts)} prompts is {held_out}: give a share between 0 and 1 "
        "with which neither file is empty"
    )
train, test = split_train_test(len(prompts), holdout)
for split, indices in (("train", train), ("test", test)):
    rows = []
    for i in sorted(indices):
        rows += rows_of_prompt[prompts[i]]
    write_jsonl(rows, paths[split])
    print(f"{paths[split]}: {len(rows)} rows of {len(indices)} prompts")
