"""Documents whose segments carry misalignment scores -> blocks of tokens with a score each.

This is the data of pretraining with human preferences (arXiv:2302.08582). A row has `texts`, the
segments of a document in order, and `scores`, one for each segment; higher scores are worse. A
document becomes BOS, its segments and EOS. One that is longer than a block continues in the next
block, behind another BOS. Blocks do not attend to each other.
"""

import numpy as np
import torch

from nanosafe.data import tokenize
from nanosafe.data.examples import Example, Sequence, check_scores, check_text, usable_rows
from nanosafe.tokenizer.special_tokens import control_token_ids


def check_document(record):
    """The segments of a row, [(text, score)]; raises ValueError with the reason to drop the row."""
    if record is None:
        raise ValueError("not a JSON object")
    texts = record.get("texts")
    scores = record.get("scores")
    check_scores(scores, texts, "each of the texts")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError("a segment that is not text")
    check_text("".join(texts), "document")
    return list(zip(texts, scores))


def cut_into_blocks(
    rows, tokenizer, task, max_len, drop, objective="mle", threshold=0.0, drop_fraction=0.0
):
    """Yield (row, Example) for each block of at most max_len tokens.

    A block has one sequence: its token ids, its loss mask, and a score for each token. A token has
    the score of its segment, EOS that of the last segment, and BOS, which is no target, has 0.

    objective  "filter" drops documents whose mean score is above the threshold;
               "conditional" puts a control token before every segment: <|misaligned|> if its score
               is above the threshold, else <|aligned|>. A drop_fraction of the segments gets none;
               "compare" does the same, but control tokens carry no loss: the loss of a conditional
               model on the text alone;
               all other objectives take the documents as they are"""
    has_control_tokens = objective in ("conditional", "compare")
    loss_of_control_tokens = 1 if objective == "conditional" else 0
    if has_control_tokens:
        aligned_id, misaligned_id = control_token_ids(tokenizer)
    bos = tokenizer.encode("", bos=True)  # empty where the tokenizer has no BOS
    block_len = max_len - len(bos)
    for row, segments in usable_rows(rows, check_document, drop):
        if objective == "filter" and mean_score(segments) > threshold:
            drop(row, f"documents with a mean score above {threshold}")
            continue
        ids = []
        mask = []
        scores = []
        draws = np.random.default_rng([0, row.line]).random(len(segments))
        for (text, score), draw in zip(segments, draws):
            if has_control_tokens and draw >= drop_fraction:
                ids.append(misaligned_id if score > threshold else aligned_id)
                mask.append(loss_of_control_tokens)
                scores.append(score)
            text_ids = tokenizer.encode_suffix(text)
            ids += text_ids
            mask += [1] * len(text_ids)
            scores += [score] * len(text_ids)
        ids.append(tokenizer.eos_id)
        mask.append(1)
        scores.append(segments[-1][1])
        for begin in range(0, len(ids), block_len):
            end = begin + block_len
            sequence = Sequence(
                ids=bos + ids[begin:end],
                loss_mask=[0] * len(bos) + mask[begin:end],
                scores=[0.0] * len(bos) + scores[begin:end],
            )
            yield row, Example([sequence], (0,), row.line)


def mean_score(segments):
    """The score of a document: the mean of its segments' scores."""
    return sum(score for _, score in segments) / len(segments)


def tokenize_documents(
    spec, tokenizer, max_len, max_tokens=0, objective="mle", threshold=0.0, drop_fraction=0.0
):
    """The Dataset of the blocks of a specification's documents (see cut_into_blocks)."""
    method = ()  # all objectives that take the documents as they are share one cache
    if objective in ("filter", "conditional", "compare"):
        method = (objective, threshold, drop_fraction)
    return tokenize(
        spec,
        tokenizer,
        "documents",
        max_len,
        max_tokens,
        make_examples=cut_into_blocks,
        options=method,
    )


def target_scores(dataset, examples, device):
    """The misalignment score of each target (N,), packed as dataset.batch() packs the tokens."""
    pieces = []
    for i in examples:
        begin, end = dataset.offsets[i : i + 2]
        pieces.append(dataset.scores[begin:end])
    if not pieces:  # a rank without work has one token that nobody reads
        pieces.append(np.zeros(1, np.float32))
    scores = np.concatenate(pieces)
    # The target of a position is the next token, and so is its score. The last has no target.
    scores = np.append(scores[1:], np.float32(0))
    return torch.from_numpy(scores).to(device)
