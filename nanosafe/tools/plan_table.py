"""What fits on one GPU: a table of shapes and GPUs, with weights trained themselves or as adapters.

$ python -m nanosafe.tools.plan_table [SCRIPT] [config files] [flags]

A cell has the fastest plan among TRIES that fits: the gigabytes of its peak, expected seconds of a
step or an iteration, and the knobs that differ from the first try."""

import contextlib
import sys

from nanosafe.printing import format_table
from nanosafe.tools import plan
from nanosafe.tools.devices import GPUS
from nanosafe.tools.model_sizes import SHAPES
from nanosafe.tools.planned_run import Run
from nanosafe.tools.planned_setup import USUAL_RANK

SHAPES_SHOWN = ("1b", "3b", "7b", "8b")
GPUS_SHOWN = ("rtx-4090", "a100-40gb", "a100-80gb")
MAX_TOKENS = (8192, 4096, 2048, 1024)


def main(arguments):
    script, *rest = arguments or ["train_ppo_lag.py"]
    with contextlib.redirect_stdout(sys.stderr):
        knobs = plan.read_knobs(script, [*rest, "--gpus=1"])
    rows = [["shape", "trained"]]
    for gpu in GPUS_SHOWN:
        rows[0].append(f"{gpu}, {GPUS[gpu].memory} GB")
    for shape in SHAPES_SHOWN:
        for rank in (0, USUAL_RANK):
            row = [shape, f"adapters, rank {rank}" if rank else "all weights"]
            for gpu in GPUS_SHOWN:
                row.append(describe_fastest({**knobs, "lora_rank": rank}, shape, gpu))
            rows.append(row)
    print(format_table(rows))


def list_tries(max_len):
    """Changes of knobs, the least first."""
    tries = []
    for offload in ("none", "frozen", "all"):
        for recomputes in (False, True):
            for max_tokens in MAX_TOKENS:
                if max_tokens >= max_len:
                    change = {"max_tokens": max_tokens, "offload": offload}
                    change["activation_checkpointing"] = recomputes
                    tries.append(change)
    return tries


def describe_fastest(knobs, shape, gpu):
    """The cell of the fastest try that fits, without offloading where that is possible."""
    best = None
    best_seconds = None
    for change in list_tries(knobs["max_len"]):
        if best and best.knobs["offload"] != change["offload"]:
            break
        run = Run({**knobs, **change}, SHAPES[shape], GPUS[gpu], 1, knobs["length"])
        seconds = sum(times.expected for times in run.times())
        if run.fits() and (best is None or seconds < best_seconds):
            best, best_seconds = run, seconds
    if best is None:
        return "-"
    words = [f"{best.peak() / 1e9:.1f} GB", f"{best_seconds:.3g} s"]
    words.append(f"max_tokens={best.knobs['max_tokens']}")
    if best.knobs["activation_checkpointing"]:
        words.append("checkpointing")
    if best.knobs["offload"] != "none":
        words.append(f"offload={best.knobs['offload']}")
    return ", ".join(words)


if __name__ == "__main__":
    main(sys.argv[1:])
