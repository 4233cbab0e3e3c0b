"""Models that are asked: what a reference thinks, kept so that none is held; policies' answers."""

import hashlib
import os

import numpy as np
import torch
from tqdm import tqdm

from nanosafe import checkpoint, tokenizer
from nanosafe.checkpoint.folder import open_folder
from nanosafe.data.batching import collate, plan_micro_batches, sum_per_sequence
from nanosafe.data.template import encode_conversation, retokenize
from nanosafe.errors import choose, stop
from nanosafe.parallel import all_reduce_sum, any_rank
from nanosafe.rollout import sample_all
from nanosafe.storage import atomic_write
from nanosafe.tokenizer.special_tokens import control_token_ids


@torch.no_grad()
def sum_response_logps(model, sequences, max_tokens, world):
    """Summed log-probabilities (n,) of responses, given as (ids, mask) with their prompts."""
    lengths = [len(ids) for ids, _ in sequences]
    out = torch.zeros(len(sequences), device=world.device)
    for micro in plan_micro_batches(lengths, max(max_tokens, *lengths), world.size)[world.rank]:
        ids, masks = zip(*(sequences[i] for i in micro)) if micro else ([], [])
        batch = collate(ids, masks, world.device)
        logps = model.log_probs(batch)
        logps = logps if torch.is_tensor(logps) else logps[0]
        out[micro] = sum_per_sequence(logps, batch)[: len(micro)]
    return all_reduce_sum(out)


def cached_reference_logps(model, path, dataset, max_tokens, world):
    """response_logps() of a Dataset (n, width) by the model at `path`, kept with its token ids."""
    names = sorted(os.listdir(path)) if os.path.isdir(path) else [""]
    stats = [os.stat(os.path.join(path, name) if name else path) for name in names]
    placement = getattr(model, "placement", None)
    known = [
        os.path.realpath(path),
        world.device.type,
        str(placement and placement.compute_dtype),
        *((name, s.st_size, s.st_mtime_ns) for name, s in zip(names, stats)),
    ]
    key = hashlib.blake2b(repr(known).encode(), digest_size=16).hexdigest()
    file = os.path.join(dataset.folder, key + ".logps")
    if not any_rank(not os.path.exists(file), world.device):
        with open(file, "rb") as f:
            return torch.from_numpy(np.load(f)).to(world.device)
    there = ~np.isnan(dataset.labels)
    logps = torch.zeros(there.shape, device=world.device)
    sequences = [dataset.sequence(*place) for place in zip(*there.nonzero())]
    logps[torch.from_numpy(there)] = sum_response_logps(model, sequences, max_tokens, world)
    if world.main:
        with atomic_write(file, "wb") as f:
            np.save(f, logps.cpu().numpy())
    return logps


class ReferenceSamples:
    """Responses of a reference model to prompts, on which KL(reference || other) is measured."""

    def __init__(self, model, prompts, world, max_tokens, max_new_tokens, **sampling):
        self.prompts, self.world, self.max_tokens = prompts, world, max_tokens
        self.responses = sample_all(model, prompts, world, max_new_tokens, **sampling)
        self.logps = self.logps_of(model, prompts)

    def logps_of(self, model, prompts):
        texts = [
            (np.array(p + r), np.arange(len(p + r)) >= len(p))
            for p, r in zip(prompts, self.responses)
        ]
        return sum_response_logps(model, texts, self.max_tokens, self.world)

    def kl(self, model, prompts=None):
        """KL(reference || model), nats per response, unbiased; the model may be asked otherwise."""
        return (self.logps - self.logps_of(model, prompts or self.prompts)).mean().item()


def choose_dtype(dtype, world):
    """What weights are kept in: "auto" is float32 on a CPU, and as in the files (None) on a GPU."""
    choose("dtype", dtype, ("auto", "bfloat16", "float32"))
    automatic = torch.float32 if world.device.type == "cpu" else None
    return automatic if dtype == "auto" else getattr(torch, dtype)


def name_of_folder(path):
    """What a folder is called in tables: out/demo/ppo_lag/model is ppo_lag."""
    return [p for p in ("", *os.path.abspath(path).split(os.sep)) if p != "model"][-1]


class Policy:
    """A policy to sample from; sampling: temperature, top_k, top_p, seed, as for generate()."""

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
    ):
        if not (0 <= temperature < 1e9 and 0 < top_p <= 1 and top_k >= 0 and max_new_tokens > 0):
            stop(
                f"temperature={temperature} and top_k={top_k} are 0 or more, top_p={top_p} is "
                f"above 0 and at most 1, max_new_tokens={max_new_tokens} is 1 or more"
            )
        self.name, self.world, self.tok = name or name_of_folder(path), world, tokenizer.load(path)
        self.max_new_tokens = max_new_tokens
        self.model = checkpoint.load(
            path, "lm", choose_dtype(dtype, world), world.device, vocab_size=self.tok.vocab_size
        )
        self.sampling = {
            "eos_ids": self.tok.eos_ids,
            "banned": control_token_ids(self.tok),
            "seed": seed,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }

    def question(self, turns, template=True, prefix=""):
        """The ids that a conversation's next answer follows; `prefix` may name control tokens."""
        tok = self.tok
        begin = tok.encode("", bos=True)
        ids = (
            encode_conversation(turns, tok)[0]
            if template
            else begin + tok.encode_suffix("".join(turns))
        )
        return begin + tok.encode(prefix) + ids[len(begin) :]

    def answers(self, questions, uids, **more):
        """The responses (ids) to questions (ids), each rank sampling its share."""
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


class ScoreModel:
    """A reward or cost model, which scores texts, or token ids of any tokenizer, at their ends."""

    def __init__(self, path, world, dtype=None, max_tokens=8192):
        self.tok, self.world, self.max_tokens = tokenizer.load(path), world, max_tokens
        if "score_head.weight" not in open_folder(path).tensors:
            stop(f"{path!r} is a policy: it has no score head")
        self.model = checkpoint.load(
            path, "score", dtype=dtype, device=world.device, vocab_size=self.tok.vocab_size
        )

    def __call__(self, texts):
        return self.score(
            [self.tok.encode(text, bos=True, eos=True, allow_special=False) for text in texts]
        )

    @torch.no_grad()
    def score(self, ids, source=None):
        """Scores of lists of ids, of the tokenizer `source`; all of them on every rank."""
        if source and source.fingerprint != self.tok.fingerprint:
            ids = [retokenize(x, source, self.tok).tolist() for x in ids]
        lengths = [len(x) for x in ids]
        scores = torch.zeros(len(ids), device=self.world.device)
        micros = plan_micro_batches(lengths, max(self.max_tokens, *lengths), 1)[
            0
        ]  # the same for all ranks
        for micro in micros[self.world.rank :: self.world.size]:
            batch = collate(
                [ids[i] for i in micro], [[0] * lengths[i] for i in micro], self.world.device
            )
            scores[micro] = self.model.scores(batch)[batch.cu_seqlens[1:].long() - 1]
        if not all_reduce_sum(scores).isfinite().all():
            stop("a score model gives scores that are no numbers: its weights are broken")
        return scores.tolist()
