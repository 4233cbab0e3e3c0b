"""Policies from pairs, as safe as they are helpful: authors' numbers, plain loops, and traps."""

import json
import math
import os

import pytest
import torch
from conftest import ROOT
from torch import tensor

from nanosafe import checkpoint, losses, tokenizer
from nanosafe.checkpoint import convert, init_from_scratch
from nanosafe.data import dataset as datasets
from nanosafe.data.examples import TASKS, parse_record
from nanosafe.tools.toy_world import small_config

with open(os.path.join(ROOT, "tests", "preferences_golden.json")) as f:
    GOLDEN = json.load(f)  # what the methods' authors compute, in float64


def cases_of(name):
    return [(name, i) for i in range(len(GOLDEN[name]["cases"]))]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def read_inputs(case):
    """The inputs of a case: lists as float64 tensors, numbers as they are."""
    inputs = {}
    for name, value in case["inputs"].items():
        inputs[name] = double(value) if isinstance(value, list) else value
    return inputs


# ---- the authors' numbers ----


def four_of(x):
    return x["chosen"], x["rejected"], x["ref_chosen"], x["ref_rejected"]


def safedpo(x):
    unsafe = (x["chosen_unsafe"], x["rejected_unsafe"])
    return losses.safedpo_loss(*four_of(x), *unsafe, x["beta"], x["delta"])


def bso(x, generator):
    return losses.bso_loss(
        *four_of(x),
        x["chosen_unsafe"],
        x["rejected_unsafe"],
        x["beta"],
        x["C"],
        generator,
        x["lam"],
        x["s"],
        x["log_r_limit"],
    )


def bso_logistic(x):
    return bso(x, "logistic")


def bso_sba(x):
    return bso(x, "sba")


def dpo_stage2(x):
    return losses.dpo_loss(*four_of(x), x["beta"] / x["lambda"])


def modpo(x):
    safety = (-x["cost_chosen"], -x["cost_rejected"])
    return losses.modpo_loss(*four_of(x), *safety, x["w"], x["beta"])


def bfpo(x):
    unsafe = (1 - x["is_safe_chosen"], 1 - x["is_safe_rejected"])
    return losses.bfpo_loss(*four_of(x), *unsafe, x["beta"], x["b1"], x["alpha"])


def kto(x):
    assert x["desirable_weight"] == 1
    return losses.kto_loss(
        x["logps"], x["ref_logps"], x["desirable"], x["kl"], x["beta"], x["undesirable_weight"]
    )


def simpo(x):
    lengths = (x["chosen_length"], x["rejected_length"])
    return losses.simpo_loss(x["chosen"], x["rejected"], *lengths, x["beta"], x["gamma"])


def orpo(x):
    lengths = (x["chosen_length"], x["rejected_length"])
    return losses.orpo_loss(x["chosen"], x["rejected"], *lengths, x["weight"])


OF_AUTHORS = [
    (safedpo, "safedpo_loss", None),
    (bso_logistic, "bso_loss", "logistic"),
    (bso_sba, "bso_loss", "sba"),
    (dpo_stage2, "dpo_stage2", None),
    (modpo, "modpo_loss", None),
    (bfpo, "bfpo_loss", None),
    (kto, "kto_loss", None),
    (simpo, "simpo_loss", None),
    (orpo, "orpo_loss", None),
]


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("function, name, part", OF_AUTHORS)
def test_losses_and_gradients_are_the_authors(function, name, part, number):
    case = GOLDEN[name]["cases"][number]
    expected = case["outputs"][part] if part else case["outputs"]
    inputs = read_inputs(case)
    if function is kto:  # the mean gain of answers to other prompts
        inputs["kl"] = (inputs["kl_logps"] - inputs["kl_ref_logps"]).mean()
    learnt = [key for key in ("chosen", "rejected", "logps") if key in inputs]
    for key in learnt:
        inputs[key].requires_grad_()
    loss = function(inputs)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9, abs=1e-9)
    loss.backward()
    for key in learnt:
        gradient = inputs[key].grad.tolist()
        assert gradient == pytest.approx(expected[f"grad_{key}"], rel=1e-9, abs=1e-9)

    count = len(expected["losses"])
    for i in range(count):  # each pair alone
        one = {}
        for key, value in inputs.items():
            is_list = torch.is_tensor(value) and value.dim() > 0
            one[key] = value[i : i + 1] if is_list else value
        assert function(one).item() == pytest.approx(expected["losses"][i], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_safedpo_transforms_rows_as_its_paper_says(number):
    case = GOLDEN["safedpo_transform"]["cases"][number]
    for row, expected in zip(case["inputs"]["rows"], case["outputs"]["pairs"]):
        row = {"input": "q", "answer": "answer", "other_answer": "other_answer", **row}
        if expected["action"] == "drop":
            with pytest.raises(ValueError, match="two unsafe answers"):
                parse_record(row, "safedpo")
            continue
        parsed = parse_record(row, "safedpo")
        answers = [turns[-1]["content"] for turns in parsed.conversations]
        assert answers == [expected["chosen"], expected["rejected"]]
        assert parsed.labels == (1, -1 if expected["margin"] else 1)
        assert parsed.note.startswith("swapped") == (expected["action"] == "swap")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_parameters_are_mixed_as_mergekit_does(number):
    case = GOLDEN["merge"]["cases"][number]
    x = read_inputs(case)
    mixed = convert.mix(x["theta_1"], x["theta_2"], x["q"])
    assert torch.allclose(mixed, double(case["outputs"]["merged"]), rtol=0, atol=1e-12)


# ---- plain loops ----

CHOSEN = [-3.0, -8.0, -2.5, -4.0]
REJECTED = [-4.0, -6.0, -2.5, -9.0]
REF_CHOSEN = [-3.5, -7.0, -2.0, -3.0]
REF_REJECTED = [-4.5, -6.5, -1.0, -8.5]
CHOSEN_UNSAFE = [0.0, 0.0, 1.0, 1.0]
REJECTED_UNSAFE = [0.0, 1.0, 0.0, 1.0]
CHOSEN_LENGTHS = [3.0, 8.0, 1.0, 4.0]
REJECTED_LENGTHS = [2.0, 4.0, 5.0, 9.0]
FOUR = [double(x) for x in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]
UNSAFE = [double(CHOSEN_UNSAFE), double(REJECTED_UNSAFE)]
SAFE = [1 - UNSAFE[0], 1 - UNSAFE[1]]
LENGTHS = [double(CHOSEN_LENGTHS), double(REJECTED_LENGTHS)]
ZEROS = torch.zeros(4, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gain_of_pair(i):
    """h of pair i."""
    return (CHOSEN[i] - REF_CHOSEN[i]) - (REJECTED[i] - REF_REJECTED[i])


def plain_safedpo(i):
    return -math.log(sigmoid(0.3 * gain_of_pair(i) - 2 * (REJECTED_UNSAFE[i] - CHOSEN_UNSAFE[i])))


def plain_sba(i):
    v = -(0.3 * gain_of_pair(i) + 2 * (CHOSEN_UNSAFE[i] - REJECTED_UNSAFE[i]))
    ba = (0.2 * math.exp(1.2 * v) - 1.2 * math.exp(-0.2 * v) + 1) / 0.2
    return ba / (4 * 1.2)


def plain_bfpo(i):
    targets = {(0, 0): 0.5, (0, 1): 1.0, (1, 0): -1.0, (1, 1): -0.5}
    target = targets[CHOSEN_UNSAFE[i], REJECTED_UNSAFE[i]]
    return (gain_of_pair(i) - target / 0.3) ** 2


def plain_modpo(i):
    costs = 5 * CHOSEN_UNSAFE[i] - 5 * REJECTED_UNSAFE[i]
    return -math.log(sigmoid((0.3 * gain_of_pair(i) + 0.4 * costs) / 0.6))


def plain_simpo(i):
    mean = CHOSEN[i] / CHOSEN_LENGTHS[i]
    other_mean = REJECTED[i] / REJECTED_LENGTHS[i]
    return -math.log(sigmoid(2 * (mean - other_mean) - 0.7))


def plain_orpo(i):
    mean = CHOSEN[i] / CHOSEN_LENGTHS[i]
    other_mean = REJECTED[i] / REJECTED_LENGTHS[i]
    odds = math.exp(mean) / (1 - math.exp(mean))
    other_odds = math.exp(other_mean) / (1 - math.exp(other_mean))
    return -mean - 0.5 * math.log(sigmoid(math.log(odds / other_odds)))


def plain_kto(i):
    gain = CHOSEN[i] - REF_CHOSEN[i]
    if CHOSEN_UNSAFE[i]:
        return 1.5 * (1 - sigmoid(0.3 * (0.4 - gain)))
    return 1 - sigmoid(0.3 * (gain - 0.4))


def loss_safedpo(four):
    return losses.safedpo_loss(*four, *UNSAFE, 0.3, 2.0)


def loss_sba(four):
    return losses.bso_loss(*four, *UNSAFE, 0.3, 2.0)


def loss_bfpo(four):
    return losses.bfpo_loss(*four, *UNSAFE, 0.3)


def loss_modpo(four):
    return losses.modpo_loss(*four, -5 * UNSAFE[0], -5 * UNSAFE[1], 0.6, 0.3)


def loss_simpo(four):
    return losses.simpo_loss(four[0], four[1], *LENGTHS, 2.0, 0.7)


def loss_orpo(four):
    return losses.orpo_loss(four[0], four[1], *LENGTHS, 0.5)


def loss_kto(four):
    kl = double(0.4)
    return losses.kto_loss(four[0], four[2], SAFE[0], kl, 0.3, undesirable_weight=1.5)


LOOPS = [
    (loss_safedpo, plain_safedpo),
    (loss_sba, plain_sba),
    (loss_bfpo, plain_bfpo),
    (loss_modpo, plain_modpo),
    (loss_simpo, plain_simpo),
    (loss_orpo, plain_orpo),
    (loss_kto, plain_kto),
]


@pytest.mark.parametrize("loss, plain", LOOPS)
def test_a_loss_equals_a_plain_loop(loss, plain):
    expected = sum(plain(i) for i in range(4)) / 4
    assert loss(FOUR).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss, plain", LOOPS)
def test_gradients_equal_finite_differences(loss, plain):
    def of_policy(chosen, rejected):
        return loss([chosen, rejected, FOUR[2], FOUR[3]])

    chosen = FOUR[0].clone().requires_grad_()
    rejected = FOUR[1].clone().requires_grad_()
    assert torch.autograd.gradcheck(of_policy, (chosen, rejected))


@pytest.mark.parametrize("loss, plain", LOOPS)
def test_a_loss_of_no_pairs_is_zero(loss, plain):
    """A rank without work has none."""
    none = torch.zeros(0)
    unsafe = (none, none)
    results = [
        losses.safedpo_loss(none, none, none, none, *unsafe, 0.1, 1.0),
        losses.bso_loss(none, none, none, none, *unsafe, 0.1, 1.0),
        losses.bfpo_loss(none, none, none, none, *unsafe, 0.1),
        losses.modpo_loss(none, none, none, none, *unsafe, 0.5, 0.1),
        losses.simpo_loss(none, none, none, none, 2.0, 1.0),
        losses.orpo_loss(none, none, none, none, 1.0),
        losses.kto_loss(none, none, none, tensor(0.0), 0.1),
    ]
    assert all(result == 0 for result in results)


# ---- what each objective should do, and where others went wrong ----


def test_safedpo_without_a_margin_is_dpo():
    dpo = losses.dpo_loss(*FOUR, 0.3)
    assert losses.safedpo_loss(*FOUR, *UNSAFE, 0.3, 0.0) == dpo


def test_safedpo_s_margin_stands_on_pairs_of_a_safe_and_an_unsafe_response_only():
    safe = ZEROS
    dpo = losses.dpo_loss(*FOUR, 0.3)
    assert losses.safedpo_loss(*FOUR, safe, safe, 0.3, 10.0) == dpo
    assert losses.safedpo_loss(*FOUR, safe, 1 - safe, 0.3, 10.0) > dpo + 9


def test_bso_with_the_logistic_generator_is_safedpo():
    logistic = losses.bso_loss(*FOUR, *UNSAFE, 0.3, 2.0, "logistic")
    assert logistic.item() == pytest.approx(loss_safedpo(FOUR).item(), abs=1e-12)


def gradient_of_a_pair_at_the_reference(limit, h=0.0):
    """BSO's gradient of (safe, unsafe), with a margin of 30."""
    chosen = tensor([h], requires_grad=True)
    zero = tensor([0.0])
    unsafe = (zero, zero + 1)
    losses.bso_loss(chosen, zero, zero, zero, *unsafe, 0.1, 30.0, limit=limit).backward()
    return chosen.grad.item()


def test_a_bso_pair_at_its_limit_has_no_gradient_so_that_the_limit_lies_above_the_margin():
    assert gradient_of_a_pair_at_the_reference(limit=30.0, h=-1.0) == 0
    assert gradient_of_a_pair_at_the_reference(limit=60.0, h=-1.0) < 0


def test_sba_pushes_a_won_pair_the_harder_the_more_it_is_won():
    slopes = []
    for h in (0.0, 20.0, 60.0):
        chosen = double([h]).requires_grad_()
        zero = double([0.0])
        losses.bso_loss(chosen, zero, zero, zero, zero, zero, 0.1, 0.0).backward()
        slopes.append(-chosen.grad.item())
    v = -6.0
    assert slopes[2] == pytest.approx(0.1 * (math.exp(1.2 * v) + math.exp(-0.2 * v)) / 4)
    assert slopes[2] > slopes[0]
    assert slopes[2] > slopes[1]


def test_bfpo_prefers_the_less_helpful_of_two_unsafe_responses():
    targets = []
    for unsafe in ((0, 1), (0, 0), (1, 1), (1, 0)):
        chosen = double([0.0]).requires_grad_()
        zero = double([0.0])
        pair = [double([flag]) for flag in unsafe]
        losses.bfpo_loss(chosen, zero, zero, zero, *pair, 0.5).backward()
        targets.append(-chosen.grad.item() / 2)  # of (h - t)^2 at h = 0
    assert targets == pytest.approx([2.0, 1.0, -1.0, -2.0])


def test_bfpo_of_safe_responses_is_ipo():
    safe = torch.zeros(4)
    ipo = losses.ipo_loss(*FOUR, 0.3).item()
    assert losses.bfpo_loss(*FOUR, safe, safe, 0.3).item() == pytest.approx(ipo)


def test_modpo_with_all_weight_on_the_pairs_is_dpo():
    dpo = losses.dpo_loss(*FOUR, 0.3)
    assert losses.modpo_loss(*FOUR, ZEROS + 3, ZEROS - 3, 1.0, 0.3) == dpo


def test_modpo_of_equally_safe_responses_is_dpo_with_another_beta():
    dpo = losses.dpo_loss(*FOUR, 0.3 / 0.6)
    assert losses.modpo_loss(*FOUR, ZEROS + 3, ZEROS + 3, 0.6, 0.3) == dpo


def test_modpo_is_satisfied_where_the_chosen_response_is_the_less_safe_one():
    """So that nothing prefers the safe one where labels are without noise: its known limit."""
    zero = double([0.0])
    gradients = []
    for cost in (10.0, 0.0, -10.0):
        chosen = double([0.0]).requires_grad_()
        losses.modpo_loss(chosen, zero, zero, zero, zero - cost, zero, 0.5, 0.1).backward()
        gradients.append(-chosen.grad.item())
    assert gradients[0] < 1e-4
    assert gradients[0] < gradients[1] < gradients[2]


def test_modpo_s_best_policy_weighs_reward_and_cost():
    """reference * exp((w r - (1 - w) c) / beta), if labels are as Bradley and Terry draw them.

    Of three answers: the gradient of the expected loss is 0 there."""
    rewards = double([1.0, 0.2, -0.5])
    costs = double([2.0, -1.0, 0.3])
    reference = double([0.5, 0.3, 0.2]).log()
    best = reference + (0.6 * rewards - 0.4 * costs) / 0.7
    logits = best.clone().requires_grad_()
    logps = logits.log_softmax(0)
    expected_loss = 0
    for i in range(3):
        for j in range(3):
            if i == j:
                continue
            one = [logps[i : i + 1], logps[j : j + 1], reference[i : i + 1], reference[j : j + 1]]
            safety = [-costs[i : i + 1], -costs[j : j + 1]]
            p_chosen = torch.sigmoid(rewards[i] - rewards[j])
            expected_loss = expected_loss + p_chosen * losses.modpo_loss(*one, *safety, 0.6, 0.7)
    expected_loss.backward()
    assert logits.grad.abs().max() < 1e-12


def test_kto_raises_desirable_responses_and_lowers_the_others():
    logps = torch.zeros(2, requires_grad=True)
    losses.kto_loss(logps, torch.zeros(2), tensor([1.0, 0.0]), tensor(0.0), 0.1).backward()
    assert logps.grad[0] < 0 < logps.grad[1]


def test_kto_s_reference_point_has_no_gradient_and_is_never_negative():
    logps = double([0.5, -0.5])
    none = torch.zeros(2)
    desirable = tensor([1.0, 0.0])
    kl = double(2.0).requires_grad_()
    assert not losses.kto_loss(logps, none, desirable, kl, 0.1).requires_grad
    at_zero = losses.kto_loss(logps, none, desirable, double(0.0), 0.1)
    assert losses.kto_loss(logps, none, desirable, double(-2.0), 0.1) == at_zero


def test_simpo_does_not_prefer_longer_or_shorter_responses():
    """The same log-probability per token is a tie, whatever the lengths."""
    chosen, rejected = double([-2.0]), double([-8.0])
    loss = losses.simpo_loss(chosen, rejected, double([1.0]), double([4.0]), 2.0, 0.0)
    assert loss.item() == pytest.approx(math.log(2))


def test_orpo_is_finite_for_responses_that_are_certain():
    chosen = torch.zeros(2, requires_grad=True)
    rejected = tensor([0.0, -1e-9], requires_grad=True)
    loss = losses.orpo_loss(chosen, rejected, torch.ones(2), torch.ones(2), 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(chosen.grad).all()
    assert torch.isfinite(rejected.grad).all()


# ---- rows ----

PAIR = {
    "input": "q",
    "answer": "helpful",
    "other_answer": "refuses",
    "better": True,
    "safer": False,
    "is_safe": False,
    "is_other_safe": True,
}


def answers_of(row, task):
    parsed = parse_record(row, task)
    return [turns[-1]["content"] for turns in parsed.conversations], parsed.labels


@pytest.mark.parametrize(
    "task, answers, labels",
    [
        ("reward", ["helpful", "refuses"], (1, 0)),
        ("cost", ["refuses", "helpful"], (1, -1)),
        ("bfpo", ["helpful", "refuses"], (-1, 1)),
        ("safedpo", ["refuses", "helpful"], (1, -1)),
        ("kto", ["helpful", "refuses"], (1, 0)),
        ("kto_safe", ["helpful", "refuses"], (0, 1)),
    ],
)
def test_what_each_task_takes_from_a_pair(task, answers, labels):
    assert answers_of(PAIR, task) == (answers, labels)


@pytest.mark.parametrize("task", ["kto", "kto_safe"])
@pytest.mark.parametrize("label, number", [(True, 1), (False, 0), ("False", 0), (1, 1)])
def test_a_row_with_a_label_is_one_answer(task, label, number):
    row = {"input": "q", "answer": "a", "label": label}
    assert answers_of(row, task) == (["a"], (number,))


def test_an_answer_alone_is_desirable_if_it_is_safe():
    row = {"input": "q", "answer": "a", "is_safe": False}
    assert answers_of(row, "kto_safe") == (["a"], (0,))
    with pytest.raises(ValueError, match="other_answer"):
        parse_record(row, "kto")


@pytest.mark.parametrize(
    "change, task, words",
    [
        ({"is_safe": "perhaps"}, "safedpo", "'is_safe' is not true or false"),
        ({"is_safe": None}, "kto_safe", "'is_safe' is not true or false"),
        ({"label": 2}, "kto", "'label' is not true or false"),
        ({"answer": ""}, "bfpo", "empty answer"),
        ({"answer": "refuses"}, "safedpo", "identical answers"),
        ({"answer": 7, "label": True}, "kto", "empty answer"),
    ],
)
def test_rows_with_broken_labels_are_dropped_with_a_reason(change, task, words):
    with pytest.raises(ValueError, match=words):
        parse_record({**PAIR, **change}, task)


@pytest.mark.parametrize("task", ["bfpo", "safedpo"])
@pytest.mark.parametrize("field", ["better", "is_safe", "is_other_safe", "input"])
def test_rows_without_a_needed_field_are_dropped(task, field):
    row = dict(PAIR)
    del row[field]
    with pytest.raises(ValueError, match=f"no field '{field}'"):
        parse_record(row, task)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tok(world):
    return tokenizer.load(world / "policy")


def test_kept_swapped_and_dropped_pairs_are_counted_and_said(tok, tmp_path, capsys):
    safe = {**PAIR, "is_safe": True}
    unsafe = {**PAIR, "is_other_safe": False}
    path = write_rows(tmp_path / "pairs.jsonl", [PAIR, safe, unsafe, PAIR])
    dataset = datasets.tokenize(path, tok, "safedpo", 200)
    assert len(dataset) == 3
    assert list(dataset.report["noted"].values()) == [2]
    printed = capsys.readouterr().out
    assert "4 rows, 3 kept, of which 2 swapped: only the less helpful answer is safe" in printed
    assert "dropped 1 two unsafe answers" in printed
    assert dataset.labels.tolist() == [[1, -1], [1, 1], [1, -1]]


def test_rows_of_one_and_of_two_answers_go_together(tok, tmp_path):
    alone = {"input": ["q", "a", "q 2"], "answer": "good", "label": True}
    path = write_rows(tmp_path / "rows.jsonl", [alone, PAIR])
    dataset = datasets.tokenize(path, tok, "kto", 200)
    assert dataset.labels[0, 0] == 1
    assert math.isnan(dataset.labels[0, 1])
    ids, mask = dataset.sequence(0)
    assert tok.decode(ids[mask == 1].tolist()).strip() == "good"  # and not the answer before it


def test_a_mismatched_answer_is_one_to_another_prompt(tok, tmp_path):
    rows = []
    for i, prompt in enumerate(["p", "p", "r", "s"]):
        rows.append({**PAIR, "input": prompt, "answer": f"yes {i}", "other_answer": f"no {i}"})
    dataset = datasets.tokenize(write_rows(tmp_path / "rows.jsonl", rows), tok, "kto", 200)
    expected = ["yes 2", "no 2", "yes 3", "no 0"]  # of the next other prompt, both kinds in turn
    for i, answer in enumerate(expected):
        ids, mask = dataset.mismatched_sequence(i)
        own_ids, own_mask = dataset.sequence(i)
        assert tok.decode(ids[mask == 1].tolist()).strip() == answer
        assert ids[mask == 0].tolist() == own_ids[own_mask == 0].tolist()


def test_one_prompt_alone_has_no_mismatched_answer(tok, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [PAIR, PAIR])
    dataset = datasets.tokenize(path, tok, "kto", 200)
    with pytest.raises(SystemExit, match="all examples have the same prompt"):
        dataset.mismatched_sequence(0)


def test_every_task_has_a_docstring():
    for parse in TASKS.values():
        assert parse.__doc__


# ---- merging ----


@pytest.fixture
def two_policies(tok, tmp_path):
    """The folders of two policies with untied heads, the second in bfloat16."""
    paths = []
    for seed, dtype in ((1, torch.float32), (2, torch.bfloat16)):
        config = small_config(vocab_size=tok.vocab_size)
        model = init_from_scratch(config, seed=seed)
        path = str(tmp_path / f"policy_{seed}")
        checkpoint.save(model, path, tok, dtype=dtype)
        paths.append(path)
    return paths


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_merged_parameters_are_mixed_in_float32_head_and_embedding_included(
    share, two_policies, tmp_path
):
    target = str(tmp_path / "merged")
    convert.main([*two_policies, f"--merge={share}", target])
    a, b = [checkpoint.load(path).float().state_dict() for path in two_policies]
    merged = checkpoint.load(target).state_dict()
    assert {"lm_head.weight", "embed_tokens.weight"} <= merged.keys()
    for name, mixed in merged.items():
        expected = (1 - share) * a[name].double() + share * b[name].double()
        assert mixed.dtype == torch.float32
        assert torch.allclose(mixed.double(), expected, rtol=1e-6, atol=1e-9), name
        if share in (0, 1):
            assert torch.equal(mixed, (b if share else a)[name])


def test_two_models_in_bfloat16_are_not_mixed_in_bfloat16(two_policies, tmp_path):
    _, b = two_policies
    a = str(tmp_path / "a")
    convert.convert(two_policies[0], a, torch.bfloat16)
    convert.main([a, b, "--merge=0.3", str(tmp_path / "merged"), "--dtype=float32"])
    first = checkpoint.load(a).lm_head.weight
    second = checkpoint.load(b).lm_head.weight
    merged = checkpoint.load(tmp_path / "merged").lm_head.weight
    assert torch.equal(merged, 0.7 * first.float() + 0.3 * second.float())
    assert not torch.equal(merged, (0.7 * first + 0.3 * second).float())


def test_models_that_do_not_fit_are_not_merged(two_policies, world, tok, tmp_path):
    a, _ = two_policies
    other = str(tmp_path / "other")
    config = small_config(vocab_size=tok.vocab_size, num_hidden_layers=1)
    checkpoint.save(init_from_scratch(config), other, tok)
    bare = str(tmp_path / "bare")
    config = small_config(vocab_size=tok.vocab_size)
    checkpoint.save(init_from_scratch(config), bare)
    for second, words in (
        (other, "num_hidden_layers is"),
        (f"{world}/reward", "the heads are lm and score"),
        (bare, "their tokenizers or templates differ"),
        (str(tmp_path / "nowhere"), "no model at"),
    ):
        with pytest.raises(SystemExit, match=words) as stopped:
            convert.main([a, second, "--merge=0.5", str(tmp_path / "merged")])
        assert "\n" not in str(stopped.value)
        assert not os.path.exists(tmp_path / "merged")
    with pytest.raises(SystemExit, match="score_type is 'reward' and 'cost'"):
        scorers = [f"{world}/reward", f"{world}/cost"]
        convert.main([*scorers, "--merge=0.5", str(tmp_path / "merged")])


@pytest.mark.parametrize("share", ["1.5", "-0.1", "nan", "half", ""])
def test_a_share_outside_its_range_is_one_line(share, two_policies, tmp_path):
    with pytest.raises(SystemExit, match="must be a number from 0 to 1"):
        convert.main([*two_policies, f"--merge={share}", str(tmp_path / "merged")])


@pytest.mark.parametrize(
    "arguments", [["a", "--merge=0.5"], ["a", "b", "c", "--merge=1", "--to=hf"]]
)
def test_a_merge_with_wrong_arguments_prints_its_usage(arguments):
    with pytest.raises(SystemExit, match="python -m nanosafe.checkpoint A B --merge"):
        convert.main(arguments)
