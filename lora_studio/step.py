"""The gradients of one step, cut into as many passes as the memory asks for, and what such a step takes.

The loss of a step is the mean over its supervised tokens or labels, however it is cut. Where memory runs out, the
passes are halved, at most HALVINGS times; then activations are computed twice instead of being kept; then it ends
in figures. It knows no optimizer and no schedule: that is train's.

On a CPU two passes are made side by side, on half of its threads each: threads that share a product wait for each
other at every one of them.
"""

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora_studio.core import lean, upcast
from lora_studio.core.lora import LoRA
from lora_studio.measure import (
    forget_peak,
    free_memory,
    is_shortage,
    leanly,
    losses,
    losses_together,
    memory_in_use,
    packs,
    peak_memory,
    shares_prefix,
    shortage,
)
from lora_studio.recorded import Recordings, cut, forget, recordable

HALVINGS = 3
MARGIN = 0.9  # of the free memory may be used
BUSY = 256  # tokens, or tokens times width over this, that keep a CPU busy
TOGETHER = 1024  # tokens of a pass that adapters share on a CPU
ABREAST = 2  # passes side by side
LAID_AGAIN = 1 / 6  # of a token's activations: its keys and values, at most
MORE = 1.1  # times the tokens of passes one by one that such may take, so that they are quicker still
Batch = Sequence[lean.Tokens]


@dataclass(kw_only=True, eq=False)
class Share:
    """One adapter's part in a step, and how it is cut. notes: what was changed for want of memory, to be told."""

    adapter: str
    accumulate: int = 1  # rounds at least
    checkpointing: str = "auto"
    room: int  # tokens in a round
    shares: bool = False  # the prefix that the rows of a pass share is computed once
    abreast: int = 1  # passes of a round, side by side
    busy: float = math.inf  # tokens up to which a step is one pass, and others may join it
    together: float = math.inf  # tokens of that pass then
    width: int = 0  # of a model whose passes are recorded, by sizes; 0 where they are not
    longest: int = 0  # tokens of a row, as far as is known
    recompute: bool = field(init=False)  # activations, in the backward
    may_record: bool = field(init=False, default=False)  # its passes, on a GPU
    halvings: int = field(init=False, default=0)
    alone: bool = field(init=False, default=False)  # it shares no pass with others any more
    notes: list[str] = field(init=False, default_factory=list)
    _may_join: bool | None = field(init=False, default=None)  # once it was asked
    # a batch to come, as it was cut, and by what
    _ahead: tuple[Batch, Sequence[Sequence[Batch]], tuple[int, bool]] | None = field(init=False, default=None)
    recordings: Recordings | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.recompute = self.checkpointing == "on"

    def rounds(self, batch: Batch) -> Sequence[Sequence[Batch]]:
        """The batch in passes of about equally many tokens: rounds of one, or of `abreast` that are made side by side.

        At least `accumulate` rounds, and as many as `room` asks for. What is recorded fills certain sizes instead.
        """
        if self._ahead and self._ahead[0] is batch and self._ahead[2] == (self.accumulate, self.recompute):
            return self._ahead[1]
        if self.width and self.accumulate == 1 and not self.recompute and batch[0].label is None:
            shared = lean.shared_prefix(batch) if self.shares else 0
            own = [len(tokens.ids) - shared for tokens in batch]
            return [[[batch[place] for place in part]] for part in cut(own, shared, self.room, self.width)]
        one_by_one = self._dealt(batch, 1)
        if self.abreast > 1 and self.size(batch) > self.busy:
            beside = self._dealt(batch, self.abreast)
            if beside and self._takes(beside) <= MORE * self._takes(one_by_one):
                return beside
        return one_by_one

    def _dealt(self, batch: Batch, abreast: int) -> Sequence[Sequence[Batch]]:
        """The longest rows first, each to the pass that has least; passes of about one size are abreast.

        [] where there are too few rows for that.
        """
        shared = lean.shared_prefix(batch) if self._shares(batch) else 0
        own = [len(tokens.ids) - shared for tokens in batch]
        rounds = max(self.accumulate, math.ceil(sum(own) / max(1, self.room - abreast * shared)))
        if rounds * abreast > len(batch) and abreast > 1:
            return []
        places: list[list[int]] = [[] for _ in range(min(rounds * abreast, len(batch)))]
        loads = [0] * len(places)
        for place in sorted(range(len(batch)), key=lambda place: own[place], reverse=True):
            lightest = loads.index(min(loads))
            places[lightest].append(place)
            loads[lightest] += own[place]
        passes = sorted(([batch[place] for place in sorted(part)] for part in places), key=self.size)
        return [passes[start : start + abreast] for start in range(0, len(passes), abreast)]

    def _takes(self, rounds: Sequence[Sequence[Batch]]) -> int:
        """Tokens, were all threads at them: those of a round's smaller passes wait for its largest."""
        return sum(len(passes) * max(map(self.size, passes)) for passes in rounds)

    def size(self, part: Batch) -> int:
        """Tokens that a pass of these rows computes."""
        return lean.laid(part, share=self._shares(part))

    def heaviest(self, batches: Sequence[Batch]) -> Batch:
        """The one that computes the most tokens at once, in its largest round; the longest of such.

        It need not be the longest of all, which may be cut where a shorter one is not.
        """
        longest_first = sorted(batches, key=_tokens, reverse=True)
        found, most = longest_first[0], 0
        for batch in longest_first:
            if self.width or _tokens(batch) <= most:  # what is recorded is of about one size
                break
            largest = max(sum(map(self.size, passes)) for passes in self.rounds(batch))
            if largest > most:
                found, most = batch, largest
        return found

    def _shares(self, part: Batch) -> bool:
        return self.shares and part[0].label is None

    def joins(self, lora: LoRA, batch: Batch) -> bool:
        """Whether it shares a pass with other adapters: sequences to lay end to end, few, and in one piece."""
        if self.accumulate > 1 or self.recompute or self.alone or batch[0].label is not None:
            return False
        if self.size(batch) > self.busy:
            return False
        if self._may_join is None:  # the model is asked once, not at every step
            self._may_join = packs(lora, [self.adapter]) and lora.shares(self.adapter)
        return self._may_join

    def replayed(self, part: Batch, count: int) -> torch.Tensor | None:
        """The loss of a pass whose gradients were added by a recording; None where there is none of it."""
        return None if self.recordings is None or self.recompute else self.recordings.replay(part, count)

    def run_recorded(self, lora: LoRA, part: Batch, count: int) -> torch.Tensor | None:
        """The same, and a recording is made where it pays."""
        if self.may_record and self.recordings is None:
            self.may_record = part[0].label is None and recordable(lora, self.adapter)
        if not self.may_record or self.recompute:
            return None
        if self.recordings is None:
            parameters = lora.parameters(self.adapter)
            self.recordings = Recordings(lora.model, parameters, shares=self.shares, longest=self.longest)
        return self.recordings.run(part, count)

    def look_ahead(self, batch: Batch) -> None:
        """Lay the passes of a step to come and begin it, so that a GPU does not have to wait for it then."""
        if self.recordings is not None:
            self._ahead = batch, self.rounds(batch), (self.accumulate, self.recompute)
            self.recordings.lay([part for passes in self._ahead[1] for part in passes])
            self.recordings.begin(sum(tokens.count for tokens in batch))

    def give_way(self, lora: LoRA, batch: Batch) -> None:
        """Take less memory from here on. Raises E_MEMORY when nothing is left to try."""
        rounds = self.rounds(batch)
        if len(rounds) < len(batch) and self.halvings < HALVINGS:
            self.halvings += 1
            self.accumulate = min(2 * len(rounds), len(batch))
            self.notes.append(f"Memory ran out; a step is now {self.accumulate} parts, with the same result.")
        elif not self.recompute and self.checkpointing == "auto" and lean.recomputes(lora.model):
            self.recompute = True
            self.notes.append("Memory ran out; activations are now computed twice instead of being kept.")
        else:
            tokens = max(sum(len(one.ids) for part in passes for one in part) for passes in rounds)
            raise shortage(next(lora.model.parameters()).device, tokens)


def _tokens(batch: Batch) -> int:
    return sum(len(tokens.ids) for tokens in batch)


def share_of(lora: LoRA, adapter: str, accumulate: int, checkpointing: str, longest: int = 0) -> Share:
    """An adapter's part, as its settings, its method, its rows and the machine want it cut."""
    model, shares = lora.model, shares_prefix(lora, [adapter])
    config: Any = model.config
    device = next(model.parameters()).device.type
    upcasts = upcast.needed(torch.empty(0, dtype=model.dtype, device=device))  # type: ignore[arg-type]
    recorded = device == "cuda" and checkpointing != "on" and recordable(lora, adapter)
    return Share(
        adapter=adapter,
        accumulate=accumulate,
        # virtual tokens stand in a cache, which a block that computes twice does not take
        checkpointing=checkpointing if lora.packs(adapter) else "off",
        room=lean.room(model, device, recorded=recorded, upcasts=upcasts),
        shares=shares,
        abreast=side_by_side(model, shares=shares, only_factors=lora.only_factors(adapter)) if device == "cpu" else 1,
        # with more, a CPU's products are busy as they are, and a larger pass leaves its caches
        busy=busy(model) if device == "cpu" else math.inf,
        together=TOGETHER if device == "cpu" else math.inf,
        width=config.get_text_config().hidden_size if recorded else 0,
        longest=longest,
    )


def side_by_side(model: nn.Module, *, shares: bool, only_factors: bool) -> int:
    """How many passes may be made side by side under a method: those that do not reach into each other.

    shares: as `measure.shares_prefix`, on a CPU, packed, and with no random numbers, which would come in any order.
    only_factors: each pass has gradients of its own until they are added, so they have to be small.
    """
    apart = shares and only_factors and not lean.rotates_by_length(model)
    return ABREAST if apart and torch.get_num_threads() % ABREAST == 0 else 1


def busy(model: nn.Module) -> float:
    """Tokens of a pass that keep a CPU busy; with narrow models it is later."""
    config: Any = model.config
    return max(BUSY, BUSY**2 / config.get_text_config().hidden_size)


class Crowded(Exception):
    """Memory ran out in a pass of several adapters; from here on they do not share any."""


def careful(lora: LoRA, work: Sequence[tuple[Share, Batch]]) -> Sequence[torch.Tensor]:
    """The gradients of one step of each adapter, in a shared pass when there are several; the loss of each ().

    A GPU may still be at work on them: it is waited for by whoever reads a loss.

    Raises E_MEMORY when no way to cut the step of one fits, Crowded when that of several does not.
    """
    device = next(lora.model.parameters()).device
    before = random_states(device)
    while True:
        try:
            return _gradients(lora, work)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
        # out of the handler, whose traceback would keep the tensors of the failed pass
        for share, _ in work:
            for tensor in lora.parameters(share.adapter):
                tensor.grad = None
        gc.collect()  # what failed beside other passes holds on to itself
        held = forget(lora.model)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        restore_random(device, before)
        if held:  # what the recordings held may be enough
            continue
        if len(work) > 1:
            for share, _ in work:
                share.alone = True
                share.notes.append("Memory ran out; the adapters of this study now take turns.")
            raise Crowded
        share, batch = work[0]
        share.give_way(lora, batch)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one step without an update takes, of the batch that was probed."""

    tokens: int  # of the batch that was tried
    seconds: float
    seconds_token: float  # of a pass of one token without gradients: what a written token takes
    memory_bytes: int
    batch_fits: int | None  # of the batch's longest rows in one pass; None where the batch fits


def probe(lora: LoRA, share: Share, batches: Sequence[Batch]) -> Found:
    """Measure one forward and backward of the heaviest of these, not recorded, and cut it smaller if it would not fit.

    Then another may be the heaviest, and is tried as well.
    """
    fits = None
    while True:
        cut = share.accumulate
        found = _tried(lora, share, share.heaviest(batches))
        fits = fits or found.batch_fits
        if share.accumulate == cut:
            return replace(found, batch_fits=fits)


def _tried(lora: LoRA, share: Share, batch: Batch) -> Found:
    """What one batch takes.

    The longest row goes first, alone: memory grows with the tokens of a pass, so it tells what the batch will take
    before it is tried. Weights and random states stay as they were.
    """
    device = next(lora.model.parameters()).device
    states = random_states(device)
    longest = max(batch, key=lambda tokens: len(tokens.ids))
    with torch.no_grad(), lora.use(share.adapter):
        losses(lora, [lean.Tokens(longest.ids[:2], (False, True), longest.label)])  # what is used first, is made first
        _wait(device)
        start = time.monotonic()
        losses(lora, [lean.Tokens(longest.ids[:2], (False, True), longest.label)])
        _wait(device)
        seconds_token = time.monotonic() - start
    fits = _cut_to_fit(lora, share, batch, longest, device)
    _wait(device)
    start = time.monotonic()
    careful(lora, [(share, batch)])
    _wait(device)
    seconds = time.monotonic() - start
    for tensor in lora.parameters(share.adapter):
        tensor.grad = None
    restore_random(device, states)
    return Found(
        tokens=_tokens(batch),
        seconds=seconds,
        seconds_token=seconds_token,
        memory_bytes=peak_memory(device),
        batch_fits=fits,
    )


def _cut_to_fit(lora: LoRA, share: Share, batch: Batch, longest: lean.Tokens, device: torch.device) -> int | None:
    """Raise `accumulate` until a pass fits, going by what the longest row alone took; how many such rows fit."""
    measurable, before = forget_peak(device), memory_in_use(device)
    careful(lora, [(share, [longest])])
    took, free = peak_memory(device) - before, MARGIN * free_memory(device)
    if not measurable or took <= 0:
        return None
    per_token = took / len(longest.ids)

    def needs() -> float:
        return per_token * max(sum(map(weight, passes)) for passes in share.rounds(batch))

    def weight(part: Batch) -> float:
        """Tokens, and what a GPU keeps of keys that it lays again."""
        again = (sum(len(tokens.ids) for tokens in part) - share.size(part)) if device.type == "cuda" else 0
        return share.size(part) + again * LAID_AGAIN

    if needs() <= free:
        return None
    while needs() > free and len(share.rounds(batch)) < len(batch):
        share.accumulate = min(2 * len(share.rounds(batch)), len(batch))
    share.notes.append(f"The batch would not fit the memory; a step is {share.accumulate} parts, with the same result.")
    return max(1, int(free / took))


def _gradients(lora: LoRA, work: Sequence[tuple[Share, Batch]]) -> Sequence[torch.Tensor]:
    """Backward of one step; the loss of each adapter averages over its own supervised tokens or labels."""
    if len(work) == 1:
        return [_alone(lora, *work[0])]
    with _in_training(lora.model):
        each = losses_together(lora, {share.adapter: batch for share, batch in work})
        means = torch.stack([one.sum() / len(one) for one in each])
        means.sum().backward()
    return means.detach().unbind()


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Inside, the model is as in training; go in before `use`, which goes by it."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def _alone(lora: LoRA, share: Share, batch: Batch) -> torch.Tensor:
    """A GPU waits for nothing that a recording has no need of."""
    count, left, each = sum(tokens.count for tokens in batch), list(share.rounds(batch)), []
    while left and len(left[0]) == 1 and (loss := share.replayed(left[0][0], count)) is not None:
        each.append(loss)
        left.pop(0)
    if left:
        with (
            _in_training(lora.model),
            lora.use(share.adapter),
            leanly(lora, batch),
            lean.recomputing(lora.model, share.recompute),
        ):
            each += [loss for passes in left for loss in _round(lora, share, passes, count)]
    return torch.stack(each).double().sum()


def _round(lora: LoRA, share: Share, passes: Sequence[Batch], count: int) -> list[torch.Tensor]:
    """What each pass has of the loss; their gradients are added in order, so that every run adds alike."""
    if len(passes) == 1:
        return [_pass(lora, share, passes[0], count)]
    parameters, threads = lora.parameters(share.adapter), torch.get_num_threads()
    each = max(1, threads // len(passes))

    def made(part: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        loss = losses(lora, part).sum() / count
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    others: list[Future] = []
    try:
        torch.set_num_threads(each)
        others += [_helpers(each).submit(made, part) for part in passes[1:]]
        found = [made(passes[0])]
    finally:
        torch.set_num_threads(threads)
        wait(others)
    found += [other.result() for other in others]
    for _, gradients in found:
        for tensor, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:  # the optimizer asks for the layout of the tensor
                tensor.grad = gradient.contiguous() if tensor.grad is None else tensor.grad.add_(gradient)
    return [loss for loss, _ in found]


@functools.cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    """For the passes beside one's own. They stay, with their buffers; each has so many threads for its products."""
    return ThreadPoolExecutor(ABREAST - 1, "pass", initializer=torch.set_num_threads, initargs=(threads,))


def _pass(lora: LoRA, share: Share, part: Batch, count: int) -> torch.Tensor:
    """One pass's share of the loss, its gradients added; nothing of its graph outlives it, as a recording asks."""
    loss = share.run_recorded(lora, part, count)
    if loss is None:
        loss = losses(lora, part).sum() / count
        loss.backward()
    return loss.detach()


def random_states(device: torch.device) -> list[torch.Tensor]:
    """Of the CPU and, where it is used, the GPU: dropout's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def restore_random(device: torch.device, states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def on_their_way(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Numbers from a GPU for whoever waits for them, but for nothing that it is told to do from here on."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    here, arrived = torch.empty_like(numbers, device="cpu", pin_memory=True), torch.cuda.Event()
    here.copy_(numbers, non_blocking=True)
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        return here.tolist()

    return wait


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
