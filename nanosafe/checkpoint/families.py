"""Models that are almost LLaMA: what a family calls otherwise (one more is a line in FAMILIES, see
docs/formats.md), and Meta's checkpoints and llama2.c's files, which are memory-mapped."""

from typing import Callable, NamedTuple

from nanosafe.errors import stop


def qkv_separate(tensors, H, K, E):
    """LLaMA's queries, keys and values: a tensor each."""
    return [(tensor, 0, heads * E, 1) for tensor, heads in zip(tensors, (H, K, K))]


class Family(NamedTuple):
    """How a family's folders differ from LLaMA's."""

    architecture: str = "Llama"  # in config.json, where folders of the family are written
    config: Callable = lambda d: {}  # its config.json -> the keys that LLaMA spells otherwise
    qkv: tuple = ("q_proj", "k_proj", "v_proj")  # the tensors with queries, keys and values
    layout: Callable = qkv_separate  # where these are in them: parts(), below, of qkv_proj
    gate_up: tuple = ("gate_proj", "up_proj")
    names: tuple = ()  # (ours, theirs): parts of tensors' names


LLAMA = Family()


def find_rows(config, name, family=LLAMA):
    """Where the rows of our parameter `name` are: [(tensor, first row, rows or None: all, step)].
    We multiply by q, k and v at once, and by gate and up at once; most folders keep them apart."""
    tensor = name if name.startswith(("lm_head.", "score_head.")) else "model." + name
    for ours, theirs in family.names:
        tensor = tensor.replace(ours, theirs)
    c = config
    if ".qkv_proj." in name:
        tensors = [tensor.replace("qkv_proj", part) for part in family.qkv]
        return family.layout(tensors, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    if ".gate_up_proj." in name:
        height = 2 * c.intermediate_size // len(family.gate_up)
        return [(tensor.replace("gate_up_proj", part), 0, height, 1) for part in family.gate_up]
    return [(tensor, 0, None, 1)]


def make_config_json(config, head):
    """What to write as config.json, and its Family: LLaMA, unless that cannot say it all."""
    d = config.to_dict(head)
    keys = ("sliding_window", "alibi", "norm_head", "output_bias")
    window, alibi, norm_head, output_bias = (d.pop(key) for key in keys)
    if window or alibi or norm_head or output_bias != config.attention_bias:
        return make_other_config_json(config, d, head)
    return d, LLAMA


def mistral(d):
    return {"sliding_window": d.get("sliding_window", 4096)}


def qwen2(d):
    if d.get("use_sliding_window"):
        stop("a Qwen2 with use_sliding_window, only some layers have a window: not known here")
    return {"sliding_window": 0}


def internlm(d):
    rotary = d.get("rotary") or {}
    return {"bias": None, "rope_theta": rotary.get("base", d.get("rope_theta"))}


def baichuan(d):
    """The 13B models have ALiBi and no max_position_embeddings; Baichuan2 a larger vocabulary."""
    length = d.get("max_position_embeddings")
    return {
        "alibi": length is None,
        "max_position_embeddings": length or d["model_max_length"],
        "norm_head": d.get("norm_head", d["vocab_size"] >= 125696),
    }


def qkv_stacked(tensors, H, K, E):
    """Queries, keys and values one below the other in one tensor."""
    return [(tensors[0], 0, (H + 2 * K) * E, 1)]


def qkv_grouped(tensors, H, K, E):
    """In one tensor, for each kv head its queries, its key and its value."""
    G = H // K
    return [
        (tensors[0], (group * (G + 2) + first) * E, heads * E, 1)
        for first, heads in ((0, G), (G, 1), (G + 1, 1))
        for group in range(K)
    ]


def qkv_interleaved(tensors, H, K, E):
    """Dimensions that RoPE turns together are neighbours; in LLaMA they are half a head apart."""
    q, k, v = tensors
    return [
        (tensor, head * E + odd, E // 2, 2)
        for tensor, heads in ((q, H), (k, K))
        for head in range(heads)
        for odd in (0, 1)
    ] + [(v, 0, K * E, 1)]


SHORT = (
    ("self_attn.", "attention."),
    ("o_proj", "wo"),
    ("mlp.", "feed_forward."),
    ("down_proj", "w2"),
    ("input_layernorm", "attention_norm"),
    ("lm_head", "output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("embed_tokens", "tok_embeddings"),
)


FAMILIES = {  # by the model_type of config.json
    "llama": LLAMA,
    "mistral": Family("Mistral", mistral),
    "qwen2": Family("Qwen2", qwen2),
    "internlm": Family("InternLM", internlm),
    "internlm2": Family("InternLM2", internlm, ("wqkv",), qkv_grouped, ("w1", "w3"), SHORT),
    "baichuan": Family("Baichuan", baichuan, ("W_pack",), qkv_stacked),
}


META = Family(
    qkv=("wq", "wk", "wv"),
    layout=qkv_interleaved,
    gate_up=("w1", "w3"),
    names=(*SHORT, ("model.", "")),
)


def make_other_config_json(config, d, head):
    """LLaMA's config.json `d` for a model that needs another family's, and that Family."""
    biases = config.attention_bias, config.output_bias, config.mlp_bias
    special, window = config.alibi or config.norm_head, config.sliding_window
    if (
        sum(map(bool, (special, window, any(biases)))) > 1
        or any(biases[1:])
        and config.attention_bias != config.output_bias
    ):
        stop(
            "no family's config.json can say what this model has: windows, ALiBi, a normalised "
            "head and biases together, or only some of the biases"
        )
    if special:
        kind, more = (
            "baichuan",
            {"norm_head": config.norm_head, "model_max_length": config.max_position_embeddings},
        )
        if config.alibi:
            del d["max_position_embeddings"]
    elif window:
        kind, more = "mistral", {"sliding_window": window}
    else:
        kind, more = "qwen2", {"use_sliding_window": False}
    name = FAMILIES[kind].architecture + ("ForCausalLM" if head == "lm" else "ForScore")
    return {**d, **more, "model_type": kind, "architectures": [name]}, FAMILIES[kind]
