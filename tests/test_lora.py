"""Adapters on a frozen base (lora.py) compute, learn, save and resume as whole models do.

tests/data/lora holds adapters that PEFT wrote, and what PEFT computed with them; checkpoint.load()
merges such an adapter, so the model with merged matrices is the other oracle here."""

import hashlib
import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, rows_of, run, same_state, small_config
from in_process import run_in_process
from safetensors.torch import load_file, save_file
from test_parallel import TWO_NODES
from test_train import assert_rows_are_close

from nanosafe import attention, checkpoint, parallel, tokenizer
from nanosafe import model as model_room
from nanosafe.checkpoint import convert, init_from_scratch
from nanosafe.checkpoint.adapter_folder import parameter_of
from nanosafe.data.batching import collate
from nanosafe.lora import AdaptedLLaMA, Lora, MatrixAdapter, PairShape, make_lora
from nanosafe.model import LLaMA, RMSNorm
from nanosafe.storage import read_json, read_jsonl, write_json
from nanosafe.tools.toy_world import trainer_flags

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


def new_adapter(
    path, head="lm", targets="all", rank=4, bases=None, seed=0, placements=ON_CPU, **options
):
    lora = Lora(rank, 8.0, targets)
    bases = {} if bases is None else bases
    return checkpoint.load_trained(path, head, placements, bases, lora, seed=seed, **options)


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
    counts = checkpoint.count_trained_and_frozen(base, Lora(4, 8.0, targets))
    assert counts.trained == count_numbers(model)
    assert counts.frozen == count_numbers(model.base)


def count_numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_of_an_adapter_that_goes_on_its_own_parameters_are_counted():
    path = folder_of("llama_patterns")
    model = new_adapter(path)
    counts = checkpoint.count_trained_and_frozen(path, Lora(1, 1.0, "all"))
    assert counts == (count_numbers(model), count_numbers(model.base))


def test_without_a_rank_all_weights_are_trained(base):
    lora = Lora(0, 8.0, "all")
    model = checkpoint.load_trained(base, "lm", ON_CPU, {}, lora)
    assert type(model) is LLaMA
    assert checkpoint.count_trained_and_frozen(base, lora) == (count_numbers(model), 0)


def test_a_base_gets_the_rows_that_a_tokenizer_needs(base, tmp_path):
    """Which the adapter's folder does not have: whoever opens it names the number again."""
    model = fill_adapter(new_adapter(base, vocab_size=100))
    assert model.config.vocab_size == 100
    embedding = model.embed_tokens.weight
    assert embedding.shape == (100, 32)
    assert_close(embedding[97:], embedding[:97].mean(dim=0).expand(3, 32))
    checkpoint.save(model, tmp_path / "adapter")
    batch = make_batch(vocabulary=100)
    assert batch.tokens.max() >= 97
    for bases in (None, {}):
        again = checkpoint.load(tmp_path / "adapter", vocab_size=100, bases=bases)
        assert_close(again.logits(batch), model.logits(batch))


def test_a_base_that_is_there_with_too_few_rows_is_read_again(base, tmp_path):
    """Two models on it may have tokenizers of different sizes."""
    checkpoint.save(fill_adapter(new_adapter(base)), tmp_path / "adapter")
    bases = {}
    small = checkpoint.load(tmp_path / "adapter", vocab_size=97, bases=bases)
    large = checkpoint.load(tmp_path / "adapter", vocab_size=100, bases=bases)
    assert len(small.embed_tokens.weight) == 97
    assert len(large.embed_tokens.weight) == 100
    again = checkpoint.load(tmp_path / "adapter", vocab_size=97, bases=bases)
    assert again.base is large.base


def test_adapters_say_that_they_do_not_train_rows_for_new_tokens(base, capsys):
    new_adapter(base, vocab_size=100)
    assert "has no rows for 3 of the tokenizer's tokens" in capsys.readouterr().out
    new_adapter(base, vocab_size=97)
    assert "has no rows" not in capsys.readouterr().out


def test_an_adapter_notices_that_its_base_has_other_weights_now(base, tmp_path, capsys):
    checkpoint.save(fill_adapter(new_adapter(base)), tmp_path / "adapter")
    for bases in (None, {}):
        checkpoint.load(tmp_path / "adapter", bases=bases)
    assert "was trained on other weights" not in capsys.readouterr().out
    shutil.rmtree(base)
    checkpoint.save(init_from_scratch(small_config(), seed=4), base)
    checkpoint.load(tmp_path / "adapter")
    assert f"{base} has now" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [("q_proj", False), ("all", True)])
def test_knobs_of_adapters_without_a_rank_are_refused(changes):
    with pytest.raises(SystemExit, match="set lora_rank"):
        make_lora(0, 8.0, *changes)


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
    values["sliding_window"] = None  # as transformers says that there is none
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


# ---- PEFT, where it is installed ----


def score_of_last_token(classifier, tokens):
    return classifier(torch.tensor([tokens])).logits[0, 0]


@torch.no_grad()
def check_in_peft(folder):
    """PEFT opens a folder of ours, and computes what we do."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    tokens = list(range(3, 40))
    batch = collate([np.array(tokens)], [np.ones(len(tokens))], torch.device("cpu"))
    ours = load_on_base(folder)
    if ours.head == "lm":
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
        assert_close(ours.logits(batch), theirs(torch.tensor([tokens])).logits[0])
        return
    base = read_json(folder, "adapter_config.json")["base_model_name_or_path"]
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=0
    )
    theirs = peft.PeftModel.from_pretrained(classifier, folder)
    score = score_of_last_token(theirs, tokens)
    assert_close(ours.scores(batch)[-1], score)
    assert abs(score) > 1e-4


@pytest.mark.parametrize("name", SHARED)
def test_peft_opens_what_was_read_and_written_here(name, tmp_path):
    model = load_on_base(folder_of(name))
    model.peft_config["base_model_name_or_path"] = folder_of(INDEX[name]["base"])
    checkpoint.save(model, tmp_path / "adapter")
    check_in_peft(str(tmp_path / "adapter"))


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj"])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_peft_opens_a_new_adapter_of_ours(kind, targets, head, tmp_path):
    path = write_folder_of_family(tmp_path / "base", kind)
    if kind == "phi3" and targets != "all":
        targets = "qkv_proj"
    checkpoint.save(fill_adapter(new_adapter(path, head, targets)), tmp_path / "adapter")
    check_in_peft(str(tmp_path / "adapter"))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_what_peft_begins_goes_on_here_and_goes_back(task, use_rslora, base, tmp_path):
    """An adapter of PEFT's is trained here for a step, and opens in PEFT again."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if task == "CAUSAL_LM":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    else:
        kind = transformers.AutoModelForSequenceClassification
        theirs = kind.from_pretrained(base, num_labels=1, pad_token_id=0)
    config = peft.LoraConfig(
        task_type=task,
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"v_proj": 2},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(theirs, config)
    theirs.save_pretrained(tmp_path / "theirs")
    head = "lm" if task == "CAUSAL_LM" else "score"
    model = new_adapter(str(tmp_path / "theirs"), head, rank=32)
    before = open_pairs(tmp_path / "theirs")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loss_of(model, make_batch()).backward()
    optimizer.step()
    checkpoint.save(model, tmp_path / "ours")
    after = open_pairs(tmp_path / "ours")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].shape == tensor.shape
        assert not torch.equal(after[key], tensor)
    check_in_peft(str(tmp_path / "ours"))


# ---- what is refused ----


def refuses(function, *arguments, match, **options):
    """The call stops with one line that has the words."""
    with pytest.raises(SystemExit, match=match) as stopped:
        function(*arguments, **options)
    assert str(stopped.value).startswith("error: ")
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("targets", ["wqkv", "q_proj,", "", "all-linear", "lm_head", "Q_PROJ"])
def test_targets_that_are_no_matrices_of_a_block_are_refused(targets, base):
    words = "lora_targets=.* has q_proj, k_proj, v_proj, o_proj, gate_proj.*and no"
    refuses(new_adapter, base, targets=targets, match=words)
    lora = Lora(4, 8.0, targets)
    refuses(checkpoint.count_trained_and_frozen, base, lora, match=words)


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
    internlm2_state = {}
    for name, parameter in init_from_scratch(small_config()).named_parameters():
        parts = name_as_family("internlm2", name, parameter.detach(), small_config())
        internlm2_state.update(parts)
    meta_state = {}
    for full_name, tensor in internlm2_state.items():
        name = full_name.removeprefix("model.")
        if "wqkv" in name:  # in any order: its shapes are enough to be opened
            for letter, rows in zip("qkv", tensor.split([32, 16, 16])):
                meta_state[name.replace("wqkv", "w" + letter)] = rows.clone()
        else:
            meta_state[name] = tensor.clone()
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


def read_state(folder):
    """{key: tensor} of all files of a run's state."""
    state = {}
    for path in sorted(Path(folder).rglob("*.safetensors")):
        state.update(load_file(path))
    return state


def test_a_state_holds_adapters_and_their_moments_only(of_one_process, world):
    state = read_state(f"{of_one_process}.run/state/step_000002")
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
    assert numbers == 3 * (2 * count_numbers(model) + 32)


# ---- compiled blocks ----


@pytest.fixture
def count_versions(monkeypatch):
    """A list that grows by one with each version of a block that torch.compile makes."""
    versions = []

    def compile_nothing(graph, inputs):
        versions.append(graph)
        return graph.forward

    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: original(self, backend=compile_nothing)
    )
    monkeypatch.setattr(model_room, "ONEDNN_ROWS", -1)  # a GPU has no second path for a few rows
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield versions
    torch._dynamo.reset()


def take_turns(models, extra_tokens):
    """Each model is asked about two batches; then those that are trained learn from them."""
    for lengths in ([17, 6, 11], [30, 8, 4, 19]):
        batch = make_batch([length + extra_tokens for length in lengths])
        for each in models.values():
            with torch.no_grad():
                outputs_of(each, batch)
        for each in models.values():
            if any(parameter.requires_grad for parameter in each.parameters()):
                loss_of(each, batch).backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    "frozen, versions",
    [
        # Without gradients with an adapter and without one; with gradients the first block, whose
        # input needs none, and the others. All of it twice: for the first length, and for any.
        ({}, 8),
        # A rank that is another dimension, which may be any from then on.
        ({"reward_model": (8, "all"), "cost_model": (16, "all")}, 9),
        # Each other choice of matrices.
        ({"reward_model": (4, "all"), "cost_model": (4, "q_proj,v_proj")}, 10),
    ],
)
def test_blocks_are_not_compiled_again_when_adapters_take_turns(
    frozen, versions, base, count_versions
):
    bases = {}
    placement = CPU._replace(use_compile=True)
    options = {"bases": bases, "placements": parallel.Placements(placement, placement)}
    models = {"actor": fill_adapter(new_adapter(base, **options))}
    for name in ("reward_critic", "cost_critic"):
        models[name] = fill_adapter(new_adapter(base, "score", **options))
    for name, (rank, targets) in frozen.items():
        scorer = new_adapter(base, "score", targets, rank, **options)
        models[name] = fill_adapter(scorer).requires_grad_(False)
    models["reference"] = checkpoint.load(base, placement=placement, bases=bases)
    assert len(bases) == 1
    take_turns(models, 0)
    assert len(count_versions) == versions
    for extra_tokens in (1, 2, 5):
        take_turns(models, extra_tokens)
    assert len(count_versions) == versions
    batch = make_batch()
    compiled = models["actor"].log_probs(batch)
    for layer in models["reference"].layers:
        layer._compiled_call_impl = None  # from here on blocks run as they are written
    assert_close(compiled, models["actor"].log_probs(batch))


# ---- the trainers ----

ADAPTERS = ["--lora_rank=4", "--lora_alpha=16"]


def adapter_flags(world, name, *changes):
    """A trainer's command for adapters on the world's policy; later flags win over earlier ones."""
    flags = [*trainer_flags(world)[name], *ADAPTERS, "--keep=9"]
    if name == "sft":
        flags.append(f"--init_from={world}/policy")
    return [*flags, *changes]


class Trained(NamedTuple):
    """Adapters of the world's policy, by short runs of all trainers."""

    sft: str
    reward: str
    cost: str
    ppo_lag: str
    digests: dict  # of the policy's files, before


def digest_files(folder):
    digests = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as f:
            digests[name] = hashlib.sha256(f.read()).hexdigest()
    return digests


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    digests = digest_files(world / "policy")
    runs = {name: str(root / name) for name in ("sft", "reward", "cost", "ppo_lag")}
    run(*adapter_flags(world, "sft", f"--out_dir={runs['sft']}", "--lora_merge=True"))
    run(*adapter_flags(world, "reward", f"--out_dir={runs['reward']}"))
    run(*adapter_flags(world, "cost", f"--out_dir={runs['cost']}", "--lm_coef=0.1"))
    models = [
        f"--actor_model={runs['sft']}/model",
        f"--reward_model={runs['reward']}/model",
        f"--cost_model={runs['cost']}/model",
    ]
    ppo_lag = adapter_flags(world, "ppo_lag", *models, "--lora_merge=True", "--ema=0.5")
    run(*ppo_lag, f"--out_dir={runs['ppo_lag']}")
    return Trained(**runs, digests=digests)


def rows_of_run(out_dir):
    return rows_of(os.path.join(out_dir, "metrics.jsonl"))


def test_training_leaves_the_base_s_files_as_they_are(trained, world):
    assert digest_files(world / "policy") == trained.digests
    for out_dir in trained[:4]:
        config = read_json(os.path.join(out_dir, "model"), "adapter_config.json")
        assert config["base_model_name_or_path"] == f"{world}/policy"
        assert (config["r"], config["lora_alpha"]) == (4, 16)


def test_all_of_a_run_s_models_share_one_base(trained, world):
    """The reference is the SFT adapter, so the first KL is 0, and not that of SFT from the base."""
    rows = rows_of_run(trained.ppo_lag)
    assert len(rows) == 8
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] != 0
    for row in rows:
        assert row["skips"] == 0
        for name in ("actor", "reward_critic", "cost_critic"):
            assert row[f"{name}_grad_norm"] > 0
    state = read_state(os.path.join(trained.ppo_lag, "state", "step_000008"))
    trained_numbers = count_numbers(new_adapter(str(world / "policy")))
    numbers = sum(tensor.numel() for tensor in state.values())
    critic = 3 * (trained_numbers + 32)
    assert numbers == 3 * trained_numbers + 2 * critic + trained_numbers  # the last is the average
    bases = {}
    for out_dir in trained[:4]:
        load_on_base(os.path.join(out_dir, "model"), bases=bases)
    assert len(bases) == 1


@pytest.mark.parametrize("name", ["sft", "reward", "cost", "ppo_lag"])
def test_a_resumed_run_of_adapters_is_bit_equal(name, trained, world, tmp_path):
    whole = getattr(trained, name)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    (resumed / "state" / "latest").write_text("step_000004\n")  # as if it had died after step 4
    with open(os.path.join(whole, "config.py")) as f:
        assert "lora_rank = 4" in f.read()
    script = trainer_flags(world)[name][0]
    run(script, f"{whole}/config.py", f"--out_dir={resumed}", "--resume=True")
    assert same_state(whole, resumed)
    model = open_pairs(os.path.join(whole, "model"))
    for key, tensor in open_pairs(resumed / "model").items():
        assert torch.equal(tensor, model[key])


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--lora_rank=8", "lora_rank 4 -> 8"),
        ("--lora_rank=0", "lora_rank 4 -> 0"),
        ("--lora_targets=q_proj", "lora_targets 'all' -> 'q_proj'"),
        ("--lora_alpha=8", "lora_alpha 16.0 -> 8.0"),
        ("--init_from={folder}/other", "init_from "),
    ],
)
def test_a_run_is_resumed_with_the_adapter_that_it_had(
    flag, words, trained, world, tmp_path, monkeypatch, capsys
):
    model = init_from_scratch(checkpoint.load(world / "policy").config, seed=77)
    checkpoint.save(model, tmp_path / "other", tokenizer.load(world / "tokenizer"))
    shutil.copytree(trained.sft, tmp_path / "sft")
    flags = adapter_flags(world, "sft", f"--out_dir={tmp_path}/sft", "--resume=True")
    flags.append(flag.format(folder=tmp_path))
    outcome = run_in_process(*flags, monkeypatch=monkeypatch, capsys=capsys, check=False)
    assert re.search(words, outcome.error)


def test_a_base_that_has_changed_since_the_state_is_refused(
    trained, world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(world / "policy", tmp_path / "base")
    base_flag = f"--init_from={tmp_path}/base"
    flags = adapter_flags(world, "sft", base_flag, f"--out_dir={tmp_path}/sft", "--max_steps=2")
    run(*flags)
    model = init_from_scratch(checkpoint.load(tmp_path / "base").config, seed=77)
    checkpoint.save(model, tmp_path / "base", tokenizer.load(world / "tokenizer"))
    options = {"monkeypatch": monkeypatch, "capsys": capsys, "check": False}
    outcome = run_in_process(*flags, "--resume=True", **options)
    assert "the same name with other contents" in outcome.error


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("sft", ["--init_from=scratch"], "lora_rank=4 adds to a model that is there"),
        ("sft", ["--init_from={world}/reward"], "is a score model: it cannot generate text"),
        ("reward", ["--lora_targets=wq"], "and no 'wq'"),
        ("reward", ["--lora_rank=-1"], "lora_rank=-1 must be at least 0"),
        ("reward", ["--lora_alpha=0"], "lora_alpha=0.0 must be above 0"),
        ("reward", ["--init_from={lora}/llama_modules_to_save"], "merge it first"),
        ("ppo_lag", ["--lora_targets=W_pack"], "and no 'W_pack'"),
    ],
)
def test_what_cannot_be_trained_as_an_adapter_is_refused(
    name, flags, words, world, tmp_path, monkeypatch, capsys
):
    changes = [flag.format(world=world, lora=tmp_path / "lora") for flag in flags]
    shutil.copytree(LORA, tmp_path / "lora")
    for folder in os.listdir(tmp_path / "lora"):  # the golden models have no tokenizer
        if os.path.isdir(tmp_path / "lora" / folder):
            tokenizer.load(world / "tokenizer").save(tmp_path / "lora" / folder)
    command = adapter_flags(world, name, f"--out_dir={tmp_path}/out", *changes)
    outcome = run_in_process(*command, monkeypatch=monkeypatch, capsys=capsys, check=False)
    assert words in outcome.error
    assert not os.path.exists(tmp_path / "out" / "model")


def test_a_signal_is_learned_by_adapters_alone(world, tmp_path):
    """Which of two answers is safer, and whether each is safe; nobody has trained the base."""
    flags = ["--max_steps=60", "--learning_rate=3e-3", "--save_interval=0", "--lora_rank=8"]
    run(*adapter_flags(world, "cost", f"--out_dir={tmp_path}", *flags))
    rows = rows_of_run(tmp_path)
    losses = [row["loss"] for row in rows]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert sum(row["sign_accuracy"] for row in rows[-10:]) > 7.5


# ---- a run's model, for others ----


def test_a_merged_export_is_the_adapter_merged(trained, tmp_path):
    for out_dir in (trained.sft, trained.ppo_lag):
        adapter = checkpoint.load(os.path.join(out_dir, "model"))
        merged = checkpoint.load(os.path.join(out_dir, "model_merged"))
        convert.main([os.path.join(out_dir, "model"), str(tmp_path / "converted")])
        converted = checkpoint.load(tmp_path / "converted")
        shutil.rmtree(tmp_path / "converted")
        for name, parameter in adapter.named_parameters():
            assert torch.equal(merged.get_parameter(name), parameter), name
            assert torch.equal(converted.get_parameter(name), parameter), name
        on_base = load_on_base(os.path.join(out_dir, "model"))
        batch = make_batch(vocabulary=500)
        assert_close(on_base.logits(batch), merged.logits(batch))
        assert not torch.equal(merged.logits(batch), on_base.base.logits(batch))


def test_a_score_adapter_says_what_it_is_and_keeps_its_moments(trained):
    for name, score_type in (("reward", "reward"), ("cost", "cost")):
        folder = os.path.join(getattr(trained, name), "model")
        checkpoint.check_score_model(folder, score_type)
        for config in (checkpoint.load(folder).config, load_on_base(folder).config):
            assert config.score_type == score_type
            assert config.normalizer_type == "ExponentialMovingAverage"
            assert config.mean != [0.0]
            assert config.var != [1.0]
        refuses(load_on_base, folder, "lm", match="is a score model")


def test_an_average_of_adapters_is_an_adapter(trained):
    average = open_pairs(os.path.join(trained.ppo_lag, "model_ema"))
    actor = open_pairs(os.path.join(trained.ppo_lag, "model"))
    start = open_pairs(os.path.join(trained.sft, "model"))
    assert average.keys() == actor.keys() == start.keys()
    for key, tensor in average.items():
        assert not torch.equal(tensor, actor[key])
        assert (tensor - start[key]).norm() < (actor[key] - start[key]).norm()


def test_scripts_read_an_adapter_where_a_model_is_named(trained, world, tmp_path):
    policy = os.path.join(trained.sft, "model")
    flags = ["--prompt=How are you?", "--max_new_tokens=8", "--temperature=0"]
    answers = []
    for path in (policy, os.path.join(trained.sft, "model_merged")):
        printed = run("sample.py", f"--model={path}", *flags).stdout
        answers.append(printed.partition("> How are you?")[2])
    assert answers[0] == answers[1]
    assert "[cut at 8 tokens]" in answers[0]

    run(
        *("-m", "nanosafe.eval.arena", f"--red={world}/policy", f"--blue={policy}"),
        f"--reward_model={trained.reward}/model",
        f"--cost_model={trained.cost}/model",
        f"--data={world}/data/prompts/test.jsonl:4/-1",
        f"--out_dir={tmp_path}/arena",
        "--max_new_tokens=8",
    )
    assert len(read_jsonl(tmp_path / "arena" / "pairs.jsonl")) == 4
    run(
        *("-m", "nanosafe.eval.scores", f"--model={trained.cost}/model"),
        f"--data={world}/data/cost/test.jsonl:9/-1",
        f"--out_dir={tmp_path}/scores",
    )
    assert read_json(tmp_path / "scores", "summary.json")


# ---- preferences: the reference is the adapter switched off ----


@pytest.mark.parametrize("init_from", ["policy", "sft"])
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_reference_is_the_model_before_its_first_step(
    objective, init_from, trained, world, tmp_path, monkeypatch, capsys
):
    """Beside a run whose reference is a second model, which has been merged into its own base."""
    path = f"{world}/policy"
    if init_from == "sft":
        path = f"{trained.sft}/model"
    options = {"monkeypatch": monkeypatch, "capsys": capsys}
    flags = adapter_flags(world, "reward", f"--objective={objective}", f"--init_from={path}")
    run_in_process(*flags, f"--out_dir={tmp_path}/one", **options)
    load = checkpoint.load
    loaded = []

    def load_another(path, head, bases=None, **rest):
        loaded.append(path)
        return load(path, head, **rest).requires_grad_(False)

    monkeypatch.setattr(checkpoint, "load", load_another)
    run_in_process(*flags, f"--out_dir={tmp_path}/two", **options)
    assert loaded == [path]
    rows, others = rows_of_run(tmp_path / "one"), rows_of_run(tmp_path / "two")
    assert len(rows) == len(others) == 6
    if objective == "dpo":
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert rows[0]["reward_chosen"] == rows[0]["margin"] == 0
        assert rows[-1]["margin"] != 0
    for row, other in zip(rows, others):
        for name, value in row.items():
            assert value == pytest.approx(other[name], rel=1e-3, abs=2e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective, flags",
    [
        ("ipo", []),
        ("simpo", []),
        ("orpo", []),
        ("safedpo", []),
        ("bso", []),
        ("bfpo", []),
        ("modpo", ["--safety_model={cost}/model"]),
        ("modpo", ["--safety_model={sft}/model"]),
        ("dpo", ["--rank_by=safer", "--lm_coef=0.1"]),
        ("dpo", ["--reference_free=True"]),
    ],
)
def test_every_objective_trains_adapters(objective, flags, trained, world, tmp_path):
    changes = [flag.format(cost=trained.cost, sft=trained.sft) for flag in flags]
    name = "cost" if objective in ("safedpo", "bso", "bfpo") else "reward"
    eval_data = f"--eval_data={world}/data/{name}/test.jsonl:9/-1"
    command = adapter_flags(world, "reward", f"--objective={objective}", eval_data, *changes)
    run(*command, f"--out_dir={tmp_path}", "--eval_samples=2", "--max_new_tokens=4")
    rows = rows_of_run(tmp_path)
    assert len(rows) == 6
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert "eval_kl" in rows[-1]
    assert open_pairs(tmp_path / "model")


def test_an_adapter_goes_on_with_its_own_rank_and_targets(world, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    small = ["--lora_rank=2", "--lora_targets=q_proj,v_proj", "--max_steps=2"]
    run(*adapter_flags(world, "sft", *small, f"--out_dir={first}"))
    on_first = [f"--init_from={first}/model", "--lora_rank=8", "--max_steps=2"]
    done = run(*adapter_flags(world, "reward", *on_first, f"--out_dir={second}"))
    assert "a copy of it is trained, with its own rank 2, alpha 16.0 and targets" in done.stdout
    config = read_json(second / "model", "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (2, 16)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    before, after = open_pairs(first / "model"), open_pairs(second / "model")
    assert set(after) == {*before, "base_model.model.score.weight"}
    for key, tensor in before.items():
        assert not torch.equal(tensor, after[key])
        assert (tensor - after[key]).abs().max() < 0.01  # it began where the first run ended


# ---- the trainers on several ranks ----


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["cost", "ppo_lag"])
def test_two_ranks_train_adapters_as_one_does(name, layout, trained, world, tmp_path):
    out_dir = getattr(trained, name)
    script = trainer_flags(world)[name][0]
    command = [script, f"{out_dir}/config.py", f"--out_dir={tmp_path}/two"]
    small = ["--max_tokens=512", "--activation_checkpointing=True"]
    run(*command, f"--parallel={layout}", *small, ranks=2)
    rows, others = rows_of_run(out_dir), rows_of_run(tmp_path / "two")
    assert_rows_are_close(rows, others, rel_tol=2e-3, abs_tol=2e-4)

    (tmp_path / "two" / "state" / "latest").write_text("step_000004\n")
    run(*command, "--resume=True")  # on one rank, what two ranks saved
    assert_rows_are_close(rows, rows_of_run(tmp_path / "two"), rel_tol=2e-3, abs_tol=2e-4)


def test_two_ranks_go_on_with_what_one_rank_saved(trained, tmp_path):
    shutil.copytree(trained.cost, tmp_path / "cost")
    (tmp_path / "cost" / "state" / "latest").write_text("step_000004\n")
    command = ["train_pref.py", f"{trained.cost}/config.py", f"--out_dir={tmp_path}/cost"]
    run(*command, "--resume=True", "--parallel=fsdp", ranks=2)
    rows, others = rows_of_run(trained.cost), rows_of_run(tmp_path / "cost")
    assert len(others) == 6
    assert_rows_are_close(rows, others, rel_tol=2e-3, abs_tol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_ranks_ask_the_reference_as_one_does(objective, trained, world, tmp_path):
    flags = [f"--objective={objective}", f"--init_from={trained.sft}/model", "--eval_samples=3"]
    command = adapter_flags(world, "reward", *flags, "--max_new_tokens=5")
    run(*command, f"--out_dir={tmp_path}/one")
    run(*command, f"--out_dir={tmp_path}/two", "--parallel=fsdp", "--max_tokens=512", ranks=2)
    rows, others = rows_of_run(tmp_path / "one"), rows_of_run(tmp_path / "two")
    assert "eval_kl" in rows[-1]
    assert_rows_are_close(rows, others, rel_tol=2e-3, abs_tol=2e-4)


@pytest.mark.parametrize("ranks, layout", [(0, "plain"), (2, "fsdp")])
def test_adapters_train_in_bfloat16_on_whole_models(ranks, layout, world, tmp_path):
    """Critics begin as reward and cost models that are no adapters: there are three bases."""
    changes = ["--dtype=bfloat16", f"--parallel={layout}", "--max_steps=4"]
    run(*adapter_flags(world, "ppo_lag", *changes, f"--out_dir={tmp_path}"), ranks=ranks)
    rows = rows_of_run(tmp_path)
    assert len(rows) == 4
    assert rows[0]["kl"] == 0
    for row in rows:
        assert row["skips"] == 0
        assert row["cost_critic_grad_norm"] > 0
    for tensor in open_pairs(tmp_path / "model").values():
        assert tensor.dtype == torch.float32
