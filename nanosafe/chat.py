"""A conversation at the keyboard, or over a pipe, with one model or with two in one terminal."""

import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from unicodedata import combining, east_asian_width

from nanosafe.data.examples import Prompt, make_turns

HELP = """\
/system TEXT  a new conversation, with this as the system's turn; without TEXT, with none
/regenerate   another answer to the last question
/reset        a new conversation; so does an empty line
/clear        a new conversation on an empty screen
/help         this
/quit         end, as do /exit, Ctrl-D and Ctrl-C; while an answer comes, Ctrl-C only stops it"""
COLOURS = {"red": 31, "blue": 34, "faint": 2}
# Replaced before printing, so that a model's text cannot move the cursor.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
CLEAR_LINE = "\033[K"  # from the cursor to the end of the line
CLEAR_SCREEN = "\033[2J\033[H"


# ---- the screen ----


def paint(text, colour):
    """The text in a colour, where there are colours: on a terminal, unless NO_COLOR is set."""
    if not colour or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{COLOURS[colour]}m{text}\033[0m"


def count_columns(text):
    """How many columns of a terminal a text takes."""
    columns = 0
    for character in text:
        if east_asian_width(character) in "WF":
            columns += 2
        elif not combining(character):
            columns += 1
    return columns


class Screen:
    """Shows an answer as it grows; on a terminal, with the speed behind its last word."""

    def __init__(self, colour="", label="", live=True):
        self.colour = colour
        self.label = label
        self.live = live and sys.stdout.isatty()  # whether the speed is shown, and overwritten
        self.shown = ""
        self.tokens = 0
        print(paint(label, colour), end="", flush=True)
        self.began = time.perf_counter()

    def show(self, text, tokens):
        """Print what `text`, an answer of so many tokens until now, has more than last time."""
        text = CONTROL_CHARACTERS.sub("\ufffd", text.expandtabs())
        if not text.startswith(self.shown):
            text = self.shown  # what is printed cannot be taken back
        new = text[len(self.shown) :]
        self.shown = text
        self.tokens = tokens
        line = ""
        if new:
            line = paint(new, self.colour)
            if self.live:
                line = CLEAR_LINE + line
        if self.live:
            line += self.format_speed_note()
        print(line, end="", flush=True)

    def format_speed_note(self):
        """The speed, and the cursor's way back over it; "" where it would break the line."""
        note = "  " + self.speed()
        last_line = (self.label + self.shown).rpartition("\n")[2]
        width = shutil.get_terminal_size().columns
        if count_columns(last_line) % width + len(note) >= width:
            return ""
        return paint(note, "faint") + f"\033[{len(note)}D"

    def speed(self):
        seconds = max(1e-9, time.perf_counter() - self.began)
        return f"{self.tokens / seconds:.0f} tokens/s"

    def end(self, *notes):
        """End the answer's line; notes that are not empty follow on a line of their own."""
        print(CLEAR_LINE if self.live else "")
        notes = [note for note in notes if note]
        if self.live:
            notes.append(f"{self.tokens} tokens, {self.speed()}")
        if notes:
            text = " ".join(f"[{note}]" for note in notes)
            print(paint(text, "faint"), flush=True)


# ---- the keyboard ----


@contextmanager
def catch_interrupt():
    """Yields a list to which a first Ctrl-C appends True, instead of raising KeyboardInterrupt.

    So an answer can end at its next token, and keep what it has until then."""
    interrupts = []
    usual = signal.getsignal(signal.SIGINT)

    def note_interrupt(*_):
        interrupts.append(True)
        signal.signal(signal.SIGINT, usual)  # a second Ctrl-C does what it always does

    signal.signal(signal.SIGINT, note_interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, usual)


def read_line():
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        return "/quit"


def chat(speakers, system=""):
    """Read questions and commands until the input ends; every speaker answers each question.

    speakers  a list of functions speaker(prompt, attempt), each of which prints and returns its
              answer to a Prompt, a conversation of its own; attempt counts the /regenerate
    system    what the system's turn says; "" for none"""
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys, where the system has them
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    histories = [[] for _ in speakers]
    attempt = 0
    print("Talk to the model; /help lists commands, Ctrl-D ends.", flush=True)
    while True:
        line = read_line()
        command = line.split()[0].lower() if line.startswith("/") else ""
        if command in ("/quit", "/exit"):
            print("\nBye.", flush=True)
            return
        if command in ("/reset", "/clear", "/system") or not line:
            if command == "/system":
                system = line[len(command) :].strip()
            histories = [[] for _ in speakers]
            if command == "/clear" and sys.stdout.isatty():
                print(CLEAR_SCREEN, end="")
            print("(a new conversation)", flush=True)
        elif command == "/help":
            print(HELP, flush=True)
        elif command == "/regenerate":
            if histories[0]:
                attempt += 1
                histories = [texts[:-1] for texts in histories]
                histories = answer_all(speakers, histories, attempt, system)
            else:
                print("there is no answer yet to give again", flush=True)
        elif command:
            print(f"{command} is not a command:\n{HELP}", flush=True)
        else:
            attempt = 0
            histories = [[*texts, line] for texts in histories]
            histories = answer_all(speakers, histories, attempt, system)


def answer_all(speakers, histories, attempt, system):
    """The histories with each speaker's answer; empty ones where an answer was broken off.

    A history is the texts of a conversation, the user's first."""
    try:
        for speaker, texts in zip(speakers, histories):
            texts.append(speaker(Prompt(make_turns(texts, system or None)), attempt))
    except (KeyboardInterrupt, SystemExit) as error:  # a second Ctrl-C, or a text that is too long
        print(f"\n{error or 'stopped'} (a new conversation)", flush=True)
        return [[] for _ in speakers]
    return histories
