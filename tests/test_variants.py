"""LoRA's variants, embeddings, dropout, patterns; memory in training; generation, recomputation, compiling."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_studio.core.layout import matrices
from lora_studio.core.lora import LoRA, weight
from lora_studio.core.merge import combine, merged, merged_state, rounding, unties
from lora_studio.core.spec import VARIANTS, LoraSpec
from lora_studio.errors import StudioError
from tests.test_lora import IDS, disturb, logits, toy
from tests.tiny import EXPERTS, causal, classifier, touched

EVERYTHING = ("all-linear", "embed")
FAMILIES = ["gpt2", "llama", "gpt_neox", "phi3", "gemma2", "qwen3"]


def spec_of(variant: str, **options: object) -> LoraSpec:
    targets = EVERYTHING if variant in ("lora", "rslora", "lora+") else ("all-linear",)
    return LoraSpec(**{"variant": variant, "rank": 3, "alpha": 5.0, "targets": targets, **options})  # type: ignore[arg-type]


def moved(family: str, spec: LoraSpec, dtype: torch.dtype = torch.float32, size: float = 0.1) -> LoRA:
    """A tiny model whose adapter x has been pushed about by `size`, as training would."""
    lora = LoRA(causal(family).to(dtype))
    lora.add("x", spec)
    draws = torch.Generator().manual_seed(1)
    for tensor in lora.parameters("x"):
        tensor.data += torch.empty(tensor.shape).normal_(0, size, generator=draws)
    return lora


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_of_any_variant_is_the_base_bit_for_bit(family: str, variant: str, dtype: torch.dtype) -> None:
    model = causal(family).to(dtype)
    base = logits(model)
    lora = LoRA(model)
    lora.add("x", spec_of(variant))
    with lora.use("x"):
        assert torch.equal(logits(model), base)
    assert not lora.changed("x") and lora.finite("x")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_base_rows_are_the_base_and_adapted_rows_are_as_if_alone(family: str, variant: str) -> None:
    lora = moved(family, spec_of(variant))
    base = logits(lora.model)
    with lora.use("x"):
        alone = logits(lora.model)
    with lora.use(None, "x", {"x": 0.0}):
        mixed = logits(lora.model)
    assert torch.equal(mixed[[0, 2]], base[[0, 2]]) and torch.equal(mixed[1], alone[1])
    assert lora.changed("x") and not torch.allclose(alone, base, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_any_variant_equals_using_it(family: str, variant: str) -> None:
    lora = moved(family, spec_of(variant, targets=("all-linear",)))
    with lora.use("x"):
        wanted = logits(lora.model)
    before = copy.deepcopy(lora.model.state_dict())
    with merged(lora, "x"):
        torch.testing.assert_close(logits(lora.model), wanted, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in lora.model.state_dict().items())


def test_a_hundred_merges_leave_every_bit_in_its_place_in_bfloat16_too() -> None:
    lora = moved("gpt2", LoraSpec(rank=3), torch.bfloat16)
    before = copy.deepcopy(lora.model.state_dict())
    for _ in range(100):
        with merged(lora, "x"):
            pass
    assert all(torch.equal(before[key], value) for key, value in lora.model.state_dict().items())


def test_in_float64_merged_and_unmerged_agree_to_the_last_digits() -> None:
    lora = moved("llama", LoraSpec(rank=3, targets=("all-linear",)))
    lora.model.double()
    for tensor in lora.parameters("x"):
        tensor.data = tensor.data.double()
    with lora.use("x"):
        wanted = logits(lora.model)
    with merged(lora, "x"):
        torch.testing.assert_close(logits(lora.model), wanted, rtol=1e-12, atol=1e-12)


def test_detaching_leaves_types_hooks_and_keys_as_they_were() -> None:
    model = causal("gpt2")

    def shape() -> list[tuple[str, type, bool]]:
        return [(name, type(one), one in touched(model)) for name, one in model.named_modules()]

    before, keys = shape(), list(model.state_dict())
    lora = LoRA(model)
    for variant in VARIANTS:
        lora.add(f"a{list(VARIANTS).index(variant)}", spec_of(variant))
    assert list(model.state_dict()) == keys and shape() != before
    lora.detach()
    assert shape() == before


# ---- what each variant is --------------------------------------------------------------------------------------------


def test_dora_is_the_normalised_sum_times_its_magnitude_and_never_forms_it() -> None:
    """arXiv 2402.09353, equation 5, written out densely."""
    model = toy()
    lora = LoRA(model)
    lora.add("x", LoraSpec(variant="dora", rank=2, targets=("linear",)))
    disturb(lora, "x")
    layer, x = model.get_submodule("blocks.0.linear"), torch.randn(4, 6)
    (one,) = lora.delta("x")
    W = layer.weight + one.scale * one.B @ one.A
    dense = one.magnitude[:, None] * W / W.norm(dim=1, keepdim=True)
    with lora.use("x"):
        torch.testing.assert_close(layer(x), F.linear(x, dense, layer.bias), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight + one.dense(layer.weight), dense)


def test_doras_norm_is_kept_outside_training_and_follows_the_factors() -> None:
    lora = moved("llama", spec_of("dora"))
    (_, part), *_ = lora.parts("x")
    layer = lora.model.get_submodule(next(lora.parts("x"))[0])
    first = part.norm(layer)
    assert part.norm(layer) is first
    with torch.no_grad():
        part.B.mul_(2)
    assert not torch.equal(part.norm(layer), first)


def test_pissa_starts_at_the_main_singular_directions_and_the_base_stays() -> None:
    lora = LoRA(toy())
    lora.add("x", LoraSpec(variant="pissa", rank=2, targets=("linear",)))
    (_, part), *_ = lora.parts("x")
    W = lora.model.get_submodule("blocks.0.linear").weight
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(part.scale * part.B @ part.A, (U[:, :2] * S[:2]) @ Vh[:2])
    (one,) = lora.delta("x")
    assert one.rank == 4 and one.dense().abs().max() < 1e-6


def test_lora_fa_trains_b_alone_and_lora_plus_gives_it_a_rate_of_its_own() -> None:
    lora = moved("llama", spec_of("lora-fa", targets=("attn.q",)))
    assert {tensor.shape[1] for tensor in lora.parameters("x")} == {3}
    lora = moved("llama", spec_of("lora+", targets=("attn.q",)))
    groups = {group["ratio"]: group["params"] for group in lora.groups("x", ratio_b=16.0)}
    assert {tensor.shape for tensor in groups[1.0]} == {(3, 32)} and {t.shape for t in groups[16.0]} == {(32, 3)}
    lora = moved("llama", spec_of("dora", targets=("attn.q",)))
    assert [group.get("weight_decay") for group in lora.groups("x")] == [None, 0.0]
    for variant in VARIANTS:
        lora = moved("gpt2", spec_of(variant))
        grouped = [tensor for group in lora.groups("x") for tensor in group["params"]]
        assert len(grouped) == len(set(grouped)) and set(grouped) == set(lora.parameters("x"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_patterns_set_rank_and_scale_of_the_matrices_they_name(variant: str) -> None:
    spec = LoraSpec(
        variant=variant,
        rank=4,
        alpha=8.0,
        targets=("all-linear",),
        rank_pattern={"mlp.down": 2},
        alpha_pattern={"attn.q": 3.0},
    )
    lora = LoRA(causal("gpt2"))
    lora.add("x", spec)
    ranks = {(part.role, part.rank) for _, part in lora.parts("x")}
    assert ranks == {(role, 2 if role == "mlp.down" else 4) for role, _ in ranks}
    scales = {part.role: part.scale for _, part in lora.parts("x")}
    law = VARIANTS[variant]
    assert scales["attn.q"] == law(3.0, 4) and scales["mlp.down"] == law(8.0, 2) and scales["attn.v"] == law(8.0, 4)
    planned = sum(spec.parameters(target) for target in lora.plan(spec))
    assert planned == sum(tensor.numel() for tensor in lora.parameters("x"))


# ---- mathematics -----------------------------------------------------------------------------------------------------


def test_from_zero_with_orthonormal_a_of_full_rank_the_first_step_is_full_fine_tunings() -> None:
    """dW = -η s² G Aᵀ A = -η s² G, and A itself does not move; from section 4.1's "as we increase r"."""
    model = toy().double()
    layer = model.get_submodule("blocks.0.linear")
    lora = LoRA(model)
    lora.add("x", LoraSpec(rank=5, targets=("linear",)))
    ((_, part),) = lora.parts("x")
    part.A = nn.Parameter(torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q)  # r = in
    part.B = nn.Parameter(torch.zeros(5, 6, dtype=torch.float64))
    x, y, rate = torch.randn(50, 6).double(), torch.randn(50, 5).double(), 0.1
    W = layer.weight.detach().clone().requires_grad_()
    F.mse_loss(F.linear(x, W, layer.bias), y).backward()
    with lora.use("x"):
        F.mse_loss(layer(x), y).backward()
    step = part.scale * (-rate * part.B.grad) @ part.A.detach()
    torch.testing.assert_close(step, -rate * part.scale**2 * W.grad)
    assert not part.A.grad.any()
    torch.testing.assert_close(part.B.grad, part.scale * W.grad @ part.A.detach().T)


def test_full_rank_reaches_any_matrix() -> None:
    torch.manual_seed(0)
    model = toy()
    layer = model.get_submodule("blocks.0.linear")
    goal = torch.randn(5, 6)
    lora = LoRA(model)
    lora.add("x", LoraSpec(rank=5, alpha=5.0, targets=("linear",)))
    optimizer = torch.optim.Adam(lora.parameters("x"), lr=0.03)
    eye = torch.eye(6)
    for _ in range(1200):
        optimizer.zero_grad()
        with lora.use("x"):
            loss = F.mse_loss(layer(eye), F.linear(eye, goal, layer.bias))
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-6


@pytest.mark.parametrize("variant", ["lora", "pissa"])
def test_gradcheck(variant: str) -> None:
    model = toy().double()
    lora = LoRA(model)
    lora.add("x", LoraSpec(variant=variant, rank=2, targets=("linear",)))
    ((_, part),) = lora.parts("x")
    part.double()
    layer, x = model.get_submodule("blocks.0.linear"), torch.randn(3, 6).double()
    disturb_double(part)

    def output(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        with lora.use("x"):
            return torch.func.functional_call(Through(part, layer), {"part.A": A, "part.B": B}, (x,))

    assert torch.autograd.gradcheck(output, (part.A.detach().requires_grad_(), part.B.detach().requires_grad_()))


class Through(nn.Module):
    """A part and its layer as one module, so that functional_call can pass A and B in."""

    def __init__(self, part: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.part, self.layer = part, [layer]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part.delta(self.layer[0], (x,), torch.zeros(len(x), 5, dtype=x.dtype))


def disturb_double(part: nn.Module) -> None:
    for tensor in part.parameters():
        tensor.data = torch.randn(tensor.shape, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 9),
    width=st.integers(1, 9),
    rank=st.integers(1, 9),
    alpha=st.floats(0.01, 100),
    variant=st.sampled_from(["lora", "rslora", "dora", "pissa"]),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_for_any_shape_rank_alpha_and_dtype_unmerged_is_merged(
    out: int, width: int, rank: int, alpha: float, variant: str, wide: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = toy()
    model.blocks[0].linear = nn.Linear(width, out).to(torch.float32 if wide else torch.bfloat16)
    lora = LoRA(model)
    spec = LoraSpec(variant=variant, rank=rank, alpha=alpha, targets=("linear",))
    if rank > min(out, width):
        with pytest.raises(StudioError, match="Rank"):
            lora.add("x", spec)
        return
    lora.add("x", spec)
    disturb(lora, "x", seed)
    layer, x = model.blocks[0].linear, torch.randn(4, width).to(model.blocks[0].linear.weight.dtype)
    (one,) = lora.delta("x")
    W = weight(model, one)
    dense = F.linear(x.float(), W + one.dense(W), layer.bias.float())
    base = layer(x)
    with lora.use("x"):
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if wide else {"rtol": 0.1, "atol": 0.1}
        size = 1 + float(one.dense(W).norm() * x.float().norm())
        torch.testing.assert_close(layer(x).float() / size, dense / size, **tolerance)
    with lora.use({"x": 0.0}):
        assert torch.equal(layer(x), base)


# ---- embeddings, heads, ties -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "gemma2"])
def test_an_adapted_embedding_is_an_embedding_with_the_sum_as_its_table(family: str) -> None:
    """Gemma 2 scales inside its embedding, so the update must be scaled alike."""
    lora = moved(family, LoraSpec(rank=3, targets=("embed",)))
    (one,) = lora.delta("x")
    assert one.A.shape == (3, 97) and one.B.shape == (32, 3)
    with lora.use("x"):
        wanted = logits(lora.model)
    fresh = causal(family)
    table = fresh.get_input_embeddings()
    fresh.lm_head.weight = nn.Parameter(fresh.lm_head.weight.detach().clone())  # untied
    table.weight.data += one.dense().T
    torch.testing.assert_close(logits(fresh), wanted, rtol=1e-4, atol=1e-5)


def test_merging_into_a_tied_embedding_is_refused_in_place_and_parted_for_export() -> None:
    lora = moved("gpt2", LoraSpec(rank=3, targets=("embed", "attn.q")))
    assert lora.model.lm_head.weight is lora.model.transformer.wte.weight and unties(lora, "x")
    with pytest.raises(StudioError) as caught, merged(lora, "x"):
        pass
    assert caught.value.code == "E_TIED"
    with lora.use("x"):
        wanted = logits(lora.model)
    state = merged_state(lora, "x", torch.float32)
    config = copy.deepcopy(lora.model.config)
    config.tie_word_embeddings = False
    fresh = type(lora.model)(config).eval()
    fresh.load_state_dict(state)
    torch.testing.assert_close(logits(fresh), wanted, rtol=1e-4, atol=1e-5)
    assert not unties(moved("gpt2", LoraSpec(rank=3)), "x")


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "gpt2"])
def test_a_head_is_trained_whole_beside_the_adapter_and_belongs_to_it_alone(family: str) -> None:
    from lora_studio.core.layout import heads

    model = classifier(family)
    before = copy.deepcopy(model.state_dict())
    lora = LoRA(model)
    for name in "uv":
        lora.add(name, LoraSpec(rank=2, modules_to_save=heads(model)))
    ids = torch.arange(3, 24).view(3, 7)
    with lora.use("u"):
        F.cross_entropy(model(input_ids=ids).logits, torch.tensor([0, 1, 2])).backward()
    assert all(tensor.grad is not None for tensor in lora.parameters("u"))
    assert all(tensor.grad is None for tensor in lora.parameters("v"))
    torch.optim.SGD(lora.parameters("u"), lr=1.0).step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        with lora.use("u", "v", None):
            mixed = model(input_ids=ids).logits
        base = model(input_ids=ids).logits
    assert torch.equal(mixed[1:], base[1:]) and not torch.equal(mixed[0], base[0])


# ---- several adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_of_different_rank_and_rate_train_in_one_batch_as_if_alone(variant: str) -> None:
    specs = {
        "u": spec_of(variant, rank=2, targets=("attn.q", "mlp.up")),
        "v": spec_of("lora", rank=5, targets=("attn.q",)),
    }

    def train(rows: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        lora = LoRA(causal("gpt2"))
        for seed, (name, spec) in enumerate(specs.items()):
            lora.add(name, spec, seed=seed)
        groups = [
            {"params": group["params"], "lr": rate * group["ratio"]}
            for name, rate in (("u", 0.1), ("v", 0.3))
            for group in lora.groups(name)
        ]
        optimizer = torch.optim.SGD(groups, lr=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            ids = torch.cat(list(rows.values()))
            with lora.use(*rows):
                output = lora.model(input_ids=ids, use_cache=False).logits
                F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
            optimizer.step()
        return {name: [tensor.detach() for tensor in lora.parameters(name)] for name in specs}

    together = train({"u": IDS[:1], "v": IDS[1:2]})
    alone = {"u": train({"u": IDS[:1]})["u"], "v": train({"v": IDS[1:2]})["v"]}
    for name in specs:
        for a, b in zip(together[name], alone[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_combining_is_the_blend_and_cutting_it_is_the_best_of_its_rank(family: str) -> None:
    lora = LoRA(causal(family))
    for seed, name in enumerate("uv"):
        lora.add(name, LoraSpec(rank=2 + seed, variant="rslora" if seed else "lora"))
        disturb(lora, name, seed)
    mix = {"u": 0.3, "v": 0.7}
    with lora.use(mix):
        blend = logits(lora.model)
    exact = combine(lora, mix)
    lora.load_state("both", LoraSpec(rank=5), exact)
    with lora.use("both"):
        torch.testing.assert_close(logits(lora.model), blend, rtol=1e-4, atol=1e-5)
    for whole, cut in zip(exact, combine(lora, mix, rank=2), strict=True):
        S = torch.linalg.svdvals(whole.dense())
        assert cut.rank == 2
        torch.testing.assert_close((whole.dense() - cut.dense()).norm(), S[2:].norm(), rtol=1e-4, atol=1e-5)


def test_rounding_is_nothing_in_float32_and_grows_as_the_update_shrinks() -> None:
    small, large = (moved("llama", LoraSpec(rank=3), size=size) for size in (0.01, 0.3))
    assert max(rounding(large, "x", torch.float32).values()) < 1e-5
    coarse = [max(rounding(lora, "x", torch.bfloat16).values()) for lora in (small, large)]
    assert coarse[0] > coarse[1] > 1e-3 and rounding(large, "x", torch.bfloat16).keys() == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qv"
    }


# ---- memory, dropout, recomputation ----------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps, the model's own weights and the adapter's masters not counted."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = forward()  # noqa: F841
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def activations(variant: str | None, *, dropout: float = 0.0, targets: tuple[str, ...] = ("all-linear",)) -> int:
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_key_value_heads": 4}
    model = causal("llama", **sizes).to(torch.bfloat16).train()
    ids = torch.randint(97, (4, 128), generator=torch.Generator().manual_seed(0))
    lora = LoRA(model)
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda module, inputs, output: output.requires_grad_())  # gradients flow to the bottom
    if variant is None:
        return saved_bytes(model, lambda: model(input_ids=ids, use_cache=False).logits)
    lora.add("x", LoraSpec(variant=variant, rank=8, dropout=dropout, targets=targets))
    with lora.use("x"):
        return saved_bytes(model, lambda: model(input_ids=ids, use_cache=False).logits)


def test_activations_stay_within_a_third_of_the_floor_and_lora_fa_at_it() -> None:
    """The floor is the frozen model itself with gradients passing through."""
    floor = activations(None)
    assert activations("lora") <= 1.3 * floor
    assert activations("lora-fa") <= 1.05 * floor
    assert activations("lora", targets=("attn.q", "attn.v")) <= 1.1 * floor
    assert activations("dora") <= 2.0 * floor  # one direction per matrix, for the gradient of its magnitude


def test_dropout_keeps_no_dropped_copies() -> None:
    plain, dropped = activations("lora"), activations("lora", dropout=0.1)
    assert dropped <= 1.05 * plain


def test_dropouts_average_over_many_passes_is_the_evaluation() -> None:
    lora = LoRA(toy())
    lora.add("x", LoraSpec(rank=2, dropout=0.3, targets=("linear",)))
    disturb(lora, "x")
    layer, x = lora.model.get_submodule("blocks.0.linear"), torch.randn(4, 6)
    with lora.use("x"), torch.no_grad():
        exact = layer(x)
        assert torch.equal(layer(x), exact)
        lora.model.train()
        mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, exact, rtol=0.05, atol=0.1)


def test_adapters_with_different_dropout_in_one_batch_keep_their_own() -> None:
    lora = LoRA(toy())
    lora.add("wet", LoraSpec(rank=2, dropout=0.5, targets=("linear",)))
    lora.add("dry", LoraSpec(rank=2, targets=("linear",)))
    disturb(lora, "wet"), disturb(lora, "dry", 2)
    lora.model.train()
    layer, x = lora.model.get_submodule("blocks.0.linear"), torch.randn(1, 6).expand(2, 6)
    with lora.use("wet", "dry"), torch.no_grad():
        first, second = layer(x), layer(x)
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients_down_to_the_first_layer(variant: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        lora = moved("llama", spec_of(variant, targets=("attn.q", "mlp.down")))
        if checkpointing:
            lora.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            lora.model.enable_input_require_grads()
        lora.model.train()
        with lora.use("x"):
            lora.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return [tensor.grad for tensor in lora.parameters("x")]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert a is not None and a.any()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_slider_moved_between_forward_and_backward_changes_no_gradient() -> None:
    def gradients(move: bool) -> list[torch.Tensor]:
        lora = moved("llama", LoraSpec(rank=3))
        lora.model.gradient_checkpointing_enable({"use_reentrant": False})
        lora.model.train()
        with lora.use("x"):
            loss = lora.model(input_ids=IDS, labels=IDS, use_cache=False).loss
            if move:
                lora.set_scale("x", 0.2)
            loss.backward()
        return [tensor.grad for tensor in lora.parameters("x")]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


# ---- generation and compiling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_generate_what_they_would_alone_padded_or_not_with_beams_and_with_or_without_a_cache(
    family: str, beams: int
) -> None:
    lora = moved(family, LoraSpec(rank=3, targets=("all-linear",)), size=0.3)
    prompts = {None: [5, 6, 7], "x": [8, 9, 10, 11, 12]}

    def written(ids: list[list[int]], *rows: str | None, cache: bool = True) -> list[list[int]]:
        width = max(map(len, ids))
        padded = torch.tensor([[1] * (width - len(row)) + row for row in ids])
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "use_cache": cache}
        with lora.use(*rows):
            output = lora.model.generate(padded, attention_mask=(padded != 1).long(), min_new_tokens=6, **options)
        return output[:, width:].tolist()

    together = written(list(prompts.values()), *prompts)
    assert together == [written([ids], row)[0] for row, ids in prompts.items()]
    assert together == written(list(prompts.values()), *prompts, cache=False)
    assert together[1] != written([prompts["x"]])[0]


def test_sampled_rows_of_equal_weight_draw_alike() -> None:
    lora = moved("llama", LoraSpec(rank=3))
    torch.manual_seed(3)
    with lora.use(None):
        base = lora.model.generate(IDS[:1], do_sample=True, max_new_tokens=6, min_new_tokens=6)
    torch.manual_seed(3)
    with lora.use({"x": 0.0}):
        assert torch.equal(lora.model.generate(IDS[:1], do_sample=True, max_new_tokens=6, min_new_tokens=6), base)


def test_a_compiled_model_is_one_frame_whatever_the_gate_and_the_slider_do() -> None:
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    lora = moved("llama", LoraSpec(rank=3, targets=("all-linear",)))
    counter = CompileCounter()
    compiled = torch.compile(lora.model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for rows in ((None, "x", None), ("x", None, {"x": 0.5})):
            with lora.use(*rows):
                for strength in (1.0, 0.3, 2.0):
                    lora.set_scale("x", strength)
                    wanted = lora.model(input_ids=IDS, use_cache=False).logits
                    torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, wanted)
    assert counter.frame_count == 1


def test_every_slot_is_called_by_the_models_own_forward() -> None:
    """A matrix that a model reads without calling its layer would never be adapted; there is none in the tables."""
    for family in FAMILIES:
        lora = moved(family, LoraSpec(rank=2, targets=EVERYTHING))
        with lora.use("x"):
            lora.model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(tensor.grad is not None and tensor.grad.any() for tensor in lora.parameters("x"))
        assert {target.name for target in matrices(lora.model)} == {layer for layer, _ in lora.parts("x")}


def test_gigantic_or_missing_scales_are_not_lost_on_the_way() -> None:
    for variant, law in VARIANTS.items():
        lora = LoRA(causal("llama"))
        lora.add("x", LoraSpec(variant=variant, rank=4, alpha=32.0))
        expected = 32 / (2 if variant == "rslora" else 4)
        assert {part.scale for _, part in lora.parts("x")} == {law(32.0, 4)} == {expected}
        assert math.isclose(lora.delta("x")[0].scale, expected)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("wanted", ["all-linear", "mlp.down", "experts"])
def test_mixtures_of_experts_are_adapted_in_their_attention_and_refused_elsewhere(family: str, wanted: str) -> None:
    lora = LoRA(causal(family))
    with pytest.raises(StudioError) as caught:
        lora.add("x", LoraSpec(targets=(wanted,)))
    assert caught.value.code == "E_MOE" and "attention" in caught.value.hint and lora.names == ()
    lora.add("x", LoraSpec(rank=2, targets=("attn.q", "attn.v")))
    disturb(lora, "x")
    base = logits(lora.model)
    with lora.use("x"):
        assert not torch.equal(logits(lora.model), base)
