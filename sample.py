"""
Talk to a checkpoint, or sample from it, and have its answers scored.

$ python sample.py --model=out/demo/ppo_lag/model                      # at the keyboard
$ python sample.py --model=... --prompt="How do I rob the bank?"       # one prompt
$ python sample.py --model=... --prompts=toy/prompts/test:20/-1        # a file or a dataset
$ python sample.py --model=... --prompt="..." --best_of=8 --reward_model=out/demo/reward/model
$ python sample.py --model=... --prompt="..." --reward_model=out/demo/reward/model
--cost_model=out/demo/cost/model
"""

import sys

import torch

from configurator import configure
from nanosafe import checkpoint
from nanosafe.data import conversations, encode, load, retokenize
from nanosafe.files import stop, untrusted
from nanosafe.packing import collate
from nanosafe.parallel import Place, init
from nanosafe.rollout import generate
from nanosafe.tokenizer import load as load_tokenizer

model = "out/demo/ppo_lag/model"  # the policy's folder
reward_model = ""  # scores each answer's helpfulness; empty: none
cost_model = ""  # scores each answer's harm, above 0 is unsafe; empty: none
prompt = ""  # what to ask; empty: prompts, or the keyboard
prompts = ""  # a file with a prompt per line, a .jsonl, or a dataset: NAME[/SPLIT][:PROPORTION]
max_new_tokens = 256  # longest answer
temperature = 1.0  # 0: always the likeliest token
top_k = 0  # sample from the k likeliest tokens; 0: from all
top_p = 1.0  # sample from the likeliest tokens that hold this probability; 1: from all
num_samples = 1  # answers to each prompt
best_of = 1  # sample this many and keep the one with the highest reward (needs reward_model)
seed = 0  # the same seed and prompt give the same answer
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto | bfloat16 | float32; auto is that of the files on a GPU, float32 on a CPU
configure(globals())

if best_of > 1 and not reward_model:
    stop("best_of needs --reward_model=FOLDER to choose by")
if dtype not in ("auto", "bfloat16", "float32"):
    stop(f"dtype={dtype!r}: choose auto, bfloat16 or float32")
if max_new_tokens < 1:
    stop(f"max_new_tokens={max_new_tokens}: an answer has at least one token")
world = init(device)
cpu = world.device.type == "cpu"
weights = {"auto": torch.float32 if cpu else None}.get(dtype, getattr(torch, dtype, None))
place = Place(world.device, dtype=weights)
tok = load_tokenizer(model)
policy = checkpoint.load(model, "lm", place=place, vocab_size=tok.vocab_size)
scorers = {}  # name -> model, tokenizer
for name, path in (("reward", reward_model), ("cost", cost_model)):
    if path:
        its = load_tokenizer(path)
        scorer = checkpoint.load(path, "score", place=place, vocab_size=its.vocab_size)
        scorers[name] = scorer, its


@torch.no_grad()
def score(ids):
    """{"reward": .., "cost": ..} of a conversation's ids, by the models that are given."""
    scores = {}
    for name, (scorer, scorer_tok) in scorers.items():
        same = scorer_tok.fingerprint == tok.fingerprint
        own = ids if same else retokenize(ids, tok, scorer_tok).tolist()
        batch = collate([own], [[0] * len(own)], world.device)
        scores[name] = scorer(*batch[:3])[-1].item()
    return scores


def sample(turns, sample_index, on_token=None):
    """One answer (its ids) to a conversation, the best of best_of, with its scores."""
    question = encode(turns, tok)[0]
    uids = [(len(turns), sample_index, i) for i in range(best_of)]
    answers = generate(policy, [question] * best_of, max_new_tokens, temperature=temperature,
                       top_k=top_k, top_p=top_p, eos_ids=tok.eos_ids, seed=seed, uids=uids,
                       on_token=on_token)
    scored = [(score(question + answer), answer) for answer in answers]
    return max(scored, key=lambda pair: pair[0].get("reward", 0.0))


def streamer():
    """A function for on_token that prints text as it grows, whole characters at a time."""
    ids, printed = [], ""

    def on_token(_, token):
        nonlocal printed
        ids.append(token)
        text = tok.decode(ids)
        if not text.endswith("\ufffd"):
            print(text[len(printed):], end="", flush=True)
            printed = text

    return on_token


def answer(turns, sample_index=0):
    """Print one answer with its scores; returns its text."""
    scores, ids = sample(turns, sample_index, streamer() if best_of == 1 else None)
    text = tok.decode(ids)
    line = "  ".join(f"{name} {value:.2f}" for name, value in scores.items())
    cut = "" if ids[-1] in tok.eos_ids else f"[cut at {max_new_tokens} tokens]"
    print("" if best_of == 1 else text)  # a single answer was streamed
    for note in filter(None, (cut, line)):
        print(note if note == cut else f"[{note}]", flush=True)
    return text


def read_prompts():
    """Prompts from the flag, a text file of lines, or a dataset; each a list of turns."""
    if prompt:
        return [[prompt]]
    if prompts.endswith(".txt"):
        with untrusted(prompts), open(prompts, encoding="utf-8") as f:
            return [[line.rstrip("\n")] for line in f if line.strip()]
    asked = []
    for row in load(prompts):
        try:
            asked += conversations(row, "prompts")[0]
        except ValueError as error:
            print(f"a row is left out: {error}")
    return asked


if prompt or prompts:
    for turns in read_prompts():
        print(f"\n> {turns[-1]}", flush=True)
        for i in range(num_samples):
            answer(turns, i)
    sys.exit()

print("Talk to the model; an empty line starts a new conversation, Ctrl-D ends.", flush=True)
turns = []
while True:
    try:
        said = input("\n> ")
        if not said.strip():
            turns = []
            print("(a new conversation)", flush=True)
            continue
        turns = [*turns, said, answer([*turns, said])]
    except (EOFError, KeyboardInterrupt):
        print()
        break
