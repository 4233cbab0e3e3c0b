"""Low-rank adapters on a frozen base (LoRA, arXiv:2106.09685): several models, one set of weights.

An adapter adds to each matrix W (out, in) that it adapts the product of two thin ones, which alone
are trained:

    y = W x + s B A x        A (r, in)   B (out, r)   s = alpha / r, or alpha / sqrt(r) (rslora)

B begins at zero, so a new adapter changes nothing. Memory holds the base once, and some megabytes
for each model on it. For PPO-Lag these are

    reference      what the actor starts from: the base, or the base + a frozen adapter
    actor          the base + an adapter that is trained
    reward model   the base + an adapter + a score head, frozen
    cost model     the base + an adapter + a score head, frozen
    reward critic  the base + an adapter + a score head, trained
    cost critic    the base + an adapter + a score head, trained

An AdaptedLLaMA is used as a LLaMA is, and its parameters() are its adapter's alone. Each process
has them whole, while the base may be cut into slices.

A block multiplies by the matrices of queries, keys and values at once, and by gate and up at once.
PEFT has an adapter for each of these. Stacked in every forward pass, they act as one pair:

    A = [A_q; A_k; A_v]  (R, in)        B = [s B_q  0  0;  0  s B_k  0;  0  0  s B_v]  (out, R)

where R is the sum of the ranks r.

checkpoint/adapter_folder.py reads and writes adapters in PEFT's layout."""

import math
import zlib
from typing import NamedTuple

import torch
from torch import nn

from nanosafe.errors import stop

MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # of a block


class Lora(NamedTuple):
    """The new adapters that a trainer's knobs ask for."""

    rank: int  # 0: none, all weights are trained
    alpha: float
    targets: str  # "all", or names of matrices without their layers: "q_proj,v_proj"

    @property
    def scale(self):
        return self.alpha / self.rank


def make_lora(rank, alpha, targets, merge):
    """The Lora of a trainer's knobs. Stops where they ask for something that rank=0 does not do."""
    if rank == 0 and (targets != "all" or merge):
        stop(f"lora_targets={targets!r} and lora_merge={merge} are for adapters: set lora_rank")
    return Lora(rank, alpha, targets)


class Pair(NamedTuple):
    """What is added to a matrix: y becomes y + B (A x). The scale is in B."""

    A: torch.Tensor  # (R, in)
    B: torch.Tensor  # (out, R)


class BlockPairs(NamedTuple):
    """The Pair of each matrix of a block, or None where it has none."""

    qkv_proj: Pair = None
    o_proj: Pair = None
    gate_up_proj: Pair = None
    down_proj: Pair = None


NO_PAIRS = BlockPairs()


class PairShape(NamedTuple):
    """Where the pair of one of PEFT's modules lies in a block's matrix: all of it, or some rows."""

    module: str  # as PEFT calls it: model.layers.0.self_attn.q_proj
    rank: int
    scale: float
    inputs: int
    rows: int
    first_row: int  # of the block's matrix: where the module's rows begin
    # Some families order rows otherwise: row i of ours is row order[i] of the module's.
    order: list = None


class MatrixAdapter(nn.Module):
    """The adapters of one of a block's matrices, trained in float32 and without the scale."""

    def __init__(self, shapes, height):
        """shapes: a PairShape of each, in the order of their rows; height: rows of the matrix."""
        super().__init__()
        self.shapes = shapes
        self.height = height
        self.A = nn.ParameterList(torch.zeros(shape.rank, shape.inputs) for shape in shapes)
        self.B = nn.ParameterList(torch.zeros(shape.rows, shape.rank) for shape in shapes)

    def pair(self, dtype):
        """The Pair of the whole matrix, in the dtype that is computed in."""
        A = torch.cat(list(self.A)).to(dtype)
        B = A.new_zeros(self.height, len(A))
        column = 0
        for shape, part in zip(self.shapes, self.B):
            rows = slice(shape.first_row, shape.first_row + shape.rows)
            columns = slice(column, column + shape.rank)
            B[rows, columns] = shape.scale * part
            column += shape.rank
        return Pair(A, B)


class AdaptedLLaMA(nn.Module):
    """A base with an adapter on it, and perhaps a score head of its own. It is used as a LLaMA is.

    base          a LLaMA, frozen, which other adapters stand on too
    config, head  as of a LLaMA, of the adapted model; the base keeps its own
    blocks        of each layer, a ModuleDict {name of its matrix: MatrixAdapter}
    peft_config   what its adapter_config.json says
    base_fingerprint  a number that tells the base's weights from others"""

    def __init__(self, base, config, head, blocks, peft_config, base_fingerprint):
        super().__init__()
        # This bypasses nn.Module, which would count the base's parameters among this model's.
        object.__setattr__(self, "base", base)
        self.config = config
        self.head = head
        self.blocks = nn.ModuleList(blocks)
        self.peft_config = peft_config
        self.base_fingerprint = base_fingerprint
        if head != "lm":
            self.score_head = nn.Linear(config.hidden_size, 1, bias=config.score_bias)
        # See for_sampling().
        self.kept_pairs = None
        self.twin = None

    @property
    def embed_tokens(self):
        return self.base.embed_tokens

    @property
    def layers(self):
        return self.base.layers

    @property
    def compile_decoding(self):
        return self.base.compile_decoding

    def block_pairs(self, dtype):
        """The BlockPairs of each layer, from the present parameters."""
        if self.kept_pairs is not None:
            return self.kept_pairs
        pairs = []
        for block in self.blocks:
            of_block = {name: matrix.pair(dtype) for name, matrix in block.items()}
            pairs.append(BlockPairs(**of_block))
        return pairs

    # The methods of a LLaMA, passed on to the base.

    def log_probs(self, batch, temperature=1.0, uniform_weights=False):
        return self.base.log_probs(batch, temperature, uniform_weights, adapter=self)

    def scores(self, batch):
        return self.base.scores(batch, adapter=self)

    def log_probs_and_scores(self, batch):
        return self.base.log_probs_and_scores(batch, adapter=self)

    def logits(self, batch):
        return self.base.logits(batch, adapter=self)

    def hidden_states(self, tokens, layout, caches=None):
        return self.base.hidden_states(tokens, layout, caches, adapter=self)

    def output_embedding(self):
        return self.base.output_embedding()

    def check_length(self, length):
        self.base.check_length(length)

    @torch.no_grad()
    def for_sampling(self, base):
        """A twin of this model for sampling: its pairs are computed once, and have no gradients.

        base  its base, or one with the same weights that is not cut into slices

        On its own base it is the same twin each time, with its pairs where they were, so that a
        CUDA graph which reads them still holds."""
        pairs = self.block_pairs(base.embed_tokens.weight.dtype)
        if base is self.base and self.twin is not None:
            for old, new in zip(list_tensors(self.twin.kept_pairs), list_tensors(pairs)):
                old.copy_(new)
            return self.twin
        twin = AdaptedLLaMA(
            base, self.config, "lm", self.blocks, self.peft_config, self.base_fingerprint
        )
        twin.kept_pairs = pairs
        if base is self.base:
            object.__setattr__(self, "twin", twin)
        return twin


def list_tensors(block_pairs):
    """All tensors of the BlockPairs of a model's layers."""
    tensors = []
    for of_block in block_pairs:
        for pair in of_block:
            if pair is not None:
                tensors += pair
    return tensors


def list_pairs(blocks):
    """Yield (PairShape, A, B) of all modules that have an adapter in the blocks of a model."""
    for block in blocks:
        for matrix in block.values():
            yield from zip(matrix.shapes, matrix.A, matrix.B)


def draw_adapter(blocks, seed):
    """Draw the parameters of a new adapter: each A from U(-1/sqrt(in), 1/sqrt(in)), and B is 0.

    The bound is PEFT's. Each matrix has its own generator, so that other targets do not change
    what is drawn for it."""
    for shape, A, B in list_pairs(blocks):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {shape.module}".encode()))
        bound = 1 / math.sqrt(shape.inputs)
        drawn = torch.empty(A.shape).uniform_(-bound, bound, generator=generator)
        A.data.copy_(drawn)
        B.data.zero_()
