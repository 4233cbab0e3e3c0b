"""The contract of the knobs, point by point."""

import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import configurator
from nanosafe.ranges import RANGES, SHARE, check_heads, check_ranges

SCRIPT = '''"""A script.
$ python script.py"""
import time
from configurator import configure, save
# optimization
learning_rate = 1e-5  # peak learning rate
steps = 100  # optimizer steps
# run
name = "run"  # what to call it
compile = False  # whether to compile
config = configure(globals())
out = steps * 2
save(config, "saved.py")
print("RESULT", learning_rate, steps, name, compile, out, time.__name__)
'''


@pytest.fixture
def script(tmp_path):
    """A function that runs SCRIPT with arguments, after it has written the config files given."""
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
        output = done.stdout + done.stderr
        return done.returncode, output.strip().splitlines()

    return call


def result(lines):
    """The values that SCRIPT printed."""
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
        ("--compile", "1e-05 100 run True 200 time"),
    ],
)
def test_a_flag_is_read_as_the_type_of_the_default(script, flag, value):
    code, lines = script(flag)
    assert code == 0
    assert result(lines) == value


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--learning_rat=1", "unknown knob 'learning_rat'; did you mean 'learning_rate'?"),
        ("--steps", "flags are written --key=value"),
        ("--compil", "unknown knob 'compil'; did you mean 'compile'?"),
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
def test_a_mistake_in_a_flag_stops_with_one_line(script, flag, words):
    code, lines = script(flag)
    assert code == 1
    assert len(lines) == 1
    assert words in lines[0]


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
def test_a_mistake_in_a_config_file_stops_with_one_line(script, text, words):
    code, lines = script("c.py", c=text)
    assert code == 1
    assert len(lines) == 1
    assert words in lines[0]


def test_an_argument_that_is_not_utf8_stops_with_one_line(script):
    """Python reads such a byte as half of a character, which nothing can write."""
    code, lines = script(b"--name=caf\xe9")
    assert code == 1
    assert len(lines) == 1
    assert "is not UTF-8" in lines[0]


@pytest.fixture
def script_with_a_folder(script, tmp_path, monkeypatch):
    """The same, with a knob out_dir in place of name; the home folder is /home/me."""
    monkeypatch.setenv("HOME", "/home/me")
    text = SCRIPT.replace('name = "run"', 'out_dir = "run"').replace(
        "steps, name,", "steps, out_dir,"
    )
    (tmp_path / "script.py").write_text(text)
    return script


@pytest.mark.parametrize(
    "path, folder",
    [
        ("~/x", "/home/me/x"),
        ("~", "/home/me"),
        ("./~/x", "./~/x"),
        ("a~b", "a~b"),
        ("~/x,y,~/z", "/home/me/x,y,/home/me/z"),
    ],
)
def test_a_tilde_that_begins_a_path_is_the_home_folder(path, folder, script_with_a_folder):
    _, lines = script_with_a_folder(f"--out_dir={path}")
    assert result(lines) == f"1e-05 100 {folder} False 200 time"
    _, lines = script_with_a_folder("a.py", a=f"out_dir = {path!r}\n")
    assert result(lines) == f"1e-05 100 {folder} False 200 time"


def test_a_home_folder_of_nobody_stops_with_one_line(script_with_a_folder):
    code, lines = script_with_a_folder("--out_dir=~nobody_at_all/x")
    assert code == 1
    assert "no user has this home folder" in lines[-1]


def test_a_tilde_in_a_text_that_is_not_a_path_stays(script):
    _, lines = script("--name=~/x")
    assert result(lines) == "1e-05 100 ~/x False 200 time"


def test_files_apply_from_left_to_right_and_flags_apply_last(script):
    files = {
        "a": "steps = 1e3\nlearning_rate = 1\n",
        "b": "import math\nsteps = int(math.pow(2, 3))\n",
    }
    _, lines = script("a.py", "b.py", **files)
    assert result(lines) == "1.0 8 run False 16 time"
    _, lines = script("b.py", "a.py", **files)
    assert result(lines) == "1.0 1000 run False 2000 time"
    _, lines = script("--steps=7", "a.py", "b.py", **files)
    assert result(lines) == "1.0 7 run False 14 time"


def test_the_origin_of_a_value_is_printed(script):
    _, lines = script("a.py", a="steps = 5\n")
    assert any("steps" in line and "(a.py)" in line for line in lines)


def test_a_saved_configuration_reads_back_to_the_same_values(script, tmp_path):
    code, lines = script("a.py", '--name=it\'s "x"\\', a="steps = 5\n")
    saved = (tmp_path / "saved.py").read_text()
    code, again = script("saved.py")
    assert code == 0
    assert result(again) == result(lines)
    assert (tmp_path / "saved.py").read_text() == saved


def test_help_prints_the_docstring_and_every_knob_and_does_not_run_the_script(script):
    code, lines = script("-h")
    text = "\n".join(lines)
    assert code == 0
    assert "$ python script.py" in text
    assert "learning_rate = 1e-05" in text
    assert "peak learning rate" in text
    assert 'name = "run"' in text
    assert "RESULT" not in text


def test_help_prints_the_knobs_under_the_headings_of_the_source(script):
    _, lines = script("-h")
    assert lines[-7:] == [
        "optimization",
        "  learning_rate = 1e-05  peak learning rate",
        "  steps = 100            optimizer steps",
        "",
        "run",
        '  name = "run"           what to call it',
        "  compile = False        whether to compile",
    ]


def test_help_shows_the_values_that_files_and_flags_have_set(script):
    _, lines = script("a.py", "--name=it's", "-h", a="compile = True\n")
    assert "  compile = True         whether to compile" in lines
    assert '  name = "it\'s"          what to call it' in lines


def test_a_remark_of_two_lines_is_no_heading(script, tmp_path):
    remark = "# The steps count updates,\n# not examples.\nsteps = 100"
    (tmp_path / "script.py").write_text(SCRIPT.replace("steps = 100", remark))
    _, lines = script("--help")
    assert lines[-5] == "  steps = 100            optimizer steps"
    assert "not examples." not in lines


@pytest.mark.parametrize(
    "value, text",
    [
        (True, "True"),
        (0.03, "0.03"),
        (-1, "-1"),
        ("cosine", '"cosine"'),
        ("", '""'),
        ("it's", '"it\'s"'),
        ('say "x"', "'say \"x\"'"),
        ("a\\b\n", '"a\\\\b\\n"'),
    ],
)
def test_help_writes_values_as_python_source_has_them(value, text):
    assert configurator.format_value(value) == text
    assert eval(text) == value


def test_the_comment_behind_a_default_that_is_not_ascii_is_read_whole(script, tmp_path):
    text = SCRIPT.replace('name = "run"  #', 'name = "Überprüfung"  #')
    (tmp_path / "script.py").write_text(text, encoding="utf-8")
    _, lines = script("-h")
    assert '  name = "Überprüfung"   what to call it' in lines


# ---- lists ----


@pytest.fixture
def script_with_a_list(script, tmp_path):
    """The same, with a knob cost_limit in place of learning_rate, which may be a list."""
    (tmp_path / "script.py").write_text(SCRIPT.replace("learning_rate", "cost_limit"))
    return script


@pytest.mark.parametrize(
    "arguments, value",
    [
        (["--cost_limit=0.5"], "0.5"),
        (["--cost_limit=0,-1.5"], "[0.0, -1.5]"),
        (["--cost_limit=1, 2 ,3e0"], "[1.0, 2.0, 3.0]"),
        (["one.py"], "2.0"),
        (["list.py"], "[1.0, 2.5]"),
        (["tuple.py"], "[1.0, 2.5]"),
        (["list.py", "--cost_limit=7"], "7.0"),
        (["list.py", "--cost_limit=7,8,9"], "[7.0, 8.0, 9.0]"),
        (["list.py", "one.py"], "2.0"),
        (["list.py", "tuple.py"], "[1.0, 2.5]"),
    ],
)
def test_some_numbers_may_be_lists_and_the_last_one_wins(arguments, value, script_with_a_list):
    files = {
        "one": "cost_limit = 2\n",
        "list": "cost_limit = [1, 2.5]\n",
        "tuple": "cost_limit = 1, 2.5\n",
    }
    code, lines = script_with_a_list(*arguments, **files)
    assert code == 0
    assert result(lines) == f"{value} 100 run False 200 time"


def test_a_saved_list_reads_back_to_the_same_list(script_with_a_list, tmp_path):
    _, lines = script_with_a_list("--cost_limit=0.1,-2")
    saved = (tmp_path / "saved.py").read_text()
    assert "cost_limit = [0.1, -2.0]\n" in saved
    _, again = script_with_a_list("saved.py")
    assert result(again) == result(lines)
    assert (tmp_path / "saved.py").read_text() == saved
    _, help_lines = script_with_a_list("saved.py", "-h")
    assert any("cost_limit = [0.1, -2.0]  peak" in line for line in help_lines)


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--cost_limit=1,x", "--cost_limit=1,x: cost_limit takes a number"),
        ("--cost_limit=1,", "--cost_limit=1,: cost_limit takes a number"),
        ("--cost_limit=,", "cost_limit takes a number"),
        ("--cost_limit=1,inf", "cost_limit takes a number"),
        ("--cost_limit=[1,2]", "cost_limit takes a number"),
        ("--steps=1,2", "steps takes a whole number"),
    ],
)
def test_a_flag_that_is_no_list_of_numbers_stops_with_one_line(flag, words, script_with_a_list):
    code, lines = script_with_a_list(flag)
    assert code == 1
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize(
    "text, words",
    [
        ("cost_limit = []", "given an empty list"),
        ("cost_limit = [1, 'x']", "cost_limit must be float, given 'x'"),
        ("cost_limit = [1, True]", "cost_limit must be float, given True"),
        ("cost_limit = [1, None]", "cost_limit must be float, given None"),
        ("cost_limit = [1, [2]]", "given a list in it: [2]"),
        ("cost_limit = [1, float('nan')]", "cost_limit must be float, given nan"),
        ("cost_limit = {1, 2}", "cost_limit must be float, given {1, 2}"),
        ("steps = [1, 2]", "steps must be int, given [1, 2]"),
        ("compile = [True]", "compile must be bool, given [True]"),
    ],
)
def test_a_file_with_a_wrong_list_stops_with_one_line(text, words, script_with_a_list):
    code, lines = script_with_a_list("c.py", c=text)
    assert code == 1
    assert len(lines) == 1
    assert words in lines[0]


@pytest.fixture
def script_with_shared_knobs(script, tmp_path):
    """The same, for a script that shares the knobs of a module `common`."""
    common = """import os
# sampling
seed = 0  # of what is drawn
LIMIT = 3

def f(seed):
    x = seed
"""
    (tmp_path / "common.py").write_text(common)
    text = SCRIPT.replace("import time", "import time, common")
    text = text.replace("globals()", "globals(), vars(common)")
    text = text.replace('print("RESULT"', 'print("RESULT", config["seed"], seed')
    (tmp_path / "script.py").write_text(text)
    return script


def test_knobs_of_a_shared_module_are_knobs_of_the_script(script_with_shared_knobs, tmp_path):
    _, lines = script_with_shared_knobs("--seed=3", "--steps=7")
    assert result(lines) == "3 3 1e-05 7 run False 14 time"
    assert "seed = 3" in (tmp_path / "saved.py").read_text()
    _, lines = script_with_shared_knobs("--seed=x")
    assert "seed takes a whole number" in lines[0]
    _, lines = script_with_shared_knobs("--LIMIT=1")
    assert "unknown knob 'LIMIT'" in lines[0]


def test_help_prints_the_headings_of_a_shared_module(script_with_shared_knobs):
    _, lines = script_with_shared_knobs("-h")
    assert lines[-3:] == ["", "sampling", "  seed = 0               of what is drawn"]


@pytest.mark.parametrize("default", ["None", "(1, 2)", "[1]"])
def test_a_default_of_another_type_is_refused(script, tmp_path, default):
    text = SCRIPT.replace("steps = 100", f"top = {default}\nsteps = 100")
    (tmp_path / "script.py").write_text(text)
    code, lines = script()
    assert code == 1
    assert "'top'" in lines[0]


# ---- ranges ----


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("log_interval", 0, "log_interval=0 must be at least 1"),
        ("batch_size", 0, "must be at least 1"),
        ("num_samples", 0, "must be at least 1"),
        ("max_new_tokens", 0, "must be at least 1"),
        ("max_tokens", 10**30, "at most 2147483647"),
        ("seed", -1, "must be at least 0"),
        ("lambda_init", 0.0, "lambda_init=0.0 must be above 0"),
        ("top_p", 0.0, "must be above 0 and at most 1"),
        ("top_p", 2.0, "must be above 0 and at most 1"),
        ("top_k", -5, "must be at least 0"),
        ("temperature", -1.0, "must be at least 0"),
        ("clip_ratio", -0.2, "must be at least 0"),
        ("gamma", 2.0, "must be at least 0 and at most 1"),
        ("ema", 1.5, "must be at least 0 and below 1"),
        ("label_smoothing", 0.5, "below 0.5"),
        ("temperature", math.nan, "must be"),
        ("epochs", math.inf, "must be above 0"),
    ],
)
def test_a_number_outside_its_range_is_refused_with_the_range(name, value, words):
    with pytest.raises(SystemExit) as stopped:
        check_ranges({"name": "run", "compile": True, name: value})
    assert f"{name}={value!r} " in stopped.value.code
    assert words in stopped.value.code


def test_every_number_of_a_list_is_in_the_range_of_its_knob(monkeypatch):
    check_ranges({"cost_limit": [-5.2, 0.0]})
    monkeypatch.setitem(RANGES, "cost_limit", SHARE)
    check_ranges({"cost_limit": [0.0, 1.0]})
    with pytest.raises(
        SystemExit, match=r"cost_limit=\[0.5, 2.0\] must be at least 0 and at most 1"
    ):
        check_ranges({"cost_limit": [0.5, 2.0]})


@pytest.mark.parametrize(
    "name, value",
    [("top_p", 1.0), ("ema", 0.0), ("temperature", 0.0), ("max_steps", 0), ("cost_limit", -5.2)],
)
def test_an_end_that_belongs_to_a_range_is_allowed(name, value):
    check_ranges({name: value})


@pytest.mark.parametrize(
    "width, heads, kv_heads, words",
    [(128, 4, 3, "a multiple of"), (100, 4, 4, "of width 25"), (4, 8, 8, "of width 0")],
)
def test_a_width_that_cannot_be_cut_into_heads_is_refused(width, heads, kv_heads, words):
    check_heads(128, 4, 0)
    with pytest.raises(SystemExit) as stopped:
        check_heads(width, heads, kv_heads)
    assert words in stopped.value.code
