"""Sample many responses fast.

The engine prefills prompts, packed, into a preallocated key-value cache of `slots` rows. Every step
decodes one token for all live rows at once. A row whose response is finished is refilled with the
next prompt; when no prompt is left, the last live row moves into its place, so live rows stay
contiguous. generate() runs no collective, so ranks may stop at different times; sample_all() runs
one, at its end.

Sampling is a pure function. The uniform number behind each token is a hash of (seed, uid of the
prompt, position in the response), turned into a token by the inverse of the cumulative
distribution. So a prompt gets the same response whatever the batch, the slot, the refill order or
the number of ranks. On a CPU in float32 this holds to the last bit. On a GPU the rounding of a
matrix product depends on its number of rows, so a token may now and then fall on the other side of
a tie, and what follows it differs too.

Shapes: n live rows, S slots, V vocabulary, T cached positions."""

from functools import cache
from math import ceil
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from nanosafe import attention, rope
from nanosafe.errors import stop
from nanosafe.lora import AdaptedLLaMA, list_tensors
from nanosafe.model import linear
from nanosafe.parallel import all_gather_lists, gathered_for_sampling
from nanosafe.printing import say_once

MASK64 = 2**64 - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio: splitmix64's increment
MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64's finaliser
PREFILL_TOKENS = {"cuda": 8192, "cpu": 1024}  # packed prompt tokens per prefill, about
MAX_SLOTS = 256  # where `slots` is 0 and memory allows
CPU_CACHE_BYTES = 4 * 2**30  # memory that the cache assumes to be free on a CPU
CACHE_STEP = 64  # the cache's length is a multiple of this
CPU_GROUP = 16  # rows that read as much of the cache as the longest of them, on a CPU
EXTENT_STEP = 32  # on a GPU all rows read as much as the longest, up to a multiple of this
EXACT_ROWS = 16  # up to so many rows a CUDA graph has no spare ones, then at most a sixteenth
REFILL_SHARE = 16  # rows are refilled when a sixteenth of them is free: a prefill costs a step
KEPT_SHARE = 16  # a cache of up to a sixteenth of a GPU's memory is kept for the next generate()
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
    with_logps: bool = False  # whether the tokens' log-probabilities are computed, too


class Drawn(NamedTuple):
    """A new token for each of n rows; lists once they are on the host."""

    tokens: torch.Tensor  # (n,)
    logps: torch.Tensor = None  # (n,) their log-probabilities, if they are asked for


class Sampled(NamedTuple):
    """Responses, in the order of the prompts, and how likely their tokens were."""

    responses: list  # of lists of ids
    logps: list  # of lists of numbers: the log-probability of each id


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
    with_logps=False,
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
    with_logps      return Sampled(responses, logps). A log-probability is that of the softmax over
                    the whole vocabulary at this temperature (at 1 where temperature is 0), as a
                    trainer computes it: what top_k, top_p and banned leave out counts, too
    on_finish()     is called for every response that is finished
    on_token(i, t)  is called for every token t of prompt i; if it returns true, that is the last
    name            what the model is called where its weights turn out to be broken

    Returns the responses, lists of ids in the order of the prompts, EOS included when sampled.
    Stops with one line where the logits are not finite."""
    if len(prompts) == 0:
        return Sampled([], []) if with_logps else []
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
    banned = torch.tensor(banned, dtype=torch.int64).to(device)
    sampling = Sampling(temperature, top_k, top_p, banned, with_logps)
    engine = open_engine(model, slots, len(prompts), length, sampling)
    scheduler = Scheduler(engine, prompts, keys, limits, set(eos_ids), on_finish, on_token, name)
    while scheduler.waiting or scheduler.live:
        scheduler.refill()
        if scheduler.live:
            scheduler.renew_rows_that_grow_long()
            scheduler.accept(engine.step(len(scheduler.live)), first_row=0)
    keep_engine(engine)
    if with_logps:
        return Sampled(scheduler.responses, scheduler.logps)
    return scheduler.responses


def sample_all(model, prompts, world, max_new_tokens, uids=None, with_logps=False, **sampling):
    """generate() over all ranks, each of which samples its share: every rank gets all responses."""
    indices = range(len(prompts))
    uids = indices if uids is None else uids
    share = slice(world.rank, None, world.size)
    limits = max_new_tokens
    if not isinstance(max_new_tokens, int):
        limits = max_new_tokens[share]
    with gathered_for_sampling(model) as policy:
        out = generate(
            policy, prompts[share], limits, uids=uids[share], with_logps=with_logps, **sampling
        )
    if not with_logps:
        return all_gather_lists(out, indices[share], len(prompts))
    pairs = list(zip(out.responses, out.logps))
    gathered = all_gather_lists(pairs, indices[share], len(prompts))
    responses = [pair[0] for pair in gathered]
    logps = [pair[1] for pair in gathered]
    return Sampled(responses, logps)


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
        self.logps = [[] for _ in prompts]  # of the responses' tokens, if they are asked for
        # The longest prompt is taken first, from the end of this list: rows of like length lie
        # together, and the last response to end belongs to a short prompt.
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        self.live = []  # live[row] is the prompt in that row of the engine

    def refill(self):
        """Prefill free rows with the next prompts, in packs of about PREFILL_TOKENS.

        A prefill takes about as long for one prompt as for some: a few free rows wait for more."""
        free = self.engine.slots - len(self.live)
        if self.live and free < max(1, self.engine.slots // REFILL_SHARE):
            return
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

    def accept(self, drawn, first_row):
        """Append the new token of each row from first_row on, and free the rows that are finished.

        Rows are visited from the last one down, so that the row that moves into a freed one has
        been visited before."""
        tokens, logps = drawn
        if NO_TOKEN in tokens:
            stop(
                f"{self.name} gives logits that are not finite: its weights are broken, or "
                "temperature, by which they are divided, is too small"
            )
        for row in reversed(range(first_row, first_row + len(tokens))):
            i, token = self.live[row], tokens[row - first_row]
            self.responses[i].append(token)
            if logps is not None:
                self.logps[i].append(logps[row - first_row])
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
    """The device's side: a cache of S rows, and each row's next token, position and randomness."""

    def __init__(self, model, slots, wanted, length, sampling):
        """slots: rows at most, 0 for as many as fit; wanted: how many prompts there are;
        length: the longest prompt and response together."""
        config = model.config
        self.model = model
        self.device = model.embed_tokens.weight.device
        self.uses_graphs = has_graphs(self.device)
        self.sampling = sampling
        self.head = model.output_embedding()
        dtype = attention.attention_dtype(model.embed_tokens.weight)
        self.border = rope.find_border(config)  # tokens; 0: a text's RoPE does not change with it
        model.check_length(length)
        length = CACHE_STEP * ceil(length / CACHE_STEP)
        row_bytes = cache_bytes_per_token(config, dtype) * length
        if not slots:
            slots = self.count_slots_that_fit(row_bytes, min(wanted, MAX_SLOTS))
        self.slots = min(slots, wanted)
        self.cache_bytes = self.slots * row_bytes
        shape = self.slots, config.num_key_value_heads, length, config.head_dim
        self.caches = []
        for _ in model.layers:
            keys = torch.zeros(shape, dtype=dtype, device=self.device)
            values = torch.zeros(shape, dtype=dtype, device=self.device)
            self.caches.append(attention.Cache(keys, values))
        self.rows = torch.arange(self.slots, device=self.device)
        self.columns = torch.arange(length, device=self.device)
        self.tokens = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        self.positions = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        # uniforms[row, t] chooses the token at position t of the row.
        self.uniforms = torch.zeros(self.slots, length, dtype=torch.float64, device=self.device)
        self.logps = None
        if sampling.with_logps:
            self.logps = torch.zeros(self.slots, device=self.device)
        # Each row's position + 1, known on the host, so that no more of the cache is read.
        self.extents = [0] * self.slots
        if self.uses_graphs:
            self.graphs = {}  # (rows, extent) -> CUDA graph of decode() for them
            self.pool = torch.cuda.graph_pool_handle()  # of memory, one for all graphs
            self.addresses = addresses_of(model)

    def count_slots_that_fit(self, row_bytes, wanted):
        """Rows whose keys and values take half of the free memory, at most `wanted`."""
        if self.uses_graphs:
            # What torch holds without using it counts as taken until it is given back.
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = CPU_CACHE_BYTES
        fitting = max(1, free // 2 // row_bytes)
        if self.uses_graphs and fitting < wanted:
            say_once(
                f"note: {fitting} responses are decoded at a time, not {wanted}: the cache of each "
                f"takes {row_bytes / 2**20:.0f} MiB, and half of the {free / 2**30:.1f} GiB that "
                "are free on the GPU is theirs"
            )
        return min(wanted, fitting)

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
        self.positions[rows] = lengths
        keys = self.make_tensor([as_signed(key) for key in keys])
        draws = self.columns - lengths[:, None]  # the first token of a response is draw 0
        self.uniforms[rows] = uniforms(keys[:, None], draws)
        self.draw_tokens(rows, x, sample_tokens)
        for row, prompt in enumerate(prompts, start=first_row):
            self.extents[row] = len(prompt) + 1
        return self.read_drawn(rows)

    def draw_tokens(self, rows, x, sample):
        """Sample the tokens at the positions of some rows, from hidden states x (rows, D)."""
        logits = linear(x, self.head)
        u = self.uniforms[rows].gather(1, self.positions[rows, None]).squeeze(1)
        drawn = sample(logits, u, *self.sampling)
        self.tokens[rows] = drawn.tokens
        if drawn.logps is not None:
            self.logps[rows] = drawn.logps

    def read_drawn(self, rows):
        """What was sampled last for some rows, on the host. This waits for the device."""
        tokens = self.tokens[rows].tolist()
        if self.logps is None:
            return Drawn(tokens)
        return Drawn(tokens, self.logps[rows].tolist())

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
        """Decode one token for each of the first n rows; returns what is Drawn."""
        if self.uses_graphs:
            self.replay(min(self.slots, round_rows(n)), self.round_extent(n))
        else:
            extents = []  # a group reads as many keys as its longest row has
            for begin in range(0, n, CPU_GROUP):
                rows = slice(begin, min(begin + CPU_GROUP, n))
                extents.append((rows, max(self.extents[rows])))
            self.decode(n, extents)
        for row in range(n):
            self.extents[row] += 1
        return self.read_drawn(slice(0, n))

    def round_extent(self, n):
        """How many keys all of the first n rows read in a graph: those of the longest, rounded."""
        longest = max(self.extents[:n])
        return min(EXTENT_STEP * ceil(longest / EXTENT_STEP), len(self.columns))

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
        # A graph also computes rows beyond the live ones, whose positions must stay in the cache.
        self.positions[:n] = (positions + 1).clamp(max=len(self.columns) - 1)
        sample = compiled_sample_tokens() if self.model.compile_decoding else sample_tokens
        self.draw_tokens(slice(0, n), x, sample)

    def replay(self, n, extent):
        """decode() of n rows that read `extent` keys each, as a CUDA graph: one launch a step.

        The first time it is computed without one. While the GPU is busy with that, the host
        records the graph, which computes nothing, for the next time."""
        graph = self.graphs.get((n, extent))
        if graph:
            graph.replay()
            return
        extents = [(slice(0, n), extent)]
        stream = capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.decode(n, extents)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                self.decode(n, extents)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self.graphs[n, extent] = graph

    def move(self, source, target):
        """Copy row `source` over row `target`."""
        extent = self.extents[source]
        for layer in self.caches:
            for x in layer:
                x[target, :, :extent] = x[source, :, :extent]
        for x in (self.tokens, self.positions, self.uniforms):
            x[target] = x[source]
        self.extents[target] = extent


def has_graphs(device):
    """Whether decode steps are recorded as CUDA graphs."""
    return device.type == "cuda"


def cache_bytes_per_token(config, dtype):
    """What the keys and values of one token take, over all layers."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * dtype.itemsize


def round_rows(n):
    """How many rows a CUDA graph computes for n live ones, so that there are not too many graphs:
    n up to EXACT_ROWS, then the next of EXACT_ROWS steps between two powers of two."""
    power_of_two = 1 << (n - 1).bit_length()
    step = max(1, power_of_two // EXACT_ROWS)
    return step * ceil(n / step)


# ---- what stays on a GPU between two calls ----

# A graph holds the addresses of all that it reads and writes: the model's weights, the cache, and
# the tensors of its Engine. So the graphs of a plain model serve its next generate(), and go when
# the model goes. gathered_for_sampling() makes a new twin of a sharded model for each rollout,
# whose weights lie wherever there is room then: its graphs end with it.
kept_engines = WeakKeyDictionary()  # model -> the Engine of its last generate()


def open_engine(model, slots, wanted, length, sampling):
    """The Engine for a generate(): the kept one if it serves, or a new one."""
    engine = kept_engines.pop(model, None)
    rows = min(slots or MAX_SLOTS, wanted)
    if engine and can_serve(engine, model, rows, length, sampling):
        engine.model = model
        if model.config.norm_head:  # not a weight, but made of one, which may have been trained
            engine.head.copy_(model.output_embedding())
        return engine
    del engine  # its memory is free before the new one's slots are counted
    return Engine(model, slots, wanted, length, sampling)


def can_serve(engine, model, rows, length, sampling):
    """Whether a kept engine is large enough for so many rows of a length, and its graphs hold."""
    is_large_enough = engine.slots >= rows and len(engine.columns) >= length
    same_options = engine.sampling._replace(banned=None) == sampling._replace(banned=None)
    same_banned = torch.equal(engine.sampling.banned, sampling.banned)
    weights_stayed = engine.addresses == addresses_of(model)
    return is_large_enough and same_options and same_banned and weights_stayed


def keep_engine(engine):
    """Keep an engine with graphs for the model's next generate(), if its cache is small."""
    if not engine.uses_graphs:
        return
    total = torch.cuda.mem_get_info(engine.device)[1]
    if engine.cache_bytes * KEPT_SHARE <= total:
        kept_engines[engine.model] = engine
        engine.model = None  # else the kept engine would keep the model


def addresses_of(model):
    """Where the tensors lie that a model's decode steps read."""
    tensors = list(model.parameters())
    if isinstance(model, AdaptedLLaMA):
        tensors = [*model.base.parameters(), *list_tensors(model.kept_pairs or [])]
    return [tensor.data_ptr() for tensor in tensors]


@cache
def capture_stream():
    """The stream on which all graphs are recorded: cuBLAS keeps memory for every stream it sees."""
    return torch.cuda.Stream()


# ---- from logits to tokens ----


def sample_tokens(logits, u, temperature, top_k, top_p, banned, with_logps=False):
    """A token for each row (n,), Drawn from logits (n, V) by uniform numbers u (n,).

    A row whose logits are not finite gets NO_TOKEN. The largest logit tells: it is nan where any
    is nan, and inf where any is inf; -inf is a token of probability 0, as banned ones are."""
    allowed = logits.index_fill(1, banned, -torch.inf) if len(banned) else logits
    if temperature == 0:
        tokens = allowed.argmax(dim=-1)
        largest = allowed.gather(1, tokens[:, None])
    else:
        scaled = allowed.float() / temperature
        largest = scaled.amax(dim=-1, keepdim=True)
        weights = scaled.sub_(largest).exp_()
        probs = weights
        if top_k or top_p < 1:
            probs = filter_probs(weights / weights.sum(dim=-1, keepdim=True), top_k, top_p)
        tokens = inverse_cdf(probs, u)
    logps = None
    if with_logps and (temperature == 0 or len(banned)):
        logps = log_probs_at(tokens, logits, temperature or 1.0)
    elif with_logps:  # the same from what sampling has computed
        chosen = weights.gather(1, tokens[:, None]).squeeze(1)
        logps = (chosen / weights.sum(dim=-1)).log()
    tokens = tokens.masked_fill(~largest.squeeze(1).isfinite(), NO_TOKEN)
    return Drawn(tokens, logps)


@cache
def compiled_sample_tokens():
    """The same as a dozen kernels instead of fifty, for decode steps on a GPU."""
    return torch.compile(sample_tokens, dynamic=True)


def log_probs_at(tokens, logits, temperature):
    """log softmax(logits / temperature) of the tokens (n,)."""
    scaled = logits.float() / temperature
    return scaled.gather(1, tokens[:, None]).squeeze(1) - scaled.logsumexp(dim=-1)


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
    """Uniform numbers in [0, 1), float64: the same finaliser over key + draw * golden ratio.

    keys, draw  int64 tensors: a number is the draw-th of its key's stream. draw may be negative,
                for numbers that nobody reads

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
