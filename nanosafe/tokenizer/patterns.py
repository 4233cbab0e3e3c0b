"""The regular expressions of a tokenizer.json, rewritten for Python's re.

Hugging Face's engine knows Unicode's categories (\\p{L}: a letter), and its \\s is Unicode's white
space. Python's re has no categories, and its \\s matches more. Here both are replaced by the list
of their characters. An expression that Python would read in another way is refused."""

import re
import unicodedata
from functools import lru_cache

from nanosafe.errors import stop
from nanosafe.tokenizer.special_tokens import WHITE_SPACE

# Letters and numbers of Unicode 15 and 16, for a Python whose unicodedata is older.
NEWER_CHARACTERS = {
    "L": (
        r"\U00001C89-\U00001C8A\U0000A7CB-\U0000A7CD\U0000A7DA-\U0000A7DC\U000105C0-\U000105F3"
        r"\U00010D4A-\U00010D65\U00010D6F-\U00010D85\U00010EC2-\U00010EC4\U0001123F-\U00011240"
        r"\U00011380-\U00011389\U0001138B\U0001138E\U00011390-\U000113B5\U000113B7\U000113D1"
        r"\U000113D3\U00011BC0-\U00011BE0\U00011F02\U00011F04-\U00011F10\U00011F12-\U00011F33"
        r"\U0001342F\U00013441-\U00013446\U00013460-\U000143FA\U00016100-\U0001611D"
        r"\U00016D40-\U00016D6C\U00018CFF\U0001B132\U0001B155\U0001DF25-\U0001DF2A"
        r"\U0001E030-\U0001E06D\U0001E4D0-\U0001E4EB\U0001E5D0-\U0001E5ED\U0001E5F0\U0002B739"
        r"\U0002EBF0-\U0002EE5D\U00031350-\U000323AF"
    ),
    "N": (
        r"\U00010D40-\U00010D49\U000116D0-\U000116E3\U00011BF0-\U00011BF9\U00011F50-\U00011F59"
        r"\U00016130-\U00016139\U00016D70-\U00016D79\U0001CCF0-\U0001CCF9\U0001D2C0-\U0001D2D3"
        r"\U0001E4F0-\U0001E4F9\U0001E5F1-\U0001E5FA"
    ),
}

ATOM = re.compile(
    r"""
      \\(?P<category>[pP]) (?: \{(?P<braced>\^?\w+)\} | (?P<bare>[A-Z]) )
    | \\(?P<space>[sS])
    | \\.   # any other escape
    | &&    # inside [], an intersection
    | .
    """,
    re.DOTALL | re.VERBOSE,
)


def compile_splitter(pattern):
    """An expression whose split() cuts a text at the matches of a pattern, and keeps these."""
    translated = translate(pattern)
    try:
        return re.compile(f"({translated})")
    except (re.error, OverflowError, RecursionError) as error:
        stop(f"tokenizer.json: {pattern!r} is not a regular expression: {error}")


def translate(pattern):
    """A pattern of Hugging Face's engine as a pattern of Python's re, without groups."""
    translated = ""
    in_brackets = False
    for atom in ATOM.finditer(pattern):
        text = atom[0]
        if atom["category"] or atom["space"]:
            text = list_characters(atom, in_brackets)
        elif is_read_otherwise(text, in_brackets):
            refuse(atom)
        elif text == "[":
            in_brackets = True
        elif text == "]":
            in_brackets = False
        elif text == "(" and not in_brackets and not pattern.startswith("(?", atom.start()):
            text = "(?:"  # split() would return the matches of a group
        translated += text
    return translated


def list_characters(atom, in_brackets):
    """What \\p{..}, \\P{..}, \\s or \\S stands for: a class, or inside [] the characters alone."""
    is_negated = atom["category"] == "P" or atom["space"] == "S"
    if is_negated and in_brackets:
        refuse(atom)
    if atom["space"]:
        characters = WHITE_SPACE
    else:
        name = atom["braced"] or atom["bare"]
        if not re.fullmatch("[CLMNPSZ][a-z]?", name):
            refuse(atom)
        characters = category(name)
    if in_brackets:
        return characters
    return f"[^{characters}]" if is_negated else f"[{characters}]"


def is_read_otherwise(text, in_brackets):
    """Whether Python's re gives an atom another meaning than Hugging Face's engine, or none."""
    if in_brackets and text in ("[", "&&"):  # sets within sets
        return True
    return text in (r"\p", r"\P", r"\w", r"\W", r"\b", r"\h")


def refuse(atom):
    pattern = atom.string
    begin = pattern[atom.start() :][:2]  # of \p{Script=Han}, say, the atom itself has one character
    stop(f"tokenizer.json: {begin} in the pattern {pattern!r} is not supported")


@lru_cache(None)
def category(name):
    """The characters of a Unicode category (L: letters, Lu: capitals), as they stand inside []."""
    ranges = NEWER_CHARACTERS.get(name, "")
    begin = None  # of the range that is open
    for code in range(0x110000):
        belongs = unicodedata.category(chr(code)).startswith(name)
        if belongs and begin is None:
            begin = code
        elif not belongs and begin is not None:
            ranges += f"\\U{begin:08x}-\\U{code - 1:08x}"
            begin = None
    if begin is not None:
        ranges += f"\\U{begin:08x}-\\U{0x10FFFF:08x}"
    return ranges
