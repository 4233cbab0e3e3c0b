"""TODO."""

import os

import sentencepiece

from nanosafe.errors import stop
from nanosafe.storage import write_json
from nanosafe.tokenizer.special_tokens import TOKENIZER_FILES, MARK, WHITE_SPACE, SPECIAL, Token


NO_PREFIX = b"\x1a\x02\x18\x00"  # protobuf, to append: normalizer_spec {add_dummy_prefix: false}


class SentencePieceEngine:
    """A SentencePiece model, as its file declares itself; names: tokenizer_config.json's."""

    files, normalize = TOKENIZER_FILES, str

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
            and text.strip(MARK + WHITE_SPACE)
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
