"""Autograd functions that keep less for the backward than the plain operations, and give the same numbers.

    RMSNorm           keeps x and one number a position            instead of x in fp32, twice
    Gated             keeps gate and up                             instead of act(gate) as well
    CausalAttention   keeps q, k, v in their own dtype, the output  instead of fp32 copies of all four
                      and one number a position and head
    CrossEntropy      keeps one gradient the size of its input      instead of the logits, several times

They are for frozen weights: none of them has a gradient for a weight.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from lora_studio.core import kernels, upcast

# Positions whose logits are in memory together: as many as keep the products with the head busy.
CHUNK = {"cpu": 128, "mps": 128, "cuda": 512}
# Such a product has on a CPU, or a multiple: few are summed in another order, and a loss went by who shared its pass.
ROWS = 16
Place = tuple[slice, ...]  # of a sequence's tokens in a row: those it begins with, where they lie with another, its own
SILU = (nn.SiLU, type(ACT2FN["silu"]))
aten = torch.ops.aten


class RMSNorm(torch.autograd.Function):
    """x / rms(x) · weight over the last dimension; weight (d,) in the dtype of x, or in fp32 for a product in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed, inverse = kernels.norm(x, weight, eps) if kernels.usable(x) else _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        if kernels.usable(x):
            return kernels.norm_backward(outer[0], x, weight, inverse), None, None
        gradient, wide = (outer[0] * weight).float(), x.float()
        along = torch.linalg.vecdot(gradient, wide)[..., None] * inverse.square() / x.shape[-1]
        return gradient.addcmul_(wide, along, value=-1).mul_(inverse).to(x.dtype), None, None


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and 1 / rms(x) (..., 1) in fp32."""
    wide = x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = torch.rsqrt(size.square_().div_(x.shape[-1]).add_(eps))
    scaled = wide * inverse if wide is x else wide.mul_(inverse)
    return scaled.mul_(weight).to(x.dtype) if weight.dtype != x.dtype else scaled.to(x.dtype).mul_(weight), inverse


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
        if isinstance(ctx.act, SILU) and kernels.usable(gate):
            return *kernels.silu_gate_backward(outer[0], gate, up), None
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            acted = ctx.act(gate)
        (for_gate,) = torch.autograd.grad(acted, gate, outer[0] * up)
        return for_gate, acted.detach().mul_(outer[0]), None


class CausalAttention(torch.autograd.Function):
    """Causal softmax attention on the CPU within each of several sequences that lie end to end.

    q (1, heads, T, d), k and v (1, kv_heads, T, d) -> (1, T, heads, d); sequences of one length are computed
    together. In fp32 whatever the dtype: the CPU's bfloat16 backward takes twice the time. A sequence that begins
    with tokens of another attends to them as to its own.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: Sequence[Place], scale: float | None
    ) -> torch.Tensor:
        output = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])  # (1, T, heads, d)
        logsums = []
        for alike in _alike(places):
            made, logsum = aten._scaled_dot_product_flash_attention_for_cpu(
                _gather(q, alike), _gather(k, alike), _gather(v, alike), 0.0, True, scale=scale
            )
            for number, (*_, own) in enumerate(alike):
                output[0, own] = made[number, :, -_size(own) :].transpose(0, 1)
            logsums.append(logsum)
        ctx.save_for_backward(q, k, v, output, *logsums)
        ctx.places, ctx.scale = places, scale
        return output

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, *logsums = ctx.saved_tensors
        for_output, output = outer[0].transpose(1, 2), output.transpose(1, 2)
        gradients = [torch.empty_like(tensor.transpose(1, 2)) for tensor in (q, k, v)]  # (1, T, heads, d)
        shared: dict[tuple[int, int, int], list[torch.Tensor]] = {}  # what each sequence adds to a prefix
        for alike, logsum in zip(_alike(ctx.places), logsums, strict=True):
            wanted = _gather(for_output, alike)
            for number, (*ahead, _) in enumerate(alike):
                for span in ahead:  # what these tokens attended to is another sequence's affair
                    wanted[number, :, : _size(span)] = 0
            parts = [wanted, *(_gather(tensor, alike) for tensor in (q, k, v, output))]
            made = aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, logsum, 0.0, True, scale=ctx.scale)
            for which, part in enumerate(made):
                for number, (*ahead, own) in enumerate(alike):
                    whole = part[number].transpose(0, 1)
                    gradients[which][0, own] = whole[-_size(own) :]
                    for span in ahead:
                        shared.setdefault((which, span.start, span.stop), []).append(whole[: _size(span)])
        for (which, start, stop), pieces in shared.items():  # once every token has its own
            gradients[which][0, start:stop] += torch.stack(pieces).sum(0)
        return *(whole.transpose(1, 2) for whole in gradients), None, None


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden @ headᵀ at each position (positions,), a chunk of them at a time.

    The gradient of the hidden states is made while the chunk's logits are there, so nothing of size
    (positions, vocabulary) is kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        most_rows, real = CHUNK[hidden.device.type], len(hidden)
        if hidden.device.type == "cpu" and (more := -real % ROWS):
            hidden, labels = F.pad(hidden, (0, 0, 0, more)), F.pad(labels, (0, more))
        count, words, upcasts = min(most_rows, len(hidden)), len(head), upcast.needed(hidden)
        # the same buffers for every chunk: fresh pages are not free
        wide = hidden.new_empty(count, words, dtype=torch.float32)
        logits = wide if upcasts or hidden.dtype == torch.float32 else hidden.new_empty(count, words)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), most_rows):
            span = slice(start, start + most_rows)
            part, label = hidden[span], labels[span, None]
            narrow, chunk = logits[: len(part)], wide[: len(part)]
            if upcasts:
                upcast.times_transposed(part, head, out=chunk)
            else:
                torch.mm(part, head.T, out=narrow)
                chunk.copy_(narrow)
            most = chunk.amax(-1, keepdim=True)
            picked = chunk.gather(1, label)
            total = chunk.sub_(most).exp_().sum(-1, keepdim=True)  # softmax · total from here on
            losses[span] = (total.log() + most - picked)[:, 0]
            if gradient is not None:
                chunk.scatter_add_(1, label, -total)
                made = upcast.times(chunk, head) if upcasts else narrow.copy_(chunk) @ head
                gradient[span] = made.div_(total)
        ctx.save_for_backward(None if gradient is None else gradient[:real])
        return losses[:real]

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0][:, None].to(gradient.dtype), None, None


def _alike(places: Sequence[Place]) -> Iterator[list[Place]]:
    """The sequences, those of one length together."""
    found: dict[int, list[Place]] = {}
    for place in places:
        found.setdefault(sum(map(_size, place)), []).append(place)
    yield from found.values()


def _gather(tensor: torch.Tensor, places: Sequence[Place]) -> torch.Tensor:
    """(1, heads, T, d) -> (places, heads, length, d) in fp32."""
    parts = [cut(tensor, place) for place in places]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).float()


def cut(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """(1, heads, T, d) -> (1, heads, length, d): the tokens of one sequence."""
    parts = [tensor[:, :, span] for span in place]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _size(span: slice) -> int:
    return span.stop - span.start
