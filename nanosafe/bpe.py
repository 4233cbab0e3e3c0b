"""Byte-pair encoding in plain Python: tokenizer.json as Hugging Face's tokenizers writes it (Llama
3, Qwen2, SmolLM2; also LLaMA's, where only that file is left), and Llama 3's own tokenizer.model.

A text is normalised, cut into words by regular expressions, spelled in characters that stand for
its bytes, and then the two neighbours whose merge has the lowest rank become one, leftmost first,
until no rule is left (arXiv:1508.07909). Words come back: each is merged once and remembered."""

import base64
import heapq
import json
import os
import re
import unicodedata
from functools import lru_cache

from nanosafe.files import read_json, stop, write_json
from nanosafe.tokenizer import FILES, MARK, SPACE, Token

REMEMBERED = 2**18  # words
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPELLING = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}  # GPT-2's
SPELLING.update({b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(SPELLING)))})
BYTES = {char: bytes([byte]) for byte, char in SPELLING.items()}

def load(file, names):
    """The engine of a tokenizer.json, or Llama 3's tokenizer.model; names: tokenizer_config's."""
    if not file.endswith(".json"):
        return BPE(*llama3(file), names)
    spec = read_json(*os.path.split(file))
    model = spec.get("model", {})
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        stop(f"{file!r} is no BPE tokenizer")
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return BPE(spec, {pair: rank for rank, pair in enumerate(pairs)}, names)

def llama3(file):
    """What Llama 3's tokenizer.model (github.com/meta-llama/llama3), tokens in base64 and their
    ranks, would be as a tokenizer.json; and the rank of each pair: that of the token it makes."""
    with open(file, "rb") as f:
        rows = [line.split() for line in f.read().splitlines() if line]
    vocab = {spell(base64.b64decode(token)): int(rank) for token, rank in rows}
    ranks = {(token[:i], token[i:]): rank for token, rank in vocab.items()
             for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab}
    params = read_json(os.path.dirname(file), "params.json")
    known = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>",
             7: "<|end_header_id|>", 9: "<|eot_id|>"}
    if params.get("model", params).get("use_scaled_rope"):  # Llama 3.1 and later
        known.update({4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"})
    reserved = iter(range(256))
    special = [known.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    spec, n = read_json(os.path.dirname(__file__), "llama3.json"), len(vocab)  # all but its tokens
    spec["added_tokens"] = [{"id": n + i, "content": text, **spec["added_tokens"][0]}
                            for i, text in enumerate(special)]
    spec["post_processor"]["special_tokens"][special[0]]["ids"] = [n]
    spec["model"].update(vocab=vocab, merges=[list(p) for p in sorted(ranks, key=ranks.get)])
    return spec, ranks

class BPE:
    """The engine of a tokenizer.json: a dict, and the ranks of its merges {(left, right): rank}."""
    def __init__(self, spec, ranks, names):
        model = spec["model"]
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                stop(f"tokenizer.json: {key} is not known here")
        self.spec, self.ranks, self.vocab = spec, ranks, model["vocab"]
        # Llama 3's own file is not copied: others take it for SentencePiece's.
        self.files = FILES[1:]
        self.pieces = {id: text for text, id in self.vocab.items()}
        self.size = max(self.pieces) + 1
        self.added = {}
        for t in spec.get("added_tokens") or []:
            if t.get("single_word"):
                stop(f"tokenizer.json: single_word, of {t['content']!r}, is not known here")
            self.added[t["content"]] = Token(t["id"],
                                             *(bool(t.get(key)) for key in Token._fields[1:]))
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
        begins = [part["single"][0].get("SpecialToken", {}).get("id")
                  for part in sequence(spec.get("post_processor"), "processors")
                  if part["type"] == "TemplateProcessing"]
        adds = names.get("add_bos_token")
        self.adds_bos = bool(any(begins) if adds is None else adds)
        ends = (text for text in ("<|end_of_text|>", "<|endoftext|>", "</s>") if text in self.added)
        self.defaults = {"bos_token": begins[0] if begins else None, "eos_token": next(ends, None)}
        self.memory = {}  # word -> ids

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
            pattern = (translate(pattern["Regex"])
                       if "Regex" in pattern else re.escape(pattern["String"]))
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
        parts = [{**self.spec["model"], "merges": merges}, self.spec.get("normalizer"),
                 self.spec.get("pre_tokenizer")]
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
        ids, memory = [], self.memory
        if len(memory) > REMEMBERED:
            memory.clear()
        for word in words:
            known = memory.get(word)
            if known is None:
                known = self.merge(word if self.marked else spell(word.encode()))
                if len(word) <= 32:
                    memory[word] = known
            ids += known
        return ids

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def merge(self, word):
        """The ids of a word."""
        if word in self.whole:
            return [self.vocab[word]]
        parts = [symbol for char in word for symbol in self.symbols(char)]
        after, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
        heap = []  # (rank, place, pair)

        def offer(i):
            if 0 <= i and after[i] < len(parts):
                pair = parts[i], parts[after[i]]
                if pair in self.ranks:
                    heapq.heappush(heap, (self.ranks[pair], i, pair))

        for i in range(len(parts)):
            offer(i)
        while heap:
            _, i, pair = heapq.heappop(heap)
            j = after[i]
            if j == len(parts) or (parts[i], parts[j]) != pair:
                continue  # one of the two was merged since
            parts[i], parts[j], after[i] = pair[0] + pair[1], None, after[j]
            if after[j] < len(parts):
                before[after[j]] = i
            offer(before[i])
            offer(i)
        ids = []
        for part in filter(lambda part: part is not None, parts):
            if part in self.vocab:
                ids.append(self.vocab[part])
            elif self.unknown is not None and not (self.fuse and ids[-1:] == [self.unknown]):
                ids.append(self.unknown)
        return ids

    def symbols(self, char):
        """A character, or the tokens of its bytes where it is none itself."""
        if self.byte_fallback and char not in self.vocab:
            return [f"<0x{byte:02X}>" for byte in char.encode()]
        return [char]

    def decode(self, ids, begins=True):
        pieces = [self.pieces.get(i, "") for i in ids]
        if not self.marked:
            return b"".join(BYTES.get(c) or c.encode() for c in "".join(pieces)).decode(
                errors="replace")
        raw = [bytes([int(p[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", p) else
               p.replace(MARK, " ").encode() for p in pieces]
        text = b"".join(raw).decode(errors="replace")
        return text[1:] if begins and self.prefix != "never" and text[:1] == " " else text

    def save(self, tokenizer, path):
        """tokenizer.json, also for Llama 3's tokenizer.model; a config without strangers' code."""
        beyond = [{"content": text, "single_word": False, **t._asdict()}
                  for text, t in tokenizer.added.items() if text not in self.added]
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
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "bos_token": tokenizer.contents[tokenizer.bos_id],
                "eos_token": tokenizer.contents[tokenizer.eos_id]}
        write_json(said, path, "tokenizer_config.json")

def sequence(part, key):
    """The parts of a component of tokenizer.json: none, itself, or those of a Sequence."""
    if not part:
        return []
    return part[key] if part["type"] == "Sequence" else [part]

def spell(word):
    return "".join(map(SPELLING.__getitem__, word))

def translate(pattern):
    """A pattern of Hugging Face's engine in Python's words: \\p (unknown) and \\s (wider) spelt."""
    out, i, inside = "", 0, False
    while i < len(pattern):
        two, c = pattern[i:i + 2], pattern[i]
        classes = re.compile(r"\\(?:([pP])(?:\{(\^?\w+)\}|([A-Z]))|([sS]))").match(pattern, i)
        if classes:
            name = classes[2] or classes[3]
            negated = (classes[1] or classes[4]) in "PS"
            if inside and negated or name and not re.fullmatch("[CLMNPSZ][a-z]?", name):
                stop(f"tokenizer.json: {classes[0]}, in {pattern!r}, is not known here")
            chars = category(name) if name else SPACE
            out += chars if inside else f"[{'^' * negated}{chars}]"
            i = classes.end()
            continue
        strange = two in (r"\p", r"\P", r"\w", r"\W", r"\b", r"\h")
        if strange or inside and (c == "[" or two == "&&"):
            stop(f"tokenizer.json: {two}, in {pattern!r}, is not known here")
        if c == "\\":
            out += two
        elif c == "(" and not inside and pattern[i + 1:i + 2] != "?":
            out += "(?:"  # the cutter has a group of its own, and only one
        else:
            inside = c == "[" or inside and c != "]"
            out += c
        i += 2 if c == "\\" else 1
    return out

@lru_cache(None)
def category(name):
    """The characters of a Unicode category, L or Lu say, as they stand in a class."""
    newer = read_json(os.path.dirname(__file__), "unicode.json").get(name, "")  # than this Python
    newer = [[int(end, 16) for end in span.split("-")] for span in newer.split()]
    chars = {c for c in range(0x110000) if unicodedata.category(chr(c)).startswith(name)}
    chars |= {c for span in newer for c in range(span[0], span[-1] + 1)}
    starts = sorted(c for c in chars if c - 1 not in chars)
    ends = sorted(c for c in chars if c + 1 not in chars)
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(starts, ends))
