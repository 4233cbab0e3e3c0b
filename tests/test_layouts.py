"""Published rows -> nanosafe's rows. data/rows.jsonl has a row of each layout of the field, and
what it becomes; null is what nanosafe's rows cannot express."""

import copy
import json
import os
import time

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from nanosafe.data.examples import make_prompt_key
from nanosafe.data.layouts import LAYOUTS, to_raw_sample

QUESTION = {"role": "user", "content": "How do I bake bread?"}
ANSWER = {"role": "assistant", "content": "Mix, knead, bake."}
REFUSAL = {"role": "assistant", "content": "No idea."}


def read_cases():
    path = os.path.join(ROOT, "tests", "data", "rows.jsonl")
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


CASES = {case["format"]: case for case in read_cases()}
# The file has null where no task takes a single label. The row can be expressed all the same.
KTO = {"input": "How do I bake bread?", "answer": "Mix, knead, bake.", "label": True}


def find_expected(name):
    """What a case of the file becomes, without the file's note; None if it is dropped."""
    if name == "trl unpaired (KTO)":
        return KTO
    expected = CASES[name]["expected"]
    if expected is not None:
        expected.pop("note", None)
    return expected


READABLE = [name for name in CASES if find_expected(name) is not None]
REASONS = {
    "trl preference, implicit, prompts differ": (
        "the two conversations differ before the last answer"
    ),
    "trl preference, several messages in an answer": "an answer of several messages",
    "trl reasoning_content": "reasoning beside the answer",
    "openai image part": "an image",
    "openai tool call": "a tool call",
    "sharegpt, two in a row": "two user messages in a row",
    "sharegpt, tools": "a tool call",
    "ultrafeedback_binarized, equal scores": "equal scores",
    "empty content": "empty turn",
    "null content": "empty turn",
    "unknown role": "the role 'wizard'",
}


def reason_of(record):
    """The reason for which a row is dropped."""
    with pytest.raises(ValueError) as error:
        to_raw_sample(record)
    return str(error.value)


# ---- the field's layouts ----


@pytest.mark.parametrize("name", READABLE)
def test_a_published_row_becomes_nanosafe_s(name):
    row = CASES[name]["row"]
    before = copy.deepcopy(row)
    assert to_raw_sample(row) == find_expected(name)
    assert row == before


@pytest.mark.parametrize("name", REASONS)
def test_a_row_that_cannot_be_expressed_has_a_reason(name):
    assert reason_of(CASES[name]["row"]) == REASONS[name]


def test_every_case_of_the_file_is_tested():
    assert sorted([*READABLE, *REASONS]) == sorted(CASES)


# ---- rows of nanosafe's own, and unknown ones ----


@pytest.mark.parametrize(
    "record",
    [
        {"input": "q"},
        {"input": ["q", "a", "r"], "prompt": "another column"},
        {"input": "q", "answer": "a", "messages": [QUESTION, ANSWER]},
        {"input": "q", "answers": ["a", "b"], "scores": [1, 2], "prompt": "p"},
        {"dialogue": ["q", "a"], "messages": [QUESTION]},
        {"dialogue": ["q", "a"], "system": "You are brief."},
        {"texts": ["a"], "scores": [0.5]},
        {"text": "plain text of the web"},
        {"question": "q", "solution": "a"},
        {},
    ],
)
def test_other_rows_are_returned_as_they_are(record):
    assert to_raw_sample(record) is record


def test_what_has_been_read_is_left_as_it_is():
    for name in READABLE:
        sample = to_raw_sample(CASES[name]["row"])
        assert to_raw_sample(sample) is sample


# ---- decisions ----


def test_a_pair_comes_before_the_messages_that_stand_beside_it():
    row = {"prompt": "x", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, REFUSAL]}
    sample = to_raw_sample({**row, "messages": [QUESTION, ANSWER], "score_chosen": 9.0})
    assert sample["answer"] == ANSWER["content"]
    assert sample["other_answer"] == REFUSAL["content"]


def test_messages_come_before_the_prompt_that_stands_beside_them():
    row = {"prompt": "x", "prompt_id": "0", "messages": [QUESTION, ANSWER], "category": "Chat"}
    assert to_raw_sample(row) == {"dialogue": [QUESTION["content"], ANSWER["content"]]}


def test_the_input_of_an_instruction_belongs_to_the_prompt():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert to_raw_sample(row) == {"input": "Add. 1 2", "answer": "3"}
    assert to_raw_sample({**row, "kto_tag": False})["label"] is False


def test_pku_saferlhf_s_columns_keep_both_labels():
    row = {
        "prompt": "q",
        "response_0": "a",
        "response_1": "b",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": 1,
        "safer_response_id": 0,
        "response_0_severity_level": 0,
    }
    expected = {"input": "q", "answer": "a", "other_answer": "b", "better": False, "safer": True}
    expected |= {"is_safe": True, "is_other_safe": False}
    assert to_raw_sample(row) == expected
    del expected["safer"]
    assert to_raw_sample({**row, "safer_response_id": None}) == expected
    assert reason_of({**row, "better_response_id": -1}) == "'better_response_id' is not 0 or 1"


def test_beavertails_columns_are_a_demonstration_with_its_safety():
    row = {"prompt": "q", "response": "a", "category": {"violence": True}, "is_safe": False}
    assert to_raw_sample(row) == {"input": "q", "answer": "a", "is_safe": False}


def test_transcripts_are_a_pair():
    prompt = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    row = {"chosen": prompt + " yes", "rejected": prompt + " no"}
    expected = {"input": ["q", "a", "r"], "answer": "yes", "other_answer": "no", "better": True}
    assert to_raw_sample(row) == expected
    assert reason_of({**row, "chosen": prompt + " "}) == "empty answer"
    assert reason_of({"chosen": "yes", "rejected": "no"}) == "two answers without a prompt"


def test_kto_s_label_is_for_the_last_answer():
    messages = [QUESTION, REFUSAL, QUESTION, ANSWER]
    sample = to_raw_sample({"messages": messages, "label": False})
    question, refusal = QUESTION["content"], REFUSAL["content"]
    assert sample["input"] == [question, refusal, question]
    assert sample["answer"] == ANSWER["content"]
    assert sample["label"] is False
    assert "dialogue" in to_raw_sample({"messages": messages, "label": "cooking"})


def test_an_empty_system_message_is_kept_and_an_empty_system_column_is_not():
    """Qwen2.5's template writes a system message of its own where there is none."""
    message = {"role": "system", "content": ""}
    assert to_raw_sample({"messages": [message, QUESTION, ANSWER]})["system"] == ""
    assert "system" not in to_raw_sample({"messages": [QUESTION, ANSWER], "system": ""})
    sample = to_raw_sample({"prompt": [QUESTION], "system": "You are brief."})
    assert sample["system"] == "You are brief."


@pytest.mark.parametrize("tools", [None, [], "", "[]", " null "])
def test_an_empty_list_of_tools_is_none(tools):
    assert "dialogue" in to_raw_sample({"messages": [QUESTION, ANSWER], "tools": tools})


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [QUESTION, ANSWER], "tools": [{"name": "f"}]}, "a list of tools"),
        ({"messages": [QUESTION, ANSWER], "tools": '[{"name": "f"}]'}, "a list of tools"),
        ({"messages": [ANSWER]}, "the assistant begins"),
        ({"messages": [QUESTION, ANSWER, ANSWER]}, "two assistant messages in a row"),
        ({"messages": []}, "no message of the user's"),
        ({"messages": None}, "messages that are not a list"),
        ({"messages": ["q", "a"]}, "a message that is not an object"),
        ({"prompt": [QUESTION, ANSWER]}, "the prompt ends with the assistant's message"),
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": 3}, "the prompt is not a text"),
        ({"prompt": "q", "completion": [QUESTION]}, "an answer that is not the assistant's"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "empty answer"),
        ({"prompt": "q", "chosen": ["a"] * 3, "rejected": ["b"] * 3}, "RM-Bench's three chosen"),
        ({"prompt": "q", "chosen": ["a"] * 3, "rejected": ["b"] * 2}, "a message that is not"),
        ({"instruction": "q", "output": ["a", "b"], "history": 3}, "a history that is not a list"),
        ({"input": "q", "preferred_output": [], "non_preferred_output": []}, "an input that is"),
        ({"prompt": "q", "chat_template_kwargs": "{}"}, "'chat_template_kwargs' is not an object"),
    ],
)
def test_a_reason_says_what_is_wrong(row, reason):
    assert reason_of(row).startswith(reason)


def test_weights_that_only_some_answers_have_are_refused():
    answers = [{**ANSWER, "weight": 1}, {**ANSWER, "weight": 0}, {**ANSWER, "weight": 1}]
    messages = []
    for answer in answers:
        messages += [QUESTION, answer]
    reason = "weights for neither all answers nor the last one only"
    assert reason_of({"messages": messages}) == reason
    assert reason_of({"messages": messages[:4]}) == reason


def test_a_variable_that_is_null_in_a_table_is_not_set():
    row = {"prompt": "q", "chat_template_kwargs": {"enable_thinking": False, "date": None}}
    assert to_raw_sample(row)["chat_template_kwargs"] == {"enable_thinking": False}
    row["chat_template_kwargs"] = {"date": None}
    assert to_raw_sample(row) == {"input": "q"}


def test_layouts_of_one_prompt_have_one_key():
    names = ["trl messages", "trl prompt only", "trl preference, explicit", "alpaca", "sharegpt"]
    keys = {make_prompt_key(to_raw_sample(CASES[name]["row"])) for name in names[:-1]}
    assert len(keys) == 1
    assert make_prompt_key(to_raw_sample(CASES["sharegpt"]["row"])) not in keys


# ---- hostile rows, and speed ----

NAMES = sorted(set().union(*(keys for keys, _ in LAYOUTS)))
NAMES += ["system", "tools", "label", "chat_template_kwargs", "history", "score_chosen"]
FIELDS = ["role", "from", "content", "value", "type", "text", "weight", "tool_calls", "messages"]
WORDS = ["user", "assistant", "system", "text", "\n\nHuman: q\n\nAssistant: a", " ", ""]
scalars = st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.sampled_from(WORDS)


def nest(values):
    return st.lists(values, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), values)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.recursive(scalars, nest, max_leaves=12)))
def test_whatever_a_row_has_it_is_read_or_dropped_with_a_reason(record):
    try:
        sample = to_raw_sample(record)
    except ValueError as error:
        assert len(str(error)) < 100
        assert "\n" not in str(error)
        return
    assert isinstance(sample, dict)


def test_ten_thousand_rows_are_read_in_a_fraction_of_a_second():
    own = {"input": "q", "answer": "a", "other_answer": "b", "better": True}
    published = CASES["ultrafeedback_binarized"]["row"]
    begin = time.perf_counter()
    for _ in range(10_000):
        to_raw_sample(own)
        to_raw_sample(published)
    assert time.perf_counter() - begin < 2


def test_turns_of_our_own_rows_may_be_messages():
    user = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    system = {"role": "system", "content": "Be brief."}
    assert to_raw_sample({"input": [system, user], "answer": "a"}) == {
        "system": "Be brief.",
        "input": ["q"],
        "answer": "a",
    }
    assert to_raw_sample({"dialogue": [user, answer]}) == {"dialogue": ["q", "a"]}
    with pytest.raises(ValueError, match="two user messages"):
        to_raw_sample({"dialogue": [user, user]})


def test_an_instruction_alone_is_a_prompt():
    assert to_raw_sample({"instruction": "q", "dataset": "x"}) == {"input": "q"}
