"""Byte-pair encoding in plain Python: tokenizer.json as Hugging Face's tokenizers writes it (Llama
3, Qwen2, SmolLM2; also LLaMA's, where only that file is left), and Llama 3's own tokenizer.model.

A text is normalised, cut into words by regular expressions, spelled in characters that stand for
its bytes, and then the two neighbours whose merge has the lowest rank become one, leftmost first,
until no rule is left (arXiv:1508.07909). Words come back: each is merged once and remembered."""

import heapq
import json
import os
import re
import unicodedata
from functools import lru_cache

from nanosafe.errors import stop
from nanosafe.storage import read_json, write_json
from nanosafe.tokenizer.special_tokens import TOKENIZER_FILES, MARK, WHITE_SPACE, read_added_token


REMEMBERED = 2**18  # words


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


SPELLING = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}  # GPT-2's


SPELLING.update({b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(SPELLING)))})


BYTES = {char: bytes([byte]) for byte, char in SPELLING.items()}


def load(file, names):
    """The engine of a tokenizer.json; names: tokenizer_config's."""
    spec = read_json(*os.path.split(file))
    model = spec.get("model", {})
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        stop(f"{file!r} is no BPE tokenizer")
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return BPEEngine(spec, {pair: rank for rank, pair in enumerate(pairs)}, names)


class BPEEngine:
    """The engine of a tokenizer.json: a dict, and the ranks of its merges {(left, right): rank}."""

    def __init__(self, spec, ranks, names):
        model = spec["model"]
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                stop(f"tokenizer.json: {key} is not known here")
        self.spec, self.ranks, self.vocab = spec, ranks, model["vocab"]
        self.files = TOKENIZER_FILES[
            1:
        ]  # Llama 3's own is not copied: others take it for SentencePiece's
        self.pieces = {id: text for text, id in self.vocab.items()}
        self.size = max(self.pieces) + 1
        self.added = dict(
            read_added_token(t, "tokenizer.json") for t in spec.get("added_tokens") or ()
        )
        # Words that are tokens as they stand; a special token is never made of text.
        self.whole = set(self.vocab) - set(self.added) if model.get("ignore_merges") else ()
        self.unknown, self.fuse = self.vocab.get(model.get("unk_token")), model.get("fuse_unk")
        self.byte_fallback = model.get("byte_fallback", False)
        self.normalizers, self.cutters, self.prefix, self.marked = [], [], "never", False
        for part in sequence(spec.get("normalizer"), "normalizers"):
            self.read_normalizer(part)
        for part in sequence(spec.get("pre_tokenizer"), "pretokenizers"):
            self.read_cutter(part)
        if self.marked and not any(MARK in text.lstrip(MARK) for text in self.vocab):
            self.cutters.append(re.compile(f"({MARK}+[^{MARK}]*)").split)  # no merge crosses these
        self.legacy = self.prefix != "first"
        begins = [
            part["single"][0].get("SpecialToken", {}).get("id")
            for part in sequence(spec.get("post_processor"), "processors")
            if part["type"] == "TemplateProcessing"
        ]
        adds = names.get("add_bos_token")
        self.adds_bos = bool(any(begins) if adds is None else adds)
        ends = (text for text in ("<|end_of_text|>", "<|endoftext|>", "</s>") if text in self.added)
        self.defaults = {"bos_token": begins[0] if begins else None, "eos_token": next(ends, None)}
        self.remembered = lru_cache(REMEMBERED)(self.merge)

    def read_normalizer(self, part):
        kind, text = part["type"], part.get("pattern", {}).get("String")
        if kind in ("NFC", "NFD", "NFKC", "NFKD"):
            self.normalizers.append(lambda text: unicodedata.normalize(kind, text))
        elif kind == "Prepend" and part["prepend"] == MARK:
            self.prefix = "before"
        elif kind == "Replace" and text == " " and part["content"] == MARK:
            self.marked = True
        else:
            stop(f"tokenizer.json: the normalizer {kind} is not known here")

    def read_cutter(self, part):
        kind, pattern = part["type"], part.get("pattern", {})
        if kind == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
            pattern = (
                translate(pattern["Regex"]) if "Regex" in pattern else re.escape(pattern["String"])
            )
        elif kind == "Digits":
            pattern = translate(r"\p{N}" if part["individual_digits"] else r"\p{N}+")
        elif kind == "ByteLevel" and not part.get("add_prefix_space"):
            pattern = translate(GPT2) if part.get("use_regex", True) else None
        elif kind == "Metaspace" and part["replacement"] == MARK:
            self.marked, old = True, "always" if part.get("add_prefix_space", True) else "never"
            self.prefix = part.get("prepend_scheme", old)
            pattern = f"{MARK}[^{MARK}]*" if part.get("split", True) else None
        else:
            stop(f"tokenizer.json: this pre-tokenizer is not known here: {part}")
        if pattern:
            self.cutters.append(re.compile(f"({pattern})").split)  # what lies between is a word too

    @property
    def identity(self):
        merges = sorted(self.ranks, key=self.ranks.get)  # files write them in two ways
        parts = [
            {**self.spec["model"], "merges": merges},
            self.spec.get("normalizer"),
            self.spec.get("pre_tokenizer"),
        ]
        return json.dumps(parts, sort_keys=True).encode()

    def normalize(self, text):
        for normalizer in self.normalizers:
            text = normalizer(text)
        return text

    def encode(self, text, begins=True, plain=False):
        """As Pieces.encode(); no special token is found in any text: `plain` changes nothing."""
        text = self.normalize(text)
        if self.marked:
            prefixed = begins and self.prefix != "never"
            if self.prefix != "before":  # a space in front is as good
                prefixed = prefixed and text[:1] not in (" ", MARK)
            text = MARK * prefixed + text.replace(" ", MARK)
        words = [text]
        for cut in self.cutters:
            words = [piece for word in words for piece in cut(word) if piece]
        ids = []
        for word in words:
            ids += self.remembered(word) if len(word) <= 32 else self.merge(word)
        return ids

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def merge(self, word):
        """The ids of a word."""
        word = word if self.marked else word.encode().decode("latin-1").translate(SPELLING)
        if word in self.whole:
            return [self.vocab[word]]
        parts = []
        for char in word:  # or the tokens of its bytes, where it is none itself
            known = char in self.vocab or not self.byte_fallback
            parts += [char] if known else [f"<0x{byte:02X}>" for byte in char.encode()]
        after, before = [*range(1, len(parts) + 1), 0], [*range(-1, len(parts))]
        parts.append(b"")  # no text: the end, and what became part of another, merge with nothing
        heap = []  # (rank, place, pair)

        def offer(i):
            pair = parts[i], parts[after[i]]
            if pair in self.ranks:
                heapq.heappush(heap, (self.ranks[pair], i, pair))

        for i in range(len(parts)):
            offer(i)
        while heap:
            _, i, pair = heapq.heappop(heap)
            j = after[i]
            if (parts[i], parts[j]) == pair:  # neither of the two was merged since
                parts[i], parts[j], after[i] = pair[0] + pair[1], b"", after[j]
                before[after[j]] = i
                offer(before[i])
                offer(i)
        ids = []
        for part in filter(None, parts):
            if part in self.vocab:
                ids.append(self.vocab[part])
            elif self.unknown is not None and not (self.fuse and ids[-1:] == [self.unknown]):
                ids.append(self.unknown)
        return ids

    def decode(self, ids, begins=True):
        pieces = [self.pieces.get(i, "") for i in ids]
        if not self.marked:
            return b"".join(BYTES.get(c) or c.encode() for c in "".join(pieces)).decode(
                errors="replace"
            )
        raw = [
            bytes([int(p[3:5], 16)])
            if re.fullmatch("<0x[0-9A-F]{2}>", p)
            else p.replace(MARK, " ").encode()
            for p in pieces
        ]
        text = b"".join(raw).decode(errors="replace")
        return text[1:] if begins and self.prefix != "never" and text[:1] == " " else text

    def save(self, tokenizer, path):
        """tokenizer.json, also for Llama 3's tokenizer.model; a config without strangers' code."""
        beyond = [
            {"content": text, "single_word": False, **t._asdict()}
            for text, t in tokenizer.added.items()
            if text not in self.added
        ]
        if beyond:
            spec = {**self.spec, "added_tokens": [*(self.spec.get("added_tokens") or ()), *beyond]}
            write_json(spec, path, "tokenizer.json")
        if os.path.exists(os.path.join(path, "tokenizer.json")):
            config = read_json(path, "tokenizer_config.json")
            if config.pop("auto_map", None):
                config["tokenizer_class"] = "PreTrainedTokenizerFast"
                write_json(config, path, "tokenizer_config.json")
            return
        write_json(self.spec, path, "tokenizer.json")
        said = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": tokenizer.contents[tokenizer.bos_id],
            "eos_token": tokenizer.contents[tokenizer.eos_id],
        }
        write_json(said, path, "tokenizer_config.json")


def sequence(part, key):
    """The parts of a component of tokenizer.json: none, itself, or those of a Sequence."""
    return (part or {key: []}).get(key, [part])


def translate(pattern):
    """A pattern of Hugging Face's engine in Python's words: \\p (unknown) and \\s (wider) spelt."""
    out, inside = "", False
    for atom in re.finditer(r"\\(?:([pP])(?:\{(\^?\w+)\}|([A-Z]))|([sS]))|\\.|&&|.", pattern, re.S):
        text, near = atom[0], pattern[atom.start() : atom.start() + 2]
        name = atom[2] or atom[3]
        if name or atom[4]:
            negated = (atom[1] or atom[4]) in "PS"
            if inside and negated or name and not re.fullmatch("[CLMNPSZ][a-z]?", name):
                stop(f"tokenizer.json: {text}, in {pattern!r}, is not known here")
            chars = category(name) if name else WHITE_SPACE
            text = chars if inside else f"[{'^' * negated}{chars}]"
        elif text[0] == "\\" and text[1:] in set("pPwWbh") or inside and text in ("[", "&&"):
            stop(f"tokenizer.json: {near}, in {pattern!r}, is not known here")
        elif text in ("[", "]"):
            inside = text == "["
        elif text == "(" and not inside and pattern[atom.end() : atom.end() + 1] != "?":
            text = "(?:"  # the cutter has a group of its own, and only one
        out += text
    return out


@lru_cache(None)
def category(name):
    """The characters of a Unicode category, L or Lu say, as they stand in a class."""
    newer = read_json(os.path.dirname(__file__), "unicode.json").get(name, "")  # than this Python
    chars = {c for c in range(0x110000) if unicodedata.category(chr(c)).startswith(name)}
    starts = sorted(c for c in chars if c - 1 not in chars)
    ends = sorted(c for c in chars if c + 1 not in chars)
    return newer + "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(starts, ends))
