"""The run doctor on curves as they really look: silent on every sound one, and right about the sick ones."""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

import pytest

from lora_studio.doctor import Doctor, remedy
from lora_studio.events import Event, Metric, Started, Warned, from_line, to_line
from lora_studio.fields import build
from lora_studio.settings import TrainConfig

USUAL = 5e-3
CONFIG = TrainConfig()
SEEDS = range(60)
LENGTHS = (12, 25, 60, 400)
# The default run on the starter model and the sample orders, as it was measured.
REAL_LOSS = [1.969, 2.124, 1.499, 1.308, 0.814, 0.57, 0.462, 0.238, 0.175, 0.127, 0.25, 0.116, 0.126, 0.133, 0.11]
REAL_LOSS += [0.088, 0.109, 0.148, 0.083, 0.086, 0.131, 0.075, 0.105, 0.087, 0.105]
REAL_NORM = [0.95, 0.84, 0.73, 1.96, 0.97, 0.69, 0.56, 0.5, 0.36, 0.34, 0.64, 0.36, 0.53, 0.28, 0.34]
REAL_NORM += [0.32, 0.44, 0.52, 0.4, 0.3, 0.41, 0.33, 0.31, 0.38, 0.26]
REAL_HELDOUT = {0: 2.003, 9: 0.1571, 17: 0.0861, 25: 0.0726}

Curve = Callable[[int], float]


def started(steps: int, *, after: int = 0, heldout: bool = True) -> Started:
    sizes = {"trainable": 1, "total": 2, "train_rows": 9, "heldout_rows": int(heldout)}
    return Started(steps=steps, device="cpu", precision="float32", step=after, **sizes)


def journal(
    steps: int, loss: Curve, norm: Curve, heldout: Curve | None, *, evaluations: int = 3, accuracy: Curve | None = None
) -> list[Event]:
    """What train() would yield for these curves."""
    at = {math.ceil(steps * part / evaluations) for part in range(evaluations + 1)}
    events: list[Event] = [started(steps, heldout=heldout is not None)]
    for step in range(steps + 1):
        if step:
            events.append(Metric(step=step, values={"train_loss": loss(step), "grad_norm": norm(step)}))
        if step in at and heldout:
            right = {"accuracy": accuracy(step)} if accuracy else {}
            events.append(Metric(step=step, values={"heldout_loss": heldout(step), **right}))
    return events


def found(events: Iterable[Event], config: TrainConfig = CONFIG, usual: float = USUAL) -> list[Warned]:
    """All findings; each one's change makes settings that validate and differ, and each is said once."""
    doctor = Doctor(config, usual)
    findings = [finding for event in events for finding in doctor.see(event)]
    for finding in findings:
        assert finding.message and finding.hint
        if finding.change:
            assert build(TrainConfig, {**asdict(config), **finding.change}) != config
    assert len({finding.code for finding in findings}) == len(findings)
    return findings


def noisy(curve: Curve, seed: int, share: float = 0.15) -> Curve:
    draw = random.Random(seed)
    return lambda step: curve(step) * math.exp(draw.gauss(0, share))


def falling(steps: int, floor: float, start: float = 2.0, rate: float = 5.0) -> Curve:
    return lambda step: floor + (start - floor) * math.exp(-rate * step / steps)


def level(value: float) -> Curve:
    return lambda step: value


def test_the_default_run_is_sound() -> None:
    assert (
        found(journal(25, lambda step: REAL_LOSS[step - 1], lambda s: REAL_NORM[s - 1], REAL_HELDOUT.__getitem__)) == []
    )


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("floor", [0.02, 0.5, 1.8])  # learnt by heart, learnt, and a tenth better
@pytest.mark.parametrize("heldout", [True, False])
def test_a_noisy_fall_is_sound(steps: int, floor: float, heldout: bool) -> None:
    for seed in SEEDS:
        measured = noisy(falling(steps, floor), seed + 1, 0.02) if heldout else None
        norm = noisy(falling(steps, 0.05, 1.0), seed + 2, 0.5)  # falls twentyfold, with hard rows now and then
        events = journal(steps, noisy(falling(steps, floor), seed), norm, measured, evaluations=min(10, steps // 3))
        assert found(events) == [], seed


@pytest.mark.parametrize("steps", LENGTHS)
def test_a_slow_fall_and_a_level_end_are_sound(steps: int) -> None:
    for seed in SEEDS:
        slow = falling(steps, 1.9, rate=2.0)
        assert found(journal(steps, noisy(slow, seed), noisy(level(1.0), seed), slow)) == [], seed
        soon = falling(steps, 0.1, rate=30.0)  # learnt in the first tenth of the run
        measured = noisy(soon, seed, 0.1)
        assert found(journal(steps, noisy(soon, seed), noisy(level(0.3), seed, 0.6), measured, evaluations=8)) == [], (
            seed
        )


def test_rows_that_the_model_knows_already_are_no_fault() -> None:
    assert found(journal(60, level(0.01), level(0.02), level(0.012))) == []


def test_too_short_to_judge() -> None:
    assert found(journal(9, level(2.0), level(1.0), level(2.0))) == []


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("rate", [1e-7, 1e-5, 5e-4])
def test_a_tiny_learning_rate_is_named_and_cured(steps: int, rate: float) -> None:
    config = replace(CONFIG, learning_rate=rate)
    missed = 0
    for seed in SEEDS:
        barely = falling(steps, 1.99)
        findings = found(journal(steps, noisy(barely, seed), noisy(level(1.0), seed), barely), config)
        missed += not findings
        for finding in findings:
            assert finding.code == "W_FLAT" and "far below" in finding.message
            assert finding.change == {"learning_rate": USUAL} and steps / 2 <= finding.step <= steps
    assert missed <= len(SEEDS) / 20  # batches may look like a fall by chance


def test_flat_at_other_rates() -> None:
    def change(rate: float, usual: float = USUAL) -> object:
        config = replace(CONFIG, learning_rate=rate)
        (finding,) = found(journal(60, noisy(level(2.0), 1), level(1.0), level(2.0)), config, usual)
        assert finding.code == "W_FLAT"
        return finding.change

    assert change(0.5) == {"learning_rate": 5e-3}  # far too high: back to what is usual
    assert change(5e-3) == {"learning_rate": 0.01}  # usual: twice that, which train() does not warn about
    assert change(9e-3) == {}  # not far from that: no setting cures it
    assert change(5e-3, usual=1.84e-3) == {"learning_rate": 1e-3}  # one digit, never above the usual


def test_without_held_out_rows_only_an_exact_curve_is_called_flat() -> None:
    exact = journal(60, noisy(level(2.0), 0, 0.01), level(1.0), None)
    assert [finding.code for finding in found(exact)] == ["W_FLAT"]
    assert found(journal(25, noisy(level(2.0), 0, 0.4), level(1.0), None)) == []


@pytest.mark.parametrize("steps", LENGTHS)
def test_exploding_norms_are_told_from_hard_rows(steps: int) -> None:
    for seed in SEEDS:
        bad = 2 * steps // 3

        def norm(step: int, bad: int = bad) -> float:
            return 0.8 if step < bad else 0.8 * 5 ** (step - bad + 1)

        def loss(step: int, bad: int = bad) -> float:
            return 2.0 - 0.8 * step / bad if step < bad else 1.2 + 0.4 * (step - bad)

        events = journal(steps, noisy(loss, seed, 0.05), noisy(norm, seed, 0.3), None)
        findings = found(events)
        if steps > 12:
            assert [finding.code for finding in findings] == ["W_EXPLODING"], seed
            assert findings[0].change == {"learning_rate": 5e-4} and findings[0].step >= bad
        rare = journal(steps, noisy(level(1.2), seed, 0.05), lambda s: 30.0 if s % 6 == 5 else 0.8, falling(steps, 1.0))
        assert found(rare) == [], seed  # one row in six is hard: clipped, and harmless


def test_a_loss_that_leaves_its_start_is_exploding_whatever_the_norm() -> None:
    away = journal(40, noisy(lambda step: 2.0 if step < 9 else 7.5, 3, 0.1), level(0.9), level(7.5))
    (finding,) = found(away, replace(CONFIG, learning_rate=0.3))
    assert finding.code == "W_EXPLODING" and finding.change == {"learning_rate": USUAL}
    tiny = journal(40, noisy(level(0.02), 3, 0.9), level(0.01), level(0.02))  # learnt by heart, heavy tails
    assert found(tiny) == []


@pytest.mark.parametrize("evaluations", [3, 10, 40])
def test_memorising_is_found_and_the_best_step_is_the_cure(evaluations: int) -> None:
    steps, best = 120, 40
    for seed in SEEDS:
        heldout = noisy(lambda step: 1.0 + (step - best) ** 2 / best**2, seed, 0.005)
        learnt = falling(steps, 0.01, rate=8.0)
        (finding,) = found(journal(steps, noisy(learnt, seed), level(0.5), heldout, evaluations=evaluations))
        assert finding.code == "W_RISING" and abs(finding.change["steps"] - best) <= 9 and finding.step > best
        assert f"step {finding.change['steps']}" in finding.message


def test_memorising_from_the_first_step_wants_a_lower_rate() -> None:
    events = journal(60, falling(60, 0.1), level(0.5), lambda step: 2.0 + step / 30)
    (finding,) = found(events)
    assert finding.code == "W_RISING" and finding.change == {"learning_rate": 1e-3}


def test_what_looks_like_memorising_and_is_not() -> None:
    bowl: Curve = lambda step: 1.0 + (step - 20) ** 2 / 400  # noqa: E731
    assert found(journal(60, level(1.0), level(0.5), bowl)) == []  # the training loss does not fall along
    jitter = {0: 2.0, 10: 0.0245, 20: 0.0262, 30: 0.0263}  # 7 % worse, and nothing of what was gained is lost
    assert found(journal(30, falling(30, 0.01), level(0.1), jitter.__getitem__)) == []
    surer = journal(60, falling(60, 0.01), level(0.5), bowl, accuracy=lambda step: 0.5 + step / 200)
    assert found(surer) == []  # more labels are right than before


def test_a_resumed_attempt_is_not_measured_by_a_beginning_it_has_not_seen() -> None:
    whole = journal(200, level(0.5), level(0.3), level(0.5))
    rest = [event for event in whole if event.step > 100]
    assert [finding.code for finding in found(whole)] == ["W_FLAT"]
    assert found([started(200, after=100), *rest]) == []
    doctor = Doctor(CONFIG, USUAL)
    lines = [from_line(to_line(event, time=0.0, attempt=1)) for event in whole if event.step <= 100]
    doctor.recall(filter(None, lines))  # with it, as if there had been no break
    told = [finding for event in [started(200, after=100), *rest] for finding in doctor.see(event)]
    assert told == found(whole)


def test_what_was_found_before_a_break_is_not_found_again() -> None:
    whole = journal(200, level(0.5), level(0.3), level(0.5))
    doctor = Doctor(CONFIG, USUAL)
    lines = [from_line(to_line(event, time=0.0, attempt=1)) for event in [*whole, *found(whole)]]
    doctor.recall(filter(None, lines))
    assert [finding for event in whole for finding in doctor.see(event)] == []


def test_its_own_findings_and_figures_that_are_no_numbers_do_not_disturb_it() -> None:
    doctor = Doctor(replace(CONFIG, learning_rate=1e-6), USUAL)
    said = []
    for event in journal(25, level(2.0), level(1.0), level(2.0)):
        for finding in doctor.see(event):
            said.append(finding.code)
            assert list(doctor.see(finding)) == []
        assert list(doctor.see(Metric(step=event.step, values={"train_loss": math.nan, "grad_norm": math.inf}))) == []
    assert said == ["W_FLAT"]


@pytest.mark.parametrize(
    ("code", "given", "change"),
    [
        ("E_NOT_FINITE", {}, {"learning_rate": 5e-4}),
        ("E_NOT_FINITE", {"learning_rate": 1e-7}, {}),
        ("E_NO_UPDATE", {"learning_rate": 1e-6}, {"learning_rate": 1e-5}),
        ("E_NO_UPDATE", {"learning_rate": 1.0}, {}),
        ("E_NO_TARGET", {"max_length": 64}, {"max_length": 128}),
        ("E_NO_TARGET", {"max_length": 131_072}, {}),
        ("E_MEMORY", {"checkpointing": "off"}, {"checkpointing": "auto"}),
        ("E_MEMORY", {"batch_tokens": 4096}, {"batch_tokens": 2048}),
        ("E_MEMORY", {"batch_size": 32}, {"accumulate": 32}),
        ("E_MEMORY", {"batch_size": 8}, {"max_length": 256}),
        ("E_MEMORY", {"batch_size": 1, "max_length": 8}, {}),
        ("E_CRASH", {}, {}),
    ],
)
def test_remedies_validate(code: str, given: dict, change: dict) -> None:
    config = replace(CONFIG, **given)
    assert remedy(code, config) == change
    build(TrainConfig, {**asdict(config), **change})
