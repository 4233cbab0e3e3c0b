"""LLaMA (arXiv:2302.13971), and its two heads: the next token's distribution, or a score per token.

Everything downstream is arithmetic on what forward() returns for each token of packed sequences.

Shapes: N packed tokens, B sequences, V vocabulary, D width, H heads, K kv heads, E head width."""

import math
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanosafe import attention
from nanosafe.logprobs import UniformLogProbs, LogProbs


ROPES = "default", "linear", "llama3", "dynamic"


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
    rope_scaling: dict = None  # {"rope_type": "linear" | "llama3", "factor": ..}
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    sliding_window: int = 0  # keys that a query sees, its own among them; 0: all before it
    alibi: bool = False  # no RoPE: logits fall with distance, as in Baichuan-13B
    norm_head: bool = False  # rows of the LM head are normalised, as in Baichuan2
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
        for f in fields(self):  # a stranger's config.json may say anything
            value, kind = getattr(self, f.name), (int, float) if f.type is float else f.type
            fits = isinstance(value, kind) and (value is not True or kind in (bool, object))
            if value is not None and (
                not fits
                or f.name in SIZES
                and value <= 0
                or f.name == "sliding_window"
                and value < 0
            ):
                raise ValueError(f"{f.name} is {value!r}")
        for name, known in (("rope_type", ROPES), ("score_type", ("reward", "cost", "critic"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} heads of {self.num_key_value_heads} keys")

    @property
    def rope_type(self):
        return (self.rope_scaling or {}).get("rope_type", "default")

    @classmethod
    def from_dict(cls, d):
        """Read a LLaMA's config.json, of transformers 4 or 5, or Safe-RLHF's old `bias`."""
        d = {key: value for key, value in d.items() if value is not None}
        rope = dict(d.get("rope_scaling") or d.get("rope_parameters") or {})
        five = {"rope_theta": d.get("rope_theta", 10000.0), **d.get("rope_parameters", {}), **rope}
        d["rope_theta"] = five["rope_theta"]
        rope.pop("rope_theta", None)
        kind = rope.get("rope_type", rope.get("type", "default"))
        d["rope_scaling"] = {**rope, "rope_type": kind} if kind != "default" else None
        d.setdefault("score_bias", d.get("bias", False))
        d.setdefault("output_bias", d.get("attention_bias", False))
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in d.items() if key in known})

    def to_dict(self, head="lm"):
        """The config.json of a LLaMA folder, as transformers 4 and 5 both read it."""
        d = asdict(self)
        if head != "score":
            score = list(d).index("score_bias")  # and what follows
            d = dict(list(d.items())[:score])
        else:
            d.update(score_dim=1, bias=self.score_bias)
        d["rope_parameters"] = {
            "rope_theta": self.rope_theta,
            "rope_type": "default",
            **(self.rope_scaling or {}),
        }
        architecture = "LlamaForScore" if head == "score" else "LlamaForCausalLM"
        return {"architectures": [architecture], "model_type": "llama", "hidden_act": "silu", **d}


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
    """x (n, D) @ weight.T + bias; a few rows on a CPU by oneDNN, there twice as fast as BLAS."""
    few = not x.is_cuda and x.dtype == torch.float32 and len(x) <= 256
    if few and torch.backends.mkldnn.is_available() and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H, self.K, self.E = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.qkv_proj = Linear(c.hidden_size, (self.H + 2 * self.K) * self.E, bias=c.attention_bias)
        self.o_proj = Linear(self.H * self.E, c.hidden_size, bias=c.output_bias)

    def forward(self, x, cos, sin, seqs, cache):
        qkv = self.qkv_proj(x).to(attention.attention_dtype(x)).view(len(x), -1, self.E)
        qk, v = qkv.split([self.H + self.K, self.K], dim=1)
        q, k = apply_rope(qk, cos, sin).split([self.H, self.K], dim=1)
        return self.o_proj(seqs.attend(q, k, v, cache).flatten(1).to(x.dtype))  # (N, D)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, seqs, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, seqs, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaMA(nn.Module):
    """The decoder with head="lm" (next token's distribution), "score" (a number each) or "both"."""

    def __init__(self, config, head="lm"):
        super().__init__()
        c = self.config = config
        self.head = head
        self.activation_checkpointing = False  # True: recompute blocks in the backward pass
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if head != "score":
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
            if c.tie_word_embeddings:
                self.lm_head.weight = self.embed_tokens.weight
        if head != "lm":
            self.score_head = nn.Linear(c.hidden_size, 1, bias=c.score_bias)
        self.inv_freq = rope_frequencies(c)  # no buffer: it is neither trained, nor saved, nor cast

    def forward(self, tokens, cu_seqlens, max_seqlen, targets=None, temperature=1.0, even=False):
        """Log-probabilities, logits or scores of packed sequences.

        tokens      (N,)   int64: the sequences laid end to end
        cu_seqlens  (B+1,) int32: where each begins, its positions from 0 on, and N at the end
        max_seqlen  int:   length of the longest
        targets     (N,)   int64: the token that follows; -100 where nobody reads the answer
        temperature divides the logits
        even        whether the loss will weigh all log-probabilities alike: then it is faster

        head="lm" with targets: log p(targets[t] | tokens[..t]) (N,) float32, 0 where it is -100
        head="lm" without:      logits (N, V)
        head="score":           scores (N,) float32
        head="both":            what "lm" gives, and scores"""
        self.check_length(max_seqlen)
        x = self.hidden(tokens, attention.pack(cu_seqlens, max_seqlen, len(tokens)))
        if self.head == "score":
            return self.scores(x)
        if targets is None:
            out = F.linear(x, self.vocabulary()) / temperature
        else:
            read = (targets >= 0).nonzero().squeeze(1)
            function = UniformLogProbs if even and torch.is_grad_enabled() else LogProbs
            logps = function.apply(x[read], self.vocabulary(), targets[read], temperature)
            out = torch.zeros(len(tokens), device=x.device).index_copy(0, read, logps)
        return out if self.head == "lm" else (out, self.scores(x))

    def hidden(self, tokens, seqs, caches=None):
        """tokens (N,) -> hidden states after the last norm (N, D). caches: one a layer, or None."""
        x = self.embed_tokens(tokens)
        if self.inv_freq.device != x.device:
            self.inv_freq = self.inv_freq.to(x.device)
        if self.config.sliding_window or self.config.alibi:
            seqs = attention.add_window_and_alibi(seqs, self.config, x)
        angles = seqs.positions[:, None] * self.inv_freq  # (N, E/2) float32
        cos, sin = (f(angles)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))  # (N, 1, E/2)
        for i, layer in enumerate(self.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, seqs, use_reentrant=False)
            else:
                x = layer(x, cos, sin, seqs, caches[i] if caches else None)
        return self.norm(x)

    def check_length(self, length):
        c = self.config
        if c.rope_type == "dynamic" and length > c.max_position_embeddings:
            raise SystemExit(
                f"error: {length} tokens, but beyond {c.max_position_embeddings} this "
                "model's RoPE is not known here: lower max_len or max_new_tokens"
            )

    def vocabulary(self):
        """The matrix (V, D) whose rows score the next token."""
        weight = self.lm_head.weight
        return F.normalize(weight) if self.config.norm_head else weight

    def scores(self, x):
        """Hidden states (N, D) -> scores (N,): in float32, since bfloat16 ties near zero."""
        c, head = self.config, self.score_head
        s = x.float() @ head.weight[0].float()
        if head.bias is not None:
            s = s + head.bias.float()
        if not c.do_normalize or c.score_type == "critic":
            return s
        mean = c.mean[0] if c.score_type == "reward" else 0.0  # a cost's zero is never shifted
        return (s - mean) / (math.sqrt(c.var[0]) + 1e-8)


def apply_rope(x, cos, sin):
    """RoPE (arXiv:2104.09864) of x (N, heads, E): dimensions i and i + E/2 turn together."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_frequencies(c):
    """Angle per position of each pair of dimensions (E/2,) float32, scaled as the config says."""
    powers = torch.arange(0, c.head_dim, 2, dtype=torch.int64, device="cpu").float() / c.head_dim
    inv_freq = 1.0 / (c.rope_theta**powers)
    if c.alibi:
        return torch.zeros_like(inv_freq)  # nothing turns
    s = c.rope_scaling or {}
    if c.rope_type == "linear":
        return inv_freq / s["factor"]
    if c.rope_type == "llama3":  # long waves are slowed, short ones kept, a linear blend between
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * inv_freq / s["factor"] + blend * inv_freq
    return inv_freq  # "dynamic" acts beyond max_position_embeddings only
