"""Layers that read the same input compute as one: the same numbers, in fewer products, and nothing left behind.

A GPU does so; here a CPU is told to.
"""

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_studio.core import together
from lora_studio.core.baselines import add
from lora_studio.core.lean import Tokens, frugal, recomputing
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import BaselineSpec, LoraSpec
from lora_studio.measure import leanly, losses, losses_together
from tests.tiny import CAUSAL, causal, touched

aten = torch.ops.aten
QV, ALL = ("attn.q", "attn.v"), ("all-linear",)
JOINED = {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "stablelm"}  # of tests/tiny.py


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        together, "can_join", lambda weight: not weight.requires_grad and type(weight) is torch.nn.Parameter
    )


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Inside, each layer computes for itself."""

    @contextlib.contextmanager
    def inside() -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(together.Group, "_work", lambda self, x: None)
            yield

    return inside


class Products(TorchDispatchMode):
    """Inside, counts matrix products, and sums of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.sums = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (aten.mm.default, aten.mm.out, aten.addmm.default, aten.addmm_.default)
        self.sums += func in (aten.add.Tensor, aten.add_.Tensor)
        return func(*args, **(kwargs or {}))


def rows(seed: int = 0) -> list[Tokens]:
    draws = torch.Generator().manual_seed(seed)
    every = [torch.randint(3, 90, (length,), generator=draws).tolist() for length in (9, 4, 9, 12)]
    return [Tokens(ids, [place > 2 for place in range(len(ids))]) for ids in every]


def adapted(family: str, spec: LoraSpec, dtype: torch.dtype = torch.float32) -> LoRA:
    lora = LoRA(causal(family).to(dtype))
    for seed, name in enumerate("xy"):
        lora.add(name, spec)
        draws = torch.Generator().manual_seed(seed)
        for tensor in lora.parameters(name):
            tensor.data.normal_(0, 0.2, generator=draws)
    return lora


def taught(lora: LoRA, *names: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of a pass in training under some adapters, and all gradients."""
    lora.model.train()
    torch.manual_seed(0)
    if len(names) > 1:
        each = torch.cat(losses_together(lora, {name: rows(seed) for seed, name in enumerate(names)}))
        each.mean().backward()
    else:
        with lora.use(*names):
            each = losses(lora, rows())
            each.mean().backward()
    gradients = [tensor.grad for name in names for tensor in lora.parameters(name) if tensor.grad is not None]
    made = torch.cat([one.flatten() for one in gradients])
    for name in names:
        for tensor in lora.parameters(name):
            tensor.grad = None
    return each.detach(), made


@pytest.mark.parametrize("targets", [QV, ("attn.k",), ALL])
@pytest.mark.parametrize("family", CAUSAL)
def test_together_they_give_the_losses_and_gradients_that_they_give_apart(
    family: str, targets: tuple[str, ...], apart: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "gpt_neox" and targets == ("attn.k",):
        targets = ("attn.q",)
    calls: list[int] = []
    own = together.Together.apply
    monkeypatch.setattr(together.Together, "apply", lambda *given: (calls.append(1), own(*given))[1])
    lora = adapted(family, LoraSpec(rank=3, targets=targets))
    before, state = touched(lora.model), {name: one.clone() for name, one in lora.model.state_dict().items()}
    ours = taught(lora, "x")
    assert bool(calls) == (family in JOINED)
    with apart():
        plain = taught(lora, "x")
    for mine, theirs in zip(ours, plain, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-4
    assert touched(lora.model) == before
    assert all(torch.equal(one, state[name]) for name, one in lora.model.state_dict().items())


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(rank=3, targets=QV, variant="dora"),
        LoraSpec(rank=3, targets=QV, variant="lora-fa"),
        LoraSpec(rank=3, targets=QV, variant="pissa"),
        LoraSpec(rank=3, targets=QV, dropout=0.3),
    ],
    ids=lambda spec: spec.variant,
)
def test_what_is_no_plain_product_is_left_to_each_layer(spec: LoraSpec, apart: Any) -> None:
    lora = adapted("llama", spec)
    ours = taught(lora, "x")
    with apart():
        plain = taught(lora, "x")
    for mine, theirs in zip(ours, plain, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


def test_adapters_on_spans_of_a_row_stay_apart(apart: Any) -> None:
    lora = adapted("llama", LoraSpec(rank=3, targets=ALL))
    taught(lora, "x")  # frugal forms are tried outside of spans
    ours = taught(lora, "x", "y")
    with apart():
        plain = taught(lora, "x", "y")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))


def test_activations_that_are_computed_again_are_computed_together_too() -> None:
    lora = adapted("llama", LoraSpec(rank=3, targets=QV))
    ours = taught(lora, "x")
    lora.model.train()
    with lora.use("x"), leanly(lora, rows()), recomputing(lora.model):
        losses(lora, rows()).mean().backward()
    again = torch.cat([tensor.grad.flatten() for tensor in lora.parameters("x")])
    torch.testing.assert_close(again, ours[1])


def test_they_take_fewer_products_and_sums(apart: Any) -> None:
    lora = adapted("llama", LoraSpec(rank=3, targets=QV))
    taught(lora, "x")  # what is tried at the first use is tried
    with Products() as ours:
        taught(lora, "x")
    with apart(), Products() as plain:
        taught(lora, "x")
    above = lora.model.config.num_hidden_layers - 1  # blocks whose input has a gradient
    # a block: q, k and v, gate and up, both A, three products less; the gradients of both A; x Aᵀ is not made again.
    # One above another: what comes from q, k, v and both A, from gate and up
    assert plain.products - ours.products >= 11 * above + 8
    assert plain.sums - ours.sums >= 4 * above  # of the gradients that meet in an input


def test_gradients_become_the_columns_of_one_tensor_if_they_are_not() -> None:
    outer = torch.randn(7, 10, dtype=torch.double)
    beside = outer.split((6, 4), 1)
    found = together._side_by_side(beside, (6, 4))
    assert found.data_ptr() == outer.data_ptr() and torch.equal(found, outer)
    for apart in ([one.clone() for one in beside], [beside[0].clone(), beside[1]]):
        found = together._side_by_side(apart, (6, 4))
        assert found.data_ptr() not in [one.data_ptr() for one in apart] and torch.equal(found, outer)
    swapped = torch.cat([outer[:, 4:], outer[:, :4]], dim=1).split((6, 4), 1)
    assert torch.equal(together._side_by_side([outer[:, 4:], outer[:, :4]], (6, 4)), torch.cat(swapped, dim=1))
    assert torch.equal(together._side_by_side((None, beside[1]), (6, 4))[:, 6:], outer[:, 6:])
    x, W = torch.randn(7, 5, dtype=torch.double), torch.randn(10, 5, dtype=torch.double)
    assert torch.autograd.gradcheck(
        lambda x: together.Together.apply(x, W, None, (6, 4), 1.0, None, None, None, None), x.requires_grad_()
    )


def test_a_layer_whose_output_nobody_uses_takes_no_part() -> None:
    x, W = torch.randn(3, 5, requires_grad=True), torch.randn(10, 5)
    A, B = torch.randn(2, 5, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    first, second = together.Together.apply(x, W, None, (6, 4), 2.0, A, B, None, None)  # type: ignore[misc]
    (of_x,) = torch.autograd.grad(second.sum(), x, retain_graph=True)
    torch.testing.assert_close(of_x, W[6:].sum(0).expand(3, 5))
    found = torch.autograd.grad(first.square().sum(), (x, A, B))
    exact = torch.autograd.grad((x @ W[:6].T + 2 * (x @ A.T) @ B.T).square().sum(), (x, A, B))
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_weight_that_was_exchanged_is_seen() -> None:
    lora = adapted("llama", LoraSpec(rank=3, targets=QV))
    before = taught(lora, "x")[0]
    layer: Any = lora.model.get_submodule("model.layers.0.self_attn.k_proj")
    layer.weight.data = torch.zeros_like(layer.weight)
    other = taught(lora, "x")[0]
    with frugal(lora.model):
        assert not torch.equal(before, other)
    with torch.no_grad():
        layer = lora.model.get_submodule("model.layers.1.mlp.up_proj")
        layer.weight.zero_()  # in its place
    assert not torch.equal(taught(lora, "x")[0], other)


def test_a_bias_that_was_exchanged_is_seen() -> None:
    lora = adapted("qwen2", LoraSpec(rank=3, targets=QV))
    before = taught(lora, "x")[0]
    layer: Any = lora.model.get_submodule("model.layers.0.self_attn.v_proj")
    layer.bias.data = torch.ones_like(layer.bias)
    assert not torch.equal(taught(lora, "x")[0], before)


def test_a_model_that_was_moved_is_laid_anew() -> None:
    lora = adapted("llama", LoraSpec(rank=3, targets=QV))
    taught(lora, "x")
    groups = together._GROUPS[lora.model]
    assert groups and all(group.as_laid for group in groups)
    lora.model.to(torch.bfloat16)
    taught(lora, "x")
    assert together._GROUPS[lora.model] is not groups
    assert all(group.as_laid and group._weight.dtype == torch.bfloat16 for group in together._GROUPS[lora.model])


def test_copies_that_stand_in_for_weights_are_not_laid() -> None:
    lora = LoRA(causal("llama").bfloat16())
    add(lora, "x", BaselineSpec(kind="full"))
    with torch.no_grad(), lora.use("x"):  # as before the first step
        losses(lora, rows())
    assert not together._GROUPS[lora.model]


def test_a_block_may_write_into_its_projections(apart: Any) -> None:
    """olmo cuts q, k and v off in their place."""
    lora = LoRA(causal("olmo", clip_qkv=0.05))
    lora.add("x", LoraSpec(rank=3, targets=QV))
    for tensor in lora.parameters("x"):
        tensor.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    ours = taught(lora, "x")
    with apart():
        plain = taught(lora, "x")
    assert together._GROUPS[lora.model]
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_layers_without_a_token_give_nothing() -> None:
    lora = adapted("llama", LoraSpec(rank=3, targets=QV))
    attention: Any = lora.model.get_submodule("model.layers.0.self_attn")
    lora.model.train()
    with lora.use("x"), frugal(lora.model):
        x = torch.zeros(1, 0, 32, requires_grad=True)
        assert [one.shape[1] for one in (attention.q_proj(input=x), attention.k_proj(x), attention.v_proj(x))] == [
            0
        ] * 3


def test_another_input_between_two_layers_is_not_mixed_up() -> None:
    lora = adapted("llama", LoraSpec(rank=3, targets=QV))
    attention: Any = lora.model.get_submodule("model.layers.0.self_attn")
    x, other = torch.randn(2, 1, 5, 32)
    exact = attention.k_proj(other), attention.v_proj(x)
    lora.model.train()
    with lora.use("x"), frugal(lora.model):
        attention.q_proj(x)
        assert torch.allclose(attention.k_proj(other), exact[0], atol=1e-6)
    with frugal(lora.model):
        attention.q_proj(x)
        assert torch.allclose(attention.v_proj(x), exact[1], atol=1e-6)
