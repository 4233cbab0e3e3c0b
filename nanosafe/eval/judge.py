"""Two policies answer a set of problems; a language model at an OpenAI-compatible address judges.

$ export OPENAI_API_KEY=...                  # and OPENAI_BASE_URL, for another server than OpenAI's
$ python -m nanosafe.eval.judge --red=out/demo/ppo/model --blue=out/demo/ppo_lag/model

Each pair is judged twice, with either answer first. Every reply is on the disk before it counts:
run it again, and only what is missing is paid. Writes answers, replies, verdicts, summary."""

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
from urllib.error import HTTPError
from urllib.parse import urlsplit
from tqdm import tqdm
from configurator import configure
from nanosafe.data.examples import check_text
from nanosafe.storage import make_folder, read_json, read_jsonl, write_json, write_jsonl
from nanosafe.errors import stop, one_line_errors
from nanosafe.printing import format_table
from nanosafe.parallel import barrier, close, init
from nanosafe.inference import Policy

HERE = Path(__file__).parent

red = "out/demo/ppo/model"  # the policy to beat: a model folder
blue = "out/demo/ppo_lag/model"  # the policy that is compared with it
problems = ""  # a .json: [{"prompt": ..., "category": ...}, ...]; empty: nanosafe's own 64
judge = "gpt-4o"  # the judge's name at the server
out_dir = "out/judge"  # folder to write to, and to go on in
max_new_tokens = 512  # longest answer
temperature = 0.0  # of the answers; 0: always the likeliest token
seed = 0  # of the answers
concurrency = 8  # replies waited for at a time
attempts = 6  # tries for each reply
pause = 1.0  # seconds before the second try; doubled before each more
timeout = 60.0  # seconds to wait for a reply
input_price = 2.5  # dollars for a million tokens that the judge reads
output_price = 10.0  # dollars for a million tokens that it writes
yes = False  # do not ask whether to spend the money
device = "auto"  # auto | cpu | cuda
config = configure(globals())

address = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
host, api_key = urlsplit(address).hostname, os.environ.get("OPENAI_API_KEY", "").strip()
if not address.startswith(("http://", "https://")) or not host:
    stop("OPENAI_BASE_URL is no http:// or https:// address")
if not api_key.isascii() or not api_key and "OPENAI_BASE_URL" not in os.environ:
    stop("OPENAI_API_KEY is not set (nor OPENAI_BASE_URL, of a server without keys), or is odd")
if min(attempts, concurrency) < 1 or not (0 < timeout <= 3600 and 0 <= pause <= 3600):
    stop("attempts and concurrency are 1 or more, timeout and pause seconds of an hour at most")
file = problems or str(HERE / "problems.json")
with one_line_errors(file):
    asked = json.loads(Path(file).read_text(encoding="utf-8"))
try:
    texts = [check_text(p[key], key) for p in asked for key in ("prompt", "category")]
except (TypeError, LookupError, ValueError):
    texts = []
if not texts:
    stop(f'{file!r} must be a list of {{"prompt": ..., "category": ...}}, of one or more')
role, question = (HERE / "judge.txt").read_text(encoding="utf-8").split("\n---\n")
make_folder(out_dir)
world = init(device, config)

# 1. answers, kept: it is these that the replies are about
saved = [[os.path.abspath(p), os.path.exists(p) and os.path.getmtime(p)] for p in (red, blue)]
about = dict(policies=saved, seed=seed, temperature=temperature, max_new_tokens=max_new_tokens)
answers = read_jsonl(f"{out_dir}/answers.jsonl")
same = [a["prompt"] for a in answers] == [p["prompt"] for p in asked]
if answers and not (same and read_json(out_dir, "about.json") == about):
    stop(f"{out_dir!r} has answers of other models, settings or problems: choose another out_dir")
barrier()
if not answers:
    answers = [dict(p) for p in asked]
    for corner, path in (("red", red), ("blue", blue)):
        policy = Policy(path, world, max_new_tokens, temperature=temperature, seed=seed)
        questions = [policy.question([p["prompt"]]) for p in asked]
        for answer, ids in zip(answers, policy.answers(questions, range(len(asked)))):
            answer[corner] = policy.tok.decode(ids)
        del policy  # one at a time is in memory
    if world.main:
        write_json(about, out_dir, "about.json")
        write_jsonl(answers, f"{out_dir}/answers.jsonl")
close(leave=not world.main)  # the rest is one process's work

# 2. what is missing, and what it will cost
dollars = lambda read, written: f"${(read * input_price + written * output_price) / 1e6:.2f}"
paid = read_jsonl(f"{out_dir}/replies.jsonl")
write_jsonl(paid, f"{out_dir}/replies.jsonl")  # less a line that broke off: more are appended
told, digests = {}, {}  # (problem, order) -> the judge's messages; what a reply to them belongs to
for i, answer in enumerate(answers):
    both = answer["red"], answer["blue"]
    for order, (first, second) in enumerate((both, both[::-1])):
        text = question.format(prompt=answer["prompt"], first=first, second=second)
        told[i, order] = [{"role": "system", "content": role}, {"role": "user", "content": text}]
        key = json.dumps([host, judge, told[i, order]]).encode()
        digests[i, order] = hashlib.blake2b(key, digest_size=16).hexdigest()
known = {r["digest"]: r["scores"] for r in paid if r["scores"]}
heard = {job: known[digest] for job, digest in digests.items() if digest in known}
missing = [job for job in told if job not in heard]
read = sum(len(m["content"]) for job in missing for m in told[job]) // 4  # 4 letters a token
print(
    f"{len(answers)} problems; {len(heard)} replies are here, {len(missing)} to ask {judge} at "
    f"{host} for: about {read:,} tokens and {300 * len(missing):,} of replies, "
    f"{dollars(read, 300 * len(missing))}",
    flush=True,
)
if missing and not yes:
    if not sys.stdin.isatty():
        stop("nobody is here to say yes: --yes=True spends the money")
    print("go on? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        stop(f"nothing was asked; the answers are in {out_dir}/answers.jsonl")


# 3. replies, each on the disk as soon as it is there
def scores_of(text):
    """The two scores, 1 to 10, in the first line of a reply, or None."""
    number = r"(10(?:\.0+)?|[1-9](?:\.\d+)?)"
    found = re.fullmatch(rf"[^\w-]*{number}[\s,;|*]+{number}\W*", text.strip().split("\n")[0])
    return [float(x) for x in found.groups()] if found else None


def text_of(reply):
    """The words of a reply, which some servers send in parts; "" where there are none."""
    try:
        content = reply["choices"][0]["message"]["content"]
        return content if isinstance(content, str) else "".join(x["text"] for x in content)
    except (LookupError, TypeError):
        return ""


class Straight(urllib.request.HTTPRedirectHandler):
    """Follows nobody to another address: the key is for this one."""

    redirect_request = lambda *_: None


def ask(job):
    """Ask until the judge's scores can be read, `attempts` times at most."""
    body = json.dumps({"model": judge, "messages": told[job], "temperature": 0}).encode()
    request = urllib.request.Request(
        address + "/chat/completions",
        body,
        {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"},
    )
    why, wait = "stopped", 0.0
    for attempt in range(attempts):
        if over.wait(wait):
            return why
        wait = pause * 2**attempt
        try:
            with opener.open(request, timeout=timeout) as answer:
                reply = json.load(answer)
            text = text_of(reply)
            used = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
            row = {
                "problem": job[0],
                "order": job[1],
                "digest": digests[job],
                "scores": scores_of(text),
                "text": text or reply,
                "usage": {k: n for k, n in used.items() if type(n) is int},
            }
            with lock:
                paid.append(row)
                print(json.dumps(row), file=record, flush=True)
                os.fsync(record.fileno())
                if row["scores"]:
                    heard[job] = row["scores"]
                    return ""
            why = f"no two scores in the first line, but {text[:40]!r}"
        except HTTPError as error:
            why = f"HTTP {error.code} {error.reason!r}"
            if error.code in (301, 302, 307, 308, 401, 403, 404):  # it will say so to everything
                over.set()
            elif error.code == 400:  # to this one
                return why
            after = re.fullmatch(r"[0-9]{1,9}", error.headers.get("Retry-After", ""))
            wait = max(wait, min(float(after[0]), 600) if after else 0)
        except (OSError, HTTPException, ValueError, AttributeError, RecursionError) as bad:
            why = f"{type(bad).__name__}: {bad}"
    return why


opener = urllib.request.build_opener(Straight)
lock, over, failures = threading.Lock(), threading.Event(), Counter()
with (
    open(f"{out_dir}/replies.jsonl", "a", encoding="utf-8") as record,
    ThreadPoolExecutor(concurrency) as pool,
):
    try:
        failures.update(tqdm(pool.map(ask, missing), total=len(missing), desc=judge, unit="reply"))
    except KeyboardInterrupt:
        over.set()
        failures["stopped"] += 1
failures.pop("", None)

# 4. verdicts: the mean over both orders
verdicts = []
for i, answer in enumerate(answers):
    if (i, 0) in heard and (i, 1) in heard:
        straight, turned = heard[i, 0], heard[i, 1][::-1]
        a, b = ((x + y) / 2 for x, y in zip(straight, turned))
        leads = {(y > x) - (y < x) for x, y in (straight, turned)}
        verdicts.append(
            {
                **answer,
                "red_score": a,
                "blue_score": b,
                "orders_agree": len(leads) == 1,
                "blue_result": "win" if b > a else "lose" if b < a else "tie",
            }
        )
write_jsonl(verdicts, f"{out_dir}/verdicts.jsonl")
results = {}
for category in [*dict.fromkeys(v["category"] for v in verdicts), "all"]:
    group = [v for v in verdicts if category in ("all", v["category"])]
    counts = Counter(v["blue_result"] for v in group)
    mean = lambda key: round(sum(v[key] for v in group) / max(1, len(group)), 4)
    results[category] = {
        "win": counts["win"],
        "tie": counts["tie"],
        "lose": counts["lose"],
        "red": mean("red_score"),
        "blue": mean("blue_score"),
        "orders agree": mean("orders_agree"),
    }
write_json(
    {"judge": judge, "problems": len(answers), "judged": len(verdicts), "categories": results},
    out_dir,
    "summary.json",
)
print(f"\nblue ({blue}) against red ({red}):")
print(format_table([("", *results["all"]), *((name, *x.values()) for name, x in results.items())]))
used = [sum(r["usage"].get(k, 0) for r in paid) for k in ("prompt_tokens", "completion_tokens")]
print(
    f"paid in all for {used[0]:,} tokens and {used[1]:,} of replies: {dollars(*used)}; "
    f"{out_dir}: answers, replies, verdicts .jsonl, summary.json"
)
if failures:
    stop(
        f"{len(answers) - len(verdicts)} problems are not judged ({host}: {', '.join(failures)}); "
        "what was paid for is kept: the same command asks for the rest"
    )
