"""data/pku_saferlhf/prepare.py --halves, and the groups of near duplicates behind it."""

import json
import os
import random
import shutil

import pytest
from conftest import ROOT
from test_prepare import PAIR, read_lines, run_prepare, to_lines

from nanosafe import data
from nanosafe.data.near_duplicates import LARGEST_GROUP, group_near_duplicates

PAIR_FILES = ["proxy/train", "proxy/test", "judge/train", "judge/test"]
PROMPT_FILES = ["prompts/train", "prompts/test"]
ALL_FILES = [*PAIR_FILES, *PROMPT_FILES, "demonstrations/train"]
WORDS = [f"word{i}" for i in range(5000)]
EVALUATION_PROMPT = "Is this a question that only an evaluation should ever ask?"


def draw_prompt(source):
    """A prompt of twelve random words."""
    return " ".join(source.choices(WORDS, k=12))


def make_raw_rows(prompts):
    """Two raw rows of each prompt. In one response 0 is better and safe, in the other neither."""
    rows = []
    for prompt in prompts:
        rows.append({**PAIR, "prompt": prompt, "better_response_id": 0})
        labels = {"is_response_0_safe": False, "safer_response_id": 1, "better_response_id": 1}
        rows.append({**PAIR, "prompt": prompt, **labels})
    return rows


def write_raw(folder, rows, name="train.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(to_lines(rows))


def make_halves(tmp_path, rows, *flags, out="out"):
    """Run prepare.py --halves on raw rows; returns what it printed, and its error."""
    write_raw(tmp_path / "raw", rows)
    folders = f"--raw={tmp_path}/raw", f"--out={tmp_path}/{out}", f"--sets_folder={tmp_path}/sets"
    return run_prepare("pku_saferlhf", "--halves", *folders, *flags)


def read_halves(tmp_path, out="out"):
    """{file: its rows}"""
    files = {}
    for name in ALL_FILES:
        files[name] = read_lines(tmp_path / out / "halves" / f"{name}.jsonl")
    return files


def find_files_of_prompts(files):
    """{prompt: the files, without the demonstrations, that it is in}"""
    found = {}
    for name in [*PAIR_FILES, *PROMPT_FILES]:
        for row in files[name]:
            found.setdefault(row["input"], set()).add(name)
    return found


@pytest.fixture
def prompts():
    source = random.Random(0)
    return [draw_prompt(source) for _ in range(400)]


# ---- our own split ----


def test_no_prompt_is_in_two_files_and_each_has_its_share(tmp_path, prompts):
    assert not make_halves(tmp_path, make_raw_rows(prompts)).error
    files = read_halves(tmp_path)
    found = find_files_of_prompts(files)
    assert found.keys() == set(prompts)
    assert all(len(names) == 1 for names in found.values())
    for name, share in {"proxy/train": 0.378, "judge/train": 0.378, "prompts/train": 0.13}.items():
        count = len({row["input"] for row in files[name]})
        deviation = (400 * share * (1 - share)) ** 0.5
        assert abs(count - 400 * share) < 4 * deviation
    for name in PROMPT_FILES:  # each prompt once, and nothing but it
        assert all(row.keys() == {"input"} for row in files[name])
        assert len({row["input"] for row in files[name]}) == len(files[name])


def test_pairs_are_those_of_prepare_and_demonstrations_their_better_answers(tmp_path, prompts):
    make_halves(tmp_path, make_raw_rows(prompts))
    files = read_halves(tmp_path)
    pairs = files["proxy/train"]
    first = {
        "input": pairs[0]["input"],
        "answer": "a",
        "other_answer": "b",
        "is_safe": True,
        "is_other_safe": False,
        "better": True,
        "safer": True,
    }
    second = {**first, "is_safe": False, "better": False, "safer": False}
    of_prompt = [pair for pair in pairs if pair["input"] == first["input"]]
    assert sorted(map(json.dumps, of_prompt)) == sorted(map(json.dumps, [first, second]))
    expected = []
    for pair in pairs:
        expected.append({"input": pair["input"], "answer": "a" if pair["better"] else "b"})
    assert files["demonstrations/train"] == expected
    assert {row["answer"] for row in expected} == {"a", "b"}


def test_near_duplicates_are_in_the_same_file(tmp_path, prompts):
    """Another spelling, one word changed, one added or missing, or ten words in a row in common."""
    others = {}
    for prompt in prompts[:300]:
        words = prompt.split()
        others[prompt] = [
            prompt.upper() + "?!",
            " ".join([*words[:5], "changed", *words[6:]]),
            " ".join([*words[:5], "added", *words[5:]]),
            " ".join([*words[:5], *words[6:]]),
            "a wholly different beginning of it, then: " + " ".join(words[1:11]) + " and an end",
        ]
    rows = make_raw_rows(prompts)
    for near in others.values():
        rows += make_raw_rows(near)
    assert "400 groups of near duplicates" in make_halves(tmp_path, rows).printed
    found = find_files_of_prompts(read_halves(tmp_path))
    for prompt, near in others.items():
        for other in near:
            assert found[other] == found[prompt]


def test_the_order_of_the_rows_and_their_files_changes_nothing(tmp_path, prompts):
    rows = make_raw_rows(prompts)
    make_halves(tmp_path, rows)
    random.Random(1).shuffle(rows)
    write_raw(tmp_path / "raw", rows[:200], "another.jsonl")
    make_halves(tmp_path, rows[200:], out="again")
    for name in ALL_FILES:
        path = f"halves/{name}.jsonl"
        again = (tmp_path / "again" / path).read_bytes()
        assert again == (tmp_path / "out" / path).read_bytes()


def test_rows_without_a_label_are_dropped_and_counted(tmp_path, prompts):
    bad = []
    for name in ("better_response_id", "safer_response_id", "is_response_0_safe"):
        row = {**PAIR, "prompt": f"a prompt without {name}"}
        del row[name]
        bad.append(row)
    bad.append({**PAIR, "prompt": "a prompt with an empty second answer", "response_1": ""})
    bad.append({**PAIR, "prompt": ["a list of turns", "that ends with the assistant"]})
    finished = make_halves(tmp_path, make_raw_rows(prompts) + bad)
    assert not finished.error
    assert "805 rows read, 800 kept" in finished.printed
    for reason in ("no field 'better'", "no field 'safer'", "'is_response_0_safe' is missing"):
        assert reason in finished.printed
    assert find_files_of_prompts(read_halves(tmp_path)).keys() == set(prompts)


def test_a_release_without_a_label_and_too_few_prompts_stop_with_one_line(tmp_path, prompts):
    row = {**PAIR, "better_response_id": None}
    assert "take a release that has" in make_halves(tmp_path, [row]).error
    assert "need more pairs" in make_halves(tmp_path, make_raw_rows(prompts[:3])).error
    assert not (tmp_path / "out").exists()


def test_prompts_near_evaluation_prompts_are_in_no_file(tmp_path, prompts):
    folder = tmp_path / "sets" / "a_set"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_bytes(to_lines([{"input": EVALUATION_PROMPT}]))
    near = EVALUATION_PROMPT.replace("ever", "never")
    finished = make_halves(tmp_path, make_raw_rows([*prompts, near]))
    assert "1 prompts with 2 pairs are left out" in finished.printed
    assert find_files_of_prompts(read_halves(tmp_path)).keys() == set(prompts)
    (folder / "test.jsonl").write_bytes(to_lines([{"input": ""}]))
    assert "a_set/test.jsonl:1: empty" in make_halves(tmp_path, make_raw_rows(prompts)).error
    shutil.rmtree(tmp_path / "sets")
    finished = make_halves(tmp_path, make_raw_rows([*prompts, near]))
    assert "no evaluation prompts" in finished.printed
    assert near in find_files_of_prompts(read_halves(tmp_path))


def test_the_halves_are_datasets(tmp_path, prompts):
    make_halves(tmp_path, make_raw_rows(prompts), out="pku_saferlhf")
    for name, rows in read_halves(tmp_path, out="pku_saferlhf").items():
        dataset = f"pku_saferlhf/halves/{name.removesuffix('/train')}"
        assert data.load(f"{dataset}:1:{tmp_path}") == rows


@pytest.mark.parametrize("flag", ["--holdout=0.1", "--tokenizer=folder"])
def test_knobs_that_the_halves_do_not_read_are_refused(tmp_path, flag):
    assert "leave out holdout and tokenizer" in make_halves(tmp_path, [PAIR], flag).error


# ---- groups ----


def test_unrelated_prompts_are_groups_of_their_own():
    """Nine words in a row in common do not make near duplicates, nor half of a short prompt."""
    nine = "how do i do this without anyone ever noticing"
    unrelated = [f"first {nine} now please", f"second {nine} or tomorrow", "hello there", "hello"]
    groups = group_near_duplicates([*unrelated, "???"])
    assert groups == {prompt: prompt for prompt in [*unrelated, "???"]}


def test_a_chain_of_near_duplicates_is_one_group():
    chain = [" ".join(WORDS[i : i + 15]) for i in range(0, 250, 5)]  # ten words are in the next
    assert set(group_near_duplicates(chain).values()) == {min(chain)}
    assert group_near_duplicates(chain) == group_near_duplicates(reversed(chain))


def test_where_ten_words_chain_too_many_prompts_more_must_be_the_same():
    count = LARGEST_GROUP + 1
    chain = [" ".join(WORDS[5 * i : 5 * i + 15]) for i in range(count)]
    changed = chain[0].replace("word7", "changed")
    groups = group_near_duplicates([*chain, changed])
    assert len(set(groups.values())) == count
    assert groups[changed] == groups[chain[0]]


def test_no_prompts_are_no_groups():
    assert group_near_duplicates([]) == {}


# ---- a published split ----


@pytest.fixture
def published(tmp_path, prompts):
    """A folder with two raw files, and a split of them beside."""
    rows = make_raw_rows(prompts[:20])
    write_raw(tmp_path / "raw", rows[:30], "one.jsonl")
    write_raw(tmp_path / "raw", rows[30:], "two.jsonl")
    assignments = [
        {"source": "one", "row": 2, "split": "proxy_val"},
        {"source": "two", "row": 1, "split": "proxy_train"},
        {"source": "one", "row": 0, "split": "proxy_train"},
        {"source": "one", "row": 4, "split": "proxy_test"},
        {"source": "one", "row": 6, "split": "judge_val"},
        {"source": "one", "row": 8, "split": "judge_test"},
    ]
    write_raw(tmp_path / "split", assignments, "pairs.jsonl")
    write_raw(tmp_path / "split", [{"prompt": "p", "kind": "safe"}], "ppo_prompts.jsonl")
    write_raw(tmp_path / "split", [{"prompt": "q"}], "heldout_prompts.jsonl")
    return tmp_path


def follow_split(folder, *flags):
    split = f"--assignments={folder}/split/pairs.jsonl"
    flags = flags or (f"--raw={folder}/raw",)
    return run_prepare("pku_saferlhf", split, f"--out={folder}/out", *flags)


def test_a_published_split_is_followed(published, prompts):
    """Validation rows come behind the training rows; each part keeps the order of the split."""
    assert not follow_split(published).error
    files = read_halves(published)
    inputs = {name: [row["input"] for row in rows] for name, rows in files.items()}
    assert inputs == {
        "proxy/train": [prompts[15], prompts[0], prompts[1]],
        "proxy/test": [prompts[2]],
        "judge/train": [prompts[3]],
        "judge/test": [prompts[4]],
        "prompts/train": ["p"],
        "prompts/test": ["q"],
        "demonstrations/train": [prompts[15], prompts[0], prompts[1]],
    }
    assert files["prompts/train"] == [{"input": "p", "kind": "safe"}]
    assert files["prompts/test"] == [{"input": "q"}]
    assert [row["answer"] for row in files["demonstrations/train"]] == ["b", "a", "a"]


GOOD = {"source": "one", "row": 0, "split": "proxy_train"}


@pytest.mark.parametrize(
    "assignment, words",
    [
        ({**GOOD, "split": "train"}, "pairs.jsonl:1: not"),
        ({**GOOD, "split": ["proxy_train"]}, "pairs.jsonl:1: not"),
        ({**GOOD, "row": "0"}, "pairs.jsonl:1: not"),
        ({**GOOD, "row": True}, "pairs.jsonl:1: not"),
        ("text", "pairs.jsonl:1: not"),
        ({**GOOD, "source": "three"}, "no file 'three'"),
        ({**GOOD, "source": ["one"]}, "no file ['one']"),
        ({**GOOD, "source": "../split/pairs"}, "no file '../split/pairs'"),
        ({**GOOD, "row": 30}, "has no row 30"),
        ({**GOOD, "row": -1}, "has no row -1"),
        ({**GOOD, "source": "bad"}, "bad.jsonl:1 is assigned, but: no field 'better'"),
        ({**GOOD, "source": "bad", "row": 1}, "bad.jsonl:2 is assigned, but: field 'prompt'"),
        ({**GOOD, "source": "bad", "row": 2}, "bad.jsonl:3 is assigned, but:"),
    ],
)
def test_a_broken_split_stops_with_one_line(published, assignment, words):
    without_label = {**PAIR, "better_response_id": None}
    write_raw(published / "raw", [without_label, {"x": 1}, "text"], "bad.jsonl")
    write_raw(published / "split", [assignment], "pairs.jsonl")
    error = follow_split(published).error
    assert words in error and "\n" not in error
    assert not (published / "out").exists()


def test_a_split_with_a_prompt_on_both_sides_stops_with_one_line(published, prompts):
    rows = [{"prompt": prompts[0]}]
    write_raw(published / "split", rows, "heldout_prompts.jsonl")
    assert "into proxy/train and into prompts/test" in follow_split(published).error


def test_a_split_needs_its_prompts_and_the_raw_files(published):
    assert "give --raw=FOLDER" in follow_split(published, "--version=v1").error
    write_raw(published / "split", [{"prompt": 3}], "heldout_prompts.jsonl")
    assert "heldout_prompts.jsonl:1:" in follow_split(published).error
    (published / "split" / "ppo_prompts.jsonl").unlink()
    assert "ppo_prompts.jsonl' cannot be read" in follow_split(published).error
    (published / "split" / "pairs.jsonl").unlink()
    assert "pairs.jsonl' cannot be read" in follow_split(published).error


def test_the_split_beside_the_repository_gives_the_rows_that_it_counts(tmp_path):
    """On real data, where a development machine has it."""
    raw = os.path.join(os.path.dirname(ROOT), "shared", "data", "pku-saferlhf")
    split = os.path.join(raw, "split", "pair_assignments.jsonl.gz")
    if not os.path.exists(split):
        pytest.skip("no published split here")
    flags = f"--assignments={split}", f"--raw={raw}", f"--out={tmp_path}/out"
    assert not run_prepare("pku_saferlhf", *flags).error
    counts = {name: len(rows) for name, rows in read_halves(tmp_path).items()}
    assert counts == {
        "proxy/train": 5424,
        "proxy/test": 490,
        "judge/train": 5498,
        "judge/test": 454,
        "prompts/train": 1922,
        "prompts/test": 542,
        "demonstrations/train": 5424,
    }
