"""The tokenizer.json of a SentencePiece model, which is written beside its tokenizer.model.

transformers 5 reads a tokenizer.model in one of several ways, which depends on the model's family,
and some of them give other ids. A tokenizer.json says itself how it is read, and every version
of transformers takes it as it is. Whether it gives SentencePiece's ids is tried out before it is
written."""

import re

from nanosafe.tokenizer.bpe import BPEEngine, describe_added_token, describe_beginning
from nanosafe.tokenizer.special_tokens import MARK

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES_IN_A_TRIAL = 32
TRIAL_TEXTS = (
    " begins with a space",
    "ends with a space ",
    "several" + "   ".join("abcdefg"),
    "a\n\n\nb\tc\r\n",
    "ｆｕｌｌ ﬁ ½ ² Ⅷ é \u00a0\u3000",
    "1234567890 3.14 12,345",
    "你好 世界 дом привет 🙂",
    "\x00\x7f\U0010fffd",
)


def make_tokenizer_json(engine, tokens, bos):
    """The tokenizer.json of a SentencePieceEngine, or None where that would give other ids.

    tokens  {text: Token}: the special and added tokens
    bos     the text of the token that begins a text, or None"""
    ranks = rank_merges(engine)
    spec = describe(engine, sorted(ranks, key=ranks.get), tokens, bos)
    written = BPEEngine(spec, ranks, {}, {})
    for text in list_trial_texts(engine):
        if written.encode(text, begins=False) != engine.encode(text, begins=False):
            return None
        # Metaspace, which stands for legacy=False, puts no second space in front of a first one.
        is_comparable = engine.legacy or not text.startswith(" ")
        if is_comparable and written.encode(text) != engine.encode(text):
            return None
    return spec


def rank_merges(engine):
    """{(left, right): rank}: two pieces whose text together is a piece, by that piece's score.

    SentencePiece merges those neighbours first that make the piece with the highest score. Of equal
    scores, the longer left piece comes first, as in the files that Hugging Face converts."""
    learnt = set()
    for id, piece in enumerate(engine.pieces):
        if not (engine.sp.is_byte(id) or piece in engine.added):
            learnt.add(piece)
    merges = []
    for id, piece in enumerate(engine.pieces):
        if piece not in learnt:
            continue
        for cut in range(1, len(piece)):
            left = piece[:cut]
            right = piece[cut:]
            if left in learnt and right in learnt:
                merges.append((-engine.sp.get_score(id), -cut, -len(right), left, right))
    ranks = {}
    for rank, merge in enumerate(sorted(merges)):
        ranks[merge[-2:]] = rank
    return ranks


def describe(engine, merges, tokens, bos):
    """A tokenizer.json as a dict, as Hugging Face's tokenizers writes it."""
    has_prefix = engine.sp.encode("a") != engine.sp_no_prefix.encode("a")
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": MARK}]
    pre_tokenizers = []
    if has_prefix and engine.legacy:
        normalizers.insert(0, {"type": "Prepend", "prepend": MARK})
    elif has_prefix:
        metaspace = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "first"}
        pre_tokenizers.append({**metaspace, "split": False})
    if engine.spelled:  # user-defined pieces, which are whole wherever they stand in a text
        texts = sorted((engine.pieces[id] for id in engine.spelled), key=len, reverse=True)
        pattern = "|".join(re.escape(text) for text in texts)
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        pre_tokenizers.append({**split, "invert": False})
    pre_tokenizer = None
    if pre_tokenizers:
        pre_tokenizer = {"type": "Sequence", "pretokenizers": pre_tokenizers}
    decoders = [
        {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    has_bytes = set(BYTE_PIECES) <= set(engine.pieces)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list_added_tokens(tokens),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": pre_tokenizer,
        "post_processor": describe_beginning(tokens, bos),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": engine.pieces[engine.sp.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": has_bytes,
            "ignore_merges": bool(engine.spelled),
            "vocab": make_vocab(engine, tokens),
            "merges": [list(merge) for merge in merges],
        },
    }


def make_vocab(engine, tokens):
    """{text: id} of all pieces, and of the tokens, which may have the ids of pieces.

    The library tokenizers numbers an added token itself, unless the vocabulary has it."""
    texts = dict(enumerate(engine.pieces))
    for text, token in tokens.items():
        texts[token.id] = text
    return {text: id for id, text in sorted(texts.items())}


def list_added_tokens(tokens):
    """The added_tokens of a tokenizer.json, by their ids."""
    by_id = sorted(tokens.items(), key=lambda item: item[1].id)
    return [describe_added_token(text, token) for text, token in by_id]


def list_trial_texts(engine):
    """Texts on which the two engines are compared: what is hard, and all pieces, several a text."""
    texts = list(TRIAL_TEXTS)
    for count in range(2, 20):
        texts.append("a" + " " * count + "b")
    words = []
    for id, piece in enumerate(engine.pieces):
        if not (engine.sp.is_byte(id) or piece in engine.added):
            words.append(piece.replace(MARK, " "))
    for begin in range(0, len(words), PIECES_IN_A_TRIAL):
        texts.append("".join(words[begin : begin + PIECES_IN_A_TRIAL]))
    return texts
