"""Byte-pair encoding in plain Python (arXiv:1508.07909): the engine of tokenizer.json.

Hugging Face's library tokenizers writes this file: for Llama 3, Qwen2 and SmolLM2, and for LLaMA,
where sometimes only this file is left. Llama 3's own tokenizer.model and Mistral's tekken.json use
this engine too (tiktoken.py). A text becomes token ids in four steps:

1. normalize  Unicode's normal forms; in LLaMA's kind of file, spaces are written as marks (U+2581)
2. cut        regular expressions cut the text into words
3. spell      in byte-level files, a word is written in characters that stand for its bytes
4. merge      the two neighbours whose merge has the lowest rank become one, until no merge applies

Words come back often, so the ids of each word are remembered."""

import heapq
import json
import os
import re
import unicodedata
from enum import Enum
from itertools import chain

from nanosafe.errors import one_line_errors, stop
from nanosafe.storage import read_json, write_json
from nanosafe.tokenizer.patterns import Splitter, compile_splitter
from nanosafe.tokenizer.special_tokens import (
    MARK,
    NOT_EXPORTED,
    SPECIAL_KEYS,
    TOKENIZER_FILES,
    read_added_tokens,
)

REMEMBERED_WORDS = 2**18
REMEMBERED_LENGTH = 32  # characters; longer words hardly come back
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
REPLACEMENT = "\ufffd"  # what stands for bytes that are no text
# How the tokenizer of GPT-2 cuts a text: also what a ByteLevel pre-tokenizer does by itself.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
STRIP_ONE_SPACE = {"content": " ", "start": 1, "stop": 0}
# How transformers' Qwen2Tokenizer cuts a text, after NFC.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer_config.json says all that special_tokens_map.json does. Where both are there,
# transformers prefers the latter, and nanosafe the former.
EXPORTED_FILES = [name for name in TOKENIZER_FILES if name != "special_tokens_map.json"]
END_OF_SEQUENCE = ("<|end_of_text|>", "<|endoftext|>", "</s>")  # where no file names one


def make_byte_spelling():
    """{byte: character} of GPT-2: a printable byte is itself, the others are U+0100 and on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spelling = {}
    substitutes = 0
    for byte in range(256):
        if byte in printable:
            spelling[byte] = chr(byte)
        else:
            spelling[byte] = chr(256 + substitutes)
            substitutes += 1
    return spelling


SPELLING = make_byte_spelling()
BYTES = {character: bytes([byte]) for byte, character in SPELLING.items()}


def spell_bytes(data):
    """Bytes as a string with a character for each."""
    return data.decode("latin-1").translate(SPELLING)


class Prefix(Enum):
    """Where a space is put in front of a piece of text, a piece being what special tokens cut."""

    NEVER = "never"
    FIRST = "first"  # in front of a text's first piece, unless it begins with a space
    ALWAYS = "always"  # in front of every piece, unless it begins with a space
    PREPEND = "prepend"  # in front of every piece, even if it begins with a space


def load(file, names):
    """The engine of a tokenizer.json. names: what tokenizer_config.json says."""
    with one_line_errors(file):
        spec = read_tokenizer_json(file)
        ranks = read_merges(spec)
        added = read_added_tokens(spec)
    return BPEEngine(spec, ranks, added, names)


def read_tokenizer_json(file):
    """A tokenizer.json as a dict. Raises ValueError where its model is not as it should be."""
    spec = read_json(*os.path.split(file))
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        stop(f"{file!r} is not a BPE tokenizer, and no other kind of tokenizer.json is supported")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError("the vocabulary is not an object with tokens")
    for piece, id in vocab.items():
        if not isinstance(id, int):
            raise ValueError(f"the vocabulary gives {piece!r} the id {id!r}")
    unknown = model.get("unk_token")
    if unknown is not None and not isinstance(unknown, str):
        raise ValueError(f"unk_token is {unknown!r}, not a text")
    return spec


def read_merges(spec):
    """{(left, right): rank}. A file writes each merge as "left right", or as a list of the two."""
    merges = spec["model"]["merges"]
    if not isinstance(merges, list):
        raise ValueError(f"the merges are {merges!r}, not a list")
    ranks = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"the merge {merge!r} is not a pair of tokens")
        left, right = pair
        if not isinstance(left, str) or not isinstance(right, str):
            raise ValueError(f"the merge {merge!r} is not a pair of texts")
        ranks[left, right] = rank
    return ranks


def list_components(spec, key, list_key):
    """The components under a key of tokenizer.json, in order: none, one, or those of a Sequence.

    key       normalizer, pre_tokenizer, post_processor or decoder
    list_key  where a Sequence of that kind has its list"""
    component = spec.get(key)
    if not component:
        return []
    components = [component]
    if isinstance(component, dict) and list_key in component:
        components = component[list_key]
    if not isinstance(components, list):
        stop(f"tokenizer.json: {key} has {list_key} that are not a list")
    for part in components:
        if not isinstance(part, dict) or "type" not in part:
            stop(f"tokenizer.json: {key} has {part!r}, which is not an object with a type")
    return components


def list_first_tokens(spec):
    """The special tokens that post-processors put in front of a text, or None where they do not."""
    tokens = []
    for component in list_components(spec, "post_processor", "processors"):
        if component["type"] == "TemplateProcessing":
            tokens.append(read_first_token(component))
    return tokens


def read_first_token(component):
    """The special token that a template puts in front of a single text, or None."""
    single = component.get("single")
    if not isinstance(single, list) or not single or not isinstance(single[0], dict):
        stop(f"tokenizer.json: the post-processor has the template {single!r}")
    token = single[0].get("SpecialToken", {})
    text = token.get("id") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        stop(f"tokenizer.json: the post-processor has the special token {token!r}")
    return text


class RememberedWords(dict):
    """{word: its token ids}. A word that is not there is encoded, and remembered."""

    def __init__(self, encode_word):
        super().__init__()
        self.encode_word = encode_word

    def __missing__(self, word):
        ids = self.encode_word(word)
        if len(word) <= REMEMBERED_LENGTH:
            if len(self) >= REMEMBERED_WORDS:
                self.clear()
            self[word] = ids
        return ids


class BPEEngine:
    """The engine of a tokenizer.json.

    spec   the file as a dict
    ranks  {(left, right): rank}: its merges; the lowest rank is merged first
    added  {text: Token}: the tokens that it adds to its vocabulary
    names  what tokenizer_config.json says"""

    # Llama 3's tokenizer.model is not copied, because others would take it for SentencePiece's.
    files = [name for name in EXPORTED_FILES if name != "tokenizer.model"]

    def __init__(self, spec, ranks, added, names):
        model = spec["model"]
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                stop(f"tokenizer.json: {key} is not supported")
        self.spec = spec
        self.ranks = ranks
        self.added = added

        # The vocabulary.
        self.vocab = model["vocab"]
        self.pieces = {id: piece for piece, id in self.vocab.items()}
        self.size = max(self.pieces) + 1
        self.whole_words = set()  # words that are tokens as they are, without merges
        if model.get("ignore_merges"):
            self.whole_words = set(self.vocab) - set(added)  # text never makes a special token
        self.unknown = self.vocab.get(model.get("unk_token"))
        self.fuse_unknown = model.get("fuse_unk")  # several unknown characters are one token
        self.byte_fallback = model.get("byte_fallback", False)

        # How a text is normalized and cut into words.
        self.unicode_forms = []
        self.marks_spaces = False  # in LLaMA's kind of file; the others are byte-level
        self.is_byte_level = False
        self.prefix = Prefix.NEVER
        self.splitters = []
        self.strips_prefix = None  # whether decoding leaves out a space in front
        self.read_components(spec)
        self.legacy = self.prefix is not Prefix.FIRST
        self.remembered = RememberedWords(self.encode_word)

        # What begins and ends a text.
        first_tokens = list_first_tokens(spec)
        end_tokens = [text for text in END_OF_SEQUENCE if text in added]
        self.defaults = {
            "bos_token": first_tokens[0] if first_tokens else None,
            "eos_token": end_tokens[0] if end_tokens else None,
        }
        self.adds_bos = any(first_tokens)
        if names.get("add_bos_token") is not None:
            self.adds_bos = bool(names["add_bos_token"])

    def read_components(self, spec):
        """Read how the file normalizes and cuts texts, and how it decodes ids."""
        for component in list_components(spec, "normalizer", "normalizers"):
            self.read_normalizer(component)
        for component in list_components(spec, "pre_tokenizer", "pretokenizers"):
            self.read_pre_tokenizer(component)
        if self.marks_spaces == self.is_byte_level:
            stop(
                "tokenizer.json: a file must either have a ByteLevel pre-tokenizer or write spaces "
                "as U+2581; no other kind is supported"
            )
        if self.marks_spaces and not any(MARK in piece.lstrip(MARK) for piece in self.vocab):
            # No token has a mark behind another character, so that no merge crosses this cut.
            self.splitters.append(Splitter(f"{MARK}+[^{MARK}]*"))
        for component in list_components(spec, "decoder", "decoders"):
            self.read_decoder(component)
        if self.strips_prefix is None:
            self.strips_prefix = self.marks_spaces and self.prefix is not Prefix.NEVER

    def read_normalizer(self, component):
        kind = component["type"]
        replaced = component.get("pattern")
        replacement = component.get("content")
        if kind in UNICODE_FORMS and not self.marks_spaces:
            self.unicode_forms.append(kind)
        elif kind == "Prepend" and component.get("prepend") == MARK:
            self.prefix = Prefix.PREPEND
        elif kind == "Replace" and replaced == {"String": " "} and replacement == MARK:
            self.marks_spaces = True
        else:
            stop(f"tokenizer.json: the normalizer {component} is not supported")

    def read_pre_tokenizer(self, component):
        """Read one component that cuts a text, or that writes it in another way before it is cut.

        ByteLevel is the last one, because the others would cut the characters that it spells bytes
        with."""
        kind = component["type"]
        is_first = not self.splitters
        if self.is_byte_level:
            stop(f"tokenizer.json: the pre-tokenizer {kind} after ByteLevel is not supported")
        if kind == "Split":
            self.read_split(component)
        elif kind == "Digits":
            individual = component.get("individual_digits")
            self.splitters.append(compile_splitter(r"\p{N}" if individual else r"\p{N}+"))
        elif kind == "ByteLevel" and (is_first or not component.get("add_prefix_space")):
            self.read_byte_level(component)
        elif kind == "Metaspace" and component.get("replacement") == MARK and is_first:
            self.read_metaspace(component)
        else:
            stop(f"tokenizer.json: the pre-tokenizer {component} is not supported here")

    def read_byte_level(self, component):
        self.is_byte_level = True
        if component.get("add_prefix_space"):
            self.prefix = Prefix.ALWAYS
        if component.get("use_regex", True):
            self.splitters.append(compile_splitter(GPT2))

    def read_split(self, component):
        pattern = component.get("pattern")
        behavior = component.get("behavior")
        invert = bool(component.get("invert"))
        if behavior not in Splitter.behaviors or not isinstance(pattern, dict):
            stop(f"tokenizer.json: the pre-tokenizer {component} is not supported")
        regex = pattern.get("Regex")
        literal = pattern.get("String")
        if isinstance(regex, str):
            self.splitters.append(compile_splitter(regex, behavior, invert))
        elif isinstance(literal, str):
            expression = re.escape(literal)
            self.splitters.append(Splitter(expression, behavior=behavior, invert=invert))
        else:
            stop(f"tokenizer.json: the pre-tokenizer {component} is not supported")

    def read_metaspace(self, component):
        self.marks_spaces = True
        scheme = component.get("prepend_scheme")
        if scheme is None:  # an older file
            scheme = "always" if component.get("add_prefix_space", True) else "never"
        if scheme not in ("never", "first", "always"):
            stop(f"tokenizer.json: the prepend_scheme {scheme!r} is not supported")
        self.prefix = Prefix(scheme)
        if component.get("split", True):
            self.splitters.append(Splitter(f"{MARK}[^{MARK}]*"))

    def read_decoder(self, component):
        """Read one component that decodes. What decode() does anyway needs only to be known."""
        kind = component["type"]
        replaced = component.get("pattern")
        replacement = component.get("content")
        if kind == "ByteLevel" and self.is_byte_level:
            self.strips_prefix = False
        elif kind == "Replace" and replaced == {"String": MARK} and replacement == " ":
            self.strips_prefix = bool(self.strips_prefix)
        elif kind == "Strip" and component == {**STRIP_ONE_SPACE, "type": kind}:
            self.strips_prefix = True
        elif kind not in ("ByteFallback", "Fuse", "Metaspace"):
            stop(f"tokenizer.json: the decoder {component} is not supported")

    @property
    def identity(self):
        """Bytes that are equal for engines that give every text the same ids."""
        merges = sorted(self.ranks, key=self.ranks.get)  # files write them in two ways
        settings = [
            {**self.spec["model"], "merges": merges},
            self.spec.get("normalizer"),
            self.spec.get("pre_tokenizer"),
        ]
        return json.dumps(settings, sort_keys=True).encode()

    def normalize(self, text):
        for form in self.unicode_forms:
            text = unicodedata.normalize(form, text)
        return text

    def encode(self, text, begins=True, plain=False):
        """Token ids of a text without special tokens, as SentencePieceEngine.encode().

        plain changes nothing here, because this engine makes no special token of any text."""
        text = self.normalize(text)
        if text and begins and self.needs_prefix(text):
            text = " " + text
        if self.marks_spaces:
            text = text.replace(" ", MARK)
        words = [text]
        for splitter in self.splitters:
            words = list(chain.from_iterable(map(splitter.split, words)))
        return list(chain.from_iterable(map(self.remembered.__getitem__, words)))

    def needs_prefix(self, text):
        """Whether a space is put in front of a text."""
        if self.prefix is Prefix.NEVER:
            return False
        begins_with_space = text.startswith((" ", MARK) if self.marks_spaces else " ")
        return self.prefix is Prefix.PREPEND or not begins_with_space

    def encode_batch(self, texts):
        """encode() of many texts."""
        return [self.encode(text) for text in texts]

    def encode_word(self, word):
        """Token ids of a word."""
        if not self.marks_spaces:
            word = spell_bytes(word.encode())
        if word in self.whole_words:
            return [self.vocab[word]]
        ids = []
        for piece in merge_pairs(self.split_into_symbols(word), self.ranks):
            if piece in self.vocab:
                ids.append(self.vocab[piece])
            elif self.unknown is not None:
                follows_unknown = ids[-1:] == [self.unknown]
                if not (self.fuse_unknown and follows_unknown):
                    ids.append(self.unknown)
        return ids

    def split_into_symbols(self, word):
        """The characters of a word; instead of one without a token, the tokens of its bytes."""
        if not self.byte_fallback:
            return list(word)
        symbols = []
        for character in word:
            if character in self.vocab:
                symbols.append(character)
            else:
                symbols += [f"<0x{byte:02X}>" for byte in character.encode()]
        return symbols

    def decode(self, ids, begins=True):
        """The text of ids. begins: they begin a text, whose space in front is left out."""
        pieces = [self.pieces.get(id, "") for id in ids]
        if self.is_byte_level:
            text = decode_spelled_bytes("".join(pieces))
        else:
            text = decode_byte_tokens(pieces)
        if begins and self.strips_prefix:
            text = text.removeprefix(" ")
        return text

    @property
    def is_cut_as_qwen2(self):
        """Whether texts are normalized and cut as by transformers' Qwen2Tokenizer.

        That class puts its own rules in the place of those in a tokenizer.json."""
        components = list_components(self.spec, "pre_tokenizer", "pretokenizers")
        kinds = [component["type"] for component in components]
        if kinds != ["Split", "ByteLevel"] or self.unicode_forms != ["NFC"]:
            return False
        return components[0]["pattern"] == {"Regex": QWEN2}

    def save(self, tokenizer, path):
        """Write tokenizer.json, if it is not there or lacks something, and tokenizer_config.json.

        Tokenizer.save() has copied the files that there are. A tokenizer.json may lack tokens that
        were added later. It may also begin texts otherwise than the add_bos_token beside it says,
        which not every version of transformers reads."""
        spec = dict(self.spec)
        beyond = []
        for text, token in tokenizer.added.items():
            if text not in self.added:
                beyond.append(describe_added_token(text, token))
        if beyond:
            spec["added_tokens"] = [*(spec.get("added_tokens") or []), *beyond]
        bos = tokenizer.contents.get(tokenizer.bos_id) if self.adds_bos else None
        first_tokens = [token for token in list_first_tokens(spec) if token]
        if first_tokens != ([bos] if bos else []):
            spec["post_processor"] = describe_beginning(tokenizer.added, bos)
        is_there = os.path.exists(os.path.join(path, "tokenizer.json"))
        if spec != self.spec or not is_there:
            write_json(spec, path, "tokenizer.json")
        write_json(make_tokenizer_config(tokenizer), path, "tokenizer_config.json")


# ---- what is written for others ----


def describe_added_token(text, token):
    """An entry of the added_tokens in a tokenizer.json."""
    return {"content": text, "single_word": False, **token._asdict()}


def describe_beginning(tokens, bos):
    """The post-processor that puts the token `bos` in front of a text; None: it puts none there."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second_text = {"Sequence": {"id": "B", "type_id": 1}}
    single = [text]
    special_tokens = {}
    if bos is not None:
        single.insert(0, {"SpecialToken": {"id": bos, "type_id": 0}})
        special_tokens[bos] = {"id": bos, "ids": [tokens[bos].id], "tokens": [bos]}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, second_text],
        "special_tokens": special_tokens,
    }


def make_tokenizer_config(tokenizer):
    """The tokenizer_config.json with which every version of transformers gives a tokenizer's ids.

    Only the class that it names here takes tokenizer.json as it is: others put rules of their own
    in the place of those in the file. That class knows nothing about the model, so that what
    depends on the model is written too, unless the source's files say it."""
    config = {}
    for key, value in tokenizer.names.items():
        if key not in NOT_EXPORTED:
            config[key] = take_texts(value)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.setdefault("clean_up_tokenization_spaces", False)
    # transformers 4 would otherwise make token_type_ids as well, which these models refuse.
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    config.setdefault("padding_side", "left")  # an answer continues the last token of a prompt
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    for key, id in zip(SPECIAL_KEYS, ids):
        text = tokenizer.contents.get(id)
        if text is not None:
            config[key] = text
    # null: there is none. Where nothing is said, Qwen2Tokenizer may add a token of its own.
    config.setdefault("unk_token", None)
    return config


def take_texts(value):
    """A value of tokenizer_config.json with the texts of tokens in the place of descriptions.

    special_tokens_map.json describes tokens by objects that transformers does not take in this
    file. tokenizer.json has the descriptions."""
    if isinstance(value, list):
        return [take_texts(item) for item in value]
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return value["content"]
    return value


def decode_spelled_bytes(spelled):
    """The text of bytes for which characters stand. Another character is taken as it is."""
    data = bytearray()
    for character in spelled:
        data += BYTES.get(character) or character.encode()
    return data.decode(errors="replace")


def decode_byte_tokens(pieces):
    """The pieces as one text, with spaces for marks, and bytes for <0x0A> and the like.

    Where the bytes in a row are no UTF-8, each of them becomes U+FFFD, as in tokenizers."""
    text = ""
    data = bytearray()  # of the byte tokens in a row
    for piece in [*pieces, ""]:
        if BYTE_TOKEN.fullmatch(piece):
            data.append(int(piece[3:5], 16))
            continue
        if data:
            try:
                text += data.decode()
            except UnicodeDecodeError:
                text += REPLACEMENT * len(data)
            data.clear()
        text += piece.replace(MARK, " ")
    return text


def merge_pairs(symbols, ranks):
    """Merge the two neighbours with the lowest rank, leftmost first, until no merge applies.

    symbols  the characters of a word; what is returned are the strings that they were merged into
    ranks    {(left, right): rank}

    The symbols are a doubly linked list. A merge sets the left symbol to the pair's string, and the
    right one to None. Pairs that can merge wait in a heap, and are skipped there if one of their
    symbols has changed since."""
    symbols = [*symbols, None]  # the end; it merges with nothing, and index -1 is this one too
    end = len(symbols) - 1
    following = [*range(1, end + 1), 0]  # the index of the next symbol
    preceding = list(range(-1, end))  # the index of the symbol before
    heap = []  # (rank, index of the left symbol, pair)
    for i, pair in enumerate(zip(symbols, symbols[1:])):
        if pair in ranks:
            heap.append((ranks[pair], i, pair))
    heapq.heapify(heap)

    def push_pair(i):
        pair = (symbols[i], symbols[following[i]])
        if pair in ranks:
            heapq.heappush(heap, (ranks[pair], i, pair))

    while heap:
        rank, i, pair = heapq.heappop(heap)
        j = following[i]
        if (symbols[i], symbols[j]) != pair:
            continue
        symbols[i] = pair[0] + pair[1]
        symbols[j] = None
        following[i] = following[j]
        preceding[following[j]] = i
        push_pair(preceding[i])
        push_pair(i)
    return [symbol for symbol in symbols if symbol]
