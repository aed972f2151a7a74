"""The forecast: exact where it can be, and monotone where it cannot."""

import dataclasses
from typing import Any

import pytest

from lora_studio.core import lean
from lora_studio.core.baselines import add, plan
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import BaselineSpec, LoraSpec, Method
from lora_studio.data.batches import Lengths
from lora_studio.estimate import ASSUMED, Estimate, _cut, _filled, _pads, estimate
from lora_studio.measure import packs
from lora_studio.recorded import full
from lora_studio.settings import TrainConfig
from lora_studio.step import Share
from tests.tiny import causal, classifier

CONFIG = TrainConfig(steps=10)
TOP = BaselineSpec(kind="top", width=1)


def forecast(
    config: TrainConfig = CONFIG, spec: Method = LoraSpec(), precision: str = "float32", model: Any = None
) -> Estimate:
    model = model or causal("llama")
    return estimate(model, plan(model, spec), config, precision=precision, device="cpu")


def test_parameters_are_exact_and_parts_add_up_to_the_peak() -> None:
    result = forecast(spec=LoraSpec(rank=4))
    assert result.trainable == 2 * (4 * (32 + 32) + 4 * (32 + 16)) and result.adapter_bytes == 4 * result.trainable
    assert result.total == sum(tensor.numel() for tensor in causal("llama").parameters())
    parts = {name: size for name, size in result.memory_bytes.items() if name != "peak"}
    assert sum(parts.values()) == result.memory_bytes["peak"] and result.memory_bytes["weights"] == 4 * result.total


def test_every_control_moves_the_forecast_the_right_way() -> None:
    base = forecast()

    def more(**changes: object) -> Estimate:
        return forecast(dataclasses.replace(CONFIG, **changes))

    assert more(steps=20).seconds > base.seconds and more(batch_size=16).seconds > base.seconds
    assert more(batch_size=16).memory_bytes["peak"] > base.memory_bytes["peak"]
    assert more(accumulate=4).memory_bytes["peak"] < base.memory_bytes["peak"]
    assert more(evaluations=10).seconds > base.seconds
    assert forecast(spec=LoraSpec(rank=16)).memory_bytes["adapter"] > base.memory_bytes["adapter"]
    upper = forecast(spec=LoraSpec(layers=(1,)))
    assert upper.memory_bytes["activations"] * 2 == pytest.approx(base.memory_bytes["activations"], abs=2)
    assert more(checkpointing="on").memory_bytes["activations"] < base.memory_bytes["activations"]
    every = forecast(spec=LoraSpec(targets=("all-linear",)))
    assert every.memory_bytes["activations"] > base.memory_bytes["activations"]
    assert more(batch_tokens=40).memory_bytes["peak"] < base.memory_bytes["peak"]
    assert forecast(precision="bfloat16").memory_bytes["weights"] * 2 == base.memory_bytes["weights"]


def test_what_a_method_keeps_for_its_backward_moves_the_forecast() -> None:
    def activations(spec: Method) -> int:
        return forecast(spec=spec).memory_bytes["activations"]

    plain = activations(LoraSpec(rank=2))
    assert activations(LoraSpec(rank=2, variant="dora")) > plain > activations(LoraSpec(rank=2, variant="lora-fa"))
    assert activations(LoraSpec(rank=2, variant="lora-fa", dropout=0.1)) > activations(
        LoraSpec(rank=2, variant="lora-fa")
    )
    assert activations(BaselineSpec(kind="adapter_h")) > activations(BaselineSpec(kind="bitfit"))


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        ("llama", LoraSpec()),
        ("gemma2", LoraSpec()),
        ("llama", BaselineSpec(kind="bitfit")),
        ("llama", BaselineSpec(kind="prefix", width=2)),
        ("llama", BaselineSpec(kind="prompt", width=2)),
    ],
)
def test_rows_are_forecast_as_they_are_trained_padded_or_packed(model: str, spec: Method) -> None:
    lora = LoRA(causal(model))
    add(lora, "x", spec)
    packed = packs(lora, ["x"])
    assert _pads(lora.model, plan(lora.model, spec)) != packed
    longer = dataclasses.replace(ASSUMED, max=512)
    config = dataclasses.replace(CONFIG, max_length=1024)
    peaks = [
        estimate(lora.model, plan(lora.model, spec), config, precision="float32", device="cpu", lengths=lengths)
        for lengths in (ASSUMED, longer)
    ]
    assert (peaks[0].memory_bytes == peaks[1].memory_bytes) == packed


def test_a_prefix_that_the_rows_share_is_counted_once_a_pass() -> None:
    plain, model = dataclasses.replace(ASSUMED, shared_prefix=0), causal("llama")
    shared = dataclasses.replace(plain, shared_prefix=100)

    def of(config: TrainConfig, lengths: Lengths) -> Estimate:
        return estimate(model, plan(model, LoraSpec()), config, precision="float32", device="cpu", lengths=lengths)

    alone = dataclasses.replace(CONFIG, batch_size=1)
    assert of(alone, shared).memory_bytes == of(alone, plain).memory_bytes
    few = dataclasses.replace(CONFIG, batch_size=4)  # one pass of them either way
    assert of(few, shared).memory_bytes["activations"] < of(few, plain).memory_bytes["activations"]
    assert of(CONFIG, shared).seconds < of(CONFIG, plain).seconds


def test_passes_that_are_recorded_take_less_memory_where_the_model_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "WIDE", 1)
    monkeypatch.setattr("lora_studio.estimate.matrix_rate", lambda *_: 1e12)
    model, config = causal("llama"), dataclasses.replace(CONFIG, batch_size=64)
    kept, cut = (
        estimate(model, plan(model, LoraSpec()), config, precision="bfloat16", device="cuda", recorded=recorded)
        for recorded in (False, True)
    )
    assert cut.memory_bytes["activations"] < kept.memory_bytes["activations"] / 4


@pytest.mark.parametrize("abreast", [1, 2])
@pytest.mark.parametrize(
    ("rows", "shared", "accumulate", "room", "passes"),
    [(1, 0, 1, 100, 1), (2, 5, 1, 100, 1), (8, 0, 1, 100, 1), (9, 5, 4, 100, 1), (3, 0, 1, 999, 1), (8, 0, 1, 999, 2),
     (8, 5, 1, 999, 2), (8, 5, 2, 999, 2), (8, 5, 8, 999, 1), (8, 30, 1, 999, 1), (16, 0, 1, 300, 2)],
)  # fmt: skip
def test_a_step_is_forecast_as_it_is_cut(
    rows: int, shared: int, accumulate: int, room: int, passes: int, abreast: int
) -> None:
    """Rows of one length. Passes are side by side where rows are many and even enough, and short of a shared prefix."""
    common, length = range(shared), 60
    batch = [lean.Tokens((*common, *range(n, n + length - shared)), [False] * shared + [True] * (length - shared))
             for n in range(100, 100 + rows)]  # fmt: skip
    share = Share(adapter="x", accumulate=accumulate, room=room, shares=True, abreast=abreast, busy=150)
    made = share.rounds(batch)
    lengths = dataclasses.replace(ASSUMED, shared_prefix=lean.shared_prefix(batch))
    cut = _cut(dataclasses.replace(CONFIG, accumulate=accumulate), lengths, room, 150, abreast, rows, length)
    assert cut.passes == min(passes, abreast)
    assert [len(beside) for beside in made] == [cut.passes] * cut.rounds
    sizes = [sum(map(share.size, beside)) for beside in made]
    assert sum(sizes) == pytest.approx(cut.rounds * cut.tokens) and max(sizes) - cut.tokens < length


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("rows", "shared"), [(1, 0), (8, 0), (16, 24), (40, 24), (300, 5)])
@pytest.mark.parametrize("width", [896, 4096])
def test_a_step_of_recorded_passes_is_forecast_as_it_is_cut(
    rows: int, shared: int, accumulate: int, width: int
) -> None:
    marks = [False] * (shared + 1) + [True] * (199 - shared)
    batch = [lean.Tokens((*range(shared), *range(n, n + 200 - shared)), marks) for n in range(1000, 1000 + rows)]
    share = Share(adapter="x", accumulate=accumulate, room=2048, shares=True, width=width)
    made = [part for passes in share.rounds(batch) for part in passes]
    lengths = dataclasses.replace(ASSUMED, shared_prefix=lean.shared_prefix(batch))
    step = _filled(dataclasses.replace(CONFIG, accumulate=accumulate), lengths, 2048, width, rows, 200)
    sizes = [full(share.size(part), width) for part in made]
    assert step.rounds == len(made) and step.passes == 1
    assert step.tokens == pytest.approx(max(sizes), rel=0.15) and step.in_all == pytest.approx(sum(sizes), rel=0.15)
    again = max(sum(len(one.ids) for one in part) - share.size(part) for part in made)
    assert again - shared <= step.again <= again + shared


@pytest.mark.parametrize("kind", ["full", "top", "bitfit", "adapter_h", "adapter_p", "adapter_l", "prefix", "prompt"])
def test_another_method_counts_what_it_trains(kind: str) -> None:
    model, method = causal("llama"), BaselineSpec(kind=kind, width=1 if kind == "top" else 0)
    result = forecast(spec=method)
    assert result.trainable == sum(piece.parameters for piece in plan(model, method)) > 0
    assert result.memory_bytes["adapter"] == 16 * result.trainable


def test_full_fine_tuning_holds_the_base_and_a_trained_copy_and_nothing_passes_below_the_top_block() -> None:
    full, top, lora = (forecast(spec=spec) for spec in (BaselineSpec(kind="full"), TOP, LoraSpec()))
    assert full.trainable == full.total and full.memory_bytes["weights"] == 4 * full.total
    assert full.seconds > lora.seconds > top.seconds
    half, whole = (one.memory_bytes["activations"] for one in (top, full))
    assert 2 * half == pytest.approx(whole, abs=2) and lora.memory_bytes["activations"] < whole


def test_a_classifier_has_no_vocabulary_head_and_its_own_head_lies_above_the_blocks() -> None:
    model, trained = classifier("bert"), dataclasses.replace(TOP, modules_to_save=("classifier",))
    result = forecast(spec=trained, model=model)
    assert result.memory_bytes["head"] == 0
    head = sum(tensor.numel() for tensor in model.classifier.parameters())
    assert result.trainable == forecast(spec=TOP, model=model).trainable + head
    assert result.memory_bytes["activations"] == forecast(spec=TOP, model=model).memory_bytes["activations"]


def test_packed_weights_take_less_room() -> None:
    sizes = [forecast(precision=precision).memory_bytes["weights"] for precision in ("bfloat16", "int8", "nf4")]
    assert sizes[0] > sizes[1] > sizes[2]


def test_steps_that_are_cut_and_steps_that_are_not_are_forecast_as_the_fullest_in_between() -> None:
    model, room = causal("llama"), 2048
    data = dataclasses.replace(ASSUMED, p95=256, max=256, shared_prefix=0)  # rows of 128 and of up to 256 tokens

    def activations(batch: int) -> int:
        config = dataclasses.replace(CONFIG, batch_size=batch)
        pieces = plan(model, LoraSpec())
        found = estimate(model, pieces, config, precision="float32", device="cpu", lengths=data)
        return found.memory_bytes["activations"]

    a_token = activations(1) / 192
    assert activations(8) == pytest.approx(8 * 192 * a_token, rel=1e-3)  # all are one pass
    for batch in (14, 18):  # 896 to 2,688 and 1,152 to 3,456
        assert activations(batch) == pytest.approx(room * a_token, rel=1e-3)
