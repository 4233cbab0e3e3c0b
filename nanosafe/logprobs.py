"""Log-probabilities of target tokens without ever storing the (N, V) logits.

For N tokens and a vocabulary of V, the logits of a micro-batch would be the largest tensor of a
training step. Both functions here compute them piece by piece and keep only what is needed.

LogProbs cuts the vocabulary into blocks. Its backward pass computes each block's logits again,
which costs one more matrix product and saves 6 N V bytes.

UniformLogProbs is for losses that are a mean, so that every log-probability has the same weight.
Then the gradients can be made in the forward pass, a few rows at a time, up to one factor that the
backward pass applies. It needs three matrix products with the vocabulary instead of four.

Shapes: N tokens that are read, D width, V vocabulary. x (N, D) are the hidden states after the last
norm, weight (V, D) is the output embedding, targets (N,) int64 are the tokens that follow.
"""

import torch

BLOCK_MIB = 8  # logits of LogProbs at a time on a CPU: they should stay in its cache
CHUNK_MIB = 32  # logits of UniformLogProbs at a time on a CPU
GPU_MIB = 512  # both, on a GPU


class LogProbs(torch.autograd.Function):
    """log softmax(x @ weight.T / temperature)[targets]  -> (N,) float32."""

    @staticmethod
    def forward(ctx, x, weight, targets, temperature):
        log_sums = x.new_full((len(x),), -torch.inf, dtype=torch.float32)
        target_logits = torch.full_like(log_sums, -torch.inf)
        for block in split_into_spans(len(weight), len(x), x, BLOCK_MIB):
            logits = compute_logits(x, weight[block]).div_(temperature)
            log_sums = torch.logaddexp(log_sums, logits.logsumexp(dim=1))
            column, inside = columns_of_targets(targets, block)
            target_logits = torch.where(inside, logits.gather(1, column).squeeze(1), target_logits)
        ctx.save_for_backward(x, weight, targets, log_sums)
        ctx.temperature = temperature
        return target_logits - log_sums

    @staticmethod
    def backward(ctx, grad):
        x, weight, targets, log_sums = ctx.saved_tensors
        grad = grad[:, None] / ctx.temperature
        dx = torch.zeros_like(x, dtype=torch.float32)
        # A frozen head, beside which adapters are trained, has no gradient.
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for block in split_into_spans(len(weight), len(x), x, BLOCK_MIB):
            logits = compute_logits(x, weight[block]).div_(ctx.temperature)
            probs = logits.sub_(log_sums[:, None]).exp_()
            # d logp / d logits = onehot(target) - probs
            column, inside = columns_of_targets(targets, block)
            dlogits = probs.mul_(-grad).scatter_add_(1, column, grad * inside[:, None]).to(x.dtype)
            dx += dlogits @ weight[block]
            if dweight is not None:
                torch.mm(dlogits.T, x, out=dweight[block])
        return dx.to(x.dtype), dweight, None, None


class UniformLogProbs(torch.autograd.Function):
    """The same numbers, for a loss that weighs all of them alike."""

    @staticmethod
    def forward(ctx, x, weight, targets, temperature):
        logps = torch.empty(len(x), device=x.device)
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        chunks = split_into_spans(len(x), len(weight), x, CHUNK_MIB)
        longest = len(x[chunks[0]]) if chunks else 0
        # It is used for all chunks, because fresh memory pages are slow.
        buffer = x.new_empty(longest, len(weight), dtype=product_dtype(x))
        for rows in chunks:
            logits = compute_logits(x[rows], weight, out=buffer[: len(x[rows])])
            if temperature != 1:
                logits /= temperature
            target = targets[rows, None]
            largest = logits.amax(dim=1)
            logps[rows] = logits.gather(1, target).squeeze(1) - largest
            probs = torch.softmax(logits, dim=1, out=logits)
            # The likeliest token's log-probability is largest - log(sum(exp(logits))).
            logps[rows] += probs.amax(dim=1).log()
            # d logp / d logits = onehot(target) - probs, here with the sign turned
            dlogits = probs.scatter_add_(1, target, -torch.ones_like(largest)[:, None]).to(x.dtype)
            torch.mm(dlogits, weight, out=dx[rows]).div_(-temperature)
            if dweight is not None:
                dweight.addmm_(dlogits.T, x[rows], alpha=-1 / temperature)
        ctx.gradients = dx, dweight
        return logps

    @staticmethod
    def backward(ctx, grad):
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so used only once
        if len(grad):
            # uniform_weights=True promises that all are equal. Where they are not, the gradient
            # becomes NaN, which the optimizer step reports: a failed assertion on a GPU would end
            # the process without a word, also where a loss is not finite.
            is_uniform = (grad == grad[0]).all()
            factor = torch.where(is_uniform, grad[0], torch.nan)
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
        return *gradients, None, None


def product_dtype(x):
    """The type of the product of x with the vocabulary: on a GPU always float32.

    A logit of 16 to 32 that is rounded to bfloat16 is wrong by up to 0.06. A CPU has no kernel that
    multiplies bfloat16 to float32."""
    return torch.float32 if x.is_cuda else x.dtype


def compute_logits(x, weight, out=None):
    """The logits x @ weight.T (N, V) in float32.

    out  memory of product_dtype(x) for the product"""
    if product_dtype(x) != x.dtype:
        return torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
    return torch.mm(x, weight.T, out=out).float()


def split_into_spans(count, width, x, cpu_mib):
    """Slices of range(count), so that a slice's rows of `width` float32 numbers fit the budget."""
    mib = GPU_MIB if x.is_cuda else cpu_mib
    numbers = mib * 2**20 // 4
    size = max(1, numbers // max(1, width))
    return [slice(begin, begin + size) for begin in range(0, count, size)]


def columns_of_targets(targets, block):
    """Each target's column in a block of the vocabulary (N, 1), and whether it lies there (N,)."""
    inside = (targets >= block.start) & (targets < block.stop)
    return torch.where(inside, targets - block.start, 0)[:, None], inside
