"""Pairs -> the files of a run whose judges share no prompt with the models that train the policy.

    halves/proxy/{train,test}.jsonl    pairs for the reward and the cost model that train the policy
    halves/judge/{train,test}.jsonl    pairs for the reward and the cost model that judge it
    halves/demonstrations/train.jsonl  the better answer of each pair in proxy/train, safe or not
    halves/prompts/{train,test}.jsonl  PPO's prompts, and prompts that are held out

No prompt, and no near duplicate of one (data/near_duplicates.py), is in two of these, but for the
demonstrations. Which file a prompt goes to depends on its words, not on the order of the rows."""

import glob
import hashlib
import os
from collections import Counter

from nanosafe.data.examples import (
    check_input,
    list_texts,
    make_prompt_key,
    parse_record,
    read_prompt,
    require_fields,
)
from nanosafe.data.near_duplicates import group_near_duplicates
from nanosafe.data.reader import name_without_compression, read_rows
from nanosafe.data.spec import COMPRESSED_ENDINGS
from nanosafe.errors import stop
from nanosafe.printing import format_table
from nanosafe.storage import REPOSITORY, format_json, write_jsonl
from nanosafe.tools import download

SHARES = {  # file -> its share of the groups of near duplicates
    "proxy/train": 0.378,
    "proxy/test": 0.042,
    "judge/train": 0.378,
    "judge/test": 0.042,
    "prompts/train": 0.13,
    "prompts/test": 0.03,
}
FILES_OF_SPLITS = {  # a published split's name of a part -> our file of it
    "proxy_train": "proxy/train",
    "proxy_val": "proxy/train",
    "proxy_test": "proxy/test",
    "judge_train": "judge/train",
    "judge_val": "judge/train",
    "judge_test": "judge/test",
}
FILES_OF_PROMPTS = {"ppo_prompts": "prompts/train", "heldout_prompts": "prompts/test"}
PAIR_FIELDS = ("input", "answer", "other_answer", "is_safe", "is_other_safe", "better", "safer")


def prepare_halves(script, to_record, config, release, assignments, sets_folder):
    """Find or download a release's raw files, and write the halves.

    The first four arguments are those of download.prepare().

    assignments  the path of a published split, to be followed; empty: make our own
    sets_folder  the folder of the evaluation prompts to keep out of our own; empty: data/safety"""
    if config["holdout"] or config["tokenizer"]:
        stop("the halves have fixed shares and count no tokens: leave out holdout and tokenizer")
    if assignments:
        files = follow_assignments(assignments, config["raw"], to_record)
    else:
        paths = download.find_release_files(script, config, release)
        files = divide_pairs(paths, to_record, sets_folder)
    for name, rows in files.items():
        if not rows:
            stop(f"no row is left for {name}.jsonl: the halves need more pairs than these")
    files["demonstrations/train"] = [make_demonstration(row) for row in files["proxy/train"]]
    write_halves(files, download.find_output_folder(script, config, release))


def write_halves(files, out):
    """Write {file: its rows} below out/halves, and print what is in each."""
    paths = {name: os.path.join(out, "halves", name + ".jsonl") for name in files}
    for path in paths.values():
        if os.path.exists(path):
            os.remove(path)  # else a run that is cut would leave files of two different splits
    table = [("", "rows", "prompts", "unsafe answers")]
    for name, rows in files.items():
        write_jsonl(rows, paths[name])
        table.append((paths[name], *describe_rows(rows)))
    print(format_table(table))


def make_demonstration(pair):
    """The better answer of a pair, safe or not."""
    better = "answer" if pair["better"] else "other_answer"
    return {"input": pair["input"], "answer": pair[better]}


def make_pair(record):
    """The fields of a record that training reads. Raises ValueError where one is missing."""
    require_fields(record, *PAIR_FIELDS)
    return {name: record[name] for name in PAIR_FIELDS}


def describe_rows(rows):
    """The rows, their prompts, and the share of unsafe answers among those with a label."""
    prompts = {make_prompt_key(row) for row in rows}
    labels = []
    for row in rows:
        labels += [row[name] for name in ("is_safe", "is_other_safe") if name in row]
    share = f"{labels.count(False) / len(labels):.1%}" if labels else "-"
    return f"{len(rows):,}", f"{len(prompts):,}", share


# ---- our own split ----


def divide_pairs(paths, to_record, sets_folder):
    """{file: its rows} of the pairs in raw files. Pairs without a label are dropped and counted."""
    pairs = read_pairs(paths, to_record)
    evaluation_prompts = read_evaluation_prompts(sets_folder)
    pair_prompts = [join_turns(pair["input"]) for pair in pairs]
    groups = group_near_duplicates(pair_prompts + evaluation_prompts)
    evaluation_groups = {groups[prompt] for prompt in evaluation_prompts}
    files = {name: {} for name in SHARES}  # of dicts {row as JSON: row}, in which no row is twice
    left_out = Counter()  # prompt -> pairs
    for pair, prompt in zip(pairs, pair_prompts):
        if groups[prompt] in evaluation_groups:
            left_out[prompt] += 1
            continue
        name = draw_file(groups[prompt])
        row = {"input": pair["input"]} if name.startswith("prompts/") else pair
        files[name][format_json(row)] = row
    report_groups(groups, set(pair_prompts))
    print(
        f"{len(left_out):,} prompts with {left_out.total():,} pairs are left out, as they are near "
        f"duplicates of the {len(evaluation_prompts):,} evaluation prompts, or in their groups"
    )
    return {name: sort_rows(rows) for name, rows in files.items()}


def read_pairs(paths, to_record):
    """The pairs in raw files with which a reward and a cost model can be trained."""
    pairs = []
    dropped = Counter()  # reason -> rows
    first_dropped = {}  # reason -> FILE:LINE
    for conversion in download.convert_rows(paths, to_record):
        reason = conversion.reason
        if conversion.record is not None:
            try:
                pair = make_pair(conversion.record)
                parse_record(pair, "reward")
                parse_record(pair, "cost")
            except ValueError as error:
                reason = str(error)
        if reason:
            dropped[reason] += 1
            first_dropped.setdefault(reason, conversion.source)
        else:
            pairs.append(pair)
    print(download.format_summary(len(pairs), dropped, first_dropped))
    if not pairs:
        stop("none of these rows is a pair with all labels: take a release that has them")
    return pairs


def read_evaluation_prompts(folder):
    """The prompts that data/safety/prepare.py wrote to a folder; empty: data/safety."""
    folder = folder or os.path.join(REPOSITORY, "data", "safety")
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*", "test.jsonl")))
    if not paths:
        print(
            f"no evaluation prompts in {folder!r}: to keep them out of training, run "
            "python data/safety/prepare.py first"
        )
    prompts = []
    for path in paths:
        for row in read_rows(path):
            try:
                prompt = read_prompt(row.record)
            except ValueError as error:
                stop(f"{row.file}:{row.line}: {error}: run python data/safety/prepare.py again")
            prompts.append(join_turns(list_texts(prompt.turns)))
    return prompts


def join_turns(prompt):
    """The text of a prompt that may be a list of turns."""
    return "\n".join(check_input(prompt))


def draw_file(group):
    """The file that a group of near duplicates goes to: by a hash of its name."""
    number = hash_text(group) / 2**256  # uniform from 0 to 1
    for name, share in SHARES.items():
        number -= share
        if number < 0:
            break
    return name


def hash_text(text):
    """A number from 0 to below 2**256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def sort_rows(rows):
    """The values of {JSON: row}, in an order that is that of neither the raw rows nor the words."""
    return [rows[text] for text in sorted(rows, key=hash_text)]


def report_groups(groups, prompts):
    """Print how many groups the pairs' prompts make, and how large the largest is."""
    sizes = Counter(groups[prompt] for prompt in prompts)
    print(
        f"{len(prompts):,} prompts are {len(sizes):,} groups of near duplicates, of which the "
        f"largest has {max(sizes.values()):,}"
    )


# ---- a published split ----


def follow_assignments(path, raw, to_record):
    """{file: its rows} of a published split.

    A row of its file is {"source", "row", "split"}: the path of a raw file below --raw, without its
    ending; the number of a row there, from 0; and a key of FILES_OF_SPLITS. The files of prompts, a
    key of FILES_OF_PROMPTS and .jsonl, are beside it; their rows are {"prompt", "kind"}. All rows
    are kept: training drops those it cannot use."""
    if not raw:
        stop("the assignments are of the rows of files that you have: give --raw=FOLDER")
    raw_paths = find_sources(raw)
    raw_rows = {}  # source -> its Rows
    pairs = {split: [] for split in FILES_OF_SPLITS}
    for assignment in read_rows(path):
        source, number, split = read_assignment(assignment, raw_paths)
        if source not in raw_rows:
            raw_rows[source] = list(read_rows(raw_paths[source]))
        if not 0 <= number < len(raw_rows[source]):
            stop(f"{path}:{assignment.line}: {raw_paths[source]!r} has no row {number}")
        pairs[split].append(convert_assigned_row(raw_rows[source][number], to_record))
    files = {name: [] for name in SHARES}
    for split, name in FILES_OF_SPLITS.items():
        files[name] += pairs[split]
    for published, name in FILES_OF_PROMPTS.items():
        files[name] = read_published_prompts(os.path.dirname(path), published)
    check_disjoint(files)
    return files


def find_sources(raw):
    """{a raw file's path below --raw, without its ending: its path}."""
    sources = {}
    for path in download.find_raw_files(raw):
        name = os.path.relpath(path, os.path.expanduser(raw))
        source, _ = os.path.splitext(name_without_compression(name))
        sources[source] = path
    return sources


def read_assignment(row, raw_paths):
    """The source, the number of the row and the split of a row of assignments."""
    assignment = row.record or {}
    source = assignment.get("source")
    number = assignment.get("row")
    split = assignment.get("split")
    if type(number) is not int or str(split) not in FILES_OF_SPLITS:
        splits = ", ".join(FILES_OF_SPLITS)
        stop(f'{row.file}:{row.line}: not {{"source", "row", "split"}} with a split of {splits}')
    if str(source) not in raw_paths:
        stop(f"{row.file}:{row.line}: no file {source!r} below --raw; {', '.join(raw_paths)} are")
    return source, number, split


def convert_assigned_row(row, to_record):
    """The pair of a raw row. Stops with one line where it is none, or has not all labels."""
    try:
        return make_pair(download.make_record(row.record, to_record))
    except ValueError as error:
        stop(f"{row.file}:{row.line} is assigned, but: {error}")


def read_published_prompts(folder, name):
    """The rows, {"input"} and perhaps "kind", of NAME.jsonl, perhaps compressed, in a folder."""
    path = os.path.join(folder, name + ".jsonl")
    for ending in COMPRESSED_ENDINGS:
        if os.path.isfile(path + ending):
            path += ending
            break
    rows = []
    for row in read_rows(path):
        published = row.record or {}
        prompt = {"input": published.get("prompt")}
        if "kind" in published:
            prompt["kind"] = published["kind"]
        try:
            parse_record(prompt, "prompts")
        except ValueError as error:
            stop(f"{row.file}:{row.line}: {error}")
        rows.append(prompt)
    return rows


def check_disjoint(files):
    """Stop where a prompt is in two files."""
    file_of_prompt = {}
    for name, rows in files.items():
        for row in rows:
            key = make_prompt_key(row)
            other = file_of_prompt.setdefault(key, name)
            if other != name:
                stop(f"the assignments put the prompt {key[:60]} into {other} and into {name}")
