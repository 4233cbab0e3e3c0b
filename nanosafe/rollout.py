"""Sample many responses fast.

The engine prefills prompts, packed, into a preallocated key-value cache of `slots` rows. Every step
decodes one token for all live rows at once. A row whose response is finished is refilled with the
next prompt; when no prompt is left, the last live row moves into its place, so live rows stay
contiguous. generate() runs no collective, so ranks may stop at different times; sample_all() runs
one, at its end.

Sampling is a pure function. The uniform number behind each token is a hash of (seed, uid of the
prompt, position in the response), turned into a token by the inverse of the cumulative
distribution. So a prompt gets the same response whatever the batch, the slot, the refill order or
the number of ranks, up to ties in floating point.

Shapes: n live rows, S slots, V vocabulary, T cached positions."""

from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanosafe import attention, rope
from nanosafe.errors import stop
from nanosafe.model import linear
from nanosafe.parallel import all_gather_lists, gathered_for_sampling

MASK64 = 2**64 - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio: splitmix64's increment
MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64's finaliser
PREFILL_TOKENS = {"cuda": 8192, "cpu": 1024}  # packed prompt tokens per prefill, about
MAX_SLOTS = 256  # where `slots` is 0 and memory allows
CPU_CACHE_BYTES = 4 * 2**30  # memory that the cache assumes to be free on a CPU
CACHE_STEP = 64  # the cache's length is a multiple of this
CPU_GROUP = 16  # rows that read as much of the cache as the longest of them, on a CPU
CDF_BLOCK = 128  # tokens of the vocabulary whose probabilities are summed first
# Stands for the token of a row whose logits are not finite: the host reads the tokens anyway, so
# finding a broken model costs no synchronisation of its own.
NO_TOKEN = -1


class Sampling(NamedTuple):
    """How a token is chosen from its logits."""

    temperature: float  # divides the logits; 0 takes the likeliest token
    top_k: int  # sample from the k likeliest tokens; 0: from all
    top_p: float  # sample from the fewest tokens that hold this probability; 1: from all
    banned: torch.Tensor  # ids that are never sampled


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    *,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    eos_ids,
    seed,
    uids=None,
    slots=0,
    banned=(),
    on_finish=None,
    on_token=None,
    name="the policy",
):
    """Sample one response for each prompt.

    model           LLaMA with head "lm", its parameters whole on one device
    prompts         lists of token ids, each with at least one
    max_new_tokens  longest response: an int, or one per prompt
    temperature     divides the logits; 0 takes the likeliest token
    top_k           sample from the k likeliest tokens; 0: from all
    top_p           sample from the fewest tokens that hold this probability; 1: from all
    eos_ids         ids that end a response, and belong to it
    seed, uids      prompt i's randomness is that of (seed, uids[i]). A uid is an int or a tuple of
                    ints, by default i; for several samples of a prompt, (uid, sample)
    slots           rows decoded together; 0: up to 256, as memory allows
    banned          ids that are never sampled
    on_finish()     is called for every response that is finished
    on_token(i, t)  is called for every token t of prompt i; if it returns true, that is the last
    name            what the model is called where its weights turn out to be broken

    Returns the responses, lists of ids in the order of the prompts, EOS included when sampled.
    Stops with one line where the logits are not finite."""
    if len(prompts) == 0:
        return []
    limits = max_new_tokens
    if isinstance(max_new_tokens, int):
        limits = [max_new_tokens] * len(prompts)
    assert all(len(prompt) > 0 for prompt in prompts) and min(limits) > 0
    if uids is None:
        uids = range(len(prompts))
    keys = []
    for uid in uids:
        numbers = uid if isinstance(uid, tuple) else (uid,)
        keys.append(hash64(seed, *numbers))
    length = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
    device = model.embed_tokens.weight.device
    sampling = Sampling(
        temperature, top_k, top_p, torch.tensor(banned, dtype=torch.int64).to(device)
    )
    engine = Engine(model, slots, len(prompts), length, sampling)
    scheduler = Scheduler(engine, prompts, keys, limits, set(eos_ids), on_finish, on_token, name)
    while scheduler.waiting or scheduler.live:
        scheduler.refill()
        if scheduler.live:
            scheduler.renew_rows_that_grow_long()
            scheduler.accept(engine.step(len(scheduler.live)), first_row=0)
    return scheduler.responses


def sample_all(model, prompts, world, max_new_tokens, uids=None, **sampling):
    """generate() over all ranks, each of which samples its share: every rank gets all responses."""
    indices = range(len(prompts))
    uids = indices if uids is None else uids
    share = slice(world.rank, None, world.size)
    limits = max_new_tokens
    if not isinstance(max_new_tokens, int):
        limits = max_new_tokens[share]
    with gathered_for_sampling(model) as policy:
        responses = generate(policy, prompts[share], limits, uids=uids[share], **sampling)
    return all_gather_lists(responses, indices[share], len(prompts))


class Scheduler:
    """The host's side: which prompt is in which row, and what its response is so far."""

    def __init__(self, engine, prompts, keys, limits, eos_ids, on_finish, on_token, name):
        self.engine = engine
        self.prompts = prompts
        self.keys = keys
        self.limits = limits
        self.eos_ids = eos_ids
        self.on_finish = on_finish
        self.on_token = on_token
        self.name = name
        self.responses = [[] for _ in prompts]
        # The longest prompt is taken first, from the end of this list: rows of like length lie
        # together, and the last response to end belongs to a short prompt.
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        self.live = []  # live[row] is the prompt in that row of the engine

    def refill(self):
        """Prefill free rows with the next prompts, in packs of about PREFILL_TOKENS."""
        pack_tokens = PREFILL_TOKENS[self.engine.device.type]
        while self.waiting and len(self.live) < self.engine.slots:
            first_row = len(self.live)
            tokens = 0
            while self.waiting and len(self.live) < self.engine.slots and tokens < pack_tokens:
                i = self.waiting.pop()
                self.live.append(i)
                tokens += len(self.prompts[i])
            new = self.live[first_row:]
            prompts = [self.prompts[i] for i in new]
            keys = [self.keys[i] for i in new]
            self.accept(self.engine.prefill(first_row, prompts, keys), first_row)

    def renew_rows_that_grow_long(self):
        """Compute the cache of a row again when its text grows too long for its RoPE (longrope).

        From then on all positions turn otherwise, also those that are in the cache already."""
        if not self.engine.border:
            return
        for row, i in enumerate(self.live):
            text = [*self.prompts[i], *self.responses[i]]
            if len(text) == self.engine.border + 1:
                self.engine.renew(row, text)

    def accept(self, tokens, first_row):
        """Append the new token of each row from first_row on, and free the rows that are finished.

        Rows are visited from the last one down, so that the row that moves into a freed one has
        been visited before."""
        if NO_TOKEN in tokens:
            stop(
                f"{self.name} gives logits that are not finite: its weights are broken, or "
                "temperature, by which they are divided, is too small"
            )
        for row in reversed(range(first_row, first_row + len(tokens))):
            i, token = self.live[row], tokens[row - first_row]
            self.responses[i].append(token)
            is_last = token in self.eos_ids or len(self.responses[i]) == self.limits[i]
            if self.on_token and self.on_token(i, token):
                is_last = True
            if is_last:
                self.free(row)

    def free(self, row):
        """Give up a row: the last live row takes its place."""
        last = self.live.pop()
        if row < len(self.live):
            self.live[row] = last
            self.engine.move(len(self.live), row)
        if self.on_finish:
            self.on_finish()


class Engine:
    """The device's side: a cache of S rows, and each row's next token, position and key."""

    def __init__(self, model, slots, wanted, length, sampling):
        """slots: rows at most, 0 for as many as fit; wanted: how many prompts there are;
        length: the longest prompt and response together."""
        config = model.config
        self.model = model
        self.device = model.embed_tokens.weight.device
        self.sampling = sampling
        self.head = model.output_embedding()
        dtype = attention.attention_dtype(model.embed_tokens.weight)
        self.border = rope.find_border(config)  # tokens; 0: a text's RoPE does not change with it
        model.check_length(length)
        length = CACHE_STEP * ceil(length / CACHE_STEP)
        self.slots = min(slots or self.count_slots_that_fit(length, dtype), wanted)
        shape = self.slots, config.num_key_value_heads, length, config.head_dim
        self.caches = []
        for _ in model.layers:
            keys = torch.zeros(shape, dtype=dtype, device=self.device)
            values = torch.zeros(shape, dtype=dtype, device=self.device)
            self.caches.append(attention.Cache(keys, values))
        self.rows = torch.arange(self.slots, device=self.device)
        self.columns = torch.arange(length, device=self.device)
        state = torch.zeros(4, self.slots, dtype=torch.int64, device=self.device)
        self.tokens, self.positions, self.prompt_lengths, self.keys = state
        # Each row's position + 1, known on the host, so that no more of the cache is read.
        self.extents = [0] * self.slots
        self.graphs = {}  # number of rows -> CUDA graph of decode() for so many

    def count_slots_that_fit(self, length, dtype):
        """Rows whose keys and values take half of the free memory, at most MAX_SLOTS."""
        config = self.model.config
        numbers = 2 * len(self.model.layers) * config.num_key_value_heads * config.head_dim * length
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = CPU_CACHE_BYTES
        return max(1, min(MAX_SLOTS, free // 2 // (numbers * dtype.itemsize)))

    def prefill(self, first_row, prompts, keys):
        """Read whole prompts into the rows from first_row on; returns each one's first token."""
        lengths = self.make_tensor([len(prompt) for prompt in prompts])
        ends = lengths.cumsum(0)
        cu_seqlens = torch.cat((ends.new_zeros(1), ends)).int()
        tokens = self.make_tensor([token for prompt in prompts for token in prompt])
        rows = slice(first_row, first_row + len(prompts))
        longest = max(len(prompt) for prompt in prompts)
        layout = attention.pack(cu_seqlens, longest, len(tokens), slots=self.rows[rows])
        x = self.model.hidden_states(tokens, layout, self.caches)[ends - 1]
        self.keys[rows] = self.make_tensor([as_signed(key) for key in keys])
        self.positions[rows] = lengths
        self.prompt_lengths[rows] = lengths
        draw = torch.zeros_like(lengths)
        logits = linear(x, self.head)
        self.tokens[rows] = sample_tokens(logits, self.keys[rows], draw, *self.sampling)
        for row, prompt in enumerate(prompts, start=first_row):
            self.extents[row] = len(prompt) + 1
        return self.tokens[rows].tolist()

    def renew(self, row, text):
        """Compute a row's keys and values again, as those of the whole text."""
        tokens = self.make_tensor(text)
        cu_seqlens = self.make_tensor([0, len(text)]).int()
        slots = self.rows[row : row + 1]
        layout = attention.pack(cu_seqlens, len(text), len(text), slots=slots)
        self.model.hidden_states(tokens, layout, self.caches)

    def make_tensor(self, numbers):
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def step(self, n):
        """Decode one token for each of the first n rows; returns the n new tokens."""
        if self.device.type == "cuda":
            power_of_two = 1 << (n - 1).bit_length()  # so that there are few graphs
            self.replay(min(self.slots, power_of_two))
        else:
            extents = []  # a group reads as many keys as its longest row has
            for begin in range(0, n, CPU_GROUP):
                rows = slice(begin, min(begin + CPU_GROUP, n))
                extents.append((rows, max(self.extents[rows])))
            self.decode(n, extents)
        for row in range(n):
            self.extents[row] += 1
        return self.tokens[:n].tolist()

    def decode(self, n, extents):
        """One token for the first n rows. extents: pairs of some rows and the keys they read."""
        positions = self.positions[:n]
        groups = []
        for rows, extent in extents:
            seen = self.columns[:extent] <= positions[rows, None]  # (rows, extent)
            groups.append(attention.RowGroup(rows, seen[:, None, None]))
        layout = attention.DecodeBatch(positions, self.rows[:n], groups)
        # Rows beyond the live ones may hold NO_TOKEN, which has no embedding.
        tokens = self.tokens[:n].clamp(min=0)
        x = self.model.hidden_states(tokens, layout, self.caches)
        logits = linear(x, self.head)
        draw = positions - self.prompt_lengths[:n] + 1
        self.tokens[:n] = sample_tokens(logits, self.keys[:n], draw, *self.sampling)
        # A graph also computes rows beyond the live ones, whose positions must stay in the cache.
        self.positions[:n] = (positions + 1).clamp(max=len(self.columns) - 1)

    def replay(self, n):
        """decode(n) as one CUDA graph over the whole length of the cache: one launch a step."""
        if n not in self.graphs:
            self.graphs[n] = self.capture(n)
        self.graphs[n].replay()

    def capture(self, n):
        extents = [(slice(0, n), len(self.columns))]
        tokens, positions = self.tokens.clone(), self.positions.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.decode(n, extents)  # warm-up; the step itself overwrites what it writes
        torch.cuda.current_stream().wait_stream(side)
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records, and computes nothing
            self.decode(n, extents)
        return graph

    def move(self, source, target):
        """Copy row `source` over row `target`."""
        extent = self.extents[source]
        for cache in self.caches:
            for x in cache:
                x[target, :, :extent] = x[source, :, :extent]
        for x in (self.tokens, self.positions, self.prompt_lengths, self.keys):
            x[target] = x[source]
        self.extents[target] = extent


# ---- from logits to tokens ----


def sample_tokens(logits, keys, draw, temperature, top_k, top_p, banned):
    """Tokens (n,) from logits (n, V).

    keys, draw  (n,): a row's uniform number is the draw-th of its key's stream

    A row whose logits are not finite gets NO_TOKEN. The largest logit tells: it is nan where any
    is nan, and inf where any is inf; -inf is a token of probability 0, as banned ones are."""
    if len(banned):
        logits = logits.index_fill(1, banned, -torch.inf)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
        largest = logits.gather(1, tokens[:, None])
    else:
        logits = logits.float() / temperature
        largest = logits.amax(dim=-1, keepdim=True)
        weights = logits.sub_(largest).exp_()
        if top_k or top_p < 1:
            weights = filter_probs(weights / weights.sum(dim=-1, keepdim=True), top_k, top_p)
        tokens = inverse_cdf(weights, uniforms(keys, draw))
    return tokens.masked_fill(~largest.squeeze(1).isfinite(), NO_TOKEN)


def filter_probs(probs, top_k, top_p):
    """Zero all but the top_k likeliest, and of these all but the fewest that hold top_p."""
    if 0 < top_k < probs.shape[-1]:
        least = probs.topk(top_k, dim=-1).values[:, -1:]
        probs = torch.where(probs < least, 0.0, probs)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    if top_p < 1:
        descending, order = probs.sort(dim=-1, descending=True, stable=True)
        before = descending.cumsum(dim=-1) - descending
        kept = torch.where(before >= top_p, 0.0, descending)  # the likeliest is always kept
        probs = probs.scatter(1, order, kept)
    return probs


def inverse_cdf(probs, u):
    """The token at which the cumulative sum of probs (n, V) passes u (n,) times the total.

    A sum over blocks finds the block first, in float64, then a sum inside it finds the token."""
    n, V = probs.shape
    if V % CDF_BLOCK:
        probs = F.pad(probs, (0, -V % CDF_BLOCK))
    probs = probs.view(n, -1, CDF_BLOCK)
    sums = probs.sum(dim=-1).double().cumsum(dim=-1)  # (n, blocks)
    goal = u * sums[:, -1]
    block = torch.searchsorted(sums, goal[:, None], right=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    rows = block[..., None].expand(-1, -1, CDF_BLOCK)
    inside = probs.gather(1, rows).squeeze(1).double()  # (n, CDF_BLOCK)
    column = torch.searchsorted(inside.cumsum(dim=-1), goal[:, None] - before, right=True)
    # Rounding may carry the goal past the block's end: then take the last token with probability.
    columns = torch.arange(1, CDF_BLOCK + 1, device=probs.device)
    last = ((inside > 0) * columns).amax(dim=-1, keepdim=True) - 1
    column = torch.minimum(column, last.clamp(min=0))
    return (block * CDF_BLOCK + column).squeeze(1)


# ---- randomness by hashing ----


def hash64(*numbers):
    """A 64-bit hash of whole numbers, on the host: splitmix64's finaliser, chained."""
    h = 0
    for number in numbers:
        h = (h + GOLDEN_RATIO + (number & MASK64)) & MASK64
        h = ((h ^ (h >> 30)) * MULTIPLIERS[0]) & MASK64
        h = ((h ^ (h >> 27)) * MULTIPLIERS[1]) & MASK64
        h ^= h >> 31
    return h


def uniforms(keys, draw):
    """Uniform numbers in [0, 1), float64 (n,): the same finaliser over key + draw * golden ratio.

    Tensors have signed 64-bit integers only: products wrap around as they should, and a right
    shift must mask off the sign's bits."""
    h = keys + (draw + 1) * as_signed(GOLDEN_RATIO)
    h = (h ^ shift_right(h, 30)) * as_signed(MULTIPLIERS[0])
    h = (h ^ shift_right(h, 27)) * as_signed(MULTIPLIERS[1])
    h = h ^ shift_right(h, 31)
    return shift_right(h, 11).double() * 2.0**-53


def as_signed(number):
    """An unsigned 64-bit integer as the signed one with the same bits."""
    return number - 2**64 if number >= 2**63 else number


def shift_right(x, bits):
    """A right shift of signed 64-bit integers that fills with zeros."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
