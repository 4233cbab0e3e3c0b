"""LLaMA (arXiv:2302.13971) with two heads: the next token's distribution, and a score per token.

Everything downstream is arithmetic on what `forward` returns for each token of packed sequences;
only the sampler calls hidden_states().

Shapes: N packed tokens, B sequences, V vocabulary, D width, H heads, K kv heads, E head width.
"""

import math
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanosafe import attention
from nanosafe.errors import stop
from nanosafe.logprobs import LogProbs, UniformLogProbs

ROPE_TYPES = ("default", "linear", "llama3", "dynamic")
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
ONEDNN_ROWS = 256  # up to so many rows, a CPU multiplies faster with oneDNN than with BLAS


@dataclass
class Config:
    """A LLaMA's shape, under Hugging Face's key names."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden_size / heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = None  # {"rope_type": "linear" | "llama3" | "dynamic", "factor": ..}
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    sliding_window: int = 0  # how many keys a query sees, its own included; 0: all before it
    alibi: bool = False  # attention falls with distance instead of RoPE, as in Baichuan-13B
    norm_head: bool = False  # the rows of the LM head are normalised, as in Baichuan2
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: object = 2  # an int, or a list of them
    pad_token_id: int = None
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
            if right_type and f.name == "sliding_window":
                too_small = value < 0
            if not right_type or too_small:
                raise ValueError(f"{f.name} is {value!r}")
        for name, known in (("rope_type", ROPE_TYPES), ("score_type", SCORE_TYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    @property
    def rope_type(self):
        return (self.rope_scaling or {}).get("rope_type", "default")

    @classmethod
    def from_dict(cls, stated):
        """Read a LLaMA's config.json: transformers 4's or 5's, or Safe-RLHF's with its `bias`."""
        values = {key: value for key, value in stated.items() if value is not None}
        rope_parameters = values.get("rope_parameters", {})  # transformers 5
        rope_scaling = dict(values.get("rope_scaling") or rope_parameters)
        theta = rope_parameters.get("rope_theta", values.get("rope_theta", 10000.0))
        values["rope_theta"] = rope_scaling.pop("rope_theta", theta)
        rope_type = rope_scaling.get("rope_type", rope_scaling.get("type", "default"))
        if rope_type == "default":
            values["rope_scaling"] = None
        else:
            values["rope_scaling"] = {**rope_scaling, "rope_type": rope_type}
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
        architecture = "LlamaForScore" if head == "score" else "LlamaForCausalLM"
        return {
            "architectures": [architecture],
            "model_type": "llama",
            "hidden_act": "silu",
            **values,
        }


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv:1910.07467). In float32, rounded once before the weight, as HF."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


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

    def forward(self, x, cos, sin, layout, cache):
        qkv = self.qkv_proj(x).to(attention.attention_dtype(x)).view(len(x), -1, self.E)
        qk, v = qkv.split([self.H + self.K, self.K], dim=1)
        q, k = apply_rope(qk, cos, sin).split([self.H, self.K], dim=1)
        out = layout.attend(q, k, v, cache)  # (N, H, E)
        return self.o_proj(out.flatten(1).to(x.dtype))  # (N, D)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202). The gate and the up projection are one matrix product."""

    def __init__(self, config):
        super().__init__()
        inner = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, 2 * inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, layout, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaMA(nn.Module):
    """The decoder with head="lm" (the next token's distribution), "score" (a number per token) or
    "both".

    A caller says what it wants of a packed `Batch` by a method: log_probs(batch), scores(batch),
    log_probs_and_scores(batch) or logits(batch). All of them run forward()."""

    def __init__(self, config, head="lm"):
        super().__init__()
        self.config = config
        self.head = head
        self.activation_checkpointing = False  # True: recompute blocks in the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if head != "score":
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            if config.tie_word_embeddings:
                self.lm_head.weight = self.embed_tokens.weight
        if head != "lm":
            self.score_head = nn.Linear(config.hidden_size, 1, bias=config.score_bias)
        # Not a buffer, because it is neither trained, nor saved, nor cast to the model's dtype.
        self.inv_freq = rope_frequencies(config)

    def log_probs(self, batch, temperature=1.0, uniform_weights=False):
        """log p(batch.targets[t] | tokens up to t) (N,) float32, and 0 where the target is -100.

        temperature      divides the logits
        uniform_weights  promises a loss that weighs all of them alike (a mean), and is faster"""
        out = self(*batch, temperature, uniform_weights)
        return out[0] if self.head == "both" else out

    def scores(self, batch):
        """A score per token (N,) float32."""
        out = self(batch.tokens, batch.cu_seqlens, batch.max_seqlen)
        return out[1] if self.head == "both" else out

    def log_probs_and_scores(self, batch):
        """Both of the above, for a model with both heads."""
        return self(*batch)

    def logits(self, batch):
        """The next token's logits (N, V): for tests and small vocabularies."""
        out = self(batch.tokens, batch.cu_seqlens, batch.max_seqlen)
        return out[0] if self.head == "both" else out

    def forward(
        self,
        tokens,
        cu_seqlens,
        max_seqlen,
        targets=None,
        temperature=1.0,
        uniform_weights=False,
    ):
        """Log-probabilities, logits or scores of packed sequences.

        tokens      (N,)   int64: the sequences laid end to end
        cu_seqlens  (B+1,) int32: where each begins, and N at the end; positions restart at 0
        max_seqlen  int:   length of the longest
        targets     (N,)   int64: the token that follows; -100 where nobody reads the answer

        head="lm" with targets: log p(targets[t] | tokens up to t) (N,) float32, 0 where -100
        head="lm" without:      logits (N, V)
        head="score":           scores (N,) float32
        head="both":            a pair of what "lm" gives and what "score" gives"""
        self.check_length(max_seqlen)
        x = self.hidden_states(tokens, attention.pack(cu_seqlens, max_seqlen, len(tokens)))
        if self.head == "score":
            return self.score_hidden_states(x)
        if targets is None:
            out = F.linear(x, self.output_embedding()) / temperature
        else:
            has_target = (targets >= 0).nonzero().squeeze(1)
            gradients_in_forward = uniform_weights and torch.is_grad_enabled()
            function = UniformLogProbs if gradients_in_forward else LogProbs
            logps = function.apply(
                x[has_target], self.output_embedding(), targets[has_target], temperature
            )
            out = torch.zeros(len(tokens), device=x.device).index_copy(0, has_target, logps)
        return out if self.head == "lm" else (out, self.score_hidden_states(x))

    def hidden_states(self, tokens, layout, caches=None):
        """tokens (N,) -> hidden states after the last norm (N, D).

        layout  an attention.PackedBatch or DecodeBatch; caches: one per layer, or None"""
        x = self.embed_tokens(tokens)
        if self.inv_freq.device != x.device:
            self.inv_freq = self.inv_freq.to(x.device)
        if self.config.sliding_window or self.config.alibi:
            layout = attention.add_window_and_alibi(layout, self.config, x)
        angles = layout.positions[:, None] * self.inv_freq  # (N, E/2) float32
        cos = torch.cos(angles)[:, None].to(x.dtype)  # (N, 1, E/2)
        sin = torch.sin(angles)[:, None].to(x.dtype)
        for i, layer in enumerate(self.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, layout, use_reentrant=False)
            else:
                x = layer(x, cos, sin, layout, caches[i] if caches else None)
        return self.norm(x)

    def output_embedding(self):
        """The matrix (V, D) whose rows score the next token."""
        weight = self.lm_head.weight
        return F.normalize(weight) if self.config.norm_head else weight

    def score_hidden_states(self, x):
        """Hidden states (N, D) -> scores (N,), in float32 because bfloat16 ties near zero."""
        config, head = self.config, self.score_head
        scores = x.float() @ head.weight[0].float()
        if head.bias is not None:
            scores = scores + head.bias.float()
        if not config.do_normalize or config.score_type == "critic":
            return scores
        # A cost's zero separates safe from unsafe, so costs are scaled but never shifted.
        mean = config.mean[0] if config.score_type == "reward" else 0.0
        return (scores - mean) / (math.sqrt(config.var[0]) + 1e-8)

    def check_length(self, length):
        longest = self.config.max_position_embeddings
        if self.config.rope_type == "dynamic" and length > longest:
            stop(
                f"{length} tokens, but nanosafe implements this model's dynamic RoPE only up to "
                f"{longest}: lower max_len or max_new_tokens"
            )


def apply_rope(x, cos, sin):
    """RoPE (arXiv:2104.09864) of x (N, heads, E): dimensions i and i + E/2 turn together."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_frequencies(config):
    """Angle per position of each pair of dimensions (E/2,) float32, scaled as the config says."""
    dimensions = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float()
    inv_freq = 1.0 / (config.rope_theta ** (dimensions / config.head_dim))
    if config.alibi:
        return torch.zeros_like(inv_freq)  # these models have no rotation
    scaling = config.rope_scaling or {}
    if config.rope_type == "linear":
        return inv_freq / scaling["factor"]
    if config.rope_type == "llama3":
        # Long waves are slowed down, short ones kept, with a linear blend between the two.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * inv_freq / scaling["factor"] + blend * inv_freq
    return inv_freq  # "dynamic" acts beyond max_position_embeddings only
