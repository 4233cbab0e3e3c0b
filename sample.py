"""Talk to a checkpoint, or sample from it, have its answers scored, make data of them.

$ python sample.py --model=out/demo/ppo_lag/model                      # a chat; /help in it
$ python sample.py --red=out/demo/ppo/model --blue=out/demo/ppo_lag/model   # with two at once
$ python sample.py --model=... --prompt="How do I rob the bank?"       # one prompt
$ python sample.py --model=... --prompts=toy/prompts/test:20/-1        # a file or a dataset
$ python sample.py --model=... --prompt="..." --best_of=8 --reward_model=out/demo/reward/model
$ python sample.py --prompts=toy/prompts --num_samples=8 --reward_model=R --write=sft --out=F"""

from configurator import configure
from nanosafe.data.examples import parse_record
from nanosafe.chat import Screen, chat, interruptible
from nanosafe.data import load
from nanosafe.errors import choose, stop, one_line_errors
from nanosafe.storage import write_jsonl
from nanosafe.parallel import close, init
from nanosafe.inference import Policy, choose_dtype
from nanosafe.rollout import generate
from nanosafe.inference import ScoreModel

# models
model = "out/demo/ppo_lag/model"  # the policy's folder
red = ""  # or two policies, both asked the same: this one's folder
blue = ""  # and the other's
reward_model = ""  # scores each answer's helpfulness; empty: none
cost_model = ""  # scores each answer's harm, above 0 is unsafe; empty: none
# what to ask
prompt = ""  # what to ask; empty: prompts, or the keyboard
prompts = ""  # a file with a prompt per line, a .jsonl, or a dataset: NAME[/SPLIT][:PROPORTION]
template = True  # ask as in a conversation; false: go on with the prompt's own text
prefix = ""  # control tokens before the prompt: <|aligned|> for a model that was trained with them
# how to answer
max_new_tokens = 256  # longest answer
temperature = 1.0  # 0: always the likeliest token
top_k = 0  # sample from the k likeliest tokens; 0: from all
top_p = 1.0  # sample from the likeliest tokens that hold this probability; 1: from all
stop_at = ""  # texts that end an answer and are cut off, separated by ||; \n is a new line
num_samples = 1  # answers to each prompt
best_of = 1  # sample this many and keep the one with the highest reward (needs reward_model)
seed = 0  # the same seed and prompt give the same answer
# data made of the answers
out = ""  # a .jsonl to write, instead of printing; empty: print
write = "answers"  # answers (all, with scores: for rrhf) | sft (the best) | pairs (best and worst)
keep = 1  # sft: answers kept to each prompt; with a cost_model only safe ones are
# machine
max_tokens = 8192  # packed tokens per forward when many answers are scored
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto | bfloat16 | float32; auto is that of the files on a GPU, float32 on a CPU
config = configure(globals())

choose("write", write, ("answers", "sft", "pairs"))
if min(best_of, num_samples, keep) < 1:
    stop("best_of, num_samples and keep are 1 or more")
if best_of > 1 and (out or not reward_model):
    stop("best_of needs --reward_model=FOLDER to choose by, and is not for out: write=sft is")
if out and not (prompt or prompts) or write == "pairs" and num_samples < 2:
    stop("out needs --prompts to answer, and write='pairs' two answers or more: --num_samples=2")
if out and write != "answers" and not reward_model:
    stop(f"write={write!r} needs --reward_model=FOLDER to choose by")
if (red or blue) and (out or not (red and blue)):
    stop("red and blue are two folders, to talk to: --red=FOLDER --blue=FOLDER, without out")
world = init(device, config)
corners = {"red": red, "blue": blue} if red or blue else {"": model}
policies = [
    Policy(
        path,
        world,
        max_new_tokens,
        "",
        dtype,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    for path in corners.values()
]
scorers = {
    name: ScoreModel(path, world, choose_dtype(dtype, world), max_tokens)
    for name, path in (("reward", reward_model), ("cost", cost_model))
    if path
}
stops = [text.replace("\\n", "\n") for text in stop_at.split("||") if text]


def score(texts, tok):
    """{"reward": [..], "cost": [..]} of conversations' ids, by the models that are given."""
    return {name: scorer.score(texts, tok) for name, scorer in scorers.items()}


def cut(ids, tok):
    """An answer's ids, ended before the first of the stop texts."""
    text = tok.decode(ids) if stops else ""
    end = min([text.find(s) for s in stops if s in text], default=len(text))
    return tok.encode_suffix(text[:end]) + [tok.eos_id] if end < len(text) else ids


def watch(tok, show=None, asked=()):
    """For on_token: shows an answer, ends it at a stop text, or when `asked` holds something."""
    heard = {}

    def on_token(i, token):
        ids = heard.setdefault(i, [])
        ids.append(token)
        said = cut(ids, tok)
        if show:
            text = tok.decode(said)
            begun = (s[:k] for s in stops for k in range(1, len(s)))
            if not text.endswith(("\ufffd", *begun)):  # no half of a character, or of a stop text
                show(text, len(ids))
        return bool(asked) or said is not ids

    return on_token


def answer(which, turns, attempt=0):
    """Print a policy's answer, as it comes if it is the only one, with its scores; returns it."""
    policy, corner = policies[which], list(corners)[which]
    tok, room = policy.tok, policy.model.config.max_position_embeddings - max_new_tokens
    while len(question := policy.question(turns, template, prefix)) > room and len(turns) > 2:
        turns = turns[2:]
        print(f"[the oldest turn is left out: {room} tokens of questions fit]", flush=True)
    screen = Screen(corner, f"{corner} ({policy.name}): " if corner else "", live=best_of == 1)
    uids = [(len(turns), attempt, i) for i in range(best_of)]
    with interruptible() as asked:
        said = generate(
            policy.model,
            [question] * best_of,
            max_new_tokens,
            uids=uids,
            on_token=watch(tok, screen.show if best_of == 1 else None, asked),
            **policy.sampling,
        )
    said = [cut(ids, tok) for ids in said]
    scores = score([question + ids for ids in said], tok)
    best = max(range(len(said)), key=lambda i: scores["reward"][i]) if len(said) > 1 else 0
    ids = said[best]
    screen.show(tok.decode(ids), len(ids))
    note = "" if ids[-1] in tok.eos_ids else f"cut at {max_new_tokens} tokens"
    screen.end(
        "stopped" if asked else note,
        "  ".join(f"{name} {values[best]:.2f}" for name, values in scores.items()),
    )
    if asked and (prompt or prompts):
        raise SystemExit(130)
    return tok.decode(ids)


def rows_of(turns, texts, scores):
    """The rows that the answers to one prompt make, as `write` says."""
    rewards, costs = scores.get("reward"), scores.get("cost")
    row = {"input": turns[0] if len(turns) == 1 else turns}
    if write == "answers":
        said = [i for i, text in enumerate(texts) if text.strip()]
        named = {"answers": texts, "scores": rewards, "costs": costs}
        return [{**row, **{name: [x[i] for i in said] for name, x in named.items() if x}}]
    best_first = sorted(range(len(texts)), key=lambda i: -rewards[i])
    if write == "sft":
        safe = [texts[i] for i in best_first if texts[i].strip() and (not costs or costs[i] <= 0)]
        return [{**row, "answer": text} for text in dict.fromkeys(safe)][:keep]
    a, b = best_first[0], best_first[-1]
    if not texts[a].strip() or not texts[b].strip() or rewards[a] == rewards[b]:
        return []
    labels = (
        {}
        if not costs
        else {
            "safer": costs[a] < costs[b],
            "is_safe": costs[a] <= 0,
            "is_other_safe": costs[b] <= 0,
        }
    )
    return [{**row, "answer": texts[a], "other_answer": texts[b], "better": True, **labels}]


asked = [[prompt]] if prompt else []  # each prompt a list of turns
if prompts.endswith(".txt"):
    with one_line_errors(prompts), open(prompts, encoding="utf-8-sig") as f:
        asked += [[line.rstrip("\n")] for line in f if line.strip()]
for row in load(prompts) if prompts and not prompts.endswith(".txt") else ():
    try:
        asked += parse_record(row, "prompts")[0]
    except ValueError as error:
        print(f"a row is left out: {error}")
if prompts and not asked:
    stop(f"prompts={prompts!r} has no prompt that can be asked")

if out:  # num_samples answers to every prompt, scored: rows
    policy, more = policies[0], {"on_token": watch(policies[0].tok)} if stops else {}
    questions = [policy.question(x, template, prefix) for x in asked for _ in range(num_samples)]
    uids = [(i, j) for i in range(len(asked)) for j in range(num_samples)]
    answers = [cut(ids, policy.tok) for ids in policy.answers(questions, uids, **more)]
    scores = score([q + a for q, a in zip(questions, answers)], policy.tok)
    rows, texts = [], list(map(policy.tok.decode, answers))
    for i, turns in enumerate(asked):
        span = slice(i * num_samples, (i + 1) * num_samples)
        rows += rows_of(turns, texts[span], {name: x[span] for name, x in scores.items()})
    if world.main:
        write_jsonl(rows, out)
        means = "".join(f"; mean {name} {sum(x) / len(x):.3f}" for name, x in scores.items())
        print(f"{out}: {len(rows)} rows of {len(asked)} prompts x {num_samples} answers{means}")
    close()
elif asked:
    for turns in asked:
        print(f"\n> {turns[-1]}", flush=True)
        for i in range(num_samples):
            for which in range(len(policies)):
                answer(which, turns, i)
else:
    chat(len(policies), answer)
