"""Pictures and the page from runs' folders; what a run says of itself while it goes wrong."""

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from conftest import run

from nanosafe.tools import plot
from nanosafe.monitor import Watch

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


def rows(n=20, **ends):
    """n rows that go from GOOD to GOOD with `ends`, evenly."""
    return [
        {"step": i, **GOOD, **{k: GOOD[k] + (v - GOOD[k]) * i / (n - 1) for k, v in ends.items()}}
        for i in range(n)
    ]


def said(rows, knobs=KNOBS):
    watch = Watch(knobs)
    return [(row["step"], text) for row in rows for text in watch.see(row)]


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
    ),
)
def test_what_goes_wrong_is_said_once_with_what_to_do(ends, words, advice):
    found = said([*rows(**ends), *[{**rows(**ends)[-1], "step": 20 + i} for i in range(30)]])
    assert len(found) == 1 and words in found[0][1] and advice in found[0][1]
    assert 9 <= found[0][0] < 30 and "\n" not in found[0][1]


def test_a_good_run_and_other_runs_hear_nothing():
    assert said(rows(50, reward=4.0, cost=-3.0, kl=3.0, length=25.0)) == []
    assert said([{"step": i, "loss": 3.0 - i / 10, "grad_norm": 1.0} for i in range(20)]) == []
    plain = [
        {k: v for k, v in row.items() if k not in ("lambda", "slack", "cost", "episode_cost")}
        for row in rows()
    ]
    assert said(plain, {}) == []
    assert (
        said([{**row, "ratio": 0.0, "clip_fraction": 0.0} for row in rows(12)] + rows(30)[10:])
        == []
    )  # critics first


def test_a_trainer_says_it_and_does_not_repeat_itself_after_a_resume(world, tmp_path):
    flags = [
        f"--prompts={world}/data/prompts/train.jsonl",
        f"--actor_model={world}/policy",
        f"--reward_model={world}/reward",
        f"--cost_model={world}/cost",
        "--rollout_size=4",
        "--batch_size=4",
        "--max_new_tokens=4",
        "--max_len=64",
        f"--out_dir={tmp_path}/run",
        "--cost_limit=-50",
        "--lambda_max=1.0",
        "--lambda_lr=1.0",
        "--save_interval=0",
    ]
    first = run("train_ppo_lag.py", *flags, "--max_steps=12")
    assert (
        first.stderr.count("lambda is at its cap, 1, and the cost still") == 1
        and "warning at step 9" in first.stderr
    )
    again = run("train_ppo_lag.py", *flags, "--max_steps=30", "--resume=True")
    assert "lambda is at its cap" not in again.stderr


def test_log_to_what_is_not_there_is_one_line(world, tmp_path):
    flags = [
        f"--prompts={world}/data/prompts/train.jsonl",
        f"--actor_model={world}/policy",
        f"--reward_model={world}/reward",
        "--cost_model=",
        "--rollout_size=4",
        "--batch_size=4",
        "--max_new_tokens=4",
        "--max_len=64",
        "--max_steps=1",
    ]
    for name, words in (("wandb", "pip install wandb"), ("mlflow", "choose tensorboard or wandb")):
        done = run(
            "train_ppo_lag.py",
            *flags,
            f"--log_to={name}",
            f"--out_dir={tmp_path}/{name}",
            check=False,
        )
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


# ---- pictures ----


@pytest.fixture
def runs(tmp_path):
    """Folders as trainers leave them: two of PPO-Lag, one of preferences with a value that is no number."""
    for name, ends in (
        ("lag", {"reward": 3.0, "cost": -2.0, "lambda": 2.0}),
        ("hot", {"kl": 40.0}),
    ):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows(30, **ends)) + '{"step": 30, "rew'
        )
        (folder / "samples.jsonl").write_text(
            json.dumps(
                {
                    "step": 0,
                    "prompt": "USER: </script><b>Hi</b>",
                    "response": f"Hello from {name} </script>",
                    "reward": 1.0,
                    "cost": 2.0,
                }
            )
            + "\n"
        )
        (folder / "config.py").write_text("cost_limit = -1.0\nlambda_max = 5.0\n")
    other = tmp_path / "runs" / "pref"
    other.mkdir()
    (other / "metrics.jsonl").write_text(
        '{"step": 0, "loss": 1.0}\n{"step": 1, "loss": NaN}\n{"step": 2, "loss": 0.5, "eval_loss": 0.7}\n'
    )
    return tmp_path / "runs"


def test_curves_are_drawn_and_svg_is_svg(runs, tmp_path):
    out = run(
        "-m",
        "nanosafe.plot",
        *(runs / name for name in ("lag", "hot", "pref")),
        f"--out={tmp_path}/out",
    ).stdout
    assert "3 runs" in out
    for name in ("curves", "plane"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert ET.parse(tmp_path / "out" / f"{name}.svg").getroot().tag.endswith("svg")


def test_mistakes_are_one_line(runs, tmp_path):
    for command, words in (
        ([tmp_path], "no metrics.jsonl"),
        ([], "RUN"),
        ([runs / "lag", "--htlm"], "RUN"),
        ([runs / "lag", f"--out={runs}/lag/config.py"], "cannot be"),
    ):
        done = run("-m", "nanosafe.plot", *command, check=False)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def test_the_page_holds_everything_and_nothing_runs_away(runs, tmp_path):
    run(
        "-m",
        "nanosafe.plot",
        *(runs / name for name in ("lag", "hot", "pref")),
        "--html",
        f"--out={tmp_path}/out",
    )
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("</script>") == 2 and "http" not in page.replace(
        "http://www.w3.org/2000/svg", ""
    )
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert [r["name"] for r in data] == ["lag", "hot", "pref"] and len(data[0]["rows"]) == 30
    assert (
        data[0]["warnings"] == []
        and "KL runs away" in data[1]["warnings"][0]
        and data[2]["rows"][1]["loss"] is None
    )


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_page_opens_in_a_browser(runs, tmp_path):
    run(
        "-m",
        "nanosafe.plot",
        *(runs / name for name in ("lag", "hot", "pref")),
        "--html",
        f"--out={tmp_path}/out",
    )
    page = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=2000",
            "--dump-dom",
            f"file://{tmp_path}/out/index.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert (
        page.count('class="curve"') > 10
        and "<figcaption>lambda</figcaption>" in page
        and "KL runs away" in page
    )
    assert (
        "Hello from lag &lt;/script&gt;" in page
        and "&lt;b&gt;Hi&lt;/b&gt;" in page
        and '<span class="unsafe">cost 2' in page
    )


def test_odd_runs_are_drawn_and_never_executed(runs, tmp_path):
    folder = runs / "$odd$ run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        'null\n{"step": 0, "reward": 1.0, "ratio": 2.0, "note": "x"}\n'
        '{"step": 1, "reward": null, "lambda": 5.0}\n{"step": 2, "reward": 2.0}\n'
    )
    (folder / "samples.jsonl").write_text(
        'null\n{"step": 0, "prompt": "p", "extra": {"toString": 1}}\n'
    )
    out = run(
        "-m", "nanosafe.plot", folder, runs / "lag", runs / "typo", f"--out={tmp_path}/out"
    ).stdout
    assert "2 runs" in out and "left out" in out and "typo" in out
    run("-m", "nanosafe.plot", folder, "--html", f"--out={tmp_path}/out")
    (folder / "config.py").write_text(f"cost_limit = open('{tmp_path}/owned', 'w')\n")
    done = run("-m", "nanosafe.plot", folder, f"--out={tmp_path}/out", check=False)
    assert (
        done.returncode == 1
        and "Traceback" not in done.stderr
        and not (tmp_path / "owned").exists()
    )


def test_no_matplotlib_is_a_word(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in plot.scores(
        {"a": [1.0]}, {}, str(tmp_path)
    ) and not os.listdir(tmp_path)
