"""LLaMA (arXiv:2302.13971) with two heads: the next token's distribution, and a score per token.

Everything downstream is arithmetic on what `forward` returns for each token of packed sequences;
only the sampler calls hidden_states().

Shapes: N packed tokens, B sequences, V vocabulary, D width, H heads, K kv heads, E head width.
"""

import functools
import math
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanosafe import attention, rope
from nanosafe.errors import stop
from nanosafe.lora import NO_PAIRS
from nanosafe.logprobs import LogProbs, UniformLogProbs

SCORE_TYPES = ("reward", "cost", "critic")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "rms_norm_eps",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
)
CHOICES = {  # what a field, or an entry of a list, may be
    "score_type": SCORE_TYPES,
    "qk_norm": ("head", "width"),
    "layer_types": ("full_attention", "sliding_attention"),
    "no_rope_layers": (0, 1),
}
ONEDNN_ROWS = 256  # up to so many rows, a CPU multiplies faster with oneDNN than with BLAS


@dataclass
class Config:
    """A LLaMA's shape, under Hugging Face's key names, and how its relatives differ from it."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden_size / heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = None  # {"rope_type": "linear" | .., "factor": ..}: see rope.py
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    sliding_window: int = 0  # how many keys a query sees, its own included; 0: all before it
    layer_types: list = None  # "full_attention" or "sliding_attention" of each; None: all slide
    qk_norm: str = None  # RMSNorm of queries and keys: by "head" (Qwen3), or their "width" (OLMo 2)
    post_norm: bool = False  # norms come after attention and MLP, not before them, as in OLMo 2
    no_rope_layers: list = None  # 1: the layer has RoPE; 0: it has none, as some of SmolLM3's
    partial_rotary_factor: float = 1.0  # the share of a head that RoPE turns: 0.75 in Phi-4-mini
    scale_full_layers_only: bool = False  # rope_scaling leaves layers with a window out (OLMo 3)
    llama_4_scaling_beta: float = 0.0  # queries grow with the position, as in Ministral 3
    alibi: bool = False  # attention falls with distance instead of RoPE, as in Baichuan-13B
    norm_head: bool = False  # the rows of the LM head are normalised, as in Baichuan2
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: object = 2  # an int, or a list of them
    pad_token_id: int = None
    model_type: str = "llama"  # the family whose config.json is written, if it can express the rest
    score_bias: bool = False  # from here on: score models only
    score_type: str = "reward"  # reward | cost | critic
    do_normalize: bool = False
    normalizer_type: str = None
    momentum: float = None
    mean: list = field(default_factory=lambda: [0.0])
    var: list = field(default_factory=lambda: [1.0])

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.check()

    def check(self):
        """Raise ValueError on a wrong type or range: a config.json may hold anything."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None:
                continue
            expected = (int, float) if f.type is float else f.type
            right_type = isinstance(value, expected)
            if value is True and f.type not in (bool, object):
                right_type = False  # Python's True is an int
            too_small = False
            if right_type and f.name in SIZES:
                too_small = value <= 0
            if right_type and f.name in ("sliding_window", "llama_4_scaling_beta"):
                too_small = value < 0
            if not right_type or too_small:
                raise ValueError(f"{f.name} is {value!r}")
        self.check_choices()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        rope.check(self)

    def check_choices(self):
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value is None:
                continue
            by_layer = isinstance(value, list)
            for entry in value if by_layer else [value]:
                if entry not in known:
                    words = ", ".join(map(str, known))
                    raise ValueError(f"{name} {entry!r} is not one of {words}")
            if by_layer and len(value) < self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(value)} entries for {self.num_hidden_layers} layers"
                )

    @property
    def rope_type(self):
        return (self.rope_scaling or {}).get("rope_type", "default")

    def windows_of_layers(self):
        """How many keys a query sees in each layer; 0: all before it."""
        if self.layer_types is None:
            return (self.sliding_window,) * self.num_hidden_layers
        windows = []
        for kind in self.layer_types[: self.num_hidden_layers]:
            windows.append(self.sliding_window if kind == "sliding_attention" else 0)
        return tuple(windows)

    @classmethod
    def from_dict(cls, stated):
        """Read a LLaMA's config.json: transformers 4's or 5's, or Safe-RLHF's with its `bias`."""
        values = {key: value for key, value in stated.items() if value is not None}
        values.update(rope.read_config_json(values))
        values.setdefault("score_bias", values.get("bias", False))
        values.setdefault("output_bias", values.get("attention_bias", False))
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self, head="lm"):
        """The config.json of a LLaMA folder, as transformers 4 and 5 both read it."""
        values = asdict(self)
        if head == "score":
            values.update(score_dim=1, bias=self.score_bias)
        else:
            names = list(values)
            for name in names[names.index("score_bias") :]:
                del values[name]
        values["rope_parameters"] = {
            "rope_theta": self.rope_theta,
            "rope_type": "default",
            **(self.rope_scaling or {}),
        }
        if self.rope_type == "longrope":  # transformers 4 looks for it here
            key = "original_max_position_embeddings"
            values[key] = self.rope_scaling[key]
        architecture = "LlamaForScore" if head == "score" else "LlamaForCausalLM"
        return {
            "architectures": [architecture],
            "hidden_act": "silu",
            **values,
        }


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv:1910.07467), in float32, rounded once, after the weight.

    On a GPU this is one kernel, in training and in decoding alike. HF's LLaMA also rounds before
    the weight."""

    def __init__(self, width, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    def forward(self, x, pair=None):
        """x (n, D) @ weight.T + bias, and what an adapter adds: pair, a lora.Pair, or None."""
        y = linear(x, self.weight, self.bias)
        if pair is None:
            return y
        return torch.addmm(y, linear(x, pair.A), pair.B.T)


def linear(x, weight, bias=None):
    """x (n, D) @ weight.T + bias. A few rows on a CPU go to oneDNN, which is twice as fast there.

    The operator is the one that torch.compile emits; torch has no public name for it."""
    few_rows = not x.is_cuda and x.dtype == torch.float32 and len(x) <= ONEDNN_ROWS
    if few_rows and torch.backends.mkldnn.is_available() and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Attention(nn.Module):
    """Causal self-attention. Queries, keys and values are one matrix product."""

    def __init__(self, config):
        super().__init__()
        self.H = config.num_attention_heads
        self.K = config.num_key_value_heads
        self.E = config.head_dim
        qkv_width = (self.H + 2 * self.K) * self.E
        self.qkv_proj = Linear(config.hidden_size, qkv_width, bias=config.attention_bias)
        self.o_proj = Linear(self.H * self.E, config.hidden_size, bias=config.output_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            by_head = self.qk_norm == "head"
            self.q_norm = RMSNorm(self.E if by_head else self.H * self.E, config)
            self.k_norm = RMSNorm(self.E if by_head else self.K * self.E, config)

    def forward(self, x, cos, sin, layout, cache, pairs):
        qkv = self.qkv_proj(x, pairs.qkv_proj).view(len(x), -1, self.E)
        qk, v = qkv.split([self.H + self.K, self.K], dim=1)
        if self.qk_norm:
            qk = self.normalize(qk)
        dtype = attention.attention_dtype(x)
        q, k = rope.turn(qk.to(dtype), cos, sin).split([self.H, self.K], dim=1)
        out = layout.attend(q, k, v.to(dtype), cache)  # (N, H, E)
        return self.o_proj(out.flatten(1).to(x.dtype), pairs.o_proj)  # (N, D)

    def normalize(self, qk):
        """RMSNorm of queries and of keys, qk (N, H + K, E): of each, or of all of a token."""
        q, k = qk.split([self.H, self.K], dim=1)
        if self.qk_norm == "width":
            q, k = q.flatten(1), k.flatten(1)
        q = self.q_norm(q).view(len(qk), self.H, self.E)
        k = self.k_norm(k).view(len(qk), self.K, self.E)
        return torch.cat((q, k), dim=1)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202). The gate and the up projection are one matrix product."""

    def __init__(self, config):
        super().__init__()
        inner = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, 2 * inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x, pairs):
        gate, up = self.gate_up_proj(x, pairs.gate_up_proj).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up, pairs.down_proj)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.post_norm = config.post_norm
        if not self.post_norm:
            self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config)
        if self.post_norm:
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config)

    def forward(self, x, cos, sin, layout, cache=None, pairs=NO_PAIRS):
        """pairs: the lora.BlockPairs that an adapter adds to the four matrices."""
        if self.post_norm:  # OLMo 2
            attended = self.self_attn(x, cos, sin, layout, cache, pairs)
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(x, pairs))
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout, cache, pairs)
        return x + self.mlp(self.post_attention_layernorm(x), pairs)


@functools.cache
def compiled_decode_step():
    """A Block's forward in a decode step, compiled once for all numbers of rows and of keys.

    It is a function of its own, because torch counts the versions that it compiles of a function,
    and those of Block.forward are training's."""

    def decode_step(block, *inputs):
        return block.forward(*inputs)

    return torch.compile(decode_step, dynamic=True)


class LLaMA(nn.Module):
    """The decoder with head="lm" (the next token's distribution), "score" (a number per token) or
    "both".

    A caller says what it wants of a packed `Batch` by a method: log_probs(batch), scores(batch),
    log_probs_and_scores(batch) or logits(batch). All of them run forward().

    Each takes an adapter, a lora.AdaptedLLaMA that stands on this model: then the answer is that of
    the model with its adapter, and with the adapter's score head."""

    def __init__(self, config, head="lm"):
        super().__init__()
        self.config = config
        self.head = head
        self.activation_checkpointing = False  # True: recompute blocks in the backward pass
        self.compile_decoding = False  # True: decode steps run blocks by torch.compile
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        if head != "score":
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            if config.tie_word_embeddings:
                self.lm_head.weight = self.embed_tokens.weight
        if head != "lm":
            self.score_head = nn.Linear(config.hidden_size, 1, bias=config.score_bias)
        # Layers are alike in a LLaMA; in some of its relatives windows and RoPE differ by layer.
        self.windows = config.windows_of_layers()
        self.rope = rope.Rope(config)

    def log_probs(self, batch, temperature=1.0, uniform_weights=False, adapter=None):
        """log p(batch.targets[t] | tokens up to t) (N,) float32, and 0 where the target is -100.

        temperature      divides the logits
        uniform_weights  promises a loss that weighs all of them alike (a mean), and is faster"""
        out = self(*batch, temperature, uniform_weights, adapter)
        return out[0] if isinstance(out, tuple) else out

    def scores(self, batch, adapter=None):
        """A score per token (N,) float32."""
        out = self(batch.tokens, batch.cu_seqlens, batch.max_seqlen, adapter=adapter)
        return out[1] if isinstance(out, tuple) else out

    def log_probs_and_scores(self, batch, adapter=None):
        """Both of the above, for a model with both heads."""
        return self(*batch, adapter=adapter)

    def logits(self, batch, adapter=None):
        """The next token's logits (N, V): for tests and small vocabularies."""
        out = self(batch.tokens, batch.cu_seqlens, batch.max_seqlen, adapter=adapter)
        return out[0] if isinstance(out, tuple) else out

    def forward(
        self,
        tokens,
        cu_seqlens,
        max_seqlen,
        targets=None,
        target_positions=None,
        temperature=1.0,
        uniform_weights=False,
        adapter=None,
    ):
        """Log-probabilities, logits or scores of packed sequences.

        tokens      (N,)   int64: the sequences laid end to end
        cu_seqlens  (B+1,) int32: where each begins, and N at the end; positions restart at 0
        max_seqlen  int:   length of the longest
        targets     (N,)   int64: the token that follows; -100 where nobody reads the answer
        target_positions   (M,) int64: where it is not -100; None: searched, so a GPU is waited for
        adapter     an AdaptedLLaMA on this model; None: the model itself

        head="lm" with targets: log p(targets[t] | tokens up to t) (N,) float32, 0 where -100
        head="lm" without:      logits (N, V)
        head="score":           scores (N,) float32
        head="both":            a pair of what "lm" gives and what "score" gives"""
        self.check_length(max_seqlen)
        layout = attention.pack(cu_seqlens, max_seqlen, len(tokens))
        x = self.hidden_states(tokens, layout, adapter=adapter)
        owner = self if adapter is None else adapter  # whose head it is
        if owner.head == "score":
            return score_hidden_states(x, owner.score_head, owner.config)
        if targets is None:
            out = F.linear(x, self.output_embedding()) / temperature
        else:
            if target_positions is None:
                target_positions = (targets >= 0).nonzero().squeeze(1)
            gradients_in_forward = uniform_weights and torch.is_grad_enabled()
            function = UniformLogProbs if gradients_in_forward else LogProbs
            logps = function.apply(
                x[target_positions],
                self.output_embedding(),
                targets[target_positions],
                temperature,
            )
            out = torch.zeros(len(tokens), device=x.device)
            out = out.index_copy(0, target_positions, logps)
        if owner.head == "lm":
            return out
        return out, score_hidden_states(x, owner.score_head, owner.config)

    def hidden_states(self, tokens, layout, caches=None, adapter=None):
        """tokens (N,) -> hidden states after the last norm (N, D).

        layout  an attention.PackedBatch or DecodeBatch; caches: one per layer, or None"""
        x = self.embed_tokens(tokens)
        layouts = attention.layouts_of_layers(layout, self.windows, self.config, x)
        rotations = self.rope.rotations(layout, x)
        pairs = [NO_PAIRS] * len(self.layers)
        if adapter is not None:
            pairs = adapter.block_pairs(x.dtype)
        for i, layer in enumerate(self.layers):
            cos, sin = rotations[i]
            cache = caches[i] if caches else None
            inputs = (x, cos, sin, layouts[i], cache, pairs[i])
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            elif self.compile_decoding and isinstance(layout, attention.DecodeBatch):
                x = compiled_decode_step()(layer, *inputs)
            else:
                x = layer(*inputs)
        return self.norm(x)

    def output_embedding(self):
        """The matrix (V, D) whose rows score the next token."""
        weight = self.lm_head.weight
        return F.normalize(weight) if self.config.norm_head else weight

    def check_length(self, length):
        longest = self.config.max_position_embeddings
        if self.config.rope_type == "dynamic" and length > longest:
            stop(
                f"{length} tokens, but nanosafe implements this model's dynamic RoPE only up to "
                f"{longest}: lower max_len or max_new_tokens"
            )


def score_hidden_states(x, head, config):
    """Hidden states (N, D) -> scores (N,), in float32 because bfloat16 ties near zero.

    head  the score head, a Linear; config: whose moments normalise the scores"""
    scores = x.float() @ head.weight[0].float()
    if head.bias is not None:
        scores = scores + head.bias.float()
    if not config.do_normalize or config.score_type == "critic":
        return scores
    # A cost's zero separates safe from unsafe, so costs are scaled but never shifted.
    mean = config.mean[0] if config.score_type == "reward" else 0.0
    return (scores - mean) / (math.sqrt(config.var[0]) + 1e-8)
