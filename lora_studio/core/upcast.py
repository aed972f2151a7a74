"""Products of bfloat16 tensors in fp32, for a CPU that has no bfloat16 products.

Most laptops' processors have none, and torch's own loops take 7 to 40 times as long as a product in fp32. Here a
weight rests in bfloat16, in half the memory, and is cast a piece at a time into a buffer that stays in the cache;
results are rounded to bfloat16, as where the processor does it all. `apply` makes a model's linear layers do so; who
multiplies by other tensors asks `needed`. Attention outside the packed path is left to torch.
"""

import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

PIECE = 2**20  # elements of a weight that are in fp32 together: 4 MB
SINGLE, FEW = 3, 32  # rows up to which they are quicker multiplied one by one, and as columns
_buffers = threading.local()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 fast, by its instruction set."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


@functools.cache
def lacks_bfloat16() -> bool:
    """Whether it has no instructions for that at all; with ARM's nothing was tried, so torch does what it does."""
    features = torch.cpu.get_capabilities()
    return not (multiplies_bfloat16() or features.get("bf16") or features.get("sve_bf16"))


def needed(x: torch.Tensor) -> bool:
    """Whether x is better multiplied in fp32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and lacks_bfloat16()


def widened(x: torch.Tensor) -> torch.Tensor:
    """x, in fp32 where that is needed."""
    return x.float() if needed(x) else x


def apply(model: nn.Module) -> None:
    """Make the linear layers of a model multiply in fp32 from here on, where that is needed."""
    for layer in model.modules():
        if type(layer) in _FORMS and needed(layer.weight):  # type: ignore[arg-type]
            layer.__class__ = _FORMS[type(layer)]


class UpcastLinear(nn.Linear):
    """y = x Wᵀ + b"""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _linear(input, self.weight, self.bias) if needed(input) else super().forward(input)


class UpcastConv1D(Conv1D):
    """The same with W stored transposed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _linear(x, self.weight.T, self.bias) if needed(x) else super().forward(x)


_FORMS: dict[type, type] = {nn.Linear: UpcastLinear, Conv1D: UpcastConv1D}


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., in), weight (out, in) -> (..., out)"""
    if weight.requires_grad and torch.is_grad_enabled():  # it is trained itself
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if 0 < len(rows) <= SINGLE and weight.is_contiguous():  # torch has a quick loop for a single vector
        y: Any = torch.cat([F.linear(row, weight, bias) for row in rows.split(1)])
    else:
        y = FrozenProduct.apply(rows, weight, bias)
    return y.view(*x.shape[:-1], len(weight))


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ + b; W is all it keeps: x (rows, in), W (out, in), b (out,) -> (rows, out), in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        y = times_transposed(x, weight)
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        (gradient,) = outer
        for_x = times(gradient, weight).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return for_x, None, gradient.sum(0) if ctx.needs_input_grad[2] else None


def times_transposed(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ in fp32: x (rows, in), weight (out, in) -> (rows, out), into `out` where it is given."""
    x = x.float()
    if out is None and len(x) <= FEW:
        columns = torch.empty(len(weight), len(x), dtype=torch.float32)
        for span, piece in _pieces(weight):
            torch.mm(piece, x.T, out=columns[span])
        return columns.T.contiguous()
    y = torch.empty(len(x), len(weight), dtype=torch.float32) if out is None else out
    for span, piece in _pieces(weight):
        torch.mm(x, piece.T, out=y[:, span])
    return y


def times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W in fp32: x (rows, out), weight (out, in) -> (rows, in)."""
    x, y = x.float(), torch.empty(len(x), weight.shape[1], dtype=torch.float32)
    for span, piece in _pieces(weight):
        torch.addmm(y, x[:, span], piece, beta=int(span.start > 0), out=y)
    return y


def _pieces(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows of the weight at a time, in fp32; each is good until the next."""
    count = max(1, PIECE // weight.shape[1])
    for start in range(0, len(weight), count):
        span = slice(start, start + count)
        piece = weight[span]
        buffer = _buffer(piece.numel())
        if weight.is_contiguous():
            yield span, buffer.view(piece.shape).copy_(piece)
        else:  # stored transposed
            yield span, buffer.view(piece.T.shape).copy_(piece.T).T


def _buffer(numbers: int) -> torch.Tensor:
    """(numbers,) in fp32: the same memory at every call in this thread, because fresh pages are not free."""
    found = getattr(_buffers, "tensor", None)
    if found is None or len(found) < numbers:
        with torch.inference_mode(False):  # it is written to in every mode
            found = _buffers.tensor = torch.empty(max(numbers, PIECE), dtype=torch.float32)
    return found[:numbers]
