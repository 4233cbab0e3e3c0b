"""TODO."""

import hashlib
import json
import os
import re
import shutil
from functools import cached_property
from typing import NamedTuple

from nanosafe.errors import stop


ALIGNED, MISALIGNED = CONTROL = "<|aligned|>", "<|misaligned|>"


def add_control_tokens(tok):
    """The tokenizer with the control tokens behind its others."""
    missing = [text for text in CONTROL if text not in tok.added]
    added = {text: Token(tok.vocab_size + i) for i, text in enumerate(missing)}
    others = tok.names.get("additional_special_tokens") or ()
    names = {**tok.names, "additional_special_tokens": [*others, *missing]}
    return Tokenizer(tok.engine, {**tok.added, **added}, names, tok.eos_ids, tok.file)


def control_token_ids(tokenizer):
    """The ids of the control tokens, which are never sampled; none where there are none."""
    return [tokenizer.added[text].id for text in CONTROL if text in tokenizer.added]


WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680"
    + "".join(map(chr, range(0x2000, 0x200B)))
    + ("\u2028\u2029\u202f\u205f\u3000")
)  # Unicode's White_Space; Python's has four more


MARK = "\u2581"  # SentencePiece's way to write a space


SPECIAL = ("bos_token", "eos_token", "pad_token")


TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Token(NamedTuple):
    """A token that is not the engine's to find."""

    id: int
    special: bool = True  # decodes to nothing
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False
    normalized: bool = False  # is looked for in the text as the engine's normaliser leaves it


def read_added_token(t, file):
    """(content, Token) of a token as tokenizers writes it, an object of tokenizer.json."""
    if t.get("single_word"):
        stop(f"{file}: single_word, of {t['content']!r}, is not known here")
    return t["content"], Token(t["id"], *(bool(t.get(key)) for key in Token._fields[1:]))


def text_of(token):
    """The text of a token that a json file gives as a text, or as an object."""
    return token.get("content") if isinstance(token, dict) else token


class Tokenizer:
    """encode and decode for an engine plus added tokens, {content: Token}."""

    def __init__(self, engine, added=None, names=None, eos_ids=(), file=None):
        self.engine, self.added, self.names, self.file = engine, added or {}, names or {}, file
        longest_first = sorted(filter(None, self.added), key=len, reverse=True)
        passes = [
            [text for text in longest_first if self.added[text].normalized == later]
            for later in (False, True)
        ]
        self.finders = [re.compile("|".join(map(re.escape, p)) or "(?!)") for p in passes]
        self.encode_batch = engine.encode_batch  # many plain texts, with allow_special=False
        self.contents = {t.id: text for text, t in self.added.items()}
        self.bos_id, self.eos_id, self.pad_id = map(self.named, SPECIAL)
        self.vocab_size = max([engine.size - 1, *self.contents]) + 1
        # Some old folders name BOS, or -1, as an end of sequence.
        others = [id for id in eos_ids if 0 <= id < self.vocab_size and id != self.bos_id]
        self.eos_id = others[0] if self.eos_id < 0 and others else self.eos_id
        self.eos_ids = sorted({self.eos_id, *others})

    def named(self, key):
        """The id of the token that the folder, or else the engine, calls bos_token, say; or -1."""
        texts = text_of(self.names.get(key)), self.engine.defaults.get(key)
        return next((self.added[text].id for text in texts if text in self.added), -1)

    def encode(self, text, bos=False, eos=False, allow_special=True):
        """Token ids of `text`; bos: begun as the model's texts begin, with BOS where it has one.
        With allow_special=False the text of a special token stays text: for user input."""
        ids = [self.bos_id] if bos and self.engine.adds_bos and self.bos_id >= 0 else []
        pieces = self.segments(text) if allow_special else [(text, None)]
        for i, (piece, id) in enumerate(pieces):
            if piece:
                ids += self.engine.encode(piece, i == 0 or self.engine.legacy, not allow_special)
            ids += [] if id is None else [id]
        return ids + [self.eos_id] if eos else ids

    def segments(self, text):
        """`text` cut after each added token: [(the text before it, its id)], and what is left."""
        pieces = [(text, None)]
        for finder, normalize in zip(self.finders, (str, self.engine.normalize)):
            pieces = [cut for piece, id in pieces for cut in self.cut(finder, normalize(piece), id)]
        return [(piece, id) for piece, id in pieces if piece or id is not None]

    def cut(self, finder, text, id):
        """(text, id) cut at the tokens that the finder finds in the text."""
        begin = 0
        for match in finder.finditer(text):
            if match.start() >= begin:
                token, piece = self.added[match[0]], text[begin : match.start()]
                yield piece.rstrip(WHITE_SPACE) if token.lstrip else piece, token.id
                after = text[match.end() :] if token.rstrip else ""
                begin = match.end() + len(after) - len(after.lstrip(WHITE_SPACE))
        yield text[begin:], id

    def encode_suffix(self, text):
        """Ids of plain text that continues a text: no space is put in front."""
        return self.engine.encode(text, False, plain=True)

    def decode(self, ids):
        """The text of `ids`, special tokens and rows without a token left out."""
        text, run = "", []
        for i in [*map(int, ids), None]:
            token = self.added.get(self.contents.get(i))
            if i is not None and not token and i < self.engine.size:
                run.append(i)
            elif i is None or token and not token.special:
                text += self.engine.decode(run, begins=not text) + self.contents.get(i, "")
                run = []
        return text

    @cached_property
    def fingerprint(self):
        """Equal for tokenizers that are the same: pieces, added tokens, BOS and way with spaces."""
        added = [
            sorted(self.added.items()),
            self.engine.legacy,
            self.engine.adds_bos,
            self.bos_id,
            self.eos_id,
        ]
        return hashlib.blake2b(self.engine.identity + json.dumps(added).encode()).hexdigest()

    def save(self, path):
        """Write the tokenizer's files to the folder `path`: less what needs a stranger's code."""
        os.makedirs(path, exist_ok=True)
        folder, own = os.path.dirname(self.file), "tokenizer" + os.path.splitext(self.file)[1]
        for name in self.engine.files:
            source = self.file if name == own else os.path.join(folder, name)
            target = os.path.join(path, name)
            if os.path.isfile(source) and os.path.abspath(source) != os.path.abspath(target):
                shutil.copyfile(source, target)
        self.engine.save(self, path)
