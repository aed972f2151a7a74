"""Recorded passes as far as a CPU shows them: sizes, what fills them up, what may be recorded, and when.

tests/test_cuda.py has the recordings themselves.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_studio import recorded, step
from lora_studio.core import functions, lean
from lora_studio.core.baselines import add
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import BaselineSpec, LoraSpec, Method
from lora_studio.measure import leanly
from lora_studio.recorded import Recordings, filled, forget, recordable, size_for
from lora_studio.studio import _can_be_recorded
from lora_studio.train import Job, train
from tests.test_train import CONFIG, job, values
from tests.tiny import causal

LENGTHS = (9, 5, 9, 12)
BROKEN = torch.OutOfMemoryError("CUDA out of memory.")


def rows(lengths: Sequence[int] = LENGTHS) -> list[lean.Tokens]:
    return [lean.Tokens([2 + place % 90 for place in range(length)], [True] * length) for length in lengths]


# ---- sizes -----------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_a_size_takes_every_batch_that_it_is_for(lengths: list[int]) -> None:
    """Filled up by a tenth and a little, with sequences no longer than the longest, and always by one shape."""
    size = size_for(lengths)
    ids, positions, ends = filled(lean.pack(rows(lengths)), size)
    assert ids.shape == positions.shape == (1, size.tokens) and ends.shape == (size.sequences + 1,)
    sizes = ends.diff().tolist()
    assert sizes[: len(lengths)] == lengths and sum(sizes) == size.tokens and min(sizes) >= 0
    assert max(sizes[len(lengths) :]) <= max(lengths) <= size.longest < 2 * max(lengths)
    assert size.tokens < 1.1 * sum(lengths) + 2 * 64
    assert positions[0].tolist() == [place for length in sizes for place in range(length)]


def test_what_fills_up_changes_nothing_for_the_sequences() -> None:
    model, batch = causal("llama"), lean.pack(rows())
    ids, positions, ends = filled(batch, size_for(batch.lengths))
    hidden = []
    with lean.packed_attention(model), torch.no_grad():
        for ids_, positions_, lengths in (
            (batch.ids, batch.positions, batch.lengths),
            (ids, positions, lean.Lengths([one for one in ends.diff().tolist() if one])),
        ):
            call = {"input_ids": ids_, "position_ids": positions_, "sequence_lengths": lengths}
            hidden.append(model.base_model(**call, use_cache=False)[0][:, : sum(LENGTHS)])
    torch.testing.assert_close(*hidden, rtol=1e-5, atol=1e-6)


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
    """In place of a recording: the filled up batch goes the plain way. Made `left` times, then memory runs out."""

    left = 0

    def __init__(self, model: Any, parameters: Any, packed: lean.Packed, size: recorded.Size, pool: object) -> None:
        if not Played.left:
            raise BROKEN
        Played.left -= 1
        self.model, self.parameters, self.size = model, parameters, size

    def replay(
        self, packed: lean.Packed, places: torch.Tensor, labels: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        ids, positions, ends = filled(packed, self.size)
        lengths = lean.Lengths([one for one in ends.diff().tolist() if one])
        call = {"input_ids": ids, "position_ids": positions, "use_cache": False, "sequence_lengths": lengths}
        hidden = self.model.base_model(**call)[0][0][places]
        loss = functions.CrossEntropy.apply(hidden, self.model.get_output_embeddings().weight, labels).sum() / count  # type: ignore[union-attr]
        return loss.detach(), torch.autograd.grad(loss, self.parameters, allow_unused=True)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Played]]:
    """As on a GPU, as far as this module sees one."""
    monkeypatch.setattr(recorded, "_Recording", Played)
    monkeypatch.setattr(step, "recordable", lambda lora, name: True)
    for name in ("graph_pool_handle", "current_stream", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    Played.left = 100
    yield Played


def run(work: Job) -> tuple[list[float], int]:
    """The losses of a run that may record, and how many sizes it recorded at most."""
    events, most = [], 0
    for event in train(work):
        work.share.may_record = True
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


def test_a_size_is_recorded_when_it_comes_the_third_time_and_only_so_many_are(played: type[Played]) -> None:
    lora = LoRA(causal("llama"))
    lora.add("x", Q)
    recordings = Recordings(lora.model, lora.parameters("x"))
    with lora.use("x"), leanly(lora, rows()):
        assert [recordings.run(rows(), 9) is None for _ in range(4)] == [True, True, False, False]
        for length in (100, 200, 300, 400, 500, 600, 700):
            for _ in range(3):
                recordings.run(rows((length,)), 9)
        assert len(recordings) == recorded.MOST
        assert recordings.run(rows(), 9) is not None and recordings.run(rows((700,)), 9) is None


def test_memory_that_is_short_takes_all_recordings_of_the_model_and_no_more_are_made(played: type[Played]) -> None:
    lora, both = LoRA(causal("llama")), []
    for name in ("x", "y"):
        lora.add(name, Q)
        both.append(Recordings(lora.model, lora.parameters(name)))
    for name, recordings in zip(("x", "y"), both, strict=True):
        with lora.use(name), leanly(lora, rows()):
            assert [recordings.run(rows(), 9) is None for _ in range(3)] == [True, True, False]
    Played.left = 0  # a second size does not fit
    with lora.use("x"), leanly(lora, rows()):
        assert all(both[0].run(rows((300,)), 9) is None for _ in range(3)) and "memory" in both[0].why_not
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
