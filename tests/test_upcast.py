"""On a CPU without bfloat16 products a bfloat16 model multiplies in fp32, and what it says stays the same."""

from collections.abc import Iterator
from statistics import median
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from lora_studio import models
from lora_studio.core import lean, upcast
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.generate import stream
from lora_studio.measure import losses
from lora_studio.settings import Sampling
from tests.tiny import CAUSAL, causal

ROWS = [lean.Tokens(range(2, 2 + length), [place > 1 for place in range(length)]) for length in (9, 5, 12)]
# one has softmax attention of its own in plain products, one takes torch's attention outside the packed path
OWN_ATTENTION = {"gemma2", "stablelm"}


@pytest.fixture(autouse=True)
def without_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every machine is one of those here."""
    monkeypatch.setattr(upcast, "multiplies_bfloat16", lambda: False)
    yield


class Narrow(TorchDispatchMode):
    """Notes the matrix products and attentions of more than one row that are made in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        product = any(word in name for word in ("mm", "linear", "attention"))
        if product and any(one.dtype == torch.bfloat16 for one in tensors) and tensors[0].shape[0] > 1:
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


def test_nor_does_one_of_several_adapters_or_another_variant() -> None:
    for variant in ("dora", "lora-fa", "pissa"):
        lora = adapted("llama", LoraSpec(rank=3, targets=("attn.q", "mlp.down"), variant=variant, dropout=0.1))
        with Narrow() as narrow:
            gradients(lora)
        assert not narrow.seen, variant
    lora = adapted("llama")
    gradients(lora)  # its frugal forms are found with one adapter in use
    with Narrow() as narrow, lora.use_spans({"x": 9, "y": 17}):
        losses(lora, ROWS).sum().backward()
    assert not narrow.seen


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_it_is_the_bfloat16_model_that_learns(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are as near to those of fp32 on the same rounded weights as torch's own bfloat16 comes."""
    ours, wide = gradients(adapted(family)), adapted(family)
    wide.model.float()
    exact = gradients(wide)
    monkeypatch.setattr(upcast, "multiplies_bfloat16", lambda: True)
    theirs = gradients(adapted(family))
    assert ours[0] == pytest.approx(exact[0], rel=2e-3)
    assert apart(ours[1], exact[1]) < 1.5 * apart(theirs[1], exact[1])


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


def test_answering_and_training_take_turns() -> None:
    lora = adapted("qwen2")
    for _ in range(2):  # what was made while answering is written to while training
        list(stream(lora.model, [[3, 4, 5], [6, 7, 8]], Sampling(max_new_tokens=4, temperature=0), frozenset()))
        gradients(lora)


def test_layers_of_other_kinds_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(torch.nn.Linear):
        pass

    layers = torch.nn.Sequential(Own(4, 4).bfloat16(), torch.nn.Linear(4, 4))
    upcast.apply(layers)
    assert [type(one) for one in layers] == [Own, torch.nn.Linear]
    monkeypatch.setattr(upcast, "multiplies_bfloat16", lambda: True)
    narrow = torch.nn.Sequential(torch.nn.Linear(4, 4).bfloat16())
    upcast.apply(narrow)
    assert type(narrow[0]) is torch.nn.Linear


def test_weights_that_would_crowd_the_memory_are_held_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    total = models.psutil.virtual_memory().total
    third = int(total * models.CROWDED / 4)  # parameters
    assert models.training_precision("cpu", third - 1) == "float32"
    assert models.training_precision("cpu", third + 1) == "bfloat16"
    monkeypatch.setattr(upcast, "multiplies_bfloat16", lambda: True)
    assert models.training_precision("cpu", 1) == "bfloat16"
