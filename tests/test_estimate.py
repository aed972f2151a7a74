"""The forecast: exact where it can be, and monotone where it cannot."""

import dataclasses

from lora_studio.core.lora import plan
from lora_studio.core.spec import LoraSpec
from lora_studio.estimate import Estimate, estimate
from lora_studio.settings import TrainConfig
from tests.tiny import causal

CONFIG = TrainConfig(steps=10)


def forecast(config: TrainConfig = CONFIG, spec: LoraSpec = LoraSpec(), precision: str = "float32") -> Estimate:
    model = causal("llama")
    return estimate(model, plan(model, spec), spec.rank, config, precision=precision, device="cpu")


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
    assert forecast(spec=LoraSpec(rank=64)).memory_bytes["adapter"] > base.memory_bytes["adapter"]
    upper = forecast(spec=LoraSpec(layers=(1,)))
    assert upper.memory_bytes["activations"] * 2 == base.memory_bytes["activations"]
    assert forecast(precision="bfloat16").memory_bytes["weights"] * 2 == base.memory_bytes["weights"]
