"""Rows as they are published -> nanosafe's rows: RawSample, which examples.py describes.

A layout is known by the keys of its rows, of which some may be missing where it says "perhaps":

    nanosafe                    input, perhaps answer or answers; dialogue; texts (documents)
    TRL, OpenAI                 messages
    TRL                         prompt, perhaps completion; a label beside it (KTO)
    TRL, UltraFeedback          chosen, rejected, perhaps prompt; RewardBench's pairs, too
    RM-Bench                    prompt, and chosen and rejected, of each of which there are three
    OpenAI                      input (an object), preferred_output, non_preferred_output
    ShareGPT                    conversations; LLaMA-Factory's pairs have chosen, rejected as well
    Alpaca                      instruction, output or chosen and rejected, perhaps input, history
    hh-rlhf                     chosen, rejected: transcripts
    PKU-SafeRLHF, BeaverTails   prompt, and response_0 and response_1 or response

LAYOUTS has the function that reads each, and says which layout it is where several fit. Such a
function returns a new row, or raises ValueError with the reason to drop this one. Besides
RawSample's fields a new row may have

    system                  what the system says before the first turn
    chat_template_kwargs    an object with further variables of the chat template
    label                   whether `answer` is desirable (KTO): true or false"""

import re
from typing import NamedTuple

# ---- words of the layouts ----

ROLES = {
    "user": "user",
    "human": "user",  # ShareGPT
    "assistant": "assistant",
    "gpt": "assistant",  # ShareGPT, and the three below as well
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it
}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
LABEL_KEYS = ("label", "kto_tag")  # TRL's, and LLaMA-Factory's
LABEL_TEXTS = {"true": True, "false": False}  # as a table's export may spell them, in any case
MEDIA = {  # the type of a part of a message -> what to call it
    "image": "an image",
    "image_url": "an image",
    "input_image": "an image",
    "audio": "a sound",
    "input_audio": "a sound",
    "video": "a video",
    "video_url": "a video",
    "file": "a file",
}
TRANSCRIPT_BEGIN = "\n\nHuman:"
SPEAKER = re.compile(r"\n\n(Human|Assistant):")


class Conversation(NamedTuple):
    system: str | None
    turns: list  # texts: the user's, the assistant's, and so on
    weights: list  # of each of the assistant's turns: whether it is learnt, 1 or 0


class TranscriptPair(NamedTuple):
    turns: list  # the prompt: texts, the last one the user's
    answer: str
    other_answer: str


# ---- demonstrations and prompts ----


def read_messages(record):
    """TRL's and OpenAI's `messages`: a dialogue, or a prompt if the user has the last word."""
    conversation = read_conversation(record["messages"])
    return make_demonstration(conversation, record)


def read_sharegpt(record):
    """ShareGPT's `conversations`. As FastChat does, leave out an answer that comes before any
    question, and a last question that has no answer."""
    messages = check_messages(record["conversations"])
    conversation = read_conversation(leave_out_first_answer(messages))
    turns = conversation.turns
    if len(turns) % 2 == 1 and len(turns) > 1:
        conversation = conversation._replace(turns=turns[:-1])
    return make_demonstration(conversation, record)


def leave_out_first_answer(messages):
    """The messages without the assistant's, if it is the first besides the system's."""
    for i, message in enumerate(messages):
        role = read_role(message)
        if role == "assistant":
            return messages[:i] + messages[i + 1 :]
        if role != "system":
            return messages
    return messages


def read_completion(record):
    """TRL's `prompt` and `completion`, texts or lists of messages; with KTO's `label`, or not."""
    return read_prompt_and_answer(record, "completion")


def read_response(record):
    """BeaverTails' `prompt` and `response`, and whether the response is safe."""
    sample = read_prompt_and_answer(record, "response")
    if "is_safe" in record:
        sample["is_safe"] = record["is_safe"]
    return sample


def read_prompt_and_answer(record, key):
    """The row of a prompt, and of the answer that stands under `key`."""
    sample = make_prompt(read_prompt_turns(record["prompt"]))
    sample["answer"] = read_answer(record[key])
    return add_label(sample, record)


def read_prompt(record):
    """TRL's `prompt`, a text or a list of messages that ends with the user's."""
    return make_prompt(read_prompt_turns(record["prompt"]))


def read_instruction(record):
    """Alpaca's instruction without an output: a prompt."""
    return make_prompt(read_alpaca_prompt(record))


def read_alpaca(record):
    """Alpaca's instruction, input and output, and perhaps earlier turns, which are learnt too."""
    conversation = read_alpaca_prompt(record)
    turns = conversation.turns
    answer = read_text(record["output"], "answer")
    if len(turns) > 1 and find_label(record) is None:
        return {"dialogue": [*turns, answer]}
    sample = make_prompt(conversation)
    sample["answer"] = answer
    return add_label(sample, record)


# ---- pairs ----


def read_pair(record):
    """`chosen` and `rejected`: two answers to `prompt`, or two whole conversations.

    Conversations are lists of messages, as TRL's (implicit prompts) and UltraFeedback's, or
    Anthropic's transcripts. What they have in common must be all but the last answer."""
    check_scores_differ(record)
    if is_rm_bench(record):
        raise ValueError("RM-Bench's three chosen and three rejected answers, which are for a test")
    chosen = record["chosen"]
    rejected = record["rejected"]
    prompt = record.get("prompt")
    if isinstance(chosen, str) and chosen.startswith(TRANSCRIPT_BEGIN):
        pair = read_transcripts(chosen, rejected)
        conversation = Conversation(None, pair.turns, [])
        return make_pair(conversation, pair.answer, pair.other_answer)
    if not isinstance(prompt, list) and is_whole_conversation(chosen):
        return read_conversation_pair(chosen, rejected)
    if prompt is None:
        raise ValueError("two answers without a prompt")
    conversation = read_prompt_turns(prompt)
    return make_pair(conversation, read_answer(chosen), read_answer(rejected))


def read_conversation_pair(chosen, rejected):
    """The pair of two whole conversations, of which the first is preferred."""
    chosen = read_conversation(chosen)
    rejected = read_conversation(rejected)
    for conversation in (chosen, rejected):
        if len(conversation.turns) % 2 == 1:
            raise ValueError("the last message is the user's")
    *prompt, answer = chosen.turns
    *other_prompt, other_answer = rejected.turns
    if prompt != other_prompt or chosen.system != rejected.system:
        raise ValueError("the two conversations differ before the last answer")
    return make_pair(chosen._replace(turns=prompt), answer, other_answer)


def is_rm_bench(record):
    """Whether a row has RM-Bench's three chosen answers, and as many rejected ones."""
    if not isinstance(record, dict) or "prompt" not in record:
        return False
    for key in ("chosen", "rejected"):
        answers = record.get(key)
        if not isinstance(answers, list) or len(answers) != 3:
            return False
        for answer in answers:
            if not isinstance(answer, str):
                return False
    return True


def split_rm_bench(record):
    """The nine pairs of an RM-Bench row: {(i, j): a row with `chosen` i and `rejected` j}.

    i and j are styles: 0 is concise, 1 detailed, 2 detailed with Markdown. arXiv:2410.16184."""
    pairs = {}
    for i, chosen in enumerate(record["chosen"]):
        for j, rejected in enumerate(record["rejected"]):
            pairs[i, j] = {**record, "chosen": chosen, "rejected": rejected}
    return pairs


def read_openai_pair(record):
    """OpenAI's preferences: `input` is an object that holds the messages of the prompt."""
    request = record["input"]
    if not isinstance(request, dict):
        raise ValueError("an input that is not an object with messages")
    check_tools(request)
    conversation = read_prompt_turns(check_messages(request.get("messages")))
    answer = read_answer(record["preferred_output"])
    other_answer = read_answer(record["non_preferred_output"])
    return make_pair(conversation, answer, other_answer)


def read_sharegpt_pair(record):
    """LLaMA-Factory's pairs: `chosen` and `rejected` are messages that follow conversations."""
    conversation = read_prompt_turns(check_messages(record["conversations"]))
    return make_pair(conversation, read_answer(record["chosen"]), read_answer(record["rejected"]))


def read_alpaca_pair(record):
    """LLaMA-Factory's pairs in Alpaca's layout: `chosen` and `rejected` instead of an output."""
    conversation = read_alpaca_prompt(record)
    return make_pair(conversation, read_answer(record["chosen"]), read_answer(record["rejected"]))


def read_safe_rlhf_pair(record):
    """PKU-SafeRLHF's columns: two responses, is each safe, and the numbers of those that win."""
    sample = make_prompt(read_prompt_turns(record["prompt"]))
    sample["answer"] = read_answer(record["response_0"])
    sample["other_answer"] = read_answer(record["response_1"])
    for name, key in (("is_safe", "is_response_0_safe"), ("is_other_safe", "is_response_1_safe")):
        if record.get(key) is not None:
            sample[name] = record[key]
    for name, key in (("better", "better_response_id"), ("safer", "safer_response_id")):
        number = record.get(key)
        if number is None:  # a release may lack one of the two
            continue
        if number not in (0, 1):
            raise ValueError(f"{key!r} is not 0 or 1")
        sample[name] = number == 0
    return sample


# ---- the table ----


def keep(record):
    """A row that is nanosafe's already. Its turns may be messages, as other layouts have them."""
    for key in ("input", "dialogue"):
        value = record.get(key)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            conversation = read_conversation(value)
            record = {**record, key: conversation.turns}
            if conversation.system is not None:
                record["system"] = conversation.system
    return record


LAYOUTS = (  # the first whose keys a row has; what has more keys comes before what has fewer
    ({"input", "answer"}, keep),  # RawSample
    ({"input", "answers"}, keep),  # RawSample, a ranking
    ({"dialogue"}, keep),  # RawSample
    ({"texts"}, keep),  # a document
    ({"input", "preferred_output", "non_preferred_output"}, read_openai_pair),
    ({"prompt", "response_0", "response_1"}, read_safe_rlhf_pair),
    ({"instruction", "chosen", "rejected"}, read_alpaca_pair),
    ({"instruction", "output"}, read_alpaca),
    ({"conversations", "chosen", "rejected"}, read_sharegpt_pair),
    ({"chosen", "rejected"}, read_pair),  # before messages: UltraFeedback has them as well
    ({"conversations"}, read_sharegpt),
    ({"messages"}, read_messages),  # before prompt: no_robots has it as well
    ({"input"}, keep),  # RawSample, a prompt
    ({"prompt", "completion"}, read_completion),
    ({"prompt", "response"}, read_response),
    ({"prompt"}, read_prompt),
    ({"instruction"}, read_instruction),  # AlpacaEval: a prompt
)


def to_raw_sample(record):
    """nanosafe's row of a published row: a dict, which is not changed.

    A row of nanosafe's own, or in no layout that is known, is returned as it is. Raises ValueError
    with the reason to drop a row that nanosafe's cannot express."""
    read = find_reader(record)
    if read is keep:
        return keep(record)
    check_tools(record)
    sample = read(record)
    add_template_variables(sample, record)
    system = record.get("system")  # a column that is empty where there is no system
    if "system" not in sample and isinstance(system, str) and system.strip():
        sample["system"] = system
    return sample


def find_reader(record):
    """The function of the table that reads a row; keep() for a row in no layout of it."""
    for keys, read in LAYOUTS:
        if record.keys() >= keys:
            return read
    return keep


# ---- messages ----


def read_conversation(messages):
    """The Conversation of a list of messages: the system's, perhaps, then user and assistant."""
    system = None
    turns = []
    weights = []
    for message in check_messages(messages):
        role = read_role(message)
        check_plain(message)
        if role == "system":
            if turns or system is not None:
                raise ValueError("a system message that is not the first")
            system = read_system(message)
            continue
        expected = "assistant" if len(turns) % 2 == 1 else "user"
        if role != expected:
            raise ValueError(f"two {role} messages in a row" if turns else "the assistant begins")
        turns.append(read_text(find_content(message), "turn"))
        if role == "assistant":
            weights.append(read_weight(message))
    if not turns:
        raise ValueError("no message of the user's")
    return Conversation(system, turns, weights)


def check_messages(messages):
    """The messages, if they are a list."""
    if not isinstance(messages, list):
        raise ValueError("messages that are not a list")
    return messages


def read_role(message):
    """user, assistant or system, whatever the layout calls it."""
    if not isinstance(message, dict):
        raise ValueError("a message that is not an object")
    role = message.get("role", message.get("from"))
    if role in TOOL_ROLES:
        raise ValueError("a tool call")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"the role {str(role)[:40]!r}")
    return ROLES[role]


def check_plain(message):
    """Raise ValueError where a message says more than its text does."""
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError("a tool call")
    for key in REASONING_KEYS:
        if message.get(key):
            raise ValueError("reasoning beside the answer")


def read_system(message):
    """The system's text. It may be empty, which keeps a chat template's own text away."""
    content = find_content(message)
    return content if content == "" else read_text(content, "system message")


def find_content(message):
    """What a message says: a text, or a list of parts."""
    return message.get("content", message.get("value"))


def read_text(content, name):
    """The text of a content: a text, or OpenAI's list of parts, which are joined by line ends."""
    if isinstance(content, list):
        content = "\n".join(read_part(part) for part in content)
    if content is None or content == "":
        raise ValueError(f"empty {name}")
    if not isinstance(content, str):
        raise ValueError(f"the {name} is not a text")
    if not content.strip():
        raise ValueError(f"empty {name}")
    return content


def read_part(part):
    """The text of a part of a content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ValueError("a part of a message that is not an object")
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(kind, str) and kind in MEDIA:
        raise ValueError(MEDIA[kind])
    raise ValueError("a part of a message that is not a text")


def read_weight(message):
    """Whether one of the assistant's messages is learnt: OpenAI's weight, 1 where there is none."""
    weight = message.get("weight")
    if weight is None:
        return 1
    if weight not in (0, 1):
        raise ValueError("a weight that is not 0 or 1")
    return int(weight)


def read_prompt_turns(prompt):
    """The Conversation of a prompt: a text, or a list of messages that ends with the user's."""
    if not isinstance(prompt, list):
        return Conversation(None, [read_text(prompt, "prompt")], [])
    conversation = read_conversation(prompt)
    if len(conversation.turns) % 2 == 0:
        raise ValueError("the prompt ends with the assistant's message")
    return conversation


def read_answer(answer):
    """The text of an answer: a text, one of the assistant's messages, or a list with one."""
    if isinstance(answer, list):
        if len(answer) > 1:
            raise ValueError("an answer of several messages")
        answer = answer[0] if answer else ""
    if isinstance(answer, dict):
        if read_role(answer) != "assistant":
            raise ValueError("an answer that is not the assistant's")
        check_plain(answer)
        answer = find_content(answer)
    return read_text(answer, "answer")


def is_whole_conversation(messages):
    """Whether a list of messages begins with a prompt, and not with an answer."""
    if not isinstance(messages, list) or not messages:
        return False
    return read_role(messages[0]) != "assistant"


# ---- Alpaca's fields, and transcripts ----


def read_alpaca_prompt(record):
    """The Conversation that Alpaca's output answers. Instruction and input are joined by a space,
    as Safe-RLHF does."""
    prompt = read_text(record["instruction"], "instruction")
    if record.get("input"):
        prompt += " " + read_text(record["input"], "input")
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError("a history that is not a list of pairs")
    turns = []
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("a history that is not a list of pairs")
        for text in pair:
            turns.append(read_text(text, "turn"))
    turns.append(prompt)
    return Conversation(None, turns, [])


def read_transcripts(chosen, rejected):
    r"""The TranscriptPair of two texts like "\n\nHuman: ...\n\nAssistant: ..." (hh-rlhf).

    The chosen one up to its last answer is the prompt; the rejected one must begin with it."""
    # Split at the marks: what is before the first one, then who speaks, what is said, and so on.
    pieces = SPEAKER.split(chosen)
    speakers = pieces[1::2]
    turns = pieces[2::2]
    if not speakers or speakers[-1] != "Assistant":
        raise ValueError("the last turn is the human's")
    prompt = chosen.removesuffix(turns[-1])
    if not isinstance(rejected, str) or not rejected.startswith(prompt):
        raise ValueError("the two dialogues differ before the last answer")
    if SPEAKER.search(rejected, len(prompt)):
        raise ValueError("the two dialogues differ before the last answer")
    if speakers != ["Human", "Assistant"] * (len(speakers) // 2):
        raise ValueError("the turns do not alternate")
    texts = [read_text(turn.strip(), "turn") for turn in turns[:-1]]
    answer = read_text(turns[-1].strip(), "answer")
    other_answer = read_text(rejected[len(prompt) :].strip(), "answer")
    return TranscriptPair(texts, answer, other_answer)


# ---- columns beside the conversation ----


def check_tools(record):
    """Raise ValueError where a row offers tools. An empty list, which may be JSON, offers none."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = tools.strip() not in ("", "[]", "null")
    if tools:
        raise ValueError("a list of tools")


def check_scores_differ(record):
    """Raise ValueError where UltraFeedback's scores say that no answer is better."""
    score = record.get("score_chosen")
    if score is not None and score == record.get("score_rejected"):
        raise ValueError("equal scores")


def find_label(record):
    """KTO's label, true or false; None where there is none, or a label of another kind."""
    for key in LABEL_KEYS:
        label = read_bool(record.get(key))
        if label is not None:
            return label
    return None


def read_bool(value):
    """true or false, 1 or 0, or the text "true" or "false" as a bool; None of anything else.

    Python's own truth would take "no", 2 and NaN for true."""
    if isinstance(value, str):
        value = LABEL_TEXTS.get(value.strip().lower())
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    return None


def add_label(sample, record):
    """The row with KTO's label, if the published one has it."""
    label = find_label(record)
    if label is not None:
        sample["label"] = label
    return sample


def add_template_variables(sample, record):
    """Take over `chat_template_kwargs`. In a table, null stands for a variable that is not set."""
    variables = record.get("chat_template_kwargs")
    if not variables:
        return
    if not isinstance(variables, dict):
        raise ValueError("'chat_template_kwargs' is not an object")
    given = {name: value for name, value in variables.items() if value is not None}
    if given:
        sample["chat_template_kwargs"] = given


# ---- nanosafe's rows ----


def begin_sample(conversation):
    """A row with what the system says, if it says something."""
    return {} if conversation.system is None else {"system": conversation.system}


def make_prompt(conversation):
    """The row of a Conversation that ends with the user's turn."""
    sample = begin_sample(conversation)
    turns = conversation.turns
    sample["input"] = turns[0] if len(turns) == 1 else turns
    return sample


def make_pair(conversation, answer, other_answer):
    """The row of two answers to a Conversation, of which the first is better."""
    sample = make_prompt(conversation)
    sample["answer"] = answer
    sample["other_answer"] = other_answer
    sample["better"] = True
    return sample


def make_demonstration(conversation, record):
    """The row of a Conversation: a dialogue, of which every answer is learnt; an input and its
    answer, of which only the last is; or an input, where the user has the last word."""
    turns = conversation.turns
    if len(turns) % 2 == 1:
        return make_prompt(conversation)
    *earlier_weights, last_weight = conversation.weights
    is_all_learnt = last_weight == 1 and 0 not in earlier_weights
    is_last_learnt = last_weight == 1 and 1 not in earlier_weights
    if not is_all_learnt and not is_last_learnt:
        raise ValueError("weights for neither all answers nor the last one only")
    if is_all_learnt and find_label(record) is None:
        sample = begin_sample(conversation)
        sample["dialogue"] = turns
        return sample
    sample = make_prompt(conversation._replace(turns=turns[:-1]))
    sample["answer"] = turns[-1]
    return add_label(sample, record)
