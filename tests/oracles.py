"""Tokenizers and strings that the tests of tokenizer.py and bpe.py compare with other libraries."""

import json
import os
import random
import unicodedata

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from nanosafe.tokenizer.llama3 import LLAMA3

WORDS = (
    "the of and to in is that for it as was with be by on not he I this are or his from at which but have an "
    "had they you were their one all we can her has there been if more when will would who so no said what up "
    "its about than into them only other time new some could these two may first then do any like my now over "
    "such our man me even most made after also did many before must through years where much your way well down "
    "should because each just those people how too little state good very make world still own see men work long "
    "here get both between life being under never day same another know while last might us great old year off "
    "come since against go came right used take three don't I'll we've it's you're he'd I'm 1984 3.14 x=1 12,345 "
    "naïve café Übergröße дом мир привет 你好 世界 日本語 テスト 한국어 مرحبا שלום नमस्ते สวัสดี 🙂 👩‍👩‍👧 é ﬁ ½ Ⅷ ² "
    "foo_bar camelCase __init__ a+b=c (x) [y] {z} <s> </s> <pad> <unk> <|endoftext|> <|eot_id|> http://a.b/c?d=e"
).split()
LINES = [" ".join(random.Random(i).choices(WORDS, k=12)) + "\n" * (i % 3) for i in range(3000)]
PARTS = [
    *WORDS,
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "'s",
    "'S",
    "'LL",
    "ſ",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x1c",
    "\x85",
    "\u0301",
    "\u200b",
    "\u200d",
    "▁",
    "▁▁",
    "Ġ",
    "0",
    "7",
    "42",
    "٣",
    "A",
    "zZ",
    ".",
    "...",
    "!?",
    "-",
    "_",
]


def strings(n, seed=0):
    """n texts: mixtures of words, white space, specials, marks and random code points."""
    rng = random.Random(seed)
    known = [
        c
        for c in range(1, 0x110000)
        if not 0xD800 <= c < 0xE000 and unicodedata.category(chr(c)) != "Cn"
    ]
    for _ in range(n):
        parts = [
            rng.choice(PARTS) if rng.random() < 0.8 else chr(rng.choice(known))
            for _ in range(rng.randint(0, 12))
        ]
        yield "".join(p + (" " if rng.random() < 0.4 else "") for p in parts)


def byte_level(
    path,
    pattern,
    digits=False,
    nfc=False,
    bos=None,
    specials=(),
    ignore_merges=False,
    vocab=1500,
    **config,
):
    """Train a tokenizer.json with Hugging Face's library in the manner of one of the families; returns theirs."""
    theirs = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    theirs.normalizer = normalizers.NFC() if nfc else None
    cutters = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    cutters += [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    cutters += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)]
    theirs.pre_tokenizer = pre_tokenizers.Sequence(cutters)
    theirs.decoder = decoders.ByteLevel()
    theirs.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=vocab,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    theirs.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    theirs.add_tokens(
        [
            AddedToken("foo_bar", normalized=True),
            AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False),
        ]
    )
    if bos:
        theirs.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, theirs.token_to_id(bos))]
        )
    path.mkdir(parents=True, exist_ok=True)
    theirs.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return theirs


FAMILIES = {
    "llama3": dict(
        pattern=LLAMA3,
        bos="<|begin_of_text|>",
        ignore_merges=True,
        eos_token="<|eot_id|>",
        specials=("<|begin_of_text|>", "<|endoftext|>", "<|eot_id|>"),
    ),
    "qwen2": dict(
        pattern=LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
        nfc=True,
        eos_token="<|endoftext|>",
        bos_token=None,
        add_bos_token=False,
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    ),
    "smollm2": dict(
        pattern=None,
        digits=True,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        specials=("<|endoftext|>", "<|im_start|>"),
    ),
}


def from_sentencepiece(sp, path, legacy=True):
    """The tokenizer.json of a SentencePiece model, made as Hugging Face makes it; returns theirs."""
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    plain = [
        p
        for i, p in enumerate(pieces)
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))
    ]
    merges = sorted(
        (-sp.get_score(vocab[p]), -i, i - len(p), p[:i], p[i:])
        for p in plain
        for i in range(1, len(p))
        if p[:i] in vocab and p[i:] in vocab
    )
    theirs = Tokenizer(
        models.BPE(
            vocab, [m[3:] for m in merges], byte_fallback=True, fuse_unk=True, unk_token="<unk>"
        )
    )
    if legacy:
        theirs.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        theirs.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
    theirs.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    theirs.add_special_tokens(
        [AddedToken(s, special=True, normalized=False) for s in ("<unk>", "<s>", "</s>")]
    )
    theirs.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    path.mkdir(parents=True, exist_ok=True)
    theirs.save(str(path / "tokenizer.json"))
    return theirs
