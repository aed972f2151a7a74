"""knob(): validation and building from JSON say the setting's name and what is wanted."""

import dataclasses
import json
import math

import pytest

from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError
from lora_studio.fields import build, check, knob, knobs
from lora_studio.runs.config import DataChoice, RunConfig
from lora_studio.settings import Sampling, TrainConfig


@pytest.mark.parametrize("rank", [0, -1, 1.5, "8", 10**9, math.nan, None, True])
def test_a_rank_that_is_no_rank_is_refused_by_name(rank: object) -> None:
    with pytest.raises(StudioError, match="Rank is") as caught:
        check(LoraSpec(rank=rank))  # type: ignore[arg-type]
    assert caught.value.code == "E_CONFIG" and "between 1 and 1024" in caught.value.hint


@dataclasses.dataclass(frozen=True)
class Named:
    name: str = knob("", max=5, label="Name", help="Short")


def test_a_text_may_be_as_long_as_its_knob_says() -> None:
    assert build(Named, {"name": "12345"}).name == "12345"
    with pytest.raises(StudioError, match="6 characters") as caught:
        build(Named, {"name": "123456"})
    assert caught.value.code == "E_CONFIG" and caught.value.hint == "Give at most 5."


def test_a_whole_number_too_large_for_a_float_is_refused_by_name() -> None:
    with pytest.raises(StudioError, match="Learning rate is 1000") as caught:
        build(TrainConfig, {"learning_rate": 10**400})
    assert caught.value.code == "E_CONFIG"


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"steps": -1},
        {"batch_size": 0},
        {"holdout": 0.9},
        {"seed": -1},
        {"precision": "float8"},
        {"schedule": ""},
        {"max_length": 1},
    ],
)
def test_training_settings_outside_their_bounds_are_refused(wrong: dict) -> None:
    with pytest.raises(StudioError) as caught:
        check(TrainConfig(**wrong))
    assert caught.value.code == "E_CONFIG" and caught.value.hint


def test_every_knob_explains_itself_and_has_a_valid_default() -> None:
    for config in (LoraSpec, TrainConfig, Sampling):
        check(config())
        for setting in knobs(config).values():
            assert setting.label and setting.help and setting.default is not dataclasses.MISSING


def test_a_run_config_comes_back_from_its_json() -> None:
    config = RunConfig(
        name="n",
        dataset=DataChoice(id="0" * 32, columns={"prompt": "q"}),
        method=LoraSpec(rank=4, targets=("attn.q", "mlp.up"), layers=(0, 2)),
        train=TrainConfig(steps=3, learning_rate=1),
    )
    again = build(RunConfig, json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and isinstance(again.method, LoraSpec) and again.method.layers == (0, 2)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(StudioError, match="'ranks'"):
        build(LoraSpec, {"ranks": 8})
