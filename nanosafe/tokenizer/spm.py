"""The engine of SentencePiece's tokenizer.model: LLaMA 1 and 2, Mistral, Baichuan, InternLM."""

import os

import sentencepiece

from nanosafe.errors import stop
from nanosafe.storage import write_json
from nanosafe.tokenizer.bpe import EXPORTED_FILES, make_tokenizer_config
from nanosafe.tokenizer.sentencepiece_json import make_tokenizer_json
from nanosafe.tokenizer.special_tokens import (
    MARK,
    SPECIAL_KEYS,
    WHITE_SPACE,
    Token,
)

# Appended to a model, it switches the space in front of a text off. In protobuf:
# normalizer_spec {add_dummy_prefix: false}
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceEngine:
    """A SentencePiece model, with the settings that its own file declares.

    content  the bytes of tokenizer.model
    names    what tokenizer_config.json says
    file     the file's path, for messages"""

    files = EXPORTED_FILES
    is_cut_as_qwen2 = False

    def __init__(self, content, names, file="tokenizer.model"):
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.sp_no_prefix = sentencepiece.SentencePieceProcessor(
                model_proto=content + NO_DUMMY_PREFIX
            )
        except RuntimeError:
            stop(f"{file!r} is not a SentencePiece model")
        self.identity = content
        # Whether every piece between special tokens gets a space in front, or only the first.
        self.legacy = names.get("legacy") is not False
        self.adds_bos = names.get("add_bos_token") is not False
        self.size = self.sp.vocab_size()
        self.pieces = [self.sp.id_to_piece(i) for i in range(self.size)]
        self.added = {}
        for i, piece in enumerate(self.pieces):
            if self.sp.is_control(i) or self.sp.is_unknown(i):
                self.added[piece] = Token(i)
        self.defaults = self.find_defaults()
        self.spelled = self.spell_user_defined_pieces()

    def find_defaults(self):
        """{key: piece} of the special tokens that the model itself declares."""
        defaults = {"pad_token": "<pad>"}
        ids = (self.sp.bos_id(), self.sp.eos_id(), self.sp.pad_id())
        for key, id in zip(SPECIAL_KEYS, ids):
            if id >= 0:
                defaults[key] = self.pieces[id]
        return defaults

    def spell_user_defined_pieces(self):
        """{id: the ids of its characters} of user-defined pieces, such as Baichuan2's roles.

        SentencePiece takes such a piece whole wherever it stands in a text, so that a user could
        write one: in user text it is spelled out. SentencePiece's Python package cannot say which
        pieces these are. Their score is 0, which of the learnt pieces only the first one has; the
        piece behind that one has -1."""
        scores = [self.sp.get_score(i) for i in range(self.size)]
        spelled = {}
        for i, piece in enumerate(self.pieces):
            is_first_learnt = scores[i + 1 : i + 2] == [-1]
            if scores[i] != 0 or is_first_learnt:
                continue
            is_declared = self.sp.is_byte(i) or piece in self.added  # a byte, control or unknown
            is_white_space = not piece.strip(MARK + WHITE_SPACE)
            if is_declared or is_white_space or len(piece) == 1:
                continue
            spelled[i] = []
            for character in piece:
                spelled[i] += self.sp_no_prefix.encode(character)
        return spelled

    def normalize(self, text):
        """The text as it is: SentencePiece normalizes by itself, when it encodes."""
        return text

    def encode(self, text, begins=True, plain=False):
        """Token ids of a text without special tokens.

        begins  put a space in front, where the model's texts have one
        plain   the text is a user's: user-defined pieces in it are spelled out"""
        ids = self.sp.encode(text) if begins else self.sp_no_prefix.encode(text)
        return self.spell_out(ids) if plain else ids

    def spell_out(self, ids):
        """Replace user-defined pieces by their characters."""
        if not self.spelled:
            return ids
        result = []
        for id in ids:
            if id in self.spelled:
                result += self.spelled[id]
            else:
                result.append(id)
        return result

    def encode_batch(self, texts):
        """encode(text, plain=True) of many texts, on all cores."""
        encoded = self.sp.encode(texts, num_threads=os.cpu_count() or 1)
        return [self.spell_out(ids) for ids in encoded]

    def decode(self, ids, begins=True):
        """The text of ids. begins: they begin a text, whose space in front is left out."""
        if begins or not ids:
            return self.sp.decode(ids)
        # SentencePiece drops a leading space, so that something else must lead.
        dot = self.sp.encode(".")[-1:]
        return self.sp.decode(dot + ids)[len(self.sp.decode(dot)) :]

    def save(self, tokenizer, path):
        """Write tokenizer.json, tokenizer_config.json, and added_tokens.json if there are any.

        Tokenizer.save() has copied the files that there are: a tokenizer.json among them is
        replaced, because it may lack tokens, or cut texts in another way. It stays only where this
        model cannot be written as one."""
        config = make_tokenizer_config(tokenizer)
        config.setdefault("add_bos_token", True)
        config.setdefault("add_eos_token", False)
        config.setdefault("legacy", self.legacy)
        config["clean_up_tokenization_spaces"] = False
        config["unk_token"] = self.pieces[self.sp.unk_id()]
        if self.sp.encode("a") == self.sp_no_prefix.encode("a"):
            config["add_prefix_space"] = False
        write_json(config, path, "tokenizer_config.json")

        bos = tokenizer.contents.get(tokenizer.bos_id) if self.adds_bos else None
        spec = make_tokenizer_json(self, tokenizer.added, bos)
        if spec is not None:
            write_json(spec, path, "tokenizer.json")

        beyond = {}
        for text, token in tokenizer.added.items():
            if token.id >= self.size:
                beyond[text] = token.id
        if beyond:
            write_json(beyond, path, "added_tokens.json")
