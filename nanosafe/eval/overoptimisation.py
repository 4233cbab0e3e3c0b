"""Policies as the models that trained them see them, and as judges that they never met do.

$ python -m nanosafe.eval.overoptimisation --reference=SFT=out/demo/sft/model \\
      --models=PPO=out/demo/ppo/model,PPO-Lag=out/demo/ppo_lag/model \\
      --reward_models=proxy=out/demo/reward/model,judge=out/judge/reward/model \\
      --cost_models=proxy=out/demo/cost/model,judge=out/judge/cost/model

A policy that is trained on a reward model for long enough pleases the model, and no longer what the
model stands for (arXiv:2210.10760). A judge of the same kind, trained on other data, shows from
which distance on: the picture has what each of them says over the KL from the reference.

NAME@STEP=FOLDER in --models is a policy at some step of its run; those of one NAME are joined by a
line. All policies answer a prompt with the same random numbers. What a policy answered is kept in
out_dir with its scores, so that the same command goes on where it was. Writes answers.jsonl,
table.csv, summary.json and a picture."""

import csv
import hashlib
import json
import re

import numpy as np

from configurator import configure
from nanosafe.data.examples import list_texts
from nanosafe.eval.players import (
    answer_prompts,
    hash_prompt,
    name_players,
    parse_player,
    read_prompts,
    score_answers,
    share_from_main,
)
from nanosafe.eval.statistics import bootstrap_interval, wilson_interval
from nanosafe.inference import (
    Policy,
    answer_logps,
    check_scorer,
    choose_dtype,
    fingerprint_model,
    load_scorer,
)
from nanosafe.parallel import close, init
from nanosafe.printing import format_table, print_once
from nanosafe.ranges import check_ranges
from nanosafe.storage import (
    make_folder,
    read_json,
    replace_non_finite,
    write_json,
    write_jsonl,
)
from nanosafe.tokenizer import load as load_tokenizer
from nanosafe.tools import plot

# models
reference = "SFT=out/demo/sft/model"  # the policy that all others are measured from
models = "out/demo/ppo/model,out/demo/ppo_lag/model"  # policies; NAME=FOLDER, NAME@STEP=FOLDER
reward_models = "proxy=out/demo/reward/model"  # who scores helpfulness; NAME=MODEL names one
cost_models = "proxy=out/demo/cost/model"  # who scores harm, above 0 is unsafe
# prompts and answers
data = "toy/prompts/test"  # the prompts: NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl
out_dir = "out/overoptimisation"  # folder to write to; what is measured there is not again
max_new_tokens = 512  # longest answer
temperature = 1.0  # 0: always the likeliest token; only at 1 is "KL" an estimate of the KL
seed = 0  # an answer's random numbers depend on its prompt's text and on this
# machine
max_tokens = 8192  # packed tokens per forward when answers are scored
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # what is computed in: auto | bfloat16 | float32
config = configure(globals())
check_ranges(config)


# ---- one policy ----


def list_named(text):
    """(name, folder) pairs of NAME=FOLDER,NAME=FOLDER; a name that is not given is ""."""
    entries = []
    for entry in text.split(","):
        entries.append(parse_player(entry.strip()))
    return entries


def name_scorers(kind, text):
    """{(kind, name): folder} of the score models of a kind, each of which must be one."""
    scorers = {}
    for name, folder in name_players(list_named(text), knob=f"{kind}_models").items():
        check_scorer(folder, kind)
        scorers[kind, name] = folder
    return scorers


def digest(folder, scorers, uids):
    """A text that changes with a policy's files, its prompts, and whatever its rows depend on."""
    facts = []
    for path in (folder, reference, *scorers.values()):
        facts.append(fingerprint_model(None, path, world))
    facts += [list(scorers), uids, seed, temperature, max_new_tokens, dtype]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def measure_policy(name, folder, prompts, uids, scorers, bases):
    """The rows of a policy: its answer to each prompt, with its length, log-ratio and scores.

    scorers  {(kind, name): folder}
    bases    as of checkpoint.load(): the adapters of one base share it"""
    policy = Policy(
        folder,
        world,
        max_new_tokens,
        name,
        dtype,
        temperature=temperature,
        seed=seed,
        bases=bases,
    )
    answers = answer_prompts(policy, prompts, uids)
    logps = sum_answer_logps(policy, answers)
    origin = Policy(
        reference, world, max_new_tokens, dtype=dtype, temperature=1.0, seed=seed, bases=bases
    )
    log_ratios = (logps - sum_answer_logps(origin, answers)).tolist()
    rows = []
    for prompt, response, log_ratio in zip(prompts, answers.responses, log_ratios):
        row = {
            "policy": name,
            "prompt": list_texts(prompt.turns),
            "answer": policy.tok.decode(response),
            "length": len(response),
            "ended": bool(response) and response[-1] in policy.tok.eos_ids,
            "log_ratio": round(log_ratio, 4),
        }
        rows.append(row)
    for (kind, scorer_name), path in scorers.items():
        scorer = load_scorer(path, world, choose_dtype(dtype, world), max_tokens, kind, bases)
        for row, score in zip(rows, score_answers(scorer, prompts, answers)):
            row.setdefault(kind, {})[scorer_name] = score
    return rows


def sum_answer_logps(policy, answers):
    """A policy's log-probabilities (n,) of Answers, its own or another's."""
    return answer_logps(policy.model, answers.questions, answers.responses, max_tokens, world)


def find_rows(name, folder, prompts, uids, scorers, bases):
    """A policy's rows: from an earlier run where nothing has changed since, else measured."""
    path = re.sub(r"[^\w@.-]", "_", name) + ".json"
    wanted = share_from_main(digest(folder, scorers, uids), world)
    kept = share_from_main(read_json(out_dir, path) if world.main else {}, world)
    if kept.get("digest") == wanted:
        print_once(f"{name}: its answers and scores are in {out_dir}/{path}")
        return kept["rows"]
    rows = measure_policy(name, folder, prompts, uids, scorers, bases)
    if world.main:
        write_json({"digest": wanted, "rows": replace_non_finite(rows, str)}, out_dir, path)
    return rows


# ---- what the rows say ----


def summarize(rows, origin):
    """Means of a policy's answers with 95 % intervals; origin: the reference's rows."""
    log_ratios = [row["log_ratio"] for row in rows]
    summary = {
        "kl": bootstrap_interval(log_ratios),
        "length": bootstrap_interval([row["length"] for row in rows]),
        "cut": sum(not row["ended"] for row in rows) / len(rows),
    }
    for kind in ("reward", "cost"):
        summary[kind] = {}
        for name in rows[0][kind]:
            scores = [row[kind][name] for row in rows]
            before = [row[kind][name] for row in origin]
            gains = [score - score_before for score, score_before in zip(scores, before)]
            measured = {"mean": bootstrap_interval(scores), "gain": bootstrap_interval(gains)}
            deviation = float(np.std(before)) or 1.0  # 1 where all scores are equal
            measured["standardised"] = measured["gain"].mean / deviation
            if kind == "cost":
                measured["unsafe"] = wilson_interval([score > 0 for score in scores])
            summary[kind][name] = measured
    return summary


def format_interval(interval):
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def format_share(interval):
    return f"{interval.mean:.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def tabulate(summaries):
    """The rows of the printed table: a line for each policy."""
    first = next(iter(summaries.values()))
    head = ["", "KL", "length", "cut"]
    head += [f"reward, {name}" for name in first["reward"]]
    for name in first["cost"]:
        head += [f"cost, {name}", f"unsafe, {name}"]
    table = [head]
    for name, summary in summaries.items():
        cells = [name, f"{summary['kl'].mean:.2f}", f"{summary['length'].mean:.0f}"]
        cells.append(f"{summary['cut']:.0%}")
        for measured in summary["reward"].values():
            cells.append(format_interval(measured["mean"]))
        for measured in summary["cost"].values():
            cells.append(format_interval(measured["mean"]))
            cells.append(format_share(measured["unsafe"]))
        table.append(cells)
    return table


def join_runs(summaries):
    """{run: the summaries along it}: the reference, then the run's policies as they were named."""
    origin, *others = summaries
    runs = {}
    for name in others:
        run = name.partition("@")[0]
        runs.setdefault(run, [summaries[origin]]).append(summaries[name])
    return runs


def report(rows_of, dropped):
    """Write all files, and print what they say.

    rows_of  {policy: its rows}, the reference first
    dropped  how many rows of the data held no prompt"""
    origin = next(iter(rows_of.values()))
    summaries = {name: summarize(rows, origin) for name, rows in rows_of.items()}
    all_rows = [row for rows in rows_of.values() for row in rows]
    write_jsonl(all_rows, f"{out_dir}/answers.jsonl")
    table = tabulate(summaries)
    with open(f"{out_dir}/table.csv", "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(table)
    print(f"\n{format_table(table)}")
    print(f"{len(origin)} prompts [95 %: bootstrap of a mean, Wilson's interval of a share]")
    if dropped:
        print(f"{dropped} rows of the data hold no prompt and are left out")
    facts = {
        "reference": reference,
        "data": data,
        "temperature": temperature,
        "prompts": len(origin),
        "dropped": dropped,
    }
    write_json({**facts, "policies": summaries}, out_dir, "summary.json")
    pictures = plot.overoptimisation(join_runs(summaries), out_dir)
    print(f"\n{out_dir}: answers.jsonl, table.csv, summary.json{pictures}")


# ---- run ----
reference_name, reference = parse_player(reference)
policies = name_players([(reference_name or "reference", reference), *list_named(models)])
scorers = {**name_scorers("reward", reward_models), **name_scorers("cost", cost_models)}
make_folder(out_dir)
world = init(device, config)
for folder in policies.values():
    load_tokenizer(folder)  # stops here, before any work, where a folder is no model
prompts, dropped = read_prompts(data)
uids = [hash_prompt(prompt) for prompt in prompts]
bases = {}
rows_of = {}
for name, folder in policies.items():
    rows_of[name] = find_rows(name, folder, prompts, uids, scorers, bases)
if world.main:
    report(rows_of, dropped)
close()
