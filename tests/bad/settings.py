"""Settings that no run may have, given through the same door as any others."""

import inspect
from dataclasses import replace
from typing import Any

import pytest

from lora_studio.core.spec import LoraSpec
from lora_studio.models import check_quantising
from lora_studio.studio import Studio
from tests.bad.bench import CASES, Bad, Bench, bad, every
from tests.tiny import causal

WRONG: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "C01": [("spec", {"rank": value}) for value in (0, -1, 1.5, "8", 10**9, float("nan"), True)],
    "C03": [("spec", {"alpha": value}) for value in (0, -1, float("inf"))],
    "C04": [("spec", {"dropout": value}) for value in (1.0, 1.5, -0.1)],
    "C05": [("train", {"learning_rate": value}) for value in (0, -1, float("nan"), float("inf"), 1e9)],
    "C09": [("train", {"steps": 0, "epochs": 0.0})],
    "C12": [("train", {"max_length": 0})],
    "C15": [("train", {"warmup": 1.5})],
    "C16": [("train", {"save_every": -1})],
    "C17": [("train", {"seed": value}) for value in (-1, 2**64)],
    "C19": [("train", {"stepps": 3}), ("spec", {"lora_rank": 8})],
    "C21": [("train", {"metric": "bleu"})],
    "C22": [("train", {"batch_size": 10**7}), ("train", {"schedule": "wavy"}), ("train", {"steps": None})],
}
for _number, _settings in WRONG.items():
    for _part, _values in _settings:
        CASES.append(
            Bad(_number, f"{_values}"[:60], "E_CONFIG", lambda b, part=_part, values=_values: b.start(**{part: values}))
        )
bad("C02", "a rank above the matrix", "E_RANK")(lambda b: b.start(spec={"rank": 33}))
every(
    "C06",
    "E_TARGETS",
    {
        "a name that is not there": lambda b: b.start(spec={"targets": ["attn.qq"]}),
        "none": lambda b: b.start(spec={"targets": []}),
    },
)
every(
    "C07",
    "E_TARGETS",
    {name: lambda b, name=name: b.start(spec={"targets": [name]}) for name in ("lm_head", "model.norm", "norm")},
)
bad("C07", "the embedding", "ok")(lambda b: b.start(spec={"rank": 2, "targets": ["embed"]}))
bad("C08", "a regular expression", "E_TARGETS")(lambda b: b.start(spec={"targets": ["(.*)+$"]}))
bad("C10", "a batch larger than the data", "ok")(lambda b: b.start({"batch_size": 1024}))
bad("C11", "more passes than examples", "ok")(lambda b: b.start({"accumulate": 1024}))
bad("C12", "longer than the model reads", "E_CONTEXT")(lambda b: b.start({"max_length": 100_000}))
bad("C13", "bfloat16 on a CPU", "ok")(lambda b: b.start({"precision": "bfloat16"}))
bad("C13", "float16", "E_CONFIG")(lambda b: b.start({"precision": "float16"}))
bad("C14", "4 bits without a GPU", "E_QUANTISED")(lambda b: check_quantising(causal("llama"), "nf4", "cpu"))
bad("C16", "a checkpoint after the last step", "ok")(lambda b: b.start({"save_every": 1_000_000}))
bad("C18", "a name of 10,000 characters", "E_CONFIG")(lambda b: b.start(name="x" * 10_000))
every(
    "C18",
    "ok",
    {
        repr(name): lambda b, name=name: b.start(name=name)
        for name in ("", "👩‍👩‍👧", "<img src=x onerror=alert(1)>", "../x")
    },
)


@bad("C18", "a name twice", "ok")
def name_twice(bench: Bench) -> None:
    studio, config = bench.studio()
    first, second = (studio.start(replace(config, name="same")) for _ in range(2))
    assert first.id != second.id


@bad("C20", "another rank at a resume", "ok")
def nothing_to_change(bench: Bench) -> None:
    """A run's settings are written once and resume takes none: there is nothing to mismatch."""
    assert list(inspect.signature(Studio.resume).parameters) == ["self", "run"]
    studio, config = bench.studio()
    with pytest.raises(AttributeError):
        studio.start(config).config.method = LoraSpec(rank=4)  # type: ignore[misc]
