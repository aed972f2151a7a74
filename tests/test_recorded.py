"""Recorded passes as far as a CPU shows them: sizes, what fills them up, what may be recorded, and when.

tests/test_cuda.py has the recordings themselves.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lora_studio import recorded, step
from lora_studio.core import functions, lean
from lora_studio.core.baselines import add
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import BaselineSpec, LoraSpec, Method
from lora_studio.measure import leanly
from lora_studio.recorded import Recordings, cut, filled, fits, forget, full, recordable, size_for
from lora_studio.studio import _can_be_recorded
from lora_studio.train import Job, train
from tests.test_train import CONFIG, job, values
from tests.tiny import causal

LENGTHS = (9, 5, 9, 12)
BROKEN = torch.OutOfMemoryError("CUDA out of memory.")


def rows(lengths: Sequence[int] = LENGTHS) -> list[lean.Tokens]:
    return [lean.Tokens([2 + place % 90 for place in range(length)], [True] * length) for length in lengths]


# ---- sizes -----------------------------------------------------------------------------------------------------------


def beginning_alike(lengths: Sequence[int], shared: int) -> list[lean.Tokens]:
    """Rows that begin with the same `shared` tokens and then differ, of so many tokens besides."""
    ids = [(*range(2, 2 + shared), 2 + shared + row, *[5] * (length - 1)) for row, length in enumerate(lengths)]
    return [lean.Tokens(one, [place > shared for place in range(len(one))]) for one in ids]


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    shared=st.sampled_from([0, 0, 1, 30, 300]),
    width=st.sampled_from([64, 4096]),
)
def test_a_size_takes_every_batch_that_it_is_for(lengths: list[int], shared: int, width: int) -> None:
    """Filled up by an eighth and a little, a third in wide models, with sequences of its own, always in one shape."""
    batch = beginning_alike(lengths, shared)
    packed = lean.pack_groups([batch], share=True)
    size = size_for(packed, width)
    ids, positions, ends, *keys = filled(packed, size)
    assert ids.shape == positions.shape == (1, size.tokens) and ends.shape == (size.sequences + 1,)
    own = ends.diff().tolist()
    assert own[: len(lengths)] == list(packed.lengths) and sum(own) == size.tokens and min(own) >= 0
    assert max(own[len(lengths) :]) <= size.longest and max(len(tokens.ids) for tokens in batch) <= size.longest
    most = 4 / 3 if width == 4096 else 9 / 8
    assert size.tokens <= max(64, most * sum(packed.lengths) + 1)
    assert positions[0, sum(packed.lengths) :].tolist() == [n for length in own[len(lengths) :] for n in range(length)]
    assert bool(keys) == bool(size.keys) == (len(lengths) > 1 and shared > 0)
    if keys:
        assert [len(one) for one in keys] == [size.keys, size.sequences + 1, size.tokens + 1, size.keys]


@given(
    batches=st.lists(
        st.tuples(st.lists(st.integers(1, 150), min_size=1, max_size=30), st.sampled_from([0, 10, 48])),
        min_size=2,
        max_size=2,
    ),
    width=st.sampled_from([896, 4096]),
)
@example(batches=[([105] * 14, 0), ([70] * 14, 0)], width=896)
@example(batches=[([130] * 11, 10), ([70] * 12, 48)], width=896)
def test_what_fits_a_size_is_filled_up_to_its_shapes(batches: list[tuple[list[int], int]], width: int) -> None:
    first, second = (lean.pack_groups([beginning_alike(*one)], share=True) for one in batches)
    size = size_for(first, width)
    assert fits(first, size) and fits(second, size_for(second, width))
    if fits(second, size):
        shapes = [[tensor.shape for tensor in filled(one, size)] for one in (first, second)]
        assert shapes[0] == shapes[1]
    else:
        with pytest.raises(AssertionError, match="does not take"):
            filled(second, size)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=9), shared=st.integers(1, 40), groups=st.integers(1, 3)
)
def test_keys_are_laid_as_each_sequence_reads_and_their_gradients_find_back(
    lengths: list[int], shared: int, groups: int
) -> None:
    """Row for row the tokens of each sequence; and each token has the rows that it lies in, whatever lies behind."""
    rows = [beginning_alike(lengths, shared)] * groups
    packed = lean.pack_groups(rows, share=True)
    most = sum(packed.lengths) + len(packed.lengths) * packed.lengths.shared
    keys = lean.KeyRows.of(packed.lengths.places(), most=most)
    laid = packed.ids[0][keys.order]
    parts = [laid[start:end].tolist() for start, end in itertools.pairwise(keys.ends.tolist())]
    assert parts == [list(tokens.ids) for group in rows for tokens in group]
    outer = torch.randn(most, 2, generator=torch.Generator().manual_seed(0))
    real = int(keys.ends[-1])
    exact = torch.zeros(sum(packed.lengths), 2).index_add_(0, keys.order[:real], outer[:real])
    spans = itertools.pairwise(keys.starts.tolist())
    torch.testing.assert_close(torch.stack([outer[keys.rows[a:b]].sum(0) for a, b in spans]), exact)


def test_what_fills_up_changes_nothing_for_the_sequences() -> None:
    model, batch = causal("llama"), lean.pack(rows())
    ids, positions, ends = filled(batch, size_for(batch, 64))
    hidden = []
    with lean.packed_attention(model), torch.no_grad():
        for ids_, positions_, lengths in (
            (batch.ids, batch.positions, batch.lengths),
            (ids, positions, lean.Lengths([one for one in ends.diff().tolist() if one])),
        ):
            call = {"input_ids": ids_, "position_ids": positions_, "sequence_lengths": lengths}
            hidden.append(model.base_model(**call, use_cache=False)[0][:, : sum(LENGTHS)])
    torch.testing.assert_close(*hidden, rtol=1e-5, atol=1e-6)


# ---- how a step is cut for them --------------------------------------------------------------------------------------


@given(
    own=st.lists(st.integers(1, 700), min_size=1, max_size=60),
    shared=st.sampled_from([0, 30, 300]),
    most=st.sampled_from([1024, 2048, 5461]),
    width=st.sampled_from([64, 4096]),
)
def test_passes_take_each_row_once_and_hold_no_more_than_they_may(
    own: list[int], shared: int, most: int, width: int
) -> None:
    passes = cut(own, shared, most, width)
    assert sorted(itertools.chain(*passes)) == list(range(len(own)))
    assert all(shared + sum(own[row] for row in part) <= most for part in passes if len(part) > 1)


def test_passes_of_a_wide_model_are_of_few_sizes_and_full() -> None:
    """Sixteen rows at 8 B: two passes as a rule, and a twentieth of them filled up at most, on the whole."""
    draws, took, had, seen = random.Random(0), 0, 0, set()
    for _ in range(100):
        own = [draws.randint(30, 300) for _ in range(16)]
        tokens = [28 + sum(own[row] for row in part) for part in cut(own, 28, 2304, 4096)]
        sizes = [full(one, 4096) for one in tokens]
        assert len(sizes) <= 1 + math.ceil(sum(own) / 2276)
        took, had, seen = took + sum(sizes), had + sum(tokens), seen | set(sizes)
    assert took < 1.05 * had and len(seen) <= 6


# ---- what may be recorded --------------------------------------------------------------------------------------------

Q = LoraSpec(rank=2, targets=("attn.q",))


@pytest.mark.parametrize(
    ("family", "method", "dtype", "may"),
    [
        ("llama", Q, torch.bfloat16, True),
        ("phi3", dataclasses.replace(Q, targets=("all-linear",)), torch.bfloat16, True),
        ("qwen2", dataclasses.replace(Q, variant="dora"), torch.float16, True),
        ("llama", Q, torch.float32, False),  # its attention goes by the lengths
        ("llama", dataclasses.replace(Q, dropout=0.1), torch.bfloat16, False),
        ("llama", dataclasses.replace(Q, modules_to_save=("lm_head",)), torch.bfloat16, False),  # cast for each pass
        ("llama", BaselineSpec(kind="top"), torch.bfloat16, False),
        ("gpt2", Q, torch.bfloat16, False),  # nobody tried it
        ("mixtral", Q, torch.bfloat16, False),
    ],
)
def test_what_would_be_frozen_is_not_recorded(family: str, method: Method, dtype: torch.dtype, may: bool) -> None:
    lora = LoRA(causal(family).to(dtype))
    add(lora, "x", method, seed=0)
    assert recordable(lora, "x") == may
    assert (dtype != torch.float32 and _can_be_recorded(causal(family), method)) == may  # and so it is planned


def test_a_rotation_that_looks_at_the_length_is_not_recorded() -> None:
    lora = LoRA(causal("llama").bfloat16())
    lora.add("x", Q)
    lora.model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    assert not recordable(lora, "x")


# ---- when ------------------------------------------------------------------------------------------------------------


class Played:
    """In place of a recording: the filled up batch goes the plain way. Made `left` times, then memory runs out.

    as_recorded: what the model is in when it is recorded, since a recording knows nothing else.
    """

    left = 0
    as_recorded: Callable[[], AbstractContextManager] = nullcontext

    def __init__(self, model: Any, parameters: Any, laid: Any, pool: object) -> None:
        if not Played.left:
            raise BROKEN
        Played.left -= 1
        self.model, self.parameters = model, parameters

    def replay(self, laid: Any, count: int) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        ids, positions, ends, *_ = laid.inputs
        of = laid.packed.lengths
        lengths = of.followed_by([one for one in ends.diff().tolist()[len(of) :] if one])
        call = {"input_ids": ids, "position_ids": positions, "use_cache": False, "sequence_lengths": lengths}
        head = self.model.get_output_embeddings().weight
        with Played.as_recorded():
            hidden = self.model.base_model(**call)[0][0][laid.places]
            loss: Any = functions.CrossEntropy.apply(hidden, head, laid.labels).sum() / count  # type: ignore[union-attr]
            return loss.detach(), torch.autograd.grad(loss, self.parameters, allow_unused=True)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Played]]:
    """As on a GPU, as far as this module sees one."""
    monkeypatch.setattr(recorded, "_Recording", Played)
    monkeypatch.setattr(step, "recordable", lambda lora, name: True)
    for name in ("graph_pool_handle", "current_stream", "empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(Played, "left", 100)
    monkeypatch.setattr(Played, "as_recorded", nullcontext)
    yield Played


def recording(*, shares: bool = False) -> tuple[LoRA, Recordings]:
    """A model with an adapter "x", and the recordings of its passes."""
    lora = LoRA(causal("llama"))
    lora.add("x", Q)
    return lora, Recordings(lora.model, lora.parameters("x"), shares=shares)


@contextmanager
def in_training(work: Job) -> Iterator[None]:
    with step._in_training(work.lora.model), work.lora.use(work.adapter), leanly(work.lora, rows()):
        yield


def run(work: Job) -> tuple[list[float], int]:
    """The losses of a run that may record, and how many sizes it recorded at most."""
    events, most = [], 0
    Played.as_recorded = partial(in_training, work)
    for event in train(work):
        work.share.may_record = work.step > 0  # not in the probe
        events.append(event)
        most = max(most, len(work.share.recordings or ()))
    return values(events, "train_loss"), most


def test_a_run_that_records_is_the_run_that_does_not(played: type[Played]) -> None:
    config = dataclasses.replace(CONFIG, steps=30)
    plain = values(list(train(job(config))), "train_loss")
    losses, made = run(job(config))
    assert losses == pytest.approx(plain, rel=1e-4) and made > 0
    split = dataclasses.replace(config, accumulate=2)  # gradients of two replays of one step add up
    assert run(job(split))[0] == pytest.approx(plain, rel=1e-4)


def test_a_size_is_recorded_when_it_comes_and_only_so_many_are(played: type[Played]) -> None:
    lora, recordings = recording()
    with lora.use("x"), leanly(lora, rows()):
        assert recordings.replay(rows(), 9) is None and recordings.run(rows(), 9) is not None
        for length in range(100, 1000, 100):
            recordings.run(rows((length,)), 9)
        assert len(recordings) == recorded.MOST
        assert recordings.run(rows(), 9) is not None and recordings.run(rows((900,)), 9) is None


def test_a_pass_whose_size_is_not_recorded_is_filled_up_to_one_that_is(
    played: type[Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "MOST", 1)
    lora, recordings = recording(shares=True)
    losses = []
    with lora.use("x"), leanly(lora, rows()):
        recordings.run(beginning_alike((70, 90), 12), 9)
        for batch in (beginning_alike((60, 80), 12), rows((40, 90)), beginning_alike((60, 20), 12)):
            recordings.lay([batch])
            laid = recordings._laid[0][1]
            losses.append((recordings.run(batch, 9), laid.own.tokens, laid.size.tokens))
        plain = [lean.packed_losses(lora.model, lean.pack(rows((40, 90)))).sum() / 9]
    assert [one[1:] for one in losses] == [(160, 176), (144, 176), (96, 96)], "half as much again at most"
    assert losses[2][0] is None and losses[1][0] == pytest.approx(float(plain[0]), rel=1e-5)
    assert [size.tokens for size in recordings._made] == [176]


def test_what_was_laid_ahead_is_not_laid_again(played: type[Played], monkeypatch: pytest.MonkeyPatch) -> None:
    (lora, recordings), batch = recording(), rows()
    with lora.use("x"), leanly(lora, batch):
        exact = recordings.run(batch, 9)
        recordings.lay([rows((9, 9)), batch])
        monkeypatch.setattr(recorded, "filled", None)
        assert recordings.run(batch, 9) == exact
        with pytest.raises(TypeError):
            recordings.run(batch, 9)  # it was there for once


def gradients(lora: LoRA) -> torch.Tensor:
    """All of "x", which then have none."""
    found = torch.cat([tensor.grad.flatten() for tensor in lora.parameters("x") if tensor.grad is not None])
    for tensor in lora.parameters("x"):
        tensor.grad = None
    return found


def test_a_pass_that_was_begun_is_taken_up_under_the_same_weights_alone(
    played: type[Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    (lora, recordings), batch, replays, own = recording(), rows(), [], Played.replay
    monkeypatch.setattr(Played, "replay", lambda *given: (replays.append(1), own(*given))[1])
    with lora.use("x"), leanly(lora, batch):
        recordings.begin(9)  # nothing is laid
        exact = recordings.run(batch, 9), gradients(lora)

        def begun() -> None:
            recordings.lay([batch])
            replays.clear()
            recordings.begin(9)
            assert len(replays) == 1 and all(tensor.grad is None for tensor in lora.parameters("x"))

        begun()
        assert recordings.replay(batch, 9) == exact[0] and torch.equal(gradients(lora), exact[1]) and len(replays) == 1
        begun()
        recordings.replay(rows(), 9)  # other rows, and it is gone
        gradients(lora)
        recordings.replay(batch, 9)
        assert len(replays) == 3 and torch.equal(gradients(lora), exact[1])
        begun()
        recordings.replay(batch, 3)
        assert torch.allclose(gradients(lora), 3 * exact[1])
        begun()
        with torch.no_grad():
            lora.parameters("x")[1].add_(0.1)
        assert recordings.replay(batch, 9) != exact[0] and len(replays) == 2


def test_a_shortage_in_what_is_begun_is_left_to_the_step(played: type[Played], monkeypatch: pytest.MonkeyPatch) -> None:
    (lora, recordings), batch = recording(), rows()
    with lora.use("x"), leanly(lora, batch):
        exact = recordings.run(batch, 9)
        for error in (BROKEN, RuntimeError("something else")):
            recordings.lay([batch])
            with monkeypatch.context() as patch:
                patch.setattr(Played, "replay", lambda *_, error=error: (_ for _ in ()).throw(error))
                with nullcontext() if error is BROKEN else pytest.raises(RuntimeError):
                    recordings.begin(9)
        assert recordings.replay(batch, 9) == exact


def test_steps_are_begun_while_the_last_one_is_waited_for(
    played: type[Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, own = [], Recordings.begin

    def noted(self: Recordings, count: int) -> None:
        own(self, count)
        begun.append(self._begun is not None)

    monkeypatch.setattr(Recordings, "begin", noted)
    assert run(job(dataclasses.replace(CONFIG, steps=30)))[1] and sum(begun) > 15


def test_memory_that_is_short_takes_all_recordings_of_the_model_and_no_more_are_made(played: type[Played]) -> None:
    lora, both = LoRA(causal("llama")), []
    for name in ("x", "y"):
        lora.add(name, Q)
        both.append(Recordings(lora.model, lora.parameters(name), shares=False))
    for name, recordings in zip(("x", "y"), both, strict=True):
        with lora.use(name), leanly(lora, rows()):
            assert recordings.run(rows(), 9) is not None
    Played.left = 0  # a second size does not fit
    with lora.use("x"), leanly(lora, rows()):
        assert both[0].run(rows((300,)), 9) is None and "memory" in both[0].why_not
        assert both[0].run(rows(), 9) is None
    assert [len(one) for one in both] == [0, 0] and not forget(lora.model)


def test_a_shortage_takes_the_recordings_before_it_cuts_the_step(played: type[Played]) -> None:
    work, broken = job(dataclasses.replace(CONFIG, steps=12)), []

    def check(*_: object) -> None:
        if len(work.share.recordings or ()) and not broken and work.step > 8:
            broken.append(work.step)
            raise BROKEN

    work.lora.model.base_model.register_forward_pre_hook(check)
    losses, made = run(work)
    assert broken and made and not len(work.share.recordings or ()) and work.share.accumulate == 1
    assert losses == pytest.approx(
        values(list(train(job(dataclasses.replace(CONFIG, steps=12)))), "train_loss"), rel=1e-4
    )


def test_a_shortage_while_measuring_takes_the_recordings_too(played: type[Played]) -> None:
    config = dataclasses.replace(CONFIG, steps=12, evaluations=2)
    work, broken = job(config, samples=1), []

    def check(*_: object) -> None:
        if not torch.is_grad_enabled() and len(work.share.recordings or ()):
            broken.append(work.step)
            raise BROKEN

    work.lora.model.base_model.register_forward_pre_hook(check)
    losses, made = run(work)
    assert {*broken} == {6} and made and not len(work.share.recordings or ()) and work.error is None
    assert losses == pytest.approx(values(list(train(job(config, samples=1))), "train_loss"), rel=1e-4)
