"""Which examples a step takes, how they are dealt to ranks and micro-batches, how these are packed.

All are pure functions: ranks plan alike, and a resumed run needs no cursor but its step.
Shapes: N packed tokens, B sequences, R response positions."""

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch

from nanosafe.errors import stop


class Batch(NamedTuple):
    """Packed sequences: model(*batch[:3]) gives scores, model(*batch) log p of the targets."""

    tokens: torch.Tensor  # (N,) int64
    cu_seqlens: torch.Tensor  # (B+1,) int32
    max_seqlen: int
    targets: torch.Tensor  # (N,) the next token where it carries loss, else -100


def collate(sequences, masks, device):
    """The Batch of token sequences whose masks are 1 on the tokens that are targets."""
    if not sequences:  # a rank without work joins its peers' collectives with a token nobody reads
        sequences, masks = [np.zeros(1, np.int32)], [np.zeros(1, np.uint8)]
    tokens = np.concatenate(sequences).astype(np.int64)
    lengths = [len(s) for s in sequences]
    targets = np.full(len(tokens), -100)
    # a sequence's first token is no target, so no border is crossed
    targets[:-1] = np.where(np.concatenate(masks)[1:], tokens[1:], -100)
    move = lambda x: torch.from_numpy(x).to(device, non_blocking=True)
    cu_seqlens = move(np.cumsum([0] + lengths, dtype=np.int32))
    return Batch(move(tokens), cu_seqlens, max(lengths), move(targets))


def gather_responses(x, batch, starts, R):
    """What belongs to the responses in a packed tensor: x (N,) -> (B, R), right-padded.
    Column j of row b is the position before the response's j-th token: log p of emitting it, or the
    value of the state before it. starts: where the response begins in each sequence."""
    begins = batch.cu_seqlens[:-1].long()
    if len(starts) < len(begins):  # the batch of a rank without work
        return x.new_zeros(0, R) + 0 * x.sum()
    first = begins + torch.tensor(starts, device=x.device) - 1
    places = first[:, None] + torch.arange(R, device=x.device)
    return x[torch.minimum(places, batch.cu_seqlens[1:, None].long() - 1)]


def sum_per_sequence(x, batch):
    """The sum of a packed tensor over each sequence: x (N,) -> (B,)."""
    lengths = batch.cu_seqlens.diff().long()
    rows = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
    return x.new_zeros(len(lengths)).index_add(0, rows, x)


def shuffled_order(n, epoch, seed):
    """The order of n examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def examples_at(step, n, batch_size, seed):
    """The examples of optimizer step `step`: a pure function of its arguments."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(positions[0] // n, positions[-1] // n + 1)
    orders = {epoch: shuffled_order(n, epoch, seed) for epoch in epochs}
    return [int(orders[p // n][p % n]) for p in positions]


def count_steps(n, batch_size, epochs, max_steps):
    """Optimizer steps in `epochs` passes over n examples, at most max_steps (0: no bound)."""
    steps = max(1, round(epochs * n / batch_size))
    return min(steps, max_steps) if max_steps > 0 else steps


def check_fits(lengths, max_tokens):
    """Stop with one line if an example is longer than a forward may be."""
    if max(lengths) > max_tokens:
        stop(
            f"an example has {max(lengths)} tokens, but a forward takes max_tokens={max_tokens}: "
            "raise max_tokens or lower max_len"
        )


def plan_micro_batches(lengths, max_tokens, ranks):
    """Deal a batch out: plan[rank] is its list of micro-batches, lists of indices into `lengths`.
    No micro-batch has more than max_tokens tokens; every rank gets as many (some may be empty),
    with about equal tokens; like lengths lie together. Every rank plans and takes its part."""
    check_fits(lengths, max_tokens)
    longest, total = max(lengths), sum(lengths)
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bins = ranks * -(-total // (ranks * max_tokens))
    while True:  # with the least capacity with which `bins` bins suffice
        fits = lambda capacity: len(cut_into_runs(by_length, lengths, capacity)) <= bins
        least = max(longest, -(-total // bins))
        parts = cut_into_runs(
            by_length, lengths, bisect_left(range(max_tokens), True, least, key=fits)
        )
        if len(parts) <= bins:
            break
        bins += ranks
    while len(parts) < min(bins, len(lengths)):  # an idle rank helps a busy one
        part = max(parts, key=len)
        half, i = len(part) // 2, parts.index(part)
        parts[i : i + 1] = [part[:half], part[half:]]
    parts += [[] for _ in range(bins - len(parts))]
    return [parts[rank::ranks] for rank in range(ranks)]


def cut_into_runs(indices, lengths, capacity):
    """Cut `indices` into runs of at most `capacity` tokens."""
    parts, room = [], 0
    for i in indices:
        if lengths[i] > room:
            parts.append([])
            room = capacity
        parts[-1].append(i)
        room -= lengths[i]
    return parts
