"""Errors: one line about a file that cannot be read or written, a traceback of our own defects."""

import json
import traceback

import pytest
from conftest import run
from safetensors import safe_open

from nanosafe.errors import choose, one_line_errors


def message_about(path, read):
    """The message of the exit that a read of a broken file ends in."""
    with pytest.raises(SystemExit) as caught:
        with one_line_errors(path):
            read(path)
    return str(caught.value)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_loss(path):
    return read_json(path)["loss"]


def read_tensors(path):
    with safe_open(path, "pt") as f:
        return f.keys()


# ---- broken files ----


@pytest.mark.parametrize(
    "content, read, kind",
    [
        (b'{"loss": 1.5', read_json, "JSONDecodeError"),
        (b'{"name": "\xff"}', read_json, "UnicodeDecodeError"),
        (b'{"reward": 1.5}', read_loss, "KeyError"),
        (b"no tensors", read_tensors, "SafetensorError"),
    ],
)
def test_a_broken_file_is_one_line_with_its_path_and_the_kind_of_error(
    content, read, kind, tmp_path
):
    path = tmp_path / "broken"
    path.write_bytes(content)
    message = message_about(path, read)
    assert message.startswith(f"error: {str(path)!r} cannot be read: {kind}: ")
    assert len(message.splitlines()) == 1


def test_a_missing_file_is_one_line(tmp_path):
    path = tmp_path / "missing"
    message = message_about(path, read_json)
    assert message.startswith(f"error: {str(path)!r} cannot be read: FileNotFoundError: ")


def test_an_error_of_many_lines_becomes_one_short_line():
    def read(path):
        raise ValueError("a long story\n" * 100)

    message = message_about("x", read)
    assert len(message.splitlines()) == 1
    assert len(message) < 400


def test_an_error_without_words_says_that_the_file_breaks_off():
    def read(path):
        raise EOFError

    assert (
        message_about("x", read) == "error: 'x' cannot be read: EOFError: the file ends too early"
    )


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    path = tmp_path / "no folder" / "file"
    with pytest.raises(SystemExit, match="cannot be written: FileNotFoundError"):
        with one_line_errors(path, "written"):
            path.write_text("text")


# ---- defects of our own ----


def defect_of_attributes():
    return None.shape


def defect_of_types():
    return "a" + 1


@pytest.mark.parametrize("action", ["read", "written"])
@pytest.mark.parametrize(
    "defect, kind", [(defect_of_attributes, AttributeError), (defect_of_types, TypeError)]
)
def test_a_defect_keeps_its_traceback(defect, kind, action):
    with pytest.raises(kind) as caught:
        with one_line_errors("x", action):
            defect()
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert frames[-1].name == defect.__name__


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x")])
def test_a_wrong_value_is_a_defect_where_we_write(error):
    """A stranger's file may hold any value, but what is written is our own."""
    with pytest.raises(type(error)):
        with one_line_errors("x", "written"):
            raise error


# ---- as a user sees them ----

SCRIPT = """
from nanosafe.errors import one_line_errors

def parse(line):
    return {statement}

with one_line_errors("data.jsonl"):
    parse("text")
"""


def test_a_script_ends_with_one_line_about_a_broken_file(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(statement="float(line)"))
    done = run(script, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: 'data.jsonl' cannot be read: ValueError: could not convert string to float: "
        "'text'\n"
    )


def test_a_script_ends_with_the_traceback_of_a_defect(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(statement="line.no_such_method()"))
    done = run(script, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "in parse" in done.stderr
    assert "AttributeError" in done.stderr


# ---- knobs ----


def test_a_value_that_is_not_among_the_choices_names_them_all():
    with pytest.raises(SystemExit, match="^error: dtype='half': choose one of auto, bfloat16$"):
        choose("dtype", "half", ("auto", "bfloat16"))


def test_a_value_among_the_choices_is_accepted():
    choose("dtype", "auto", ("auto", "bfloat16"))
