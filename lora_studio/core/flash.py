"""Causal attention of short sequences that lie end to end, on a GPU, in Triton.

torch's kernel for variable lengths leaves most of a GPU idle where sequences have a few hundred tokens, and adds up
gradients in no fixed order. Here a program takes a block of one head of a sequence, and all is added in order.

q (T, heads, d) and `ends` (sequences + 1,) say where each sequence's queries end, keys and values (rows, key heads, d)
and `key_ends` where its keys do; it has at least as many of these, and the last are the queries' own tokens.
"""

import functools
import logging
import math
from typing import Any

import torch

from lora_studio.core import kernels
from lora_studio.core.kernels import triton, usable

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false, reportIndexIssue=false
log = logging.getLogger(__name__)
BLOCK = 64  # queries, or keys, of a program
LONGEST = 512  # tokens of a sequence up to which torch's kernel was seen to take longer
WIDTHS = (16, 32, 64, 128)  # of a head
LAUNCH = {"BLOCK": BLOCK, "num_warps": 4, "num_stages": 2}  # the quickest of 54 that were tried on an H200


def takes(q: torch.Tensor, most: int) -> bool:
    """Whether this is the way for such heads, and sequences of at most so many tokens."""
    short = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in WIDTHS and most <= LONGEST
    return short and usable(q) and _works()


@functools.cache
def _works() -> bool:
    """Whether this GPU does it, tried once."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            q = torch.ones(2, 1, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            ends = torch.tensor([0, 2], device="cuda", dtype=torch.int32)
            Attention.apply(q, q, q, ends, 2, 1.0).sum().backward()  # type: ignore[union-attr]
    except Exception as error:  # an older GPU; torch's own kernel does the same
        log.warning("Attention on this GPU is torch's own: %s", error)
        return False
    return True


class Attention(torch.autograd.Function):
    """Each query's mean of the values up to its own place, by softmax(scale · q kᵀ): (T, heads, d).

    k, v (T, key heads, d); most: tokens of the longest sequence. Where sequences begin with tokens of others, `laid`
    is what lean.KeyRows says of that: order, ends, starts, rows. What a token's gradient is made of is added up in
    fp32: what it has from each row that it was laid in, and from each part of the heads that share it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ends: torch.Tensor,
        most: int,
        scale: float,
        *laid: torch.Tensor,
    ) -> torch.Tensor:
        order, key_ends, *rows = laid or (None, ends)
        q, k, v = q.contiguous(), *(one.contiguous() if order is None else kernels.laid(one, order) for one in (k, v))
        out, sizes = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
        given = (q, k, v, ends, key_ends, out, sizes, scale / math.log(2), len(q))
        _attend[_grid(most, q.shape[1], ends)](*given, **_heads(q, k), **LAUNCH)
        ctx.save_for_backward(q, k, v, ends, key_ends, out, sizes, *rows)
        ctx.most, ctx.scale = most, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, ends, key_ends, out, sizes, *rows = ctx.saved_tensors
        along, for_q = torch.empty_like(sizes), torch.empty_like(q)
        parts = 2 if q.shape[1] % (2 * k.shape[1]) == 0 else 1  # of the heads that share a key, each a program
        for_k, for_v = (one.new_empty(parts, *one.shape) for one in (k, v))
        given = (q, k, v, outer[0].contiguous(), ends, key_ends, sizes, along)
        scales = ctx.scale / math.log(2), ctx.scale, len(q)
        of_queries, of_keys = (_grid(ctx.most, count, ends) for count in (q.shape[1], parts * k.shape[1]))
        _for_queries[of_queries](*given, out, for_q, *scales, **_heads(q, k), **LAUNCH)
        _for_keys[of_keys](*given, for_k, for_v, *scales, len(k), **_heads(q, k), PARTS=parts, **LAUNCH)
        for_k, for_v = (_of_tokens(one, *rows) for one in (for_k, for_v))
        return for_q, for_k, for_v, *[None] * (7 if rows else 3)


def _of_tokens(parts: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    """(T, key heads, d) of (parts, rows, key heads, d), where a token has these rows, or the one of its place."""
    if rows:
        return kernels.added_up(parts.flatten(2), *rows).unflatten(1, parts.shape[2:])
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _grid(most: int, heads: int, ends: torch.Tensor) -> tuple[int, int, int]:
    """Blocks come last: all long programs start before the short ones, which fill the end."""
    return heads, len(ends) - 1, triton.cdiv(most, BLOCK)


def _heads(q: torch.Tensor, k: torch.Tensor) -> dict[str, int]:
    return {"HEADS": q.shape[1], "GROUP": q.shape[1] // k.shape[1], "D": q.shape[2]}


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _lengths(ends, key_ends, sequence):
        """Where its tokens start and how many they are; the same of its keys."""
        start, key_start = tl.load(ends + sequence), tl.load(key_ends + sequence)
        return start, tl.load(ends + sequence + 1) - start, key_start, tl.load(key_ends + sequence + 1) - key_start

    @triton.jit
    def _attend(
        q, k, v, ends, key_ends, out, sizes, scale, tokens,
        HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        head, block = tl.program_id(0), tl.num_programs(2) - 1 - tl.program_id(2)  # the last has most keys
        start, count, key_start, keys = _lengths(ends, key_ends, tl.program_id(1))
        if block * BLOCK >= count:
            return
        at, row = tl.arange(0, D), block * BLOCK + tl.arange(0, BLOCK)
        place = row + keys - count  # of each query among the keys
        where = ((start + row).to(tl.int64) * HEADS + head)[:, None] * D + at[None, :]
        inside = (row < count)[:, None]
        query = tl.load(q + where, mask=inside, other=0.0)
        key_at = (key_start.to(tl.int64) * (HEADS // GROUP) + head // GROUP) * D + at[None, :]
        most, total = tl.full([BLOCK], -float("inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
        summed = tl.zeros([BLOCK, D], tl.float32)
        for first in range(0, min(keys, (block + 1) * BLOCK + keys - count), BLOCK):
            column = first + tl.arange(0, BLOCK)
            there = key_at + column[:, None] * (HEADS // GROUP) * D
            seen = (column < keys)[:, None]
            key = tl.load(k + there, mask=seen, other=0.0)
            score = tl.dot(query, tl.trans(key)) * scale
            score = tl.where(column[None, :] <= place[:, None], score, -float("inf"))
            higher = tl.maximum(most, tl.max(score, 1))
            part, fade = tl.exp2(score - higher[:, None]), tl.exp2(most - higher)
            total = total * fade + tl.sum(part, 1)
            value = tl.load(v + there, mask=seen, other=0.0)
            summed = summed * fade[:, None] + tl.dot(part.to(value.dtype), value)
            most = higher
        tl.store(out + where, (summed / total[:, None]).to(query.dtype), mask=inside)
        tl.store(sizes + head * tokens + start + row, most + tl.log2(total), mask=row < count)

    @triton.jit
    def _for_queries(
        q, k, v, outer, ends, key_ends, sizes, along, out, for_q, in_twos, scale, tokens,
        HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        head, block = tl.program_id(0), tl.num_programs(2) - 1 - tl.program_id(2)  # the last has most keys
        start, count, key_start, keys = _lengths(ends, key_ends, tl.program_id(1))
        if block * BLOCK >= count:
            return
        at, row = tl.arange(0, D), block * BLOCK + tl.arange(0, BLOCK)
        place, inside = row + keys - count, row < count
        where = ((start + row).to(tl.int64) * HEADS + head)[:, None] * D + at[None, :]
        query = tl.load(q + where, mask=inside[:, None], other=0.0)
        come = tl.load(outer + where, mask=inside[:, None], other=0.0)
        size = tl.load(sizes + head * tokens + start + row, mask=inside, other=0.0)
        attended = tl.load(out + where, mask=inside[:, None], other=0.0)
        level = tl.sum(come.to(tl.float32) * attended.to(tl.float32), 1)
        tl.store(along + head * tokens + start + row, level, mask=inside)
        key_at = (key_start.to(tl.int64) * (HEADS // GROUP) + head // GROUP) * D + at[None, :]
        of_query = tl.zeros([BLOCK, D], tl.float32)
        for first in range(0, min(keys, (block + 1) * BLOCK + keys - count), BLOCK):
            column = first + tl.arange(0, BLOCK)
            there = key_at + column[:, None] * (HEADS // GROUP) * D
            seen = (column < keys)[:, None]
            key, value = tl.load(k + there, mask=seen, other=0.0), tl.load(v + there, mask=seen, other=0.0)
            score = tl.dot(query, tl.trans(key)) * in_twos
            visible = column[None, :] <= place[:, None]
            part = tl.where(visible, tl.exp2(score - size[:, None]), 0.0)
            change = part * (tl.dot(come, tl.trans(value)) - level[:, None])
            of_query += tl.dot(change.to(key.dtype), key)
        tl.store(for_q + where, (of_query * scale).to(query.dtype), mask=inside[:, None])

    @triton.jit
    def _for_keys(
        q, k, v, outer, ends, key_ends, sizes, along, for_k, for_v, in_twos, scale, tokens, rows,
        HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        key_head, part_of, block = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(2)
        start, count, key_start, keys = _lengths(ends, key_ends, tl.program_id(1))
        if block * BLOCK >= keys:
            return
        at, column = tl.arange(0, D), block * BLOCK + tl.arange(0, BLOCK)
        there = ((key_start + column).to(tl.int64) * (HEADS // GROUP) + key_head)[:, None] * D + at[None, :]
        seen = (column < keys)[:, None]
        key, value = tl.load(k + there, mask=seen, other=0.0), tl.load(v + there, mask=seen, other=0.0)
        of_key, of_value = tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK, D], tl.float32)
        begin = max(0, block * BLOCK - (keys - count)) // BLOCK * BLOCK  # nobody before sees any of these keys
        rounds = tl.cdiv(count - begin, BLOCK)
        for number in range(0, GROUP // PARTS * rounds):
            head = key_head * GROUP + part_of * (GROUP // PARTS) + number // rounds
            row = begin + number % rounds * BLOCK + tl.arange(0, BLOCK)
            inside = row < count
            where = ((start + row).to(tl.int64) * HEADS + head)[:, None] * D + at[None, :]
            query = tl.load(q + where, mask=inside[:, None], other=0.0)
            come = tl.load(outer + where, mask=inside[:, None], other=0.0)
            size = tl.load(sizes + head * tokens + start + row, mask=inside, other=0.0)
            level = tl.load(along + head * tokens + start + row, mask=inside, other=0.0)
            score = tl.dot(key, tl.trans(query)) * in_twos
            visible = (column[:, None] <= (row + keys - count)[None, :]) & inside[None, :]
            part = tl.where(visible, tl.exp2(score - size[None, :]), 0.0)
            of_value += tl.dot(part.to(come.dtype), come)
            change = part * (tl.dot(value, tl.trans(come)) - level[None, :])
            of_key += tl.dot(change.to(query.dtype), query)
        given = part_of.to(tl.int64) * rows * (HEADS // GROUP) * D + there
        tl.store(for_k + given, (of_key * scale).to(key.dtype), mask=seen)
        tl.store(for_v + given, of_value.to(key.dtype), mask=seen)
