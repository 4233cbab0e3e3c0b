"""The model against transformers, packing, temperature, the chunked head, activation checkpointing."""

import pytest
import torch
from conftest import small_config

from nanosafe import checkpoint, logprobs, model
from nanosafe.data.template import encode_conversation  # noqa: F401  (the import graph is part of the room)
from nanosafe.model import Config, LLaMA
from nanosafe.checkpoint import init_from_scratch

transformers = pytest.importorskip("transformers")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "MHA": {"num_key_value_heads": 4},
    "GQA": {"num_key_value_heads": 2},
    "MQA": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 24},
    "theta": {"rope_theta": 500000.0},
}


def packed(lengths, vocab=97, seed=0):
    g = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(0, vocab, (n,), generator=g) for n in lengths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return sequences, torch.cat(sequences), cu_seqlens, max(lengths)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        **SHAPES[shape],
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load(tmp_path)
    sequences, *batch = packed([7, 90, 1, 33])
    expected = torch.cat([theirs(s[None]).logits[0] for s in sequences])
    assert torch.allclose(ours(*batch), expected, atol=1e-4)
    targets = torch.randint(0, 97, (131,))
    targets[::3] = -100
    logps = expected.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    assert torch.allclose(ours(*batch, targets), logps * (targets >= 0), atol=1e-4)


def test_config_reads_both_spellings_of_transformers():
    four = {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": None,
        "unknown": 1,
    }
    five = {
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
        "hidden_size": 64,
        "num_attention_heads": 4,
    }
    a, b = Config.from_dict(four), Config.from_dict(five)
    assert a.rope_theta == b.rope_theta == 5e5 and a.rope_type == b.rope_type == "linear"
    assert torch.equal(model.rope_frequencies(a), model.rope_frequencies(b))
    assert Config.from_dict(a.to_dict()) == Config.from_dict(
        Config.from_dict(a.to_dict()).to_dict()
    )


def test_a_sequence_does_not_see_its_neighbours():
    net = init_from_scratch(small_config())
    sequences, *batch = packed([5, 20, 3])
    together = net(*batch).split([5, 20, 3])
    for sequence, logits in zip(sequences, together):
        alone = net(sequence, torch.tensor([0, len(sequence)], dtype=torch.int32), len(sequence))
        assert torch.allclose(alone, logits, atol=1e-5)


@pytest.mark.parametrize("even", [False, True])
def test_log_probs_and_their_gradient_equal_the_plain_head(even, monkeypatch):
    """Also in several blocks, with a temperature, and where nothing is read; weighed alike or each in its way."""
    monkeypatch.setattr(
        logprobs, "split_into_spans", lambda n, *_: [slice(i, i + 3) for i in range(0, n, 3)]
    )
    net = init_from_scratch(small_config(), seed=1)
    _, *batch = packed([5, 6])
    targets = torch.randint(0, 97, (11,))
    targets[::4] = -100
    weight = torch.full((11,), -0.3) if even else torch.randn(11)

    def gradient(logps):
        net.zero_grad()
        (logps * weight * (targets >= 0)).sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters()}

    ours = gradient(net(*batch, targets, temperature=0.7, uniform_weights=even))
    plain = (net(*batch) / 0.7).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    for name, g in gradient(plain).items():
        assert torch.allclose(ours[name], g, atol=1e-5), name
    nothing = net(*batch, torch.full((11,), -100), uniform_weights=even)
    assert (nothing == 0).all()
    net.zero_grad()
    nothing.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_even_log_probs_refuse_an_uneven_loss():
    net = init_from_scratch(small_config(), seed=1)
    _, *batch = packed([5, 6])
    logps = net(*batch, torch.randint(0, 97, (11,)), uniform_weights=True)
    with pytest.raises(RuntimeError):
        (logps * torch.arange(11)).sum().backward()


def test_prompts_need_no_product_with_the_vocabulary(monkeypatch):
    rows = []
    real = logprobs.LogProbs.apply
    monkeypatch.setattr(
        logprobs.LogProbs, "apply", lambda x, *a: rows.append(len(x)) or real(x, *a)
    )
    targets = torch.full((30,), -100)
    targets[25:29] = 3
    init_from_scratch(small_config())(*packed([30])[1:], targets)
    assert rows == [4]


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for on in (False, True):
        net = init_from_scratch(small_config(), seed=2)
        net.activation_checkpointing = on
        _, *batch = packed([9, 4])
        net(*batch, torch.arange(13)).sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_scores_are_float32_and_normalized_when_the_config_says():
    net = init_from_scratch(small_config(mean=[0.5], var=[4.0]), "score").bfloat16()
    _, *batch = packed([6, 3])
    raw = net(*batch)
    assert raw.shape == (9,) and raw.dtype == torch.float32
    net.config.do_normalize = True
    assert torch.allclose(net(*batch), (raw - 0.5) / 2)
    net.config.score_type = "cost"
    assert torch.allclose(net(*batch), raw / 2)  # zero stays zero
    net.config.score_type = "critic"
    assert torch.equal(net(*batch), raw)


def test_an_unknown_rope_is_refused():
    with pytest.raises(ValueError, match="yarn"):
        LLaMA(small_config(rope_scaling={"rope_type": "yarn"}))
