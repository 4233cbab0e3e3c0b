"""What the tests of tokenizers compare with: tokenizers of other libraries, and texts to encode."""

import json
import random
import unicodedata
from functools import cache

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

from nanosafe.tokenizer.bpe import QWEN2, make_byte_spelling
from nanosafe.tokenizer.tiktoken import LLAMA3

WORDS = (
    "the of and to in is that for it as was with be by on not he I this are or his from at which "
    "but have an had they you were their one all we can her has there been if more when will would "
    "who so no said what up its about than into them only other time new some could these two may "
    "first then do any like my now over such our man me even most made after also did many before "
    "must through years where much your way well down should because each just those people how "
    "too little state good very make world still own see men work long here get both between life "
    "being under never day same another know while last might us great old year off come since "
    "against go came right used take three don't I'll we've it's you're he'd I'm 1984 3.14 x=1 "
    "12,345 naïve café Übergröße дом мир привет 你好 世界 日本語 テスト 한국어 مرحبا שלום नमस्ते สวัสดี 🙂 "
    "👩‍👩‍👧 é ﬁ ½ Ⅷ ² foo_bar camelCase __init__ a+b=c (x) [y] {z} "
    "<s> </s> <pad> <unk> <|endoftext|> <|eot_id|> http://a.b/c?d=e"
).split()
LINES = [" ".join(random.Random(i).choices(WORDS, k=12)) + "\n" * (i % 3) for i in range(3000)]
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t"]
CONTRACTIONS = ["'s", "'S", "'LL", "ſ"]
OTHER_SPACES = ["\u00a0", "\u3000", "\u2028", "\x1c", "\x85"]  # to Unicode, or to Python only
JOINERS = ["\u0301", "\u200b", "\u200d"]
SPACE_MARKS = ["▁", "▁▁", "Ġ"]  # what tokenizers write for a space
SHORT_WORDS = ["0", "7", "42", "٣", "A", "zZ", ".", "...", "!?", "-", "_"]
PARTS = WORDS + SPACES + CONTRACTIONS + OTHER_SPACES + JOINERS + SPACE_MARKS + SHORT_WORDS


@cache
def assigned_code_points():
    """All code points that this Python's Unicode has a character for, without surrogates."""
    codes = []
    for code in range(1, 0x110000):
        is_surrogate = 0xD800 <= code < 0xE000
        if not is_surrogate and unicodedata.category(chr(code)) != "Cn":
            codes.append(code)
    return codes


def make_texts(n, seed=0, further=()):
    """n texts: mixtures of words, white space, special tokens, marks and random code points.

    further  words to mix in, such as special tokens of one model"""
    rng = random.Random(seed)
    known_parts = [*PARTS, *further]
    codes = assigned_code_points()
    for _ in range(n):
        parts = []
        for _ in range(rng.randint(0, 12)):
            known = rng.random() < 0.8
            parts.append(rng.choice(known_parts) if known else chr(rng.choice(codes)))
        text = ""
        for part in parts:
            text += part
            if rng.random() < 0.4:
                text += " "
        yield text


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
    """Train a byte-level tokenizer.json with Hugging Face's library; returns its tokenizer.

    config  what tokenizer_config.json says"""
    theirs = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    theirs.normalizer = normalizers.NFC() if nfc else None
    cutters = []
    if digits:
        cutters.append(pre_tokenizers.Digits(individual_digits=True))
    if pattern:
        cutters.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    cutters.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(cutters)
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(LINES, trainer)
    theirs.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    normalized = AddedToken("foo_bar", normalized=True)
    stripping = AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)
    theirs.add_tokens([normalized, stripping])
    if bos:
        begin = (bos, theirs.token_to_id(bos))
        theirs.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[begin]
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
        pattern=QWEN2,
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


def list_merges(sp, vocab):
    """The merges of a SentencePiece BPE model, as Hugging Face's converter finds them.

    The highest score comes first; of equal scores, the longest left part, and then the longest
    right part."""
    ranked = []
    for i, piece in enumerate(vocab):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i):
            continue
        for cut in range(1, len(piece)):
            left = piece[:cut]
            right = piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-sp.get_score(i), -cut, cut - len(piece), left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def from_sentencepiece(sp, path, legacy=True):
    """Write a SentencePiece model's tokenizer.json as Hugging Face does; returns its tokenizer.

    legacy  with a space before each piece between special tokens; False: before the first one"""
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = list_merges(sp, vocab)
    theirs = Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    if legacy:
        prepend = normalizers.Prepend("▁")
        theirs.normalizer = normalizers.Sequence([prepend, normalizers.Replace(" ", "▁")])
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
    specials = []
    for piece, id in vocab.items():
        if sp.is_control(id) or sp.is_unknown(id):
            specials.append(AddedToken(piece, special=True, normalized=False))
    theirs.add_special_tokens(specials)
    theirs.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    path.mkdir(parents=True, exist_ok=True)
    theirs.save(str(path / "tokenizer.json"))
    return theirs


def from_ranks(ranks, pattern, path, specials, every_split, nfc=False, bos=None):
    """Write the tokenizer.json that is published for a tiktoken file; returns its tokenizer.

    ranks        {token in bytes: rank}
    specials     the tokens behind the others, in the order of their ids
    every_split  Llama 3's manner: each pair that makes a token merges, and a word that is a token
                 is taken whole. False: Qwen's manner: a token has one merge, the last of those that
                 make it of its bytes"""
    spelling = make_byte_spelling()
    spelled = {token: "".join(spelling[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = list_splits(token, ranks) if every_split else [find_last_merge(token, ranks)]
        for left, right in pairs:
            if left and right:
                merges.append((spelled[left], spelled[right]))
    theirs = Tokenizer(models.BPE(vocab, merges, ignore_merges=every_split))
    theirs.normalizer = normalizers.NFC() if nfc else None
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    theirs.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        template = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, theirs.token_to_id(bos))]
        )
        theirs.post_processor = processors.Sequence([theirs.post_processor, template])
    path.mkdir(parents=True, exist_ok=True)
    theirs.save(str(path / "tokenizer.json"))
    return theirs


def list_splits(token, ranks):
    """The pairs of tokens that make a token, those of the lowest ranks first."""
    pairs = []
    for i in range(1, len(token)):
        left = token[:i]
        right = token[i:]
        if left in ranks and right in ranks:
            pairs.append((left, right))
    return sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def find_last_merge(token, ranks):
    """The two parts that byte-pair encoding makes of a token's bytes before it makes the token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = []
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1])
            if rank is not None:
                candidates.append((rank, i))
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts if len(parts) == 2 else (None, None)


def in_the_manner_of_smollm2(vocab, merges, specials, path):
    """Write the tokenizer.json of SmolLM2 for a vocabulary; returns its tokenizer."""
    theirs = Tokenizer(models.BPE(vocab, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    path.mkdir(parents=True, exist_ok=True)
    theirs.save(str(path / "tokenizer.json"))
    return theirs


def find_mismatches(ours, theirs, n, further=()):
    """Texts on which the ids, with and without BOS, or their decoding differ.

    ours    a Tokenizer of nanosafe's
    theirs  one of tokenizers'"""
    found = []
    for text in make_texts(n, further=further):
        ids = theirs.encode(text, add_special_tokens=False).ids
        same = (
            ours.encode(text) == ids
            and ours.encode(text, bos=True) == theirs.encode(text).ids
            and ours.decode(ids) == theirs.decode(ids)
        )
        if not same:
            found.append(text)
    return found


def find_decoding_mismatches(ours, theirs, n):
    """Lists of random ids, such as an untrained model samples, that decode to different texts."""
    rng = random.Random(0)
    size = theirs.get_vocab_size()
    found = []
    for _ in range(n):
        ids = [rng.randrange(size) for _ in range(rng.randint(0, 12))]
        if ours.decode(ids) != theirs.decode(ids):
            found.append(ids)
    return found
