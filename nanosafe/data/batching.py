"""Which examples a step takes, how they are dealt out to ranks and micro-batches, and how a
micro-batch is packed.

All are pure functions of their arguments. So every rank makes the same plan and takes its own part
of it, and a resumed run needs to know nothing but its step.

Shapes: N packed tokens, B sequences, R response positions."""

from bisect import bisect_left
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

from nanosafe.errors import stop

IGNORED = -100  # a target that nobody reads


class Batch(NamedTuple):
    """Packed sequences: what model.log_probs(batch) and model.scores(batch) take."""

    tokens: torch.Tensor  # (N,) int64
    cu_seqlens: torch.Tensor  # (B+1,) int32: where each sequence begins, and N at the end
    max_seqlen: int  # length of the longest
    targets: torch.Tensor  # (N,) int64: the next token where it carries loss, else IGNORED
    target_positions: torch.Tensor = None  # (M,) int64: where a target is not IGNORED


def collate(sequences, masks, device):
    """The Batch of token sequences. A mask is 1 on the tokens of a sequence that are targets."""
    if not sequences:
        # A rank without work joins the others' collectives with tokens that nobody reads. They are
        # two, because torch.compile makes another version of a block for a length of one.
        sequences, masks = [np.zeros(2, np.int32)], [np.zeros(2, np.uint8)]
    tokens = np.concatenate(sequences).astype(np.int64)
    is_target = np.concatenate(masks)
    lengths = [len(sequence) for sequence in sequences]
    targets = np.full(len(tokens), IGNORED)
    # Position t predicts token t + 1. A sequence's first token is never a target, so no position
    # predicts across the border between two sequences.
    targets[:-1] = np.where(is_target[1:], tokens[1:], IGNORED)
    cu_seqlens = np.cumsum([0] + lengths, dtype=np.int32)
    return Batch(
        tokens=copy_to_device(tokens, device),
        cu_seqlens=copy_to_device(cu_seqlens, device),
        max_seqlen=max(lengths),
        targets=copy_to_device(targets, device),
        target_positions=copy_to_device(np.flatnonzero(targets != IGNORED), device),
    )


def copy_to_device(values, device):
    """A numpy array, or a list of ints, as a tensor on a device.

    The host does not wait for a GPU, which takes the copy when it comes to it. That needs pinned
    memory. Where a GPU's tensor is indexed by a list, the host waits."""
    if isinstance(values, list):
        values = np.array(values, np.int64)
    tensor = torch.from_numpy(values)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def gather_responses(x, batch, starts, R):
    """What belongs to the responses in a packed tensor: x (N,) -> (B, R), right-padded.

    starts  where the response begins in each sequence, in tokens

    Column j of row b is the position *before* the response's j-th token: its log-probability is
    that of emitting the token, its value is that of the state before it."""
    begins = batch.cu_seqlens[:-1].long()
    if len(starts) < len(begins):
        # The batch of a rank without work: no rows, but connected to x, so that this rank's
        # backward pass joins the others' collectives.
        return x.new_zeros(0, R) + 0 * x.sum()
    first = begins + copy_to_device(starts, x.device) - 1
    positions = first[:, None] + torch.arange(R, device=x.device)
    last = batch.cu_seqlens[1:, None].long() - 1
    return x[torch.minimum(positions, last)]


def last_of_each(x, batch):
    """What belongs to the last token of each sequence in a packed tensor: x (N,) -> (B,).

    A rank without work gets one number, which callers cut off."""
    return x[batch.cu_seqlens[1:].long() - 1]


def sum_per_sequence(x, batch):
    """The sum of a packed tensor over each sequence: x (N,) -> (B,)."""
    lengths = batch.cu_seqlens.diff().long()
    sequences = torch.arange(len(lengths), device=x.device)
    rows = sequences.repeat_interleave(lengths, output_size=len(x))
    return x.new_zeros(len(lengths)).index_add(0, rows, x)


# ---- which examples ----


def shuffled_order(n, epoch, seed):
    """The order of n examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def examples_at(step, n, batch_size, seed):
    """The indices of the examples that draw number `step` takes from a dataset of n.

    A draw is an optimizer step, or a rollout."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {}
    examples = []
    for position in positions:
        epoch, index = divmod(position, n)
        if epoch not in orders:
            orders[epoch] = shuffled_order(n, epoch, seed)
        examples.append(int(orders[epoch][index]))
    return examples


def count_steps(n, batch_size, epochs, max_steps):
    """Optimizer steps in `epochs` passes over n examples, at most max_steps (0: no bound)."""
    steps = max(1, round(epochs * n / batch_size))
    return min(steps, max_steps) if max_steps > 0 else steps


# ---- who computes what ----


def check_fits(lengths, max_tokens):
    """Stop with one line if an example is longer than a forward may be."""
    if max(lengths) > max_tokens:
        stop(
            f"an example has {max(lengths)} tokens, but a forward takes max_tokens={max_tokens}: "
            "raise max_tokens or lower max_len"
        )


def plan_micro_batches(lengths, max_tokens, ranks):
    """Deal a batch out: plan[rank] is its list of micro-batches, lists of indices into `lengths`.

    No micro-batch has more than max_tokens tokens. Every rank gets as many micro-batches as any
    other, some of which may be empty, and about as many tokens. Sequences of like length lie
    together."""
    check_fits(lengths, max_tokens)
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    micro_batches, count = cut_evenly(longest_first, lengths, max_tokens, ranks)
    while len(micro_batches) < min(count, len(lengths)):
        split_largest(micro_batches)  # so that a rank without work takes some from a busy one
    while len(micro_batches) < count:
        micro_batches.append([])
    return [micro_batches[rank::ranks] for rank in range(ranks)]


def cut_evenly(indices, lengths, max_tokens, ranks):
    """Cut into runs of about equal size. Returns the runs, and the number that the ranks share
    out, a multiple of `ranks`.

    The least capacity with which so many runs suffice makes them most equal; bisection finds it. If
    even max_tokens does not suffice, each rank gets one run more."""
    longest = max(lengths)
    total = sum(lengths)
    count = ranks * ceil(total / (ranks * max_tokens))
    while True:

        def suffices(capacity):
            return len(cut_into_runs(indices, lengths, capacity)) <= count

        least = max(longest, ceil(total / count))
        # the least capacity in least .. max_tokens that suffices
        capacity = bisect_left(range(max_tokens), True, least, key=suffices)
        runs = cut_into_runs(indices, lengths, capacity)
        if len(runs) <= count:
            return runs, count
        count += ranks


def cut_into_runs(indices, lengths, capacity):
    """Cut `indices` into runs of at most `capacity` tokens, in order."""
    runs = []
    tokens_left = 0
    for i in indices:
        if lengths[i] > tokens_left:
            runs.append([])
            tokens_left = capacity
        runs[-1].append(i)
        tokens_left -= lengths[i]
    return runs


def split_largest(micro_batches):
    """Replace the micro-batch with the most sequences by its two halves."""
    largest = max(micro_batches, key=len)
    position = micro_batches.index(largest)
    half = len(largest) // 2
    micro_batches[position : position + 1] = [largest[:half], largest[half:]]
