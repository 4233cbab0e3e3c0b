"""A conversation at the keyboard, or over a pipe: with one model, or with two in one terminal."""

import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from unicodedata import combining, east_asian_width

HELP = """\
/regenerate   another answer to the last question
/reset        a new conversation; so does an empty line
/clear        a new conversation on an empty screen
/help         this
/quit         end, as do /exit, Ctrl-D and Ctrl-C; while an answer comes, Ctrl-C only stops it"""
COLOURS = {"red": 31, "blue": 34, "faint": 2}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model's words move no cursor


def paint(text, colour):
    """The text in a colour, where there are colours: on a terminal, unless NO_COLOR is set."""
    if not colour or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{COLOURS[colour]}m{text}\033[0m"


def columns(text):
    """How many columns of a terminal a text takes."""
    return sum(2 if east_asian_width(c) in "WF" else not combining(c) for c in text)


class Screen:
    """Shows an answer as it grows; on a terminal, the speed behind its last word."""

    def __init__(self, colour="", label="", live=True):
        self.colour, self.label, self.live = colour, label, live and sys.stdout.isatty()
        print(paint(label, colour), end="", flush=True)
        self.shown, self.tokens, self.began = "", 0, time.perf_counter()

    def speed(self):
        return f"{self.tokens / max(1e-9, time.perf_counter() - self.began):.0f} tokens/s"

    def show(self, text, tokens=0):
        """Print what `text` has more than last time."""
        text = CONTROL.sub("\ufffd", text.expandtabs())
        if not text.startswith(self.shown):
            text = self.shown  # what is printed stays
        new, self.shown, self.tokens = text[len(self.shown) :], text, tokens or self.tokens
        line = "\033[K" * self.live + paint(new, self.colour) if new else ""
        if self.live:
            note = "  " + self.speed()
            width = shutil.get_terminal_size().columns
            used = columns((self.label + text).rpartition("\n")[2]) % width
            if used + len(note) < width:  # no line is broken
                line += paint(note, "faint") + f"\033[{len(note)}D"
        print(line, end="", flush=True)

    def end(self, *notes):
        """End the answer's line; notes follow on their own."""
        print("\033[K" * self.live)
        notes = [*notes, f"{self.tokens} tokens, {self.speed()}" * self.live]
        if any(notes):
            print(paint(" ".join(f"[{note}]" for note in notes if note), "faint"), flush=True)


@contextmanager
def interruptible():
    """A list that a first Ctrl-C fills: the answer ends at its next token, what was said stays."""
    asked, usual = [], signal.getsignal(signal.SIGINT)

    def ask(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, usual)  # a second one is not so patient

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)


def chat(speakers, answer):
    """Read questions and commands until the input ends; each of `speakers` models has a history of
    its own, and answer(i, turns, attempt) prints and returns the i-th one's next words."""
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys, where the system has them
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    histories, attempt = [[] for _ in range(speakers)], 0
    print("Talk to the model; /help lists commands, Ctrl-D ends.", flush=True)
    while True:
        try:
            said = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            said = "/quit"
        command = said.split()[0].lower() if said.startswith("/") else ""
        if command in ("/quit", "/exit"):
            print("\nBye.", flush=True)
            return
        if command in ("/reset", "/clear") or not said:
            histories = [[] for _ in range(speakers)]
            clear = "\033[2J\033[H" * (command == "/clear" and sys.stdout.isatty())
            print(clear + "(a new conversation)", flush=True)
        elif command == "/regenerate" and not histories[0]:
            print("there is no answer yet to give again", flush=True)
        elif command and command != "/regenerate":
            print(HELP if command == "/help" else f"{command} is no command:\n{HELP}", flush=True)
        else:
            attempt = attempt + 1 if command else 0
            histories = [turns[:-1] if command else [*turns, said] for turns in histories]
            try:
                for i, turns in enumerate(histories):
                    turns.append(answer(i, list(turns), attempt))
            except (KeyboardInterrupt, SystemExit) as error:  # too long for the model; impatience
                print(f"\n{error or 'stopped'} (a new conversation)", flush=True)
                histories = [[] for _ in range(speakers)]
