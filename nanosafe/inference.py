"""A rollout's responses; and, without gradients, log-probabilities and scores of given sequences,
and answers to prompts.

Shapes: B or n sequences, R response positions."""

import hashlib
import inspect
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nanosafe import checkpoint, tokenizer
from nanosafe.adapter_base import list_model_folders
from nanosafe.data.batching import (
    collate,
    copy_to_device,
    gather_responses,
    last_of_each,
    plan_micro_batches,
    sum_per_sequence,
)
from nanosafe.errors import choose, stop
from nanosafe.hub import find_model
from nanosafe.parallel import all_reduce_sum, any_rank
from nanosafe.printing import print_once
from nanosafe.rollout import sample_all
from nanosafe.storage import atomic_write, load_function, names_function, split_function
from nanosafe.tokenizer.special_tokens import control_token_ids

# ---- a rollout's responses, token by token ----


class Responses(NamedTuple):
    """Prompts followed by the responses that were sampled for them."""

    ids: list  # of B arrays of token ids
    starts: list  # of B ints: where the response begins
    longest: int  # R: tokens of the longest response

    def pack(self, indices, device):
        """The Batch of some of them; its targets are the responses' tokens."""
        masks = []
        for i in indices:
            positions = np.arange(len(self.ids[i]))
            masks.append(positions >= self.starts[i])
        return collate([self.ids[i] for i in indices], masks, device)

    def unpack(self, x, batch, indices):
        """Their responses' numbers, gathered from a packed tensor: x (N,) -> (len(indices), R).

        Positions after a response's end hold arbitrary numbers: use the mask."""
        return gather_responses(x, batch, [self.starts[i] for i in indices], self.longest)


def response_logps(model, responses, temperature, max_tokens, world, as_in_updates=False):
    """Log-probabilities of all responses' tokens (B, R), on every rank, without gradients.

    They come from the training forward, not from the sampler.

    as_in_updates  compute them as an update does, with gradients enabled: the version of a compiled
                   block without gradients rounds otherwise. Takes the memory of activations."""
    out = torch.zeros(len(responses.ids), responses.longest, device=world.device)
    lengths = [len(ids) for ids in responses.ids]
    for rows in plan_micro_batches(lengths, max_tokens, world.size)[world.rank]:
        batch = responses.pack(rows, world.device)
        with torch.set_grad_enabled(as_in_updates):
            logps = model.log_probs(batch, temperature).detach()  # its graph ends here
        index = copy_to_device(rows, world.device)
        out[index] = responses.unpack(logps, batch, rows)
    return all_reduce_sum(out)


@torch.no_grad()
def response_values(critic, responses, max_tokens, world):
    """A critic's values of the states before all responses' tokens (B, R), on every rank."""
    out = torch.zeros(len(responses.ids), responses.longest, device=world.device)
    lengths = [len(ids) for ids in responses.ids]
    for rows in plan_micro_batches(lengths, max_tokens, world.size)[world.rank]:
        batch = responses.pack(rows, world.device)
        index = copy_to_device(rows, world.device)
        out[index] = responses.unpack(critic.scores(batch), batch, rows)
    return all_reduce_sum(out)


@torch.no_grad()
def last_token_scores(model, sequences, max_tokens, world):
    """A reward or cost model's scores of the last tokens of sequences (B,), on every rank."""
    out = torch.zeros(len(sequences), device=world.device)
    lengths = [len(sequence) for sequence in sequences]
    longest_forward = max(max_tokens, *lengths)  # a reward model's template may be the longer one
    for rows in plan_micro_batches(lengths, longest_forward, world.size)[world.rank]:
        no_targets = [np.zeros(lengths[i], np.uint8) for i in rows]
        batch = collate([sequences[i] for i in rows], no_targets, world.device)
        index = copy_to_device(rows, world.device)
        out[index] = last_of_each(model.scores(batch), batch)[: len(rows)]
    return all_reduce_sum(out)


def check_prompts(dataset, target):
    """Stop if a tokenizer's template refuses one of the prompts of a Dataset with an answer."""
    for i in range(len(dataset)):
        prompt = dataset.prompt(i)
        turns = [*prompt.turns, {"role": "assistant", "content": "Yes."}]
        try:
            target.finished_conversation(turns, **prompt.options)
            target.conversation(turns, **prompt.options)
        except ValueError as error:
            stop(f"{target.file!r}: the prompt on line {dataset.lines[i]}: {error}")


def encode_answered(prompt, question, answer, source, target):
    """The ids of a conversation, in the words of the model that reads it.

    prompt    the Prompt
    question  its ids as another model was asked them, and
    answer    the ids of the answer, both of that model's tokenizer `source`
    target    the reader's tokenizer

    Where the two have the same tokens and the same template, these are the ids as they are.
    Otherwise the conversation is rendered anew; an answer that was cut before its end of turn is
    not ended then either. Raises ValueError where the template refuses the turns."""
    if source.identity == target.identity:
        return question + answer
    turns = [*prompt.turns, {"role": "assistant", "content": source.decode(answer)}]
    if answer[-1] in source.eos_ids:
        return target.finished_conversation(turns, **prompt.options).ids
    return target.conversation(turns, reply=True, **prompt.options).ids


def encode_all_answered(prompts, questions, answers, source, target):
    """encode_answered() of many conversations. Stops where the target's template refuses one."""
    ids = []
    for prompt, question, answer in zip(prompts, questions, answers):
        try:
            ids.append(encode_answered(prompt, question, answer, source, target))
        except ValueError as error:
            stop(f"an answer cannot be scored: {target.template.origin}: {error}")
    return ids


def show_progress(micro_batches, name, world):
    """A rank's micro-batches, with a bar on rank 0 if they take longer than three seconds."""
    return tqdm(micro_batches, desc=name, leave=False, delay=3, disable=not world.main)


# ---- a reference's log-probabilities, and the distance from it ----


@torch.no_grad()
def sum_response_logps(model, sequences, max_tokens, world):
    """Summed log-probabilities (n,) of responses, on every rank.

    sequences  pairs of token ids and a mask that is 1 on the response's tokens"""
    lengths = [len(ids) for ids, _ in sequences]
    out = torch.zeros(len(sequences), device=world.device)
    longest_forward = max(max_tokens, *lengths)
    micro_batches = plan_micro_batches(lengths, longest_forward, world.size)[world.rank]
    for rows in show_progress(micro_batches, "log-probs", world):
        ids = [sequences[i][0] for i in rows]
        masks = [sequences[i][1] for i in rows]
        batch = collate(ids, masks, world.device)
        index = copy_to_device(rows, world.device)
        out[index] = sum_per_sequence(model.log_probs(batch), batch)[: len(rows)]
    return all_reduce_sum(out)


def cached_reference_logps(model, path, dataset, max_tokens, world):
    """sum_response_logps() of a Dataset (n, width) by the model at `path`, kept beside its tokens.

    So the reference is needed only once, before training, and no second model is held."""
    file = os.path.join(dataset.folder, fingerprint_model(model, path, world) + ".logps")
    is_missing = any_rank(not os.path.exists(file), world.device)
    if not is_missing:
        with open(file, "rb") as f:
            return torch.from_numpy(np.load(f)).to(world.device)
    exists = ~np.isnan(dataset.labels)  # rankings have different numbers of answers
    sequences = [dataset.sequence(i, part) for i, part in zip(*exists.nonzero())]
    logps = torch.zeros(exists.shape, device=world.device)
    logps[torch.from_numpy(exists)] = sum_response_logps(model, sequences, max_tokens, world)
    if world.main:
        with atomic_write(file, "wb") as f:
            np.save(f, logps.cpu().numpy())
    return logps


def fingerprint_model(model, path, world):
    """A text that changes with a model's files, the device and what is computed in.

    Of FILE.py:NAME, a function that scores, it is that of its file and name."""
    if names_function(path):
        file, _ = split_function(path)
        folders = [file]
    else:
        path = find_model(path)
        folders = list_model_folders(path)
    placement = getattr(model, "placement", None)
    facts = [
        os.path.realpath(path),
        world.device.type,
        str(placement and placement.compute_dtype),
    ]
    for folder in folders:
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else [""]
        for name in names:
            status = os.stat(os.path.join(folder, name) if name else folder)
            facts.append((name, status.st_size, status.st_mtime_ns))
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def answer_logps(model, questions, answers, max_tokens, world):
    """A model's summed log-probabilities (n,) of answers to questions, both given as token ids."""
    sequences = []
    for question, answer in zip(questions, answers):
        ids = np.array(question + answer)
        sequences.append((ids, np.arange(len(ids)) >= len(question)))
    return sum_response_logps(model, sequences, max_tokens, world)


class ReferenceSamples:
    """A reference's responses to prompts, on which KL(reference || other model) is measured."""

    def __init__(self, model, prompts, world, max_tokens, max_new_tokens, **sampling):
        self.prompts = prompts
        self.world = world
        self.max_tokens = max_tokens
        warn_of_long_answers("the reference", model, prompts, max_new_tokens)
        self.responses = sample_all(model, prompts, world, max_new_tokens, **sampling)
        self.logps = self.sum_logps(model, prompts)

    def sum_logps(self, model, prompts):
        """A model's summed log-probabilities of the responses (n,)."""
        return answer_logps(model, prompts, self.responses, self.max_tokens, self.world)

    def kl(self, model, prompts=None):
        """KL(reference || model), an unbiased estimate in nats per response.

        prompts  where the model is to be asked with other prompts than the reference was"""
        logps = self.sum_logps(model, prompts or self.prompts)
        return (self.logps - logps).mean().item()


# ---- model folders that answer and that score ----


def warn_beyond_positions(models, tokens, what):
    """Say so if texts may be longer than a model was made for; returns whether it was said.

    models  {what a model is called: model}; the one with the fewest positions is named
    tokens  the longest text
    what    where it comes from: knobs with their values"""
    positions = {name: model.config.max_position_embeddings for name, model in models.items()}
    name = min(positions, key=positions.get)
    if tokens <= positions[name]:
        return False
    print_once(
        f"warning: {what}: up to {tokens} tokens, but {name} was made for {positions[name]} "
        "(max_position_embeddings); what lies beyond may be read and written badly",
        file=sys.stderr,
    )
    return True


def warn_of_long_answers(name, model, prompts, max_new_tokens):
    """warn_beyond_positions() for a model that is to answer prompts (ids)."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    what = f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens}"
    return warn_beyond_positions({name: model}, longest + max_new_tokens, what)


def choose_dtype(dtype, world):
    """What weights are kept in: "auto" is float32 on a CPU, and the files' own (None) on a GPU."""
    choose("dtype", dtype, ("auto", "bfloat16", "float32"))
    if dtype == "auto":
        return torch.float32 if world.device.type == "cpu" else None
    return getattr(torch, dtype)


def name_of_folder(path):
    """What a model folder is called in tables: out/demo/ppo_lag/model is ppo_lag."""
    parts = [part for part in os.path.abspath(path).split(os.sep) if part != "model"]
    return parts[-1] if parts else ""


class Policy:
    """A policy's folder, with its tokenizer and how to sample from it."""

    def __init__(
        self,
        path,
        world,
        max_new_tokens,
        name="",
        dtype="auto",
        *,
        seed,
        temperature,
        top_k=0,
        top_p=1.0,
        template="auto",
        bases=None,
    ):
        """seed, temperature, top_k, top_p: as for rollout.generate(); template: as for
        tokenizer.load(), or "none", to go on with the questions' own text; bases: as for
        checkpoint.load()."""
        if not (0 <= temperature < 1e9 and 0 < top_p <= 1 and top_k >= 0 and max_new_tokens > 0):
            stop(
                f"temperature={temperature} and top_k={top_k} are 0 or more, top_p={top_p} is "
                f"above 0 and at most 1, max_new_tokens={max_new_tokens} is 1 or more"
            )
        self.path = path
        self.name = name or name_of_folder(path)
        self.world = world
        self.max_new_tokens = max_new_tokens
        self.has_template = template != "none"
        self.tok = tokenizer.load(path, template if self.has_template else "auto")
        self.model = checkpoint.load(
            path,
            "lm",
            choose_dtype(dtype, world),
            world.device,
            vocab_size=self.tok.vocab_size,
            bases=bases,
        )
        self.warned = False  # of questions that are too long
        self.sampling = {
            "eos_ids": self.tok.eos_ids,
            "banned": control_token_ids(self.tok),
            "seed": seed,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "name": repr(path),
        }

    def describe_template(self):
        """A few words on what conversations are written in."""
        return f"chat template of {self.tok.template.origin}" if self.has_template else "plain text"

    def question(self, prompt, prefix=""):
        """The ids of a Prompt, after which the next answer of a conversation is sampled.

        Without a template, the turns' texts follow each other.

        prefix  text before it, which may name control tokens"""
        if self.has_template:
            try:
                ids = self.tok.conversation(prompt.turns, **prompt.options).ids
            except ValueError as error:
                stop(f"{self.path!r}: {error}")
        else:
            text = "".join(turn["content"] for turn in prompt.turns)
            ids = self.tok.encode("", bos=True) + self.tok.encode_suffix(text)
        begin = 1 if ids[:1] == [self.tok.bos_id] else 0
        return ids[:begin] + self.tok.encode(prefix) + ids[begin:]

    def check_length(self, questions):
        """Say once if questions (ids) and answers may be longer than the model was made for."""
        if not self.warned:
            self.warned = warn_of_long_answers(
                repr(self.path), self.model, questions, self.max_new_tokens
            )

    def answers(self, questions, uids, **more):
        """The responses (ids) to questions (ids) on every rank; each rank samples its share."""
        self.check_length(questions)
        bar = tqdm(total=len(questions), desc=self.name, unit="answer", disable=not self.world.main)
        with bar:
            return sample_all(
                self.model,
                questions,
                self.world,
                self.max_new_tokens,
                uids=uids,
                on_finish=lambda: bar.update(self.world.size),
                **self.sampling,
                **more,
            )


class Constraint(NamedTuple):
    """A cost model and its limit."""

    folder: str  # or FILE.py:NAME
    limit: float


def list_constraints(cost_model, cost_limit):
    """{name: Constraint} of the knobs: "cost", and of more cost models "cost_2" and so on.

    cost_model  folders with commas between; empty: no constraint
    cost_limit  a limit for all of them, or a list with one for each"""
    folders = [folder.strip() for folder in cost_model.split(",") if folder.strip()]
    is_one = isinstance(cost_limit, (int, float))
    limits = [cost_limit] * len(folders) if is_one else list(cost_limit)
    if len(limits) != len(folders):
        stop(
            f"cost_limit={cost_limit} has {len(limits)} limits for {len(folders)} cost models: "
            "give one for all, or one for each"
        )
    constraints = {}
    for number, (folder, limit) in enumerate(zip(folders, limits), start=1):
        name = "cost" if number == 1 else f"cost_{number}"
        constraints[name] = Constraint(folder, limit)
    return constraints


def check_scorer(path, score_type):
    """Stop unless a path names a score model of this type, or a function."""
    if names_function(path):
        check_signature(path, load_function(path))
    else:
        checkpoint.check_score_model(path, score_type)


def check_signature(path, function):
    """Stop unless a function can be called with one argument, before anything is computed."""
    try:
        inspect.signature(function).bind([])
    except TypeError as error:
        stop(
            f"{path!r} is called with one argument, a list of conversations, and cannot be "
            f"({error}): see nanosafe/score_functions.py"
        )


def load_scorer(path, world, dtype, max_tokens, score_type, bases=None):
    """What scores answers: the ScoreModel of a folder, or the ScoreFunction of FILE.py:NAME."""
    if names_function(path):
        return ScoreFunction(path, world)
    return ScoreModel(path, world, dtype, max_tokens, score_type, bases=bases)


class ScoreFunction:
    """A reward or a cost that a Python function computes from texts, FILE.py:NAME.

    The function takes a list of conversations, each a list of turns {"role", "content"} that ends
    with the answer, and returns a list with a number for each."""

    def __init__(self, path, world):
        self.path = path
        self.world = world
        self.function = load_function(path)
        check_signature(path, self.function)

    def score_answers(self, prompts, questions, answers, source):
        """As ScoreModel.score_answers(). Each rank calls the function for its share."""
        rank, ranks = self.world.rank, self.world.size
        conversations = []
        for prompt, answer in zip(prompts[rank::ranks], answers[rank::ranks]):
            turns = [dict(turn) for turn in prompt.turns]  # the function may change its own copy
            turns.append({"role": "assistant", "content": source.decode(answer)})
            conversations.append(turns)
        scores = torch.zeros(len(answers), device=self.world.device)
        scores[rank::ranks] = torch.tensor(self(conversations), device=self.world.device)
        return all_reduce_sum(scores).tolist()

    def __call__(self, conversations):
        """The function's numbers for conversations, as floats."""
        if not conversations:
            return []
        returned = self.function(conversations)
        if torch.is_tensor(returned) or isinstance(returned, np.ndarray):
            returned = returned.tolist()
        numbers = list(returned) if isinstance(returned, (list, tuple, map)) else []
        try:
            scores = torch.tensor([float(number) for number in numbers])
        except (TypeError, ValueError, OverflowError):
            scores = torch.empty(0)
        if len(scores) != len(conversations) or not scores.isfinite().all():
            stop(
                f"{self.path!r} must return a list with a finite number for each of "
                f"{len(conversations)} conversations, and returned {str(returned)[:100]}"
            )
        return scores.tolist()


class ScoreModel:
    """A reward or cost model's folder, which scores texts or token ids at their ends.

    score_type  "reward" or "cost": the folder must not state another; None: what it states
    template    as of tokenizer.load()
    bases       as of checkpoint.load()"""

    def __init__(
        self,
        path,
        world,
        dtype=None,
        max_tokens=8192,
        score_type=None,
        template="auto",
        bases=None,
    ):
        self.path = path
        self.world = world
        self.max_tokens = max_tokens
        self.tok = tokenizer.load(path, template)
        checkpoint.check_score_model(path, score_type)
        self.model = checkpoint.load(
            path,
            "score",
            dtype=dtype,
            device=world.device,
            vocab_size=self.tok.vocab_size,
            score_type=score_type,
            bases=bases,
        )
        self.warned = False  # of texts that are too long

    def __call__(self, texts):
        """The scores of texts, each of which ends with EOS."""
        ids = []
        for text in texts:
            ids.append(self.tok.encode(text, bos=True, eos=True, allow_special=False))
        return self.score(ids)

    def score_answers(self, prompts, questions, answers, source):
        """The scores of answers to Prompts, on every rank, in this model's own words.

        questions, answers  lists of ids of the tokenizer `source`, as of encode_answered()"""
        return self.score(encode_all_answered(prompts, questions, answers, source, self.tok))

    @torch.no_grad()
    def score(self, ids):
        """The scores of lists of ids, on every rank.

        The plan is made for one rank, so that the scores do not depend on the number of ranks."""
        lengths = [len(sequence) for sequence in ids]
        if not self.warned:
            models = {repr(self.path): self.model}
            self.warned = warn_beyond_positions(models, max(lengths), "a text to score")
        scores = torch.zeros(len(ids), device=self.world.device)
        (micro_batches,) = plan_micro_batches(lengths, max(self.max_tokens, *lengths), 1)
        own = micro_batches[self.world.rank :: self.world.size]
        for rows in show_progress(own, "scores", self.world):
            no_targets = [[0] * lengths[i] for i in rows]
            batch = collate([ids[i] for i in rows], no_targets, self.world.device)
            index = copy_to_device(rows, self.world.device)
            scores[index] = last_of_each(self.model.scores(batch), batch)
        if not all_reduce_sum(scores).isfinite().all():
            stop("a score model gives scores that are not finite: its weights are broken")
        return scores.tolist()
