"""Roles of every architecture, and q, k and v inside fused matrices, read off what the models' own code does."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from lora_studio.core.layout import (
    LAYOUTS,
    Target,
    blocks,
    dimensions,
    embedding,
    embedding_scale,
    experts,
    heads,
    is_adaptable,
    is_linear,
    matrices,
)
from lora_studio.core.lora import LoRA, plan
from lora_studio.core.spec import PRESETS, LoraSpec
from lora_studio.errors import StudioError
from tests.tiny import CAUSAL, CLASSIFIERS, ENCODERS, EXPERTS, FAMILIES, causal, classifier, encoder

ATTENTION = {"attn.q", "attn.k", "attn.v", "attn.o"}
EVERY = [*FAMILIES, *ENCODERS]
IDS = torch.arange(3, 12)[None]


def built(family: str) -> nn.Module:
    return encoder(family) if family in ENCODERS else causal(family)


def test_every_architecture_of_the_table_is_built_here() -> None:
    assert {built(family).config.get_text_config().model_type for family in EVERY} == set(LAYOUTS)


@pytest.mark.parametrize("family", [family for family in EVERY if family not in EXPERTS])
def test_every_family_has_the_embedding_the_four_attention_roles_and_an_mlp(family: str) -> None:
    targets = matrices(built(family))
    for layer in (0, 1):
        roles = {target.role for target in targets if target.layer == layer}
        assert roles - {"mlp.gate"} == ATTENTION | {"mlp.up", "mlp.down"}
    assert [target.role for target in targets if target.layer == -1] == ["embed"]


@pytest.mark.parametrize("family", EVERY)
def test_slices_of_a_layer_share_its_rows_out_exactly_once(family: str) -> None:
    model = built(family)
    rows: dict[str, list[int]] = {}
    for target in matrices(model):
        out, width = dimensions(model.get_submodule(target.name))
        numbers = range(out) if target.rows is None else target.rows.tolist()
        assert target.shape == (len(numbers), width)
        rows.setdefault(target.name, []).extend(numbers)
    for name, numbers in rows.items():
        assert sorted(numbers) == list(range(dimensions(model.get_submodule(name))[0]))


@pytest.mark.parametrize("family", EVERY)
def test_targets_come_in_the_order_in_which_the_model_uses_them(family: str) -> None:
    model, used = built(family), []
    names = list(dict.fromkeys(target.name for target in matrices(model)))
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: used.append(name))
    with torch.no_grad():
        model(input_ids=IDS)
    assert used == names


# ---- what attention and the activation function receive ------------------------------------------------------------


class Products(TorchFunctionMode):
    """Keeps the operands of batched matrix products: q kᵀ comes first and weights · v last in any attention."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("matmul", "__matmul__", "bmm", "baddbmm"):
            left, right = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)][-2:]
            if right.dim() > 2:  # falcon's linear layers are products too, with a weight of two dimensions
                self.operands.append((left, right))
        return func(*args, **kwargs)


def received(model: nn.Module, attention: str) -> dict[str, torch.Tensor]:
    """What the module of this name takes the attention of: query, key and value as its own code has split them."""
    products, module = Products(), model.get_submodule(attention)
    before = module.register_forward_pre_hook(lambda *_: products.__enter__() and None)
    after = module.register_forward_hook(lambda *_: products.__exit__(None, None, None))
    model.config._attn_implementation = "eager"  # products in the open, where sdpa would hide them
    with torch.no_grad():
        model(input_ids=IDS)
    before.remove()
    after.remove()
    (query, key), (_, value) = products.operands[0], products.operands[-1]
    return {"attn.q": query, "attn.k": key, "attn.v": value}


@contextmanager
def disturbed(model: nn.Module, target: Target) -> Iterator[None]:
    """Inside, the rows of one target are other ones."""
    layer = model.get_submodule(target.name)
    before = layer.weight.data.clone()
    weight = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data  # (out, in)
    rows = torch.arange(len(weight)) if target.rows is None else target.rows
    weight[rows] += torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    yield
    layer.weight.data.copy_(before)


def attention_of(model: nn.Module) -> tuple[str, dict[str, Target]]:
    """The first block's attention module and its targets by role."""
    roles = {target.role: target for target in matrices(model) if target.layer == 0}
    return roles["attn.q"].name.rpartition(".")[0], roles


@pytest.mark.parametrize("family", EVERY)
def test_a_role_changes_only_what_attention_receives_as_that_role(family: str) -> None:
    model = built(family)
    attention, roles = attention_of(model)
    base = received(model, attention)
    for role in base:
        with disturbed(model, roles[role]):
            changed = received(model, attention)
        assert {name for name in base if not torch.equal(base[name], changed[name])} == {role}
    assert all(torch.equal(base[name], tensor) for name, tensor in received(model, attention).items())


def test_positions_of_deberta_are_matrices_of_their_own_beside_q_k_and_v() -> None:
    model = encoder("deberta", relative_attention=True, pos_att_type=["c2p", "p2c"])
    attention, roles = attention_of(model)
    assert {"attention.self.pos_proj", "attention.self.pos_q_proj"} < set(roles)
    base = received(model, attention)
    with disturbed(model, roles["attention.self.pos_proj"]):
        changed = received(model, attention)
    assert all(torch.equal(base[name], changed[name]) for name in base)


@pytest.mark.parametrize("family", ["llama", "phi3", "glm", "glm4", "modernbert", "modernbert-decoder"])
def test_the_gate_is_what_the_activation_function_receives(family: str) -> None:
    model, seen = built(family), {}
    roles = {target.role: target for target in matrices(model)}
    down = model.get_submodule(roles["mlp.down"].name)
    mlp = model.get_submodule(roles["mlp.down"].name.rpartition(".")[0])
    (activation,) = [one for one in mlp.children() if not (is_linear(one) or isinstance(one, nn.Dropout | nn.Identity))]
    activation.register_forward_hook(lambda _, inputs, output: seen.update(activation=inputs[0]))
    down.register_forward_hook(lambda _, inputs, output: seen.update(down=inputs[0]))
    results = {}
    for role in ("", "mlp.gate", "mlp.up"):
        with disturbed(model, roles[role]) if role else torch.no_grad(), torch.no_grad():
            model(input_ids=IDS)
        results[role] = dict(seen)
    for role in ("mlp.gate", "mlp.up"):
        assert torch.equal(results[role]["activation"], results[""]["activation"]) == (role == "mlp.up")
        assert not torch.equal(results[role]["down"], results[""]["down"])


# ---- the embedding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_embedding_is_its_rows_times_its_scale(family: str, dtype: torch.dtype) -> None:
    model = built(family)
    target = embedding(model)
    layer = model.get_submodule(target.name)
    layer.weight.data = layer.weight.data.to(dtype)
    assert target == matrices(model)[0] and target.shape == dimensions(layer) == tuple(layer.weight.shape)[::-1]
    with torch.no_grad():
        assert torch.equal(layer(IDS), F.embedding(IDS, layer.weight) * embedding_scale(layer))
    assert (embedding_scale(layer) != 1) == (family in ("gemma", "gemma2", "gemma3_text"))


def test_an_embedding_that_does_more_than_look_up_and_scale_is_no_target() -> None:
    class Normed(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.normalize(super().forward(ids), dim=-1)

    model = causal("llama")
    model.set_input_embeddings(Normed(97, 32))
    assert is_adaptable(nn.Embedding(9, 3)) and not is_adaptable(Normed(9, 3))
    assert "embed" not in {target.role for target in matrices(model)}


def test_all_linear_leaves_the_embedding_out() -> None:
    model = causal("llama")
    assert "embed" not in {target.role for target in plan(model, LoraSpec(targets=("all-linear",)))}
    for wanted in ("embed", "embed_tokens", "model.embed_tokens"):
        assert plan(model, LoraSpec(targets=(wanted,))) == [embedding(model)]


# ---- experts and heads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_and_their_routers_are_no_targets(family: str) -> None:
    model = causal(family)
    mixtures = [0] if family == "qwen3_moe" else [0, 1]
    assert experts(model) == tuple(f"model.layers.{layer}.mlp.experts" for layer in mixtures)
    names = {target.role if "." in target.role else target.name for target in matrices(model)[1:]}
    shared = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")} if family == "qwen2_moe" else set()
    dense = {"mlp.gate", "mlp.up", "mlp.down"} if family == "qwen3_moe" else set()
    assert names == ATTENTION | shared | dense


def test_lists_of_experts_stacked_weights_and_linear_routers_are_found_as_well() -> None:
    model = causal("llama")
    first, second = nn.Module(), nn.Module()
    first.router = nn.Linear(32, 3)
    first.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
    first.shared = nn.Linear(32, 32)
    second.gate = nn.Sequential(nn.Linear(32, 3))
    second.inputs = nn.ParameterDict({"weight": torch.zeros(3, 48, 32)})  # named like no expert, but there are three
    second.conv = nn.Conv1d(5, 5, 2)
    model.config.num_local_experts = 3
    for layer, moe in zip(model.model.layers, (first, second), strict=True):
        layer.mlp = moe
    assert experts(model) == ("model.layers.0.mlp.experts", "model.layers.1.mlp.inputs")
    assert {target.role for target in matrices(model)[1:]} == ATTENTION | {"mlp.shared"}


def test_a_model_without_experts_has_none() -> None:
    assert not any(experts(built(family)) for family in EVERY if family not in EXPERTS)


HEADS = {"distilbert": ("pre_classifier", "classifier"), "modernbert": ("head", "classifier")}
HEADS |= dict.fromkeys(("gpt2", "llama"), ("score",)) | dict.fromkeys(
    ("deberta", "deberta-v2"), ("pooler", "classifier")
)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_heads_of_a_classifier_are_all_that_it_adds_to_its_base(family: str) -> None:
    model = classifier(family)
    assert heads(model) == HEADS.get(family, ("classifier",))
    owners = [name.split(".")[0] for name, _ in model.named_parameters()]
    assert {*owners} == {model.base_model_prefix, *heads(model)}
    assert not any(target.name.startswith(heads(model)) for target in matrices(model))
    assert model(input_ids=IDS).logits.shape == (1, 3)


def test_a_model_that_writes_text_has_no_head_and_a_bare_encoder_neither() -> None:
    assert not any(heads(built(family)) for family in EVERY)


# ---- without weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_a_model_without_weights_has_the_same_layout(family: str) -> None:
    model = built(family)
    with torch.device("meta"):
        skeleton = built(family)
        targets = matrices(skeleton)
        assert embedding_scale(skeleton.get_input_embeddings()) == pytest.approx(
            embedding_scale(model.get_input_embeddings())
        )
    assert targets == matrices(model) and experts(skeleton) == experts(model)
    for ours, theirs in zip(targets, matrices(model), strict=True):
        assert (ours.rows is None and theirs.rows is None) or torch.equal(ours.rows, theirs.rows)


def test_an_architecture_that_is_not_in_the_table_has_its_paths_as_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LAYOUTS, "gpt2")
    roles = {target.role for target in matrices(causal("gpt2")) if target.layer == 0}
    assert roles == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def test_a_model_without_a_list_of_blocks_is_refused_by_name() -> None:
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    model = transformers.AlbertModel(transformers.AlbertConfig(embedding_size=16, vocab_size=97, **sizes))
    with pytest.raises(StudioError) as caught:
        blocks(model)
    assert caught.value.code == "E_ARCH" and "Albert" in caught.value.message and caught.value.hint


# ---- choosing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "meant"),
    {
        "attn.q": True,
        "q_proj": True,
        "self_attn.q_proj": True,
        "model.layers.1.self_attn.q_proj": True,
        "all-linear": True,
        "attn": False,
        "proj": False,
        "q_proj.weight": False,
        "layers.1": False,
        "": False,
    }.items(),
)
def test_a_target_answers_to_its_role_its_name_and_the_end_of_its_name(wanted: str, meant: bool) -> None:
    target = Target(name="model.layers.1.self_attn.q_proj", role="attn.q", layer=1, shape=(4, 4))
    assert target.answers_to(wanted) == meant


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("preset", PRESETS)
def test_planned_parameters_are_the_trainable_ones(family: str, preset: str) -> None:
    """|Θ| = Σ r (in + out), the paper's count; and the paper's 2·L·d·r per square matrix."""
    model = causal(family)
    spec = LoraSpec(rank=3, targets=PRESETS[preset])
    planned = sum(spec.parameters(target) for target in plan(model, spec))
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


def test_dimensions_are_out_in_for_every_kind_of_layer() -> None:
    assert dimensions(nn.Linear(3, 5)) == dimensions(Conv1D(5, 3)) == dimensions(nn.Embedding(3, 5)) == (5, 3)
