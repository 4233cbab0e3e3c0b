"""Runs a script inside the test's own process, which spares the seconds that importing torch takes.

At least one test of each script starts it as a user does, by conftest.run()."""

import io
import os
import runpy
import sys
from typing import NamedTuple

from conftest import ROOT


class Outcome(NamedTuple):
    """What a script printed, and the one line with which it stopped ("" where it did not)."""

    printed: str
    error: str


def run_in_process(script, *flags, monkeypatch, capsys, check=True, stdin=""):
    """Run a script, a path below the repository's root, and return its Outcome.

    check  whether it must succeed; else it must stop with one line"""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # scripts set it: restore it afterwards
    capsys.readouterr()
    error = ""
    try:
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    except SystemExit as stopped:
        error = stopped.code
    captured = capsys.readouterr()
    if check:
        assert error == ""
    else:
        assert error.startswith("error: ")
        assert "\n" not in error
    return Outcome(captured.out + captured.err, error)
