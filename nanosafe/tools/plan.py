"""What a run needs and how long it takes, computed before anybody rents a cluster.

$ python -m nanosafe.plan SCRIPT [config files] [flags of the script and of the planner]
$ python -m nanosafe.plan train_ppo_lag.py config/beaver_7b/ppo_lag.py --gpus=8 --gpu=a800-80gb

Memory is added up part by part (planned_memory.py). Time is a roofline (planned_run.py), and the
column `expected` what others have reached of it (docs/benchmarks.md names the sources)."""

import ast
import os
import re
import sys
from dataclasses import fields

import configurator
from nanosafe.adapter_base import find_whole_model
from nanosafe.checkpoint.folder import read_model_config
from nanosafe.errors import choose, stop
from nanosafe.hub import find_model
from nanosafe.model import Config
from nanosafe.printing import format_table
from nanosafe.ranges import check_ranges
from nanosafe.tools.devices import GPUS, GPUS_PER_NODE, measure_this_machine
from nanosafe.tools.model_sizes import SHAPES
from nanosafe.tools.planned_memory import SHARES_STREAMS
from nanosafe.tools.planned_run import Run, Times
from nanosafe.tools.planned_setup import USUAL_RANK

gpus = 0  # of the run, over all nodes; 0: the 8 of a node, or 1 for cpu
gpu = "a800-80gb"  # a800-80gb | a100-80gb | a100-40gb | h100 | h200 | rtx-4090 | cpu (this machine)
shape = ""  # 1b | 1.1b | 3b | 7b | 8b | 13b | 34b | 70b, for a model that is not there yet
length = 0  # mean tokens of a sequence; 0: max_len
response = 0  # tokens of it that are sampled or carry loss; 0: half, or max_new_tokens
longest = 0  # tokens of a rollout's longest response; 0: to max_len after a prompt of a quarter
score_models = "auto"  # adapters | whole: what reward and cost models are; auto: what is there
# at their paths, and before that adapters with lora_rank, else whole


# ---- the command ----


def main(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.argv = ["nanosafe.plan", "-h"]
        configurator.configure(globals())  # prints the text above and the planner's knobs, and ends
    knobs = read_knobs(arguments[0], arguments[1:])
    choose("gpu", knobs["gpu"], (*GPUS, "cpu"))
    choose("score_models", knobs["score_models"], ("auto", "adapters", "whole"))
    config = read_shape(knobs)
    if knobs["gpu"] == "cpu":
        device = measure_this_machine(dtype=knobs["dtype"])
        gpus_by_default = 1
    else:
        device = GPUS[knobs["gpu"]]
        gpus_by_default = GPUS_PER_NODE

    def make_run(knobs, gpus):
        return Run(knobs, config, device, gpus, knobs["length"], knobs["response"])

    print_report(make_run(knobs, knobs["gpus"] or gpus_by_default), make_run)


def read_knobs(script, arguments):
    """A script's knobs as the script would resolve them, and the planner's. Nothing else of the
    script is executed."""
    if not os.path.isfile(script):
        stop(f"no script {script!r}: give train_sft.py, train_pref.py or train_ppo_lag.py")
    defaults = {"__file__": script}
    with open(script, encoding="utf-8") as f:
        source = f.read()
    for node in ast.parse(source).body:
        if configurator.calls_configure(node):
            break
        if isinstance(node, ast.Assign):
            defaults[node.targets[0].id] = ast.literal_eval(node.value)
    sys.argv = [script, *arguments]
    knobs = configurator.configure(defaults, globals())
    check_ranges(knobs)
    return knobs


def read_shape(knobs):
    """The policy's Config: that of the model folder, of the script's knobs, or of a named shape."""
    path = knobs.get("actor_model") or knobs["init_from"]
    name = knobs["shape"]
    if not name:
        if path == "scratch":
            names = [f.name for f in fields(Config) if f.name in knobs]
            return Config(**{name: knobs[name] for name in names})
        if os.path.isfile(os.path.join(find_whole_model(path), "config.json")):
            return read_model_config(find_whole_model(path))
        name = find_shape_in(path)
    if not name:  # perhaps one of the hub's models
        folder = find_whole_model(find_model(path, weights=False))
        if os.path.isfile(os.path.join(folder, "config.json")):
            return read_model_config(folder)
    if name not in SHAPES:
        stop(f"no model at {path!r}: say --shape=, one of {', '.join(SHAPES)}")
    return SHAPES[name]


def find_shape_in(path):
    """The name of a shape that a path holds, or "". 1.7b is not 7b."""
    for name in SHAPES:
        if re.search(rf"(?<![\d.]){name}", path.lower()):
            return name
    return ""


# ---- what is printed ----


def print_report(run, make_run):
    """Print a Run's tables; make_run(knobs, gpus) gives other runs to try where it does not fit."""
    print(
        f"\n{run.layout} over {run.gpus}, {len(run.trained)} models trained, {len(run.frozen)} "
        f"frozen, {run.sequences} sequences of {run.length} tokens, {run.micro_batches} "
        f"micro-batches of at most {run.knobs['max_tokens']} tokens on each rank\n"
    )
    print(format_table(memory_rows(run)) + "\n")
    print(format_table(time_rows(run)) + "\n")
    for sentence in list_assumptions(run):
        print(sentence)
    roofline = sum(times.roofline for times in run.times())
    expected = sum(times.expected for times in run.times())
    rate = run.sequences / expected
    print(
        f"{rate:.2f} sequences/s, {rate * run.length:.0f} tokens/s expected; "
        f"{expected / roofline:.2f}x the roofline"
    )
    if not run.fits():
        print(suggest_change(run, make_run))


def list_assumptions(run):
    """Sentences about what was planned that the tables do not show."""
    sentences = []
    if run.has_base:
        whole = [model.name for model in run.models if model.is_whole]
        standing = []
        for model in run.models:
            # A critic starts from its score model, and stands on the weights of that one.
            if not model.is_whole and model.name.removesuffix(" critic") not in whole:
                standing.append(model.name)
        sentences.append(f"on one frozen base: {', '.join(standing)}")
        if whole:
            sentences.append(f"with weights of their own: {', '.join(whole)}")
        if whole and run.trains_adapters:
            sentences.append(
                "trained as adapters of the actor's base (--score_models=adapters), these would "
                "share it"
            )
    if run.is_ppo:
        rows = run.count_rows_of_a_rollout()
        sentences.append(
            f"{rows} responses are decoded at a time, the longest of {run.longest_response():.0f} "
            "tokens"
        )
    if run.gpus > 1 and not run.is_plain and not SHARES_STREAMS:
        sentences.append("this torch has no share_comm_ctx: each model gathers in its own buffers")
    host = run.memory().host
    if host:
        parts = [f"{part.name} {format_gigabytes(part.bytes)}" for part in host]
        total = format_gigabytes(sum(part.bytes for part in host))
        sentences.append(
            f"host memory of a node: {total} GB ({', '.join(parts)}); torch rounds each pinned "
            "tensor up to a power of two, which is counted"
        )
    return sentences


def memory_rows(run):
    memory = run.memory()
    rows = [["memory per GPU, GB", "training", "sampling", "what changes it"]]
    for part in memory.always:
        size = format_gigabytes(part.bytes)
        rows.append([part.name, size, size if run.is_ppo else "", part.knobs])
    for part in memory.training:
        rows.append([part.name, format_gigabytes(part.bytes), "", part.knobs])
    for part in memory.sampling:
        rows.append([part.name, "", format_gigabytes(part.bytes), part.knobs])
    sampling = format_gigabytes(run.sampling_peak()) if run.is_ppo else ""
    available = f"of {run.device.memory:.1f} GB"
    rows.append(["all", format_gigabytes(run.training_peak()), sampling, available])
    return rows


def format_gigabytes(number):
    return f"{number / 1e9:.2f}"


def time_rows(run):
    columns = Times._fields[1:]
    rows = [["seconds", *columns]]
    totals = dict.fromkeys(columns, 0)
    for times in run.times():
        rows.append([times.name])
        for column in columns:
            seconds = getattr(times, column)
            rows[-1].append(f"{seconds:.3g}")
            totals[column] += seconds
    rows.append(["all"] + [f"{total:.3g}" for total in totals.values()])
    return rows


def suggest_change(run, make_run):
    """A sentence with the first change, from cheap to expensive, with which the run fits."""
    smaller = {
        "activation_checkpointing": True,
        "max_tokens": run.knobs["max_len"],
        "parallel": "fsdp",
    }
    tries = [
        ({"activation_checkpointing": True}, 1),
        (smaller, 1),
        ({**smaller, "offload": "frozen"}, 1),
    ]
    if run.knobs.get("lora_rank") == 0:  # adapters, on a base in one piece where it fits
        adapters = {**smaller, "lora_rank": USUAL_RANK}
        tries += [({**adapters, "parallel": run.knobs["parallel"]}, 1), (adapters, 1)]
    for exponent in range(1, 8):
        tries.append((smaller, 2**exponent))
    for change, factor in tries:
        other = make_run({**run.knobs, **change}, run.gpus * factor)
        if other.fits():
            flags = []
            for name, value in change.items():
                if run.knobs[name] != value:
                    flags.append(f"--{name}={value}")
            flags.append(f"--gpus={other.gpus}")
            seconds = sum(times.expected for times in other.times())
            return (
                f"it does not fit; with {' '.join(flags)} it does: {other.peak() / 1e9:.1f} GB, "
                f"{seconds:.1f} s"
            )
    return "it does not fit, nor on 128 times the GPUs: take a smaller model"


if __name__ == "__main__":
    main(sys.argv[1:])
