"""Chat templates: a conversation -> the text that a model was trained to read, and where in it the
assistant speaks.

A conversation is a list of turns, {"role": ..., "content": ...}; the roles are system, user and
assistant. A model folder brings its template along, a small program in Jinja, which transformers,
vLLM and llama.cpp run. It is run here with the same functions and options, in a sandbox.

Two things are not left to the template:

Special tokens.  What people write must never become a special token. The template puts their words
    and its own tokens into one text, so their words are disguised before: the first character of
    everything in them that reads like a special token, or like a part of one at their borders, is
    replaced by one that nobody uses, and is put back only when the text has been cut at its
    special tokens. (A template that changes letters, by lower() for example, could still make one.)
Where the assistant speaks.  Templates that say so, with {% generation %}, are believed. In the
    others, a turn of the assistant's is what follows the text that invites it: the conversation
    before the turn is rendered as a prompt, and must be the beginning of the whole text. Some
    templates rewrite earlier turns (Qwen3 drops their thinking). Such a turn is not what the model
    would have said there, so that it carries no loss."""

import json
import os
import re
from datetime import datetime
from functools import cached_property
from typing import NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanosafe.errors import one_line_errors, stop
from nanosafe.printing import say_once

SHIPPED_FOLDER = os.path.join(os.path.dirname(__file__), "templates")
SHIPPED = ("safe_rlhf", "chatml", "llama3")  # the names of our own templates
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder with NAME.jinja
ROLES = ("system", "developer", "user", "assistant", "tool")
OLDEST_JINJA = (3, 1, 6)  # older sandboxes can be left: CVE-2025-27516
PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning
THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")  # three names of one thing


class Span(NamedTuple):
    """Characters begin <= i < end of a text."""

    begin: int
    end: int

    def within(self, begin, end):
        """The part of it between two positions, counted from the first; None if that is empty."""
        part = Span(max(self.begin, begin) - begin, min(self.end, end) - begin)
        return part if part.begin < part.end else None


class Marks(NamedTuple):
    """Two characters that a rendered text has around what the assistant says."""

    begin: str = ""
    end: str = ""


class RenderedConversation(NamedTuple):
    """A conversation as a template writes it.

    text       in which special text that people wrote is disguised
    answers    the Spans of the text that the assistant says, and that carry loss
    originals  {code point of a disguise: the character that it stands for}"""

    text: str
    answers: list
    originals: dict

    def restore(self, text):
        """A piece of the text, as people wrote it."""
        return text.translate(self.originals)

    def answers_in(self, begin, end):
        """The Spans that the assistant says of a piece of the text, counted from its beginning."""
        parts = [answer.within(begin, end) for answer in self.answers]
        return [part for part in parts if part]


# ---- where a template is ----


def read_template(folder, config):
    """The source of a model folder's template, or None where it has none.

    config  what tokenizer_config.json says

    The places are transformers': chat_template.jinja, and files in additional_chat_templates/.
    Where there are any, tokenizer_config.json is not asked. Raises ValueError where there are
    templates, but no default."""
    templates = {}
    with one_line_errors(folder):
        path = os.path.join(folder, TEMPLATE_FILE)
        if os.path.isfile(path):
            templates["default"] = read_text(path)
        more = os.path.join(folder, MORE_TEMPLATES)
        if os.path.isdir(more):
            for name in sorted(os.listdir(more)):
                if name.endswith(".jinja"):
                    templates[name.removesuffix(".jinja")] = read_text(os.path.join(more, name))
    if not templates:
        templates = parse_templates(config.get("chat_template"))
    if templates and "default" not in templates:
        raise ValueError(
            f"there are chat templates, {', '.join(map(repr, templates))}, but none is the default"
        )
    return templates.get("default")


def read_text(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def parse_templates(value):
    """{name: source} of tokenizer_config.json's chat_template, a text or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    templates = {}
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        named = isinstance(entry, dict) and isinstance(entry.get("name"), str)
        if not named or not isinstance(entry.get("template"), str):
            raise ValueError(f"chat_template has {entry!r}, which is not a template with a name")
        templates[entry["name"]] = entry["template"]
    return templates


def read_shipped(name, begins_with_bos):
    """The source of a template of ours. begins_with_bos: the model's texts begin with BOS."""
    source = read_text(os.path.join(SHIPPED_FOLDER, name + ".jinja"))
    if not begins_with_bos:
        source = source.replace("{{- bos_token -}}\n", "")
    return source


# ---- the environment that templates run in ----


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant says.

    The body is written as it is, between the two characters that write() has."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("mark_generation", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def mark_generation(self, context, caller):
        marks = context.get("generation_marks")
        return marks.begin + caller() + marks.end


def raise_exception(message):
    """What a template calls where it refuses a conversation."""
    raise jinja2.TemplateError(message)


class Clock:
    """What templates that write the date are told. A run stays at the day of its beginning, also
    when it is resumed, so that its prompts stay as they were."""

    fixed = None

    @classmethod
    def now(cls):
        return cls.fixed or datetime.now()

    @classmethod
    def fix(cls, text):
        """Stop the clock at the beginning of a day, YYYY-MM-DD; of anything else, now."""
        try:
            cls.fixed = datetime.fromisoformat(text)
        except (TypeError, ValueError):
            cls.fixed = datetime.now()


def format_now(format):
    return Clock.now().strftime(format)


def format_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter tojson. Jinja's own would write < as \\u003c, as HTML needs it."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class DictMaker:
    """What templates call dict(): no class, whose attributes lead to the interpreter."""

    def __call__(self, *items, **named):
        return dict(*items, **named)

    def fromkeys(self, *values):
        return dict.fromkeys(*values)


class Namespace(jinja2.utils.Namespace):
    """What templates call namespace(), for variables that outlive a loop."""

    def __init__(self, /, *items, **named):
        super().__init__()
        for name, value in dict(*items, **named).items():
            self[name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not have the name {name!r}")
        super().__setitem__(name, value)


def make_environment():
    """Jinja as transformers sets it up for chat templates."""
    version = tuple(int(number) for number in re.findall(r"\d+", jinja2.__version__)[:3])
    if version < OLDEST_JINJA:
        stop(
            f"chat templates need jinja2 3.1.6 or newer, here is {jinja2.__version__}: "
            "pip install -U jinja2"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = format_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = format_now
    environment.globals["dict"] = DictMaker()
    environment.globals["namespace"] = Namespace
    return environment


ENVIRONMENT = make_environment()


# ---- a template ----


class ChatTemplate:
    """A model's chat template.

    source     in Jinja
    origin     where it comes from, for messages
    special    {name: text} of the special tokens that it may write: bos_token, eos_token, ..
    added      {text: Token} of the tokenizer, which people's words must not become
    note       what to say when the template is first used
    normalize  a function from texts to texts: how the tokenizer normalizes a text before it finds
             some of its added tokens; None if it finds them all before"""

    def __init__(self, source, origin, special, added, note="", normalize=None):
        self.source = source
        self.origin = origin
        self.special = special
        self.note = note
        self.normalize = normalize
        special_texts = [text for text, token in added.items() if token.special]
        # Runs of white space are added tokens in some vocabularies, but nothing special.
        visible_texts = [text for text in added if text.strip()]
        self.special_tokens = ForgedTokens(special_texts)
        self.control_tokens = ForgedTokens([*special_texts, *visible_texts])
        self.reserved = "".join([source, *added, *special.values()])
        without_comments = re.sub("{#.*?#}", "", source, flags=re.DOTALL)
        self.has_generation_tags = bool(re.search(r"{%[-+]?\s*generation\b", without_comments))

    @cached_property
    def program(self):
        """The compiled template. Raises ValueError where the source is not Jinja."""
        try:
            return ENVIRONMENT.from_string(self.source)
        except Exception as error:  # Jinja's own, or Python's, which compiles what Jinja writes
            raise ValueError(f"the chat template of {self.origin} is not valid: {error}") from None

    @cached_property
    def identity(self):
        """A text that is equal for templates that write the same; of one that writes the date, for
        the same day."""
        day = str(Clock.now().date()) if "strftime_now" in self.source else ""
        named = [item for item in sorted(self.special.items()) if item[0] in self.source]
        return json.dumps([self.source, named, day])

    @cached_property
    def behind_an_answer(self):
        """What the template writes behind the answer in a conversation of two turns."""
        answer = chr(PRIVATE_USE[0])
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        try:
            text = self.write(turns)
        except ValueError:
            return ""
        return text.rpartition(answer)[2]

    @cached_property
    def end_of_turn(self):
        """The text that ends an answer, through its first special token; "" where there is none."""
        token = self.special_tokens.expression.search(self.behind_an_answer)
        return self.behind_an_answer[: token.end()] if token else ""

    @property
    def end_of_turn_token(self):
        """The special token that ends an answer; "" where there is none."""
        token = self.special_tokens.expression.search(self.end_of_turn)
        return token[0] if token else ""

    def check(self):
        """Say the note, once; stop where no answer would ever end."""
        if not self.end_of_turn:
            self.program  # a template that is not valid has a better message
            stop(
                f"the chat template of {self.origin} ends answers without a special token of this "
                "tokenizer, so that no answer would ever end: choose another template"
            )
        if self.note:
            say_once(self.note)

    def write(self, turns, invites_answer=False, options=None, marks=Marks()):
        """The text of turns. Raises ValueError where the template refuses them.

        invites_answer  end with what stands before an answer of the assistant's
        options         further variables of the template
        marks           the characters that GenerationTag writes"""
        variables = {
            "tools": None,
            "documents": None,
            **self.special,
            **(options or {}),
            "messages": turns,
            "add_generation_prompt": invites_answer,
            "generation_marks": marks,
        }
        program = self.program
        try:
            return program.render(variables)
        except Exception as error:  # a template is a program of somebody else's: anything can fail
            raise ValueError(f"the chat template refuses it: {error}") from None

    def render(self, turns, reply, options):
        """The RenderedConversation of turns. Raises ValueError where the template refuses them.

        reply    end where the assistant begins to speak, or, if the last turn is the assistant's,
                 where it goes on to speak; False: the conversation is finished
        options  further variables of the template"""
        turns = [clean_turn(turn) for turn in turns]
        options = {key: value for key, value in options.items() if value is not None}
        if not turns:
            raise ValueError("a conversation without a turn")
        try:
            words = json.dumps([turns, options], ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"turns that JSON cannot express: {error}") from None
        unused = unused_characters(words + self.reserved)
        marks = Marks(next(unused), next(unused))
        tail = next(unused)
        disguise = Disguise(unused, self.normalize)
        for turn in turns:
            # In the assistant's words, <think> is a token, but an end of turn is not.
            is_answer = turn["role"] == "assistant"
            tokens = self.special_tokens if is_answer else self.control_tokens
            for key in turn.keys() - {"role"}:
                turn[key] = disguise.apply(turn[key], tokens)
        for key, value in options.items():
            options[key] = disguise.apply(value, self.control_tokens)

        continues = reply and turns[-1]["role"] == "assistant"
        if continues:
            if not isinstance(turns[-1].get("content"), str):
                raise ValueError("a turn to go on with that has no text")
            turns[-1]["content"] += tail + " "
        text = self.write(turns, reply and not continues, options, marks)
        if continues:
            text = cut_at_tail(text, tail)
        if self.has_generation_tags:
            text, answers = take_marks_out(text, marks)
            answers = [self.extend_to_end_of_turn(answer, text) for answer in answers]
        else:
            answers = self.find_answers(turns, options, text, tail)
        return RenderedConversation(text, answers, disguise.originals)

    def extend_to_end_of_turn(self, answer, text):
        """A Span with the end of turn behind it, which some templates' tags leave out."""
        if self.end_of_turn and text.startswith(self.end_of_turn, answer.end):
            return answer._replace(end=answer.end + len(self.end_of_turn))
        return answer

    def find_answers(self, turns, options, text, tail):
        """The Spans of the assistant's turns in the text of a conversation.

        Each begins behind the text that invites it, and ends with the end of turn. A turn that the
        template writes otherwise, now that others follow, is left out."""
        answers = []
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            try:
                span = self.find_answer(turns[: i + 1], options, text, tail)
            except ValueError:  # the template refuses the conversation's beginning
                span = None
            if span:
                answers.append(span)
            else:
                say_once(
                    f"the chat template of {self.origin} writes some answers otherwise than they "
                    "were invited, such as those before the last one: these carry no loss"
                )
        return answers

    def find_answer(self, turns, options, text, tail):
        """The Span of the last of these turns in the whole text, or None if it is rewritten."""
        prompt = self.write(turns[:-1], invites_answer=True, options=options)
        if not text.startswith(prompt):
            # DeepSeek-R1 invites thinking, which a finished conversation does not show.
            turn = {"role": "assistant", "content": tail}
            answered = self.write([*turns[:-1], turn], options=options)
            prompt = os.path.commonprefix([prompt, answered])
            before = self.write(turns[:-1], options=options)
            if not prompt.startswith(before) or not text.startswith(prompt):
                return None
        finished = self.write(turns, options=options)
        begin = len(prompt)
        end = len(finished)
        if self.end_of_turn:
            found = finished.find(self.end_of_turn, begin)
            if found >= 0:
                end = found + len(self.end_of_turn)
        end = min(end, len(text))
        if finished[:end] != text[:end]:
            return None
        return Span(begin, end)


def clean_turn(turn):
    """A turn as templates get it: without fields of None, thinking under each of its names.

    Raises ValueError for a role that there is not: templates write it as it is."""
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise ValueError(f"a turn that has none of the roles {', '.join(ROLES)}")
    turn = {key: value for key, value in turn.items() if value is not None}
    for key in THINKING_KEYS:
        if key in turn:
            for other in THINKING_KEYS:
                turn.setdefault(other, turn[key])
    return turn


def unused_characters(text):
    """Yield characters without a meaning that do not stand in a text."""
    for code in PRIVATE_USE:
        if chr(code) not in text:
            yield chr(code)
    raise ValueError("a text with all characters of private use")


class ForgedTokens:
    """Finds where tokens stand in a text, or could come to stand when other text is put around."""

    def __init__(self, texts):
        self.texts = [text for text in texts if text]
        self.expression = match_any(self.texts)
        # Where tokens begin, also inside another one.
        self.begins = re.compile(f"(?={self.expression.pattern})")

    @cached_property
    def beginnings(self):
        """What tokens begin with, in all lengths."""
        return {text[:length] for text in self.texts for length in range(1, len(text))}

    @cached_property
    def ends(self):
        return {text[-length:] for text in self.texts for length in range(1, len(text))}

    @cached_property
    def longest(self):
        return max(map(len, self.texts), default=0)

    def find(self, text):
        """The positions in a text at which a disguise keeps it from becoming a token."""
        positions = set()
        if self.expression.search(text):  # this is fast, and most texts have none
            positions = {match.start() for match in self.begins.finditer(text)}
        begin = len(text) - len(text.lstrip())  # templates may strip what they write
        end = len(text.rstrip())
        for length in range(1, min(self.longest, end - begin + 1)):
            if text[end - length : end] in self.beginnings:
                positions.add(end - length)
            if text[begin : begin + length] in self.ends:
                positions.add(begin)
        return sorted(positions)


class Disguise:
    """Replaces characters of texts by unused ones, so that no token is found in the texts.

    unused     yields such characters
    normalize  as of ChatTemplate: a text is normalized first, lest this should make it special"""

    def __init__(self, unused, normalize=None):
        self.unused = unused
        self.normalize = normalize
        self.replacements = {}  # character -> its disguise
        self.originals = {}  # code point of the disguise -> character

    def apply(self, value, tokens):
        """A JSON value with all its texts disguised. tokens: a ForgedTokens"""
        if isinstance(value, str):
            return self.apply_to_text(value, tokens)
        if isinstance(value, dict):
            disguised = {}
            for key, item in value.items():
                disguised[self.apply(key, tokens)] = self.apply(item, tokens)
            return disguised
        if isinstance(value, list):
            return [self.apply(item, tokens) for item in value]
        return value

    def apply_to_text(self, text, tokens):
        if self.normalize:
            text = self.normalize(text)
        pieces = []
        begin = 0
        for position in tokens.find(text):
            pieces.append(text[begin:position])
            pieces.append(self.replace(text[position]))
            begin = position + 1
        pieces.append(text[begin:])
        return "".join(pieces)

    def replace(self, character):
        if character not in self.replacements:
            self.replacements[character] = next(self.unused)
            self.originals[ord(self.replacements[character])] = character
        return self.replacements[character]


def cut_at_tail(text, tail):
    """A text up to the `tail` of its last turn, which goes on.

    A space was written behind the tail. If it is gone, the template strips its turns, and the text
    is stripped, too. Raises ValueError where the template has dropped the turn."""
    if text.count(tail) != 1:
        raise ValueError("the chat template drops or repeats the turn to go on with")
    text, _, behind = text.partition(tail)
    return text if behind.startswith(" ") else text.rstrip()


def take_marks_out(text, marks):
    """A text without its marks, and the Spans between them."""
    pieces = re.split(f"([{marks.begin}{marks.end}])", text)
    kept = ""
    spans = []
    begin = 0
    for piece in pieces:
        if piece == marks.begin:
            begin = len(kept)
        elif piece == marks.end:
            if len(kept) > begin:
                spans.append(Span(begin, len(kept)))
        else:
            kept += piece
    return kept, spans


def match_any(texts):
    """A regular expression that finds any of the texts, the longest first; none finds nothing."""
    if not any(texts):
        return re.compile("(?!)")
    ordered = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in ordered))
