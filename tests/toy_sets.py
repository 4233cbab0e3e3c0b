"""The toy world's requests in the layout of the sets of safety prompts, for tests and for trying
nanosafe.eval.safety. No row of the sets themselves is here.

$ python tests/toy_sets.py FOLDER
$ python -m nanosafe.eval.safety --sets_folder=FOLDER ...
"""

import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanosafe.storage import load_python_file  # noqa: E402

TOY = load_python_file(str(ROOT / "data" / "toy" / "prepare.py"))
NAMES = "xstest strongreject beavertails_eval simple_safety do_not_answer safe_rlhf".split()


def draw_prompts(rng, is_risky, count):
    """Different requests."""
    prompts = {}  # as an ordered set
    while len(prompts) < count:
        prompts[TOY.any_prompt(rng, is_risky)] = None
    return list(prompts)


def make_rows(name, count):
    """The rows of a set: XSTest's are harmless and harmful requests, the others' harmful ones."""
    rng = random.Random(name)
    rows = []
    if name == "xstest":
        for prompt in draw_prompts(rng, False, count):
            rows.append({"input": prompt, "category": "requests", "label": "safe"})
    for prompt in draw_prompts(rng, True, count):
        if name == "xstest":
            rows.append({"input": prompt, "category": "contrast_requests", "label": "unsafe"})
        else:
            verb, _ = TOY.request_of(prompt)
            rows.append({"input": prompt, "category": "people" if verb < "m" else "things"})
    if name != "xstest":
        rows.sort(key=lambda row: row["category"])
    for number, row in enumerate(rows, start=1):
        row["id"] = str(number)
    return rows


def write_sets(folder, count=50):
    for name in NAMES:
        path = Path(folder) / name / "test.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in make_rows(name, count)]
        path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_sets(sys.argv[1])
