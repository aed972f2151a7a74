"""Training as a generator: deterministic, resumable by its caller, honest about bad numbers."""

import dataclasses
import itertools
import math
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import lora_studio.train as training
from lora_studio import step
from lora_studio.core import lean, upcast
from lora_studio.core.baselines import add
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import BASELINES, VARIANTS, BaselineSpec, LoraSpec, Method
from lora_studio.data.batches import encode, encode_label
from lora_studio.data.formats import Example, Message
from lora_studio.errors import StudioError
from lora_studio.events import Metric, Probed, Sample, Started, Warned
from lora_studio.generate import classify
from lora_studio.measure import figures, losses, losses_together
from lora_studio.settings import TrainConfig
from lora_studio.train import Job, _batches, heldout_figures, heldout_loss, schedule, train, train_together
from tests.tiny import EXPERTS, FAMILIES, causal, classifier, tokenizer

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


# ---- several adapters in one pass ------------------------------------------------------------------------------------

CELLS = [  # rank, matrices, variant, rate, seed, steps
    (1, ("attn.q",), "lora", 0.01, 0, 6),
    (4, ("attn.q", "attn.v"), "rslora", 0.03, 0, 6),
    (8, ("all-linear",), "lora", 0.02, 1, 4),
    (2, ("mlp.up",), "dora", 0.01, 0, 6),
    (2, ("all-linear",), "lora-fa", 0.01, 2, 3),
]


def cell_jobs(lora: LoRA, cells: list = CELLS, specs: Mapping[str, Any] | None = None, **changes: Any) -> list[Job]:
    words, made = tokenizer(), []
    rows = [encode(words, row, 512) for row in examples()]
    for number, (rank, targets, variant, rate, seed, steps) in enumerate(cells):
        lora.add(f"a{number}", LoraSpec(rank=rank, targets=targets, variant=variant, **specs or {}), seed=seed)
        config = dataclasses.replace(CONFIG, learning_rate=rate, seed=seed, steps=steps, **changes)
        job = Job(
            lora=lora,
            adapter=f"a{number}",
            tokenizer=words,
            train=rows[2:],
            heldout=rows[:2],
            samples=examples()[:1],
            config=config,
        )
        made.append(job)
    return made


def base(family: str) -> LoRA:
    return LoRA(causal(family, vocabulary=len(tokenizer())))


DROPPED = (2, ("attn.q",), "lora", 0.01, 3, 3)


def ends_as_alone(family: str, cells: list, specs: Mapping[str, Any]) -> None:
    together = base(family)
    found: dict[int, list] = {}
    for number, event in train_together(cell_jobs(together, cells, specs=specs)):
        found.setdefault(number, []).append(event)
    for number, cell in enumerate(cells):
        alone = base(family)
        (work,) = cell_jobs(alone, [cell], specs=specs)
        events = list(train(work))
        for name in ("train_loss", "heldout_loss", "learning_rate"):
            assert values(found[number], name) == pytest.approx(values(events, name), rel=0, abs=1e-4), name
        assert [type(event) for event in found[number]] == [type(event) for event in events]
        for ours, theirs in zip(together.parameters(f"a{number}"), alone.parameters("a0"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - EXPERTS.keys()))  # those that cannot be packed take turns
def test_adapters_trained_together_end_as_if_each_had_trained_alone(family: str) -> None:
    two = [(1, ("attn.q",), "lora", 0.01, 0, 6), CELLS[4]]
    ends_as_alone(family, CELLS if family == "llama" else two, {})


@pytest.mark.parametrize("specs", [{"dropout": 0.3}, {"modules_to_save": ("lm_head",)}], ids=["dropout", "head"])
def test_so_they_do_with_dropout_and_with_a_head_of_their_own(specs: Mapping[str, Any]) -> None:
    ends_as_alone("llama", [CELLS[0], DROPPED, CELLS[4]], specs)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_all_rows_of_an_adapter_begin_with_is_computed_once_a_pass(dropout: float) -> None:
    """Unless random numbers are drawn, which every row has its own of."""
    lora, words = base("llama"), tokenizer()
    for name in "xy":
        lora.add(name, LoraSpec(rank=2, dropout=dropout), seed=0)
    rows = [encode(words, row, 512).tokens for row in examples(5)]
    sizes: list[int] = []
    lora.model.base_model.register_forward_pre_hook(
        lambda _, inputs, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with lora.use("x"):
        losses(lora, rows)
    every, spared = sum(len(one.ids) for one in rows), lean.shared_prefix(rows)
    assert spared > 3 and sizes == [every if dropout else every - 4 * spared]
    if not dropout:
        losses_together(lora, {"x": rows[:2], "y": rows[2:]})
        first, second = lean.shared_prefix(rows[:2]), lean.shared_prefix(rows[2:])
        assert sizes[1:] == [every - first - 2 * second]


def test_a_shortage_in_a_shared_pass_ends_sharing_and_no_job() -> None:
    lora = base("llama")
    jobs = cell_jobs(lora)
    rows = [row.tokens for row in jobs[0].train]
    batches = [batch for job in jobs for batch in _batches(rows, job.config, job.config.steps)]
    most = max(sum(len(tokens.ids) for tokens in batch) for batch in batches)
    passes = short_of_memory(jobs[0], most)
    said = [event.code for _, event in train_together(jobs) if isinstance(event, Warned)]
    assert said.count("W_MEMORY") == len(jobs) and not any(job.error for job in jobs)
    assert sum(size > most for size in passes) == 1  # tried once and never again


def test_a_job_that_failed_before_it_began_is_not_measured() -> None:
    lora = base("llama")
    jobs = cell_jobs(lora)
    jobs[1].train = [encode(jobs[1].tokenizer, row, 8) for row in examples()]
    said = [event for number, event in train_together(jobs) if number == 1]
    assert jobs[1].error and [type(event) for event in said] == [Warned]


def test_a_shortage_while_measuring_takes_smaller_passes_or_ends_that_job_alone() -> None:
    lora = base("llama")
    jobs = cell_jobs(lora)
    plain = figures(lora, [row.tokens for row in jobs[0].train])
    sizes: list[int] = []

    def check(_: object, inputs: tuple, kwargs: dict) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 70:
            raise torch.OutOfMemoryError

    handle = lora.model.base_model.register_forward_pre_hook(check, with_kwargs=True)
    assert figures(lora, [row.tokens for row in jobs[0].train]) == pytest.approx(plain)
    handle.remove()
    assert max(sizes) > 70 >= sizes[-1]


@pytest.mark.parametrize("lacks", [False, True])
def test_a_pass_on_a_cpu_holds_fewer_tokens_where_bfloat16_is_a_matter_of_memory(
    lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upcast, "lacks_bfloat16", lambda: lacks)
    for dtype in (torch.float32, torch.bfloat16):
        lora = LoRA(causal("llama").to(dtype))
        lora.add("x", LoraSpec())
        few = dtype == torch.bfloat16 and lacks
        assert step.share_of(lora, "x", 1, "auto").room == (1024 if few else 2048)


def test_small_passes_are_shared_and_large_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one = 6 + 6 + 4 + 6 + 3
    for room, busy, passes in ((10_000, 256, 6), (70, 256, one_by_one), (10_000, 30, one_by_one)):  # tokens
        monkeypatch.setitem(lean.PASS, "cpu", room)
        monkeypatch.setattr(step, "BUSY", busy)
        forwards, lora = [], base("llama")
        jobs = cell_jobs(lora, samples=0)
        for job in jobs:
            job.heldout = job.samples = ()
        taken = train_together(jobs)
        for number, event in taken:
            if isinstance(event, Probed) and number == len(jobs) - 1:
                break
        lora.model.base_model.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        assert len(list(taken)) and len(forwards) == passes


def test_one_that_leaves_or_fails_changes_nothing_for_the_others() -> None:
    quiet, disturbed = base("llama"), base("llama")
    cells = [
        CELLS[0],
        CELLS[1],
        CELLS[1],
    ]  # not q alone: torch's attention swallows what is no number there on some CPUs
    want = [event for number, event in train_together(cell_jobs(quiet, cells)) if number == 1]
    jobs = cell_jobs(disturbed, cells)
    got = []
    for number, event in train_together(jobs):
        if number == 1:
            got.append(event)
        if number == 0 and event.step == 2:
            jobs[0].leave()
        if number == 2 and event.step == 3:
            for tensor in disturbed.parameters("a2"):
                tensor.data.fill_(math.nan)
    assert (jobs[0].step, jobs[0].error, jobs[1].step) == (2, None, 6)
    assert jobs[2].error and jobs[2].error.code == "E_NOT_FINITE" and jobs[2].step == 3
    assert values(got, "train_loss") == pytest.approx(values(want, "train_loss"), rel=1e-4)


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [LORA, dataclasses.replace(LORA, variant="dora", dropout=0.2), BaselineSpec(kind="full")]
)
@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_a_restored_job_ends_bit_for_bit_as_the_unbroken_one(method: Method, at: int) -> None:
    config = dataclasses.replace(CONFIG, learning_rate=1e-3)
    whole = job(config, method=method)
    unbroken = list(train(whole))
    first = job(config, method=method)
    before = []
    for event in train(first):
        if event.step > at:
            break
        before.append(event)
        state = first.state()
    torch.rand(7)  # whatever happened in between
    second = job(config, method=method)
    second.restore(state)
    after = list(train(second))
    assert isinstance(after[0], Started) and after[0].step == at
    for name in ("train_loss", "grad_norm", "heldout_loss"):
        assert values(before, name) + values(after, name) == values(unbroken, name)
    for ours, theirs in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_a_job_whose_patience_had_run_out_does_not_go_on() -> None:
    config = dataclasses.replace(CONFIG, steps=40, evaluations=20, learning_rate=1.0, patience=1)
    first, second = job(config), job(config)
    list(train(first))
    second.restore(first.state())
    events = list(train(second))
    assert first.step < 40 and second.step == first.step and [type(event) for event in events] == [Started]


def test_a_state_of_another_adapter_is_refused() -> None:
    state = job().state()
    other = job(method=dataclasses.replace(LORA, rank=2))
    with pytest.raises(StudioError) as caught:
        other.restore(state)
    assert caught.value.code == "E_CHECKPOINT"


def test_a_held_out_loss_is_that_of_the_weights_as_they_are() -> None:
    """What is kept until the factors change (DoRA's norms) is made anew after each step."""
    work = job(dataclasses.replace(CONFIG, evaluations=6), method=LoraSpec(rank=2, variant="dora"))
    for event in train(work):
        if isinstance(event, Metric) and "heldout_loss" in event.values and event.step:
            fresh = job(method=LoraSpec(rank=2, variant="dora"))
            fresh.restore(work.state())
            assert event.values["heldout_loss"] == heldout_loss(fresh), event.step


def test_a_held_out_loss_that_is_no_number_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    work, plain = job(), training.evaluation
    monkeypatch.setattr(
        training, "evaluation", lambda job, base: plain(job, base=base) | ({} if base else {"heldout_loss": math.nan})
    )
    with pytest.raises(StudioError) as caught:
        list(train(work))
    assert caught.value.code == "E_NOT_FINITE" and work.step == 3


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_do_not_train_with_activations_computed_twice(kind: str) -> None:
    work = job(dataclasses.replace(CONFIG, checkpointing="on"), method=BaselineSpec(kind=kind, width=2))
    list(train(work))
    assert work.step == CONFIG.steps and not work.share.recompute


def test_a_probe_ends_where_one_row_alone_takes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [lean.Tokens(range(2, 2 + length), [True] * length) for length in (90, 4, 4, 4)]
    work = job()
    monkeypatch.setattr(step, "free_memory", lambda device: 1)
    monkeypatch.setattr(step, "memory_in_use", lambda device: 0)
    monkeypatch.setattr(step, "peak_memory", lambda device: 10**6)
    found = step.probe(work.lora, work.share, [rows])
    assert found.batch_fits == 1 and work.share.accumulate == 4


@pytest.mark.parametrize(
    ("rows", "tokens", "batch"),
    [(3, 20, {"batch_size": 8}), (10, 20, {"batch_tokens": 1000}), (40, 600, {"batch_tokens": 1000}),
     (40, 500, {"batch_tokens": 100}), (30, 20, {"batch_size": 4})],
)  # fmt: skip
def test_an_epoch_is_once_through_all_rows(rows: int, tokens: int, batch: dict[str, int]) -> None:
    config = TrainConfig(steps=0, epochs=5.0, **batch)
    every = [lean.Tokens(range(tokens), [True] * tokens) for _ in range(rows)]
    steps = config.total_steps(rows, rows * tokens)
    seen = sum(len(batch) for batch in _batches(every, config, steps))
    assert 5 * rows <= seen < 5 * rows + len(next(_batches(every, config, 1)))


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_ends_a_run_as_soon_as_so_many_evaluations_were_no_better(patience: int) -> None:
    # nothing is learnt at such a rate, so no evaluation is better than the first
    config = dataclasses.replace(CONFIG, steps=40, evaluations=20, learning_rate=1e-30)
    curve = values(list(train(job(config))), "heldout_loss")[1:]
    stale = [index - curve[: index + 1].index(min(curve[: index + 1])) for index in range(len(curve))]
    work = job(dataclasses.replace(config, patience=patience))
    events = list(train(work))
    (said,) = [event for event in events if getattr(event, "code", "") == "I_PATIENCE"]
    assert said.step == work.step == 2 * (stale.index(patience) + 1) < 40
    assert values(events, "heldout_loss")[1:] == curve[: stale.index(patience) + 1]


# ---- memory ----------------------------------------------------------------------------------------------------------


def short_of_memory(work: Job, tokens: int, *, keeps: bool = False) -> list[int]:
    """Let a pass of more than `tokens` tokens fail as torch fails; with `keeps`, only while activations are kept."""
    passes: list[int] = []

    def check(_: object, inputs: tuple, kwargs: dict) -> None:
        size = kwargs["input_ids"].numel()
        kept = not any(getattr(module, "gradient_checkpointing", False) for module in work.lora.model.modules())
        if torch.is_grad_enabled():
            passes.append(size)
            if size > tokens and (kept or not keeps):
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    work.lora.model.base_model.register_forward_pre_hook(check, with_kwargs=True)
    return passes


def test_a_shortage_of_memory_halves_the_passes_and_changes_no_loss() -> None:
    plain = values(list(train(job())), "train_loss")
    work = job()
    longest = max(len(one.tokens.ids) for one in work.train)
    passes = short_of_memory(work, 2 * longest)
    events = list(train(work))
    assert values(events, "train_loss") == pytest.approx(plain, rel=1e-4)
    assert [event.code for event in events if isinstance(event, Warned)] == ["W_MEMORY"]
    assert work.share.accumulate == 2 and passes[-1] <= 2 * longest


def test_then_activations_are_computed_twice_and_then_it_ends_in_figures() -> None:
    plain = values(list(train(job())), "train_loss")
    work = job()
    short_of_memory(work, 1, keeps=True)
    events = list(train(work))
    assert work.share.recompute and values(events, "train_loss") == pytest.approx(plain, rel=1e-4)
    assert [event.code for event in events if isinstance(event, Warned)] == ["W_MEMORY"]
    for changes in ({}, {"checkpointing": "off"}):
        work = job(dataclasses.replace(CONFIG, **changes))
        short_of_memory(work, 1)
        with pytest.raises(StudioError, match="GB") as caught:
            list(train(work))
        assert caught.value.code == "E_MEMORY"


def test_without_the_memory_for_samples_these_are_left_out_and_all_else_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = [event for event in train(job(samples=2)) if isinstance(event, Metric)]

    def no_room(*_: object) -> list[str]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("lora_studio.train.sampled", no_room)
    events = list(train(job(samples=2)))
    assert not any(isinstance(event, Sample) for event in events)
    for name in ("train_loss", "heldout_loss"):
        assert values(events, name) == values(plain, name)
    assert [event.code for event in events if isinstance(event, Warned)] == ["W_SAMPLES"] * 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_activation_checkpointing_changes_no_loss_and_keeps_less(family: str) -> None:
    losses, kept = [], []
    for choice in ("off", "on"):
        (work,) = cell_jobs(base(family), [CELLS[2]], checkpointing=choice)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=sizes: (seen.append(t.numel()), t)[1], lambda t: t
        ):
            losses.append(values(list(train(work)), "train_loss"))
        kept.append(sum(sizes))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert kept[1] < 1.0 * kept[0]


@pytest.mark.parametrize("place", [0, 1])
def test_the_probe_measures_the_heaviest_batch_and_trains_nothing(place: int) -> None:
    """Which is the longest, or where that is cut the next one, which is not."""
    work = job(dataclasses.replace(CONFIG, batch_size=3))
    batches = sorted(_batches([r.tokens for r in work.train], work.config, 6), key=work.share.size, reverse=True)
    work.share.room = work.share.size(batches[place])
    before = [tensor.clone() for tensor in work.parameters]
    events = train(work)
    (probed,) = [event for event in itertools.islice(events, 2) if isinstance(event, Probed)]
    assert probed.tokens == sum(len(one.ids) for one in batches[place]) and probed.batch_fits is None
    assert probed.accumulate == 1 + place and work.share.size(batches[0]) > work.share.size(batches[1])
    assert all(torch.equal(old, new) for old, new in zip(before, work.parameters, strict=True))
    assert all(tensor.grad is None for tensor in work.parameters) and work.step == 0


def test_a_batch_that_would_not_fit_is_cut_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    work = job(dataclasses.replace(CONFIG, batch_size=8))
    monkeypatch.setattr(step, "forget_peak", lambda device: True)
    monkeypatch.setattr(step, "memory_in_use", lambda device: 0)
    monkeypatch.setattr(step, "peak_memory", lambda device: 1_000_000)  # that the longest row took, alone
    monkeypatch.setattr(step, "free_memory", lambda device: 4_000_000)
    events = list(train(work))
    (probed,) = [event for event in events if isinstance(event, Probed)]
    assert probed.accumulate > 1 and probed.batch_fits == 3
    assert [event.code for event in events if isinstance(event, Warned)] == ["W_MEMORY"]


def test_where_the_heaviest_batch_is_cut_the_next_one_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens at once would not fit, and cut in two parts the 130 are the most at once."""
    work, tried = job(), []
    work.share.room = 100
    whole, longest = ([lean.Tokens(range(2, 2 + length), [True] * length)] * 2 for length in (50, 65))
    monkeypatch.setattr(step, "careful", lambda lora, given: tried.append(given[0][1]))
    monkeypatch.setattr(step, "forget_peak", lambda device: True)
    monkeypatch.setattr(step, "memory_in_use", lambda device: 0)
    monkeypatch.setattr(step, "peak_memory", lambda device: sum(len(one.ids) for one in tried[-1]))
    monkeypatch.setattr(step, "free_memory", lambda device: 80)
    found = step.probe(work.lora, work.share, [longest, whole])
    assert [one for one in tried if len(one) > 1] == [whole, longest]
    assert found.tokens == 130 and found.batch_fits == 1 and work.share.accumulate == 2


def test_a_budget_of_tokens_fills_batches_and_counts_epochs() -> None:
    config = dataclasses.replace(CONFIG, batch_tokens=60, steps=0, epochs=3.0)
    rows = [encode(tokenizer(), row, 512).tokens for row in examples()]
    total = sum(len(tokens.ids) for tokens in rows)
    assert config.total_steps(len(rows), total) == math.ceil(3 * len(rows) / (60 * len(rows) // total))
    batches = list(_batches(rows, config, 9))
    sizes = [sum(len(tokens.ids) for tokens in batch) for batch in batches]
    assert max(sizes) <= 60 < min(sizes) + max(len(tokens.ids) for tokens in rows)


@pytest.mark.parametrize("abreast", [1, 2])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("room", [30, 60, 1000])
@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_a_step_is_cut_into_even_passes_of_whole_rows(room: int, accumulate: int, shares: bool, abreast: int) -> None:
    """By what each row adds to a pass, which of a prefix that they share is nothing."""
    rows = [encode(tokenizer(), row, 512).tokens for row in examples(8)]
    share = step.Share(adapter="x", accumulate=accumulate, room=room, shares=shares, abreast=abreast, busy=0)
    rounds, shared = share.rounds(rows), lean.shared_prefix(rows) if shares else 0
    passes = list(itertools.chain(*rounds))
    assert sorted(map(id, itertools.chain(*passes))) == sorted(map(id, rows)), "each row once"
    places = {id(tokens): place for place, tokens in enumerate(rows)}
    assert all([places[id(one)] for one in part] == sorted(places[id(one)] for one in part) for part in passes)
    beside = len(rounds[0])
    assert beside in (1, abreast) and {len(made) for made in rounds} == {beside}
    own = [sum(len(tokens.ids) - shared for tokens in part) for part in passes]
    assert all(share.size(part) <= shared + size for part, size in zip(passes, own, strict=True))
    assert len(rounds) == min(8, max(accumulate, math.ceil(sum(own) / (room - beside * shared))))
    assert max(own) - min(own) <= max(len(tokens.ids) for tokens in rows) - shared


def test_passes_are_side_by_side_where_they_keep_the_threads_busy_alike() -> None:
    rows = [lean.Tokens(range(length), [True] * length) for length in (50, 40, 30, 20)]
    share = step.Share(adapter="x", room=1000, abreast=2, busy=139)
    assert [[len(part) for part in made] for made in share.rounds(rows)] == [[2, 2]]  # 50 + 20 and 40 + 30
    assert [[len(part) for part in made] for made in share.rounds(rows[:3])] == [[3]]  # too few tokens
    share.busy = 0
    assert [[len(part) for part in made] for made in share.rounds(rows[:2])] == [[2]]  # 50 and 40 are too different
    share.accumulate = 4
    assert [[len(part) for part in made] for made in share.rounds(rows)] == [[1]] * 4  # too few rows
    share.accumulate, share.shares = 1, True
    rows = [lean.Tokens((*range(40), n, 7), [False] * 41 + [True]) for n in range(40, 60)]
    assert [[len(part) for part in made] for made in share.rounds(rows)] == [[20]]  # each would have the prefix again


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox"])
def test_passes_side_by_side_give_what_they_give_one_after_another(family: str, checkpointing: str) -> None:
    curves, weights = [], []
    for abreast in (1, 2, 2):
        cell = (8, ("embed", "all-linear"), "lora", 0.01, 1, 4)
        (work,) = cell_jobs(base(family), [cell], batch_size=8, checkpointing=checkpointing)
        work.share.abreast, work.share.busy, work.share.accumulate = abreast, 0, 2 // abreast
        assert {len(made) for made in work.share.rounds([one.tokens for one in work.train])} == {abreast}
        curves.append(values(list(train(work)), "train_loss"))
        weights.append(torch.cat([tensor.detach().flatten() for tensor in work.parameters]))
    assert curves[1] == curves[2] == pytest.approx(curves[0], rel=1e-5)
    assert torch.equal(weights[1], weights[2]) and torch.allclose(weights[0], weights[1], atol=1e-4)


@pytest.mark.parametrize(
    ("family", "spec", "abreast"),
    [
        ("llama", LORA, 2),
        ("stablelm", LORA, 1),  # pads
        ("llama", LoraSpec(dropout=0.1), 1),  # draws random numbers
        ("llama", LoraSpec(modules_to_save=("lm_head",)), 1),  # has gradients as large as the base's
    ],
)
def test_how_many_passes_may_be_side_by_side(
    family: str, spec: LoraSpec, abreast: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = base(family)
    lora.add("x", spec)
    assert step.share_of(lora, "x", 1, "auto").abreast == 1, "one thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert step.share_of(lora, "x", 1, "auto").abreast == abreast
    lora.model.config.rope_parameters = {"rope_type": "longrope"}  # each pass would write the model's rotations
    assert step.share_of(lora, "x", 1, "auto").abreast == 1


def test_passes_side_by_side_have_half_of_the_threads_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "MORE", 9)
    work = job()
    work.share.abreast, work.share.busy = 2, 0
    rows = [work.train[0].tokens] * 2
    seen: list[int] = []
    work.lora.model.base_model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(4)
    try:
        step.careful(work.lora, [(work.share, rows)])
        assert seen == [2, 2] and torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 4, "threads to come have all of them again"
    finally:
        torch.set_num_threads(1)


def test_a_shortage_beside_another_pass_halves_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "MORE", 2)
    plain = values(list(train(job())), "train_loss")
    work = job()
    work.share.abreast, work.share.busy = 2, 0
    longest = max(len(one.tokens.ids) for one in work.train)
    passes = short_of_memory(work, longest)
    events = list(train(work))
    assert values(events, "train_loss") == pytest.approx(plain, rel=1e-4)
    assert [event.code for event in events if isinstance(event, Warned)] == ["W_MEMORY"]
    assert work.share.accumulate == 2 and passes[-1] <= longest


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), ValueError("a mistake of ours")])
def test_what_fails_beside_another_pass_fails_as_it_does_alone(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "MORE", 9)
    work, others = job(), job()
    rows = [work.train[0].tokens] * 4
    work.share.abreast, work.share.busy, others.share.accumulate = 2, 0, 2
    left = [error]

    def fail_once(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread() and left:
            raise left.pop()

    work.lora.model.base_model.register_forward_pre_hook(fail_once)
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="mistake"):
            step.careful(work.lora, [(work.share, rows)])
    else:
        (found,), (alone,) = (step.careful(one.lora, [(one.share, rows)]) for one in (work, others))
        assert float(found) == pytest.approx(float(alone), rel=1e-6)
        assert work.share.accumulate == 2
        for tensor, alike in zip(work.parameters, others.parameters, strict=True):
            assert tensor.grad is not None and alike.grad is not None
            assert torch.allclose(tensor.grad, alike.grad, atol=1e-6)
    assert not left and torch.get_num_threads() == 1
