"""Autograd functions that keep less for the backward than the plain operations, and give the same numbers.

    RMSNorm        keeps x and one number a position         instead of x in fp32, twice
    NormedSum      keeps the same                            and adds up the gradients that meet in the sum
    Gated          keeps gate and up                         instead of act(gate) as well
    Turned         keeps cos and sin, on a GPU               and makes x once instead of five times
    Laid           keeps where its rows lie, on a GPU        and adds their gradients up in a fixed order
    CrossEntropy   keeps one gradient the size of its input  instead of the logits, several times

`attention` has one more. They are for frozen weights: none of them has a gradient for a weight.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from lora_studio.core import kernels, upcast

# Positions whose logits are in memory together: as many as keep the products with the head busy.
CHUNK = {"cpu": 256, "mps": 128, "cuda": 512}
# Such a product has, or a multiple. On a CPU few are summed in another order, and a loss went by who shared its pass;
# a GPU would fetch another kernel for every number.
ROWS = {"cpu": 16, "mps": 16, "cuda": 128}
IN_FP32 = {
    "cpu": 16,
    "mps": 128,
    "cuda": 512,
}  # rows of a chunk that are widened together: they stay in a cache
LOG2E = 1 / math.log(2)  # powers of two take a third of the time of powers of e
SILU = (nn.SiLU, type(ACT2FN["silu"]))
aten = torch.ops.aten
Made = tuple[torch.Tensor, torch.Tensor | None]  # losses (positions,), gradient (positions, d)


class RMSNorm(torch.autograd.Function):
    """x / rms(x) · weight over the last dimension; weight (d,) in the dtype of x, or in fp32 for a product in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed, inverse, _ = _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        return _norm_backward(outer[0], x, weight, inverse), None, None


class NormedSum(torch.autograd.Function):
    """x + y, and the norm of it; of x alone with None for y. The gradients that meet in the sum are added on the way.

    A GPU has one kernel for it each way.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, inverse, total = _norm(x, weight, eps, y)
        ctx.save_for_backward(total, weight, inverse)
        ctx.adds = y is not None
        return total, normed

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        made = _norm_backward(outer[1], x, weight, inverse, outer[0])
        return made, made if ctx.adds else None, None, None


def _norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, more: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of x + more, 1 / rms of that (..., 1) in fp32, and that; of x, which it then is, where there is none."""
    if kernels.usable(x):
        return kernels.norm(x, weight, eps, more)
    total = x if more is None else x + more
    wide = total.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = torch.rsqrt(size.square_().div_(x.shape[-1]).add_(eps))
    scaled = wide * inverse if wide is total else wide.mul_(inverse)
    normed = scaled.mul_(weight).to(x.dtype) if weight.dtype != x.dtype else scaled.to(x.dtype).mul_(weight)
    return normed, inverse, total


def _norm_backward(
    outer: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    onward: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of x from that of its norm, and from `onward`, that of x where it goes on."""
    if kernels.usable(x):
        return kernels.norm_backward(outer, x, weight, inverse, onward)
    gradient, wide = (outer * weight).float(), x.float()
    along = torch.linalg.vecdot(gradient, wide)[..., None] * inverse.square() / x.shape[-1]
    gradient.addcmul_(wide, along, value=-1).mul_(inverse)
    return (gradient if onward is None else gradient.add_(onward)).to(x.dtype)


class Gated(torch.autograd.Function):
    """act(gate) · up, elementwise."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        if isinstance(act, SILU) and kernels.usable(gate):
            return kernels.silu_gate(gate, up)
        acted = act(gate)
        return acted * up if acted is gate else acted.mul_(up)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        if isinstance(ctx.act, SILU):
            if kernels.usable(gate):
                return *kernels.silu_gate_backward(outer[0], gate, up), None
            for_gate = outer[0] * up  # and into the same memory the rest of it
            aten.silu_backward.grad_input(for_gate, gate, grad_input=for_gate)
            return for_gate, F.silu(gate).mul_(outer[0]), None
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            acted = ctx.act(gate)
        (for_gate,) = torch.autograd.grad(acted, gate, outer[0] * up)
        return for_gate, acted.detach().mul_(outer[0]), None


class Turned(torch.autograd.Function):
    """x (1, heads, T, d) turned by its positions: x · cos + (-second half, first half) · sin; cos and sin (1, T, d)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return kernels.turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return kernels.turned(outer[0], *ctx.saved_tensors, back=True), None, None


def turned(
    plain: Callable, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k as `plain`, a model's own function, turns them: by kernels where these know the shapes."""
    whole = q.dim() == 4 and (1, *q.shape[2:]) == cos.shape == sin.shape
    if more or named or not whole or len(q) > 1 or cos.dtype != q.dtype or not kernels.usable(q):
        return plain(q, k, cos, sin, *more, **named)
    return Turned.apply(q, cos, sin), Turned.apply(k, cos, sin)  # type: ignore[return-value]


class Laid(torch.autograd.Function):
    """x (T, heads, d) laid again as x[order] (rows, heads, d), on a GPU.

    A token's gradient is the sum of those in its rows, rows[starts[t] : starts[t + 1]], in a fixed order; what is
    behind the last of them is nobody's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(starts, rows)
        return kernels.laid(x, order)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        summed = kernels.added_up(outer[0].flatten(1)[None], *ctx.saved_tensors)
        return summed.unflatten(1, outer[0].shape[1:]), None, None, None


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden @ headᵀ at each position (positions,), a chunk of them at a time.

    The gradient of the hidden states is made while the chunk's logits are there, so nothing of size
    (positions, vocabulary) is kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        real = len(hidden)
        if more := -real % ROWS[hidden.device.type]:
            hidden, labels = F.pad(hidden, (0, 0, 0, more)), F.pad(labels, (0, more))
        made = _losses_by_kernel if kernels.usable(hidden) else _losses
        losses, gradient = made(hidden, head, labels, learns=ctx.needs_input_grad[0])
        ctx.save_for_backward(None if gradient is None else gradient[:real])
        return losses[:real]

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0][:, None].to(gradient.dtype), None, None


def _losses(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, *, learns: bool) -> Made:
    """The loss of each position and, where something learns from it, the gradient of its hidden state."""
    losses, gradient = _room(hidden, learns=learns)
    most_rows = CHUNK[hidden.device.type]
    count, words, upcasts = min(most_rows, len(hidden)), len(head), upcast.needed(hidden)
    in_fp32 = upcasts or hidden.dtype == torch.float32  # how the head is multiplied
    by_word = in_fp32 and hidden.device.type == "cpu"
    # the same buffers for every chunk: fresh pages are not free
    piece = count if in_fp32 else min(IN_FP32[hidden.device.type], count)
    wide = _buffer(piece, words, hidden.device, by_word=by_word)
    logits = wide if in_fp32 else hidden.new_empty(count, words)
    ones = wide.new_ones(words, ROWS["cpu"]) if by_word else None
    for start in range(0, len(hidden), most_rows):
        span = slice(start, start + most_rows)
        part, label = hidden[span], labels[span, None]
        chunk, total = logits[: len(part)], losses.new_empty(len(part), 1)
        if upcasts:
            upcast.times_transposed(part, head, out=chunk)
        else:
            torch.mm(part, head.T, out=chunk)
        for rows in (slice(first, first + piece) for first in range(0, len(part), piece)):
            some = chunk[rows] if in_fp32 else wide[: len(chunk[rows])].copy_(chunk[rows])
            losses[span][rows] = _softmax_(some, label[rows], total[rows], ones, learns=learns)
            if learns and not in_fp32:
                chunk[rows] = some
        if gradient is not None:
            made = upcast.times(chunk, head) if upcasts else (head.T @ chunk.T).T if by_word else chunk @ head
            gradient[span] = made.div_(total)
    return losses, gradient


def _softmax_(
    logits: torch.Tensor, label: torch.Tensor, total: torch.Tensor, ones: torch.Tensor | None, *, learns: bool
) -> torch.Tensor:
    """The losses (rows,) of logits (rows, words) in fp32, which become their gradient times the total (rows, 1)."""
    most = logits.amax(-1, keepdim=True)
    picked = logits.gather(1, label)
    logits.sub_(most).mul_(LOG2E).exp2_()  # softmax · total from here on
    total.copy_(logits.sum(-1, keepdim=True) if ones is None else (logits @ ones)[:, :1])
    if learns:
        logits.scatter_add_(1, label, -total)
    return (total.log() + most - picked)[:, 0]


def _losses_by_kernel(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, *, learns: bool) -> Made:
    """The same on a GPU, in one buffer, which holds three times as many bf16 logits in the memory of two."""
    losses, gradient = _room(hidden, learns=learns)
    most_rows = CHUNK[hidden.device.type] * max(1, 6 // hidden.itemsize)
    logits = hidden.new_empty(min(most_rows, len(hidden)), len(head))
    for start in range(0, len(hidden), most_rows):
        span = slice(start, start + most_rows)
        chunk = logits[: len(losses[span])]
        torch.mm(hidden[span], head.T, out=chunk)
        losses[span] = kernels.cross_entropy_(chunk, labels[span])
        if gradient is not None:
            torch.mm(chunk, head, out=gradient[span])
    return losses, gradient


def _room(hidden: torch.Tensor, *, learns: bool) -> Made:
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    return losses, torch.empty_like(hidden) if learns else None


def _buffer(rows: int, words: int, device: torch.device, *, by_word: bool) -> torch.Tensor:
    """(rows, words) in fp32, where a word's logits of all rows may lie together instead of a row's of all words.

    So the CPU's products with a head take three quarters of the time. torch's sum over words would then go by how many
    rows there are; a product with ones does not.
    """
    shape = (words, rows) if by_word else (rows, words)
    buffer = torch.empty(shape, dtype=torch.float32, device=device)
    return buffer.T if by_word else buffer
