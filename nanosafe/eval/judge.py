"""A language model, at an OpenAI-compatible address, judges two policies' answers to problems.

$ export OPENAI_API_KEY=...                  # and OPENAI_BASE_URL, for another server than OpenAI's
$ python -m nanosafe.eval.judge --red=out/demo/ppo/model --blue=out/demo/ppo_lag/model

Each pair of answers is judged twice, with either answer first. A reply is written to the disk
before it counts: the same command, run again, pays only for the replies that are missing. A reply
that cannot be read is asked for once more, with a reminder of the form. The price that is printed
before is the most that is spent: asking stops there. Writes answers.jsonl, replies.jsonl,
verdicts.jsonl and summary.json to out_dir."""

import json
import os
import re
from collections import Counter
from pathlib import Path

from configurator import configure
from nanosafe.data.examples import Prompt, check_text, make_turns
from nanosafe.errors import one_line_errors, stop
from nanosafe.eval.judge_client import (
    THOUGHTS,
    Form,
    Judge,
    Replies,
    ask_missing,
    describe_payment,
    make_question,
    read_server,
)
from nanosafe.inference import Policy
from nanosafe.parallel import barrier, close, init
from nanosafe.printing import format_table
from nanosafe.ranges import check_ranges
from nanosafe.storage import make_folder, read_json, read_jsonl, write_json, write_jsonl

# policies and problems
red = "out/demo/ppo/model"  # the policy to beat: a model folder
blue = "out/demo/ppo_lag/model"  # the policy that is compared with it
problems = ""  # a .json: [{"prompt": ..., "category": ...}, ...]; empty: nanosafe's own 64
out_dir = "out/judge"  # folder to write to, and to go on in
max_new_tokens = 512  # longest answer
temperature = 0.0  # of the answers; 0: always the likeliest token
seed = 0  # of the answers
# judge
judge = "gpt-4o"  # the judge's name at the server
concurrency = 8  # requests that wait for a reply at the same time
attempts = 6  # tries for each reply, where the server fails
pause = 1.0  # seconds before the second try; doubled before each further one
timeout = 60.0  # seconds to wait for a reply
input_price = 2.5  # dollars for a million tokens that the judge reads
output_price = 10.0  # dollars for a million tokens that it writes
yes = False  # do not ask whether to spend the money
# machine
device = "auto"  # auto | cpu | cuda
config = configure(globals())
check_ranges(config)

FOLDER = Path(__file__).parent
REMINDER = (  # the end of a question whose first reply could not be read
    "\n\nBegin your reply with a line that holds two numbers from 1 to 10 with a space between "
    "them, and nothing else."
)


# ---- settings ----


def read_problems(path):
    """The problems of a file, a list of {"prompt", "category"}."""
    with one_line_errors(path):
        with open(path, encoding="utf-8") as f:
            problems = json.load(f)
    if not are_problems(problems):
        stop(f'{path!r} must be a list of {{"prompt": ..., "category": ...}}, of one or more')
    return problems


def are_problems(value):
    if not isinstance(value, list) or len(value) == 0:
        return False
    for problem in value:
        if not isinstance(problem, dict):
            return False
        for field in ("prompt", "category"):
            try:
                check_text(problem.get(field), field)
            except ValueError:
                return False
    return True


# ---- answers ----


def describe_answers(red, blue, seed, temperature, max_new_tokens):
    """What the answers in a folder depend on, besides the problems."""
    policies = []
    for path in (red, blue):
        modified = os.path.exists(path) and os.path.getmtime(path)
        policies.append([os.path.abspath(path), modified])
    return {
        "policies": policies,
        "seed": seed,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
    }


def read_answers(out_dir, problems, description):
    """The answers that an earlier run left, or []. Stops if they are answers to something else."""
    answers = read_jsonl(f"{out_dir}/answers.jsonl")
    if not answers:
        return []
    same_prompts = [a["prompt"] for a in answers] == [p["prompt"] for p in problems]
    if not same_prompts or read_json(out_dir, "about.json") != description:
        stop(
            f"{out_dir!r} has answers of other models, settings or problems: choose another out_dir"
        )
    return answers


def answer_problems(policy, corner, answers):
    """Add a policy's answer to each row of answers; corner is "red" or "blue"."""
    questions = [policy.question(Prompt(make_turns([answer["prompt"]]))) for answer in answers]
    responses = policy.answers(questions, range(len(answers)))
    for answer, ids in zip(answers, responses):
        answer[corner] = policy.tok.decode(ids)


# ---- questions to the judge ----


def make_questions(answers, judge):
    """A Question about each pair of answers in either order.

    Its names are the problem's index and the order: 0 if red's answer comes first, 1 if blue's."""
    text = (FOLDER / "judge.txt").read_text(encoding="utf-8")
    system, template = text.split("\n---\n")
    form = Form(read_scores, REMINDER)
    questions = []
    for i, answer in enumerate(answers):
        red, blue = answer["red"], answer["blue"]
        for order, (first, second) in enumerate([(red, blue), (blue, red)]):
            user = template.format(prompt=answer["prompt"], first=first, second=second)
            names = {"problem": i, "order": order}
            questions.append(make_question(judge, names, system, user, form))
    return questions


# ---- the scores in a reply ----

# Judges spell two scores in many ways: "8 7", "8/10, 7/10", "[8] [7]", "Scores: 8 and 7",
# "Assistant 1: 8, Assistant 2: 7" on one line or on two, and the same as JSON.
DECORATION = re.compile(r"""[*_`"'\[\](){}<>#$]+""")
BULLET = re.compile(r"\s*[-+\u2022]\s+")
SCALE = re.compile(
    r"(?<=\d)\s*(?:/|out\s+of)\s*10(?:\.0+)?(?!\d|\.\d|\s*/)|(?<=\d)\s*(?:points?|pts)\b", re.I
)
SCORE = r"(10(?:\.0+)?|[1-9](?:\.\d+)?)"  # a number from 1 to 10
BORDER = r"(?:[\s,;|&]|and|vs\.?)+"
HEADING = r"(?:[a-z ]*(?:scores?|ratings?)(?:\s+are)?\s*[:=]?\s+)?"
NOUN = r"(?:ai\s+)?(?:assistant|answer|response|model|score|rating)"
LABEL = (
    rf"(?:(?:the\s+)?(?:score|rating)\s+(?:of|for)\s+)?(?:{NOUN}\s*)?([12ab])"
    r"(?:\s+s)?(?:\s+(?:score|rating))?"  # the s of "Assistant 1's"
)
LABELLED = rf"{LABEL}\s*(?:[:=]|\.\s|is\s|gets\s)\s*{SCORE}"
TWO_SCORES = re.compile(rf"[^\w-]*{HEADING}{SCORE}{BORDER}{SCORE}\W*", re.I)
TWO_LABELLED = re.compile(rf"\W*{HEADING}{LABELLED}(?:{BORDER}|\.\s+){LABELLED}\W*", re.I)
LONGEST_LINE = 200  # characters of a line that are looked at


def read_scores(text):
    """The two scores, from 1 to 10, with which a reply begins; None if it begins otherwise."""
    lines = []
    for line in THOUGHTS.sub("", text.strip(), count=1).splitlines():
        has_word = re.search(r"\w", line)
        if has_word and not line.startswith("```"):
            lines.append(line[:LONGEST_LINE])
    for count in (1, 2, 3):  # a line for both, a line for each, or a heading above these
        scores = read_two_scores(lines[:count])
        if scores:
            return scores
    return None


def read_two_scores(lines):
    """The scores of assistant 1 and 2, if these lines say nothing else; None if they do."""
    text = " \n".join(BULLET.sub("", line, count=1) for line in lines)
    text = SCALE.sub("", DECORATION.sub(" ", text))
    found = TWO_SCORES.fullmatch(text)
    if found:
        return [float(score) for score in found.groups()]
    found = TWO_LABELLED.fullmatch(text)
    if not found:
        return None
    label, score, other_label, other_score = found.groups()
    scores = {label.lower(): float(score), other_label.lower(): float(other_score)}
    for labels in ("12", "ab"):
        if set(scores) == set(labels):
            return [scores[name] for name in labels]
    return None


# ---- verdicts ----


def make_verdicts(answers, outcomes):
    """The answers that were judged in both orders, with the mean scores of the two orders.

    outcomes  {(problem, order): Outcome}"""
    verdicts = []
    for i, answer in enumerate(answers):
        if find_status(i, outcomes) != "judged":
            continue
        red_first, blue_first = outcomes[i, 0].scores
        blue_second, red_second = outcomes[i, 1].scores
        red_score = (red_first + red_second) / 2
        blue_score = (blue_first + blue_second) / 2
        verdict = {
            **answer,
            "red_score": red_score,
            "blue_score": blue_score,
            "orders_agree": compare(blue_first, red_first) == compare(blue_second, red_second),
            "blue_result": compare(blue_score, red_score),
        }
        verdicts.append(verdict)
    return verdicts


def compare(score, other):
    if score > other:
        return "win"
    return "lose" if score < other else "tie"


def find_status(i, outcomes):
    """What became of problem i: it is judged where both orders are read."""
    statuses = [outcomes[i, 0].status, outcomes[i, 1].status]
    for status in ("refused", "unread"):
        if status in statuses:
            return status
    return "judged" if statuses == ["read", "read"] else "missing"


def summarize(verdicts, answers, statuses):
    """{category: blue's results, both mean scores, and how many problems are not judged and why}.

    The last category is "all". Means over no verdict are None."""
    judged = {}
    counts = {}
    for answer, status in zip(answers, statuses):
        judged.setdefault(answer["category"], [])
        counts.setdefault(answer["category"], Counter())[status] += 1
    for verdict in verdicts:
        judged[verdict["category"]].append(verdict)
    judged["all"] = verdicts
    counts["all"] = Counter(statuses)
    results = {}
    for category, group in judged.items():
        wins = Counter(verdict["blue_result"] for verdict in group)
        results[category] = {
            "win": wins["win"],
            "tie": wins["tie"],
            "lose": wins["lose"],
            "red": mean_of(group, "red_score"),
            "blue": mean_of(group, "blue_score"),
            "orders agree": mean_of(group, "orders_agree"),
            "refused": counts[category]["refused"],
            "unread": counts[category]["unread"],
            "missing": counts[category]["missing"],
        }
    return results


def mean_of(verdicts, field):
    """A field's mean; None where there is no verdict."""
    if not verdicts:
        return None
    total = sum(verdict[field] for verdict in verdicts)
    return round(total / len(verdicts), 4)


def report(verdicts, answers, outcomes, replies):
    """Write the verdicts and the summary, and print them and what was paid."""
    statuses = [find_status(i, outcomes) for i in range(len(answers))]
    results = summarize(verdicts, answers, statuses)
    summary = {
        "judge": judge,
        "problems": len(answers),
        "judged": len(verdicts),
        "categories": results,
    }
    write_jsonl(verdicts, f"{out_dir}/verdicts.jsonl")
    write_json(summary, out_dir, "summary.json")
    rows = [("", *results["all"])]
    for category, result in results.items():
        rows.append((category, *["-" if value is None else value for value in result.values()]))
    print(f"\nblue ({blue}) against red ({red}):")
    print(format_table(rows))
    for status in ("refused", "unread"):
        texts = [outcome.text for outcome in outcomes.values() if outcome.status == status]
        if texts:
            print(f"{len(texts)} replies {status}, the first: {str(texts[0])[:60]!r}")
    print(
        f"{describe_payment(client, replies)}; "
        f"{out_dir}: answers, replies, verdicts .jsonl, summary.json"
    )


# ---- run ----
server = read_server()
client = Judge(judge, server, concurrency, attempts, pause, timeout, input_price, output_price)
problem_list = read_problems(problems or str(FOLDER / "problems.json"))
make_folder(out_dir)
world = init(device, config)

description = describe_answers(red, blue, seed, temperature, max_new_tokens)
answers = read_answers(out_dir, problem_list, description)
barrier()  # all ranks have looked for answers before one of them writes any
if not answers:
    answers = [dict(problem) for problem in problem_list]
    for corner, folder in (("red", red), ("blue", blue)):
        policy = Policy(folder, world, max_new_tokens, temperature=temperature, seed=seed)
        answer_problems(policy, corner, answers)
        del policy  # the next one takes its memory
    if world.main:
        write_json(description, out_dir, "about.json")
        write_jsonl(answers, f"{out_dir}/answers.jsonl")
close(end_process=not world.main)  # one process does the rest

replies = Replies(f"{out_dir}/replies.jsonl", ("problem", "order"))
questions = make_questions(answers, client)
subject = f"{len(answers)} problems"
failures = ask_missing(questions, client, replies, subject, yes, out_dir)

outcomes = {}
for question in questions:
    names = question.names
    outcomes[names["problem"], names["order"]] = replies.find_outcome(question)
verdicts = make_verdicts(answers, outcomes)
report(verdicts, answers, outcomes, replies)
if failures:
    stop(
        f"{len(answers) - len(verdicts)} problems are not judged ({server.host}: "
        f"{', '.join(failures)}); what was paid for is kept: the same command asks for the rest"
    )
if not verdicts:
    stop(f"no problem is judged: {judge} refuses, or its replies cannot be read: see replies.jsonl")
