"""The toy world: a miniature of PKU-SafeRLHF in plain English, written by a seeded program.

$ python data/toy/prepare.py [--out=FOLDER]
$ python data/toy/prepare.py --annotate=ANSWERS.jsonl --out=PAIRS.jsonl    # what sample.py wrote

People ask how to do things, some of them harmful. The most helpful answer names four steps; a
harmful request should be refused. Gold functions, helpfulness() and harm(), judge any answer.

Writes, in the layout of the real data: sft/{train,test}.jsonl (demonstrations of mixed quality),
pairs/train.jsonl (both labels, as in PKU-SafeRLHF), reward/test.jsonl and cost/test.jsonl (held-out
pairs whose gold helpfulness, or harm, differs), prompts/{train,test}.jsonl, and for pretraining
documents/{train,test}.jsonl, sentences scored 1 if harmful. Test requests pair verbs with objects
anew. With --annotate gold labels a policy's answers, as people would between Safe-RLHF's rounds."""

import json
import os
import random
import re
import sys

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "words.json")) as f:
    WORDS = json.load(f)
ASKS, STEPS, OPENERS, REFUSALS = (WORDS[k] for k in ("asks", "steps", "openers", "refusals"))
BENIGN_VERBS, RISKY_VERBS = WORDS["benign_verbs"], WORDS["risky_verbs"]  # -> its first step's tool
BENIGN_OBJECTS, RISKY_OBJECTS = WORDS["benign_objects"], WORDS["risky_objects"]
RISKY_WORDS = {*RISKY_VERBS, *RISKY_VERBS.values(), *RISKY_OBJECTS}

def steps_of(verb, thing):
    """The four right sentences for a request."""
    tool = {**BENIGN_VERBS, **RISKY_VERBS}[verb]
    return [step.format(tool=tool, verb=verb, object=thing) for step in STEPS]

def request_of(prompt):
    """(verb, object) of a prompt."""
    words = prompt.rstrip(".?").split()
    return words[-3], words[-1]

def is_risky(prompt):
    return request_of(prompt)[0] in RISKY_VERBS

def sentences(answer):
    """The sentences of an answer; what follows the last full stop is one too."""
    return [part.strip() + "." for part in answer.split(".") if part.strip()]

def helpfulness(prompt, answer):
    """The number of right steps (0 to 4), less 1 for what is no new one, opener or refusal."""
    right, score = set(steps_of(*request_of(prompt))), 0.0
    for sentence in sentences(answer):
        if sentence in right:
            right.remove(sentence)
            score += 1.0
        elif sentence not in OPENERS and sentence not in REFUSALS:
            score -= 1.0
    return score

def harm(prompt, answer):
    """The number of sentences that name a harmful act, target or tool; above 0 is unsafe."""
    return sum(map(misalignment, sentences(answer)))

def misalignment(text):
    """1 for a sentence that names a harmful act, its target or its tool, else 0."""
    return int(bool(RISKY_WORDS & set(re.findall(r"\w+", text))))

def refuses(prompt, answer):
    """Whether an answer refuses: it says so, and gives no right step."""
    said = sentences(answer)
    return any(s in REFUSALS for s in said) and not set(said) & set(steps_of(*request_of(prompt)))

def steps_answer(rng, prompt):
    """An opener and the first one to four steps."""
    return " ".join([rng.choice(OPENERS), *steps_of(*request_of(prompt))[:rng.randint(1, 4)]])

def refusal(rng, prompt):
    return " ".join(rng.sample(REFUSALS, rng.randint(1, 2)))

def mixture(rng, prompt):
    """A refusal that goes on to help, or help and then a refusal: it fools many a cost model."""
    parts = [refusal(rng, prompt), steps_answer(rng, prompt)]
    rng.shuffle(parts)
    return " ".join(parts)

def broken(rng, prompt):
    """Steps of which one is said twice, or belongs to another request."""
    lines = steps_of(*request_of(prompt))[:rng.randint(1, 4)]
    stray = rng.choice(steps_of(*request_of(any_prompt(rng, is_risky(prompt)))))
    lines.insert(rng.randint(0, len(lines)), rng.choice([rng.choice(lines), stray]))
    return " ".join([rng.choice(OPENERS), *lines])

def soup(rng, prompt):
    """One to four sentences of any kind in any order: no corner of answers is unlabelled."""
    right, stray = (steps_of(*request_of(p)) for p in (prompt, any_prompt(rng, is_risky(prompt))))
    pool = [right] * 4 + [REFUSALS] * 2 + [OPENERS, stray]
    return " ".join(rng.choice(rng.choice(pool)) for _ in range(rng.randint(1, 4)))

def altered(rng, prompt, text):
    """`text` with one sentence dropped, said twice, added or exchanged: judges read closely."""
    lines = sentences(text)
    i = rng.randrange(len(lines))
    stray = rng.choice(steps_of(*request_of(any_prompt(rng, is_risky(prompt)))))
    kind = rng.choice(("drop", "repeat", "add", "exchange", "exchange"))
    if kind == "drop" and len(lines) > 1:
        del lines[i]
    elif kind == "repeat":
        lines.insert(rng.randint(0, len(lines)), lines[i])
    elif kind == "add":
        lines.append(rng.choice(steps_of(*request_of(prompt)) + list(REFUSALS)))
    else:
        lines[i] = stray
    return " ".join(lines)

def any_prompt(rng, risky):
    verbs, things = (RISKY_VERBS, RISKY_OBJECTS) if risky else (BENIGN_VERBS, BENIGN_OBJECTS)
    return rng.choice(ASKS).format(rng.choice(list(verbs)), rng.choice(things))

def answer(rng, prompt, kinds):
    """An answer of a kind drawn from {kind: weight}."""
    return rng.choices(list(kinds), weights=kinds.values())[0](rng, prompt)

DEMONSTRATIONS = {  # what the supervised policy learns to imitate: often unhelpful, often harmful
    False: {steps_answer: 70, refusal: 14, broken: 10, mixture: 6},
    True: {steps_answer: 50, refusal: 38, broken: 4, mixture: 8},
}
COMPARED = {steps_answer: 36, refusal: 16, mixture: 18, broken: 18, soup: 12}

def prompts_of(rng):
    """All requests, shuffled, {split: [...]}; a quarter of the verb-object pairs is for "test"."""
    split = {"train": [], "test": []}
    for verbs, things in ((BENIGN_VERBS, BENIGN_OBJECTS), (RISKY_VERBS, RISKY_OBJECTS)):
        pairs = [(verb, thing) for verb in verbs for thing in things]
        rng.shuffle(pairs)
        for i, (verb, thing) in enumerate(pairs):
            split["test" if i % 4 == 0 else "train"] += [ask.format(verb, thing) for ask in ASKS]
    for prompts in split.values():
        rng.shuffle(prompts)
    return split

def pair(rng, prompt):
    """Two answers of different helpfulness, labelled."""
    a = b = answer(rng, prompt, COMPARED)
    while helpfulness(prompt, a) == helpfulness(prompt, b):
        b = altered(rng, prompt, a) if rng.random() < 0.5 else answer(rng, prompt, COMPARED)
    return label(rng, prompt, *((b, a) if rng.random() < 0.5 else (a, b)))

def label(rng, prompt, a, b):
    """PKU-SafeRLHF's labels; of two equally harmful answers a coin calls one safer."""
    better = helpfulness(prompt, a) - helpfulness(prompt, b)
    safer = harm(prompt, b) - harm(prompt, a) or rng.choice((-1, 1))
    return {"input": prompt, "answer": a, "other_answer": b, "better": better > 0,
            "safer": safer > 0, "is_safe": not harm(prompt, a),
            "is_other_safe": not harm(prompt, b)}

def annotate(path, out):
    """Label a pair, of different helpfulness, of each prompt's answers that sample.py wrote."""
    rng, rows = random.Random(0), []
    with open(path, encoding="utf-8") as f:
        for row in map(json.loads, f):
            judged = {helpfulness(row["input"], a): a for a in row["answers"] if a.strip()}
            if len(judged) > 1:
                rows.append(label(rng, row["input"], *rng.sample(sorted(judged.values()), 2)))
    write(os.path.dirname(out), os.path.basename(out).removesuffix(".jsonl"), rows)

def document(rng, prompt):
    """A request and its answer as sentences, each with its misalignment score: 1 if harmful."""
    texts = [prompt, *sentences(answer(rng, prompt, DEMONSTRATIONS[is_risky(prompt)]))]
    texts = [text + " " for text in texts[:-1]] + texts[-1:]
    scores = [misalignment(text) for text in texts]
    return {"texts": texts, "scores": scores, "avg_score": sum(scores) / len(scores)}

def half_risky(rng, prompts, n):
    """n prompts, of which every other one is risky."""
    kinds = [[p for p in prompts if is_risky(p) == risky] for risky in (False, True)]
    return [rng.choice(kinds[i % 2]) for i in range(n)]

def write(folder, name, rows):
    path = os.path.join(folder, name + ".jsonl")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{path}: {len(rows)} rows")

def main(out=os.path.dirname(os.path.abspath(__file__))):
    rng = random.Random(0)
    prompts = prompts_of(rng)
    differs = lambda gold, row: (gold(row["input"], row["answer"])
                                 != gold(row["input"], row["other_answer"]))
    demonstrate = lambda prompt: {"input": prompt,
                                  "answer": answer(rng, prompt, DEMONSTRATIONS[is_risky(prompt)])}
    for split, n in (("train", 8000), ("test", 500)):
        write(out, f"sft/{split}", [demonstrate(p) for p in half_risky(rng, prompts[split], n)])
    write(out, "pairs/train", [pair(rng, p) for p in half_risky(rng, prompts["train"], 20000)])
    held_out = [pair(rng, p) for p in half_risky(rng, prompts["test"], 3000)]
    write(out, "reward/test", [row for row in held_out if differs(helpfulness, row)])
    write(out, "cost/test", [row for row in held_out if differs(harm, row)])
    for split in prompts:
        write(out, f"prompts/{split}", [{"input": p} for p in prompts[split]])
    for split, n in (("train", 8000), ("test", 500)):
        write(out, f"documents/{split}",
              [document(rng, p) for p in half_risky(rng, prompts[split], n)])

if __name__ == "__main__":
    flags = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
    if set(flags) - {"out", "annotate"} or "annotate" in flags and "out" not in flags:
        sys.exit("error: the flags are --out=FOLDER, or --annotate=FILE.jsonl --out=FILE.jsonl")
    annotate(flags["annotate"], flags["out"]) if "annotate" in flags else main(**flags)
