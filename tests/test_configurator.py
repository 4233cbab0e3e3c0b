"""The knob contract, point by point."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = '''"""A script.
$ python script.py"""
import time
from configurator import configure, save
learning_rate = 1e-5  # peak learning rate
steps = 100  # optimizer steps
name = "run"  # what to call it
compile = False  # whether to compile
config = configure(globals())
out = steps * 2
save(config, "saved.py")
print("RESULT", learning_rate, steps, name, compile, out, time.__name__)
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def call(*args, **files):
        for file, text in files.items():
            (tmp_path / f"{file}.py").write_text(text)
        done = subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": ROOT},
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        return done.returncode, lines

    return call


def result(lines):
    return lines[-1].removeprefix("RESULT ")


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--learning_rate=1", "1.0 100 run False 200 time"),
        ("--steps=1e3", "1e-05 1000 run False 2000 time"),
        ("--steps=0", "1e-05 0 run False 0 time"),
        ("--name=a=b", "1e-05 100 a=b False 200 time"),
        ("--name=123", "1e-05 100 123 False 200 time"),
        ("--name=", "1e-05 100  False 200 time"),
        ("--compile=true", "1e-05 100 run True 200 time"),
        ("--compile=0", "1e-05 100 run False 200 time"),
    ],
)
def test_flags_are_read_by_the_default_s_type(script, flag, value):
    code, lines = script(flag)
    assert code == 0 and result(lines) == value


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--learning_rat=1", "unknown knob 'learning_rat'; did you mean 'learning_rate'?"),
        ("--steps", "flags are written --key=value"),
        ("steps=3", "neither a config file (*.py) nor a flag"),
        ("--steps=1.5", "steps takes a whole number"),
        ("--steps=inf", "steps takes a whole number"),
        ("--learning_rate=fast", "learning_rate takes a number"),
        ("--compile=maybe", "compile takes true, false, 1 or 0"),
        ("--time=3", "unknown knob 'time'"),
        ("--__name__=x", "unknown knob '__name__'"),
        ("nowhere.py", "config file 'nowhere.py' does not exist"),
    ],
)
def test_mistakes_stop_with_one_line(script, flag, words):
    code, lines = script(flag)
    assert code == 1 and len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat = 1e-3", "did you mean 'learning_rate'?"),
        ("learning_rate = '1e-3'", "learning_rate must be float, given '1e-3'"),
        ("compile = 1", "compile must be bool"),
        ("steps = True", "steps must be int"),
        ("time = 3", "unknown knob 'time'"),
        ("steps = batch * 2", "a config file holds constants"),
        ("steps = (", "line 1"),
    ],
)
def test_mistakes_in_a_file_stop_with_one_line(script, text, words):
    code, lines = script("c.py", c=text)
    assert code == 1 and len(lines) == 1 and words in lines[0]


def test_files_from_left_to_right_then_flags_wherever_they_stand(script):
    a, b = "steps = 1e3\nlearning_rate = 1\n", "import math\nsteps = int(math.pow(2, 3))\n"
    assert result(script("a.py", "b.py", a=a, b=b)[1]) == "1.0 8 run False 16 time"
    assert result(script("b.py", "a.py", a=a, b=b)[1]) == "1.0 1000 run False 2000 time"
    assert result(script("--steps=7", "a.py", "b.py", a=a, b=b)[1]) == "1.0 7 run False 14 time"


def test_origin_is_printed_and_the_saved_file_reads_back(script, tmp_path):
    code, lines = script("a.py", '--name=it\'s "x"\\', a="steps = 5\n")
    assert any("steps" in line and "(a.py)" in line for line in lines)
    saved = (tmp_path / "saved.py").read_text()
    code, again = script("saved.py")
    assert code == 0 and result(again) == result(lines)
    assert (tmp_path / "saved.py").read_text() == saved


def test_help_shows_every_knob_with_default_and_comment(script):
    code, lines = script("-h")
    text = "\n".join(lines)
    assert code == 0 and "$ python script.py" in text and "learning_rate = 1e-05" in text
    assert "peak learning rate" in text and 'name = "run"' in text and "RESULT" not in text


def test_knobs_of_another_module_are_the_script_s_as_well(script, tmp_path):
    (tmp_path / "common.py").write_text(
        "import os\nseed = 0  # of what is drawn\nLIMIT = 3\n\ndef f(seed):\n    x = seed\n"
    )
    text = SCRIPT.replace("import time", "import time, common").replace(
        "globals()", "globals(), vars(common)"
    )
    (tmp_path / "script.py").write_text(
        text.replace('print("RESULT"', 'print("RESULT", config["seed"], seed')
    )
    assert result(script("--seed=3", "--steps=7")[1]) == "3 3 1e-05 7 run False 14 time"
    assert (
        "of what is drawn" in "\n".join(script("-h")[1])
        and "seed takes a whole number" in script("--seed=x")[1][0]
    )
    assert (
        "unknown knob 'LIMIT'" in script("--LIMIT=1")[1][0]
        and "seed = 3" in (tmp_path / "saved.py").read_text()
    )


@pytest.mark.parametrize("default", ["None", "(1, 2)", "[1]"])
def test_defaults_without_a_type_to_read_by_are_refused(script, tmp_path, default):
    text = SCRIPT.replace("steps = 100", f"top = {default}\nsteps = 100")
    (tmp_path / "script.py").write_text(text)
    code, lines = script()
    assert code == 1 and "'top'" in lines[0]
