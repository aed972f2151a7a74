"""What lies between the matrix products on a GPU, one kernel a formula, in Triton, which comes with torch for CUDA.

Such work waits for memory, not for arithmetic: written as torch operations, each of them reads and writes the whole
tensor again. Where Triton cannot be used, and on every other device, `functions` has torch's operations for it, or
goes the way that does without.

Tensors are (..., width); arithmetic is in fp32, and rounded where torch's operations round.
"""

import functools
import logging

import torch

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false, reportIndexIssue=false
try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU has none, nor has torch for Windows
    triton = None

log = logging.getLogger(__name__)
SPAN = 1024  # elements that one program of an elementwise kernel takes
WIDEST = 65_536  # a row that one program still holds


def usable(x: torch.Tensor) -> bool:
    """Whether these kernels can be used on x."""
    return x.device.type == "cuda" and x.shape[-1] <= WIDEST and _work()


@functools.cache
def _work() -> bool:
    """Whether Triton makes kernels here; it also needs a C compiler."""
    if triton is None:
        return False
    try:
        row = torch.ones(1, 8, device="cuda")
        y, inverse, _ = norm(row, row[0], 1e-6, row)
        norm_backward(y, row, row[0], inverse, row)
        silu_gate_backward(silu_gate(row, y), row, y)
        turned(row[None, None], row[None], row[None])
        place = torch.arange(2, device="cuda")
        added_up(row[None], place, place)
        laid(row[None], place[:1])
        cross_entropy_(row, place[:1])
    except Exception as error:  # whatever is wrong with it, torch's own operations do the same
        log.warning("The GPU works without fused kernels: %s", error)
        return False
    return True


def norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, more: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x / rms(x) · weight, and 1 / rms(x) (..., 1) in fp32, both of x + more; and that, or x where there is no more."""
    x, width, adds = x.contiguous(), x.shape[-1], more is not None
    y, inverse = torch.empty_like(x), torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    more, total = (more.contiguous(), torch.empty_like(x)) if more is not None else (x, x)
    _norm[(inverse.numel(),)](x, more, weight, y, total, inverse, width, eps, ADDS=adds, **_row(width))
    return y, inverse, total


def norm_backward(
    outer: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    onward: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of x from that of the norm, and from `onward`, that of x where it goes on."""
    outer, x, width, adds = outer.contiguous(), x.contiguous(), x.shape[-1], onward is not None
    made, onward = torch.empty_like(x), outer if onward is None else onward.contiguous()
    _norm_backward[(inverse.numel(),)](outer, onward, x, weight, inverse, made, width, ADDS=adds, **_row(width))
    return made


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up"""
    gate, up, width = _rows(gate), _rows(up), gate.shape[-1]
    y = gate.new_empty(gate.shape)
    grid = (y.numel() // width, triton.cdiv(width, SPAN))
    _silu_gate[grid](gate, up, y, gate.stride(-2), up.stride(-2), width, SPAN=SPAN)
    return y


def silu_gate_backward(outer: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up from that of their product, side by side in one tensor."""
    outer, gate, up, width = outer.contiguous(), _rows(gate), _rows(up), gate.shape[-1]
    both = gate.new_empty(*gate.shape[:-1], 2 * width)
    grid = (gate.numel() // width, triton.cdiv(width, SPAN))
    _silu_gate_backward[grid](outer, gate, up, both, gate.stride(-2), up.stride(-2), width, SPAN=SPAN)
    for_gate, for_up = both.split(width, dim=-1)
    return for_gate, for_up


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """x (1, heads, T, d) turned by its positions' cos and sin (1, T, d), half against half; or a gradient turned back.

    What it gives lies in memory as (T, heads, d), which attention for sequences end to end asks for.
    """
    _, heads, tokens, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(tokens, heads, width)
    spans = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(width // 2)}
    strides = x.stride(2), x.stride(1)
    _turned[(tokens,)](x, cos.contiguous(), sin.contiguous(), y, *strides, heads, width // 2, BACK=back, **spans)
    return y.transpose(0, 1)[None]


def laid(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x[order] (rows, heads, d) of x (T, heads, d), whose tokens need not lie behind each other."""
    x = x if x[0].is_contiguous() else x.contiguous()
    y, width = x.new_empty(len(order), *x.shape[1:]), x[0].numel()
    _laid[(len(order),)](x, order, y, x.stride(0), width, **_row(width))
    return y


def added_up(x: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(T, width): the sums of x[:, rows[starts[t] : starts[t + 1]]] of x (parts, rows, width), in a fixed order."""
    x, (parts, count, width) = x.contiguous(), x.shape
    y, span = x.new_empty(len(starts) - 1, width), min(SPAN, triton.next_power_of_2(width))
    grid = (len(y), triton.cdiv(width, span))
    _added_up[grid](x, starts, rows, y, count * width, width, PARTS=parts, AT_ONCE=8, SPAN=span)
    return y


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(rows,): the cross-entropy of each row of logits (rows, words), which are overwritten by their gradient."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    span = min(4 * SPAN, triton.next_power_of_2(logits.shape[1]))
    _cross_entropy[(len(logits),)](logits, labels, losses, logits.shape[1], SPAN=span, num_warps=8)
    return losses


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., width) such that its rows have all the same distance in memory: columns of another tensor may stay so."""
    one = x.numel() == x.shape[-2] * x.shape[-1]
    return x if one and x.stride(-1) == 1 else x.contiguous()


def _row(width: int) -> dict[str, int]:
    """How a program takes a row as a whole."""
    span = triton.next_power_of_2(width)
    return {"SPAN": span, "num_warps": min(16, max(1, span // 512))}


if triton is not None:

    @triton.jit
    def _norm(x, more, weight, y, total, inverse, width, eps, ADDS: tl.constexpr, SPAN: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, SPAN)
        inside = at < width
        taken = tl.load(x + row * width + at, mask=inside, other=0.0)
        if ADDS:
            other = tl.load(more + row * width + at, mask=inside, other=0.0)
            taken = (taken.to(tl.float32) + other.to(tl.float32)).to(taken.dtype)
            tl.store(total + row * width + at, taken, mask=inside)
        wide = taken.to(tl.float32)
        over_rms = tl.rsqrt(tl.sum(wide * wide) / width + eps)
        scale = tl.load(weight + at, mask=inside, other=0.0)
        scaled = (wide * over_rms).to(scale.dtype).to(tl.float32)
        tl.store(y + row * width + at, (scaled * scale.to(tl.float32)).to(taken.dtype), mask=inside)
        tl.store(inverse + row, over_rms)

    @triton.jit
    def _norm_backward(outer, onward, x, weight, inverse, made, width, ADDS: tl.constexpr, SPAN: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, SPAN)
        inside = at < width
        taken = tl.load(x + row * width + at, mask=inside, other=0.0)
        wide, over_rms = taken.to(tl.float32), tl.load(inverse + row)
        scale = tl.load(weight + at, mask=inside, other=0.0)
        gradient = tl.load(outer + row * width + at, mask=inside, other=0.0).to(tl.float32) * scale.to(tl.float32)
        gradient = gradient.to(scale.dtype).to(tl.float32)
        along = tl.sum(gradient * wide) * over_rms * over_rms / width
        of_x = (gradient - wide * along) * over_rms
        if ADDS:
            of_x += tl.load(onward + row * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(made + row * width + at, of_x.to(taken.dtype), mask=inside)

    @triton.jit
    def _silu_gate(gate, up, y, by_gate, by_up, width, SPAN: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN + tl.arange(0, SPAN)
        inside = at < width
        taken = tl.load(gate + row * by_gate + at, mask=inside, other=0.0)
        other = tl.load(up + row * by_up + at, mask=inside, other=0.0)
        wide = taken.to(tl.float32)
        acted = (wide * tl.sigmoid(wide)).to(taken.dtype).to(tl.float32)
        tl.store(y + row * width + at, (acted * other.to(tl.float32)).to(taken.dtype), mask=inside)

    @triton.jit
    def _silu_gate_backward(outer, gate, up, both, by_gate, by_up, width, SPAN: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN + tl.arange(0, SPAN)
        inside = at < width
        taken = tl.load(gate + row * by_gate + at, mask=inside, other=0.0)
        other = tl.load(up + row * by_up + at, mask=inside, other=0.0)
        wide = taken.to(tl.float32)
        come = tl.load(outer + row * width + at, mask=inside, other=0.0).to(tl.float32)
        part = tl.sigmoid(wide)
        acted = (wide * part).to(taken.dtype).to(tl.float32)
        for_acted = (come * other.to(tl.float32)).to(taken.dtype).to(tl.float32)
        given = both + row * 2 * width + at
        tl.store(given, (for_acted * part * (1 + wide * (1 - part))).to(taken.dtype), mask=inside)
        tl.store(given + width, (acted * come).to(taken.dtype), mask=inside)

    @triton.jit
    def _turned(
        x, cos, sin, y, by_token, by_head, heads, half,
        BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
        inside = (head < heads) & (at < half)
        taken = x + token * by_token + head * by_head + at
        given = y + (token * heads + head) * 2 * half + at
        angle = token * 2 * half + at
        one = tl.load(taken, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(taken + half, mask=inside, other=0.0).to(tl.float32)
        cos_one = tl.load(cos + angle, mask=at < half, other=0.0).to(tl.float32)
        cos_two = tl.load(cos + angle + half, mask=at < half, other=0.0).to(tl.float32)
        sin_one = tl.load(sin + angle, mask=at < half, other=0.0).to(tl.float32)
        sin_two = tl.load(sin + angle + half, mask=at < half, other=0.0).to(tl.float32)
        if BACK:
            across_one, across_two = two * sin_two, -one * sin_one
        else:
            across_one, across_two = -two * sin_one, one * sin_two
        along_one, along_two = (one * cos_one).to(y.dtype.element_ty), (two * cos_two).to(y.dtype.element_ty)
        first = along_one.to(tl.float32) + across_one.to(y.dtype.element_ty).to(tl.float32)
        second = along_two.to(tl.float32) + across_two.to(y.dtype.element_ty).to(tl.float32)
        tl.store(given, first.to(y.dtype.element_ty), mask=inside)
        tl.store(given + half, second.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _laid(x, order, y, by_token, width, SPAN: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.arange(0, SPAN)
        taken = tl.load(x + tl.load(order + row).to(tl.int64) * by_token + at, mask=at < width, other=0.0)
        tl.store(y + row * width + at, taken, mask=at < width)

    @triton.jit
    def _added_up(
        x, starts, rows, y, by_part, width,
        PARTS: tl.constexpr, AT_ONCE: tl.constexpr, SPAN: tl.constexpr,
    ):  # fmt: skip
        token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN + tl.arange(0, SPAN)
        inside = (at < width)[None, :]
        total = tl.zeros([AT_ONCE, SPAN], tl.float32)
        end = tl.load(starts + token + 1)
        for first in range(tl.load(starts + token), end, AT_ONCE):  # so many rows are fetched at a time
            place = first + tl.arange(0, AT_ONCE)
            row = tl.load(rows + place, mask=place < end, other=0).to(tl.int64)
            there = x + row[:, None] * width + at[None, :]
            for part in tl.static_range(PARTS):
                taken = tl.load(there + part * by_part, mask=(place < end)[:, None] & inside, other=0.0)
                total += taken.to(tl.float32)
        tl.store(y + token * width + at, tl.sum(total, 0).to(y.dtype.element_ty), mask=at < width)

    @triton.jit
    def _cross_entropy(logits, labels, losses, words, SPAN: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        start, at = logits + row * words, tl.arange(0, SPAN)
        label = tl.load(labels + row)
        picked = tl.load(start + label).to(tl.float32)
        most, total = tl.full([SPAN], -3e38, tl.float32), tl.zeros([SPAN], tl.float32)
        for first in range(0, words, SPAN):  # each lane has a maximum and a sum of its own
            taken = tl.load(start + first + at, mask=first + at < words, other=-3e38).to(tl.float32)
            higher = tl.maximum(most, taken)
            total = total * tl.exp(most - higher) + tl.exp(taken - higher)
            most = higher
        highest = tl.max(most)
        sum_of_all = tl.sum(total * tl.exp(most - highest))
        tl.store(losses + row, tl.log(sum_of_all) + highest - picked)
        tl.debug_barrier()  # everybody has read
        for first in range(0, words, SPAN):
            inside = first + at < words
            taken = tl.load(start + first + at, mask=inside, other=-3e38).to(tl.float32)
            chance = tl.exp(taken - highest) / sum_of_all - tl.where(first + at == label, 1.0, 0.0)
            tl.store(start + first + at, chance.to(logits.dtype.element_ty), mask=inside)
