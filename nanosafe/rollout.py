"""Sample many responses fast.

A small engine: prompts are prefilled packed, into a preallocated key-value cache of `slots` rows;
every step decodes one token for all rows at once; a finished row is refilled by the next prompt,
and when none is left the rows close ranks. generate() meets no other rank, sample_all() at its end.

Sampling is a pure function: the uniform number behind a token is a hash of (seed, prompt uid,
position), turned into a token by the inverse of the cumulative distribution: the same prompt gives
the same response whatever the batch, the slots or the rank (up to ties in floating point).

Shapes: n live rows, S slots, V vocabulary, R = max_new_tokens."""

import torch
from nanosafe import attention
from nanosafe.model import linear
from nanosafe.parallel import all_gather_lists, gathered_for_sampling

MASK64 = 2**64 - 1
PREFILL_TOKENS = 8192  # packed prompt tokens per prefill on a GPU; on a CPU an eighth
GROUP = 16  # rows that on a CPU read as much of the cache as the longest of them


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
):
    """Sample one response for each prompt.

    model           LLaMA with head "lm", its parameters whole on one device
    prompts         list of lists of token ids, each with at least one
    max_new_tokens  longest response: an int, or one per prompt
    temperature     divides the logits; 0 takes the likeliest token
    top_k, top_p    sample from the k likeliest tokens, from the fewest of probability p; 0, 1: all
    eos_ids         ids that end a response (and belong to it)
    seed, uids      the randomness of prompt i is that of (seed, uids[i]); a uid is an int or a
                    tuple of ints, by default i. For several samples of a prompt: (uid, sample).
    slots           rows decoded together; 0: up to 256, as memory allows
    banned          ids that are never sampled
    on_finish()     is called for every response that is done
    on_token(i, t)  is called for every token t of prompt i; if it returns true, that is the last

    Returns the responses, lists of ids in the order of the prompts, with the EOS when sampled."""
    if len(prompts) == 0:
        return []
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    assert all(len(p) > 0 for p in prompts) and min(limits) > 0
    uids = range(len(prompts)) if uids is None else uids
    keys = [hash64(seed, *(uid if isinstance(uid, tuple) else (uid,))) for uid in uids]
    longest = max(len(p) + limit for p, limit in zip(prompts, limits))
    engine = Engine(model, slots, len(prompts), longest, (temperature, top_k, top_p, banned))
    work = Scheduler(engine, prompts, keys, limits, set(eos_ids), on_finish, on_token)
    while work.waiting or work.live:
        work.refill()
        if work.live:
            work.accept(engine.step(len(work.live)), 0)
    return work.responses


def sample_all(model, prompts, world, max_new_tokens, uids=None, **sampling):
    """generate() over all ranks, each sampling its share: every rank has all responses."""
    every, share = range(len(prompts)), slice(world.rank, None, world.size)
    limits = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[share]
    with gathered_for_sampling(model) as policy:
        sampled = generate(policy, prompts[share], limits, uids=(uids or every)[share], **sampling)
    return all_gather_lists(sampled, every[share], len(prompts))


class Scheduler:
    """The host's side: which prompt is in which row, and what its response is so far."""

    def __init__(self, engine, prompts, keys, limits, eos, on_finish, on_token):
        self.engine, self.prompts, self.keys = engine, prompts, keys
        self.limits, self.eos = limits, eos
        self.on_finish, self.on_token = on_finish, on_token
        self.responses = [[] for _ in prompts]
        # The longest first: rows of like length lie together, and the last to end is a short one.
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        self.live = []  # live[row] is the prompt in that row: rows 0 .. len(live) - 1 of the engine

    def refill(self):
        """Prefill free rows with the next prompts, in packs of about PREFILL_TOKENS."""
        most = PREFILL_TOKENS if self.engine.device.type == "cuda" else PREFILL_TOKENS // 8
        while self.waiting and len(self.live) < self.engine.slots:
            first, count = len(self.live), 0
            while self.waiting and len(self.live) < self.engine.slots and count < most:
                count += len(self.prompts[self.waiting[-1]])
                self.live.append(self.waiting.pop())
            new = self.live[first:]
            tokens = self.engine.prefill(
                first, [self.prompts[i] for i in new], [self.keys[i] for i in new]
            )
            self.accept(tokens, first)

    def accept(self, tokens, first):
        """Append the new token of each row from `first` on; the last takes a finished row's."""
        for row in reversed(range(first, first + len(tokens))):
            i, token = self.live[row], tokens[row - first]
            self.responses[i].append(token)
            done = self.on_token and self.on_token(i, token)
            if done or token in self.eos or len(self.responses[i]) == self.limits[i]:
                last = self.live.pop()
                if row < len(self.live):
                    self.live[row] = last
                    self.engine.move(len(self.live), row)
                if self.on_finish:
                    self.on_finish()


class Engine:
    """The device's side: a cache of S rows, each one's next token, position, key."""

    def __init__(self, model, slots, wanted, length, sampling):
        c, weight = model.config, model.embed_tokens.weight
        self.model, self.device = model, weight.device
        self.sampling = *sampling[:3], torch.tensor(sampling[3], dtype=torch.int64).to(self.device)
        self.head = model.output_embedding()
        dtype = attention.attention_dtype(weight)
        model.check_length(length)
        length = -(-length // 64) * 64
        if not slots:
            row = 2 * len(model.layers) * c.num_key_value_heads * c.head_dim * length
            free = torch.cuda.mem_get_info(self.device)[0] if weight.is_cuda else 4 * 2**30
            slots = max(1, min(256, free // 2 // (row * dtype.itemsize)))
        self.slots = min(slots, wanted)
        shape = self.slots, c.num_key_value_heads, length, c.head_dim
        zeros = lambda: torch.zeros(shape, dtype=dtype, device=self.device)
        self.caches = [attention.Cache(zeros(), zeros()) for _ in model.layers]
        self.rows = torch.arange(self.slots, device=self.device)
        self.columns = torch.arange(length, device=self.device)
        state = torch.zeros(4, self.slots, dtype=torch.int64, device=self.device)
        self.tokens, self.positions, self.prompt_lengths, self.keys = state
        self.extents = [0] * self.slots  # positions + 1, on the host: no more of the cache is read
        self.graphs = {}  # rows -> CUDA graph of decode() for that many

    def prefill(self, first, prompts, keys):
        """Read whole prompts into the rows from `first` on; returns each response's first token."""
        ints = lambda x, dtype=torch.int64: torch.tensor(x, dtype=dtype, device=self.device)
        lengths = ints([len(p) for p in prompts])
        rows = slice(first, first + len(prompts))
        ends = lengths.cumsum(0)
        cu_seqlens = torch.cat((ends.new_zeros(1), ends)).int()
        flat = ints([token for p in prompts for token in p])
        seqs = attention.pack(cu_seqlens, max(map(len, prompts)), len(flat), slots=self.rows[rows])
        x = self.model.hidden_states(flat, seqs, self.caches)[ends - 1]
        self.keys[rows] = ints([key - 2**64 if key >= 2**63 else key for key in keys])
        self.positions[rows] = lengths
        self.prompt_lengths[rows] = lengths
        self.tokens[rows] = sample_tokens(
            linear(x, self.head), self.keys[rows], torch.zeros_like(lengths), *self.sampling
        )
        for row, prompt in enumerate(prompts, start=first):
            self.extents[row] = len(prompt) + 1
        return self.tokens[rows].tolist()

    def step(self, n):
        """Decode one token for each of the first n rows; returns the n new tokens."""
        if self.device.type == "cuda":
            self.replay(min(self.slots, 1 << (n - 1).bit_length()))  # graphs for powers of two only
        else:  # no key is read that none of a group's rows has
            parts = [slice(i, min(i + GROUP, n)) for i in range(0, n, GROUP)]
            self.decode(n, [(rows, max(self.extents[rows])) for rows in parts])
        for row in range(n):
            self.extents[row] += 1
        return self.tokens[:n].tolist()

    def decode(self, n, parts):
        """One token for the first n rows, whose `parts`, (rows, extent), see that many keys."""
        positions = self.positions[:n]
        groups = [
            (rows, (self.columns[:extent] <= positions[rows, None])[:, None, None])
            for rows, extent in parts
        ]  # masks (rows, 1, 1, extent)
        step = attention.DecodeBatch(positions, self.rows[:n], groups)
        logits = linear(self.model.hidden_states(self.tokens[:n], step, self.caches), self.head)
        index = positions - self.prompt_lengths[:n] + 1
        self.tokens[:n] = sample_tokens(logits, self.keys[:n], index, *self.sampling)
        # A graph also computes rows beyond the live ones; theirs must stay inside the cache.
        self.positions[:n] = (positions + 1).clamp(max=len(self.columns) - 1)

    def replay(self, n):
        """decode(n) as one CUDA graph over the whole cache length: one launch a step."""
        if n not in self.graphs:
            parts = [(slice(0, n), len(self.columns))]
            state = self.tokens.clone(), self.positions.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.decode(n, parts)  # warm up; what it writes is overwritten by the same step
            torch.cuda.current_stream().wait_stream(side)
            for x, kept in zip((self.tokens, self.positions), state):
                x.copy_(kept)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, and computes nothing
                self.decode(n, parts)
            self.graphs[n] = graph
        self.graphs[n].replay()

    def move(self, source, target):
        """Row `source` takes the place of row `target`."""
        extent = self.extents[source]
        for cache in self.caches:
            for x in cache:
                x[target, :, :extent] = x[source, :, :extent]
        for x in (self.tokens, self.positions, self.prompt_lengths, self.keys):
            x[target] = x[source]
        self.extents[target] = extent


def sample_tokens(logits, keys, index, temperature, top_k, top_p, banned):
    """Tokens (n,) from logits (n, V): the index-th draw of each row's key."""
    logits = logits.index_fill(1, banned, -torch.inf) if len(banned) else logits
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    if top_k or top_p < 1:
        weights = filter_probs(weights / weights.sum(dim=-1, keepdim=True), top_k, top_p)
    return inverse_cdf(weights, uniforms(keys, index))


def filter_probs(probs, top_k, top_p):
    """Zero what is outside the top_k likeliest, then outside the fewest with top_p of the rest."""
    if 0 < top_k < probs.shape[-1]:
        least = probs.topk(top_k, dim=-1).values[:, -1:]
        probs = torch.where(probs < least, 0.0, probs)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p  # the likeliest is always inside
        probs = probs.scatter(1, order, torch.where(outside, 0.0, ordered))
    return probs


def inverse_cdf(probs, u):
    """The token at which the cumulative sum of probs (n, V) passes u (n,) of the total."""
    n, V = probs.shape
    block = 128
    if V % block:
        probs = torch.nn.functional.pad(probs, (0, -V % block))
    probs = probs.view(n, -1, block)
    sums = probs.sum(dim=-1).double().cumsum(dim=-1)  # (n, blocks)
    goal = u * sums[:, -1]
    which = torch.searchsorted(sums, goal[:, None], right=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(which > 0, sums.gather(1, (which - 1).clamp(min=0)), 0.0)
    inside = probs.gather(1, which[..., None].expand(-1, -1, block)).squeeze(1).double()
    token = torch.searchsorted(inside.cumsum(dim=-1), goal[:, None] - before, right=True)
    # Rounding may carry the goal past the block's end: take the last possible one.
    places = torch.arange(1, block + 1, device=probs.device)
    last = ((inside > 0) * places).amax(dim=-1, keepdim=True) - 1
    return (which * block + torch.minimum(token, last.clamp(min=0))).squeeze(1)


def hash64(*numbers):
    """A 64-bit hash of whole numbers, on the host (splitmix64's finaliser, chained)."""
    h = 0
    for number in numbers:
        h = (h + 0x9E3779B97F4A7C15 + (number & MASK64)) & MASK64
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & MASK64
        h ^= h >> 31
    return h


def uniforms(keys, index):
    """Uniform numbers in [0, 1), float64 (n,): the same finaliser over key + index * golden ratio.

    Tensors have signed 64-bit integers only: products wrap, right shifts mask sign bits off."""
    signed = lambda x: x - 2**64 if x >= 2**63 else x
    shift = lambda x, k: (x >> k) & (2 ** (64 - k) - 1)
    h = keys + (index + 1) * signed(0x9E3779B97F4A7C15)
    h = (h ^ shift(h, 30)) * signed(0xBF58476D1CE4E5B9)
    h = (h ^ shift(h, 27)) * signed(0x94D049BB133111EB)
    h = h ^ shift(h, 31)
    return shift(h, 11).double() * 2.0**-53
