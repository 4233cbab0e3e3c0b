"""How large a model is, without making it: numbers in its weights, in adapters, and per token.

Widths of a block: w of the residual stream, i of the MLP, q of all queries together, k of all keys
together (and of all values)."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from nanosafe.checkpoint.adapter_folder import choose_targets, make_new_blocks
from nanosafe.checkpoint.families import FAMILIES, choose_written_family
from nanosafe.model import Config, LLaMA

SHAPES = {
    "1.1b": Config(32000, 2048, 5632, 22, 32, 4),
    "1b": Config(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True),  # Llama 3.2
    "3b": Config(128256, 3072, 8192, 28, 24, 8, tie_word_embeddings=True),  # Llama 3.2
    "7b": Config(32000, 4096, 11008, 32, 32, 32),
    "8b": Config(128256, 4096, 14336, 32, 32, 8),  # Llama 3
    "13b": Config(32000, 5120, 13824, 40, 40, 40),
    "34b": Config(32000, 8192, 22016, 48, 64, 8),
    "70b": Config(32000, 8192, 28672, 80, 64, 8),
}


# ---- weights ----


def model_tensors(config, head):
    """(rows, columns) of the tensors of one block, and of the tensors outside the blocks."""
    with torch.device("meta"):
        model = LLaMA(replace(config, num_hidden_layers=1), head)
    block, outside = [], []
    for name, parameter in model.named_parameters():
        tensors = block if name.startswith("layers.") else outside
        tensors.append((len(parameter), parameter[0].numel()))
    return block, outside


def count_numbers(tensors, ranks=1):
    """Numbers in tensors whose rows are dealt to ranks: those of the first rank, the largest."""
    count = 0
    for rows, columns in tensors:
        count += math.ceil(rows / ranks) * columns
    return count


def pinned_bytes(tensors, ranks, bytes_each):
    """Bytes of host memory that is pinned for tensors: torch rounds each to a power of two."""
    total = 0
    for rows, columns in tensors:
        size = math.ceil(rows / ranks) * columns * bytes_each
        total += 2 ** math.ceil(math.log2(size))
    return total


# ---- adapters ----


class AdapterSize(NamedTuple):
    """Numbers of the adapters of all blocks of a model (nanosafe/lora.py)."""

    parameters: int  # trained
    pairs: int  # that the blocks multiply by: fused matrices have zeros beside the parameters
    ranks: int  # of one block: what a token's products with all A have together


def adapter_size(config, lora):
    """The AdapterSize of a lora.Lora; of none, zeros."""
    if not lora.rank:
        return AdapterSize(0, 0, 0)
    config = replace(config, num_hidden_layers=1)
    family = FAMILIES[choose_written_family(config)]
    wanted = choose_targets("this model", config, family, lora.targets)
    with torch.device("meta"):
        (block,) = make_new_blocks(config, family, lora, wanted)
    return sum_adapters(block)


def sum_adapters(block):
    """The AdapterSize of the MatrixAdapters of one block."""
    parameters = pairs = ranks = 0
    for matrix in block.values():
        rank = sum(len(A) for A in matrix.A)
        parameters += sum(parameter.numel() for parameter in matrix.parameters())
        pairs += rank * (matrix.A[0].shape[1] + matrix.height)
        ranks += rank
    return AdapterSize(parameters, pairs, ranks)


# ---- activations ----


def block_activations(config, adapter_ranks, kernels):
    """Numbers that a block keeps of each token for its backward pass.

    adapter_ranks  of a block's adapters; 0: the weights themselves are trained
    kernels        cpu | eager | compiled: a CPU's, a GPU's without and with torch.compile

    Counted in autograd's graph. A frozen matrix needs no input for its gradient, but an adapter's A
    needs the same input for its own."""
    w, i = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    normalized = q + k if config.qk_norm else 0
    if kernels == "cpu":  # where attention pads
        return 7 * w + 4 * i + 4.4 * q + 2.4 * normalized + adapter_ranks
    # Queries, keys and values as one tensor; queries and keys turned; what attention gives; its
    # logarithms of sums, in float32.
    attention = (q + 2 * k) + (q + k) + q + 2 * config.num_attention_heads
    if kernels == "compiled":
        return 4 * w + 3 * i + attention + adapter_ranks
    # RMSNorm keeps its input in float32 and its output, and where its weight is trained a third.
    norms = 6 * w if adapter_ranks else 8 * w
    return norms + 4 * i + attention + 3 * normalized + adapter_ranks
