"""The adapter folder: our files in PEFT, PEFT's files here, equal logits both ways; damage refused by name."""

import json
import logging
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError
from lora_studio.peft_format import CONFIG, WEIGHTS, load, save
from tests.tiny import CAUSAL, causal

logging.getLogger("peft").setLevel(logging.ERROR)
IDS = torch.arange(3, 36).view(3, 11)
FUSED = ["gpt2", "gpt_neox", "phi3"]
TARGETS = {"q and v": ("attn.q", "attn.v"), "everything": ("all-linear",), "one layer": ("model.layers.1.mlp.up_proj",)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


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


@pytest.mark.parametrize(
    "kind", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 7}}]
)
def test_peft_adapters_load_here_with_equal_logits(kind: dict, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], **kind)
    theirs = peft.get_peft_model(causal("llama"), config)
    torch.manual_seed(2)
    for name, tensor in theirs.named_parameters():
        if "lora_" in name:
            tensor.data.normal_(0, 0.2)
    theirs.eval().save_pretrained(tmp_path)
    _, ours = reloaded("llama", tmp_path)
    torch.testing.assert_close(ours, logits(theirs), rtol=1e-5, atol=1e-5)


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
    assert all(factors.dense().chunk(3)[1].any() for factors in again.delta("again").values())  # k was trained too


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
            "dora": {"use_dora": True},
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
    **dict.fromkeys(("dora", "ia3", "bias", "pissa", "moe"), "E_PEFT_VARIANT"),
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
    assert fresh.names == () and not any(module._forward_hooks for module in fresh.model.modules())
