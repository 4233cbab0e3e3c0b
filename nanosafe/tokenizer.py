"""Text <-> token ids.

A tokenizer is an engine that knows plain text, and special tokens around it. The engine here is
SentencePiece (tokenizer.model); bpe.py has tokenizer.json's, and that of Llama 3's tokenizer.model.

Special tokens are split out first, and what stands between them is encoded piece by piece.
SentencePiece puts a space in front of each ("legacy": Alpaca, Beaver), or of the first only."""

import hashlib
import json
import os
import re
import shutil
from functools import cached_property
from typing import NamedTuple
import sentencepiece
from nanosafe.files import read_json, stop, untrusted, write_json

NO_PREFIX = b"\x1a\x02\x18\x00"  # protobuf, to append: normalizer_spec {add_dummy_prefix: false}
SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680"
    + "".join(map(chr, range(0x2000, 0x200B)))
    + ("\u2028\u2029\u202f\u205f\u3000")
)  # Unicode's White_Space; Python's has four more
MARK = "\u2581"  # SentencePiece's way to write a space
SPECIAL = ("bos_token", "eos_token", "pad_token")
FILES = (
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


def find(path):
    """The tokenizer file of a model folder, or of a model file; None where there is none."""
    path = os.fspath(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    names = [os.path.join(folder, name) for name in ("tokenizer.model", "tokenizer.json")]
    if os.path.isfile(path) and path.endswith((".model", ".json")):
        names = [path]
    return next(filter(os.path.isfile, names), None)


def load(path):
    """The tokenizer of a model folder, or of a tokenizer.model or tokenizer.json file.
    Beside it stands which tokens were added or are special, and further end-of-sequence ids."""
    file = find(path)
    if not file:
        stop(
            f"no tokenizer at {os.fspath(path)!r}: give a folder with a tokenizer.model or "
            "tokenizer.json, or that file"
        )
    with untrusted(file):
        return read(file)


def read(file):
    folder = os.path.dirname(file)
    config = read_json(folder, "tokenizer_config.json")
    names = {**read_json(folder, "special_tokens_map.json"), **config}
    with open(file, "rb") as f:
        proto = f.read()
    if file.endswith(".json") or re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", proto):
        from nanosafe import bpe

        engine = bpe.load(file, names)
    else:
        engine = Pieces(proto, names, file)
    added = dict(engine.added)
    special = {content(value) for key, value in names.items() if key in SPECIAL}
    special |= set(map(content, names.get("additional_special_tokens") or ()))
    for text, id in read_json(folder, "added_tokens.json").items():
        added.setdefault(text, Token(int(id), text in special))
    decoder = (config.get("added_tokens_decoder") or {}).items()
    fast = engine.spec if file.endswith(".json") else read_json(folder, "tokenizer.json")
    later = fast.get("added_tokens") or ()  # transformers 5 adds there, beside a tokenizer.model
    added.update(read_added({**t, "id": int(id)}, repr(file)) for id, t in decoder)
    added.update(read_added(t, repr(file)) for t in later if t["id"] >= engine.size)
    if not all(0 <= t.id < 2**24 for t in added.values()):
        stop(f"{file!r}: an added token has an id that no model has a row for")
    stated = [
        read_json(folder, name).get("eos_token_id")
        for name in ("generation_config.json", "config.json")
    ]
    lists = [x if isinstance(x, list) else [x] for x in stated]
    sure = lists[0] + (lists[1] if isinstance(stated[1], list) else [])
    for ids in (sure, sure + lists[1]):  # a number in config.json only where nothing else is said
        tokenizer = Tokenizer(engine, added, names, [i for i in ids if isinstance(i, int)], file)
        if tokenizer.eos_id >= 0:
            return tokenizer
    stop(f"{file!r} has no end-of-sequence token: name one as eos_token in tokenizer_config.json")


def read_added(t, file):
    """(content, Token) of a token as tokenizers writes it, an object of tokenizer.json."""
    if t.get("single_word"):
        stop(f"{file}: single_word, of {t['content']!r}, is not known here")
    return t["content"], Token(t["id"], *(bool(t.get(key)) for key in Token._fields[1:]))


def content(token):
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
        texts = content(self.names.get(key)), self.engine.defaults.get(key)
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
                yield piece.rstrip(SPACE) if token.lstrip else piece, token.id
                after = text[match.end() :] if token.rstrip else ""
                begin = match.end() + len(after) - len(after.lstrip(SPACE))
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


class Pieces:
    """A SentencePiece model, as its file declares itself; names: tokenizer_config.json's."""

    files, normalize = FILES, str

    def __init__(self, proto, names, file="tokenizer.model"):
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self.sp_no_prefix = sentencepiece.SentencePieceProcessor(model_proto=proto + NO_PREFIX)
        except RuntimeError:
            stop(f"{file!r} is not a SentencePiece model")
        sp, self.identity = self.sp, proto
        self.legacy = names.get("legacy") is not False  # whether every piece has a space in front
        self.adds_bos = names.get("add_bos_token") is not False
        self.size = sp.vocab_size()
        texts = [sp.id_to_piece(i) for i in range(self.size)]
        self.added = {
            text: Token(i) for i, text in enumerate(texts) if sp.is_control(i) or sp.is_unknown(i)
        }
        ids = zip(SPECIAL, (sp.bos_id(), sp.eos_id(), sp.pad_id()))
        self.defaults = {"pad_token": "<pad>", **{key: texts[id] for key, id in ids if id >= 0}}
        # Pieces that SentencePiece takes whole wherever they stand are spelled out in user text.
        scores = [sp.get_score(i) for i in range(self.size)]  # 0: theirs, and the first learnt one
        self.spelled = {
            i: [id for char in text for id in self.sp_no_prefix.encode(char)]
            for i, text in enumerate(texts)
            if scores[i] == 0
            and scores[i + 1 : i + 2] != [-1]
            and len(text) > 1
            and text.strip(MARK + SPACE)
            and not (sp.is_byte(i) or text in self.added)
        }

    def encode(self, text, begins=True, plain=False):
        """Ids of text; begins: as the model's texts begin, a space in front; plain: a user's."""
        ids = (self.sp if begins else self.sp_no_prefix).encode(text)
        return self.spell(ids) if plain else ids

    def spell(self, ids):
        return [id for i in ids for id in self.spelled.get(i, (i,))] if self.spelled else ids

    def encode_batch(self, texts):
        return list(map(self.spell, self.sp.encode(texts, num_threads=os.cpu_count() or 1)))

    def decode(self, ids, begins=True):
        if begins or not ids:
            return self.sp.decode(ids)
        dot = self.sp.encode(".")[-1:]  # so that a leading space is kept
        return self.sp.decode(dot + ids)[len(self.sp.decode(dot)) :]

    def save(self, tokenizer, path):
        """tokenizer_config.json for transformers' own class: a model's own may need its code."""
        config = {
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": self.legacy,
            **{key: value for key, value in tokenizer.names.items() if key != "auto_map"},
            "tokenizer_class": "LlamaTokenizer",
            "clean_up_tokenization_spaces": False,
            "unk_token": self.sp.id_to_piece(self.sp.unk_id()),
        }
        if self.sp.encode("a") == self.sp_no_prefix.encode("a"):
            config["add_prefix_space"] = False
        ids = {key: tokenizer.named(key) for key in SPECIAL}
        config.update({key: tokenizer.contents[id] for key, id in ids.items() if id >= 0})
        write_json(config, path, "tokenizer_config.json")
        beyond = {text: t.id for text, t in tokenizer.added.items() if t.id >= self.size}
        if beyond:
            write_json(beyond, path, "added_tokens.json")
