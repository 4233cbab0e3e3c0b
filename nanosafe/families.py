"""
The families of models that are almost LLaMA: what their config.json and their tensors call
otherwise. One more is one more line in FAMILIES (docs/formats.md has an example).
"""

from nanosafe.files import stop
from nanosafe.formats import LLAMA, Family


def mistral(d):
    return {"sliding_window": d.get("sliding_window", 4096)}


def qwen2(d):
    if d.get("use_sliding_window"):
        stop("a Qwen2 with use_sliding_window, where only some layers have a window, is not known "
             "here")
    return {"sliding_window": 0}


def internlm(d):
    rotary = d.get("rotary") or {}
    return {"bias": None, "rope_theta": rotary.get("base", d.get("rope_theta"))}


def baichuan(d):
    """The 13B models have ALiBi and no max_position_embeddings; the second generation is known by
    its vocabulary."""
    length = d.get("max_position_embeddings")
    return {"alibi": length is None, "max_position_embeddings": length or d["model_max_length"],
            "norm_head": d.get("norm_head", d["vocab_size"] >= 125696)}


def together(tensors, H, K, E):
    """Queries, keys and values one below the other in one tensor."""
    return [(tensors[0], 0, (H + 2 * K) * E, 1)]


def groups(tensors, H, K, E):
    """In one tensor, for each kv head its queries, its key and its value."""
    G = H // K
    return [(tensors[0], (group * (G + 2) + first) * E, heads * E, 1)
            for first, heads in ((0, G), (G, 1), (G + 1, 1)) for group in range(K)]


def pairs(tensors, H, K, E):
    """The two dimensions that RoPE turns together are neighbours; in LLaMA they are half a head
    apart."""
    q, k, v = tensors
    return [(tensor, head * E + odd, E // 2, 2) for tensor, heads in ((q, H), (k, K))
            for head in range(heads) for odd in (0, 1)] + [(v, 0, K * E, 1)]


SHORT = (("self_attn.", "attention."), ("o_proj", "wo"), ("mlp.", "feed_forward."),
         ("down_proj", "w2"), ("input_layernorm", "attention_norm"), ("lm_head", "output"),
         ("post_attention_layernorm", "ffn_norm"), ("embed_tokens", "tok_embeddings"))
FAMILIES = {  # by the model_type of config.json
    "llama": LLAMA,
    "mistral": Family("Mistral", mistral),
    "qwen2": Family("Qwen2", qwen2),
    "internlm": Family("InternLM", internlm),
    "internlm2": Family("InternLM2", internlm, ("wqkv",), groups, ("w1", "w3"), SHORT),
    "baichuan": Family("Baichuan", baichuan, ("W_pack",), together),
}
META = Family(qkv=("wq", "wk", "wv"), layout=pairs, gate_up=("w1", "w3"),
              names=(*SHORT, ("model.", "")))


def named(kind, path):
    if kind not in FAMILIES:
        stop(f"{path!r}: model_type {kind!r} is not known here: {', '.join(FAMILIES)} are "
             "(docs/formats.md says how to add one)")
    return FAMILIES[kind]


def other_json(config, d, head):
    """LLaMA's config.json `d` for a model that needs another family's, and that Family."""
    biases = config.attention_bias, config.output_bias, config.mlp_bias
    special = config.alibi or config.norm_head
    if (special and config.sliding_window or any(biases) and (special or config.sliding_window)
            or any(biases[1:]) and biases[:2] not in ((True, True), (False, False))):
        stop("no family's config.json can say what this model has: windows, ALiBi, a normalised "
             "head and biases together, or only some of the biases")
    if special:
        kind, more = "baichuan", {"norm_head": config.norm_head,
                                  "model_max_length": config.max_position_embeddings}
        if config.alibi:
            del d["max_position_embeddings"]
    elif config.sliding_window:
        kind, more = "mistral", {"sliding_window": config.sliding_window}
    else:
        kind, more = "qwen2", {"use_sliding_window": False}
    suffix = "ForCausalLM" if head == "lm" else "ForScore"
    architectures = [FAMILIES[kind].architecture + suffix]
    return {**d, **more, "model_type": kind, "architectures": architectures}, FAMILIES[kind]
