"""Families of models that are almost LLaMA: how their config.json and their tensors differ from it.

This file holds data and functions of data; it reads no files. One more family is one more entry in
FAMILIES. docs/formats.md shows how."""

from typing import Callable, NamedTuple

from nanosafe.checkpoint.tensors import RowRange
from nanosafe.errors import stop

BAICHUAN2_VOCABULARY = 125696  # rows; older Baichuans have 64,000
MISTRAL_WINDOW = 4096  # keys, where config.json does not say; Qwen's and OLMo 3's, too
FULL, SLIDING = "full_attention", "sliding_attention"
# Fields of Config that LLaMA's config.json does not have. Where one says them, they mean nothing.
NOT_LLAMA = (
    "sliding_window",
    "layer_types",
    "qk_norm",
    "post_norm",
    "no_rope_layers",
    "partial_rotary_factor",
    "scale_full_layers_only",
    "llama_4_scaling_beta",
    "alibi",
    "norm_head",
)


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
#
# Each function takes a config.json and returns keys of Config.


def keep_config(config_json):
    return {}


def mistral(config_json):
    return {"sliding_window": config_json.get("sliding_window", MISTRAL_WINDOW)}


def ministral(config_json):
    """Mistral's window in some of the layers."""
    return {**mistral(config_json), "layer_types": config_json.get("layer_types")}


def ministral3(config_json):
    """The queries' growth is among the numbers of RoPE."""
    scaling = config_json.get("rope_scaling") or config_json.get("rope_parameters")
    if not scaling:
        raise ValueError("it has no rope_parameters")
    return {
        "sliding_window": config_json.get("sliding_window"),
        "head_dim": config_json.get("head_dim", 128),
        "llama_4_scaling_beta": scaling.get("llama_4_scaling_beta"),
    }


def qwen2(config_json):
    """Layers from max_window_layers on may have a window."""
    if not config_json.get("use_sliding_window"):
        return {}
    layer_types = config_json.get("layer_types")
    if layer_types is None:
        first = read_count(config_json, "max_window_layers", 28)
        layer_types = []
        for i in range(read_count(config_json, "num_hidden_layers", 32)):
            layer_types.append(SLIDING if i >= first else FULL)
    window = config_json.get("sliding_window", MISTRAL_WINDOW)
    return {"sliding_window": window, "layer_types": layer_types}


def qwen3(config_json):
    head_dim = config_json.get("head_dim", 128)
    return {**qwen2(config_json), "qk_norm": "head", "head_dim": head_dim}


def smollm3(config_json):
    """Some layers have no RoPE; if there are windows, these layers have them."""
    turns = config_json.get("no_rope_layers")
    if turns is None:
        interval = read_count(config_json, "no_rope_layer_interval", 4)
        turns = []
        for i in range(read_count(config_json, "num_hidden_layers", 36)):
            turns.append(int((i + 1) % max(interval, 1) != 0))
    changes = {
        "no_rope_layers": turns,
        "rope_theta": config_json.get("rope_theta", 2e6),
        "tie_word_embeddings": config_json.get("tie_word_embeddings", True),
    }
    if config_json.get("use_sliding_window"):
        layer_types = config_json.get("layer_types")
        if layer_types is None and isinstance(turns, list):
            layer_types = [FULL if has_rope else SLIDING for has_rope in turns]
        changes["layer_types"] = layer_types
        changes["sliding_window"] = config_json.get("sliding_window")
    return changes


def olmo2(config_json):
    return {"qk_norm": "width", "post_norm": True}


def olmo3(config_json):
    """Three of four layers have a window, and a RoPE of their own."""
    layer_types = config_json.get("layer_types")
    if layer_types is None:
        layer_types = []
        for i in range(read_count(config_json, "num_hidden_layers", 32)):
            layer_types.append(SLIDING if (i + 1) % 4 else FULL)
    theta = config_json.get("rope_theta", 5e5)
    by_kind = config_json.get("rope_parameters") or {}  # transformers 5
    full = {"rope_theta": theta, **read_object(by_kind, FULL)}
    sliding = {"rope_theta": theta, **read_object(by_kind, SLIDING)}
    full.update(config_json.get("rope_scaling") or {})  # transformers 4
    full.pop("truncate", None)  # transformers does not look for it here
    alike = full == sliding
    kind = sliding.get("rope_type", sliding.get("type", "default"))
    same_theta = full["rope_theta"] == sliding["rope_theta"]
    if not alike and not (kind == "default" and same_theta):
        raise ValueError("layers with a window have a RoPE that is not the others' without scaling")
    return {
        **olmo2(config_json),
        "sliding_window": config_json.get("sliding_window", MISTRAL_WINDOW),
        "layer_types": layer_types,
        "rope_scaling": full,
        "rope_parameters": None,
        "scale_full_layers_only": not alike,
    }


def phi3(config_json):
    """RoPE of "su" or "yarn" is longrope, and its border is a key of its own."""
    scaling = dict(config_json.get("rope_scaling") or config_json.get("rope_parameters") or {})
    if scaling.get("rope_type", scaling.get("type")) in ("su", "yarn"):
        scaling["rope_type"] = "longrope"
    share = scaling.get("partial_rotary_factor", config_json.get("partial_rotary_factor"))
    return {
        "sliding_window": config_json.get("sliding_window"),
        "rope_scaling": scaling,
        "partial_rotary_factor": share,
        "original_max_position_embeddings": config_json.get(
            "original_max_position_embeddings", 4096
        ),
    }


def internlm(config_json):
    """InternLM's key `bias` is about attention: a score head must not take it for its own."""
    rotary = config_json.get("rotary") or {}
    theta = rotary.get("base", config_json.get("rope_theta"))
    return {"model_type": "llama", "bias": None, "rope_theta": theta}


def baichuan(config_json):
    """The 13B models have ALiBi and no max_position_embeddings; Baichuan2 normalises its head."""
    length = config_json.get("max_position_embeddings")
    longest = length or config_json.get("model_max_length")
    if longest is None:
        raise ValueError("it has neither max_position_embeddings nor model_max_length")
    vocabulary = config_json.get("vocab_size") or 0
    return {
        "model_type": "llama",  # which Baichuan-7B is
        "alibi": length is None,
        "max_position_embeddings": longest,
        "norm_head": config_json.get("norm_head", vocabulary >= BAICHUAN2_VOCABULARY),
    }


def read_count(config_json, key, default):
    """A whole number that a config.json may leave out."""
    value = config_json.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} is {value!r}, not a whole number")
    return value


def read_object(values, key):
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}, not an object")
    return value


# ---- Config -> what a family's config.json says otherwise than LLaMA's ----
#
# Each function changes LLaMA's config.json.


def write_llama(values, config):
    pass


def write_window(values, config):
    """Mistral, Phi-3: one window, or null."""
    values["sliding_window"] = config.sliding_window or None


def write_layer_types(values, config):
    """Ministral: a window in some of the layers."""
    window = max(config.windows_of_layers())
    values["sliding_window"] = window or None
    values["layer_types"] = list_layer_types(config)


def write_ministral3(values, config):
    write_window(values, config)
    for key in ("rope_scaling", "rope_parameters"):
        scaling = values[key] or {}
        values[key] = {**scaling, "llama_4_scaling_beta": config.llama_4_scaling_beta}


def write_qwen(values, config):
    """max_window_layers is for transformers before 4.53, layer_types for later ones."""
    write_layer_types(values, config)
    windows = config.windows_of_layers()
    values["use_sliding_window"] = max(windows) > 0
    values["max_window_layers"] = windows.count(0)


def write_smollm3(values, config):
    write_layer_types(values, config)
    values["use_sliding_window"] = values["sliding_window"] is not None
    values["no_rope_layers"] = config.no_rope_layers


def write_olmo3(values, config):
    """transformers 4 scales full layers only, whatever is said."""
    write_layer_types(values, config)
    scaled = values["rope_parameters"]
    plain = {"rope_theta": config.rope_theta, "rope_type": "default"}
    sliding = plain if config.scale_full_layers_only else scaled
    values["rope_parameters"] = {FULL: scaled, SLIDING: sliding}


def write_phi3(values, config):
    """transformers 4 refuses a rope_scaling that has more than these three keys."""
    write_window(values, config)
    values["partial_rotary_factor"] = config.partial_rotary_factor
    values["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    scaling = config.rope_scaling
    if scaling:
        three = {"type": "longrope"}
        for key in ("short_factor", "long_factor"):
            three[key] = scaling[key]
        for key in ("factor", "attention_factor"):  # which transformers 5 knows
            if scaling.get(key) is not None:
                three[key] = scaling[key]
        values["rope_scaling"] = three


def write_baichuan(values, config):
    values["norm_head"] = config.norm_head
    values["model_max_length"] = config.max_position_embeddings
    if config.alibi:
        del values["max_position_embeddings"]


def list_layer_types(config):
    kinds = []
    for window in config.windows_of_layers():
        kinds.append(SLIDING if window else FULL)
    return kinds


# ---- the families ----


class Family(NamedTuple):
    """How the folders of a family differ from LLaMA's."""

    architecture: str = "Llama"  # the first part of its class names in config.json
    translate_config: Callable = keep_config
    qkv: tuple = ("q_proj", "k_proj", "v_proj")  # the tensors with queries, keys and values
    layout: Callable = qkv_separate  # where these lie in the tensors
    gate_up: tuple = ("gate_proj", "up_proj")
    renames: tuple = ()  # (a part of our tensors' names, the family's word for it)
    # What its config.json can say, in the words of list_traits(); a family that is never written
    # has no function that writes it.
    write_config: Callable = None
    always: tuple = ()  # of each of its models
    sometimes: tuple = ()  # of some


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

SOME_ROPE = ("scaled RoPE", "longrope", "head width")
WINDOWS = ("one window", "windows by layer")
OLMO = ("norms after", "norm of all queries")

LLAMA = Family(write_config=write_llama, sometimes=(*SOME_ROPE, "biases", "MLP biases"))
FAMILIES = {  # by the model_type of config.json
    "llama": LLAMA,
    "mistral": Family(
        "Mistral", mistral, write_config=write_window, sometimes=(*SOME_ROPE, "one window")
    ),
    "ministral": Family(
        "Ministral", ministral, write_config=write_layer_types, sometimes=(*SOME_ROPE, *WINDOWS)
    ),
    "ministral3": Family(
        "Ministral3",
        ministral3,
        write_config=write_ministral3,
        always=("scaled RoPE",),
        sometimes=("growing queries", "head width", "one window"),
    ),
    "qwen2": Family(
        "Qwen2",
        qwen2,
        write_config=write_qwen,
        always=("biases of q, k, v",),
        sometimes=(*SOME_ROPE, *WINDOWS),
    ),
    "qwen3": Family(
        "Qwen3",
        qwen3,
        write_config=write_qwen,
        always=("norm of each query",),
        sometimes=(*SOME_ROPE, *WINDOWS, "biases"),
    ),
    "smollm3": Family(
        "SmolLM3",
        smollm3,
        write_config=write_smollm3,
        always=("layers without RoPE",),
        sometimes=(*SOME_ROPE, *WINDOWS, "biases", "MLP biases"),
    ),
    "olmo2": Family(
        "Olmo2",
        olmo2,
        write_config=write_llama,
        always=OLMO,
        sometimes=(*SOME_ROPE, "biases"),
    ),
    "olmo3": Family(
        "Olmo3",
        olmo3,
        write_config=write_olmo3,
        always=OLMO,
        sometimes=(*SOME_ROPE, *WINDOWS, "RoPE by window", "biases"),
    ),
    "phi3": Family(
        "Phi3",
        phi3,
        qkv=("qkv_proj",),
        layout=qkv_stacked,
        gate_up=("gate_up_proj",),
        write_config=write_phi3,
        sometimes=("longrope", "partial RoPE", "one window"),
    ),
    "internlm": Family("InternLM", internlm),
    "internlm2": Family(
        "InternLM2",
        internlm,
        qkv=("wqkv",),
        layout=qkv_grouped,
        gate_up=("w1", "w3"),
        renames=SHORT_NAMES,
    ),
    "baichuan": Family(
        "Baichuan",
        baichuan,
        qkv=("W_pack",),
        layout=qkv_stacked,
        write_config=write_baichuan,
        sometimes=(*SOME_ROPE, "ALiBi or normalised head"),
    ),
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


def list_traits(config):
    """What a model has that a plain LLaMA has not."""
    traits = set()
    if config.attention_bias and config.output_bias:
        traits.add("biases")
    elif config.attention_bias:
        traits.add("biases of q, k, v")
    elif config.output_bias:
        traits.add("biases of o")  # no family's
    if config.mlp_bias:
        traits.add("MLP biases")
    windows = set(config.windows_of_layers())
    if len(windows) > 1:
        traits.add("windows by layer")
    elif windows != {0}:
        traits.add("one window")
    if config.alibi or config.norm_head:
        traits.add("ALiBi or normalised head")
    if config.qk_norm:
        traits.add("norm of each query" if config.qk_norm == "head" else "norm of all queries")
    if config.post_norm:
        traits.add("norms after")
    if config.no_rope_layers is not None:
        traits.add("layers without RoPE")
    if config.partial_rotary_factor != 1:
        traits.add("partial RoPE")
    if config.rope_type != "default":
        traits.add("longrope" if config.rope_type == "longrope" else "scaled RoPE")
        if config.scale_full_layers_only:
            traits.add("RoPE by window")
    if config.llama_4_scaling_beta:
        traits.add("growing queries")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        traits.add("head width")
    return traits


def choose_written_family(config):
    """The model_type whose config.json can express a model: its own if possible.

    None where no family's config.json can."""
    traits = list_traits(config)
    for kind in (config.model_type, *FAMILIES):
        family = FAMILIES.get(kind, LLAMA)
        always = set(family.always)
        if family.write_config and always <= traits <= always | set(family.sometimes):
            return kind
    return None


def check_can_be_saved(config):
    """Stop, before anything is trained, if no config.json can express this model."""
    if choose_written_family(config) is None:
        traits = ", ".join(sorted(list_traits(config)))
        stop(f"no family's config.json can express a model that has all of this: {traits}")


def make_config_json(config, head):
    """The config.json to write for a model that check_can_be_saved() lets pass."""
    values = config.to_dict(head)
    for key in (*NOT_LLAMA, "output_bias"):
        del values[key]
    kind = choose_written_family(config)
    family = FAMILIES[kind]
    family.write_config(values, config)
    ending = "ForCausalLM" if head == "lm" else "ForScore"
    values["model_type"] = kind
    values["architectures"] = [family.architecture + ending]
    return values
