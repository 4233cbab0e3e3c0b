"""Families of models that are almost LLaMA: how their config.json and their tensors differ from it.

This file holds data and functions of data; it reads no files. One more family is one more entry in
FAMILIES, and, if nanosafe shall also write it, a case in choose_written_family() and
make_config_json(). docs/formats.md shows how."""

from typing import Callable, NamedTuple

from nanosafe.checkpoint.tensors import RowRange
from nanosafe.errors import stop

BAICHUAN2_VOCABULARY = 125696  # rows; older Baichuans have 64,000
MISTRAL_WINDOW = 4096  # keys, where config.json does not say


# ---- where queries, keys and values lie in a family's tensors ----
#
# Each function takes the names of the tensors, and H heads, K kv heads and the head width E, and
# returns the RowRanges of our qkv_proj, whose rows are all queries, then all keys, then all values.


def qkv_separate(tensors, H, K, E):
    """LLaMA: queries, keys and values have a tensor each."""
    queries, keys, values = tensors
    return [
        RowRange(queries, 0, H * E, 1, 0),
        RowRange(keys, 0, K * E, 1, H * E),
        RowRange(values, 0, K * E, 1, (H + K) * E),
    ]


def qkv_stacked(tensors, H, K, E):
    """Baichuan: one tensor has the queries, below them the keys, below them the values."""
    return [RowRange(tensors[0], 0, (H + 2 * K) * E, 1, 0)]


def qkv_grouped(tensors, H, K, E):
    """InternLM2: one tensor has the queries of a kv head, its key and its value, then the next."""
    tensor = tensors[0]
    queries = H // K * E  # rows of queries in a group
    ranges = []
    for group in range(K):
        start = group * (queries + 2 * E)
        key_start = start + queries
        value_start = key_start + E
        ranges.append(RowRange(tensor, start, queries, 1, group * queries))
        ranges.append(RowRange(tensor, key_start, E, 1, (H + group) * E))
        ranges.append(RowRange(tensor, value_start, E, 1, (H + K + group) * E))
    return ranges


def qkv_interleaved(tensors, H, K, E):
    """Meta: the two dimensions that RoPE turns together are neighbours, not half a head apart."""
    queries, keys, values = tensors
    half = E // 2
    ranges = []
    for tensor, heads, target in ((queries, H, 0), (keys, K, H * E)):
        for head in range(heads):
            start = head * E
            ranges.append(RowRange(tensor, start, half, 2, target + start))
            ranges.append(RowRange(tensor, start + 1, half, 2, target + start + half))
    ranges.append(RowRange(values, 0, K * E, 1, (H + K) * E))
    return ranges


# ---- a family's config.json -> the keys that LLaMA spells otherwise ----


def keep_config(config_json):
    return {}


def mistral(config_json):
    return {"sliding_window": config_json.get("sliding_window", MISTRAL_WINDOW)}


def qwen2(config_json):
    if config_json.get("use_sliding_window"):
        stop("a Qwen2 with use_sliding_window is not supported: only some layers have a window")
    return {"sliding_window": 0}


def internlm(config_json):
    """InternLM's key `bias` is about attention: a score head must not take it for its own."""
    rotary = config_json.get("rotary") or {}
    return {"bias": None, "rope_theta": rotary.get("base", config_json.get("rope_theta"))}


def baichuan(config_json):
    """The 13B models have ALiBi and no max_position_embeddings; Baichuan2 normalises its head."""
    length = config_json.get("max_position_embeddings")
    longest = length or config_json.get("model_max_length")
    if longest is None:
        raise ValueError("it has neither max_position_embeddings nor model_max_length")
    vocabulary = config_json.get("vocab_size") or 0
    return {
        "alibi": length is None,
        "max_position_embeddings": longest,
        "norm_head": config_json.get("norm_head", vocabulary >= BAICHUAN2_VOCABULARY),
    }


# ---- the families ----


class Family(NamedTuple):
    """How the folders of a family differ from LLaMA's."""

    architecture: str = "Llama"  # the first part of its class names in config.json
    translate_config: Callable = keep_config
    qkv: tuple = ("q_proj", "k_proj", "v_proj")  # the tensors with queries, keys and values
    layout: Callable = qkv_separate  # where these lie in the tensors
    gate_up: tuple = ("gate_proj", "up_proj")
    renames: tuple = ()  # (a part of our tensors' names, the family's word for it)


SHORT_NAMES = (
    ("self_attn.", "attention."),
    ("o_proj", "wo"),
    ("mlp.", "feed_forward."),
    ("down_proj", "w2"),
    ("input_layernorm", "attention_norm"),
    ("lm_head", "output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("embed_tokens", "tok_embeddings"),
)

LLAMA = Family()
FAMILIES = {  # by the model_type of config.json
    "llama": LLAMA,
    "mistral": Family("Mistral", mistral),
    "qwen2": Family("Qwen2", qwen2),
    "internlm": Family("InternLM", internlm),
    "internlm2": Family(
        "InternLM2",
        internlm,
        qkv=("wqkv",),
        layout=qkv_grouped,
        gate_up=("w1", "w3"),
        renames=SHORT_NAMES,
    ),
    "baichuan": Family("Baichuan", baichuan, qkv=("W_pack",), layout=qkv_stacked),
}
META = Family(  # Meta's own checkpoints, which meta.py reads
    qkv=("wq", "wk", "wv"),
    layout=qkv_interleaved,
    gate_up=("w1", "w3"),
    renames=(*SHORT_NAMES, ("model.", "")),
)


# ---- our parameters -> a folder's tensors ----


def name_tensor(name, family):
    """The name of our parameter in a family's folders; fused parameters keep our name."""
    tensor = name
    if not name.startswith(("lm_head.", "score_head.")):
        tensor = "model." + name
    for ours, theirs in family.renames:
        tensor = tensor.replace(ours, theirs)
    return tensor


def find_rows(config, name, height, family=LLAMA):
    """The RowRanges of the parameter `name`, which has `height` rows, in a family's tensors.

    We multiply by queries, keys and values at once, and by gate and up at once. Most folders keep
    them apart."""
    tensor = name_tensor(name, family)
    if ".qkv_proj." in name:
        tensors = [tensor.replace("qkv_proj", part) for part in family.qkv]
        H, K = config.num_attention_heads, config.num_key_value_heads
        return family.layout(tensors, H, K, config.head_dim)
    if ".gate_up_proj." in name:
        rows = height // len(family.gate_up)
        ranges = []
        for i, part in enumerate(family.gate_up):
            part_tensor = tensor.replace("gate_up_proj", part)
            ranges.append(RowRange(part_tensor, 0, rows, 1, i * rows))
        return ranges
    return [RowRange(tensor, 0, height, 1, 0)]


# ---- the config.json that is written ----


def choose_written_family(config):
    """The model_type whose config.json can express a model: LLaMA's if possible.

    None where no family's config.json can."""
    is_baichuan = config.alibi or config.norm_head
    has_window = config.sliding_window > 0
    has_bias = config.attention_bias or config.output_bias or config.mlp_bias
    if not is_baichuan and not has_window:
        if config.attention_bias == config.output_bias:
            return "llama"
        if not config.output_bias and not config.mlp_bias:
            return "qwen2"
    if is_baichuan and not has_window and not has_bias:
        return "baichuan"
    if has_window and not is_baichuan and not has_bias:
        return "mistral"
    return None


def check_can_be_saved(config):
    """Stop, before anything is trained, if no config.json can express this model."""
    if choose_written_family(config) is None:
        stop(
            "no family's config.json can express this model: a window, ALiBi or a normalised head, "
            "and biases exclude each other, and biases of only some matrices are Qwen2's"
        )


def make_config_json(config, head):
    """The config.json to write for a model that check_can_be_saved() lets pass."""
    values = config.to_dict(head)
    for key in ("sliding_window", "alibi", "norm_head", "output_bias"):  # not in LLaMA's
        del values[key]
    kind = choose_written_family(config)
    if kind == "llama":
        return values
    if kind == "mistral":
        values["sliding_window"] = config.sliding_window
    if kind == "qwen2":
        values["use_sliding_window"] = False
    if kind == "baichuan":
        values["norm_head"] = config.norm_head
        values["model_max_length"] = config.max_position_embeddings
        if config.alibi:
            del values["max_position_embeddings"]
    ending = "ForCausalLM" if head == "lm" else "ForScore"
    values["model_type"] = kind
    values["architectures"] = [FAMILIES[kind].architecture + ending]
    return values
