"""Talk to a checkpoint, sample from it, have its answers scored, or make data of them.

$ python sample.py --model=out/demo/ppo_lag/model                      # a chat; /help in it
$ python sample.py --red=out/demo/ppo/model --blue=out/demo/ppo_lag/model   # with two at once
$ python sample.py --model=... --prompt="How do I rob the bank?"       # one prompt
$ python sample.py --model=... --prompts=toy/prompts/test:20/-1        # a file or a dataset
$ python sample.py --model=... --prompt="..." --best_of=8 --reward_model=out/demo/reward/model
$ python sample.py --prompts=toy/prompts --num_samples=8 --reward_model=R --write=sft --out=F"""

import json
from collections import Counter
from functools import partial
from typing import NamedTuple

from configurator import configure
from nanosafe.chat import Screen, catch_interrupt, chat
from nanosafe.data.examples import Prompt, list_texts, make_input_fields, make_turns, read_prompt
from nanosafe.data.reader import load_rows
from nanosafe.errors import choose, one_line_errors, stop
from nanosafe.inference import Policy, choose_dtype, load_scorer
from nanosafe.parallel import close, init
from nanosafe.ranges import check_ranges
from nanosafe.rollout import generate
from nanosafe.storage import write_jsonl

# models
model = "out/demo/ppo_lag/model"  # the policy's folder
red = ""  # or two policies, both asked the same: this one's folder
blue = ""  # and the other's
reward_model = ""  # scores each answer's helpfulness; or FILE.py:NAME, a function; empty: none
cost_model = ""  # the same for harm, above 0 is unsafe; empty: none
# what to ask
prompt = ""  # what to ask; empty: prompts, or the keyboard
prompts = ""  # a file with a prompt per line, a .jsonl, or a dataset: NAME[/SPLIT][:PROPORTION]
system = ""  # what the system's turn says; empty: none
template = "auto"  # auto (the model's own) | safe_rlhf | chatml | llama3 | FILE | none: bare text
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
keep_cut = False  # keep answers that max_new_tokens cut, too: trainers will put an EOS behind them
# machine
max_tokens = 8192  # packed tokens per forward when many answers are scored
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto | bfloat16 | float32; auto is that of the files on a GPU, float32 on a CPU
config = configure(globals())
check_ranges(config)

# The functions below read knobs where they stand; what is made of knobs, they take as arguments.


# ---- setup ----


def check_knobs():
    choose("write", write, ("answers", "sft", "pairs"))
    if best_of > 1 and (out or not reward_model):
        stop("best_of needs --reward_model=FOLDER to choose by, and is not for out: write=sft is")
    if out and not (prompt or prompts):
        stop("out needs --prompts to answer")
    if write == "pairs" and num_samples < 2:
        stop("write='pairs' needs two answers or more: --num_samples=2")
    if out and write != "answers" and not reward_model:
        stop(f"write={write!r} needs --reward_model=FOLDER to choose by")
    if (red or blue) and (out or not (red and blue)):
        stop("red and blue are two folders, to talk to: --red=FOLDER --blue=FOLDER, without out")


def read_questions():
    """What the knobs ask: a list of Prompts; [] for a chat."""
    texts = [prompt] if prompt else []
    questions = []
    if prompts.endswith(".txt"):
        with one_line_errors(prompts), open(prompts, encoding="utf-8-sig") as f:
            lines = f.readlines()
        texts += [line.rstrip("\n") for line in lines if line.strip()]
    elif prompts:
        for row in load_rows(prompts):
            try:
                questions.append(read_prompt(row.record))
            except ValueError as error:
                print(f"{row.file}:{row.line} is left out: {error}")
    questions = [Prompt(make_turns([text])) for text in texts] + questions
    if system:
        questions = [add_system_turn(question) for question in questions]
    if prompts and not questions:
        stop(f"prompts={prompts!r} has no prompt that can be asked")
    return questions


def add_system_turn(question):
    """A Prompt with the system's turn of the knobs, unless it has one of its own."""
    if question.turns[0]["role"] == "system":
        return question
    return question._replace(turns=[{"role": "system", "content": system}, *question.turns])


def parse_stop_texts():
    return [text.replace("\\n", "\n") for text in stop_at.split("||") if text]


def load_policies(world, bases):
    """{colour: Policy}; a single policy has no colour. bases: as of checkpoint.load()."""
    folders = {"red": red, "blue": blue} if red else {"": model}
    sampling = {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling["template"] = template
    sampling["bases"] = bases
    policies = {}
    for colour, folder in folders.items():
        policies[colour] = Policy(folder, world, max_new_tokens, "", dtype, **sampling)
    return policies


def load_scorers(world, bases):
    """{"reward": scorer, "cost": scorer}, those of them that the knobs name."""
    scorers = {}
    for name, folder in (("reward", reward_model), ("cost", cost_model)):
        if folder:
            scorer_dtype = choose_dtype(dtype, world)
            scorers[name] = load_scorer(folder, world, scorer_dtype, max_tokens, name, bases)
    return scorers


# ---- answers ----


def score(scorers, prompts, questions, answers, tok):
    """{"reward": scores, "cost": scores} of answers (ids) to prompts, whose ids are questions."""
    scores = {}
    for name, scorer in scorers.items():
        scores[name] = scorer.score_answers(prompts, questions, answers, tok)
    return scores


def cut_at_stop_text(ids, tok, stop_texts):
    """An answer's ids up to the first stop text, ended by EOS; the same list if it has none."""
    if not stop_texts:
        return ids
    text = tok.decode(ids)
    ends = [text.find(stop_text) for stop_text in stop_texts if stop_text in text]
    if not ends:
        return ids
    return tok.encode_suffix(text[: min(ends)]) + [tok.end_of_turn_id]


def was_cut(ids, tok):
    """Whether an answer was cut at max_new_tokens: it does not end with EOS."""
    return ids[-1] not in tok.eos_ids


def ends_within(text, stop_texts):
    """Whether a text that still grows ends inside a character, or perhaps inside a stop text."""
    if text.endswith("\ufffd"):
        return True
    for stop_text in stop_texts:
        for length in range(1, len(stop_text)):
            if text.endswith(stop_text[:length]):
                return True
    return False


def watch_tokens(tok, stop_texts, screen=None, interrupts=()):
    """A function on_token(i, token) for generate(), which is called for each new token.

    It shows the answer on the screen, if there is one, and returns whether the answer ends here:
    at a stop text, or as soon as `interrupts` holds something."""
    answers = {}  # i -> the ids of answer i until now

    def on_token(i, token):
        ids = answers.setdefault(i, [])
        ids.append(token)
        kept = cut_at_stop_text(ids, tok, stop_texts)
        if screen:
            text = tok.decode(kept)
            if not ends_within(text, stop_texts):
                screen.show(text, len(ids))
        has_stop_text = kept is not ids
        return bool(interrupts) or has_stop_text

    return on_token


def fit_question(policy, prompt):
    """A Prompt's ids, without its oldest turns where the model could not read them all."""
    room = max(0, policy.model.config.max_position_embeddings - max_new_tokens)
    question = policy.question(prompt, prefix)
    turns = list(prompt.turns)
    first = 1 if turns[0]["role"] == "system" else 0
    while len(question) > room and len(turns) > first + 2:
        del turns[first : first + 2]
        print(f"[the oldest turn is left out: {room} tokens of questions fit]", flush=True)
        question = policy.question(prompt._replace(turns=turns), prefix)
    policy.check_length([question])
    return question


def answer(policy, colour, scorers, stop_texts, asked, attempt):
    """Print a policy's answer to a Prompt, with its scores, and return its text.

    A single answer is shown while it grows; of several (best_of), only the best one is shown."""
    tok = policy.tok
    question = fit_question(policy, asked)
    questions = [question] * best_of
    label = f"{colour} ({policy.name}): " if colour else ""
    screen = Screen(colour, label, live=best_of == 1)
    with catch_interrupt() as interrupts:
        answers = generate(
            policy.model,
            questions,
            max_new_tokens,
            uids=[(len(list_texts(asked.turns)), attempt, i) for i in range(best_of)],
            on_token=watch_tokens(tok, stop_texts, screen if best_of == 1 else None, interrupts),
            **policy.sampling,
        )
    answers = [cut_at_stop_text(ids, tok, stop_texts) for ids in answers]
    scores = score(scorers, [asked] * best_of, questions, answers, tok)
    best = scores["reward"].index(max(scores["reward"])) if best_of > 1 else 0
    ids = answers[best]
    text = tok.decode(ids)
    screen.show(text, len(ids))
    note = ""
    if interrupts:
        note = "stopped"
    elif was_cut(ids, tok):
        note = f"cut at {max_new_tokens} tokens"
    screen.end(note, "  ".join(f"{name} {values[best]:.2f}" for name, values in scores.items()))
    if interrupts and (prompt or prompts):
        raise SystemExit(130)  # a shell's number for Ctrl-C
    return text


# ---- data ----


class Samples(NamedTuple):
    """The answers to one prompt, with their scores by the models that there are.

    Without keep_cut, the answers that were cut are not among them."""

    prompt: Prompt
    texts: list
    rewards: list = None
    costs: list = None


def sample_answers(policy, scorers, stop_texts, questions, left_out):
    """num_samples answers to every question: a list of Samples.

    left_out  a Counter of the answers that make no data: {why: how many}"""
    tok = policy.tok
    asked = []  # of each answer
    encoded = []
    uids = []
    for i, question in enumerate(questions):
        for k in range(num_samples):
            asked.append(question)
            encoded.append(policy.question(question, prefix))
            uids.append((i, k))
    options = {"on_token": watch_tokens(tok, stop_texts)} if stop_texts else {}
    answers = policy.answers(encoded, uids, **options)
    answers = [cut_at_stop_text(ids, tok, stop_texts) for ids in answers]
    scores = score(scorers, asked, encoded, answers, tok)
    texts = [tok.decode(ids) for ids in answers]
    samples = []
    for i, question in enumerate(questions):
        kept = []
        for k in range(i * num_samples, (i + 1) * num_samples):
            if keep_cut or not was_cut(answers[k], tok):
                kept.append(k)
        left_out["cut at max_new_tokens"] += num_samples - len(kept)
        kept_scores = {name: [values[k] for k in kept] for name, values in scores.items()}
        kept_texts = [texts[k] for k in kept]
        samples.append(
            Samples(question, kept_texts, kept_scores.get("reward"), kept_scores.get("cost"))
        )
    return samples


def make_rows(samples, left_out):
    """The rows that the answers to one prompt make, in the form that `write` names."""
    prompt_fields = make_input_fields(samples.prompt)
    if write == "answers":
        rows = keep_all(samples, left_out)
    elif write == "sft":
        rows = keep_best(samples, left_out)
    else:
        rows = pair_best_and_worst(samples, left_out)
    return [{**prompt_fields, **row} for row in rows]


def keep_all(samples, left_out):
    """All answers that are not empty, with their scores; no row where there is none."""
    spoken = [i for i, text in enumerate(samples.texts) if text.strip()]
    left_out["empty"] += len(samples.texts) - len(spoken)
    if not spoken:
        return []
    row = {"answers": [samples.texts[i] for i in spoken]}
    if samples.rewards:
        row["scores"] = [samples.rewards[i] for i in spoken]
    if samples.costs:
        row["costs"] = [samples.costs[i] for i in spoken]
    return [row]


def order_by_reward(samples):
    """Indices of the answers, the highest reward first."""
    return sorted(range(len(samples.texts)), key=lambda i: -samples.rewards[i])


def keep_best(samples, left_out):
    """The `keep` best of the different answers; with costs, only safe ones."""
    texts = []
    for i in order_by_reward(samples):
        text = samples.texts[i]
        if not text.strip():
            left_out["empty"] += 1
        elif samples.costs and samples.costs[i] > 0:
            left_out["unsafe"] += 1
        elif text not in texts:
            texts.append(text)
    return [{"answer": text} for text in texts[:keep]]


def pair_best_and_worst(samples, left_out):
    """A preference pair in Safe-RLHF's fields; no row where the two rewards are equal."""
    if not samples.texts:
        return []
    order = order_by_reward(samples)
    best, worst = order[0], order[-1]
    answer, other_answer = samples.texts[best], samples.texts[worst]
    if not answer.strip() or not other_answer.strip():
        left_out["in a pair with an empty one"] += len(order)
        return []
    if samples.rewards[best] == samples.rewards[worst]:
        left_out["of one reward, without a pair"] += len(order)
        return []
    row = {"answer": answer, "other_answer": other_answer, "better": True}
    if samples.costs:
        row["safer"] = samples.costs[best] < samples.costs[worst]
        row["is_safe"] = samples.costs[best] <= 0
        row["is_other_safe"] = samples.costs[worst] <= 0
    return [row]


def write_rows(samples, left_out):
    rows = []
    rewards = []
    costs = []
    for of_prompt in samples:
        rows += make_rows(of_prompt, left_out)
        rewards += of_prompt.rewards or []
        costs += of_prompt.costs or []
    write_jsonl(rows, out)
    means = ""
    for name, scores in (("reward", rewards), ("cost", costs)):
        if scores:
            means += f"; mean {name} {sum(scores) / len(scores):.3f}"
    dropped = [f"{count} {why}" for why, count in left_out.items() if count]
    reasons = f"; answers left out: {', '.join(dropped)}" if dropped else ""
    if left_out["cut at max_new_tokens"]:
        reasons += f" (max_new_tokens={max_new_tokens}: raise it, or keep them with keep_cut)"
    asked = f"{len(samples)} prompts x {num_samples} answers"
    print(f"{out}: {len(rows)} rows of {asked}{reasons}{means}")


# ---- run ----
check_knobs()
world = init(device, config)
bases = {}  # the models in memory, by folder: adapters of one base share it
policies = load_policies(world, bases)
scorers = load_scorers(world, bases)
stop_texts = parse_stop_texts()
questions = read_questions()
speakers = []  # functions of a Prompt and the number of the attempt
for colour, policy in policies.items():
    speakers.append(partial(answer, policy, colour, scorers, stop_texts))

if out:
    left_out = Counter()  # why answers make no data -> how many
    samples = sample_answers(policies[""], scorers, stop_texts, questions, left_out)
    if world.main:
        write_rows(samples, left_out)
    close()
elif questions:
    attempts = Counter()  # question -> answers until now; one that is asked twice goes on counting
    for question in questions:
        print(f"\n> {question.turns[-1]['content']}", flush=True)
        key = json.dumps(question)
        for _ in range(num_samples):
            for speaker in speakers:
                speaker(question, attempts[key])
            attempts[key] += 1
else:
    for policy in policies.values():
        print(f"{policy.name}: {policy.describe_template()}", flush=True)
    chat(speakers, system)
