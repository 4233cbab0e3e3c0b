"""LLaMA (arXiv:2302.13971), and its two heads: the next token's distribution, or a score per token.

Everything downstream is arithmetic on what forward() returns for each token of packed sequences.

Shapes: N packed tokens, B sequences, V vocabulary, D width, H heads, K kv heads, E head width."""

import torch


class LogProbs(torch.autograd.Function):
    """log softmax(x @ weight.T / temperature)[targets] in blocks of the vocabulary: (N, V) logits
    never exist, those of a block stay in a CPU's cache, dweight is written once.

    The backward pass computes each block's logits again: one matrix product, 6 N V bytes less."""

    @staticmethod
    def forward(ctx, x, weight, targets, temperature):
        sums, logps = x.new_full((2, len(x)), -torch.inf, dtype=torch.float32)
        for block in split_into_spans(len(weight), len(x), x, 8):
            logits = (x @ weight[block].T).float().div_(temperature)
            sums = torch.logaddexp(sums, logits.logsumexp(dim=1))
            column, inside = columns_of_targets(targets, block)
            logps = torch.where(inside, logits.gather(1, column).squeeze(1), logps)
        ctx.save_for_backward(x, weight, targets, sums)
        ctx.temperature = temperature
        return logps - sums

    @staticmethod
    def backward(ctx, grad):
        x, weight, targets, sums = ctx.saved_tensors
        grad = grad[:, None] / ctx.temperature
        dx, dweight = torch.zeros_like(x, dtype=torch.float32), torch.empty_like(weight)
        for block in split_into_spans(len(weight), len(x), x, 8):
            # d logp / d logits = onehot(target) - softmax(logits)
            d = (x @ weight[block].T).float().div_(ctx.temperature).sub_(sums[:, None]).exp_()
            column, inside = columns_of_targets(targets, block)
            d = d.mul_(-grad).scatter_add_(1, column, grad * inside[:, None]).to(x.dtype)
            dx += d @ weight[block]
            torch.mm(d.T, x, out=dweight[block])
        return dx.to(x.dtype), dweight, None, None


class UniformLogProbs(torch.autograd.Function):
    """LogProbs for a loss that weighs them all alike (a mean): their sum's gradients are made in
    the same pass, a few rows at a time, and the backward pass scales them.

    Three matrix products with the vocabulary instead of four, and half the exponentials."""

    @staticmethod
    def forward(ctx, x, weight, targets, temperature):
        logps = torch.empty(len(x), device=x.device)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        chunks = split_into_spans(len(x), len(weight), x, 32)
        memory = x.new_empty(len(x[chunks[0]]) if chunks else 0, len(weight))  # new pages are slow
        for rows in chunks:
            logits = torch.mm(x[rows], weight.T, out=memory[: len(x[rows])]).float()
            if temperature != 1:
                logits /= temperature
            target, most = targets[rows, None], logits.amax(dim=1)
            logps[rows] = logits.gather(1, target).squeeze(1) - most
            p = torch.softmax(logits, dim=1, out=logits)
            logps[rows] += p.amax(dim=1).log()  # the likeliest's log p is most - log sum exp
            # d logp / d logits = onehot(target) - p
            d = p.scatter_add_(1, target, -torch.ones_like(most)[:, None]).to(x.dtype)
            torch.mm(d, weight, out=dx[rows]).div_(-temperature)
            dweight.addmm_(d.T, x[rows], alpha=-1 / temperature)
        ctx.made = dx, dweight
        return logps

    @staticmethod
    def backward(ctx, grad):
        made, ctx.made = ctx.made, None  # scaled in place: a gradient is used once
        if len(grad):
            torch._assert_async((grad == grad[0]).all())  # what even=True promised
            for x in made:
                x.mul_(grad[0])
        return *made, None, None


def split_into_spans(count, width, x, mib):
    """Slices of `count` rows of `width` float32 numbers: of `mib` MiB on a CPU, 512 on a GPU."""
    size = max(1, (2**27 if x.is_cuda else mib * 2**18) // max(1, width))
    return [slice(i, i + size) for i in range(0, count, size)]


def columns_of_targets(targets, block):
    """Where in a block of the vocabulary each target (N,) is, (N, 1), and whether it is there."""
    inside = (targets >= block.start) & (targets < block.stop)
    return torch.where(inside, targets - block.start, 0)[:, None], inside
