"""The adapter folder: our files in PEFT, PEFT's files here, equal logits both ways; damage refused by name."""

import json
import logging
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_studio import adapters
from lora_studio.core.layout import heads
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import VARIANTS, LoraSpec
from lora_studio.errors import StudioError
from lora_studio.peft_format import CONFIG, WEIGHTS, load, portable, save
from tests.tiny import CAUSAL, causal, classifier, touched

logging.getLogger("peft").setLevel(logging.ERROR)
IDS = torch.arange(3, 36).view(3, 11)
FUSED = ["gpt2", "gpt_neox", "phi3"]
TARGETS = {"q and v": ("attn.q", "attn.v"), "everything": ("all-linear",), "one layer": ("model.layers.1.mlp.up_proj",)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(family: str, spec: LoraSpec) -> tuple[LoRA, torch.Tensor]:
    lora = LoRA(causal(family))
    lora.add("x", spec)
    draws = torch.Generator().manual_seed(1)
    for tensor in lora.parameters("x"):
        tensor.data.normal_(0, 0.2, generator=draws)
    with lora.use("x"):
        return lora, logits(lora.model)


def reloaded(family: str, folder: Path) -> tuple[LoRA, torch.Tensor]:
    lora = LoRA(causal(family))
    load(lora, folder, "again")
    with lora.use("again"):
        return lora, logits(lora.model)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", CAUSAL)
def test_peft_computes_our_adapters_logits_and_we_read_our_file_back(
    family: str, targets: str, variant: str, tmp_path: Path
) -> None:
    if targets == "one layer" and family in ("gpt2", "gpt_neox", "phi3"):
        targets = "q and v"
    lora, wanted = trained(family, LoraSpec(rank=3, alpha=5.0, variant=variant, targets=TARGETS[targets]))
    save(lora, "x", tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(causal(family), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-5, atol=1e-5)
    again, ours = reloaded(family, tmp_path)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    save(again, "again", tmp_path / "twice", "base")
    first, second = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "twice" / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((tmp_path / CONFIG).read_text()) == json.loads((tmp_path / "twice" / CONFIG).read_text())


@pytest.mark.parametrize("family", FUSED)
def test_slices_come_back_as_slices(family: str, tmp_path: Path) -> None:
    spec = LoraSpec(rank=3, targets=("attn.q", "attn.v"))
    lora, _ = trained(family, spec)
    save(lora, "x", tmp_path, "base")
    again, _ = reloaded(family, tmp_path)
    assert again.specs["again"].targets == spec.targets and again.specs["again"].rank == 3
    shapes = [[tensor.shape for tensor in one.parameters(name)] for one, name in ((lora, "x"), (again, "again"))]
    assert shapes[0] == shapes[1]


# what an adapter may be -> (our spec, their config), both on the same layers
KINDS: dict[str, tuple[dict, dict]] = {
    "lora": ({}, {}),
    "rslora": ({"variant": "rslora"}, {"use_rslora": True}),
    "dora": ({"variant": "dora"}, {"use_dora": True}),
    "patterns": (
        {"rank_pattern": {"mlp.down": 5}, "alpha_pattern": {"mlp.down": 7.0, "attn.o": 3.0}},
        {"rank_pattern": {"MLP": 5}, "alpha_pattern": {"MLP": 7, "OUT": 3}},
    ),
    "embeddings": ({"targets": ("embed", "attn.o")}, {"target_modules": ["EMBED", "OUT"]}),
    "slices": ({"targets": ("attn.q", "attn.v")}, {}),
}
LAYERS = {  # family -> the names in PEFT's words
    "gpt2": {"EMBED": "wte", "OUT": "attn.c_proj", "MLP": "mlp.c_proj"},
    "llama": {"EMBED": "embed_tokens", "OUT": "o_proj", "MLP": "down_proj"},
    "qwen3": {"EMBED": "embed_tokens", "OUT": "o_proj", "MLP": "down_proj"},
    "gpt_neox": {"EMBED": "embed_in", "OUT": "attention.dense", "MLP": "dense_4h_to_h"},
    "roberta": {"EMBED": "word_embeddings", "OUT": "attention.output.dense", "MLP": "intermediate.dense"},
    "deberta-v2": {"EMBED": "word_embeddings", "OUT": "attention.output.dense", "MLP": "intermediate.dense"},
}
CLASSIFYING = ("roberta", "deberta-v2", "gpt2", "llama")
COMBINATIONS = [(family, kind, False) for family in ("gpt2", "llama", "qwen3", "gpt_neox") for kind in KINDS]
COMBINATIONS += [(family, kind, True) for family in CLASSIFYING for kind in KINDS]


def fresh(family: str, classify: bool) -> torch.nn.Module:
    return classifier(family) if classify else causal(family)


def moved(parameters: object) -> None:
    draws = torch.Generator().manual_seed(2)
    for tensor in parameters:  # type: ignore[attr-defined]
        tensor.data += torch.empty(tensor.shape).normal_(0, 0.1, generator=draws)


def theirs_of(model: torch.nn.Module, family: str, kind: str, classify: bool) -> peft.PeftModel:
    names, options = LAYERS[family], dict(KINDS[kind][1])
    for pattern in ("rank_pattern", "alpha_pattern"):
        options[pattern] = {names[key]: value for key, value in options.get(pattern, {}).items()}
    options["target_modules"] = [names[key] for key in options.get("target_modules", ["OUT", "MLP"])]
    if classify:
        options |= {"task_type": "SEQ_CLS", "modules_to_save": list(heads(model))}
    return peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **options))


@pytest.mark.parametrize(("family", "kind", "classify"), COMBINATIONS)
def test_our_adapters_compute_the_same_in_peft_and_come_back(
    family: str, kind: str, classify: bool, tmp_path: Path
) -> None:
    model = fresh(family, classify)
    lora = LoRA(model)
    options = {"targets": ("attn.o", "mlp.down"), **KINDS[kind][0]}
    lora.add("x", LoraSpec(rank=3, alpha=5.0, modules_to_save=heads(model), **options))
    moved(lora.parameters("x"))
    with lora.use("x"):
        wanted = logits(model)
    save(lora, "x", tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(fresh(family, classify), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-5, atol=1e-5)
    again = LoRA(fresh(family, classify))
    spec = load(again, tmp_path, "again")
    with again.use("again"):
        torch.testing.assert_close(logits(again.model), wanted, rtol=1e-6, atol=1e-6)
    assert spec.variant == lora.specs["x"].variant and set(spec.targets) == set(options["targets"])
    save(again, "again", tmp_path / "twice", "base")
    first, second = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "twice" / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((tmp_path / CONFIG).read_text()) == json.loads((tmp_path / "twice" / CONFIG).read_text())
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


@pytest.mark.parametrize(("family", "kind", "classify"), COMBINATIONS)
def test_their_adapters_compute_the_same_here_train_on_and_go_back(
    family: str, kind: str, classify: bool, tmp_path: Path
) -> None:
    theirs = theirs_of(fresh(family, classify), family, kind, classify)
    moved(tensor for tensor in theirs.parameters() if tensor.requires_grad)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    lora = LoRA(fresh(family, classify))
    load(lora, tmp_path / "theirs", "x")
    with lora.use("x"):
        torch.testing.assert_close(logits(lora.model), logits(theirs), rtol=1e-5, atol=1e-5)
    lora.model.train()
    optimizer = torch.optim.SGD(lora.parameters("x"), lr=0.1)
    with lora.use("x"):
        lora.model.eval()
        lora.model(input_ids=IDS).logits.float().square().mean().backward()
    optimizer.step()
    with lora.use("x"):
        wanted = logits(lora.model)
    save(lora, "x", tmp_path / "ours", "base")
    back = peft.PeftModel.from_pretrained(fresh(family, classify), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back), wanted, rtol=1e-5, atol=1e-5)


def test_peft_trains_every_variant_of_ours_on(tmp_path: Path) -> None:
    for variant in VARIANTS:
        lora, wanted = trained("llama", LoraSpec(rank=3, variant=variant))
        save(lora, "x", tmp_path / variant, "base")
        theirs = peft.PeftModel.from_pretrained(causal("llama"), tmp_path / variant, is_trainable=True)
        theirs.eval()
        torch.testing.assert_close(logits(theirs), wanted, rtol=1e-5, atol=1e-5)
        optimizer = torch.optim.SGD([tensor for tensor in theirs.parameters() if tensor.requires_grad], lr=1.0)
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        theirs.save_pretrained(tmp_path / variant / "on")
        _, ours = reloaded("llama", tmp_path / variant / "on")
        torch.testing.assert_close(ours, logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FUSED)
def test_fused_slices_are_bit_identical_in_peft(family: str, tmp_path: Path) -> None:
    lora, wanted = trained(family, LoraSpec(rank=4, alpha=8.0, targets=("attn.q", "attn.v")))
    save(lora, "x", tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(causal(family), tmp_path).eval()
    assert torch.equal(logits(theirs), wanted)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LoraSpec(rank=3), None),
        (LoraSpec(rank=3, variant="rslora", targets=("all-linear",), rank_pattern={"attn.q": 2}), None),
        (LoraSpec(rank=3, alpha_pattern={"attn.q": 2.0}), None),
        (LoraSpec(rank=3, variant="dora"), "DoRA"),
        (LoraSpec(rank=3, targets=("embed", "attn.q")), "embedding"),
    ],
)
def test_portable_says_whether_a_loader_that_knows_one_scale_takes_it(
    spec: LoraSpec, reason: str | None, tmp_path: Path
) -> None:
    lora, _ = trained("llama", spec)
    save(lora, "x", tmp_path, "base")
    good, why = portable(tmp_path)
    assert good == (reason is None) and (reason or "") in why
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    if good:  # what such a loader computes: one scale for every layer
        power = 0.5 if config["use_rslora"] else 1.0
        scale = config["lora_alpha"] / config["r"] ** power
        for one in lora.delta("x"):
            key = f"base_model.model.{one.layer}.lora_"
            update = scale * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
            ratio = 1.0 if spec.variant != "rslora" else scale * (len(tensors[f"{key}A.weight"]) ** 0.5)
            if spec.variant != "rslora":
                torch.testing.assert_close(update * ratio, one.dense())


def test_a_foreign_file_with_scales_of_its_own_is_not_portable_until_saved_here(tmp_path: Path) -> None:
    theirs = theirs_of(causal("llama"), "llama", "patterns", False)
    moved(tensor for tensor in theirs.parameters() if tensor.requires_grad)
    theirs.save_pretrained(tmp_path)
    assert not portable(tmp_path)[0]
    lora = LoRA(causal("llama"))
    load(lora, tmp_path, "x")
    save(lora, "x", tmp_path / "ours", "base")
    assert portable(tmp_path / "ours")[0]


def test_peft_trains_our_fused_adapter_on_and_hands_it_back(tmp_path: Path) -> None:
    """Its training fills the zero blocks, so the adapter comes back as one dense pair, with equal logits."""
    lora, _ = trained("gpt2", LoraSpec(rank=2, targets=("attn.q", "attn.v")))
    save(lora, "x", tmp_path / "ours", "base")
    theirs = peft.PeftModel.from_pretrained(causal("gpt2"), tmp_path / "ours", is_trainable=True)
    optimizer = torch.optim.SGD([tensor for tensor in theirs.parameters() if tensor.requires_grad], lr=1.0)
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    theirs.eval().save_pretrained(tmp_path / "theirs")
    again, ours = reloaded("gpt2", tmp_path / "theirs")
    torch.testing.assert_close(ours, logits(theirs), rtol=1e-5, atol=1e-5)
    assert all(factors.dense().chunk(3)[1].any() for factors in again.delta("again"))  # k was trained too


def test_short_target_names_are_written_only_when_they_select_the_same_layers(tmp_path: Path) -> None:
    def targets(spec: LoraSpec) -> list[str]:
        lora, _ = trained("gpt2", spec)
        save(lora, "x", tmp_path, "base")
        return json.loads((tmp_path / CONFIG).read_text())["target_modules"]

    assert targets(LoraSpec(targets=("attn.q",))) == ["c_attn"]
    assert targets(LoraSpec(targets=("attn.o",))) == ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]


def damaged(folder: Path, what: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    first = next(iter(tensors))
    if what == "no weights":
        (folder / WEIGHTS).unlink()
        return
    if what == "truncated":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:200])
        return
    if what == "config is not json":
        (folder / CONFIG).write_text("<html>")
        return
    if what == "another rank":
        config["r"] = 4
    elif what == "nan":
        tensors[first] = tensors[first] * float("nan")
    elif what == "unknown key":
        tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
    elif what == "unknown layer":
        tensors[first.replace("layers.0", "layers.7")] = tensors.pop(first)
    elif what == "another shape":
        tensors[first] = torch.zeros(3, 5)
    elif what == "empty":
        tensors = {}
    else:
        config |= {
            "dora without magnitudes": {"use_dora": True},
            "ia3": {"peft_type": "IA3"},
            "bias": {"bias": "all"},
            "pissa": {"init_lora_weights": "pissa"},
            "moe": {"target_parameters": ["experts"]},
        }[what]
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)


DAMAGE = {
    "no weights": "E_ADAPTER_FILES",
    "config is not json": "E_ADAPTER_FILES",
    "truncated": "E_SAFETENSORS",
    "another rank": "E_SHAPE",
    "another shape": "E_SHAPE",
    "nan": "E_NOT_FINITE",
    "unknown key": "E_KEYS",
    "unknown layer": "E_KEYS",
    "empty": "E_KEYS",
    "dora without magnitudes": "E_KEYS",
    **dict.fromkeys(("ia3", "bias", "pissa", "moe"), "E_PEFT_VARIANT"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_or_foreign_adapter_is_refused_by_name_and_leaves_nothing_behind(what: str, tmp_path: Path) -> None:
    lora, _ = trained("llama", LoraSpec(rank=3))
    save(lora, "x", tmp_path, "base")
    damaged(tmp_path, what)
    fresh = LoRA(causal("llama"))
    with pytest.raises(StudioError) as caught:
        load(fresh, tmp_path, "again")
    assert caught.value.code == DAMAGE[what] and caught.value.hint
    assert fresh.names == () and not touched(fresh.model)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"lora_alpha": float("nan")}, "E_ADAPTER_FILES"),
        ({"lora_alpha": 0}, "E_ADAPTER_FILES"),
        ({"lora_alpha": "16"}, "E_ADAPTER_FILES"),
        ({"r": True}, "E_ADAPTER_FILES"),
        ({"lora_dropout": 2.0}, "E_ADAPTER_FILES"),
        ({"rank_pattern": []}, "E_ADAPTER_FILES"),
        ({"modules_to_save": "lm_head"}, "E_ADAPTER_FILES"),
        ({"alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 64}}, "E_PEFT_VARIANT"),
        ({"rank_pattern": {".*q_proj": 3}}, "E_PEFT_VARIANT"),
    ],
)
def test_a_config_that_means_nothing_or_more_than_names_is_refused(wrong: dict, code: str, tmp_path: Path) -> None:
    lora, _ = trained("llama", LoraSpec(rank=3))
    save(lora, "x", tmp_path, "base")
    config = json.loads((tmp_path / CONFIG).read_text()) | wrong
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(StudioError) as caught:
        load(LoRA(causal("llama")), tmp_path, "again")
    assert caught.value.code == code and caught.value.hint


def test_defaults_of_a_minimal_config_are_pefts(tmp_path: Path) -> None:
    lora, wanted = trained("llama", LoraSpec(rank=8, alpha=8.0))
    save(lora, "x", tmp_path, "base")
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    torch.testing.assert_close(reloaded("llama", tmp_path)[1], wanted)
    assert portable(tmp_path)[0]


def test_a_header_of_another_program_is_no_hindrance(tmp_path: Path) -> None:
    lora, wanted = trained("gpt2", LoraSpec(rank=3))
    save(lora, "x", tmp_path, "base")
    for header in ("[1]", "<", '{"slices": 3}', '{"slices": {"transformer.h.0.attn.c_attn": {"attn.q": "a"}}}'):
        save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata={"lora_studio": header})
        torch.testing.assert_close(reloaded("gpt2", tmp_path)[1], wanted, rtol=1e-5, atol=1e-5)


def test_dora_slices_trained_on_a_bfloat16_base_come_back_as_slices_on_a_float32_one(tmp_path: Path) -> None:
    lora = LoRA(causal("gpt2").bfloat16())
    lora.add("x", LoraSpec(rank=2, variant="dora"))
    save(lora, "x", tmp_path, "base")
    again = LoRA(causal("gpt2"))
    load(again, tmp_path, "x")
    assert [one.role for one in again.delta("x")] == ["attn.q", "attn.v"] * 2


def test_one_tensor_that_an_adapter_holds_twice_and_differently_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["attn.c_proj"], modules_to_save=["wte", "lm_head"])
    theirs = peft.get_peft_model(causal("gpt2"), config)
    moved(tensor for name, tensor in theirs.named_parameters() if "modules_to_save" in name and "lm_head" in name)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(StudioError) as caught:
        load(LoRA(causal("gpt2")), tmp_path, "x")
    assert caught.value.code == "E_TIED"


def test_a_head_trained_whole_is_parted_from_the_embedding_it_was_tied_to(tmp_path: Path) -> None:
    from lora_studio.core.merge import merged_state, unties

    model = causal("gpt2")
    lora = LoRA(model)
    lora.add("x", LoraSpec(rank=2, targets=("attn.o",), modules_to_save=("lm_head",)))
    moved(lora.parameters("x"))
    with lora.use("x"):
        wanted = logits(model)
    assert unties(lora, "x")
    apart = causal("gpt2")
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    apart.load_state_dict(merged_state(lora, "x", torch.float32))
    torch.testing.assert_close(logits(apart), wanted, rtol=1e-4, atol=1e-5)
    save(lora, "x", tmp_path, "base")
    again = reloaded("gpt2", tmp_path)[1]
    torch.testing.assert_close(again, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"rank_pattern": {"layers.0.self_attn.q_proj": 5}}, {"alpha_pattern": {"q_proj": 18}}]
)
def test_what_most_layers_have_is_the_alpha_and_the_others_are_named(options: dict, tmp_path: Path) -> None:
    """The first layer is an odd one; the update is what it was, and so is what the settings say of it."""
    asked = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj"], **options)
    theirs = peft.get_peft_model(causal("llama"), asked)
    moved(tensor for tensor in theirs.parameters() if tensor.requires_grad)
    theirs.save_pretrained(tmp_path)
    lora = LoRA(causal("llama"))
    load(lora, tmp_path, "x")
    spec = lora.specs["x"]
    assert isinstance(spec, LoraSpec) and (spec.rank, spec.alpha) == (3, 6.0)
    odd = [f"model.layers.{number}.self_attn.q_proj" for number in range(1 if "rank_pattern" in options else 2)]
    assert list(spec.alpha_pattern) == odd and list(spec.rank_pattern) == odd * ("rank_pattern" in options)
    for one in lora.delta("x"):
        layer = theirs.base_model.model.get_submodule(one.layer)
        torch.testing.assert_close(one.dense(), layer.get_delta_weight("default"))


@pytest.mark.parametrize(
    ("spec", "good"),
    [
        (LoraSpec(rank=3), True),
        (LoraSpec(rank=3, variant="lora+"), True),
        (LoraSpec(rank=3, variant="rslora"), False),
        (LoraSpec(rank=3, variant="dora"), False),
        (LoraSpec(rank=3, rank_pattern={"attn.q": 2}), False),
    ],
)
def test_plain_is_what_a_loader_computes_that_knows_alpha_and_the_rank_of_a_tensor(
    spec: LoraSpec, good: bool, tmp_path: Path
) -> None:
    lora, _ = trained("llama", spec)
    save(lora, "x", tmp_path, "base")
    assert adapters.plain(tmp_path) == good
    if spec.variant == "dora":  # its magnitude lies beside the factors
        return
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    same = []
    for one in lora.delta("x"):
        A, B = (tensors[f"base_model.model.{one.layer}.lora_{side}.weight"] for side in "AB")
        same.append(torch.allclose(config["lora_alpha"] / len(A) * B @ A, one.dense(), atol=1e-6))
    assert all(same) == good
