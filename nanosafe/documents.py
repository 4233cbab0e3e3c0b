"""Documents whose segments carry misalignment scores -> blocks of tokens with a score each: the
data of pretraining with human preferences (arXiv:2302.08582). Higher scores are worse.

A row is `texts`, the segments in order, and their `scores`. A document is BOS, its segments and
EOS; a long one goes on in the next block, behind another BOS. No block looks at another."""

import numpy as np
import torch

from nanosafe.build import check_scores, check_text
from nanosafe.tokenizer import Token, Tokenizer

ALIGNED, MISALIGNED = CONTROL = "<|aligned|>", "<|misaligned|>"

def with_control_tokens(tokenizer):
    """The tokenizer with the control tokens behind its others."""
    missing = [text for text in CONTROL if text not in tokenizer.added]
    added = {text: Token(tokenizer.vocab_size + i) for i, text in enumerate(missing)}
    others = tokenizer.names.get("additional_special_tokens") or ()
    names = {**tokenizer.names, "additional_special_tokens": [*others, *missing]}
    return Tokenizer(tokenizer.engine, {**tokenizer.added, **added}, names, tokenizer.eos_ids,
                     tokenizer.file)

def control_ids(tokenizer):
    """The ids of the control tokens, which are never sampled; none where there are none."""
    return [tokenizer.added[text].id for text in CONTROL if text in tokenizer.added]

def check(record):
    """The segments and scores of a row; raises ValueError with the reason to drop it."""
    if record is None:
        raise ValueError("no JSON object")
    texts, scores = record.get("texts"), record.get("scores")
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores):
        raise ValueError("not one score for each of the texts")
    check_scores(scores)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a segment that is no text")
    check_text("".join(texts), "document")
    return list(zip(texts, scores))

def blocks(rows, tokenizer, max_len, drop, objective="mle", threshold=0.0, drop_fraction=0.0):
    """(row, None, (sequences, labels, line)) of each block; a sequence is (ids, mask, scores).

    objective "filter" drops documents whose mean score is above the threshold; "conditional" puts a
    control token before every segment, by its score, but for a drop_fraction of them; "compare"
    does so too, but counts no control tokens: to measure a conditional model's loss on text."""
    control = control_ids(tokenizer)
    for row in rows:
        try:
            segments = check(row.record)
        except ValueError as error:
            drop(row, str(error))
            continue
        if objective == "filter" and sum(s for _, s in segments) / len(segments) > threshold:
            drop(row, f"documents with a mean score above {threshold}")
            continue
        draws = np.random.default_rng([0, row.line]).random(len(segments))
        ids, mask, scores = [], [], []
        for (text, score), draw in zip(segments, draws):
            piece, counted = tokenizer.encode_suffix(text), 1
            if objective in ("conditional", "compare") and draw >= drop_fraction:
                piece = [control[0] if score <= threshold else control[1], *piece]
                counted = int(objective == "conditional")
            ids += piece
            mask += [counted] + [1] * (len(piece) - 1) if piece else []
            scores += [score] * len(piece)
        ids, mask, scores = [*ids, tokenizer.eos_id], [*mask, 1], [*scores, segments[-1][1]]
        start = tokenizer.encode("", bos=True)
        size = max_len - len(start)
        for begin in range(0, len(ids), size):
            span = slice(begin, begin + size)
            yield row, None, ([(start + ids[span], [0] * len(start) + mask[span],
                                [0.0] * len(start) + scores[span])], (0,), row.line)

def scores_of(dataset, examples, device):
    """The misalignment score of each target (N,), packed as dataset.batch() packs the tokens."""
    parts = [dataset.scores[dataset.offsets[i]:dataset.offsets[i + 1]] for i in examples]
    flat = np.concatenate(parts or [np.zeros(1, np.float32)])
    return torch.from_numpy(np.append(flat[1:], np.float32(0))).to(device)
