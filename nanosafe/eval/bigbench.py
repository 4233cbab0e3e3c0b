"""BIG-bench's JSON tasks (arXiv:2206.04615), for a model folder.

$ python -m nanosafe.eval.bigbench --model=out/demo/sft/model --tasks=FOLDER --shots=2

FOLDER holds NAME/task.json or NAME.json. Choices are scored by their log-probability, open
questions by the text that the model generates. Metrics that are not known here are named and left
out. Writes NAME/results.json to out_dir."""

import glob
import json
import os
import re
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import configure
from nanosafe.data.examples import Prompt, make_turns
from nanosafe.errors import one_line_errors, stop
from nanosafe.eval.statistics import measure_calibration
from nanosafe.inference import Policy, sum_response_logps
from nanosafe.parallel import close, init
from nanosafe.printing import format_table
from nanosafe.ranges import check_ranges
from nanosafe.storage import make_folder, write_json

# model and tasks
model = "out/demo/sft/model"  # the policy's folder
tasks = "data/bigbench"  # a task's .json, or a folder of tasks
shots = 0  # solved examples before each question
max_examples = 0  # of each task; 0: all
max_new_tokens = 64  # longest text where one is generated
template = "none"  # auto, a name or a file: ask in this chat template; none: the text goes on
out_dir = "out/bigbench"  # folder to write to
seed = 0  # which examples are the shots, and the order of choices
# machine
max_tokens = 8192  # packed tokens per forward
device = "auto"  # auto | cpu | cuda
config = configure(globals())
check_ranges(config)

CHOICE_METRICS = (
    "multiple_choice_grade",
    "multiple_choice_brier_score",
    "expected_calibration_error",
)
TEXT_METRICS = ("exact_str_match",)


# ---- tasks ----


class Example(NamedTuple):
    input: str
    scores: dict  # {choice: its score}; {} for an open question
    targets: list  # texts, each a right answer; [] for a pure multiple choice
    answer: str  # a right one, to show when the example is a shot


class Task(NamedTuple):
    """A task file, with BIG-bench's defaults for the fields that it does not have."""

    path: str
    examples: list
    metrics: list
    preferred_score: str
    task_prefix: str
    input_prefix: str
    output_prefix: str
    choice_prefix: str
    separator: str  # after each shot
    append_choices: bool  # whether the prompt lists the choices
    stop_string: str  # "": none
    output_regex: str  # "": none


def find_tasks(tasks):
    """{name: path} of a task file, or of the task files in a folder."""
    if os.path.isfile(tasks):
        return {os.path.basename(tasks): tasks}
    names = glob.glob("*.json", root_dir=tasks)
    names += glob.glob("**/task.json", root_dir=tasks, recursive=True)
    if not names:
        stop(f"tasks={tasks!r} has no NAME/task.json and no NAME.json")
    return {name.removesuffix("/task.json"): os.path.join(tasks, name) for name in sorted(names)}


def read_task(path):
    """A Task, or one line that names the first thing that is wrong with the file."""
    with one_line_errors(path), open(path, encoding="utf-8") as f:
        fields = json.load(f)
    examples = fields.get("examples") if isinstance(fields, dict) else None
    if not isinstance(examples, list) or len(examples) == 0:
        stop(f"{path!r} has no list of examples; programmatic tasks (task.py) are not run here")
    try:
        return Task(
            path=path,
            examples=[parse_example(example, i) for i, example in enumerate(examples)],
            metrics=parse_metrics(fields.get("metrics")),
            preferred_score=fields.get("preferred_score"),
            task_prefix=parse_text(fields, "task_prefix", ""),
            input_prefix=parse_text(fields, "example_input_prefix", "\nQ: "),
            output_prefix=parse_text(fields, "example_output_prefix", "\nA: "),
            choice_prefix=parse_text(fields, "choice_prefix", "\n  choice: "),
            separator=parse_text(fields, "few_shot_example_separator", "\n"),
            append_choices=bool(fields.get("append_choices_to_input", True)),
            stop_string=parse_text(fields, "stop_string", ""),
            output_regex=parse_regex(fields),
        )
    except ValueError as error:
        stop(f"{path!r} is not a task: {error}")


def parse_example(fields, i):
    if not isinstance(fields, dict) or not isinstance(fields.get("input"), str):
        raise ValueError(f"example {i} has no input")
    scores = parse_scores(fields.get("target_scores"), i)
    targets = fields.get("target") or []
    if isinstance(targets, str):
        targets = [targets]
    if not isinstance(targets, list) or not all(isinstance(text, str) for text in targets):
        raise ValueError(f"example {i} has a target that is not a text")
    if len(scores) < 2 and not targets:
        raise ValueError(f"example {i} has neither a target nor two choices")
    answer = max(scores, key=scores.get) if scores else targets[0]
    return Example(fields["input"], scores, targets, answer)


def parse_scores(value, i):
    if not value:
        return {}
    if not isinstance(value, dict) or "" in value:
        raise ValueError(
            f"example {i} has an empty choice, or target_scores that are not an object"
        )
    scores = {}
    for choice, score in value.items():
        if not isinstance(score, (int, float)):
            raise ValueError(f"example {i} has a choice with the score {score!r}")
        scores[choice] = float(score)
    return scores


def parse_metrics(value):
    if not value:
        return ["multiple_choice_grade", "exact_str_match"]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("its metrics are not a list of names")
    return value


def parse_text(fields, name, default):
    text = fields.get(name)
    if text is None:
        return default
    if not isinstance(text, str):
        raise ValueError(f"{name} is not a text")
    return text


def parse_regex(fields):
    regex = parse_text(fields, "output_regex", "")
    try:
        re.compile(regex)
    except re.error as error:
        raise ValueError(f"output_regex {regex!r}: {error}") from None
    return regex


# ---- prompts ----


class Question(NamedTuple):
    prompt: str
    example: Example


def make_questions(task, shots, max_examples, rng):
    """Each example behind `shots` solved ones, ending where the answer begins."""
    questions = []
    for i, example in enumerate(task.examples[: max_examples or None]):
        drawn = rng.permutation(len(task.examples))[: shots + 1]
        others = [k for k in drawn if k != i]
        prompt = task.task_prefix
        for k in others[:shots]:
            solved = task.examples[k]
            prompt += write_question(task, solved, rng) + solved.answer + task.separator
        prompt += write_question(task, example, rng)
        questions.append(Question(prompt, example))
    return questions


def write_question(task, example, rng):
    text = task.input_prefix + example.input
    if example.scores and task.append_choices:
        for choice in rng.permutation(list(example.scores)):
            text += task.choice_prefix + str(choice)
    return text + task.output_prefix


def encode_prompt(policy, prompt):
    """A prompt's token ids, and the spaces at its end.

    Tokenizers join spaces to the word that follows, so they are encoded with the answer."""
    text = prompt.rstrip(" ")
    return policy.question(Prompt(make_turns([text]))), prompt[len(text) :]


# ---- metrics ----


class Result(NamedTuple):
    metrics: dict
    queries: list  # a dictionary for each question


def score_choices(policy, questions, max_tokens, world):
    """Multiple choice: the probability of a choice is that of its text after the prompt.

    The probabilities p of a question's choices are normalised to sum to 1. Grade: the target score
    of the likeliest choice. Brier score: the mean of (p - target score)^2 over the choices."""
    sequences = []
    for prompt, example in questions:
        prompt_ids, spaces = encode_prompt(policy, prompt)
        for choice in example.scores:
            ids = prompt_ids + policy.tok.encode_suffix(spaces + choice)
            is_choice = np.arange(len(ids)) >= len(prompt_ids)
            sequences.append((np.array(ids), is_choice))
    logps = sum_response_logps(policy.model, sequences, max_tokens, world).tolist()
    if np.isnan(logps).any():
        stop(f"{model!r} gives probabilities that are not numbers: its weights are broken")

    queries = []
    first = 0
    for prompt, example in questions:
        last = first + len(example.scores)
        queries.append(grade_choices(prompt, example, logps[first:last]))
        first = last
    probabilities = [query["probability"] for query in queries]
    correct = [query["right"] for query in queries]
    metrics = {
        "multiple_choice_grade": mean_of(queries, "grade"),
        "multiple_choice_brier_score": mean_of(queries, "brier"),
        "expected_calibration_error": measure_calibration(probabilities, correct).error,
    }
    return Result(metrics, queries)


def grade_choices(prompt, example, logps):
    """One question's query; logps are the log-probabilities of its choices."""
    targets = np.array(list(example.scores.values()))
    normalizer = np.logaddexp.reduce(logps)
    probabilities = np.exp(np.array(logps) - normalizer)
    best = int(np.argmax(logps))
    return {
        "prompt": prompt,
        "log_probabilities": dict(zip(example.scores, logps)),
        "grade": targets[best],
        "brier": ((probabilities - targets) ** 2).mean(),
        "probability": probabilities[best],
        "right": float(targets[best] == targets.max()),
    }


def match_texts(policy, task, questions):
    """Open questions: the share of generated texts that are equal to one of the targets."""
    prompts = [encode_prompt(policy, prompt)[0] for prompt, _ in questions]
    responses = policy.answers(prompts, range(len(prompts)))
    queries = []
    for (prompt, example), ids in zip(questions, responses):
        text = cut_text(policy.tok.decode(ids), task, policy.has_template)
        targets = [target.strip() for target in example.targets]
        hit = text.strip() in targets
        queries.append({"prompt": prompt, "text": text, "targets": example.targets, "hit": hit})
    return Result({"exact_str_match": mean_of(queries, "hit")}, queries)


def cut_text(text, task, has_template):
    """A generated text up to the task's stop string, and of it what output_regex matches."""
    stop_string = task.stop_string
    if not stop_string and not has_template:
        stop_string = task.separator  # a text that goes on would pose the next question
    if stop_string:
        text = text.lstrip().split(stop_string)[0]
    if task.output_regex:
        found = re.search(task.output_regex, text)
        if found:
            text = found[0]
    return text


def mean_of(queries, field):
    return sum(query[field] for query in queries) / len(queries)


def evaluate(policy, task, questions, world):
    """A Result with those of the task's metrics that are known here."""
    metrics = {}
    queries = []
    choice_questions = [question for question in questions if question.example.scores]
    text_questions = [question for question in questions if question.example.targets]
    if choice_questions and set(CHOICE_METRICS) & set(task.metrics):
        result = score_choices(policy, choice_questions, max_tokens, world)
        metrics.update(result.metrics)
        queries += result.queries
    if text_questions and set(TEXT_METRICS) & set(task.metrics):
        result = match_texts(policy, task, text_questions)
        metrics.update(result.metrics)
        queries += result.queries
    wanted = {name: value for name, value in metrics.items() if name in task.metrics}
    return Result(wanted, queries)


def write_result(folder, task, questions, result):
    make_folder(folder)
    contents = {
        "task": task.path,
        "model": model,
        "shots": shots,
        "examples": len(questions),
        "metrics": result.metrics,
        "not_computed": [name for name in task.metrics if name not in result.metrics],
        "queries": result.queries,
        "preferred": task.preferred_score,
    }
    write_json(contents, folder, "results.json")


# ---- run ----
if min(shots, max_examples) < 0:
    stop("shots and max_examples are 0 or more")
all_tasks = {name: read_task(path) for name, path in find_tasks(tasks).items()}
make_folder(out_dir)
world = init(device, config)
policy = Policy(model, world, max_new_tokens, temperature=0.0, seed=seed, template=template)

rows = [("task", "examples", "metric", "value")]
for name, task in tqdm(all_tasks.items(), unit="task", disable=not world.main):
    rng = np.random.default_rng(seed % 2**32)
    questions = make_questions(task, shots, max_examples, rng)
    result = evaluate(policy, task, questions, world)
    if world.main:
        write_result(os.path.join(out_dir, name), task, questions, result)
    for metric in task.metrics:
        value = "not computed"
        if metric in result.metrics:
            value = f"{result.metrics[metric]:.4f}"
        rows.append((name, len(questions), metric, value))
if world.main:
    print(f"\n{format_table(rows)}")
    print(f"{out_dir}: a results.json for each of {len(all_tasks)} tasks")
close()
