"""Rows -> conversations -> token ids: what each task takes from a row, why a row is dropped."""

from itertools import groupby, zip_longest

import numpy as np


# The one definition of the template. A dialogue repeats it from USER: on.
PROMPT_BEGIN = "BEGINNING OF CONVERSATION: "


PROMPT_TURN = "USER: {input} ASSISTANT:"


def split_into_segments(turns):
    """[(prompt text, answer or None)] of a conversation, one for each pair of turns."""
    prompts = [
        (PROMPT_BEGIN if i == 0 else "") + PROMPT_TURN.replace("{input}", turn)
        for i, turn in enumerate(turns[::2])
    ]
    return list(zip_longest(prompts, turns[1::2]))


def encode_conversation(turns, tokenizer, lookup=None):
    """Token ids of a conversation, and a mask: 1 on what an assistant says and its EOS.

    <s>BEGINNING OF CONVERSATION: USER: hi ASSISTANT:hello</s>USER: ... ; nothing a user writes
    becomes a special token. An answer is tokenised with its prompt, unless tokens would merge."""
    lookup = lookup or (lambda text: tokenizer.encode(text, allow_special=False))
    ids = tokenizer.encode("", bos=True)
    mask = [0] * len(ids)
    for prompt, answer in split_into_segments(turns):
        prompt_ids = lookup(prompt)
        n = len(prompt_ids)
        ids += prompt_ids
        mask += [0] * n
        if answer is not None:
            joint = lookup(prompt + answer)
            answer_ids = joint[n:] if joint[:n] == prompt_ids else tokenizer.encode_suffix(answer)
            ids += [*answer_ids, tokenizer.eos_id]
            mask += [1] * (len(answer_ids) + 1)
    return ids, mask


def retokenize(ids, source, target):
    """A conversation's ids in another tokenizer: piece by piece between the ends of sequence."""
    out = target.encode("", bos=True)
    for ends, piece in groupby(map(int, ids), lambda i: i in source.eos_ids):
        piece = list(piece)
        out += (
            [target.eos_id] * len(piece)
            if ends
            else target.encode(source.decode(piece), allow_special=False)
        )
    return np.array(out)
