"""A language model, at an OpenAI-compatible address, judges two policies' answers to problems.

$ export OPENAI_API_KEY=...                  # and OPENAI_BASE_URL, for another server than OpenAI's
$ python -m nanosafe.eval.judge --red=out/demo/ppo/model --blue=out/demo/ppo_lag/model

Each pair of answers is judged twice, with either answer first. A reply is written to the disk
before it counts: the same command, run again, pays only for the replies that are missing. Writes
answers.jsonl, replies.jsonl, verdicts.jsonl and summary.json to out_dir."""

import hashlib
import json
import os
import re
import sys
import threading
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit

from tqdm import tqdm

from configurator import configure
from nanosafe.data.examples import check_text
from nanosafe.errors import one_line_errors, stop
from nanosafe.inference import Policy
from nanosafe.parallel import barrier, close, init
from nanosafe.printing import format_table
from nanosafe.storage import (
    format_json,
    make_folder,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)

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
attempts = 6  # tries for each reply
pause = 1.0  # seconds before the second try; doubled before each further one
timeout = 60.0  # seconds to wait for a reply
input_price = 2.5  # dollars for a million tokens that the judge reads
output_price = 10.0  # dollars for a million tokens that it writes
yes = False  # do not ask whether to spend the money
# machine
device = "auto"  # auto | cpu | cuda
config = configure(globals())

FOLDER = Path(__file__).parent
OPENAI = "https://api.openai.com/v1"
CHARACTERS_PER_TOKEN = 4  # an estimate
TOKENS_PER_REPLY = 300  # an estimate
LONGEST_WAIT = 600  # seconds that a server may ask us to wait
# After these statuses every other request would fail too: a redirect, a wrong key or address.
FATAL_STATUSES = (301, 302, 307, 308, 401, 403, 404)
BAD_REQUEST = 400  # the server refuses this request, and would refuse it again
SCORE = r"(10(?:\.0+)?|[1-9](?:\.\d+)?)"  # a number from 1 to 10
TWO_SCORES = re.compile(rf"[^\w-]*{SCORE}[\s,;|*]+{SCORE}\W*")


# ---- settings ----


class Server(NamedTuple):
    address: str  # without a slash at its end
    host: str
    api_key: str


def read_server():
    """The judge's server, from the environment."""
    address = os.environ.get("OPENAI_BASE_URL", OPENAI).rstrip("/")
    api_key = os.environ.get("OPENAI_API_KEY", "").strip()
    host = urlsplit(address).hostname
    if not address.startswith(("http://", "https://")) or not host:
        stop("OPENAI_BASE_URL is not an http:// or https:// address")
    if not api_key and "OPENAI_BASE_URL" not in os.environ:
        stop("OPENAI_API_KEY is not set (nor OPENAI_BASE_URL, for a server without keys)")
    if not api_key.isascii():
        stop("OPENAI_API_KEY has characters that no key has")
    return Server(address, host, api_key)


def check_limits(attempts, concurrency, timeout, pause):
    if min(attempts, concurrency) < 1:
        stop(f"attempts={attempts} and concurrency={concurrency} are 1 or more")
    if not (0 < timeout <= 3600 and 0 <= pause <= 3600):
        stop(f"timeout={timeout} and pause={pause} are seconds, of an hour at most")


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
    questions = [policy.question([answer["prompt"]]) for answer in answers]
    responses = policy.answers(questions, range(len(answers)))
    for answer, ids in zip(answers, responses):
        answer[corner] = policy.tok.decode(ids)


# ---- questions to the judge ----


class Question(NamedTuple):
    """A pair of answers in one order."""

    problem: int  # its index
    order: int  # 0: red's answer comes first; 1: blue's does
    messages: list  # what is sent to the judge
    digest: str  # of the host, the judge and the messages: what a reply is valid for


def make_questions(answers, host, judge):
    text = (FOLDER / "judge.txt").read_text(encoding="utf-8")
    system, template = text.split("\n---\n")
    questions = []
    for i, answer in enumerate(answers):
        red, blue = answer["red"], answer["blue"]
        for order, (first, second) in enumerate([(red, blue), (blue, red)]):
            user = template.format(prompt=answer["prompt"], first=first, second=second)
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": user},
            ]
            key = json.dumps([host, judge, messages]).encode()
            digest = hashlib.blake2b(key, digest_size=16).hexdigest()
            questions.append(Question(i, order, messages, digest))
    return questions


def print_estimate(questions, missing, host):
    """Print how many replies are missing, and about what they will cost."""
    characters = 0
    for question in missing:
        for message in question.messages:
            characters += len(message["content"])
    tokens_read = characters // CHARACTERS_PER_TOKEN
    tokens_written = TOKENS_PER_REPLY * len(missing)
    print(
        f"{len(questions) // 2} problems; {len(questions) - len(missing)} replies are here, "
        f"{len(missing)} to ask {judge} at {host} for: about {tokens_read:,} tokens and "
        f"{tokens_written:,} of replies, {format_price(tokens_read, tokens_written)}",
        flush=True,
    )


def format_price(tokens_read, tokens_written):
    dollars = (tokens_read * input_price + tokens_written * output_price) / 1e6
    return f"${dollars:.2f}"


def confirm(out_dir):
    """Go on only if somebody at the terminal agrees to spend the money."""
    if not sys.stdin.isatty():
        stop("nobody is here to say yes: --yes=True spends the money")
    print("go on? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        stop(f"nothing was sent; the answers are in {out_dir}/answers.jsonl")


# ---- replies ----


class Replies:
    """The replies that were paid for, in replies.jsonl; several threads add to them."""

    def __init__(self, path):
        self.path = path
        self.lock = threading.Lock()
        self.rows = read_jsonl(path)
        write_jsonl(self.rows, path)  # a last line that broke off is removed: more lines follow

    def add(self, row):
        """Add a reply, and write it to the disk before it counts."""
        with self.lock:
            self.rows.append(row)
            with open(self.path, "a", encoding="utf-8") as f:
                print(format_json(row), file=f, flush=True)
                os.fsync(f.fileno())

    def find_scores(self, questions):
        """{(problem, order): the two scores} of the questions with a reply that can be read."""
        scores_of_reply = {}
        for row in self.rows:
            if row["scores"]:
                scores_of_reply[row["problem"], row["order"], row["digest"]] = row["scores"]
        scores = {}
        for problem, order, _, digest in questions:
            if (problem, order, digest) in scores_of_reply:
                scores[problem, order] = scores_of_reply[problem, order, digest]
        return scores

    def count_tokens(self, kind):
        return sum(row["usage"].get(kind, 0) for row in self.rows)


class RefuseRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, because the key must not be sent to another address."""

    def redirect_request(self, *request):
        return None


OPENER = urllib.request.build_opener(RefuseRedirects)


def post(server, messages, judge, timeout):
    """Send one request; the reply is a JSON object."""
    body = json.dumps({"model": judge, "messages": messages, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"}
    request = urllib.request.Request(server.address + "/chat/completions", body, headers)
    with OPENER.open(request, timeout=timeout) as response:
        reply = json.load(response)
    if not isinstance(reply, dict):
        raise ValueError("the reply is not a JSON object")
    return reply


def read_text(reply):
    """The text of a reply, which some servers send in pieces; "" where there is none."""
    try:
        content = reply["choices"][0]["message"]["content"]
        if isinstance(content, str):
            return content
        return "".join(piece["text"] for piece in content)
    except (LookupError, TypeError):
        return ""


def read_scores(text):
    """The two scores, from 1 to 10, in the first line of a reply, or None."""
    first_line = text.strip().split("\n")[0]
    found = TWO_SCORES.fullmatch(first_line)
    return [float(x) for x in found.groups()] if found else None


def read_usage(reply):
    """{kind of token: count} as the server reports it."""
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        return {}
    return {kind: count for kind, count in usage.items() if type(count) is int}


def read_retry_after(error):
    """The seconds that a server asks us to wait before the next try; 0 if it does not say."""
    value = error.headers.get("Retry-After", "")
    if not re.fullmatch(r"[0-9]{1,9}", value):
        return 0
    return min(float(value), LONGEST_WAIT)


def ask_judge(question, server, replies, stopping):
    """Ask until the judge's scores can be read, `attempts` times at most.

    replies   Replies, to which each reply is added, also one whose scores cannot be read
    stopping  a threading.Event: once it is set, no thread asks again

    Returns why there are no scores, "" if there are."""
    failure = "stopped"
    wait = 0.0
    for attempt in range(attempts):
        if stopping.wait(wait):
            return failure
        wait = pause * 2**attempt
        try:
            reply = post(server, question.messages, judge, timeout)
        except HTTPError as error:
            failure = f"HTTP {error.code} {error.reason!r}"
            if error.code in FATAL_STATUSES:
                stopping.set()
            if error.code == BAD_REQUEST:
                return failure
            wait = max(wait, read_retry_after(error))
            continue
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            failure = f"{type(error).__name__}: {error}"
            continue
        text = read_text(reply)
        scores = read_scores(text)
        row = {
            "problem": question.problem,
            "order": question.order,
            "digest": question.digest,
            "scores": scores,
            "text": text or reply,
            "usage": read_usage(reply),
        }
        replies.add(row)
        if scores:
            return ""
        failure = f"no two scores in the first line, but {text[:40]!r}"
    return failure


def ask_all(questions, server, replies):
    """Ask the judge all questions, `concurrency` at a time. Returns a Counter of failures."""
    failures = Counter()
    stopping = threading.Event()
    with ThreadPoolExecutor(concurrency) as pool:
        jobs = [pool.submit(ask_judge, q, server, replies, stopping) for q in questions]
        try:
            for job in tqdm(jobs, desc=judge, unit="reply"):
                failure = job.result()
                if failure:
                    failures[failure] += 1
        except KeyboardInterrupt:
            failures["stopped"] += 1
        finally:
            stopping.set()  # threads that wait for their next try end at once
    return failures


# ---- verdicts ----


def make_verdicts(answers, scores):
    """The answers that were judged in both orders, with the mean scores of the two orders."""
    verdicts = []
    for i, answer in enumerate(answers):
        if (i, 0) not in scores or (i, 1) not in scores:
            continue
        red_first, blue_first = scores[i, 0]
        red_second, blue_second = reversed(scores[i, 1])
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


def summarize(verdicts):
    """{category: blue's results and both mean scores}, with "all" as the last category."""
    by_category = {}
    for verdict in verdicts:
        by_category.setdefault(verdict["category"], []).append(verdict)
    by_category["all"] = verdicts
    results = {}
    for category, group in by_category.items():
        counts = Counter(verdict["blue_result"] for verdict in group)
        results[category] = {
            "win": counts["win"],
            "tie": counts["tie"],
            "lose": counts["lose"],
            "red": mean_of(group, "red_score"),
            "blue": mean_of(group, "blue_score"),
            "orders agree": mean_of(group, "orders_agree"),
        }
    return results


def mean_of(verdicts, field):
    total = sum(verdict[field] for verdict in verdicts)
    return round(total / max(1, len(verdicts)), 4)


def report(verdicts, answers, replies):
    """Write the verdicts and the summary, and print them and what was paid."""
    results = summarize(verdicts)
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
        rows.append((category, *result.values()))
    print(f"\nblue ({blue}) against red ({red}):")
    print(format_table(rows))
    tokens_read = replies.count_tokens("prompt_tokens")
    tokens_written = replies.count_tokens("completion_tokens")
    print(
        f"paid in all for {tokens_read:,} tokens and {tokens_written:,} of replies: "
        f"{format_price(tokens_read, tokens_written)}; "
        f"{out_dir}: answers, replies, verdicts .jsonl, summary.json"
    )


# ---- run ----
server = read_server()
check_limits(attempts, concurrency, timeout, pause)
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
close(leave=not world.main)  # one process does the rest

replies = Replies(f"{out_dir}/replies.jsonl")
questions = make_questions(answers, server.host, judge)
scores = replies.find_scores(questions)
missing = [q for q in questions if (q.problem, q.order) not in scores]
print_estimate(questions, missing, server.host)
if missing and not yes:
    confirm(out_dir)
failures = ask_all(missing, server, replies)

verdicts = make_verdicts(answers, replies.find_scores(questions))
report(verdicts, answers, replies)
if failures:
    stop(
        f"{len(answers) - len(verdicts)} problems are not judged ({server.host}: "
        f"{', '.join(failures)}); what was paid for is kept: the same command asks for the rest"
    )
