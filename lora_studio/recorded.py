"""A pass of training as two CUDA graphs: the blocks forward, and the blocks backward.

On a GPU a pass of a small model waits for Python, which launches its thousands of kernels one by one. A recording
launches them at once. It is made for a size; a pass is filled up to it with sequences of no consequence, because
nothing of theirs is supervised and no sequence sees another. Head and loss lie between the two graphs, so that
nothing is computed where nothing is supervised.

A recording freezes whatever is not a tensor that stays in its place: random numbers, decisions by values, attention
that goes by the lengths themselves, weights that are cast anew for each pass. `recordable` says where there is none of
these; everything else trains as it does elsewhere.
"""

import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from lora_studio.core import functions, lean
from lora_studio.core.lora import LoRA
from lora_studio.measure import is_shortage

log = logging.getLogger(__name__)
KNOWN = ("llama", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "olmo2")  # tests/test_cuda.py shows it of these
GRAIN = 64  # tokens of the smallest size
STEPS, COARSE = (8, 9, 10, 11, 12, 13, 14, 15), (8, 9, 10, 12)  # eighths of a power of two that sizes are
BROAD = 2048  # width from which they are coarse: a GPU takes 7 to 9 % longer for a token of 11 or 13 eighths
LEAST = 1024  # tokens of each pass, where there are several: products of fewer are slow
ONCE = 2**20  # tokens times width that a pass costs besides its tokens
UNIT = 16  # tokens, to which a cut is planned
PREFIX = 16  # tokens of a prefix that a recording has room for are a multiple of it
# Tokens of a sequence that attention takes together, or a multiple: blocks where there are none take time, too.
BLOCK = 128
MOST = 8  # sizes that are recorded, each when it comes first: most runs have no more, and come back to each
SPARE = 1.5  # times its own size that a pass may be filled up to where that is not recorded


def recordable(lora: LoRA, name: str) -> bool:
    """Whether passes under this adapter can be recorded: an architecture that was tried, low-rank factors alone."""
    tensors = list(lora.model.parameters())
    return (
        suits(lora.model)
        and tensors[0].dtype in (torch.bfloat16, torch.float16)
        and all(one.is_floating_point() for one in tensors)
        and lora.only_factors(name)
        and lora.shares(name)
    )


@torch.no_grad()  # a head that is trained is another matter: `only_factors`
def suits(model: nn.Module) -> bool:
    """Whether its architecture can be recorded."""
    config: Any = model.config
    known = config.get_text_config().model_type in KNOWN
    return known and not lean.rotates_by_length(model) and lean.plain_head(model)


def sizes(width: int) -> Iterator[int]:
    """Tokens of the passes that are recorded, from the smallest, of a model so wide."""
    for power in itertools.count():
        yield from (GRAIN * step * 2**power // 8 for step in (COARSE if width >= BROAD else STEPS))


def full(tokens: int, width: int) -> int:
    """The smallest size that takes so many."""
    return next(size for size in sizes(width) if size >= tokens)


def cut(own: Sequence[int], shared: int, most: int, width: int) -> list[list[int]]:
    """The rows of each pass, so that all passes are filled up with little.

    own: tokens that each row adds to a pass, each of which has `shared` besides; most: tokens of a pass, but for a row
    that is longer by itself; width: of the model.
    """
    left, passes = list(range(len(own))), []
    while left:
        total = sum(own[row] for row in left)
        largest = _largest(total, shared, most, width)
        places = _fullest([own[row] for row in left], largest - shared)
        chosen = [left[place] for place in places] or [max(left, key=lambda row: own[row])]
        passes.append(chosen)
        left = [row for row in left if row not in chosen]
    return passes


def _largest(total: int, shared: int, most: int, width: int) -> int:
    """The largest of the sizes that take so many tokens at the least cost."""
    if total + shared <= LEAST:
        return full(total + shared, width)
    return _largest_of(UNIT * math.ceil(shared / UNIT), most, width)[math.ceil(min(total, 3 * most) / UNIT)]


@functools.lru_cache(maxsize=64)
def _largest_of(shared: int, most: int, width: int) -> list[int]:
    """The same for each number of units, up to three passes."""
    usual = [size for size in itertools.takewhile(lambda size: size <= most, sizes(width)) if size >= LEAST]
    usual = [size for size in usual if size > shared] or [most]
    best = [(0.0, 0)]  # cost, and the largest size
    for taken in range(1, 3 * most // UNIT + 2):
        ways = ((size, best[max(0, taken - max(1, (size - shared) // UNIT))]) for size in usual)
        best.append(min((cost + size + ONCE / width, max(size, largest)) for size, (cost, largest) in ways))
    return [size for _, size in best]


def _fullest(rows: Sequence[int], room: int) -> list[int]:
    """Places of the rows that fill `room` as far as any do; none where the smallest has no room."""
    sums = [1]  # bit n: the rows so far, or some of them, make n
    for row in rows:
        sums.append((sums[-1] | sums[-1] << row) & ((2 << max(0, room)) - 1))
    chosen, left = [], sums[-1].bit_length() - 1
    for place in reversed(range(len(rows))):
        if not sums[place] >> left & 1:
            chosen.append(place)
            left -= rows[place]
    return chosen[::-1]


@dataclass(frozen=True)
class Size:
    """Of a recording: tokens in all, sequences, those that fill up included, and a length that none exceeds.

    keys: rows in which keys are laid, where sequences begin with tokens of others; else 0.
    """

    tokens: int
    sequences: int
    longest: int
    keys: int

    @property
    def filling(self) -> int:
        """Tokens of a sequence that fills up."""
        return self.longest // 2


def size_for(batch: lean.Packed, width: int, longest: int = 0) -> Size:
    """The smallest size that takes a batch, with room for sequences of `longest` tokens."""
    tokens = full(sum(batch.lengths), width)
    longest = BLOCK * max(2, math.ceil(max(longest, batch.lengths.longest) / BLOCK))
    fillers = math.ceil(max(GRAIN, tokens / 3) / (longest // 2))  # what a size may lack
    sequences = _seats(max(len(batch.lengths) + fillers, tokens // BLOCK))
    shared = PREFIX * math.ceil(batch.lengths.shared / PREFIX)
    return Size(tokens, sequences, longest, tokens + sequences * shared if shared else 0)


def _seats(count: int) -> int:
    """At least so many, of 8, 9, 10, 12, 16, 18, ..., so that there are few sizes."""
    return next(step * 2**power for power in itertools.count() for step in COARSE if step * 2**power >= count)


def fits(batch: lean.Packed, size: Size) -> bool:
    """Whether a batch can be filled up to a size: it has the seats for what is missing, and the rows of the keys."""
    missing = size.tokens - sum(batch.lengths)
    sequences = len(batch.lengths) + math.ceil(missing / size.filling)
    again = batch.lengths.again
    whole = batch.lengths.longest <= size.longest and (not again or size.tokens + again <= size.keys)
    return missing >= 0 and sequences <= size.sequences and whole


def filled(batch: lean.Packed, size: Size) -> list[torch.Tensor]:
    """ids and positions (1, size.tokens), and ends (size.sequences + 1,) of a batch on the CPU that is filled up.

    Sequences that are left over at the end are empty. With size.keys also the tensors of lean.KeyRows.
    """
    assert fits(batch, size), "the size does not take this batch"
    missing = size.tokens - sum(batch.lengths)
    more = [min(size.filling, missing - start) for start in range(0, missing, size.filling)]
    places = [place for length in more for place in range(length)]
    ids = torch.cat([batch.ids, batch.ids.new_zeros(1, missing)], dim=1)
    positions = torch.cat([batch.positions, torch.tensor([places], dtype=batch.positions.dtype)], dim=1)
    empty = [0] * (size.sequences - len(batch.lengths) - len(more))
    lengths = batch.lengths.followed_by((*more, *empty))
    keys = lean.KeyRows.of(lengths.places(), most=size.keys).tensors() if size.keys else ()
    return [ids, positions, lengths.ends(ids.device), *keys]


class Recordings:
    """Of one adapter's passes, by size. They are made while it is in use and the model runs leanly, in training.

    shares: a prefix that all rows of a pass have is computed once; longest: tokens of a row, as far as is known.

    No graph of an earlier pass may be alive: its leaves would draw the recording into the stream that it ran on. All
    recordings of a model share their memory, because their passes come one after another.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], *, shares: bool, longest: int = 0) -> None:
        self._model, self._parameters, self._shares, self._longest = model, list(parameters), shares, longest
        config: Any = model.config
        self._width = config.get_text_config().hidden_size
        self._made: dict[Size, _Recording] = {}
        self._laid: list[tuple[Sequence[lean.Tokens], _Laid]] = []  # passes to come
        self._begun: _Begun | None = None  # the first of them
        self.why_not = ""  # anything more is recorded
        self._pool, others = _OF.setdefault(model, (torch.cuda.graph_pool_handle(), WeakSet()))
        others.add(self)

    def __len__(self) -> int:
        """Sizes that are recorded."""
        return len(self._made)

    def replay(self, batch: Sequence[lean.Tokens], count: int) -> torch.Tensor | None:
        """Add to the gradients those of the sum of the batch's losses over `count`; that loss.

        None, with nothing added, where no recording takes this pass. The model may be in any state.
        """
        if not self._made:
            return None
        begun, self._begun = self._begun, None
        if begun and begun.is_of(batch, count, self._versions):
            self._add(begun.gradients, lasting=True)
            return begun.loss
        laid = self._taken(batch)
        if laid.size not in self._made:
            self._laid.append((batch, laid))
            return None
        return self._replayed(laid, count)

    def run(self, batch: Sequence[lean.Tokens], count: int) -> torch.Tensor | None:
        """The same, and make a recording where there is none of its size."""
        if self.why_not and not self._made:
            return None
        laid = self._taken(batch)
        if laid.size not in self._made and self._has_room:
            self._record(laid)
        return self._replayed(laid, count) if laid.size in self._made else None

    @property
    def _has_room(self) -> bool:
        """Whether one more is recorded."""
        return len(self) < MOST and not self.why_not

    def _replayed(self, laid: "_Laid", count: int) -> torch.Tensor:
        loss, gradients = self._made[laid.size].replay(laid, count)
        self._add(gradients)
        return loss

    def _add(self, gradients: Sequence[torch.Tensor | None], *, lasting: bool = False) -> None:
        """To those of the parameters, which keep none of these but `lasting` ones: a replay writes into the others."""
        pairs = [(tensor, one) for tensor, one in zip(self._parameters, gradients, strict=True) if one is not None]
        new = [(tensor, one) for tensor, one in pairs if tensor.grad is None]
        more = [(tensor.grad, one) for tensor, one in pairs if tensor.grad is not None]
        first = [one for _, one in new]
        for (tensor, _), gradient in zip(new, first if lasting else _copied(first), strict=True):
            tensor.grad = gradient
        if more:
            torch._foreach_add_([own for own, _ in more], [one for _, one in more])  # type: ignore[attr-defined]

    @property
    def _versions(self) -> list[int]:
        """Of the weights."""
        return [tensor._version for tensor in self._parameters]

    def begin(self, count: int) -> None:
        """Replay the first of the passes that were laid, so that a GPU is not idle while somebody reads a loss.

        `replay` takes it up, over the same `count`, if the weights are still the same then.
        """
        if not self._laid or self._laid[0][1].size not in self._made:
            return
        batch, laid = self._laid.pop(0)
        try:
            loss, gradients = self._made[laid.size].replay(laid, count)
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            return  # it will be tried again with all that is done about a shortage
        self._begun = _Begun(batch, count, self._versions, loss, _copied(gradients))

    def lay(self, batches: Sequence[Sequence[lean.Tokens]]) -> None:
        """Lay passes that are to come, and forget those that have not."""
        wanted, self._begun = self._made or not self.why_not, None
        self._laid = [(batch, self._lay(batch)) for batch in batches] if wanted else []

    def _lay(self, batch: Sequence[lean.Tokens]) -> "_Laid":
        laid = _Laid(batch, self._width, shares=self._shares, longest=self._longest)
        size = laid.own
        if size not in self._made and not self._has_room:
            larger = [one for one in self._made if one.tokens <= SPARE * size.tokens and fits(laid.packed, one)]
            size = min(larger, key=lambda size: size.tokens, default=size)
        laid.fill(size)
        return laid

    def _taken(self, batch: Sequence[lean.Tokens]) -> "_Laid":
        """As it was laid, or is now."""
        for place, (rows, laid) in enumerate(self._laid):
            if _same(rows, batch):
                del self._laid[place]
                return laid
        return self._lay(batch)

    def _record(self, laid: "_Laid") -> None:
        here = torch.cuda.current_stream()
        try:
            self._made[laid.size] = _Recording(self._model, self._parameters, laid, self._pool)
        except Exception as error:  # the plain way shows whether anything is wrong
            self.why_not = f"{type(error).__name__}: {error}"
            short = is_shortage(error)
        if self.why_not:  # out of the handler, whose traceback would keep the tensors of the recording
            log.info("No more passes are recorded: %s", self.why_not)
            torch.cuda.set_stream(here)  # one that breaks off stays on its own
            torch.cuda.empty_cache()
            if short:
                forget(self._model)

    def stop(self) -> bool:
        """Give back the memory and record no more; whether there was anything to give back."""
        held = bool(self._made)
        if held:
            torch.cuda.synchronize()  # one of them may still be at work
        self._made.clear()
        self._laid.clear()
        self._begun = None
        self.why_not = self.why_not or "stopped"
        return held


_OF: WeakKeyDictionary[nn.Module, tuple[Any, WeakSet[Recordings]]] = WeakKeyDictionary()


def forget(model: nn.Module) -> bool:
    """Memory ran short: stop all recordings of the model's passes. False where none held anything."""
    _, recordings = _OF.get(model, (None, ()))
    held = [one.stop() for one in recordings]
    if any(held):
        torch.cuda.empty_cache()
    return any(held)


def _same(rows: Sequence[lean.Tokens], others: Sequence[lean.Tokens]) -> bool:
    return len(rows) == len(others) and all(one is other for one, other in zip(rows, others, strict=True))


def _copied(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    there = [one for one in tensors if one is not None]
    copies = [torch.empty_like(one) for one in there]
    if there:
        torch._foreach_copy_(copies, there)  # type: ignore[attr-defined]
    left = iter(copies)
    return [None if one is None else next(left) for one in tensors]


@dataclass(frozen=True)
class _Begun:
    """A pass that was replayed before it was asked for, under weights of these versions."""

    batch: Sequence[lean.Tokens]
    count: int
    versions: list[int]
    loss: torch.Tensor
    gradients: Sequence[torch.Tensor | None]

    def is_of(self, batch: Sequence[lean.Tokens], count: int, versions: list[int]) -> bool:
        return _same(self.batch, batch) and (self.count, self.versions) == (count, versions)


class _Laid:
    """A pass on the CPU, in memory that a GPU reads by itself.

    own: its size; size: the one that it was filled up to. places, labels: where a token is supervised, and the token
    that should come there.
    """

    def __init__(self, batch: Sequence[lean.Tokens], width: int, *, shares: bool, longest: int) -> None:
        self.packed = lean.pack_groups([batch], share=shares)
        self.own = size_for(self.packed, width, longest)
        labels = self.packed.labels[0]
        places = (labels != lean.IGNORED).nonzero()[:, 0]
        self.places, self.labels = _pinned((places, labels[places]))

    def fill(self, size: Size) -> None:
        self.size, self.inputs = size, _pinned(filled(self.packed, size))


def _pinned(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [one.pin_memory() for one in tensors] if torch.cuda.is_available() else list(tensors)


class _Recording:
    """Passes of one size."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        laid: _Laid,
        pool: Any,
    ) -> None:
        device = next(model.parameters()).device
        self._head: torch.Tensor = model.get_output_embeddings().weight  # type: ignore[operator]
        self._inputs = [tensor.to(device) for tensor in laid.inputs]
        ids, positions, ends, *keys = self._inputs
        rows = lean.KeyRows(*keys) if keys else None
        lengths = lean.Lengths((laid.size.tokens,), ends=ends, keys=rows, longest=laid.size.longest)

        def forward() -> torch.Tensor:
            call = {"input_ids": ids, "position_ids": positions, "use_cache": False, "sequence_lengths": lengths}
            return model.base_model(**call)[0]  # type: ignore[operator]

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # once, so that everything that is made at the first use is there
            hidden = forward()
            self._outer = torch.zeros_like(hidden)
            torch.autograd.grad(hidden, parameters, self._outer, allow_unused=True)
            del hidden
        torch.cuda.current_stream().wait_stream(aside)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, pool=pool):
            hidden = forward()
        with torch.cuda.graph(self._backward, pool=pool):
            self._gradients = torch.autograd.grad(hidden, parameters, self._outer, allow_unused=True)
        self._hidden = hidden.detach()

    def replay(self, laid: _Laid, count: int) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        """The loss of what is supervised, and the gradient of each parameter, until the next replay."""
        for held, tensor in zip(self._inputs, laid.inputs, strict=True):
            held.copy_(tensor, non_blocking=True)
        self._forward.replay()
        places, labels = (one.to(self._hidden.device, non_blocking=True) for one in (laid.places, laid.labels))
        rows = self._hidden[0].index_select(0, places).requires_grad_()
        loss = functions.CrossEntropy.apply(rows, self._head, labels).sum() / count  # type: ignore[union-attr]
        (gradient,) = torch.autograd.grad(loss, rows)
        self._outer.zero_()[0].index_copy_(0, places, gradient)
        self._backward.replay()
        return loss.detach(), self._gradients
