"""Roles of every architecture, and q, k and v inside fused matrices."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_studio.core.layout import dimensions, matrices
from lora_studio.core.lora import LoRA, plan
from lora_studio.core.spec import PRESETS, LoraSpec
from lora_studio.errors import StudioError
from tests.tiny import CAUSAL, ENCODERS, causal, encoder

ATTENTION = {"attn.q", "attn.k", "attn.v", "attn.o"}


@pytest.mark.parametrize("family", CAUSAL)
def test_every_causal_family_has_the_four_attention_roles_and_an_mlp(family: str) -> None:
    roles = {target.role for target in matrices(causal(family))}
    assert roles - {"mlp.gate"} == ATTENTION | {"mlp.up", "mlp.down"}


@pytest.mark.parametrize("family", ENCODERS)
def test_every_encoder_family_has_them_too(family: str) -> None:
    assert {target.role for target in matrices(encoder(family))} == ATTENTION | {"mlp.up", "mlp.down"}


@pytest.mark.parametrize("family", CAUSAL)
def test_slices_of_a_layer_share_its_rows_out_exactly_once(family: str) -> None:
    model = causal(family)
    rows: dict[str, list[int]] = {}
    for target in matrices(model):
        out, width = dimensions(model.get_submodule(target.name))
        assert target.shape[1] == width
        rows.setdefault(target.name, []).extend(range(out) if target.rows is None else target.rows.tolist())
    for name, numbers in rows.items():
        assert sorted(numbers) == list(range(dimensions(model.get_submodule(name))[0]))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("role", ["attn.q", "attn.k", "attn.v"])
def test_a_slice_changes_only_what_attention_receives_as_that_role(family: str, role: str) -> None:
    """Read off the attention function's own arguments, so the table is checked against the model's code."""
    model = causal(family)
    lora = LoRA(model)
    lora.add("x", LoraSpec(targets=(role,), rank=4, layers=(0,)))
    for number, tensor in enumerate(lora.parameters("x")):
        tensor.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(number))
    base, changed = received(model, lora), received(model, lora, "x")
    for name in ("attn.q", "attn.k", "attn.v"):
        assert torch.equal(base[name], changed[name]) == (name != role)


def received(model: nn.Module, lora: LoRA, *rows: str) -> dict[str, torch.Tensor]:
    """What the first layer's attention function gets as query, key and value."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[tuple[torch.Tensor, ...]] = []

    def spy(module, query, key, value, *args, **kwargs):
        seen.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("sdpa_spy", spy)
    model.config._attn_implementation = "sdpa_spy"
    with torch.no_grad(), lora.use(*rows):
        model(input_ids=torch.arange(7)[None], use_cache=False)
    model.config._attn_implementation = "sdpa"
    return dict(zip(("attn.q", "attn.k", "attn.v"), seen[0], strict=True))


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("preset", PRESETS)
def test_planned_parameters_are_the_trainable_ones(family: str, preset: str) -> None:
    """|Θ| = Σ r (in + out), the paper's count; and the paper's 2·L·d·r per square matrix."""
    model = causal(family)
    spec = LoraSpec(rank=3, targets=PRESETS[preset])
    planned = sum(target.parameters(3) for target in plan(model, spec))
    lora = LoRA(model)
    lora.add("x", spec)
    assert planned == sum(tensor.numel() for tensor in lora.parameters("x"))
    if family == "gpt2" and "paper" in preset:
        assert planned == 2 * (2 * 2 * 32 * 3)  # 2 layers · {q, v} · 2·d·r


def test_names_endings_and_layers_select_too() -> None:
    model = causal("llama")
    assert len(plan(model, LoraSpec(targets=("q_proj",)))) == 2
    assert len(plan(model, LoraSpec(targets=("model.layers.1.mlp.down_proj",)))) == 1
    assert {target.layer for target in plan(model, LoraSpec(targets=("all-linear",), layers=(1,)))} == {1}
    assert plan(model, LoraSpec(targets=("attn.q", "q_proj"))) == plan(model, LoraSpec(targets=("attn.q",)))


@pytest.mark.parametrize(
    ("wrong", "code"),
    [({"targets": ("attn.qq",)}, "E_TARGETS"), ({"targets": ()}, "E_TARGETS"), ({"layers": (2,)}, "E_LAYERS")],
)
def test_a_plan_that_selects_nothing_says_what_there_is(wrong: dict, code: str) -> None:
    with pytest.raises(StudioError) as caught:
        plan(causal("llama"), LoraSpec(**wrong))
    assert caught.value.code == code and caught.value.hint


def test_dimensions_are_out_in_for_both_kinds_of_layer() -> None:
    assert dimensions(nn.Linear(3, 5)) == dimensions(Conv1D(5, 3)) == (5, 3)
