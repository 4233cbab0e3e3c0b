"""The regular expressions of a tokenizer.json, rewritten for Python's re.

Hugging Face's engine knows Unicode's categories (\\p{L}: a letter), and its \\s is Unicode's white
space. Python's re has no categories, and its \\s matches more. Here both are replaced by the list
of their characters. An expression that Python would read in another way is refused.

Python's re has a table for the characters up to U+FFFF, but compares a character with each of the
hundreds of ranges beyond. Few texts have any of them but emoji, so that an expression is compiled a
second time without those ranges, which makes it about six times faster."""

import re
import unicodedata
from functools import cache

from nanosafe.errors import stop
from nanosafe.tokenizer.special_tokens import WHITE_SPACE

# What Unicode 15 and 16 added, for a Python whose unicodedata is older: {category: code points}.
NEWER_CHARACTERS = {
    "Lu": "1C89 A7CB-A7CC A7DA A7DC 10D50-10D65",
    "Ll": "1C8A A7CD A7DB 10D70-10D85 1DF25-1DF2A",
    "Lm": "10D4E 10D6F 16D40-16D42 16D6B-16D6C 1E030-1E06D 1E4EB",
    "Lo": (
        "105C0-105F3 10D4A-10D4D 10D4F 10EC2-10EC4 1123F-11240 11380-11389 1138B 1138E "
        "11390-113B5 113B7 113D1 113D3 11BC0-11BE0 11F02 11F04-11F10 11F12-11F33 1342F "
        "13441-13446 13460-143FA 16100-1611D 16D43-16D6A 18CFF 1B132 1B155 1E4D0-1E4EA "
        "1E5D0-1E5ED 1E5F0 2B739 2EBF0-2EE5D 31350-323AF"
    ),
    "Mn": (
        "897 ECE 10D69-10D6D 10EFC-10EFF 11241 113BB-113C0 113CE 113D0 113D2 113E1-113E2 "
        "11F00-11F01 11F36-11F3A 11F40 11F42 11F5A 13440 13447-13455 1611E-16129 1612D-1612F "
        "1E08F 1E4EC-1E4EF 1E5EE-1E5EF"
    ),
    "Mc": (
        "CF3 113B8-113BA 113C2 113C5 113C7-113CA 113CC-113CD 113CF 11F03 11F34-11F35 "
        "11F3E-11F3F 11F41 1612A-1612C"
    ),
    "Nd": (
        "10D40-10D49 116D0-116E3 11BF0-11BF9 11F50-11F59 16130-16139 16D70-16D79 1CCF0-1CCF9 "
        "1E4F0-1E4F9 1E5F1-1E5FA"
    ),
    "No": "1D2C0-1D2D3",
    "Pd": "10D6E",
    "Po": "1B4E-1B4F 1B7F 113D4-113D5 113D7-113D8 11B00-11B09 11BE1 11F43-11F4F 16D6D-16D6F 1E5FF",
    "Sm": "10D8E-10D8F",
    "So": (
        "2427-2429 2FFC-2FFF 31E4-31E5 31EF 1CC00-1CCEF 1CD00-1CEB3 1F6DC 1F774-1F776 "
        "1F77B-1F77F 1F7D9 1F8B2-1F8BB 1F8C0-1F8C1 1FA75-1FA77 1FA87-1FA89 1FA8F 1FAAD-1FAAF "
        "1FABB-1FABF 1FAC6 1FACE-1FACF 1FADA-1FADC 1FADF 1FAE8-1FAE9 1FAF7-1FAF8 1FBCB-1FBEF"
    ),
}

LAST_CODE = 0x10FFFF
ALL_CODES = ((0, LAST_CODE),)
COMMON_CODES = ((0, 0xFFFF), (0x1F000, 0x1FAFF))  # the second are emoji
RARE_CHARACTER = re.compile("[\U00010000-\U0001efff\U0001fb00-\U0010ffff]")

ATOM = re.compile(
    r"""
      \\(?P<category>[pP]) (?: \{(?P<braced>\^?\w+)\} | (?P<bare>[A-Z]) )
    | \\(?P<space>[sS])
    | \\.   # any other escape
    | &&    # inside [], an intersection
    | \}\+  # repeated possessively in Python, but repeated once more in Hugging Face's engine
    | .
    """,
    re.DOTALL | re.VERBOSE,
)


class Splitter:
    """Cuts texts at the matches of an expression, in one of the ways that tokenizer.json names.

    expression      matches in any text, and has no groups
    for_most_texts  an expression that matches the same in a text without rare characters
    behavior        "Isolated": the matches are pieces, and what lies between them is, too;
                    "Removed": the matches are left out;
                    "MergedWithPrevious": a match belongs to the piece in front of it
    invert          take what lies between the matches for the matches"""

    behaviors = ("Isolated", "Removed", "MergedWithPrevious")

    def __init__(self, expression, for_most_texts=None, behavior="Isolated", invert=False):
        self.expression = re.compile(f"({expression})")
        self.for_most_texts = re.compile(f"({for_most_texts or expression})")
        self.behavior = behavior
        self.invert = invert

    def split(self, text):
        """The pieces of a text, none of them empty."""
        if RARE_CHARACTER.search(text):
            pieces = self.expression.split(text)
        else:
            pieces = self.for_most_texts.split(text)
        # What lies between the matches is at the even places, and the matches are at the odd ones.
        if self.behavior == "Removed":
            pieces = pieces[1::2] if self.invert else pieces[0::2]
        elif self.behavior == "MergedWithPrevious":
            pieces = merge_with_previous(pieces, parity=0 if self.invert else 1)
        return [piece for piece in pieces if piece]


def merge_with_previous(pieces, parity):
    """Append each match to the piece in front of it, unless that is a match itself.

    parity  1 where the pieces at the odd places are the matches, 0 where those at the even ones"""
    merged = []
    follows_match = False
    for i, piece in enumerate(pieces):
        if not piece:
            continue
        is_match = i % 2 == parity
        if is_match and merged and not follows_match:
            merged[-1] += piece
        else:
            merged.append(piece)
        follows_match = is_match
    return merged


def compile_splitter(pattern, behavior="Isolated", invert=False):
    """The Splitter of a pattern of Hugging Face's engine."""
    translated = translate(pattern)
    for_most_texts = translate(pattern, COMMON_CODES)
    try:
        return Splitter(translated, for_most_texts, behavior, invert)
    except (re.error, OverflowError, RecursionError) as error:
        stop(f"tokenizer.json: {pattern!r} is not a regular expression: {error}")


def translate(pattern, codes=ALL_CODES):
    """A pattern of Hugging Face's engine as a pattern of Python's re, without groups.

    codes  categories are listed within these ranges of code points"""
    translated = ""
    in_brackets = False
    for atom in ATOM.finditer(pattern):
        text = atom[0]
        if atom["category"] or atom["space"]:
            text = list_characters(atom, in_brackets, codes)
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


def list_characters(atom, in_brackets, codes):
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
        characters = list_category(name, codes)
    if in_brackets:
        return characters
    return f"[^{characters}]" if is_negated else f"[{characters}]"


def is_read_otherwise(text, in_brackets):
    """Whether Python's re gives an atom another meaning than Hugging Face's engine, or none."""
    if in_brackets:
        other = ("[", "&&")  # sets within sets
    else:
        other = ("}+", "^", "$")  # to Hugging Face's engine, each line begins at ^ and ends at $
    return text in other or text in (r"\p", r"\P", r"\w", r"\W", r"\b", r"\B", r"\h", r"\Z")


def refuse(atom):
    pattern = atom.string
    begin = pattern[atom.start() :][:2]  # of \p{Script=Han}, say, the atom itself has one character
    stop(f"tokenizer.json: {begin} in the pattern {pattern!r} is not supported")


@cache
def list_category(name, codes):
    """The characters of a Unicode category (L: letters, Lu: capitals), as they stand inside []."""
    joined = [[0, -1]]  # ranges that touch are one
    for first, final in sorted(find_ranges(name)):
        if first <= joined[-1][1] + 1:
            joined[-1][1] = max(joined[-1][1], final)
        else:
            joined.append([first, final])
    listed = ""
    for first, final in joined:
        for least, most in codes:
            begin = max(first, least)
            end = min(final, most)
            if begin <= end:
                listed += f"\\U{begin:08x}-\\U{end:08x}"
    return listed


def find_ranges(name):
    """[(first, last)] of the code points in a category, or in those whose names begin with it."""
    ranges = []
    for category, known in read_unicode_data().items():
        if category.startswith(name):
            ranges += known
    for category, newer in NEWER_CHARACTERS.items():
        if category.startswith(name):
            for item in newer.split():
                first, _, final = item.partition("-")
                ranges.append((int(first, 16), int(final or first, 16)))
    return ranges


@cache
def read_unicode_data():
    """{category: [(first, last)]} of all code points, as this Python knows them."""
    ranges = {}
    begin = 0
    current = unicodedata.category(chr(0))
    for code in range(1, LAST_CODE + 1):
        category = unicodedata.category(chr(code))
        if category != current:
            ranges.setdefault(current, []).append((begin, code - 1))
            begin = code
            current = category
    ranges.setdefault(current, []).append((begin, LAST_CODE))
    return ranges
