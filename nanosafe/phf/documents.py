"""Documents whose segments carry misalignment scores -> blocks of tokens with a score each: the
data of pretraining with human preferences (arXiv:2302.08582). Higher scores are worse.

A row is `texts`, the segments in order, and their `scores`. A document is BOS, its segments and
EOS; a long one goes on in the next block, behind another BOS. No block looks at another."""

import numpy as np
import torch

from nanosafe.data import tokenize
from nanosafe.data.examples import check_scores, check_text, usable_rows
from nanosafe.tokenizer.special_tokens import control_token_ids


def check_document(record):
    """The segments and scores of a row; raises ValueError with the reason to drop it."""
    if record is None:
        raise ValueError("no JSON object")
    texts, scores = record.get("texts"), record.get("scores")
    check_scores(scores, texts, "each of the texts")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a segment that is no text")
    check_text("".join(texts), "document")
    return list(zip(texts, scores))


def cut_into_blocks(
    rows, tokenizer, task, max_len, drop, objective="mle", threshold=0.0, drop_fraction=0.0
):
    """(row, None, (sequences, labels, line)) of each block; a sequence is (ids, mask, scores).

    objective "filter" drops documents whose mean score is above the threshold; "conditional" puts a
    control token before every segment, by its score, but for a drop_fraction of them; "compare"
    does so too, but counts no control tokens: to measure a conditional model's loss on text."""
    control = control_token_ids(tokenizer)
    start = [(i, 0, 0.0) for i in tokenizer.encode("", bos=True)]
    for row, segments in usable_rows(rows, check_document, drop):
        if objective == "filter" and sum(s for _, s in segments) / len(segments) > threshold:
            drop(row, f"documents with a mean score above {threshold}")
            continue
        draws = np.random.default_rng([0, row.line]).random(len(segments))
        tokens = []  # (id, whether it counts, score)
        for (text, score), draw in zip(segments, draws):
            if objective in ("conditional", "compare") and draw >= drop_fraction:
                tokens.append((control[score > threshold], objective == "conditional", score))
            tokens += [(i, 1, score) for i in tokenizer.encode_suffix(text)]
        tokens.append((tokenizer.eos_id, 1, segments[-1][1]))
        for begin in range(0, len(tokens), max_len - len(start)):
            block = start + tokens[begin : begin + max_len - len(start)]
            yield row, None, ([tuple(zip(*block))], (0,), row.line)


def tokenize_documents(spec, tokenizer, max_len, max_tokens=0, method=()):
    """The Dataset of blocks of documents; method: objective, threshold and drop_fraction."""
    return tokenize(
        spec, tokenizer, "documents", max_len, max_tokens, method=method, read=cut_into_blocks
    )


def target_scores(dataset, examples, device):
    """The misalignment score of each target (N,), packed as dataset.batch() packs the tokens."""
    parts = [dataset.scores[dataset.offsets[i] : dataset.offsets[i + 1]] for i in examples]
    flat = np.concatenate(parts or [np.zeros(1, np.float32)])
    return torch.from_numpy(np.append(flat[1:], np.float32(0))).to(device)
