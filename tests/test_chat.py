"""sample.py as a chat: over a pipe, and on a real terminal (a pseudo-terminal), as people use it."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run, small_config

from nanosafe import checkpoint, tokenizer
from nanosafe.chat import CONTROL, columns


@pytest.fixture
def talk(world):
    def call(words, *flags):
        return run(
            "sample.py", *(flags or (f"--model={world}/policy",)), "--max_new_tokens=8", stdin=words
        ).stdout

    return call


def test_commands_over_a_pipe(talk):
    out = talk(
        "/regenerate\nHi.\n/regenerate\n/wat\n/help\n/reset\n/regenerate\n/clear\n\n/quit\nnever\n"
    )
    assert out.count("there is no answer yet") == 2 and "/wat is no command" in out
    assert out.count("/regenerate   another answer") == 2 and out.count("(a new conversation)") == 3
    assert out.rstrip().endswith("Bye.") and "never" not in out and "\033" not in out


def test_another_answer_to_the_same_question(talk):
    answers = re.findall(r"^> (.*?)$", talk("Hi.\n/regenerate\n/regenerate\n/reset\nHi.\n"), re.M)
    first, second, third, _, again = answers[:5]
    assert len({first, second, third}) == 3 and again == first


def test_two_models_have_histories_of_their_own(talk, world):
    flags = [
        f"--red={world}/policy",
        f"--blue={world}/policy",
        f"--reward_model={world}/reward",
        f"--cost_model={world}/cost",
    ]
    out = talk("Hi.\nAnd then?\n", *flags)
    assert out.count("red (policy): ") == out.count("blue (policy): ") == 2
    assert len(re.findall(r"\[reward -?[\d.]+  cost -?[\d.]+\]", out)) == 4
    done = run("sample.py", f"--red={world}/policy", check=False)
    assert done.returncode == 1 and "red and blue are two folders" in done.stderr


def test_each_history_is_its_own(talk, world, tmp_path):
    """Red and blue say what each says alone: neither reads the other's answers."""
    tok = tokenizer.load(world / "policy")
    checkpoint.save(
        checkpoint.init_from_scratch(small_config(vocab_size=tok.vocab_size), seed=77),
        tmp_path / "blue",
        tok,
    )
    words = "Hi.\nAnd then?\nWhy?\n"
    alone = [
        re.findall(r"^> (.*)$", talk(words, f"--model={path}"), re.M)[:3]
        for path in (world / "policy", tmp_path / "blue")
    ]
    both = talk(words, f"--red={world}/policy", f"--blue={tmp_path}/blue")
    assert re.findall(r"red \(policy\): (.*)$", both, re.M) == alone[0] != alone[1]
    assert re.findall(r"blue \(blue\): (.*)$", both, re.M) == alone[1]


def test_bytes_that_are_no_text_end_nothing(world):
    done = subprocess.run(
        [sys.executable, "sample.py", f"--model={world}/policy", "--max_new_tokens=4"],
        cwd=ROOT,
        input=b"\xff\xfe\nHi.\n/quit\n",
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONPATH": ROOT},
    )
    assert (
        done.returncode == 0 and b"Traceback" not in done.stderr and done.stdout.count(b"\n> ") == 3
    )


def test_a_long_conversation_leaves_its_oldest_turns_out(talk, world):
    out = talk("How do I paint the boat, please?\n" * 12, f"--model={world}/policy")
    assert "the oldest turn is left out" in out and "Traceback" not in out
    short = talk("How do I paint the boat, please?\n" * 3, f"--model={world}/policy")
    assert "left out" not in short


def test_what_a_model_says_moves_no_cursor():
    assert CONTROL.sub("?", "a\033[2Jb\x9b\x07\n\tc") == "a?[2Jb??\n\tc"
    assert columns("ab") == 2 and columns("你好") == 4 and columns("e\u0301") == 1


class Terminal:
    """sample.py on a pseudo-terminal."""

    def __init__(self, *flags):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # tests in the background inherit that it is ignored
            os.environ.update(TERM="xterm", OMP_NUM_THREADS="1", COLUMNS="120", PYTHONPATH=ROOT)
            os.environ.pop("NO_COLOR", None)
            os.execv(sys.executable, [sys.executable, "sample.py", *flags])
        self.seen = ""

    def until(self, pattern, seconds=60):
        """What is written until the pattern stands there."""
        end = time.time() + seconds
        while not (found := re.search(pattern, self.seen, re.S)):
            assert time.time() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:  # closed
                    assert re.search(pattern, self.seen, re.S), self.seen
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, words):
        os.write(self.fd, words.encode())

    def wait(self):
        end = time.time() + 30
        while time.time() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:
                    pass
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"it does not end: {self.seen!r}")


PROMPT = r"\n> $"


def test_a_terminal_shows_the_answer_as_it_grows_and_its_speed(world):
    terminal = Terminal(
        f"--model={world}/policy", "--max_new_tokens=12", f"--reward_model={world}/reward"
    )
    terminal.until(PROMPT)
    terminal.type("/regenerate\n")
    assert "there is no answer yet" in terminal.until(PROMPT)
    terminal.type("Hello?\n")
    shown = terminal.until(PROMPT)
    assert len(re.findall(r"\d+ tokens/s\x1b\[0m\x1b\[\d+D", shown)) > 3  # live, and taken back
    assert re.search(r"\[reward -?[\d.]+\] \[\d+ tokens, \d+ tokens/s\]", shown)
    terminal.type("/regenerate\n")
    terminal.until(PROMPT)
    terminal.type("/clear\n")
    assert "\033[2J" in terminal.until(PROMPT)
    terminal.type("/quit\n")
    assert terminal.wait() == 0 and "Bye." in terminal.seen


def test_ctrl_c_stops_an_answer_and_ends_at_the_prompt(world):
    terminal = Terminal(f"--model={world}/policy", "--max_new_tokens=20000", "--top_k=0")
    terminal.until(PROMPT)
    terminal.type("Tell me everything.\n")
    terminal.until(r"tokens/s.*tokens/s")
    terminal.type("\x03")
    assert re.search(r"\[stopped\] \[\d+ tokens", terminal.until(PROMPT))
    terminal.type("/regenerate\n")
    terminal.until(r"tokens/s.*tokens/s")
    terminal.type("\x03")
    terminal.until(PROMPT)
    time.sleep(0.5)  # until readline listens
    terminal.type("\x03")
    assert terminal.wait() == 0 and "Bye." in terminal.seen and "Traceback" not in terminal.seen


def test_a_red_blue_round_on_a_terminal(world):
    terminal = Terminal(f"--red={world}/policy", f"--blue={world}/policy", "--max_new_tokens=6")
    terminal.until(PROMPT)
    terminal.type("Hello?\n")
    shown = terminal.until(PROMPT)
    assert "\033[31mred (policy): \033[0m" in shown and "\033[34mblue (policy): \033[0m" in shown
    terminal.type("\x04")
    assert terminal.wait() == 0 and "Bye." in terminal.seen
