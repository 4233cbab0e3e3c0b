"""Safe-RLHF's prompt template: a conversation -> token ids, and which of them carry loss.

    <s>BEGINNING OF CONVERSATION: USER: hi ASSISTANT:hello</s>USER: and now? ASSISTANT:

A conversation is a list of turns (texts), the user's first, then the assistant's, and so on."""

from functools import partial
from itertools import groupby, zip_longest
from typing import NamedTuple

import numpy as np

# The one definition of the template. A later pair of turns repeats it from USER: on.
PROMPT_BEGIN = "BEGINNING OF CONVERSATION: "
PROMPT_TURN = "USER: {input} ASSISTANT:"


class Segment(NamedTuple):
    """One turn of the user's, in the template, and the assistant's answer to it."""

    prompt: str
    answer: str | None  # None where the assistant has yet to speak


class EncodedConversation(NamedTuple):
    ids: list  # token ids
    loss_mask: list  # 1 on the assistant's tokens, EOS included; else 0


def split_into_segments(turns):
    """The Segments of a conversation, one for each turn of the user's."""
    segments = []
    for turn, answer in zip_longest(turns[::2], turns[1::2]):
        prompt = PROMPT_TURN.replace("{input}", turn)
        if not segments:
            prompt = PROMPT_BEGIN + prompt
        segments.append(Segment(prompt, answer))
    return segments


def encode_conversation(turns, tokenizer, lookup=None):
    """The EncodedConversation of a conversation.

    An answer is tokenised together with its prompt, unless tokens would merge across the border.
    Nothing that a user writes becomes a special token.

    lookup  a function from a text to its ids, where the texts are tokenised already"""
    if lookup is None:
        lookup = partial(tokenizer.encode, allow_special=False)
    ids = tokenizer.encode("", bos=True)
    loss_mask = [0] * len(ids)
    for prompt, answer in split_into_segments(turns):
        prompt_ids = lookup(prompt)
        ids += prompt_ids
        loss_mask += [0] * len(prompt_ids)
        if answer is None:
            continue
        joint_ids = lookup(prompt + answer)
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            answer_ids = joint_ids[len(prompt_ids) :]
        else:
            answer_ids = tokenizer.encode_suffix(answer)
        ids += [*answer_ids, tokenizer.eos_id]
        loss_mask += [1] * (len(answer_ids) + 1)
    return EncodedConversation(ids, loss_mask)


def retokenize(ids, source, target):
    """A conversation's ids in another tokenizer, as an array.

    The text between two ends of sequence is decoded by `source` and encoded by `target`."""

    def is_end(id):
        return id in source.eos_ids

    new_ids = target.encode("", bos=True)
    for ends, run in groupby(map(int, ids), is_end):
        run = list(run)
        if ends:
            new_ids += [target.eos_id] * len(run)
        else:
            new_ids += target.encode(source.decode(run), allow_special=False)
    return np.array(new_ids)
