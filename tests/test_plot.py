"""Pictures and the page made from runs' folders, and the warnings of a run that goes wrong."""

import json
import math
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from conftest import run

from nanosafe.monitor import Watch
from nanosafe.tools import plot

KNOBS = {"lambda_max": 5.0, "cost_limit": -1.0}
GOOD = {
    "reward": 1.0,
    "kl": 1.0,
    "length": 20.0,
    "eos_rate": 1.0,
    "lambda": 1.0,
    "slack": 0.5,
    "ratio": 1.0,
    "clip_fraction": 0.05,
    "cost": -1.0,
    "episode_cost": -1.5,
}


def make_rows(count=20, **ends):
    """Rows of metrics that go evenly from GOOD to GOOD with `ends`."""
    rows = []
    for i in range(count):
        row = {"step": i, **GOOD}
        for name, end in ends.items():
            row[name] = GOOD[name] + (end - GOOD[name]) * i / (count - 1)
        rows.append(row)
    return rows


def warnings_of(rows, knobs=KNOBS):
    """The (step, sentence) pairs that a run with these rows prints."""
    watch = Watch(knobs)
    warnings = []
    for row in rows:
        for sentence in watch.see(row):
            warnings.append((row["step"], sentence))
    return warnings


# ---- warnings ----


@pytest.mark.parametrize(
    "ends, words, advice",
    (
        ({"kl": 40.0}, "KL runs away", "kl_coef"),
        ({"eos_rate": 0.2}, "fewer responses end", "max_new_tokens"),
        ({"lambda": 5.0, "slack": -1.0}, "lambda is at its cap", "lambda_max"),
        ({"length": 60.0, "reward": 3.0}, "reward rises with length", "samples.jsonl"),
        ({"ratio": 1.9}, "updates leave the rollout's policy", "actor_learning_rate"),
        ({"clip_fraction": 0.8}, "updates leave the rollout's policy", "ppo_epochs"),
        ({"length": 1.0, "kl": 0.1}, "responses are empty", "kl_coef"),
    ),
)
def test_each_fault_is_reported_once_with_advice(ends, words, advice):
    rows = make_rows(**ends)
    last = rows[-1]
    for step in range(20, 50):
        rows.append({**last, "step": step})
    warnings = warnings_of(rows)
    assert len(warnings) == 1
    step, sentence = warnings[0]
    assert words in sentence and advice in sentence
    assert 9 <= step < 30 and "\n" not in sentence


def test_a_second_lambda_at_its_cap_is_reported_with_its_name():
    rows = make_rows()
    for row in rows:
        row.update({"lambda_2": 5.0, "slack_2": -0.25})
    (warning,) = warnings_of(rows)
    assert "lambda_2 is at its cap, 5, and the cost still 0.25 above" in warning[1]


def test_a_good_run_gets_no_warning():
    assert warnings_of(make_rows(50, reward=4.0, cost=-3.0, kl=3.0, length=25.0)) == []


def test_a_policy_that_is_empty_from_the_first_step_is_reported():
    empty = {"length": 1.02, "kl": 0.1}
    rows = [{**row, **empty} for row in make_rows(12)]
    assert ["responses are empty: at least 98%" in text for _, text in warnings_of(rows)] == [True]


def test_responses_of_one_token_that_are_cut_are_not_called_empty():
    rows = [{**row, "length": 1.0, "kl": 0.1, "eos_rate": 0.1} for row in make_rows(12)]
    assert warnings_of(rows) == []


@pytest.mark.parametrize("gap", [math.nan, math.inf, None])
def test_numbers_that_are_not_finite_do_not_hide_a_fault(gap):
    """A run has nan where it is logged, and None where it is read from metrics.jsonl."""
    rows = make_rows(kl=40.0)
    for name in ("kl", "length", "ratio", "slack"):
        rows[1][name] = gap
        rows[-1][name] = gap
    (warning,) = warnings_of(rows)
    assert "KL runs away" in warning[1]
    for row in rows:
        row.update(dict.fromkeys(GOOD, gap))
    assert warnings_of(rows) == []


def test_supervised_training_gets_no_warning():
    rows = [{"step": i, "loss": 3.0 - i / 10, "grad_norm": 1.0} for i in range(20)]
    assert warnings_of(rows) == []


def test_ppo_without_a_cost_gets_no_warning():
    rows = make_rows()
    for row in rows:
        for name in ("lambda", "slack", "cost", "episode_cost"):
            del row[name]
    assert warnings_of(rows, {}) == []


def test_the_warm_up_of_critics_gets_no_warning():
    warm_up = [{**row, "ratio": 0.0, "clip_fraction": 0.0} for row in make_rows(12)]
    assert warnings_of(warm_up + make_rows(30)[10:]) == []


def ppo_command(world):
    return [
        "train_ppo_lag.py",
        f"--prompts={world}/data/prompts/train.jsonl",
        f"--actor_model={world}/policy",
        f"--reward_model={world}/reward",
        "--rollout_size=4",
        "--batch_size=4",
        "--max_new_tokens=4",
        "--max_len=64",
    ]


def test_a_trainer_warns_and_does_not_repeat_itself_after_a_resume(world, tmp_path):
    command = [
        *ppo_command(world),
        f"--cost_model={world}/cost",
        f"--out_dir={tmp_path}/run",
        "--cost_limit=-50",
        "--lambda_max=1.0",
        "--lambda_lr=1.0",
        "--actor_lr_schedule=constant",  # so that a run may go on longer
        "--save_interval=0",
    ]
    first = run(*command, "--max_steps=12")
    assert first.stderr.count("lambda is at its cap, 1, and the cost still") == 1
    assert "warning at step 9" in first.stderr
    again = run(*command, "--max_steps=30", "--resume=True")
    assert "lambda is at its cap" not in again.stderr


@pytest.mark.parametrize(
    "sink, words", [("wandb", "pip install wandb"), ("mlflow", "choose one of tensorboard, wandb")]
)
def test_an_unusable_log_to_is_one_line(sink, words, world, tmp_path):
    done = run(
        *ppo_command(world),
        "--cost_model=",
        "--max_steps=1",
        f"--log_to={sink}",
        f"--out_dir={tmp_path}/run",
        check=False,
    )
    assert done.returncode == 1
    assert words in done.stderr and "Traceback" not in done.stderr


# ---- pictures ----


@pytest.fixture
def runs(tmp_path):
    """Folders as trainers leave them: two of PPO-Lag, which end in half a row, and one of
    preferences, with losses that are not finite, as they are written today and once were."""
    folder = tmp_path / "runs"
    write_ppo_run(folder / "lag", make_rows(30, reward=3.0, cost=-2.0, **{"lambda": 2.0}))
    write_ppo_run(folder / "hot", make_rows(30, kl=40.0))
    (folder / "pref").mkdir()
    (folder / "pref" / "metrics.jsonl").write_text(
        '{"step": 0, "loss": 1.0}\n'
        '{"step": 1, "loss": NaN}\n'
        '{"step": 2, "loss": 0.5, "eval_loss": 0.7}\n'
        '{"step": 3, "loss": null}\n'
    )
    (folder / "pref" / "samples.jsonl").write_text('{"step": 0, "reward": NaN}\n')
    return folder


def write_ppo_run(folder, rows):
    folder.mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 30, "rew')
    sample = {
        "step": 0,
        "prompt": "USER: </script><b>Hi</b>",
        "response": f"Hello from {folder.name} </script>",
        "reward": 1.0,
        "cost": 2.0,
    }
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "config.py").write_text("cost_limit = -1.0\nlambda_max = 5.0\n")


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def plot_runs(*arguments):
    return run("-m", "nanosafe.plot", *arguments)


def write_page(runs, out):
    plot_runs(runs / "lag", runs / "hot", runs / "pref", "--html", f"--out={out}")
    return out / "index.html"


def test_curves_are_drawn_and_svg_is_svg(runs, tmp_path):
    out = tmp_path / "out"
    done = plot_runs(runs / "lag", runs / "hot", runs / "pref", f"--out={out}")
    assert "3 runs" in done.stdout
    for name in ("curves", "plane"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert ET.parse(out / f"{name}.svg").getroot().tag.endswith("svg")


def dotted_lines_of(folder, monkeypatch):
    """{title of a panel: where its dotted lines are} of a run's pictures."""
    figures = []

    def keep_figure(figure, out_dir, name):
        figures.append(figure)
        return ""

    monkeypatch.setattr(plot, "save_figure", keep_figure)
    shown = {**plot.read_run(str(folder), "run"), "colour": plot.RED}
    plot.draw_curves([shown], "")
    plot.draw_plane([shown], "")
    found = {}
    for figure in figures:
        for axis in figure.axes:
            positions = []
            for line in axis.lines:
                if line.get_linestyle() == ":":
                    ends = line.get_ydata() if line.get_xdata()[0] == 0 else line.get_xdata()
                    positions.append(ends[0])
            if positions:
                found[axis.get_title()] = positions
    return found


def test_each_of_two_costs_is_drawn_with_its_own_limit(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = make_rows(3)
    for row in rows:
        row.update({"cost_2": 7.0, "episode_cost_2": 7.5, "lambda_2": 0.5})
    write_ppo_run(tmp_path / "two", rows)
    (tmp_path / "two" / "config.py").write_text("cost_limit = [-1.0, 8.5]\n")
    assert dotted_lines_of(tmp_path / "two", monkeypatch) == {
        "mean cost (dotted: its limit)": [-1.0],
        "second mean cost (dotted: its limit)": [8.5],
        "before (hollow) and after": [-1.0],
    }


def test_the_excess_over_a_limit_for_every_answer_is_drawn_with_a_limit_of_0(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    write_ppo_run(tmp_path / "run", make_rows(3))
    (tmp_path / "run" / "config.py").write_text("cost_limit = -1.0\nconstraint = 'prompt'\n")
    lines = dotted_lines_of(tmp_path / "run", monkeypatch)
    assert lines["mean cost (dotted: its limit)"] == [0.0]
    assert lines["before (hollow) and after"] == [-1.0]


def test_a_folder_in_the_home_folder_is_written(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    plot.main([str(runs / "lag"), "--html", "--out=~/plots"])
    assert (tmp_path / "plots" / "index.html").is_file()


def test_a_curve_leaves_out_what_is_not_finite(runs):
    pref = plot.read_run(str(runs / "pref"), "pref")
    assert plot.points_of(pref, "loss") == [(0, 1.0), (2, 0.5)]


def test_help_shows_the_usage(capsys):
    plot.main(["-h"])
    assert "nanosafe.plot RUN" in capsys.readouterr().out


def test_mistakes_are_one_line(runs, tmp_path):
    lag = str(runs / "lag")
    for arguments, words in (
        ([str(tmp_path)], "no metrics.jsonl"),
        ([], "RUN"),
        ([lag, "--htlm"], "RUN"),
        ([lag, f"--out={lag}/config.py"], "cannot be"),
    ):
        with pytest.raises(SystemExit, match=words) as end:
            plot.main(arguments)
        assert "\n" not in end.value.code


def test_the_page_holds_all_runs_and_no_text_ends_its_script(runs, tmp_path):
    page = write_page(runs, tmp_path / "out").read_text()
    assert page.count("</script>") == 2
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    data = page.split('type="application/json">')[1].split("</script>")[0]
    lag, hot, pref = json.loads(data, parse_constant=refuse_constant)
    assert [lag["name"], hot["name"], pref["name"]] == ["lag", "hot", "pref"]
    assert len(lag["rows"]) == 30
    assert lag["warnings"] == []
    assert "KL runs away" in hot["warnings"][0]
    assert pref["rows"][1] == {"step": 1}
    assert pref["samples"] == [{"step": 0, "reward": None}]


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_page_opens_in_a_browser(runs, tmp_path):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    path = write_page(runs, tmp_path / "out")
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", f"file://{path}"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    page = done.stdout
    assert page.count('class="curve"') > 10
    assert "<figcaption>lambda</figcaption>" in page
    assert "KL runs away" in page
    assert "Hello from lag &lt;/script&gt;" in page
    assert "&lt;b&gt;Hi&lt;/b&gt;" in page
    assert '<span class="unsafe">cost 2' in page


@pytest.fixture
def odd_run(runs):
    """A run whose name and rows are unusual: null, texts, a nested object, missing metrics."""
    folder = runs / "$odd$ run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        "null\n"
        '{"step": 0, "reward": 1.0, "ratio": 2.0, "note": "x"}\n'
        '{"step": 1, "reward": null, "lambda": 5.0}\n'
        '{"step": 2, "reward": 2.0}\n'
    )
    (folder / "samples.jsonl").write_text(
        'null\n{"step": 0, "prompt": "p", "extra": {"toString": 1}}\n'
    )
    return folder


def test_odd_runs_are_drawn_and_folders_without_a_run_are_left_out(runs, odd_run, tmp_path, capsys):
    lag, typo, out = str(runs / "lag"), str(runs / "typo"), f"--out={tmp_path}/out"
    plot.main([str(odd_run), lag, typo, out])
    printed = capsys.readouterr().out
    assert "2 runs" in printed
    assert "left out" in printed and "typo" in printed
    plot.main([str(odd_run), "--html", out])
    assert (tmp_path / "out" / "index.html").exists()


@pytest.mark.parametrize("text", ["cost_limit = open('{owned}', 'w')\n", "cost_limit = \n", "x\n"])
def test_a_config_that_is_not_constants_is_refused_and_never_executed(text, odd_run, tmp_path):
    owned = tmp_path / "owned"
    (odd_run / "config.py").write_text(text.format(owned=owned))
    with pytest.raises(SystemExit, match="config.py") as end:
        plot.main([str(odd_run), f"--out={tmp_path}/out"])
    assert "\n" not in end.value.code
    assert not owned.exists()


def test_without_matplotlib_the_printed_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = plot.scores({"a": [1.0]}, {}, str(tmp_path))
    assert "pip install matplotlib" in written
    assert not os.listdir(tmp_path)
