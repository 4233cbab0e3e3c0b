"""Adapters on a frozen base (lora.py) compute, learn, save and resume as whole models do.

tests/data/lora holds adapters that PEFT wrote, and what PEFT computed with them; checkpoint.load()
merges such an adapter, so the model with merged matrices is the other oracle here."""

import math
import os
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, run, small_config
from safetensors.torch import load_file, save_file
from test_parallel import TWO_NODES

from nanosafe import attention, checkpoint, parallel
from nanosafe.checkpoint import init_from_scratch
from nanosafe.checkpoint.adapter_folder import parameter_of
from nanosafe.data.batching import collate
from nanosafe.lora import AdaptedLLaMA, Lora, MatrixAdapter, PairShape
from nanosafe.model import LLaMA, RMSNorm
from nanosafe.storage import read_json, write_json

LORA = os.path.join(ROOT, "tests", "data", "lora")
INDEX = read_json(LORA, "index.json")["adapters"]
MERGED = [  # these change more than the matrices of blocks, so they get a base of their own
    "llama_modules_to_save",
    "llama_norms_saved",
    "llama_lm_head_lora",
    "llama_embedding_lora",
    "qwen2_bias_lora_only",
    "qwen2_bias_all",
]
SHARED = [name for name in INDEX if name not in MERGED and not name.startswith("refuse_")]
CPU = parallel.Placement(torch.device("cpu"), dtype=torch.float32)
ON_CPU = parallel.Placements(CPU, CPU)
ALL_MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def folder_of(name):
    return os.path.join(LORA, name)


def load_on_base(path, head="auto", bases=None):
    """The model of an adapter folder, not merged."""
    return checkpoint.load(path, head, bases={} if bases is None else bases)


def open_pairs(folder):
    """{PEFT's name: tensor} of an adapter folder."""
    return load_file(os.path.join(folder, "adapter_model.safetensors"))


def make_batch(lengths=(17, 6, 11), vocabulary=61):
    """Sequences whose second half carries loss, packed."""
    generator = np.random.default_rng(0)
    sequences = []
    masks = []
    for length in lengths:
        sequences.append(generator.integers(3, vocabulary, length))
        masks.append(np.arange(length) >= length // 2)
    return collate(sequences, masks, torch.device("cpu"))


def outputs_of(model, batch):
    """All that a model says of a batch, by name."""
    if model.head == "score":
        return {"scores": model.scores(batch)}
    return {
        "logits": model.logits(batch),
        "log_probs": model.log_probs(batch, temperature=0.7),
        "uniform": model.log_probs(batch, uniform_weights=True),
    }


def assert_close(tensor, expected, tolerance=1e-5):
    """That the difference is a share of the expected tensor at most, by their norms."""
    assert tensor.shape == expected.shape
    assert (tensor - expected).norm() <= tolerance * expected.norm()


def fill_adapter(model, seed=0):
    """Give an adapter other numbers than a new one's, whose B is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# ---- the same numbers as merged matrices give ----


@pytest.mark.parametrize("name", SHARED)
def test_outputs_are_those_of_the_merged_matrices(name):
    model = load_on_base(folder_of(name))
    merged = checkpoint.load(folder_of(name))
    assert isinstance(model, AdaptedLLaMA)
    batch = make_batch()
    expected = outputs_of(merged, batch)
    for key, tensor in outputs_of(model, batch).items():
        assert_close(tensor, expected[key])


@pytest.mark.parametrize("name", SHARED)
def test_outputs_are_those_that_peft_computed(name):
    model = load_on_base(folder_of(name))
    tokens = INDEX[name]["tokens"]
    batch = collate([np.array(tokens)], [np.ones(len(tokens))], torch.device("cpu"))
    expected = load_file(folder_of("expected.safetensors"))[name]
    with torch.no_grad():
        outputs = model.scores(batch) if model.head == "score" else model.logits(batch)
    assert_close(outputs, expected.view_as(outputs))


@pytest.mark.parametrize("name", MERGED)
def test_an_adapter_that_changes_more_than_matrices_gets_a_base_of_its_own(name, capsys):
    bases = {}
    model = load_on_base(folder_of(name), bases=bases)
    assert type(model) is LLaMA
    assert not bases
    assert "it is merged into its base" in capsys.readouterr().out


def weigh(outputs):
    """A loss whose gradient is another number at each token."""
    return (outputs * torch.linspace(-1, 2, len(outputs), dtype=outputs.dtype)).sum()


def loss_of(model, batch):
    if model.head == "score":
        return weigh(model.scores(batch))
    return weigh(model.log_probs(batch))


def find_weight(model, layer, name):
    """The weight of one of the four matrices of a block."""
    return model.get_parameter(parameter_of(layer, name))


def check_gradients(model, merged, tolerance=1e-5):
    """That the gradients of A and B are those that the chain rule makes of the merged weights'.

    W + s B A has dA = s B^T dW and dB = s dW A^T. Returns how many pairs there are."""
    checked = 0
    for layer, block in enumerate(model.blocks):
        for name, adapter in block.items():
            gradient = find_weight(merged, layer, name).grad
            for shape, A, B in zip(adapter.shapes, adapter.A, adapter.B):
                rows = gradient[shape.first_row : shape.first_row + shape.rows]
                assert_close(A.grad, shape.scale * B.detach().T @ rows, tolerance)
                assert_close(B.grad, shape.scale * rows @ A.detach().T, tolerance)
                checked += 1
    for parameter in model.base.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
    return checked


@pytest.fixture
def in_float64(monkeypatch):
    """Norms and attention compute in float64 for a model in float64, not in float32."""

    def normalize(norm, x):
        return torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)

    monkeypatch.setattr(RMSNorm, "forward", normalize)
    monkeypatch.setattr(attention, "attention_dtype", lambda x: x.dtype)


def merge_by_hand(model):
    """A LLaMA with the base's weights plus s B A, in the dtype of both."""
    merged = LLaMA(model.base.config, "lm").to(model.base.embed_tokens.weight.dtype)
    merged.load_state_dict(model.base.state_dict())
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            for name, adapter in block.items():
                weight = find_weight(merged, layer, name)
                for shape, A, B in zip(adapter.shapes, adapter.A, adapter.B):
                    end = shape.first_row + shape.rows
                    weight[shape.first_row : end] += shape.scale * B @ A
    return merged


@pytest.mark.parametrize("name", SHARED)
def test_gradients_are_those_of_the_merged_matrices(name, in_float64):
    """In float64: in float32 some of these adapters, which are large, have only three digits."""
    model = load_on_base(folder_of(name))
    model.base.double()
    model.double()
    merged = merge_by_hand(model)
    batch = make_batch()
    layout = attention.pack(batch.cu_seqlens, batch.max_seqlen, len(batch.tokens))
    weights_of_loss = torch.randn(merged.config.hidden_size, dtype=torch.float64)
    states = []
    for each in (model.requires_grad_(True), merged):
        hidden_states = each.hidden_states(batch.tokens, layout)
        weigh(hidden_states @ weights_of_loss).backward()
        states.append(hidden_states)
    assert_close(*states, 1e-12)
    tensors = open_pairs(folder_of(name))
    modules = [key for key in tensors if ".lora_A." in key]
    assert check_gradients(model, merged, 1e-10) == len(modules)


def test_the_score_head_has_the_gradient_of_the_merged_model_s():
    model = load_on_base(folder_of("llama_score")).requires_grad_(True)
    merged = checkpoint.load(folder_of("llama_score"))
    batch = make_batch()
    loss_of(model, batch).backward()
    loss_of(merged, batch).backward()
    assert_close(model.score_head.weight.grad, merged.score_head.weight.grad)


def test_recomputed_blocks_have_the_same_gradients():
    model = load_on_base(folder_of("llama_patterns")).requires_grad_(True)
    batch = make_batch()
    gradients = []
    for recomputes in (False, True):
        model.base.activation_checkpointing = recomputes
        model.zero_grad()
        loss_of(model, batch).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for gradient, recomputed in zip(*gradients):
        assert torch.equal(gradient, recomputed)
        assert gradient.abs().max() > 0


class Part(NamedTuple):
    """An adapter of one of three matrices that are multiplied at once."""

    rows: int
    rank: int  # 0: it has none
    scale: float


@pytest.mark.parametrize(
    "parts",
    [
        [Part(8, 3, 2.0), Part(4, 3, 2.0), Part(4, 3, 2.0)],
        [Part(8, 5, 0.5), Part(4, 0, 0.0), Part(4, 2, 3.0)],
        [Part(8, 0, 0.0), Part(4, 1, 1.0), Part(4, 0, 0.0)],
    ],
)
def test_a_fused_matrix_has_the_adapters_of_its_parts(parts):
    """In float64, beside a plain loop over matrices that are apart."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 6, dtype=torch.float64, generator=generator)
    height = sum(part.rows for part in parts)
    weight = torch.randn(height, 6, dtype=torch.float64, generator=generator)
    shapes = []
    first_row = 0
    for i, part in enumerate(parts):
        if part.rank:
            shapes.append(PairShape(f"m{i}", part.rank, part.scale, 6, part.rows, first_row))
        first_row += part.rows
    adapter = MatrixAdapter(shapes, height).double()
    for parameter in adapter.parameters():
        parameter.data.normal_(generator=generator)

    expected = []
    pairs = iter(zip(adapter.A, adapter.B))
    for part, rows in zip(parts, weight.split([part.rows for part in parts])):
        y = x @ rows.T
        if part.rank:
            A, B = next(pairs)
            y = y + part.scale * (x @ A.T @ B.T)
        expected.append(y)
    expected = torch.cat(expected, dim=1)
    A, B = adapter.pair(torch.float64)
    y = x @ weight.T + x @ A.T @ B.T
    assert (y - expected).abs().max() <= 1e-12 * expected.abs().max()

    weights_of_loss = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    parameters = list(adapter.parameters())
    gradients = torch.autograd.grad((y * weights_of_loss).sum(), parameters)
    wanted = torch.autograd.grad((expected * weights_of_loss).sum(), parameters)
    for gradient, other in zip(gradients, wanted):
        assert (gradient - other).abs().max() <= 1e-12 * other.abs().max()


def test_a_reward_adapter_on_a_policy_has_both_heads():
    """Which a reward model with a weight on the language model's loss needs."""
    bases = {}
    both = load_on_base(folder_of("llama_score"), "both", bases)
    scores_only = load_on_base(folder_of("llama_score"), "score", bases)
    batch = make_batch()
    log_probs, scores = both.log_probs_and_scores(batch)
    assert torch.equal(scores, scores_only.scores(batch))
    assert torch.equal(both.log_probs(batch), log_probs)
    assert torch.equal(both.scores(batch), scores)
    assert log_probs.abs().sum() > 1


# ---- one base ----


def test_models_that_name_one_base_share_its_tensors():
    bases = {}
    names = ("llama_q_v", "llama_score", "llama_patterns")
    models = [load_on_base(folder_of(name), bases=bases) for name in names]
    models.append(load_on_base(folder_of("base_llama"), bases=bases))
    assert len(bases) == 1
    assert models[0].base is models[1].base is models[2].base is models[3]
    pointers = {model.embed_tokens.weight.data_ptr() for model in models}
    assert len(pointers) == 1
    of_base = {id(parameter) for parameter in models[3].parameters()}
    for model in models[:3]:
        assert not of_base & {id(parameter) for parameter in model.parameters()}
        assert not of_base & {id(parameter) for parameter in model.state_dict().values()}


def test_a_model_on_a_base_does_not_change_what_another_says():
    bases = {}
    models = {}
    for name in ("llama_q_v", "llama_patterns", "base_llama"):
        models[name] = load_on_base(folder_of(name), bases=bases)
    batch = make_batch()
    for name in ("llama_patterns", "base_llama", "llama_q_v", "base_llama"):
        expected = load_on_base(folder_of(name)).logits(batch)
        assert torch.equal(models[name].logits(batch), expected)


# ---- a new adapter ----


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base"
    checkpoint.save(init_from_scratch(small_config(), seed=3), path)
    return str(path)


def new_adapter(path, head="lm", targets="all", rank=4, bases=None, seed=0, **options):
    lora = Lora(rank, 8.0, targets)
    bases = {} if bases is None else bases
    return checkpoint.load_trained(path, head, ON_CPU, bases, lora, seed=seed, **options)


def test_a_new_adapter_changes_nothing_not_even_by_a_bit(base):
    bases = {}
    model = new_adapter(base, bases=bases)
    reference = checkpoint.load(base, "lm", bases=bases)
    batch = make_batch()
    for key, tensor in outputs_of(model, batch).items():
        assert torch.equal(tensor, outputs_of(reference, batch)[key])
    with torch.no_grad():
        assert torch.equal(model.log_probs(batch), reference.log_probs(batch))


def test_a_new_adapter_is_drawn_as_peft_draws_it(base):
    model = new_adapter(base, rank=16)
    count = 0
    for block in model.blocks:
        for adapter in block.values():
            for shape, A, B in zip(adapter.shapes, adapter.A, adapter.B):
                bound = 1 / math.sqrt(shape.inputs)
                assert A.shape == (16, shape.inputs)
                assert 0.9 * bound < A.abs().max() <= bound
                assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
                assert not B.any()
                assert shape.scale == 0.5
                count += 1
    assert count == 2 * len(ALL_MATRICES)


def parameters_by_module(model):
    """{(module, "A" or "B"): parameter} of an adapter."""
    found = {}
    for block in model.blocks:
        for adapter in block.values():
            for shape, A, B in zip(adapter.shapes, adapter.A, adapter.B):
                found[shape.module, "A"] = A
                found[shape.module, "B"] = B
    return found


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_targets(base):
    every = parameters_by_module(new_adapter(base))
    some = parameters_by_module(new_adapter(base, targets="v_proj,down_proj"))
    other_seed = parameters_by_module(new_adapter(base, seed=1))
    assert {module.rpartition(".")[2] for module, _ in some} == {"v_proj", "down_proj"}
    for key, parameter in some.items():
        assert torch.equal(parameter, every[key])
    for key, parameter in other_seed.items():
        assert torch.equal(parameter, every[key]) == (key[1] == "B")


@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj", "gate_proj", " up_proj , o_proj "])
def test_as_many_parameters_are_trained_as_are_counted_before(targets, base):
    model = new_adapter(base, targets=targets)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert checkpoint.count_trained_parameters(base, Lora(4, 8.0, targets)) == count
    again = new_adapter(folder_of("llama_patterns"))
    count = sum(parameter.numel() for parameter in again.parameters())
    counted = checkpoint.count_trained_parameters(folder_of("llama_patterns"), Lora(1, 1.0, "all"))
    assert counted == count


def test_without_a_rank_all_weights_are_trained(base):
    lora = Lora(0, 8.0, "all")
    model = checkpoint.load_trained(base, "lm", ON_CPU, {}, lora)
    assert type(model) is LLaMA
    count = sum(parameter.numel() for parameter in model.parameters())
    assert checkpoint.count_trained_parameters(base, lora) == count


# ---- folders ----


@pytest.mark.parametrize("name", SHARED)
def test_an_adapter_is_written_as_it_was_read(name, tmp_path):
    model = load_on_base(folder_of(name))
    checkpoint.save(model, tmp_path / "again")
    before = open_pairs(folder_of(name))
    after = open_pairs(tmp_path / "again")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    config = read_json(tmp_path / "again", "adapter_config.json")
    expected = read_json(folder_of(name), "adapter_config.json")
    for values in (config, expected):
        del values["base_model_name_or_path"]
        values["modules_to_save"] = set(values["modules_to_save"] or [])
    assert config == expected
    batch = make_batch()
    expected = outputs_of(model, batch)
    for key, tensor in outputs_of(load_on_base(tmp_path / "again"), batch).items():
        assert torch.equal(tensor, expected[key])


def write_folder_of_family(path, kind):
    """A random model in a family's layout, which differs from LLaMA's in where the rows lie."""
    config = small_config(head_dim=8)
    model = init_from_scratch(config, seed=5)
    values = config.to_dict()
    values["model_type"] = kind
    os.makedirs(path)
    write_json(values, path, "config.json")
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors.update(name_as_family(kind, name, parameter.detach(), config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, os.path.join(path, "model.safetensors"), {"format": "pt"})
    return str(path)


def name_as_family(kind, name, weight, config):
    """{a family's name: tensor} of one parameter of a LLaMA."""
    H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    full_name = name if name.startswith("lm_head") else "model." + name
    if "gate_up_proj" in name and kind != "phi3":
        gate, up = weight.chunk(2)
        words = ("feed_forward.w1", "feed_forward.w3")
        if kind != "internlm2":
            words = ("mlp.gate_proj", "mlp.up_proj")
        return {
            full_name.replace("mlp.gate_up_proj", words[0]): gate,
            full_name.replace("mlp.gate_up_proj", words[1]): up,
        }
    if kind == "baichuan":
        return {full_name.replace("qkv_proj", "W_pack"): weight}
    if kind == "phi3":
        return {full_name: weight}
    if kind == "internlm2":
        if "qkv_proj" in name:  # the queries of a kv head, its key and its value, then the next
            q, k, v = weight.split([H * E, K * E, K * E])
            groups = []
            for group in zip(q.chunk(K), k.chunk(K), v.chunk(K)):
                groups.extend(group)
            return {full_name.replace("self_attn.qkv_proj", "attention.wqkv"): torch.cat(groups)}
        for ours, theirs in INTERNLM2.items():
            full_name = full_name.replace(ours, theirs)
        return {full_name: weight}
    if "qkv_proj" in name:
        tensors = {}
        parts = weight.split([H * E, K * E, K * E])
        for part, rows in zip(("q_proj", "k_proj", "v_proj"), parts):
            tensors[full_name.replace("qkv_proj", part)] = rows
        return tensors
    return {full_name: weight}


INTERNLM2 = {
    "self_attn.o_proj": "attention.wo",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
    "embed_tokens": "tok_embeddings",
}
MODULES = {  # of each block, as the family calls them
    "llama": ALL_MATRICES,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "baichuan": ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "internlm2": ["wqkv", "wo", "w1", "w3", "w2"],
}


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("kind", MODULES)
def test_adapters_are_of_a_family_s_own_matrices(kind, head, tmp_path):
    path = write_folder_of_family(tmp_path / "base", kind)
    model = fill_adapter(new_adapter(path, head))
    folder = tmp_path / "adapter"
    checkpoint.save(model, folder)
    assert read_json(folder, "adapter_config.json")["target_modules"] == MODULES[kind]
    tensors = open_pairs(folder)
    of_pairs = [key for key in tensors if ".lora_" in key]
    assert len(of_pairs) == 2 * 2 * len(MODULES[kind])
    assert ("base_model.model.score.weight" in tensors) == (head == "score")

    again = load_on_base(folder)
    for (name, parameter), other in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(parameter, other), name
    merged = checkpoint.load(folder).requires_grad_(True)
    batch = make_batch()
    expected = outputs_of(merged, batch)
    for key, tensor in outputs_of(again, batch).items():
        assert_close(tensor, expected[key])
    again.requires_grad_(True)
    for each in (again, merged):
        loss_of(each, batch).backward()
    assert check_gradients(again, merged) == 2 * len(MODULES[kind])


@pytest.mark.parametrize("kind", MODULES)
def test_some_of_a_family_s_matrices_can_be_chosen(kind, tmp_path):
    path = write_folder_of_family(tmp_path / "base", kind)
    targets = MODULES[kind][0]
    model = fill_adapter(new_adapter(path, targets=targets))
    checkpoint.save(model, tmp_path / "adapter")
    assert {key.split(".")[-3] for key in open_pairs(tmp_path / "adapter")} == {targets}
    batch = make_batch()
    merged = checkpoint.load(tmp_path / "adapter")
    assert_close(model.logits(batch), merged.logits(batch))


# ---- what is refused ----


def refuses(function, *arguments, match, **options):
    """The call stops with one line that has the words."""
    with pytest.raises(SystemExit, match=match) as stopped:
        function(*arguments, **options)
    assert str(stopped.value).startswith("error: ")
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("targets", ["wqkv", "q_proj,", "", "all-linear", "lm_head", "Q_PROJ"])
def test_targets_that_are_no_matrices_of_a_block_are_refused(targets, base):
    words = "lora_targets=.* is none of .*q_proj, k_proj, v_proj, o_proj, gate_proj"
    refuses(new_adapter, base, targets=targets, match=words)
    lora = Lora(4, 8.0, targets)
    refuses(checkpoint.count_trained_parameters, base, lora, match=words)


@pytest.mark.parametrize("name", MERGED)
def test_an_adapter_that_is_merged_cannot_go_on_as_one(name):
    refuses(
        new_adapter, folder_of(name), match="merge it first, with python -m nanosafe.checkpoint"
    )


@pytest.mark.parametrize("head", ["lm", "both"])
def test_a_score_model_cannot_become_a_policy(head, tmp_path):
    checkpoint.save(init_from_scratch(small_config(), "score"), tmp_path / "score")
    path = str(tmp_path / "score")
    refuses(new_adapter, path, head, match="is a score model: it cannot generate text")
    checkpoint.save(fill_adapter(new_adapter(path, "score")), tmp_path / "adapter")
    refuses(load_on_base, str(tmp_path / "adapter"), head, match="is a score model")


def test_a_base_that_is_not_there_is_named(base, tmp_path):
    checkpoint.save(new_adapter(base), tmp_path / "adapter")
    os.rename(base, tmp_path / "gone")
    words = "is an adapter of the model .* which is not there"
    refuses(load_on_base, str(tmp_path / "adapter"), match=words)
    refuses(new_adapter, str(tmp_path / "adapter"), match=words)


def test_an_adapter_of_a_base_of_another_shape_is_refused(base, tmp_path):
    checkpoint.save(new_adapter(base), tmp_path / "adapter")
    other = init_from_scratch(small_config(intermediate_size=56))
    checkpoint.save(other, base)
    refuses(load_on_base, str(tmp_path / "adapter"), match="the adapter is of another base")


def test_an_adapter_of_an_adapter_is_refused(base, tmp_path):
    first = tmp_path / "first"
    checkpoint.save(new_adapter(base), first)
    checkpoint.save(new_adapter(base), tmp_path / "second")
    config = read_json(tmp_path / "second", "adapter_config.json")
    config["base_model_name_or_path"] = str(first)
    write_json(config, tmp_path / "second", "adapter_config.json")
    refuses(load_on_base, str(tmp_path / "second"), match="merge that one first")


def test_meta_s_layout_is_refused_before_anything_is_trained(tmp_path):
    """PEFT has no names for its matrices."""
    state = {}
    for name, parameter in init_from_scratch(small_config()).named_parameters():
        state.update(name_as_family("internlm2", name, parameter.detach(), small_config()))
    meta_state = {}
    for name, tensor in state.items():
        if "wqkv" in name:
            for letter, rows in zip("qkv", tensor.split([32, 16, 16])):
                meta_state[name.replace("wqkv", "w" + letter)] = rows.clone()
        else:
            meta_state[name.removeprefix("model.")] = tensor.clone()
    meta_state = {name.removeprefix("model."): tensor for name, tensor in meta_state.items()}
    torch.save(meta_state, tmp_path / "consolidated.00.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6}
    write_json({**params, "vocab_size": -1, "multiple_of": 16}, tmp_path, "params.json")
    refuses(new_adapter, str(tmp_path), match="is in Meta's layout.* convert it first")


# ---- several ranks ----

CASES = {  # name -> ranks, layout, max_tokens, whether blocks are recomputed
    "plain, small micro-batches": (0, "plain", 200, 1),
    "ddp": (2, "ddp", 4096, 0),
    "ddp, small micro-batches": (2, "ddp", 200, 1),
    "fsdp": (2, "fsdp", 4096, 0),
    "fsdp, small micro-batches": (2, "fsdp", 200, 1),
    "hsdp on two nodes": (4, "hsdp", 200, 0),
}


@pytest.fixture(scope="module")
def of_one_process(world, tmp_path_factory):
    """The path of what one process computes."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run("tests/lora_gradients.py", world, "plain", 4096, 0, out)
    return out


@pytest.mark.parametrize("case", CASES)
def test_adapters_on_several_ranks_compute_what_one_process_does(
    case, world, of_one_process, tmp_path
):
    """The script itself checks that adapters are equal on all ranks, and the base as it was."""
    ranks, layout, max_tokens, recomputes = CASES[case]
    script = ["tests/lora_gradients.py"]
    if layout == "hsdp":
        (tmp_path / "two_nodes.py").write_text(TWO_NODES)
        script.insert(0, tmp_path / "two_nodes.py")
    out = tmp_path / "out"
    run(*script, world, layout, max_tokens, recomputes, out, ranks=ranks)
    tensors, expected = load_file(out), load_file(of_one_process)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        # Adam divides a gradient by its own size: where that is rounding noise, so is the step.
        tolerance = 2e-4 if name.startswith(("after", "new", "scores")) else 1e-5
        assert_close(tensor.float(), expected[name].float(), tolerance)
    of_two, of_one = open_pairs(f"{out}.model"), open_pairs(f"{of_one_process}.model")
    assert of_two.keys() == of_one.keys()
    for name, tensor in of_two.items():
        assert torch.allclose(tensor, of_one[name], atol=1e-5)


def test_a_state_holds_adapters_and_their_moments_only(of_one_process, world):
    folder = f"{of_one_process}.run/state/step_000002"
    state = load_file(os.path.join(folder, "rank_00000.safetensors"))
    numbers = sum(tensor.numel() for tensor in state.values())
    model = new_adapter(str(world / "policy"))
    expected = set()
    for name, _ in model.named_parameters():
        for part in ("weight", "exp_avg", "exp_avg_sq"):
            expected.update((f"policy/{name}/{part}", f"cost/{name}/{part}"))
    for part in ("weight", "exp_avg", "exp_avg_sq"):
        expected.add(f"cost/score_head.weight/{part}")
    assert state.keys() == expected
    assert "policy/blocks.1.qkv_proj.A.2/exp_avg" in expected
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert numbers == 3 * (2 * trained + 32)
