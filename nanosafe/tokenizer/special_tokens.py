"""The Tokenizer: an engine that knows plain text, and the special tokens around it.

A text is first cut at its special and added tokens. What lies between them goes to an engine:
SentencePiece (spm.py), or byte-pair encoding in Python (bpe.py)."""

import hashlib
import json
import os
import shutil
from functools import cached_property
from typing import NamedTuple

from nanosafe.errors import stop
from nanosafe.storage import read_json, write_json
from nanosafe.tokenizer.chat_template import ChatTemplate, match_any

MARK = "\u2581"  # how SentencePiece writes a space
# Unicode's White_Space. Python's str.isspace() knows four more characters.
WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680"
    "\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token")  # of tokenizer_config.json
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# Keys of tokenizer_config.json: the model's own code, and the template, which save() writes itself.
NOT_EXPORTED = ("auto_map", "chat_template")


class Token(NamedTuple):
    """A special or added token. It is found in a text before the engine sees the text."""

    id: int
    special: bool = True  # it decodes to nothing
    lstrip: bool = False  # it takes the white space before it along
    rstrip: bool = False  # it takes the white space after it along
    normalized: bool = False  # it is searched for in the text that the engine has normalized


class Segment(NamedTuple):
    """Plain text, and the added token that follows it, in a longer text."""

    text: str
    token_id: int | None  # None at the end of the longer text
    begin: int  # where the plain text begins in the longer one
    token_begin: int  # where the token begins
    token_end: int  # where its text ends
    end: int  # where the white space ends that it takes along


class Conversation(NamedTuple):
    """A conversation in token ids."""

    ids: list
    loss_mask: list  # 1 on the assistant's tokens, the end of turn included; else 0


def check_added_token(entry, source):
    """Raise ValueError if an added token is not described as tokenizer.json does it.

    source  the name of the file, for messages"""
    if not isinstance(entry, dict):
        raise ValueError(f"{source}: the added token {entry!r} is not an object")
    if not isinstance(entry.get("content"), str) or not isinstance(entry.get("id"), int):
        raise ValueError(f"{source}: an added token needs a content and an id, not {entry!r}")


def read_added_token(entry, source):
    """The text and the Token of an added token. Raises ValueError as check_added_token() does."""
    check_added_token(entry, source)
    text = entry["content"]
    if entry.get("single_word"):
        stop(f"{source}: single_word, of {text!r}, is not supported")
    token = Token(
        entry["id"],
        special=bool(entry.get("special")),
        lstrip=bool(entry.get("lstrip")),
        rstrip=bool(entry.get("rstrip")),
        normalized=bool(entry.get("normalized")),
    )
    return text, token


def read_added_tokens(spec, first_id=0):
    """{text: Token} of the added tokens in a tokenizer.json whose ids are first_id or higher."""
    entries = spec.get("added_tokens") or []
    if not isinstance(entries, list):
        raise ValueError(f"tokenizer.json: added_tokens is {entries!r}, not a list")
    added = {}
    for entry in entries:
        check_added_token(entry, "tokenizer.json")
        if entry["id"] >= first_id:
            text, token = read_added_token(entry, "tokenizer.json")
            added[text] = token
    return added


def read_token_text(value):
    """The text of a special token that a JSON file gives as a string, or as an object, or as null.

    Raises ValueError on anything else."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ValueError(f"the special token {value!r} is neither a text nor an object with one")
    return text


class Tokenizer:
    """Encodes texts and decodes ids, with an engine and added tokens.

    engine   a SentencePieceEngine or a BPEEngine
    added    {text: Token}, the special tokens among them
    names    what tokenizer_config.json and special_tokens_map.json say: which is the eos_token, ..
    eos_ids  further ids that end a sequence
    file     the path of the tokenizer file

    It offers bos_id, eos_id and pad_id (-1 where there is none), eos_ids (sorted), and vocab_size
    (the highest id plus one). With a chat template (use_template), it also encodes conversations:
    end_of_turn_id is what ends an answer, and belongs to eos_ids."""

    def __init__(self, engine, added=None, names=None, eos_ids=(), file=None):
        self.engine = engine
        self.added = added or {}
        self.names = names or {}
        self.file = file
        self.contents = {token.id: text for text, token in self.added.items()}
        self.vocab_size = max([engine.size - 1, *self.contents]) + 1
        self.encode_batch = engine.encode_batch  # many texts at once, without special tokens
        self.template = None
        self.compile_added_tokens()

        self.bos_id = self.find_special_id("bos_token")
        self.eos_id = self.find_special_id("eos_token")
        self.pad_id = self.find_special_id("pad_token")
        further = []
        for id in eos_ids:  # some old folders name BOS, or -1, as an end of sequence
            if 0 <= id < self.vocab_size and id != self.bos_id:
                further.append(id)
        if self.eos_id < 0 and further:
            self.eos_id = further[0]
        self.eos_ids = sorted({self.eos_id, *further})
        self.end_of_turn_id = self.eos_id

    def use_template(self, source, origin, note=""):
        """Take the source of a chat template as this tokenizer's.

        origin  where it comes from, for messages
        note    what to say when a conversation is first encoded"""
        special = {}
        for key, value in self.names.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                special[key] = text
        ids = (self.bos_id, self.eos_id, self.pad_id)
        for key, id in zip(SPECIAL_KEYS, ids):
            if id in self.contents:
                special.setdefault(key, self.contents[id])
        normalize = self.engine.normalize if self.has_normalized_tokens else None
        self.template = ChatTemplate(source, origin, special, self.added, note, normalize)
        token = self.template.end_of_turn_token
        if token:
            self.end_of_turn_id = self.added[token].id
            self.eos_ids = sorted({*self.eos_ids, self.end_of_turn_id})

    def find_special_id(self, key):
        """The id of the token that the folder, or else the engine, names as `key`; -1 for none."""
        for text in (read_token_text(self.names.get(key)), self.engine.defaults.get(key)):
            if text in self.added:
                return self.added[text].id
        return -1

    def compile_added_tokens(self):
        """Make the expressions that find added tokens in a text, before and after normalizing."""
        raw = []
        normalized = []
        for text, token in self.added.items():
            if token.normalized:
                normalized.append(text)
            else:
                raw.append(text)
        self.raw_expression = match_any(raw)
        self.normalized_expression = match_any(normalized)
        self.has_normalized_tokens = bool(normalized)

    def encode(self, text, bos=False, eos=False, allow_special=True):
        """Token ids of `text`.

        bos            begin as the model's texts begin: with BOS, where the model has one
        eos            end with EOS
        allow_special  False: the text of a special token stays text, as it must in user input"""
        ids = []
        if bos and self.engine.adds_bos and self.bos_id >= 0:
            ids.append(self.bos_id)
        if allow_special:
            for i, segment in enumerate(self.split_at_added_tokens(text)):
                if segment.text:
                    ids += self.engine.encode(segment.text, self.begins_words(i))
                if segment.token_id is not None:
                    ids.append(segment.token_id)
        elif text:
            ids += self.engine.encode(text, plain=True)
        if eos:
            ids.append(self.eos_id)
        return ids

    def encode_suffix(self, text):
        """Token ids of plain text that continues another text: no space is put in front."""
        return self.engine.encode(text, begins=False, plain=True)

    def begins_words(self, i):
        """Whether the engine treats the i-th piece between added tokens as a text's beginning."""
        return i == 0 or self.engine.legacy

    def conversation(self, turns, reply=True, **options):
        """The token ids of a conversation in the model's chat template, and its loss mask.

        turns    {"role": "system", "user" or "assistant", "content": text}, in order
        reply    end where the assistant begins to speak (or goes on to speak, if the last turn is
                 its own); False: the conversation is finished
        options  further variables of the template, such as enable_thinking

        Nothing in the turns becomes a special token. The ids are those of transformers, unless a
        token would reach from a prompt into its answer: such an answer is encoded by itself, as the
        model will say it. Raises ValueError where the template refuses the turns."""
        self.template.check()
        rendered = self.template.render(turns, reply, options)
        ids = []
        loss_mask = []
        for i, segment in enumerate(self.split_at_added_tokens(rendered.text)):
            text = rendered.restore(segment.text)
            if text:
                answers = rendered.answers_in(segment.begin, segment.begin + len(text))
                encoded = self.encode_around_answers(text, self.begins_words(i), answers)
                ids += encoded.ids
                loss_mask += encoded.loss_mask
            if segment.token_id is not None:
                # By generation tags, white space that a token takes along counts, as it does in
                # transformers; by our own spans it does not, because the token is no answer.
                has_tags = self.template.has_generation_tags
                end = segment.end if has_tags else segment.token_end
                answers = rendered.answers_in(segment.token_begin, end)
                ids.append(segment.token_id)
                loss_mask.append(1 if answers else 0)
        return Conversation(ids, loss_mask)

    def finished_conversation(self, turns, **options):
        """conversation() of turns of which the last is the assistant's, through its end of turn.

        What the template writes behind that, a new line for example, is never generated: a model
        is neither trained on it nor scored at it."""
        ids, loss_mask = self.conversation(turns, reply=False, **options)
        if self.end_of_turn_id not in ids:
            raise ValueError("the chat template writes no end of turn")
        end = len(ids) - ids[::-1].index(self.end_of_turn_id)
        return Conversation(ids[:end], loss_mask[:end])

    def encode_around_answers(self, text, begins, answers):
        """The Conversation of a piece of plain text.

        begins   as of the engine's encode()
        answers  the Spans of it that the assistant says"""
        ids = self.engine.encode(text, begins, plain=True)
        loss_mask = [0] * len(ids)
        for answer in answers:
            first = 0
            last = len(ids)
            if answer.begin > 0:
                before = self.engine.encode(text[: answer.begin], begins, plain=True)
                first = len(before)
                if ids[:first] != before:  # a token reaches from the prompt into the answer
                    return self.encode_apart(text, begins, answers, answer.begin)
            if answer.end < len(text):
                until = self.engine.encode(text[: answer.end], begins, plain=True)
                last = len(os.path.commonprefix([ids, until]))
                if last < len(until):  # a token reaches from the answer into what follows
                    last += 1
            loss_mask[first:last] = [1] * (last - first)
        return Conversation(ids, loss_mask)

    def encode_apart(self, text, begins, answers, border):
        """encode_around_answers() of the text before the border, and of the text behind it."""
        before = [answer.within(0, border) for answer in answers]
        behind = [answer.within(border, len(text)) for answer in answers]
        left = self.encode_around_answers(text[:border], begins, list(filter(None, before)))
        right = self.encode_around_answers(text[border:], False, list(filter(None, behind)))
        return Conversation(left.ids + right.ids, left.loss_mask + right.loss_mask)

    def split_at_added_tokens(self, text):
        """The Segments of a text. Tokens that are found before normalizing come first."""
        whole = Segment(text, None, 0, len(text), len(text), len(text))
        segments = self.split_segment(whole, self.raw_expression)
        if self.has_normalized_tokens:
            raw_segments = segments
            segments = []
            for segment in raw_segments:
                normalized = segment._replace(text=self.engine.normalize(segment.text))
                segments += self.split_segment(normalized, self.normalized_expression)
        return [x for x in segments if x.text or x.token_id is not None]

    def split_segment(self, segment, expression):
        """Cut a Segment at each added token that the expression finds in its text."""
        text = segment.text
        segments = []
        begin = 0
        for match in expression.finditer(text):
            if match.start() < begin:  # white space that the token before it took along
                continue
            token = self.added[match[0]]
            before = text[begin : match.start()]
            if token.lstrip:
                before = before.rstrip(WHITE_SPACE)
            end = match.end()
            if token.rstrip:
                after = text[end:]
                end += len(after) - len(after.lstrip(WHITE_SPACE))
            offset = segment.begin
            token_begin, token_end = offset + match.start(), offset + match.end()
            segments.append(
                Segment(before, token.id, offset + begin, token_begin, token_end, offset + end)
            )
            begin = end
        segments.append(segment._replace(text=text[begin:], begin=segment.begin + begin))
        return segments

    def decode(self, ids):
        """The text of `ids`, without special tokens and without ids that have no token."""
        text = ""
        run = []  # ids of the engine, which decodes them together
        for id in map(int, ids):
            added_text = self.contents.get(id)
            if added_text is None:
                if id < self.engine.size:
                    run.append(id)
            elif not self.added[added_text].special:
                text += self.engine.decode(run, begins=not text) + added_text
                run = []
        return text + self.engine.decode(run, begins=not text)

    @property
    def identity(self):
        """A text that is equal for tokenizers that give every conversation the same ids."""
        return json.dumps([self.fingerprint, self.template and self.template.identity])

    @cached_property
    def fingerprint(self):
        """A hash that is equal for tokenizers that give every text the same ids."""
        settings = [
            sorted(self.added.items()),
            self.engine.legacy,
            self.engine.adds_bos,
            self.bos_id,
            self.eos_id,
        ]
        return hashlib.blake2b(self.engine.identity + json.dumps(settings).encode()).hexdigest()

    def save(self, path):
        """Write the tokenizer's files to a folder, without what needs a model's own code.

        The chat template is written into tokenizer_config.json, and nowhere else: transformers and
        llama.cpp disagree on which of two places counts, but both read this one."""
        os.makedirs(path, exist_ok=True)
        folder = os.path.dirname(self.file)
        standard_name = "tokenizer" + os.path.splitext(self.file)[1]
        for name in self.engine.files:
            source = os.path.join(folder, name)
            if name == standard_name:  # the file itself may have another name
                source = self.file
            target = os.path.join(path, name)
            if os.path.isfile(source) and os.path.abspath(source) != os.path.abspath(target):
                shutil.copyfile(source, target)
        self.engine.save(self, path)
        if self.template:
            config = read_json(path, "tokenizer_config.json")
            write_json(
                {**config, "chat_template": self.template.source}, path, "tokenizer_config.json"
            )


# ---- control tokens: pretraining with human preferences (PHF), arXiv:2302.08582 ----

ALIGNED = "<|aligned|>"
MISALIGNED = "<|misaligned|>"
CONTROL_TOKENS = (ALIGNED, MISALIGNED)


def add_control_tokens(tok):
    """A tokenizer with the control tokens behind its other tokens."""
    missing = [text for text in CONTROL_TOKENS if text not in tok.added]
    added = dict(tok.added)
    for i, text in enumerate(missing):
        added[text] = Token(tok.vocab_size + i)
    others = tok.names.get("additional_special_tokens") or []
    names = {**tok.names, "additional_special_tokens": [*others, *missing]}
    extended = Tokenizer(tok.engine, added, names, tok.eos_ids, tok.file)
    if tok.template:
        extended.use_template(tok.template.source, tok.template.origin, tok.template.note)
    return extended


def control_token_ids(tokenizer):
    """The ids of the control tokens, which are never sampled; [] without control tokens."""
    return [tokenizer.added[text].id for text in CONTROL_TOKENS if text in tokenizer.added]
