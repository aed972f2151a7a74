"""Causal attention on a CPU within each of several sequences that lie end to end, kept for the backward in little.

torch's kernel takes sequences of one length together. Its products are small, and made at half of the rate of large
ones; a long sequence is quicker BLOCK tokens at a time against all keys up to them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from lora_studio.core.functions import LOG2E

BLOCK = 64  # tokens
ENOUGH = 75_000  # a sequence's tokens times width from which its blocks are quicker than torch's kernel
Place = tuple[slice, ...]  # of a sequence's tokens in a row: those it begins with, where they lie with another, its own
aten = torch.ops.aten


def long(width: int) -> int:
    """Tokens from which a sequence is computed in blocks, by the width over which its heads attend."""
    return max(BLOCK, ENOUGH // width)


class Arrangement:
    """How sequences that lie end to end are laid to be attended to: each whole, and those of one length together.

    places: the tokens that each sequence consists of. Tokens that it has with another are laid again for it; what is
    computed for such copies is dropped, and their gradients go to the tokens. Sequences of `long` tokens and more are
    not laid, only named: `apart`.
    """

    def __init__(self, places: Sequence[Place], device: torch.device, long: float = math.inf) -> None:
        alike: dict[int, list[Place]] = {}
        self.apart: list[Place] = []
        for place in places:
            length = sum(map(_size, place))
            (self.apart if length >= long else alike.setdefault(length, [])).append(place)
        self.groups: list[tuple[slice, int]] = []  # rows of the sequences of one length, and how many those are
        order: list[int] = []  # the token in each row
        own: dict[int, int] = {}  # the row of each token in its own sequence
        copies: dict[tuple[int, int], list[tuple[int, range]]] = {}  # of tokens that others begin with, whose and where
        for length, group in alike.items():
            self.groups.append((slice(len(order), len(order) + length * len(group)), len(group)))
            for *ahead, mine in group:
                for span in ahead:
                    rows = range(len(order), len(order) + _size(span))
                    copies.setdefault((span.start, span.stop), []).append((mine.start, rows))
                    order += range(span.start, span.stop)
                own |= zip(range(mine.start, mine.stop), range(len(order), len(order) + _size(mine)), strict=True)
                order += range(mine.start, mine.stop)
        self.count = places[-1][-1].stop  # tokens
        self.moves = order != list(range(self.count))
        tokens = sorted(own)
        self.order, self.tokens, self.own = (
            torch.tensor(one, dtype=torch.long, device=device)
            for one in (order, tokens, [own[token] for token in tokens])
        )
        self.copies = [  # added up in the order of their sequences, whoever else is there
            (slice(*span), torch.tensor([list(rows) for _, rows in sorted(of, key=lambda one: one[0])], device=device))
            for span, of in copies.items()
        ]

    def lay(self, tensor: torch.Tensor) -> torch.Tensor:
        """(T, heads, d) -> (rows, heads, d)"""
        return tensor.index_select(0, self.order) if self.moves else tensor

    def grouped(self, laid: torch.Tensor) -> Iterator[torch.Tensor]:
        """(rows, heads, d) -> (sequences, heads, length, d), length by length"""
        for rows, count in self.groups:
            yield laid[rows].unflatten(0, (count, -1)).transpose(1, 2)

    def taken_up(self, groups: Iterable[torch.Tensor], *, add: bool = False) -> torch.Tensor:
        """What `grouped` gives -> (T, heads, d): each token's own, and with `add` that of its copies; 0 elsewhere."""
        laid = torch.cat([group.transpose(1, 2).flatten(0, 1) for group in groups])
        tokens = laid.index_select(0, self.own) if self.moves else laid
        if self.apart:
            tokens = laid.new_zeros(self.count, *laid.shape[1:]).index_copy_(0, self.tokens, tokens)
        for span, rows in self.copies if add else ():
            tokens[span] += laid[rows].sum(0)
        return tokens


class CausalAttention(torch.autograd.Function):
    """Causal softmax attention on the CPU within each of several sequences that lie end to end.

    q (1, heads, T, d), k and v (1, kv_heads, T, d) -> (1, T, heads, d). It keeps q, k, v in their own dtype, a number
    for each position and head and, of what torch's kernel made, the output, instead of fp32 copies of all four: that is
    used in fp32, because in bfloat16 its backward takes twice the time. A sequence that begins with tokens of another
    attends to them as to its own.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arrangement: Arrangement, scale: float | None
    ) -> torch.Tensor:
        scaled: float = q.shape[-1] ** -0.5 if scale is None else scale
        by_token = [tensor[0].transpose(0, 1) for tensor in (q, k, v)]
        made = [
            aten._scaled_dot_product_flash_attention_for_cpu(*map(torch.Tensor.float, parts), 0.0, True, scale=scaled)
            for parts in zip(*map(arrangement.grouped, map(arrangement.lay, by_token)), strict=True)
        ]
        output = arrangement.taken_up(part for part, _ in made).to(q.dtype) if made else torch.empty_like(by_token[0])
        logsums = [logsum for _, logsum in made]
        logsums += [_attend_apart(by_token, output, place, scaled) for place in arrangement.apart]
        kept = output if made else None
        if made and arrangement.apart:  # of what the kernel made alone
            kept = arrangement.lay(output)
        ctx.save_for_backward(q, k, v, kept, *logsums)
        ctx.arrangement, ctx.scale = arrangement, scaled
        return output[None]

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, kept, *logsums = ctx.saved_tensors
        arrangement: Arrangement = ctx.arrangement
        by_token = [outer[0][0], *(tensor[0].transpose(0, 1) for tensor in (q, k, v))]
        if kept is None:
            gradients = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in by_token[1:]]
        else:
            laid = [*map(arrangement.lay, by_token), kept if arrangement.apart else arrangement.lay(kept)]
            for _, rows in arrangement.copies:  # what these attended to is their own sequence's affair
                laid[0][rows] = 0
            made = [
                aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *map(torch.Tensor.float, parts), logsum, 0.0, True, scale=ctx.scale
                )
                for *parts, logsum in zip(*map(arrangement.grouped, laid), logsums, strict=False)
            ]
            gradients = [arrangement.taken_up(parts, add=True) for parts in zip(*made, strict=True)]
        for place, logsum in zip(arrangement.apart, logsums[len(arrangement.groups) :], strict=True):
            _attend_apart_backward(by_token, logsum, gradients, place, ctx.scale)
        return *(gradient.to(q.dtype).transpose(0, 1)[None] for gradient in gradients), None, None


# ---- long sequences --------------------------------------------------------------------------------------------------


def _attend_apart(given: Sequence[torch.Tensor], output: torch.Tensor, place: Place, scale: float) -> torch.Tensor:
    """Write into `output` (T, heads, d) what one sequence attends to; the logarithm of each sum, to base 2.

    given: q, k and v (T, heads, d).
    """
    q, k, v = given
    own, queries = place[-1], _under(q[place[-1]], k)
    keys, values = _all(k, place).mul_(scale * LOG2E), _all(v, place)
    attended, logsum = torch.empty_like(queries), queries.new_empty(*queries.shape[:-1], 1)
    for rows, seen, later in _blocks(queries, keys, own):
        scores = _scores(queries[:, rows], keys[:, seen], later)
        most = scores.amax(-1, keepdim=True)
        total = scores.sub_(most).exp2_().sum(-1, keepdim=True)
        torch.div(torch.bmm(scores, values[:, seen]), total, out=attended[:, rows])
        torch.add(most, total.log2_(), out=logsum[:, rows])
    output[own] = _by_token(attended, own)
    return logsum


def _attend_apart_backward(
    given: Sequence[torch.Tensor],
    logsum: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    place: Place,
    scale: float,
) -> None:
    """Add to the gradients of q, k and v those of one sequence.

    given: the output's gradient, q, k and v (T, heads, d).
    """
    outer, q, k, v = given
    own, queries, come = place[-1], _under(q[place[-1]], k), _under(outer[place[-1]], k)
    keys, values = _all(k, place), _all(v, place)
    in_base_2 = keys * (scale * LOG2E)
    for_q, for_k, for_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, seen, later in _blocks(queries, keys, own):
        chances = _scores(queries[:, rows], in_base_2[:, seen], later).sub_(logsum[:, rows]).exp2_()
        for_v[:, seen].baddbmm_(chances.mT, come[:, rows])
        for_scores = torch.bmm(come[:, rows], values[:, seen].mT).mul_(chances)
        for_scores.addcmul_(chances, for_scores.sum(-1, keepdim=True), value=-1)
        for_q[:, rows] = torch.bmm(for_scores, keys[:, seen])
        for_k[:, seen].baddbmm_(for_scores.mT, queries[:, rows])
    gradients[0][own] += _by_token(for_q, own).mul_(scale)
    for gradient, made in ((gradients[1], for_k.mul_(scale)), (gradients[2], for_v)):
        for span, part in zip(place, made.transpose(0, 1).split([*map(_size, place)]), strict=True):
            gradient[span] += part


def _all(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """(T, heads, d) -> (heads, L, d) of one sequence, in fp32 and in memory of its own."""
    return (
        torch.cat([tensor[span] for span in place])
        .transpose(0, 1)
        .to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    )


def _under(tensor: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, d) -> (kv_heads, rows, d) in fp32: the heads that share a key head, token by token."""
    return tensor.unflatten(1, (k.shape[1], -1)).transpose(0, 1).flatten(1, 2).float()


def _by_token(rows: torch.Tensor, own: slice) -> torch.Tensor:
    """And back."""
    return rows.unflatten(1, (_size(own), -1)).transpose(0, 1).flatten(1, 2)


def _blocks(queries: torch.Tensor, keys: torch.Tensor, own: slice) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Some tokens at a time: their rows in queries, the keys up to them, and 0 or -inf for the last of these."""
    tokens, first = _size(own), keys.shape[1] - _size(own)
    each = queries.shape[1] // tokens
    later = torch.full((BLOCK, BLOCK), -math.inf).triu_(1)
    for start in range(0, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        yield slice(start * each, stop * each), slice(0, first + stop), later[: stop - start, : stop - start]


def _scores(queries: torch.Tensor, keys: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """(kv_heads, rows, keys), -inf where a key comes later than its row's token."""
    scores, count = torch.bmm(queries, keys.mT), len(later)
    scores.unflatten(1, (count, -1))[..., -count:].add_(later[:, None])
    return scores


def _size(span: slice) -> int:
    return span.stop - span.start
