"""Training as a generator: deterministic, resumable by its caller, honest about bad numbers."""

import dataclasses
import math

import pytest
import torch

from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.data.batches import encode
from lora_studio.data.formats import Example, Message
from lora_studio.errors import StudioError
from lora_studio.events import Metric, Sample, Started
from lora_studio.settings import TrainConfig
from lora_studio.train import Job, heldout_loss, schedule, train
from tests.tiny import causal, tokenizer

CONFIG = TrainConfig(steps=6, batch_size=4, learning_rate=0.01, evaluations=2, samples=0)


def examples(count: int = 12) -> list[Example]:
    return [
        Example(messages=(Message("user", f"say {n}"), Message("assistant", "ab" * (1 + n % 3))), row=n)
        for n in range(count)
    ]


def job(config: TrainConfig = CONFIG, *, heldout: int = 2, samples: int = 0) -> Job:
    words = tokenizer()
    lora = LoRA(causal("llama", vocabulary=len(words)))
    lora.add("x", LoraSpec(rank=4, targets=("all-linear",)), seed=config.seed)
    rows = examples()
    return Job(
        lora=lora,
        adapter="x",
        tokenizer=words,
        train=[encode(words, row, 512) for row in rows[heldout:]],
        heldout=[encode(words, row, 512) for row in rows[:heldout]],
        samples=rows[:samples],
        config=config,
    )


def values(events: list, name: str) -> list[float]:
    return [event.values[name] for event in events if isinstance(event, Metric) and name in event.values]


def test_the_same_seed_gives_the_same_losses_bit_for_bit_and_another_seed_others() -> None:
    first, second = (values(list(train(job())), "train_loss") for _ in range(2))
    other = values(list(train(job(dataclasses.replace(CONFIG, seed=1)))), "train_loss")
    assert first == second != other and len(first) == 6


def test_it_learns_and_step_zero_measures_the_base() -> None:
    work = job(dataclasses.replace(CONFIG, steps=40, learning_rate=0.03))
    base = values(list(train(job())), "heldout_loss")[0]
    heldout = values(list(train(work)), "heldout_loss")
    assert heldout[0] == base and heldout[-1] < 0.98 * base  # a random frozen head can learn only so much
    assert heldout_loss(work) == heldout[-1]


def test_splitting_a_step_into_passes_changes_nothing_but_rounding() -> None:
    whole, split = (list(train(job(dataclasses.replace(CONFIG, accumulate=n)))) for n in (1, 4))
    assert values(split, "train_loss") == pytest.approx(values(whole, "train_loss"), rel=1e-4)


def test_events_come_in_order_with_samples_at_each_evaluation() -> None:
    events = list(train(job(samples=2)))
    assert isinstance(events[0], Started) and events[0].steps == 6 and events[0].heldout_rows == 2
    assert [event.step for event in events] == sorted(event.step for event in events)
    assert [(event.step, event.index) for event in events if isinstance(event, Sample)] == [
        (step, index) for step in (0, 3, 6) for index in (0, 1)
    ]
    assert len(values(events, "heldout_loss")) == 3
    assert {"learning_rate", "grad_norm", "tokens_per_s", "seconds_left", "memory_bytes"} <= set(events[-4].values)


def test_stopping_is_not_pulling_and_leaves_a_usable_adapter() -> None:
    work = job()
    for event in train(work):
        if event.step == 3:
            break
    assert any(tensor.any() for tensor in work.lora.parameters("x")[1::2])
    assert math.isfinite(heldout_loss(work) or math.nan)


def test_a_loss_that_is_no_number_ends_the_run_with_a_cure() -> None:
    work = job()
    work.lora.parameters("x")[0].data.fill_(math.nan)
    with pytest.raises(StudioError, match="step 1") as caught:
        list(train(work))
    assert caught.value.code == "E_NOT_FINITE" and "0.001" in caught.value.hint


def test_no_supervised_token_and_no_step_are_errors() -> None:
    work = job()
    work.train = [encode(work.tokenizer, row, 8) for row in examples()]
    with pytest.raises(StudioError) as caught:
        list(train(work))
    assert caught.value.code == "E_NO_TARGET"
    with pytest.raises(StudioError, match="both 0"):
        TrainConfig(steps=0, epochs=0.0).total_steps(10)


def test_epochs_become_steps() -> None:
    assert TrainConfig(steps=0, epochs=2.0, batch_size=8).total_steps(12) == 3
    assert TrainConfig(steps=5, epochs=2.0).total_steps(12) == 5


def test_without_held_out_rows_it_says_so() -> None:
    codes = [event.code for event in train(job(heldout=0)) if hasattr(event, "code")]
    assert codes == ["W_NO_HELDOUT"]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_the_schedule_rises_to_its_peak_then_falls_and_is_never_zero(kind: str, steps: int) -> None:
    config = TrainConfig(schedule=kind, warmup=0.1)
    rates = [schedule(config, step, steps) for step in range(1, steps + 1)]
    peak = rates.index(max(rates))
    assert max(rates) == 1.0 and min(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_every_row_is_seen_once_before_any_is_seen_twice() -> None:
    from lora_studio.train import _batches

    rows = [encode(tokenizer(), row, 512).tokens for row in examples(10)]
    batches = list(_batches(rows, dataclasses.replace(CONFIG, batch_size=4), 5))
    flat = [rows.index(tokens) for batch in batches for tokens in batch]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == sorted(rows.index(tokens) for tokens in rows)


def test_bfloat16_bases_train_float32_adapters() -> None:
    work = job()
    work.lora.model.to(torch.bfloat16)
    list(train(work))
    assert {tensor.dtype for tensor in work.lora.parameters("x")} == {torch.float32}
