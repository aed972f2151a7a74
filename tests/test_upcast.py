"""On a CPU without bfloat16 products a bfloat16 model multiplies in fp32, and what it says stays the same."""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lora_studio import estimate, models, ram
from lora_studio.core import baselines, lean, upcast
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import BaselineSpec, LoraSpec
from lora_studio.generate import stream
from lora_studio.measure import losses, losses_together
from lora_studio.settings import Sampling, TrainConfig
from tests.tiny import CAUSAL, causal

ROWS = [lean.Tokens(range(2, 2 + length), [place > 1 for place in range(length)]) for length in (9, 5, 12)]
# one has softmax attention of its own in plain products, one takes torch's attention outside the packed path
OWN_ATTENTION = {"gemma2", "stablelm"}


@pytest.fixture(autouse=True)
def without_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every machine is one of those here."""
    monkeypatch.setattr(upcast, "lacks_bfloat16", lambda: True)
    yield


class Narrow(TorchDispatchMode):
    """Notes the attentions, and the matrix products of more than one row, that are made in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        attention = "attention" in name
        product = attention or (any(word in name for word in ("mm", "linear")) and tensors[0].shape[0] > 1)
        if product and any(one.dtype == torch.bfloat16 for one in tensors):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def adapted(family: str, spec: LoraSpec = LoraSpec(rank=3, targets=("all-linear",))) -> LoRA:
    model = causal(family).bfloat16()
    upcast.apply(model)
    lora = LoRA(model)
    for seed, name in enumerate(("x", "y")):
        lora.add(name, spec)
        draws = torch.Generator().manual_seed(seed)
        for tensor in lora.parameters(name):
            tensor.data.normal_(0, 0.2, generator=draws)
    return lora


def gradients(lora: LoRA) -> tuple[float, list[torch.Tensor]]:
    lora.model.train()
    with lora.use("x"):
        loss = losses(lora, ROWS).sum()
        loss.backward()
    return float(loss.detach()), [tensor.grad.float() for tensor in lora.parameters("x")]


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_no_pass_of_training_multiplies_in_bfloat16(family: str) -> None:
    lora = adapted(family)
    with Narrow() as narrow:
        gradients(lora)
    assert bool(narrow.seen) == (family in OWN_ATTENTION), narrow.seen


def test_nor_does_another_method_or_one_of_several_adapters() -> None:
    for kind in ("adapter_h", "adapter_p"):
        lora = adapted("llama")
        baselines.add(lora, "narrow", BaselineSpec(kind=kind, width=4))
        with Narrow() as narrow, lora.use("narrow"):
            losses(lora, ROWS).sum().backward()
        assert not narrow.seen, kind
    for variant in ("dora", "lora-fa", "pissa"):
        lora = adapted("llama", LoraSpec(rank=3, targets=("attn.q", "mlp.down"), variant=variant, dropout=0.1))
        with Narrow() as narrow:
            gradients(lora)
        assert not narrow.seen, variant
    lora = adapted("llama")
    gradients(lora)  # its frugal forms are found with one adapter in use
    with Narrow() as narrow:
        torch.cat(losses_together(lora, {"x": ROWS[:1], "y": ROWS[1:]})).sum().backward()
    assert not narrow.seen


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_it_is_the_bfloat16_model_that_learns(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are as near to those of fp32 on the same rounded weights as torch's own bfloat16 comes."""
    ours, wide = gradients(adapted(family)), adapted(family)
    wide.model.float()
    exact = gradients(wide)
    monkeypatch.setattr(upcast, "lacks_bfloat16", lambda: False)
    theirs = gradients(adapted(family))
    assert ours[0] == pytest.approx(exact[0], rel=2e-3)
    assert apart(ours[1], exact[1]) < 2 * apart(theirs[1], exact[1])


def apart(some: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The usual relative error of a tensor: these models' first norms make much of the rounding in front of them."""
    return median(float((one - other).norm() / other.norm()) for one, other in zip(some, exact, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_pieces_make_up_the_whole(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 20, generator=draws).bfloat16()
    weight = weight.T.contiguous().T if transposed else weight
    monkeypatch.setattr(upcast, "PIECE", 100)  # five rows, seven times, and two
    for rows in (1, 3, upcast.FEW + 1):
        x, back = torch.randn(rows, 20, generator=draws), torch.randn(rows, 37, generator=draws)
        torch.testing.assert_close(upcast.times_transposed(x, weight), x @ weight.float().T)
        torch.testing.assert_close(upcast.times(back, weight), back @ weight.float())
        into = torch.empty(rows, 37)
        assert upcast.times_transposed(x, weight, out=into) is into
        torch.testing.assert_close(into, x @ weight.float().T)


def test_a_product_keeps_nothing_but_the_weight() -> None:
    layer = torch.nn.Linear(16, 24).bfloat16().requires_grad_(False)
    upcast.apply(torch.nn.Sequential(layer))
    kept = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor.data_ptr()), tensor)[1], lambda tensor: tensor):
        layer(torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert set(kept) == {layer.weight.data_ptr()}


def test_a_layer_that_is_trained_itself_gets_its_gradient() -> None:
    layer = torch.nn.Linear(16, 24).bfloat16()
    upcast.apply(torch.nn.Sequential(layer))
    x = torch.randn(4, 16).bfloat16()
    layer(x).float().sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.float().sum(0).expand(24, 16).bfloat16(), rtol=1e-2, atol=1e-2)


def test_what_is_made_while_answering_is_written_to_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upcast, "_buffers", threading.local())
    lora = adapted("qwen2")
    list(stream(lora.model, [[3, 4, 5], [6, 7, 8]], Sampling(max_new_tokens=4, temperature=0), frozenset()))
    assert upcast._buffers.tensor is not None
    gradients(lora)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
def test_a_layer_rounds_once_whatever_the_number_of_rows(kind: type, bias: bool) -> None:
    torch.manual_seed(0)
    layer = (torch.nn.Linear(16, 24, bias) if kind is torch.nn.Linear else Conv1D(24, 16)).bfloat16()
    if bias:
        torch.nn.init.normal_(layer.bias)
    layer.requires_grad_(False)
    upcast.apply(torch.nn.Sequential(layer))
    wide = copy.deepcopy(layer).float()
    for rows in (0, 1, upcast.SINGLE, upcast.SINGLE + 1, upcast.FEW + 1):
        x = torch.randn(2, rows, 16).bfloat16().requires_grad_()
        y = layer(x)
        exact = wide(x.float())
        torch.testing.assert_close(y, exact.bfloat16(), rtol=0.01, atol=1e-6)  # a last bit may be rounded the other way
        if rows:
            (ours,) = torch.autograd.grad(y.sum(), x)
            (theirs,) = torch.autograd.grad(exact.sum(), x)
            torch.testing.assert_close(ours, theirs, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("kind", ["bitfit", "top"])
def test_copies_that_stand_in_answer_without_being_trained(kind: str) -> None:
    lora = adapted("llama")
    baselines.add(lora, "own", BaselineSpec(kind=kind, width=1))
    with Narrow() as narrow, lora.use("own"), torch.inference_mode():
        lora.model(torch.arange(2, 14)[None], use_cache=False)
    assert all("attention" in name for name in narrow.seen), narrow.seen


def test_a_model_is_loaded_so(tiny: Path, tmp_path: Path) -> None:
    model = models.ModelLibrary(tmp_path).load(str(tiny), precision="bfloat16", on="cpu")
    kinds = {type(layer) for layer in model.modules()}
    assert upcast.UpcastLinear in kinds and torch.nn.Linear not in kinds


def test_the_forecast_goes_by_the_products_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(estimate, "matrix_rate", lambda precision, device: asked.append(precision) or 1e9)
    model, spec = causal("llama"), LoraSpec(rank=2)
    for lacking in (True, False):
        monkeypatch.setattr(upcast, "lacks_bfloat16", lambda lacking=lacking: lacking)
        estimate.estimate(model, baselines.plan(model, spec), TrainConfig(), precision="bfloat16", device="cpu")
    assert asked == ["float32", "bfloat16"]


def test_layers_of_other_kinds_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(torch.nn.Linear):
        pass

    layers = torch.nn.Sequential(Own(4, 4).bfloat16(), torch.nn.Linear(4, 4))
    upcast.apply(layers)
    assert [type(one) for one in layers] == [Own, torch.nn.Linear]
    monkeypatch.setattr(upcast, "lacks_bfloat16", lambda: False)
    narrow = torch.nn.Sequential(torch.nn.Linear(4, 4).bfloat16())
    upcast.apply(narrow)
    assert type(narrow[0]) is torch.nn.Linear


def test_weights_that_would_crowd_the_memory_are_held_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "total", lambda: 12_000)
    monkeypatch.setattr(upcast, "multiplies_bfloat16", lambda: False)
    assert models.training_precision("cpu", 1000) == "float32"
    assert models.training_precision("cpu", 1001) == "bfloat16"
    assert models.inference_precision("cpu", 1001) == "float32"  # it is small all the same
    monkeypatch.setattr(upcast, "multiplies_bfloat16", lambda: True)
    assert models.training_precision("cpu", 1) == "bfloat16"
