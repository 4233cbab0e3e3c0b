"""TODO."""

import base64
import os
from itertools import count

from nanosafe.storage import read_json
from nanosafe.tokenizer.bpe import BPEEngine, SPELLING


def load(file, names):
    """The engine of Llama 3's tokenizer.model; names: tokenizer_config's."""
    return BPEEngine(*read_llama3_file(file), names)


def read_llama3_file(file):
    """What Llama 3's tokenizer.model (github.com/meta-llama/llama3), tokens in base64 and their
    ranks, would be as a tokenizer.json; and the rank of each pair: that of the token it makes."""
    with open(file, "rb") as f:
        rows = [line.split() for line in f.read().splitlines() if line]
    vocab = {base64.b64decode(t).decode("latin-1").translate(SPELLING): int(r) for t, r in rows}
    ranks = {
        (token[:i], token[i:]): rank
        for token, rank in vocab.items()
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    }
    params = read_json(os.path.dirname(file), "params.json")
    spec, n = read_json(os.path.dirname(__file__), "llama3.json"), len(vocab)  # all but its tokens
    known, since_3_1 = spec.pop("special_tokens"), spec.pop("special_tokens_since_3.1")
    if params.get("model", params).get("use_scaled_rope"):
        known.update(since_3_1)
    reserved = map("<|reserved_special_token_{}|>".format, count())
    special = [known.get(str(i)) or next(reserved) for i in range(256)]
    spec["added_tokens"] = [
        {"id": n + i, "content": text, **spec["added_tokens"][0]} for i, text in enumerate(special)
    ]
    spec["post_processor"]["special_tokens"][special[0]]["ids"] = [n]
    spec["model"].update(vocab=vocab, merges=[list(p) for p in sorted(ranks, key=ranks.get)])
    return spec, ranks
