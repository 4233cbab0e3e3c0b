"""Asks a language model at an OpenAI-compatible address to judge, and keeps every reply.

A reply is written to the disk before it counts: who asks the same again pays only for the replies
that are missing. A reply that cannot be read is asked for once more, with a reminder of the form.
The price that is printed before is the most that is spent: asking stops there."""

import hashlib
import json
import math
import os
import re
import sys
import threading
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from tqdm import tqdm

from nanosafe.errors import stop
from nanosafe.storage import format_json, read_jsonl, write_jsonl

OPENAI = "https://api.openai.com/v1"
CHARACTERS_PER_TOKEN = 4  # an estimate; the most that is spent counts a token for every byte
TOKENS_PER_REPLY = 300  # the server may write no more
TOKENS_AROUND = 64  # the most that a server puts around the messages of a request
LONGEST_WAIT = 600  # seconds that a server may ask us to wait
# After these statuses every other request would fail too: a redirect, a wrong key or address.
FATAL_STATUSES = (301, 302, 307, 308, 401, 403, 404)
# Here a gateway has lost patience, and the judge behind it may have written a reply.
GATEWAY_STATUSES = (408, 502, 504)
BAD_REQUEST = 400  # the server refuses this request, and would refuse it again

THOUGHTS = re.compile(r"<think>.*?</think>", re.S)  # of a model that thinks aloud before it replies
REFUSAL = re.compile(
    r"\W*(?:(?:i'm|i am|we're|we are)\s+(?:\w+\s+)?(?:sorry|unable|not able)|sorry\b|i apologi[sz]e"
    r"|(?:i|we)\s+(?:can't|cannot|can not|won't|will not|must decline|decline)|as an ai\b)",
    re.I,
)


# ---- the judge, and questions to it ----


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


class Judge(NamedTuple):
    """A language model at a server, how it is asked, and what it costs."""

    name: str  # at the server
    server: Server
    concurrency: int  # requests that wait for a reply at the same time
    attempts: int  # tries for each reply, where the server fails
    pause: float  # seconds before the second try; doubled before each further one
    timeout: float  # seconds to wait for a reply
    input_price: float  # dollars for a million tokens that the judge reads
    output_price: float  # dollars for a million tokens that it writes

    def price(self, tokens_read, tokens_written):
        """The dollars for tokens that the judge reads and writes."""
        return (tokens_read * self.input_price + tokens_written * self.output_price) / 1e6

    def most_for_request(self, question):
        """The dollars that a request costs at most: no token is shorter than a byte."""
        size = len(question.form.reminder.encode())
        for message in question.messages:
            size += len(message["content"].encode(errors="surrogatepass"))
        return self.price(size + TOKENS_AROUND, TOKENS_PER_REPLY)


class Form(NamedTuple):
    """The form in which a judge is asked to reply."""

    read: object  # a function: a reply's text -> what it says, None where it cannot be read
    reminder: str  # the end of a question whose first reply could not be read


class Question(NamedTuple):
    """What a judge is asked once."""

    names: dict  # what it is about, for the reader of replies.jsonl
    messages: list  # what is sent to the judge
    digest: str  # of the host, the judge and the messages: what a reply is valid for
    form: Form

    def key(self):
        """What the replies to this question have in common."""
        return (*self.names.values(), self.digest)


def make_question(judge, names, system, user, form):
    """The Question of a system's and a user's text."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    content = json.dumps([judge.server.host, judge.name, messages]).encode()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return Question(names, messages, digest, form)


# ---- what it costs ----


class Budget:
    """The dollars that may be spent. Several threads take from it."""

    def __init__(self, dollars):
        self.left = dollars
        self.lock = threading.Lock()

    def take(self, dollars):
        """Take what a request costs at most; returns False, and takes nothing, if that is gone."""
        with self.lock:
            if dollars > self.left + 1e-9:  # sums of floats are not exact
                return False
            self.left -= dollars
            return True

    def give_back(self, dollars):
        """Give back what a request did not cost; a negative number if it cost more."""
        with self.lock:
            self.left += dollars


def compute_budget(missing, judge, replies):
    """The dollars that all missing replies cost at most, when each must be asked for once more."""
    dollars = 0.0
    for question in missing:
        is_first = replies.find_outcome(question).status == "missing"
        dollars += judge.most_for_request(question) * (2 if is_first else 1)
    return dollars


def print_estimate(subject, present, missing, judge, budget):
    """Print how many replies are missing, about what they will cost, and what they may cost.

    subject  what is judged, in words, and how much of it; present: how many replies are here"""
    characters = 0
    for question in missing:
        for message in question.messages:
            characters += len(message["content"])
    tokens_read = characters // CHARACTERS_PER_TOKEN
    tokens_written = TOKENS_PER_REPLY * len(missing)
    most = math.ceil(100 * budget.left) / 100
    print(
        f"{subject}; {present} replies are here, "
        f"{len(missing)} to ask {judge.name} at {judge.server.host} for: about {tokens_read:,} "
        f"tokens and {tokens_written:,} of replies, "
        f"${judge.price(tokens_read, tokens_written):.2f}; at most ${most:.2f}, if each is asked "
        "for twice",
        flush=True,
    )


def confirm(out_dir):
    """Go on only if somebody at the terminal agrees to spend the money."""
    if not sys.stdin.isatty():
        stop("nobody is here to say yes: --yes=True spends the money")
    print("go on? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        stop(f"nothing was sent; the answers are in {out_dir}/answers.jsonl")


def pay(usage, most, judge, budget):
    """Give back what a reply did not cost of the dollars that were taken for it."""
    if "prompt_tokens" in usage and "completion_tokens" in usage:
        budget.give_back(most - judge.price(usage["prompt_tokens"], usage["completion_tokens"]))


def describe_payment(judge, replies):
    """A few words on what all replies cost that are kept."""
    tokens_read = replies.count_tokens("prompt_tokens")
    tokens_written = replies.count_tokens("completion_tokens")
    uncounted = sum("completion_tokens" not in row["usage"] for row in replies.rows)
    without = f" ({uncounted} replies came without a count)" if uncounted else ""
    return (
        f"paid in all for {tokens_read:,} tokens and {tokens_written:,} of replies{without}: "
        f"${judge.price(tokens_read, tokens_written):.2f}"
    )


# ---- replies ----


class Outcome(NamedTuple):
    """What the replies to a question amount to.

    status  "missing": there is none; "unclear": it cannot be read, and is to be asked for once
            more; "unread": that one cannot be read, either; "refused": the judge does not judge;
            "read": there is a verdict"""

    status: str
    scores: object = None  # what the question's form reads in the reply
    text: object = ""  # a reply's text; the whole reply, where it has no text


class Replies:
    """The replies that were paid for, in replies.jsonl; several threads add to them.

    fields  the names of a question's names, which its rows have as well"""

    def __init__(self, path, fields):
        self.path = path
        self.fields = fields
        self.lock = threading.Lock()
        self.rows = read_jsonl(path)
        self.by_question = {}  # key of a question -> rows
        for row in self.rows:
            self.index(row)
        write_jsonl(self.rows, path)  # a last line that broke off is removed: more lines follow

    def index(self, row):
        key = tuple(row[field] for field in (*self.fields, "digest"))
        self.by_question.setdefault(key, []).append(row)

    def add(self, row):
        """Add a reply, and write it to the disk before it counts."""
        with self.lock:
            with open(self.path, "a", encoding="utf-8") as f:
                print(format_json(row), file=f, flush=True)
                os.fsync(f.fileno())
            self.rows.append(row)
            self.index(row)

    def find_outcome(self, question):
        """The Outcome of a question, by all replies to it until now."""
        outcome = Outcome("missing")
        for row in self.by_question.get(question.key(), ()):
            scores = row["scores"]
            if scores is None and isinstance(row["text"], str):
                # An older version may have read fewer spellings.
                scores = question.form.read(row["text"])
            if scores is not None:
                return Outcome("read", scores, row["text"])
            if row.get("refused"):
                outcome = Outcome("refused", text=row["text"])
            elif row.get("reminded"):
                outcome = Outcome("unread", text=row["text"])
            elif outcome.status == "missing":
                outcome = Outcome("unclear", text=row["text"])
        return outcome

    def is_missing(self, question):
        return self.find_outcome(question).status in ("missing", "unclear")

    def count_tokens(self, kind):
        return sum(row["usage"].get(kind, 0) for row in self.rows)


def make_row(question, reply, reminded):
    """The row of replies.jsonl about a reply."""
    text = read_text(reply)
    scores = question.form.read(text)
    return {
        **question.names,
        "digest": question.digest,
        "scores": scores,
        "refused": scores is None and is_refusal(reply, text),
        "reminded": reminded,
        "text": text or reply,
        "usage": read_usage(reply),
    }


def read_text(reply):
    """The text of a reply, which some servers send in pieces; "" where there is none."""
    try:
        content = reply["choices"][0]["message"]["content"]
        if isinstance(content, str):
            return content
        return "".join(piece["text"] for piece in content)
    except (LookupError, TypeError):
        return ""


def is_refusal(reply, text):
    """Whether a reply that cannot be read says that the judge does not judge."""
    try:
        choice = reply["choices"][0]
        if choice.get("finish_reason") == "content_filter" or choice["message"].get("refusal"):
            return True
    except (LookupError, TypeError, AttributeError):
        pass
    return bool(REFUSAL.match(text.replace("\u2019", "'")))


def read_usage(reply):
    """{kind of token: count}, as far as the server reports it."""
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        return {}
    return {kind: count for kind, count in usage.items() if type(count) is int and count >= 0}


# ---- asking ----


class RefuseRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, because the key must not be sent to another address."""

    def redirect_request(self, *request):
        return None


OPENER = urllib.request.build_opener(RefuseRedirects)


def post(judge, messages):
    """Send one request; the reply is a JSON object."""
    server = judge.server
    fields = {
        "model": judge.name,
        "messages": messages,
        "temperature": 0,
        "max_tokens": TOKENS_PER_REPLY,
    }
    body = json.dumps(fields).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"}
    request = urllib.request.Request(server.address + "/chat/completions", body, headers)
    with OPENER.open(request, timeout=judge.timeout) as response:
        reply = json.load(response)
    if not isinstance(reply, dict):
        raise ValueError("the reply is not a JSON object")
    return reply


def read_retry_after(error):
    """The seconds that a server asks us to wait before the next try; 0 if it does not say."""
    value = error.headers.get("Retry-After", "")
    if not re.fullmatch(r"[0-9]{1,9}", value):
        return 0
    return min(float(value), LONGEST_WAIT)


def add_reminder(question):
    """The messages of a question with the form of the reply at their end."""
    last = question.messages[-1]
    content = last["content"] + question.form.reminder
    return [*question.messages[:-1], {**last, "content": content}]


def ask_question(question, judge, replies, budget, stopping):
    """Ask until there is a reply, and once more with a reminder if it cannot be read.

    replies   Replies, to which each reply is added, also one that cannot be read
    budget    a Budget, which each request is paid from
    stopping  a threading.Event: once it is set, no thread asks again

    Returns why a reply is missing, "" if none is."""
    failure = ""
    while failure == "":
        status = replies.find_outcome(question).status
        if status not in ("missing", "unclear"):
            break
        failure = request_reply(question, status == "unclear", judge, replies, budget, stopping)
    return failure


def request_reply(question, reminded, judge, replies, budget, stopping):
    """Request one reply, `judge.attempts` times at most, and add it to the replies.

    reminded  whether the question is asked with a reminder of the form

    Returns why there is no reply, "" if there is one."""
    messages = add_reminder(question) if reminded else question.messages
    most = judge.most_for_request(question)
    failure = "stopped"
    wait = 0.0
    for attempt in range(judge.attempts):
        if stopping.wait(wait):
            return failure
        wait = judge.pause * 2**attempt
        if not budget.take(most):
            stopping.set()
            return "the price that was agreed to is spent"
        try:
            reply = post(judge, messages)
        except HTTPError as error:
            if error.code not in GATEWAY_STATUSES:
                budget.give_back(most)
            failure = f"HTTP {error.code} {error.reason!r}"
            if error.code in FATAL_STATUSES:
                stopping.set()
            if error.code == BAD_REQUEST:
                return failure
            wait = max(wait, read_retry_after(error))
            continue
        except URLError as error:  # nothing was sent
            budget.give_back(most)
            failure = f"{type(error).__name__}: {error}"
            continue
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            failure = f"{type(error).__name__}: {error}"
            continue
        row = make_row(question, reply, reminded)
        pay(row["usage"], most, judge, budget)
        replies.add(row)
        return ""
    return failure


def ask_all(questions, judge, replies, budget):
    """Ask all questions, `judge.concurrency` at a time. Returns a Counter of failures."""
    failures = Counter()
    stopping = threading.Event()
    with ThreadPoolExecutor(judge.concurrency) as pool:
        jobs = []
        for question in questions:
            jobs.append(pool.submit(ask_question, question, judge, replies, budget, stopping))
        try:
            for job in tqdm(jobs, desc=judge.name, unit="reply"):
                failure = job.result()
                if failure:
                    failures[failure] += 1
        except KeyboardInterrupt:
            failures["stopped"] += 1
        finally:
            stopping.set()  # threads that wait for their next try end at once
    return failures


def ask_missing(questions, judge, replies, subject, yes, out_dir):
    """Say the price of the replies that are missing, and ask for them if somebody agrees.

    subject  what is judged, in words, and how much of it
    yes      whether to spend the money without asking at the terminal

    Returns a Counter of failures."""
    missing = [question for question in questions if replies.is_missing(question)]
    budget = Budget(compute_budget(missing, judge, replies))
    print_estimate(subject, len(questions) - len(missing), missing, judge, budget)
    if missing and not yes:
        confirm(out_dir)
    return ask_all(missing, judge, replies, budget)
