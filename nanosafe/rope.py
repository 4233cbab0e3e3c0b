"""RoPE (arXiv:2104.09864): pairs of a head's dimensions turn by angles that grow with the position.

A pair turns by its frequency, in radians per position: theta^(-2i / R) for the i-th of R / 2 pairs.
Models that were made for longer texts than they were first trained on scale these frequencies; each
way of doing so is a function below. Some models do not treat all layers alike: kinds_of_layers()
says which layer turns how.

Shapes: N packed tokens, H heads, K kv heads, E head width, R dimensions of a head that turn."""

import math
from typing import NamedTuple

import torch

SCALED = "scaled"  # by rope_scaling, where the config has one
UNSCALED = "unscaled"  # by rope_theta alone
STILL = "still"  # no rotation


class Frequencies(NamedTuple):
    """How fast the pairs of dimensions of a layer turn."""

    short: torch.Tensor  # (R/2,) radians per position
    long: torch.Tensor = None  # (R/2,) those of texts longer than `border`; None: the same
    border: int = 0  # tokens
    scale: float = 1.0  # what cosines and sines are multiplied by

    def to(self, device):
        long = self.long
        if long is not None:
            long = long.to(device)
        return self._replace(short=self.short.to(device), long=long)

    def at(self, layout):
        """The frequencies of each token: (R/2,), or (N, R/2) where they depend on its text."""
        if self.long is None:
            return self.short
        is_long = layout.text_lengths() > self.border
        return torch.where(is_long[:, None], self.long, self.short)


class Rope:
    """The rotations of a model's layers.

    Neither a module nor a buffer: frequencies are not trained, not saved, and stay in float32."""

    def __init__(self, config):
        self.config = config
        self.kinds = kinds_of_layers(config)
        self.frequencies = {}
        for kind in self.kinds:
            if kind not in self.frequencies:
                self.frequencies[kind] = make_frequencies(config, kind)

    def rotations(self, layout, x):
        """The pair of cosines and sines of each layer, both (N, 1, R) or (N, H + K, R).

        Those of a pair of dimensions stand at both, and the sine's sign is turned at the first.

        layout  of attention.py: it has the positions;  x  (N, D) has the device and the dtype"""
        by_kind = {}
        for kind, frequencies in self.frequencies.items():
            if frequencies.short.device != x.device:
                frequencies = frequencies.to(x.device)
                self.frequencies[kind] = frequencies
            by_kind[kind] = self.rotation(layout, frequencies, x.dtype)
        return [by_kind[kind] for kind in self.kinds]

    def rotation(self, layout, frequencies, dtype):
        angles = layout.positions[:, None] * frequencies.at(layout)  # (N, R/2) float32
        cos = torch.cos(angles)[:, None]  # (N, 1, R/2)
        sin = torch.sin(angles)[:, None]
        if frequencies.scale != 1:
            cos = cos * frequencies.scale
            sin = sin * frequencies.scale
        if self.config.llama_4_scaling_beta:
            scale = scale_queries(layout.positions, self.config)
            cos = cos * scale
            sin = sin * scale
        cos = torch.cat((cos, cos), dim=-1)
        sin = torch.cat((-sin, sin), dim=-1)
        if self.config.post_norm:  # OLMo 2 turns in float32
            return cos, sin
        return cos.to(dtype), sin.to(dtype)


def turn(x, cos, sin):
    """RoPE of x (N, heads, E): dimensions i and i + R/2 turn together; those from R on do not."""
    R = cos.shape[-1]
    turning, still = x[..., :R], x[..., R:]
    a, b = turning.chunk(2, dim=-1)
    turned = (turning * cos + torch.cat((b, a), dim=-1) * sin).to(x.dtype)
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned


def scale_queries(positions, config):
    """Ministral 3's factors (N, H + K, 1): 1 for keys, and more for queries far into a text.

    A query that turns is scaled by scaling its cosines and sines."""
    length = config.rope_scaling["original_max_position_embeddings"]
    periods = torch.floor(positions / length)
    scale = 1 + config.llama_4_scaling_beta * torch.log(1 + periods)
    of_queries = scale[:, None, None].expand(-1, config.num_attention_heads, -1)
    of_keys = torch.ones_like(scale)[:, None, None].expand(-1, config.num_key_value_heads, -1)
    return torch.cat((of_queries, of_keys), dim=1)


# ---- which layer turns how ----


def kinds_of_layers(config):
    """SCALED, UNSCALED or STILL for each layer."""
    kinds = []
    for i, window in enumerate(config.windows_of_layers()):
        is_still = config.no_rope_layers is not None and not config.no_rope_layers[i]
        if config.alibi or is_still:
            kinds.append(STILL)
        elif config.scale_full_layers_only and window:
            kinds.append(UNSCALED)
        else:
            kinds.append(SCALED)
    return tuple(kinds)


def find_border(config):
    """The longest text of "longrope"'s short frequencies, in tokens; 0: all texts are alike."""
    if config.rope_type != "longrope":
        return 0
    return config.rope_scaling["original_max_position_embeddings"]


# ---- frequencies, by the rope_type of rope_scaling ----


def rotary_width(config):
    """How many dimensions of a head turn."""
    return int(config.head_dim * config.partial_rotary_factor)


def make_frequencies(config, kind=SCALED):
    R = rotary_width(config)
    dimensions = torch.arange(0, R, 2, dtype=torch.int64, device="cpu").float()
    inv_freq = 1.0 / (config.rope_theta ** (dimensions / R))
    if kind == STILL:
        return Frequencies(torch.zeros_like(inv_freq))
    if kind == UNSCALED:
        return Frequencies(inv_freq)
    return SCALINGS[config.rope_type](inv_freq, config)


def keep(inv_freq, config):
    """ "default", and "dynamic", which acts beyond max_position_embeddings only."""
    return Frequencies(inv_freq)


def scale_linearly(inv_freq, config):
    return Frequencies(inv_freq / config.rope_scaling["factor"])


def scale_as_llama3(inv_freq, config):
    """Long waves are slowed down, short ones kept, with a linear blend between the two."""
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return Frequencies((1 - blend) * inv_freq / scaling["factor"] + blend * inv_freq)


def scale_as_yarn(inv_freq, config):
    """YaRN (arXiv:2309.00071): as in Llama 3, with the blend linear in the number of the pair.

    All attention becomes sharper, too: queries and keys are scaled by way of cosines and sines."""
    scaling = config.rope_scaling
    length = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or config.max_position_embeddings / length
    R = rotary_width(config)

    def find_pair(turns):
        """The number of the pair, a fraction, that turns so often in `length` tokens."""
        return R * math.log(length / (2 * math.pi * turns)) / (2 * math.log(config.rope_theta))

    low = find_pair(scaling.get("beta_fast") or 32)
    high = find_pair(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(len(inv_freq), dtype=torch.float32, device="cpu")
    blend = ((pairs - low) / (high - low)).clamp(0, 1)
    inv_freq = inv_freq / factor * blend + inv_freq * (1 - blend)
    return Frequencies(inv_freq, scale=yarn_scale(factor, scaling))


def yarn_scale(factor, scaling):
    """What cosines and sines are multiplied by, for texts that are `factor` times as long."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    logarithm = math.log(max(factor, 1))
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:  # DeepSeek's
        return (0.1 * mscale * logarithm + 1) / (0.1 * mscale_all_dim * logarithm + 1)
    return 0.1 * logarithm + 1


def scale_as_longrope(inv_freq, config):
    """LongRoPE (arXiv:2402.13753): each pair has a divisor of its own, and another in long texts.

    All positions of a text turn by its own length, whatever else is in the batch, so that a text
    has the same log-probabilities in every batch."""
    scaling = config.rope_scaling
    border = scaling["original_max_position_embeddings"]
    short = inv_freq / torch.tensor(scaling["short_factor"], dtype=torch.float32, device="cpu")
    long = inv_freq / torch.tensor(scaling["long_factor"], dtype=torch.float32, device="cpu")
    scale = scaling.get("attention_factor")
    if scale is None:
        factor = scaling.get("factor") or config.max_position_embeddings / border
        scale = math.sqrt(1 + math.log(max(factor, 1)) / math.log(border))
    return Frequencies(short, long, border, scale)


SCALINGS = {  # by rope_type
    "default": keep,
    "linear": scale_linearly,
    "llama3": scale_as_llama3,
    "dynamic": keep,
    "yarn": scale_as_yarn,
    "longrope": scale_as_longrope,
}


# ---- what a config.json says ----


def read_config_json(values):
    """Config's rope_theta and rope_scaling from the keys of a config.json that are not null.

    transformers 4 says rope_scaling, and transformers 5 rope_parameters; the first one wins."""
    parameters = values.get("rope_parameters", {})
    scaling = dict(values.get("rope_scaling") or parameters)
    for key, value in scaling.items():
        if isinstance(value, dict):
            raise ValueError(f"RoPE that differs by layer ({key}) is not this family's")
    theta = parameters.get("rope_theta") or values.get("rope_theta", 10000.0)
    theta = scaling.pop("rope_theta", None) or theta
    scaling.pop("partial_rotary_factor", None)  # only Phi-3 has it, whose translation has read it
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling["rope_type"] = kind
    key = "original_max_position_embeddings"  # of the texts that a model was first trained on
    if kind in ("llama3", "yarn", "longrope"):
        for length in (values.get(key), scaling.get(key), values.get("max_position_embeddings")):
            if length is not None:
                scaling[key] = length
                break
    return {"rope_theta": theta, "rope_scaling": scaling}


NUMBERS = {  # that rope_scaling must have
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings",),
}
OPTIONAL_NUMBERS = {  # that it may have; null stands for none
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
FACTORS = ("short_factor", "long_factor")  # lists of "longrope"


def check(config):
    """Raise ValueError where RoPE cannot be computed from a Config."""
    share = config.partial_rotary_factor
    R = rotary_width(config) if 0 < share <= 1 else 0
    if R == 0 or R % 2:
        raise ValueError(
            f"partial_rotary_factor {share!r} of heads of {config.head_dim} dimensions must be an "
            "even number of them"
        )
    kind = config.rope_type
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_type {kind!r} is not one of {', '.join(SCALINGS)}")
    scaling = config.rope_scaling or {}
    for key in NUMBERS.get(kind, ()):
        check_number(kind, key, scaling.get(key))
    for key in OPTIONAL_NUMBERS.get(kind, ()):
        if scaling.get(key) is not None:
            check_number(kind, key, scaling[key])
    if kind in ("yarn", "longrope"):  # which take logarithms of both
        length = scaling["original_max_position_embeddings"]
        if length <= 1 or config.rope_theta <= 1:
            raise ValueError(
                f"{kind} RoPE of original_max_position_embeddings {length} and rope_theta "
                f"{config.rope_theta} cannot be computed: both must be above 1"
            )
    if kind == "longrope":
        for key in FACTORS:
            check_factors(key, scaling.get(key), R // 2)
    if config.llama_4_scaling_beta and kind != "yarn":
        raise ValueError(f"llama_4_scaling_beta goes with yarn RoPE, and this is {kind!r}")


def check_number(kind, key, value):
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ValueError(f"{key} of its {kind} RoPE is {value!r}, not a number")


def check_factors(key, factors, count):
    """Stop unless factors are as many positive numbers as pairs of dimensions turn."""
    if not isinstance(factors, list) or len(factors) != count:
        raise ValueError(f"{key} of its longrope RoPE is not a list of {count} numbers")
    for factor in factors:
        check_number("longrope", key, factor)
        if factor == 0:
            raise ValueError(f"{key} of its longrope RoPE has a 0")
