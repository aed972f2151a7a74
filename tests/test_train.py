"""Training as a generator: deterministic, resumable by its caller, honest about bad numbers."""

import dataclasses
import math
import re

import pytest
import torch

from lora_studio.core.baselines import add
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import BASELINES, VARIANTS, BaselineSpec, LoraSpec, Method
from lora_studio.data.batches import encode, encode_label
from lora_studio.data.formats import Example, Message
from lora_studio.errors import StudioError
from lora_studio.events import Metric, Sample, Started
from lora_studio.generate import classify
from lora_studio.settings import TrainConfig
from lora_studio.train import Job, heldout_figures, heldout_loss, schedule, train
from tests.tiny import causal, classifier, tokenizer

CONFIG = TrainConfig(steps=6, batch_size=4, learning_rate=0.01, evaluations=2, samples=0)


def examples(count: int = 12) -> list[Example]:
    return [
        Example(messages=(Message("user", f"say {n}"), Message("assistant", "ab" * (1 + n % 3))), row=n)
        for n in range(count)
    ]


LORA = LoraSpec(rank=4, targets=("all-linear",))


def job(config: TrainConfig = CONFIG, *, heldout: int = 2, samples: int = 0, method: Method = LORA) -> Job:
    words = tokenizer()
    lora = LoRA(causal("llama", vocabulary=len(words)))
    add(lora, "x", method, seed=config.seed)
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


METHODS = [dataclasses.replace(LORA, variant=variant) for variant in VARIANTS]
METHODS += [BaselineSpec(kind=kind, width=2 if BASELINES[kind][1] else 0) for kind in BASELINES]
LORA_PLUS = dataclasses.replace(LORA, variant="lora+")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: getattr(method, "kind", getattr(method, "variant", "")))
def test_every_method_learns_by_the_same_loop_and_leaves_the_base_as_it_was(method: Method) -> None:
    work = job(dataclasses.replace(CONFIG, steps=8, learning_rate=0.02), method=method)
    before = {name: tensor.clone() for name, tensor in work.lora.model.state_dict().items()}
    base = heldout_figures(work, base=True)["heldout_loss"]
    losses = values(list(train(work)), "heldout_loss")
    assert losses[0] == base and losses[-1] < base
    assert work.lora.changed("x") and work.lora.finite("x") and not work.lora.model.training
    after = work.lora.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_b_learns_faster_under_lora_plus_alone() -> None:
    config = dataclasses.replace(CONFIG, steps=1, learning_rate=1e-3, lr_ratio_b=8.0)
    for method, ratio in ((LORA, 1.0), (LORA_PLUS, 8.0)):
        work = job(config, method=method)
        list(train(work))
        moved = max(float(part.B.detach().abs().max()) for _, part in work.lora.parts("x"))
        assert moved == pytest.approx(1e-3 * ratio, rel=1e-2)  # Adam's first step is the rate, whatever the gradient


def test_magnitudes_do_not_decay() -> None:
    work = job(dataclasses.replace(CONFIG, weight_decay=0.3), method=dataclasses.replace(LORA, variant="dora"))
    decay = {id(tensor): group["weight_decay"] for group in work.optimizer.param_groups for tensor in group["params"]}
    for _, part in work.lora.parts("x"):
        assert (decay[id(part.A)], decay[id(part.B)], decay[id(part.magnitude)]) == (0.3, 0.3, 0.0)


def test_a_rate_for_lora_is_said_to_be_high_for_full_fine_tuning() -> None:
    quiet, loud = (
        [event for event in train(job(method=method)) if getattr(event, "code", "") == "W_RATE"]
        for method in (LORA, BaselineSpec(kind="full"))
    )
    assert not quiet and "0.0001" in loud[0].message


# ---- labels ----------------------------------------------------------------------------------------------------------

NAMES = ("bad", "fair", "good")


def labelled_job(config: TrainConfig, *, heldout: int = 0, dropout: float = 0.0, family: str = "bert") -> Job:
    words = tokenizer()
    model = classifier(family, vocabulary=len(words))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    rows = [
        Example(messages=(Message("user", text), Message("assistant", NAMES[number % 3])), row=number)
        for number, text in enumerate(["ab", "cdefg", "hi", "jklmnop", "q", "rst", "uvwx", "yz ab cd"])
    ]
    lora = LoRA(model)
    lora.add("x", LoraSpec(targets=("all-linear",), modules_to_save=("classifier" if family == "bert" else "score",)))
    encoded = [encode_label(words, row, NAMES, config.max_length) for row in rows]
    return Job(
        lora=lora,
        adapter="x",
        tokenizer=words,
        train=encoded,
        heldout=encoded[:heldout],
        samples=rows[: config.samples],
        classes=NAMES,
        config=config,
    )


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_classifier_with_lora_and_a_head_learns_eight_rows_by_heart(family: str) -> None:
    config = TrainConfig(steps=60, batch_size=8, learning_rate=0.02, evaluations=2, samples=8)
    work = labelled_job(config, heldout=8, dropout=0.1, family=family)
    events = list(train(work))
    accuracy, loss = values(events, "accuracy"), values(events, "heldout_loss")
    assert len(accuracy) == len(loss) == 3 and accuracy[-1] == 1.0 and loss[-1] < 0.1 < 1.0 < loss[0]
    said = [event for event in events if isinstance(event, Sample) and event.step == 60]
    for row, event in zip(work.train, said, strict=True):
        (chances,) = classify(work.lora, ["x"], row.tokens.ids, NAMES)
        name, chance = re.fullmatch(r"(\w+) \((\d\.\d\d)\)", event.text).groups()  # type: ignore[union-attr]
        assert name == event.target == NAMES[row.tokens.label or 0]
        assert float(chance) == pytest.approx(max(chances), abs=0.006)


def test_the_loss_of_a_step_is_the_mean_over_its_rows_however_it_is_split() -> None:
    config = TrainConfig(steps=3, batch_size=8, learning_rate=0.01, samples=0)
    work = labelled_job(config)
    model, labels = work.lora.model, torch.tensor([row.tokens.label for row in work.train])
    width = max(len(row.tokens.ids) for row in work.train)
    ids = torch.tensor([[*row.tokens.ids, *[1] * (width - len(row.tokens.ids))] for row in work.train])
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=(ids != 1).long(), labels=labels).loss
    losses = values(list(train(work)), "train_loss")
    assert losses[0] == pytest.approx(float(plain), rel=1e-6)
    for parts in (3, 8):
        split = values(list(train(labelled_job(dataclasses.replace(config, accumulate=parts)))), "train_loss")
        assert split == pytest.approx(losses, rel=1e-4)


def test_a_matrix_that_the_model_reads_past_its_layer_is_named() -> None:
    work = job()
    block = work.lora.model.model.layers[1].mlp
    block.forward = lambda x: x @ block.gate_proj.weight.T @ block.down_proj.weight.T  # type: ignore[method-assign]
    with pytest.raises(StudioError) as caught:
        list(train(work))
    assert caught.value.code == "E_UNREACHED" and "layers.1.mlp" in caught.value.message
