"""BIG-bench's JSON tasks (arXiv:2206.04615), from a folder, for a model folder.

$ python -m nanosafe.eval.bigbench --model=out/demo/sft/model --tasks=FOLDER --shots=2

FOLDER holds NAME/task.json or NAME.json. Choices are scored by log-probability, open questions by
the text that is generated; a task's metrics that are unknown are said. Writes NAME/results.json."""

import glob
import json
import os
import re
import numpy as np
from tqdm import tqdm
from configurator import configure
from nanosafe.eval.statistics import calibration
from nanosafe.storage import make_folder, write_json
from nanosafe.errors import stop, one_line_errors
from nanosafe.printing import format_table
from nanosafe.parallel import close, init
from nanosafe.inference import Policy, sum_response_logps

model = "out/demo/sft/model"  # the policy's folder
tasks = "data/bigbench"  # a task's .json, or a folder of tasks
shots = 0  # solved examples before each question
max_examples = 0  # of each task; 0: all
max_new_tokens = 64  # longest text where one is generated
template = False  # ask as in a conversation; false: the text goes on, as BIG-bench means it
out_dir = "out/bigbench"  # folder to write to
seed = 0  # which examples are the shots, and the order of choices
max_tokens = 8192  # packed tokens per forward
device = "auto"  # auto | cpu | cuda
config = configure(globals())

CHOICE = {"multiple_choice_grade", "expected_calibration_error", "multiple_choice_brier_score"}

if min(shots, max_examples) < 0:
    stop("shots and max_examples are 0 or more")


def read_task(path):
    """A task's dict, once it is known to have the shape of one; errors name the first fault."""
    with one_line_errors(path), open(path, encoding="utf-8") as f:
        task = json.load(f)
    examples = task.get("examples") if isinstance(task, dict) else None
    if not isinstance(examples, list) or not examples:
        stop(f"{path!r} has no list of examples; programmatic tasks (task.py) are not run here")
    for i, example in enumerate(examples):
        with one_line_errors(f"{path}: example {i}"):
            text, scores, said = (example.get(k) for k in ("input", "target_scores", "target"))
            said = [said] if isinstance(said, str) else said or []
            if (
                not isinstance(text, str)
                or not all(isinstance(x, str) for x in said)
                or (len(dict(scores or ())) < 2 and not said)
                or not all(scores or " ")
            ):
                raise ValueError("it needs an input, and a target or two choices or more")
            scores = {choice: float(x) for choice, x in (scores or {}).items()}
            right = max(scores, key=scores.get) if scores else said[0]
            example.update(scores=scores, texts=said, right=right)
    return task


def prompts_of(task, draws):
    """The prompt of each example: its shots, itself, and where the answer begins."""
    before, after, mark, between = (
        task.get(key, default)
        for key, default in (
            ("example_input_prefix", "\nQ: "),
            ("example_output_prefix", "\nA: "),
            ("choice_prefix", "\n  choice: "),
            ("few_shot_example_separator", "\n"),
        )
    )

    def pose(example):
        text = before + example["input"]
        if example["scores"] and task.get("append_choices_to_input", True):
            text += "".join(mark + choice for choice in draws.permutation(list(example["scores"])))
        return text + after

    examples = task["examples"]
    for i, example in enumerate(examples[: max_examples or None]):
        picked = [k for k in draws.permutation(len(examples))[: shots + 1] if k != i][:shots]
        solved = "".join(pose(examples[k]) + examples[k]["right"] + between for k in picked)
        yield task.get("task_prefix", "") + solved + pose(example)


def ask(prompt):
    """A prompt's ids, and the white space at its end: tokenizers join it to what follows."""
    text = prompt.rstrip(" ")
    return policy.question([text], template), prompt[len(text) :]


def choices(task, posed):
    """The metrics of multiple choice, and the queries: log p of every choice after its prompt."""
    asked = []
    for prompt, example in posed:
        question, space = ask(prompt)
        for choice in example["scores"]:
            ids = question + policy.tok.encode_suffix(space + choice)
            asked.append((np.array(ids), np.arange(len(ids)) >= len(question)))
    logps = iter(sum_response_logps(policy.model, asked, max_tokens, world).tolist())
    queries = []
    for prompt, example in posed:
        log_p = dict(zip(example["scores"], logps))
        x, wanted = np.array(list(log_p.values())), np.array(list(example["scores"].values()))
        p, best = np.exp(x - np.logaddexp.reduce(x)), int(x.argmax())
        queries.append(
            {
                "prompt": prompt,
                "log_probabilities": log_p,
                "grade": wanted[best],
                "brier": ((p - wanted) ** 2).mean(),
                "probability": p[best],
                "right": float(wanted[best] == wanted.max()),
            }
        )
    sure, right = ([q[key] for q in queries] for key in ("probability", "right"))
    return {
        "multiple_choice_grade": sum(q["grade"] for q in queries) / len(queries),
        "multiple_choice_brier_score": sum(q["brier"] for q in queries) / len(queries),
        "expected_calibration_error": calibration(sure, right)[1],
    }, queries


def texts(task, posed):
    """The share of generated texts that are one of the targets, and the queries."""
    questions = [ask(prompt)[0] for prompt, _ in posed]
    mark = task.get("stop_string") or not template and task.get("few_shot_example_separator", "\n")
    said = map(policy.tok.decode, policy.answers(questions, range(len(posed))))
    queries = []
    for (prompt, example), text in zip(posed, said):
        text = text.lstrip().split(mark)[0] if mark else text
        found = re.search(task.get("output_regex") or "(?s).*", text)
        text = found[0] if found else text
        hit = text.strip() in [target.strip() for target in example["texts"]]
        queries.append({"prompt": prompt, "text": text, "targets": example["texts"], "hit": hit})
    return {"exact_str_match": sum(q["hit"] for q in queries) / len(queries)}, queries


if os.path.isfile(tasks):
    paths = {os.path.basename(tasks): tasks}
else:
    names = sorted(
        [
            *glob.glob("*.json", root_dir=tasks),
            *glob.glob("**/task.json", root_dir=tasks, recursive=True),
        ]
    )
    paths = {name.removesuffix("/task.json"): os.path.join(tasks, name) for name in names}
if not paths:
    stop(f"tasks={tasks!r} has no NAME/task.json and no NAME.json")
found = {name: (path, read_task(path)) for name, path in paths.items()}
make_folder(out_dir)
world = init(device, config)
policy = Policy(model, world, max_new_tokens, temperature=0.0, seed=seed)
rows = [("task", "examples", "metric", "value")]
for name, (path, task) in tqdm(found.items(), unit="task", disable=not world.main):
    with one_line_errors(path):
        prompts = list(prompts_of(task, np.random.default_rng(seed % 2**32)))
        wanted = list(task.get("metrics") or ["multiple_choice_grade", "exact_str_match"])
    numbers, queries = {}, []
    for take, kind, known in ((choices, "scores", CHOICE), (texts, "texts", {"exact_str_match"})):
        posed = [(prompt, x) for prompt, x in zip(prompts, task["examples"]) if x[kind]]
        if posed and known & set(wanted):
            with one_line_errors(path):
                measured, asked = take(task, posed)
            numbers.update({key: x for key, x in measured.items() if key in wanted})
            queries += asked
    if world.main:
        folder = os.path.join(out_dir, name)
        make_folder(folder)
        write_json(
            {
                "task": path,
                "model": model,
                "shots": shots,
                "examples": len(prompts),
                "metrics": numbers,
                "not_computed": [x for x in wanted if x not in numbers],
                "queries": queries,
                "preferred": task.get("preferred_score"),
            },
            folder,
            "results.json",
        )
    rows += [
        (name, len(prompts), key, f"{numbers[key]:.4f}" if key in numbers else "not computed")
        for key in wanted
    ]
if world.main:
    print(f"\n{format_table(rows)}\n{out_dir}: a results.json for each of {len(found)} tasks")
close()
