"""sample.py as a chat: over a pipe, and on a pseudo-terminal, as people use it."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, small_config
from in_process import run_in_process

from nanosafe import checkpoint, tokenizer
from nanosafe.chat import CONTROL_CHARACTERS, count_columns


@pytest.fixture
def talk(world, monkeypatch, capsys):
    """Types lines into a chat, and returns what it prints."""

    def talk(lines, *flags):
        flags = flags or [f"--model={world}/policy"]
        pytest_fixtures = {"monkeypatch": monkeypatch, "capsys": capsys}
        command = ["sample.py", *flags, "--max_new_tokens=8"]
        return run_in_process(*command, stdin=lines, **pytest_fixtures).printed

    return talk


def find_answers(printed, label="> "):
    """What stands behind a label, line by line."""
    return re.findall(rf"^{re.escape(label)}(.*?)$", printed, re.M)


def test_commands_over_a_pipe(talk):
    printed = talk(
        "/regenerate\nHi.\n/regenerate\n/wat\n/help\n/reset\n/regenerate\n/clear\n\n/quit\nnever\n"
    )
    assert printed.count("there is no answer yet") == 2
    assert "/wat is not a command" in printed
    assert printed.count("/regenerate   another answer") == 2
    assert printed.count("(a new conversation)") == 3
    assert printed.rstrip().endswith("Bye.")
    assert "never" not in printed
    assert "\033" not in printed


def test_another_answer_to_the_same_question(talk):
    answers = find_answers(talk("Hi.\n/regenerate\n/regenerate\n/reset\nHi.\n"))
    first, second, third, _, again = answers[:5]
    assert len({first, second, third}) == 3
    assert again == first


def test_two_models_answer_with_their_scores(talk, world):
    printed = talk(
        "Hi.\nAnd then?\n",
        f"--red={world}/policy",
        f"--blue={world}/policy",
        f"--reward_model={world}/reward",
        f"--cost_model={world}/cost",
    )
    assert printed.count("red (policy): ") == 2
    assert printed.count("blue (policy): ") == 2
    assert len(re.findall(r"\[reward -?[\d.]+  cost -?[\d.]+\]", printed)) == 4


def test_red_needs_blue(world, monkeypatch, capsys):
    pytest_fixtures = {"monkeypatch": monkeypatch, "capsys": capsys}
    command = ["sample.py", f"--red={world}/policy"]
    error = run_in_process(*command, check=False, **pytest_fixtures).error
    assert "red and blue are two folders" in error


def test_each_model_has_a_history_of_its_own(talk, world, tmp_path):
    """Red and blue answer as each does alone: neither reads the other's answers."""
    red, blue = world / "policy", tmp_path / "blue"
    tok = tokenizer.load(red)
    model = checkpoint.init_from_scratch(small_config(vocab_size=tok.vocab_size), seed=77)
    checkpoint.save(model, blue, tok)
    lines = "Hi.\nAnd then?\nWhy?\n"
    red_alone = find_answers(talk(lines, f"--model={red}"))[:3]
    blue_alone = find_answers(talk(lines, f"--model={blue}"))[:3]
    assert red_alone != blue_alone
    both = talk(lines, f"--red={red}", f"--blue={blue}")
    assert re.findall(r"red \(policy\): (.*)$", both, re.M) == red_alone
    assert re.findall(r"blue \(blue\): (.*)$", both, re.M) == blue_alone


def test_bytes_that_are_not_text_do_not_end_the_chat(world):
    done = subprocess.run(
        [sys.executable, "sample.py", f"--model={world}/policy", "--max_new_tokens=4"],
        cwd=ROOT,
        input=b"\xff\xfe\nHi.\n/quit\n",
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONPATH": ROOT},
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert done.stdout.count(b"\n> ") == 3


def test_a_long_conversation_leaves_its_oldest_turns_out(talk):
    question = "How do I paint the boat, please?\n"
    assert "the oldest turn is left out" in talk(question * 12)
    assert "left out" not in talk(question * 3)


def test_a_models_text_moves_no_cursor():
    assert CONTROL_CHARACTERS.sub("?", "a\033[2Jb\x9b\x07\n\tc") == "a?[2Jb??\n\tc"
    assert count_columns("ab") == 2
    assert count_columns("你好") == 4
    assert count_columns("e\u0301") == 1


class Terminal:
    """sample.py on a pseudo-terminal."""

    def __init__(self, *flags):
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            # Tests that run in the background inherit that Ctrl-C is ignored.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(TERM="xterm", OMP_NUM_THREADS="1", COLUMNS="120", PYTHONPATH=ROOT)
            os.environ.pop("NO_COLOR", None)
            os.execv(sys.executable, [sys.executable, "sample.py", *flags])

    def read(self, seconds):
        """Read what is there, or comes within some seconds; False once the terminal is closed."""
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:
                return False
        return True

    def wait_for(self, pattern, seconds=60):
        """What is printed up to the end of the pattern's first match."""
        end = time.time() + seconds
        found = re.search(pattern, self.seen, re.S)
        while not found:
            assert time.time() < end, f"no {pattern!r} in {self.seen!r}"
            is_open = self.read(0.2)
            found = re.search(pattern, self.seen, re.S)
            assert found or is_open, self.seen
        text = self.seen[: found.end()]
        self.seen = self.seen[found.end() :]
        return text

    def type(self, text):
        os.write(self.fd, text.encode())

    def wait_for_exit(self):
        """The exit status."""
        end = time.time() + 30
        while time.time() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            self.read(0.1)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"it does not end: {self.seen!r}")


PROMPT = r"\n> $"


def test_a_terminal_shows_the_answer_as_it_grows_and_its_speed(world):
    terminal = Terminal(
        f"--model={world}/policy", "--max_new_tokens=12", f"--reward_model={world}/reward"
    )
    terminal.wait_for(PROMPT)
    terminal.type("/regenerate\n")
    assert "there is no answer yet" in terminal.wait_for(PROMPT)
    terminal.type("Hello?\n")
    shown = terminal.wait_for(PROMPT)
    assert len(re.findall(r"\d+ tokens/s\x1b\[0m\x1b\[\d+D", shown)) > 3  # live, and overwritten
    assert re.search(r"\[reward -?[\d.]+\] \[\d+ tokens, \d+ tokens/s\]", shown)
    terminal.type("/regenerate\n")
    terminal.wait_for(PROMPT)
    terminal.type("/clear\n")
    assert "\033[2J" in terminal.wait_for(PROMPT)
    terminal.type("/quit\n")
    assert terminal.wait_for_exit() == 0
    assert "Bye." in terminal.seen


def test_ctrl_c_stops_an_answer_and_ends_at_the_prompt(world):
    terminal = Terminal(f"--model={world}/policy", "--max_new_tokens=20000", "--top_k=0")
    terminal.wait_for(PROMPT)
    terminal.type("Tell me everything.\n")
    terminal.wait_for(r"tokens/s.*tokens/s")
    terminal.type("\x03")
    assert re.search(r"\[stopped\] \[\d+ tokens", terminal.wait_for(PROMPT))
    terminal.type("/regenerate\n")
    terminal.wait_for(r"tokens/s.*tokens/s")
    terminal.type("\x03")
    terminal.wait_for(PROMPT)
    time.sleep(0.5)  # readline needs a moment before it listens
    terminal.type("\x03")
    assert terminal.wait_for_exit() == 0
    assert "Bye." in terminal.seen
    assert "Traceback" not in terminal.seen


def test_a_red_blue_round_on_a_terminal(world):
    terminal = Terminal(f"--red={world}/policy", f"--blue={world}/policy", "--max_new_tokens=6")
    terminal.wait_for(PROMPT)
    terminal.type("Hello?\n")
    shown = terminal.wait_for(PROMPT)
    assert "\033[31mred (policy): \033[0m" in shown
    assert "\033[34mblue (policy): \033[0m" in shown
    terminal.type("\x04")
    assert terminal.wait_for_exit() == 0
    assert "Bye." in terminal.seen
