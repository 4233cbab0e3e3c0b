"""The model: transformers' numbers, packing, the chunked head, gradients, score heads."""

import pytest
import torch
from conftest import small_config
from torch import tensor
from torch.library import Library

from nanosafe import checkpoint, logprobs, rope
from nanosafe.checkpoint import init_from_scratch
from nanosafe.data.batching import IGNORED, Batch
from nanosafe.model import Config, LLaMA

transformers = pytest.importorskip("transformers")

LLAMA3_ROPE = {
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
    "llama3 rope": {"rope_scaling": LLAMA3_ROPE},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 24},
    "theta": {"rope_theta": 500000.0},
}


def random_batch(lengths, vocab=97):
    """Random sequences of these lengths, packed, without targets."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab, (sum(lengths),), generator=generator)
    cu_seqlens = tensor([0, *lengths]).cumsum(0).int()
    return Batch(tokens, cu_seqlens, max(lengths), torch.full_like(tokens, IGNORED))


def random_targets(count, ignore_every):
    """Targets (count,), of which every `ignore_every`-th is ignored."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 97, (count,), generator=generator)
    targets[::ignore_every] = IGNORED
    return targets


def log_probs_of_logits(logits, targets):
    """log softmax(logits)[targets] by the definition, and 0 where the target is ignored."""
    logps = logits.log_softmax(-1)
    columns = targets.clamp(min=0)[:, None]
    return logps.gather(1, columns).squeeze(1) * (targets >= 0)


# ---- against transformers ----


@pytest.fixture(scope="module", params=SHAPES)
def twins(request, tmp_path_factory):
    """A random model of transformers, and the same one read from its folder by nanosafe."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        **SHAPES[request.param],
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, checkpoint.load(folder)


def logits_of_each_alone(theirs, batch):
    """transformers' logits (N, V) of each sequence by itself, laid end to end."""
    lengths = batch.cu_seqlens.diff().tolist()
    logits = []
    for sequence in batch.tokens.split(lengths):
        logits.append(theirs(sequence[None]).logits[0])
    return torch.cat(logits)


def test_logits_equal_transformers(twins):
    theirs, ours = twins
    batch = random_batch([7, 90, 1, 33])
    expected = logits_of_each_alone(theirs, batch)
    assert torch.allclose(ours.logits(batch), expected, atol=1e-4)


def test_log_probs_equal_transformers(twins):
    theirs, ours = twins
    batch = random_batch([7, 90, 1, 33])
    targets = random_targets(131, ignore_every=3)
    batch = batch._replace(targets=targets)
    expected = log_probs_of_logits(logits_of_each_alone(theirs, batch), targets)
    assert torch.allclose(ours.log_probs(batch), expected, atol=1e-4)


# ---- the configuration ----

TRANSFORMERS_4 = {
    "rope_theta": 5e5,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": None,
    "unknown": 1,
}
TRANSFORMERS_5 = {
    "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
    "hidden_size": 64,
    "num_attention_heads": 4,
}


def test_the_config_reads_both_spellings_of_transformers():
    old = Config.from_dict(TRANSFORMERS_4)
    new = Config.from_dict(TRANSFORMERS_5)
    for config in (old, new):
        assert config.rope_theta == 5e5
        assert config.rope_type == "linear"
    assert torch.equal(rope.make_frequencies(old).short, rope.make_frequencies(new).short)


def test_a_config_that_is_written_is_read_back():
    config = Config.from_dict(TRANSFORMERS_4)
    read = Config.from_dict(config.to_dict())
    assert read == config
    assert read == Config.from_dict(read.to_dict())


def test_an_unknown_rope_is_refused():
    with pytest.raises(ValueError, match="ntk"):
        LLaMA(small_config(rope_scaling={"rope_type": "ntk"}))


# ---- packing ----


def test_a_sequence_does_not_see_its_neighbours():
    net = init_from_scratch(small_config())
    batch = random_batch([5, 20, 3])
    sequences = batch.tokens.split([5, 20, 3])
    together = net.logits(batch).split([5, 20, 3])
    for sequence, logits in zip(sequences, together):
        length = len(sequence)
        alone = net(sequence, tensor([0, length], dtype=torch.int32), length)
        assert torch.allclose(alone, logits, atol=1e-5)


# ---- log-probabilities without logits ----


@pytest.fixture
def spans_of_three(monkeypatch):
    """Cut the vocabulary, and the rows, into pieces of three, so that there are many."""

    def split(count, width, x, cpu_mib):
        return [slice(begin, begin + 3) for begin in range(0, count, 3)]

    monkeypatch.setattr(logprobs, "split_into_spans", split)


def gradients_of(net, loss):
    net.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("uniform_weights", [False, True])
def test_gradients_of_log_probs_equal_those_of_the_whole_logits(uniform_weights, spans_of_three):
    net = init_from_scratch(small_config(), seed=1)
    targets = random_targets(11, ignore_every=4)
    batch = random_batch([5, 6])._replace(targets=targets)
    weights = torch.full((11,), -0.3)
    if not uniform_weights:
        weights = torch.randn(11, generator=torch.Generator().manual_seed(2))
    weights = weights * (targets >= 0)

    logps = net.log_probs(batch, temperature=0.7, uniform_weights=uniform_weights)
    ours = gradients_of(net, (logps * weights).sum())
    expected_logps = log_probs_of_logits(net.logits(batch) / 0.7, targets)
    expected = gradients_of(net, (expected_logps * weights).sum())
    for name, gradient in expected.items():
        assert torch.allclose(ours[name], gradient, atol=1e-5), name


@pytest.mark.parametrize("uniform_weights", [False, True])
def test_log_probs_without_targets_are_zero_and_have_finite_gradients(
    uniform_weights, spans_of_three
):
    net = init_from_scratch(small_config(), seed=1)
    logps = net.log_probs(random_batch([5, 6]), uniform_weights=uniform_weights)
    assert (logps == 0).all()
    for name, gradient in gradients_of(net, logps.sum()).items():
        assert torch.isfinite(gradient).all(), name


def test_uniform_weights_make_the_gradient_of_a_loss_with_other_weights_nan():
    """The optimizer step names and skips it. A failed assertion would end a GPU's process."""
    net = init_from_scratch(small_config(), seed=1)
    batch = random_batch([5, 6])._replace(targets=torch.randint(0, 97, (11,)))
    logps = net.log_probs(batch, uniform_weights=True)
    gradients = gradients_of(net, (logps * torch.arange(11)).sum())
    assert gradients["lm_head.weight"].isnan().all()


def test_uniform_weights_pass_on_a_gradient_that_is_not_finite():
    net = init_from_scratch(small_config(), seed=1)
    batch = random_batch([5, 6])._replace(targets=torch.randint(0, 97, (11,)))
    logps = net.log_probs(batch, uniform_weights=True)
    gradients = gradients_of(net, logps.mean() * torch.nan)
    assert gradients["lm_head.weight"].isnan().all()


def test_log_probs_are_the_same_with_target_positions_and_without():
    net = init_from_scratch(small_config(), seed=1)
    targets = random_targets(11, ignore_every=3)
    batch = random_batch([5, 6])._replace(targets=targets)
    positions = (targets >= 0).nonzero().squeeze(1)
    logps = net.log_probs(batch._replace(target_positions=positions))
    assert torch.equal(logps, net.log_probs(batch))


# ---- float32 logits of bfloat16 operands ----


def multiply_to_float32(x, weight, out_dtype):
    """What a GPU's kernel computes: exact products of bfloat16 numbers, summed in float32."""
    assert out_dtype == torch.float32
    return x.float() @ weight.float()


def multiply_into_float32(x, weight, out_dtype, out):
    return out.copy_(multiply_to_float32(x, weight, out_dtype))


@pytest.fixture
def products_as_on_a_gpu(monkeypatch):
    """Use torch.mm(..., out_dtype=torch.float32), with a kernel that a CPU lacks."""
    library = Library("aten", "IMPL")
    for name, function in (
        ("mm.dtype", multiply_to_float32),
        ("mm.dtype_out", multiply_into_float32),
    ):
        library.impl(name, function, "CPU")
    monkeypatch.setattr(logprobs, "product_dtype", lambda x: torch.float32)
    yield
    library._destroy()


@pytest.mark.parametrize("uniform_weights", [False, True])
def test_logits_on_a_gpu_are_not_rounded_to_bfloat16(uniform_weights, products_as_on_a_gpu):
    """Log-probabilities of logits near 30, where bfloat16's neighbours are 0.125 apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 64, generator=generator).mul(4).bfloat16().requires_grad_()
    targets = torch.randint(0, 50, (7,), generator=generator)
    function = logprobs.UniformLogProbs if uniform_weights else logprobs.LogProbs
    logps = function.apply(x, weight, targets, 1.0)
    logits = x.double() @ weight.double().T
    assert logits.abs().max() > 32
    expected = log_probs_of_logits(logits, targets)
    assert torch.allclose(logps.double(), expected, atol=1e-4)
    gradients = torch.autograd.grad(logps.mean(), (x, weight))
    expected_gradients = torch.autograd.grad(expected.mean(), (x, weight))
    for gradient, other in zip(gradients, expected_gradients):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - other).norm() < 0.02 * other.norm()


def test_logits_on_a_cpu_are_computed_in_the_type_of_the_operands():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator)
    weight = torch.randn(9, 8, generator=generator)
    assert torch.equal(logprobs.compute_logits(x, weight), x @ weight.T)
    rounded = logprobs.compute_logits(x.bfloat16(), weight.bfloat16())
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())


def test_tokens_without_a_target_need_no_product_with_the_vocabulary(monkeypatch):
    rows = []
    real_apply = logprobs.LogProbs.apply

    def count_rows(x, *arguments):
        rows.append(len(x))
        return real_apply(x, *arguments)

    monkeypatch.setattr(logprobs.LogProbs, "apply", count_rows)
    batch = random_batch([30])
    batch.targets[25:29] = 3
    init_from_scratch(small_config()).log_probs(batch)
    assert rows == [4]


def test_activation_checkpointing_changes_no_gradient():
    net = init_from_scratch(small_config(), seed=2)
    batch = random_batch([9, 4])._replace(targets=torch.arange(13))
    stored = gradients_of(net, net.log_probs(batch).sum())
    net.activation_checkpointing = True
    recomputed = gradients_of(net, net.log_probs(batch).sum())
    for name, gradient in stored.items():
        assert torch.allclose(recomputed[name], gradient, atol=1e-6), name


# ---- scores ----


@pytest.fixture
def score_model():
    """A score model in bfloat16, whose config knows the mean and the variance of its scores."""
    return init_from_scratch(small_config(mean=[0.5], var=[4.0]), "score").bfloat16()


def test_scores_are_float32_numbers_per_token(score_model):
    scores = score_model.scores(random_batch([6, 3]))
    assert scores.shape == (9,)
    assert scores.dtype == torch.float32


def test_scores_are_normalized_where_the_config_says_so(score_model):
    batch = random_batch([6, 3])
    raw = score_model.scores(batch)
    score_model.config.do_normalize = True
    assert torch.allclose(score_model.scores(batch), (raw - 0.5) / 2)


def test_normalized_costs_keep_their_zero(score_model):
    batch = random_batch([6, 3])
    raw = score_model.scores(batch)
    score_model.config.do_normalize = True
    score_model.config.score_type = "cost"
    assert torch.allclose(score_model.scores(batch), raw / 2)


def test_values_of_a_critic_are_not_normalized(score_model):
    batch = random_batch([6, 3])
    raw = score_model.scores(batch)
    score_model.config.do_normalize = True
    score_model.config.score_type = "critic"
    assert torch.equal(score_model.scores(batch), raw)
