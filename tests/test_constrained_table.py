"""The command that makes docs/constrained.md's table: what it runs, chooses, keeps and draws."""

import os
import re
from collections import Counter

import pytest
from conftest import ROOT, run
from in_process import run_in_process
from test_house import CONFIGURED, knobs_of

import configurator
from nanosafe.ranges import check_ranges
from nanosafe.storage import read_json, read_jsonl, write_json, write_jsonl
from nanosafe.tools import constrained, toy_runs
from nanosafe.tools.constrained import METHODS, STAGES, Run, Study, choose_setting


def make_study(out_dir, methods, trials=4):
    return Study(str(out_dir), methods, [0, 1], 3, trials, 140)


def judged(helpful, harm):
    """What gold says of a policy."""
    return {
        "helpfulness_benign": helpful,
        "helpfulness_risky": 0.5,
        "harm_rate_risky": harm,
        "refusal_rate_benign": 0.01,
        "kl": 1.5,
        "prompts": 768,
        "seconds": 100.0,
    }


def write_result(run, helpful, harm):
    folder, _, name = f"{run.out}/{run.name}".rpartition("/")
    os.makedirs(folder, exist_ok=True)
    write_json(judged(helpful, harm), folder, name + ".json")


# ---- the choice ----


def test_of_the_settings_with_little_harm_the_most_helpful_one_is_chosen():
    results = [
        ({"beta": 1}, judged(3.9, 0.2)),
        ({"beta": 2}, judged(3.0, 0.05)),
        ({"beta": 3}, judged(3.2, 0.049)),
        ({"beta": 4}, judged(3.2, 0.0)),
    ]
    assert choose_setting(results) == {"beta": 3}


def test_where_all_do_harm_the_least_harmful_setting_is_chosen():
    results = [({"beta": 1}, judged(3.9, 1.0)), ({"beta": 2}, judged(1.0, 0.4))]
    assert choose_setting(results) == {"beta": 2}


def test_of_equally_harmful_settings_the_more_helpful_one_is_chosen():
    results = [({"beta": 1}, judged(3.4, 1.0)), ({"beta": 2}, judged(3.6, 1.0))]
    assert choose_setting(results) == {"beta": 2}


def test_at_most_the_stated_number_of_settings_is_tried(tmp_path):
    for trials in (2, 3, 4):
        study = make_study(tmp_path, ["safedpo"], trials)
        tried = study.list_trials("safedpo")
        assert [run.setting for run in tried] == METHODS["safedpo"].grid[:trials]
        assert {run.seed for run in tried} == {3}


def test_the_choice_needs_only_the_trials_that_have_a_result(tmp_path):
    study = make_study(tmp_path, ["safedpo"])
    first, second, *_ = study.list_trials("safedpo")
    assert study.find_setting("safedpo") is None
    write_result(second, 3.0, 0.01)
    assert study.find_setting("safedpo") == second.setting
    write_result(first, 3.1, 0.01)
    assert study.find_setting("safedpo") == first.setting


def test_a_method_with_one_setting_is_not_tried(tmp_path):
    study = make_study(tmp_path, ["ppo"])
    assert study.list_trials("ppo") == []
    assert study.find_setting("ppo") == {}


# ---- what is run ----


@pytest.mark.parametrize("name", METHODS)
def test_a_method_varies_a_knob_that_each_of_its_settings_has(name):
    method = METHODS[name]
    for setting in method.grid:
        assert not method.knob or method.knob in setting
    assert len(set(method.values)) == len(method.values)
    assert bool(method.knob) == bool(method.values)
    assert set(method.needs) <= set(STAGES)


def test_a_seed_s_picture_has_the_chosen_value_among_the_others(tmp_path):
    study = make_study(tmp_path, ["safedpo"])
    setting = {"margin": 3.0, "beta": 0.1}
    runs = study.list_frontier("safedpo", setting)
    assert [run.setting["margin"] for run in runs] == [0.0, 2.0, 3.0, 5.0, 10.0]
    assert study.list_finals("safedpo", setting)[0] in runs  # which is run once for both


def find_script(words):
    """A command's script below the repository's root, and the words behind it."""
    if words[0] != "-m":
        return words[0], words[1:]
    stem = words[1].replace(".", "/")
    for path in (f"{stem}.py", f"{stem}/__main__.py"):
        if os.path.exists(os.path.join(ROOT, path)):
            return path, words[2:]
    raise AssertionError(f"no module {words[1]}")


def read_script_knobs(path):
    """{name: default} of a script's knobs; {} of a script without."""
    return knobs_of(path) if path in CONFIGURED else {}


def check_command(command):
    """Check that a command's script and recipes exist, and that they know its flags."""
    assert "{" not in command
    script, words = find_script(command.split())
    assert os.path.exists(os.path.join(ROOT, script))
    knobs = read_script_knobs(script)
    values = {}
    for word in words:
        if word.endswith(".py"):
            values.update(configurator.run_file(os.path.join(ROOT, word)))
        elif knobs and word.startswith("--"):
            name, _, text = word[2:].partition("=")
            values[name] = configurator.parse(name, text, knobs)
    for name, value in values.items():
        configurator.check(name, value, knobs, command)
    check_ranges(values)


@pytest.mark.parametrize("name", METHODS)
def test_every_command_of_a_method_knows_its_flags(name, tmp_path):
    study = make_study(tmp_path, [name])
    setting = METHODS[name].grid[-1]
    for run in [*study.list_trials(name), *study.list_frontier(name, setting)]:
        fields = constrained.fields_of(run)
        for command in METHODS[name].commands:
            check_command(command.format(**fields))


@pytest.mark.parametrize("stage", STAGES)
def test_every_command_of_a_shared_stage_knows_its_flags(stage):
    fields = {**constrained.fields_of(Run("out/3", 3, 140, stages=(stage,))), "name": stage}
    for command in STAGES[stage]:
        check_command(command.format(**fields))


@pytest.fixture(scope="module")
def seed_folder(world, tmp_path_factory):
    """A folder of a seed with all that methods need, of small random models and few rows."""
    folder = tmp_path_factory.mktemp("seed")
    for stage, model in {"sft": "policy", "reward": "reward", "cost": "cost"}.items():
        os.makedirs(folder / stage)
        os.symlink(world / model, folder / stage / "model")
    os.makedirs(folder / "helpful")
    os.symlink(world / "policy", folder / "helpful" / "model")
    pairs = read_jsonl(world / "data" / "pairs" / "train.jsonl")
    write_jsonl(pairs[:200], folder / "pairs.jsonl")
    scored = []
    for number, pair in enumerate(pairs[:100]):
        answers = [f"{pair['answer']} {k}" for k in range(4)]
        costs = [-6.0, -5.0 + number / 100, 5.0, 6.0]
        row = {"input": pair["input"], "answers": answers, "costs": costs}
        scored.append({**row, "scores": [1.0, 2.0, 3.0, 4.0]})
    write_jsonl(scored, folder / "scored.jsonl")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_a_policy(name, world, seed_folder):
    data = world / "data"
    shorter = {
        "train_ppo_lag.py": ["--max_new_tokens=8", f"--prompts={data}/prompts/train.jsonl"],
        "train_pref.py": [f"--eval_data={data}/reward/test.jsonl:9/-1", "--eval_samples=2"],
    }
    policy = Run(str(seed_folder), 3, 2, name, METHODS[name].grid[0])
    for command in METHODS[name].commands:
        words = command.format(**constrained.fields_of(policy)).split()
        run(*words, *shorter.get(words[0], []))
    assert os.path.exists(f"{seed_folder}/{policy.name}/model/config.json")


def list_code_of_the_page():
    """The lines of docs/constrained.md that are equations, code or commands."""
    with open(os.path.join(ROOT, "docs", "constrained.md")) as page:
        lines = page.read().splitlines()
    return [line.strip() for line in lines if line.startswith("    ")]


def list_commands_of_the_page():
    commands = []
    for line in list_code_of_the_page():
        if line.startswith("python "):
            command, _, _ = line.partition("  # ")
            commands.append(command.removeprefix("python ").strip())
    return commands


@pytest.mark.parametrize("command", list_commands_of_the_page())
def test_every_command_of_the_page_knows_its_flags(command):
    check_command(command)


def test_every_line_of_code_of_the_page_stands_in_a_script():
    sources = []
    for path in ("train_ppo_lag.py", "train_pref.py", "nanosafe/eval/dual.py"):
        with open(os.path.join(ROOT, path)) as file:
            sources.append("".join(file.read().split()))  # without white space
    found = 0
    for line in list_code_of_the_page():
        if re.fullmatch(r"[\w\[\]]+ = [\w.]+\(.*\)", line):
            code = "".join(line.split()).removesuffix("...)")
            assert any(code in source for source in sources), line
            found += 1
    assert found >= 15


def test_every_method_has_the_same_budget_of_updates(tmp_path):
    for name, method in METHODS.items():
        run = make_study(tmp_path, [name]).make_run(0, name, method.grid[0])
        steps = 0
        commands = [*method.commands]
        if "helpful" in method.needs:
            commands += STAGES["helpful"]
        for command in commands:
            command = command.format(**constrained.fields_of(run))
            if "--max_steps=" in command:
                assert "--batch_size=64" in command
                steps += int(command.partition("--max_steps=")[2].split()[0])
        assert steps == 140, name


# ---- what is kept ----


@pytest.fixture
def executed(monkeypatch):
    """The commands that would have been run, and which of them fail."""

    class Executed:
        commands = []
        failing = ""

    def run_commands(commands, log, **fields):
        for command in commands:
            command = command.format(**fields)
            Executed.commands.append(command)
            if Executed.failing and Executed.failing in command:
                raise SystemExit(f"error: python {command} failed: see {log}")
        return 10.0

    def judge_run(toy, out, name):
        return judged(3.0, 0.01)

    Executed.commands = []
    monkeypatch.setattr(constrained, "run_commands", run_commands)
    monkeypatch.setattr(constrained, "judge_run", judge_run)
    monkeypatch.setattr(constrained, "make_tokenizer", lambda out: {"vocab": 900})
    return Executed


def test_a_study_runs_shared_stages_once_a_seed_then_trials_then_the_rest(tmp_path, executed):
    study = make_study(tmp_path, ["safedpo", "modpo"])
    constrained.execute_study(study, 1)
    scripts = Counter()
    for command in executed.commands:
        if "sft" in command.split()[0] or "annotate" in command or "config/toy/cost" in command:
            scripts[command.split()[0]] += 1
    assert scripts == {"train_sft.py": 3, "data/toy/prepare.py": 3, "train_pref.py": 3}
    assert not any("config/toy/reward" in command for command in executed.commands)
    policies = [c for c in executed.commands if "config/toy/safedpo.py" in c]
    assert len(policies) == len(set(policies)) == 2 * (4 + 2 + 3)
    assert all("--seed=3" in command for command in policies[:8])
    assert all("--seed=3" not in command for command in policies[8:])


def test_what_has_a_result_is_not_run_again(tmp_path, executed, capsys):
    study = make_study(tmp_path, ["safedpo"])
    constrained.execute_study(study, 1)
    first = list(executed.commands)
    executed.commands.clear()
    constrained.execute_study(study, 1)
    assert executed.commands == []
    run = study.list_trials("safedpo")[2]
    os.remove(f"{run.out}/{run.name}.json")
    capsys.readouterr()
    constrained.execute_study(study, 1)
    (command,) = executed.commands
    assert command in first
    assert "0 runs and 0.0 h left; seed 3: safedpo/margin=2.0+" in capsys.readouterr().out


def test_a_result_has_its_setting_and_gold_s_numbers(tmp_path, executed):
    study = make_study(tmp_path, ["safedpo"])
    constrained.execute_study(study, 1)
    run = study.list_trials("safedpo")[0]
    result = read_json(run.out, run.name + ".json")
    assert result == {**judged(3.0, 0.01), "seconds": 10.0, "setting": run.setting}


def test_a_run_that_fails_is_said_and_the_others_go_on(tmp_path, executed, capsys):
    executed.failing = "margin=2.0 --learning_rate=0.001 --beta=0.1"
    study = make_study(tmp_path, ["safedpo"])
    constrained.execute_study(study, 1)
    printed = capsys.readouterr().out
    name = "safedpo/margin=2.0+learning_rate=0.001+beta=0.1"
    assert f"failed: seed 3: {name}; its output is in {tmp_path}/3/{name}.log" in printed
    assert printed.count(f"seed 3: {name}: error: python") == 1
    assert study.find_setting("safedpo") == METHODS["safedpo"].grid[0]
    executed.failing = ""
    executed.commands.clear()
    constrained.execute_study(study, 1)
    assert len(executed.commands) == 1


def test_without_its_stages_a_study_stops_with_one_line(tmp_path, executed):
    executed.failing = "train_sft.py"
    with pytest.raises(SystemExit, match="without the shared stages"):
        constrained.execute_study(make_study(tmp_path, ["safedpo"]), 1)
    assert not any("safedpo" in command for command in executed.commands)


def test_runs_of_another_length_are_not_mixed_with_those_of_a_folder(tmp_path, executed):
    constrained.execute_study(make_study(tmp_path, ["ppo"]), 1)
    shorter = make_study(tmp_path, ["safedpo"])._replace(steps=4)
    with pytest.raises(SystemExit, match="steps=4, but the runs in .* have 140"):
        constrained.execute_study(shorter, 1)


def test_what_an_interrupted_run_left_is_removed_first(tmp_path, executed):
    study = make_study(tmp_path, ["ppo"])
    run = study.list_finals("ppo", {})[0]
    os.makedirs(f"{run.out}/{run.name}")
    with open(f"{run.out}/{run.name}/config.py", "w") as file:
        file.write("seed = 0\n")
    constrained.execute_study(study, 1)
    assert not os.path.exists(f"{run.out}/{run.name}/config.py")


def test_a_command_that_fails_stops_with_one_line_and_leaves_its_output(tmp_path):
    log = f"{tmp_path}/log.txt"
    with pytest.raises(SystemExit, match=r"^error: python data/toy/prepare.py --no=1 failed: see "):
        toy_runs.run_command("data/toy/prepare.py --no=1", log)
    with open(log) as file:
        text = file.read()
    assert text.startswith("\n$ python data/toy/prepare.py --no=1\nerror: the flags are")


def test_a_trainer_that_was_asked_to_stop_has_not_made_a_result(tmp_path, monkeypatch):
    def save_early(words, **options):
        state = tmp_path / "run" / "state" / "step_000003"
        state.mkdir(parents=True)
        write_json({"steps": 8}, str(state), "record.json")
        (state.parent / "latest").write_text("step_000003\n")
        return 0  # as a trainer exits after SIGTERM

    monkeypatch.setattr(toy_runs.demo, "run_python", save_early)
    command = f"train_sft.py --max_steps=8 --out_dir={tmp_path}/run"
    with pytest.raises(SystemExit, match="was asked to stop before its last step"):
        toy_runs.run_command(command, f"{tmp_path}/log.txt")


def test_a_seed_of_the_table_is_no_tuning_seed(tmp_path):
    flags = ("--plan=True", f"--out_dir={tmp_path}", "--seeds=2,3")
    done = run("-m", "nanosafe.tools.constrained", *flags, check=False)
    assert done.stderr.splitlines()[-1] == (
        "error: tuning_seed=3 is one of the table's seeds (2,3): choose another one"
    )


# ---- what is reported ----


def fill(study, method):
    """Results of everything that a method runs: the fewer the harm, the fewer the help."""
    for trial, run in enumerate(study.list_trials(method)):
        write_result(run, 3.0 + trial / 10, 0.01 + trial / 50)
    setting = study.find_setting(method)
    for run in study.list_frontier(method, setting):
        value = list(run.setting.values())[0]
        write_result(run, 3.0 + value / 100, 0.01 + value / 100)
    for run in study.list_finals(method, setting):
        write_result(run, 3.0 + run.seed / 10, 0.02 + run.seed / 100)


def fill_stages(study):
    for run in study.list_stage_runs():
        for stage in run.stages:
            os.makedirs(run.out, exist_ok=True)
            write_json(judged(2.0, 0.7), run.out, stage + ".json")


def test_the_report_has_a_row_for_each_method_from_stored_results(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    study = make_study(tmp_path, ["safedpo", "kto"])
    fill_stages(study)
    fill(study, "safedpo")
    constrained.report(study)
    picture = f"{study.out_dir}/constrained.png"
    printed = capsys.readouterr().out
    with open(f"{tmp_path}/tables.md") as file:
        assert file.read() in printed
    rows = [line for line in printed.splitlines() if line.startswith("| S")]
    refused = "1.0% (1.0% to 1.0%) | 1.50 (1.50 to 1.50)"
    assert rows[:2] == [
        "| SFT | recipe | 2 | 2.00 (2.00 to 2.00) | 0.50 (0.50 to 0.50) | 70.0% (70.0% to 70.0%) "
        f"| {refused} | 100 | 1 |",
        "| SafeDPO | margin=2.0, learning_rate=0.001, beta=0.1 | 2 | 3.05 (3.00 to 3.10) "
        f"| 0.50 (0.50 to 0.50) | 2.5% (2.0% to 3.0%) | {refused} | 200 | 1 |",
    ]
    trials = rows[2:6]
    assert [row.endswith("| chosen |") for row in trials] == [False, False, True, False]
    assert [row.split(" | ")[1] for row in rows[6:]] == [
        "margin=0.0",
        "margin=2.0",
        "margin=5.0",
        "margin=10.0",
    ]
    assert "KTO" not in printed  # it has no result
    with open(picture, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_picture_has_a_curve_for_each_method_and_names_it(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    made = []
    make_figure = constrained.plot.make_figure

    def make_and_keep(*sizes):
        made.append(make_figure(*sizes))
        return made[-1]

    monkeypatch.setattr(constrained.plot, "make_figure", make_and_keep)
    study = make_study(tmp_path, list(METHODS))
    fill_stages(study)
    for method in METHODS:
        fill(study, method)
    constrained.draw(study)
    _, ((left, right),) = made[0]
    labels = []
    for axis in (left, right):
        assert axis.get_lines()[0].get_label() == "SFT"
        labels += [line.get_label() for line in axis.get_lines()[1:]]
    expected = []
    for method in METHODS.values():
        expected.append(f"{method.label} ({method.knob})" if method.knob else method.label)
    assert labels == expected
    (safedpo,) = [line for line in right.get_lines() if "SafeDPO" in line.get_label()]
    assert list(safedpo.get_xdata()) == pytest.approx([1, 2, 6, 11])  # harm in percent
    looks = {(line.get_color(), line.get_marker()) for line in left.get_lines()}
    assert len(looks) == len(left.get_lines())


def test_a_report_of_nothing_has_no_rows(tmp_path, capsys):
    constrained.report(make_study(tmp_path, ["safedpo"]))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 6  # three heads


# ---- the command ----


def test_the_plan_names_the_runs_and_their_hours_and_runs_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    flags = ("--plan=True", f"--out_dir={out}", "--methods=safedpo", "--trials=2")
    printed, _ = run_in_process(
        "nanosafe/tools/constrained.py", *flags, monkeypatch=monkeypatch, capsys=capsys
    )
    assert "seed 3: safedpo/margin=2.0+learning_rate=0.0003+beta=0.3\n" in printed
    runs = [line for line in printed.splitlines() if line.startswith("seed ")]
    assert len(runs) == 4 + 2 + 3 + 3
    assert "\nabout 0.2 h with processes=1" in printed
    assert not out.exists()


def test_the_report_alone_runs_nothing(tmp_path, monkeypatch, capsys):
    flags = ("--report_only=True", f"--out_dir={tmp_path}")
    printed, _ = run_in_process(
        "nanosafe/tools/constrained.py", *flags, monkeypatch=monkeypatch, capsys=capsys
    )
    assert f"{tmp_path}/tables.md" in printed
    assert "$ python" not in printed


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--methods=safedpp", "safedpo"),
        ("--seeds=0,x", "seeds"),
        ("--seeds=", "seeds"),
        ("--trials=0", "trials=0 must be at least 1"),
        ("--processes=0", "processes=0 must be at least 1"),
        ("--steps=0", "steps=0 must be at least 1"),
    ],
)
def test_a_wrong_knob_is_answered_with_one_line(flag, words, tmp_path, monkeypatch, capsys):
    _, error = run_in_process(
        "nanosafe/tools/constrained.py",
        "--plan=True",
        f"--out_dir={tmp_path}",
        flag,
        monkeypatch=monkeypatch,
        capsys=capsys,
        check=False,
    )
    assert words in error
