"""The contract y = base(x) + ((x Aᵀ) ⊙ g) Bᵀ, as equalities."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_studio.core.layout import dimensions
from lora_studio.core.lora import LoRA
from lora_studio.core.merge import merged, merged_state
from lora_studio.core.spec import LoraSpec
from tests.tiny import CAUSAL, causal, touched

EVERY = LoraSpec(rank=3, targets=("all-linear",))
IDS = torch.arange(3, 36).view(3, 11)


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def adapted(family: str = "llama", spec: LoraSpec = EVERY, *, dtype: torch.dtype = torch.float32) -> LoRA:
    """A tiny model with an adapter x whose update is large."""
    lora = LoRA(causal(family).to(dtype))
    lora.add("x", spec)
    disturb(lora, "x")
    return lora


def disturb(lora: LoRA, name: str, seed: int = 1) -> None:
    draws = torch.Generator().manual_seed(seed)
    for tensor in lora.parameters(name):
        tensor.data.normal_(0, 0.2, generator=draws)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(family: str, dtype: torch.dtype) -> None:
    model = causal(family).to(dtype)
    base = logits(model)
    lora = LoRA(model)
    lora.add("x", EVERY)
    with lora.use("x"):
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_rows_of_a_mixed_batch_are_the_base_models_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    lora = adapted(family, dtype=dtype)
    base = logits(lora.model)
    with lora.use(None, "x", {"x": 0.0}):
        mixed = logits(lora.model)
    with lora.use("x"):
        alone = logits(lora.model)
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])
    assert torch.equal(mixed[1], alone[1]) and not torch.equal(mixed[1], base[1])


def test_strength_zero_is_the_base_and_two_is_twice_the_update_of_one_layer() -> None:
    lora = LoRA(toy())
    lora.add("x", LoraSpec(rank=2, targets=("linear",)))
    disturb(lora, "x")
    x = torch.randn(4, 6)
    layer = lora.model.get_submodule("blocks.0.linear")
    base = layer(x)
    with lora.use("x"):
        one = layer(x)
        lora.set_scale("x", 2.0)
        two = layer(x)
        lora.set_scale("x", 0.0)
        assert torch.equal(layer(x), base)
    torch.testing.assert_close(two - base, 2 * (one - base))
    with lora.use({"x": 2.0}):
        torch.testing.assert_close(layer(x), two)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("length", [2, 11], ids=["few tokens", "many"])
@pytest.mark.parametrize("rows", [("x",), (None, "x", {"x": -0.5}), ({"x": 0.3, "y": 2.0},), ("y", None, "x")])
def test_what_is_prepared_for_answering_is_what_training_computes(family: str, length: int, rows: tuple) -> None:
    """Without a gradient a slot keeps its factors ready; a slider and a write to a factor are seen all the same."""
    lora = adapted(family)
    lora.add("y", LoraSpec(rank=2, alpha=3.0, targets=("attn.v", "mlp.down")))
    disturb(lora, "y", 2)
    ids = IDS[:, :length]

    def same() -> torch.Tensor:
        found = logits(lora.model, ids)
        taught = lora.model(input_ids=ids, use_cache=False).logits
        assert taught.requires_grad
        torch.testing.assert_close(found, taught.detach(), rtol=1e-4, atol=1e-4)
        return found

    with lora.use(*rows):
        first = same()
        assert torch.equal(first, same())
        with torch.no_grad():
            lora.parameters("x")[0].add_(1.0)
            lora.parameters("y")[0].add_(1.0)
        written = same()
        lora.set_scale("y" if rows[0] == "y" else "x", 0.4)
        assert not torch.equal(first, written) and not torch.equal(written, same())


def test_a_copy_of_an_adapted_model_is_a_model_of_its_own() -> None:
    lora = adapted("llama")
    with lora.use("x"), torch.no_grad():
        other = copy.deepcopy(lora.model)
        found = logits(other)
        assert torch.equal(found, logits(lora.model))
        lora.model.get_submodule("model.layers.0.self_attn.v_proj").weight.zero_()
        assert torch.equal(logits(other), found) and not torch.equal(logits(lora.model), found)
        other.get_submodule("model.layers.1.self_attn.v_proj").weight.zero_()
        assert not torch.equal(logits(other), found)


def test_somebody_elses_forward_is_called_and_stays() -> None:
    model: Any = causal("llama")
    layer, calls = model.get_submodule("model.layers.0.self_attn.q_proj"), []
    layer.forward = lambda x: (calls.append(1), F.linear(x, layer.weight))[1]
    mine, base = layer.forward, logits(model)
    first, second = LoRA(model), LoRA(model)
    for lora in (first, second):
        lora.add("x", EVERY)
        disturb(lora, "x")
    with first.use("x"):
        one = logits(model)
        with second.use("x"):
            assert not torch.equal(logits(model), one)
    second.detach()
    with first.use("x"):
        assert torch.equal(logits(model), one) and not torch.equal(one, base)
    first.detach()
    assert layer.forward is mine and len(calls) == 4 and torch.equal(logits(model), base)


def test_blends_add_up() -> None:
    lora = LoRA(toy())
    for seed, name in enumerate("uv"):
        lora.add(name, LoraSpec(rank=2 + seed, targets=("linear",)))
        disturb(lora, name, seed)
    x, layer = torch.randn(4, 6), lora.model.get_submodule("blocks.0.linear")
    outputs = []
    for mix in ({}, {"u": 1.0}, {"v": 1.0}, {"u": 0.3, "v": 0.7}):
        with lora.use(mix):
            outputs.append(layer(x))
    base, u, v, both = outputs
    torch.testing.assert_close(both - base, 0.3 * (u - base) + 0.7 * (v - base))


def toy(kind: type = nn.Linear) -> nn.Module:
    """One block with one linear layer, dressed as a model."""
    model = nn.Module()
    block = nn.Module()
    block.linear = nn.Linear(6, 5) if kind is nn.Linear else Conv1D(5, 6)
    model.blocks = nn.ModuleList([block])
    text = type("Config", (), {"num_hidden_layers": 1, "model_type": "toy"})()
    text.get_text_config = lambda: text
    model.config = text
    return model.eval()


def test_conv1d_is_linear_with_its_weight_transposed() -> None:
    linear, conv = toy(), toy(Conv1D)
    conv.blocks[0].linear.weight.data = linear.blocks[0].linear.weight.data.T.clone()
    conv.blocks[0].linear.bias.data = linear.blocks[0].linear.bias.data.clone()
    x, outputs = torch.randn(4, 6), []
    for model in (linear, conv):
        lora = LoRA(model)
        lora.add("x", LoraSpec(rank=2, targets=("linear",)))
        disturb(lora, "x")
        with lora.use("x"):
            outputs.append(model.blocks[0].linear(x))
        with merged(lora, "x"):
            torch.testing.assert_close(model.blocks[0].linear(x), outputs[-1])
    torch.testing.assert_close(*outputs)


def test_training_writes_nothing_but_the_adapter_and_only_the_one_in_use() -> None:
    model = causal("gpt2")
    before = copy.deepcopy(model.state_dict())
    lora = LoRA(model)
    lora.add("x", EVERY, seed=1)
    lora.add("y", EVERY, seed=2)
    other = [tensor.clone() for tensor in lora.parameters("y")]
    optimizer = torch.optim.AdamW([*lora.parameters("x"), *lora.parameters("y")], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        with lora.use("x"):
            model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(a, b) for a, b in zip(other, lora.parameters("y"), strict=True))
    assert all(tensor.any() for tensor in lora.parameters("x"))


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_gradients_are_those_of_an_explicit_w0_plus_s_b_a(family: str, variant: str) -> None:
    """Against torch's own functional_call with the sum written out, in float64."""
    model = causal(family).double()
    lora = LoRA(model)
    spec = LoraSpec(rank=3, alpha=5.0, variant=variant, targets=("attn.q", "attn.v", "mlp.down"))
    lora.add("x", spec)
    disturb(lora, "x")
    parameters = [tensor.data.double() for tensor in lora.parameters("x")]
    for tensor, data in zip(lora.parameters("x"), parameters, strict=True):
        tensor.data = data
    with lora.use("x"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    ours = [tensor.grad.clone() for tensor in lora.parameters("x")]
    weights = {}
    for path, part in lora.parts("x"):
        part.zero_grad()
        layer = model.get_submodule(path)
        update = part.scale * part.dense_B(dimensions(layer)[0]) @ part.A
        before = weights.get(f"{path}.weight", layer.weight)
        weights[f"{path}.weight"] = before + (update.T if isinstance(layer, Conv1D) else update)
    torch.func.functional_call(model, weights, kwargs={"input_ids": IDS, "labels": IDS}).loss.backward()
    for tensor, gradient in zip(lora.parameters("x"), ours, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-10, atol=1e-14)


def test_rows_of_one_batch_train_their_own_adapter_as_if_alone() -> None:
    def gradients(lora: LoRA, name: str, ids: torch.Tensor, *rows: str | None) -> list[torch.Tensor]:
        lora.model.zero_grad()
        for tensor in (*lora.parameters("u"), *lora.parameters("v")):
            tensor.grad = None
        with lora.use(*rows):
            output = lora.model(input_ids=ids, use_cache=False).logits
        nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        return [tensor.grad.clone() for tensor in lora.parameters(name)]

    lora = LoRA(causal("llama"))
    for seed, name in enumerate("uv"):
        lora.add(name, LoraSpec(rank=2 + seed, targets=("attn.q", "mlp.up")))
        disturb(lora, name, seed)
    for row, name in enumerate("uv"):
        together = gradients(lora, name, IDS[:2], "u", "v")
        alone = gradients(lora, name, IDS[row : row + 1], name)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_update_has_at_most_its_rank_and_leaves_other_slices_alone() -> None:
    lora = adapted("gpt2", LoraSpec(rank=3, targets=("attn.q", "attn.v")))
    base = {key: value.clone() for key, value in lora.model.state_dict().items()}
    for key, new in merged_state(lora, "x", torch.float32).items():
        if key.endswith("c_attn.weight"):
            q, k, v = (new - base[key]).T.chunk(3)
            assert not k.any() and torch.linalg.matrix_rank(q) == torch.linalg.matrix_rank(v) == 3


def test_detaching_and_removing_leave_the_model_as_it_was() -> None:
    model = causal("llama")
    keys, base = list(model.state_dict()), logits(model)
    lora = LoRA(model)
    lora.add("x", EVERY)
    disturb(lora, "x")
    assert list(model.state_dict()) == keys
    with lora.use("x"), lora.unhooked():
        assert torch.equal(logits(model), base)
    lora.detach()
    assert torch.equal(logits(model), base) and not touched(model)


@pytest.mark.parametrize("family", CAUSAL)
def test_merged_equals_unmerged_and_every_bit_comes_back(family: str) -> None:
    lora = adapted(family)
    before = copy.deepcopy(lora.model.state_dict())
    with lora.use("x"):
        unmerged = logits(lora.model)
    with merged(lora, "x"):
        torch.testing.assert_close(logits(lora.model), unmerged, rtol=1e-4, atol=1e-5)
    after = lora.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    state = merged_state(lora, "x", torch.float32)
    fresh = causal(family)
    fresh.load_state_dict(state)
    torch.testing.assert_close(logits(fresh), unmerged, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another() -> None:
    def first(seed: int) -> torch.Tensor:
        lora = LoRA(causal("llama"))
        lora.add("x", EVERY, seed=seed)
        return lora.parameters("x")[0]

    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))


def test_saved_activations_hold_no_float32_copy_of_a_bfloat16_input() -> None:
    lora = adapted(spec=LoraSpec(rank=3, targets=("attn.q", "attn.v")), dtype=torch.bfloat16)
    layer = lora.model.get_submodule("model.layers.0.self_attn.q_proj")
    kept: list[torch.Tensor] = []
    x = torch.randn(2, 7, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t), lora.use("x"):
        layer(x)
    wide = [tensor for tensor in kept if tensor.dtype == torch.float32 and tensor.numel() >= x.numel()]
    assert kept and not wide


def test_dropout_acts_in_training_only() -> None:
    lora = adapted(spec=LoraSpec(rank=3, dropout=0.5, targets=("attn.v",)))
    with lora.use("x"):
        assert torch.equal(logits(lora.model), logits(lora.model))
        lora.model.train()
        assert not torch.equal(logits(lora.model), logits(lora.model))
