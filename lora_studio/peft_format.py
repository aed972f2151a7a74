"""The adapter folder on disk in PEFT's layout, both ways, driven by the tensors.

`adapter_model.safetensors` holds base_model.model.<layer>.lora_A.weight (R, in) and .lora_B.weight (out, R);
`adapter_config.json` holds the small, old-stable set of keys that every version reads. An adapter on q and v
of a fused matrix becomes one dense pair: A stacks the slices' factors and B is block-structured, with rank
and alpha multiplied by the number of slices so that the scale stays the same. Which slices they were stands
in the safetensors header, so that our own files come back as they were.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_studio.core.layout import is_linear
from lora_studio.core.lora import Factors, LoRA
from lora_studio.core.spec import VARIANTS, LoraSpec
from lora_studio.errors import StudioError, quote

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")
# What changes the meaning of the tensors in ways that this loader does not carry; falsy values are harmless.
UNSUPPORTED = (
    "use_dora",
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
    "modules_to_save",
    "lora_bias",
    "use_bdlora",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base weights alone


def save(lora: LoRA, name: str, folder: Path, base_model: str) -> None:
    """Write one adapter and read it back; `base_model` is the name a loader should look for."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = lora.delta(name)
    tensors = {}
    for layer, factors in layers.items():
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = factors.A.cpu().contiguous()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = factors.B.cpu().contiguous()
    about = {"format": "pt", "lora_studio": json.dumps({"slices": {layer: one.roles for layer, one in layers.items()}})}
    save_file(tensors, folder / WEIGHTS, metadata=about)
    config = _config(lora, name, layers, base_model)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    written = _read_tensors(folder / WEIGHTS)[0]
    assert written.keys() == tensors.keys() and all(torch.equal(written[key], tensors[key]) for key in tensors)


def load(lora: LoRA, folder: Path, name: str) -> LoraSpec:
    """Attach the adapter in `folder`. Raises E_ADAPTER_FILES, E_PEFT_VARIANT, E_KEYS, E_SHAPE, E_NOT_FINITE."""
    config = _read_config(folder)
    tensors, slices = _read_tensors(folder / WEIGHTS)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if not match:
            raise StudioError(
                "E_KEYS", f"The adapter holds {quote(key)}, which is not a LoRA factor.", "Only LoRA is read."
            )
        pairs.setdefault(match["layer"], {})[match["factor"]] = tensor.float()
    layers = {}
    for layer, pair in pairs.items():
        if set(pair) != {"A", "B"} or pair["A"].dim() != 2 or pair["B"].dim() != 2:
            raise StudioError("E_KEYS", f"{layer} does not have one A and one B.", "The adapter file is incomplete.")
        layers[layer] = _factors(layer, pair["A"], pair["B"], config, tuple(slices.get(layer, ())))
    if not layers:
        raise StudioError("E_KEYS", "The adapter holds no tensors.", "It was saved empty; save it again.")
    spec = _spec(config, layers)
    lora.load_state(name, spec, layers)
    return spec


def _factors(
    layer: str, A: torch.Tensor, B: torch.Tensor, config: Mapping[str, Any], roles: tuple[str, ...]
) -> Factors:
    rank = _patterned(config.get("rank_pattern"), layer, config.get("r", 8))
    if rank != len(A):
        raise StudioError(
            "E_SHAPE",
            f"{layer}: the config says rank {rank}, A has {len(A)} rows.",
            "The two files do not belong together.",
        )
    alpha = _patterned(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    roles = roles if roles and len(A) % len(roles) == 0 else ("",)
    return Factors(A=A, B=B, scale=scale, roles=roles, rank=len(A) // len(roles))


def _config(lora: LoRA, name: str, layers: Mapping[str, Factors], base_model: str) -> dict[str, Any]:
    spec = lora.specs[name]
    ranks = {layer: len(factors.A) for layer, factors in layers.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    power = 0.5 if spec.variant == "rslora" else 1.0
    alphas = {layer: factors.scale * ranks[layer] ** power for layer, factors in layers.items()}
    alpha = next(alphas[layer] for layer in layers if ranks[layer] == rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _tidy(alpha),
        "lora_dropout": spec.dropout,
        "bias": "none",
        "target_modules": _suffixes(lora, set(layers)),
        "modules_to_save": None,
        "fan_in_fan_out": any(type(lora.model.get_submodule(layer)).__name__ == "Conv1D" for layer in layers),
        "init_lora_weights": True,
        "use_rslora": spec.variant == "rslora",
        "use_dora": False,
        "rank_pattern": {re.escape(layer): ranks[layer] for layer in layers if ranks[layer] != rank},
        "alpha_pattern": {
            re.escape(layer): _tidy(alphas[layer]) for layer in layers if not math.isclose(alphas[layer], alpha)
        },
    }


def _tidy(alpha: float) -> float:
    """16.0 as 16, which is what other programs write; anything else unrounded to 12 digits."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else float(f"{alpha:.12g}")


def _suffixes(lora: LoRA, layers: set[str]) -> list[str]:
    """The short names, when they select exactly these layers; else the full ones."""
    short = {layer.rsplit(".", 1)[-1] for layer in layers}
    every = [path for path, module in lora.model.named_modules() if is_linear(module)]
    selected = {path for path in every if path.rsplit(".", 1)[-1] in short}
    return sorted(short if selected == layers else layers)


def _spec(config: Mapping[str, Any], layers: Mapping[str, Factors]) -> LoraSpec:
    """What the adapter is, as nearly as one spec can say it; the factors themselves are exact."""
    first = next(iter(layers.values()))
    variant = "rslora" if config.get("use_rslora") else "lora"
    alpha = first.scale / VARIANTS[variant](1.0, first.rank)
    roles = dict.fromkeys(role for factors in layers.values() for role in factors.roles if role)
    targets = tuple(roles) or tuple(dict.fromkeys(layer.rsplit(".", 1)[-1] for layer in layers))
    return LoraSpec(variant=variant, rank=first.rank, alpha=float(alpha), targets=targets)


def _patterned(pattern: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the name or its ending, read as a regular expression by PEFT.

    Here the keys are compared as text: an escaped dot is a dot. A key with other signs of a pattern is refused.
    """
    for key, value in (pattern or {}).items():
        plain = key.replace("\\", "").removeprefix("^").removesuffix("$")
        if re.search(r"[*+?|()\[\]{}^$]", plain):
            raise StudioError(
                "E_PEFT_VARIANT", f"The pattern {quote(key)} is not a plain layer name.", "Save it with names."
            )
        if layer == plain or layer.endswith(f".{plain}"):
            return value
    return default


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise StudioError(
            "E_ADAPTER_FILES", f"{CONFIG} and {WEIGHTS} must both be there.", "Other formats are not read."
        )
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise StudioError("E_ADAPTER_FILES", f"{CONFIG} is not JSON.", "Copy the adapter again.") from error
    if config.get("peft_type") != "LORA":
        raise StudioError(
            "E_PEFT_VARIANT", f"This adapter is {quote(config.get('peft_type'))}, not LORA.", "Only LoRA is read."
        )
    used = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        used.append("init_lora_weights")
    if used:
        raise StudioError(
            "E_PEFT_VARIANT", f"This adapter uses {', '.join(used)}.", "That cannot be loaded faithfully here."
        )
    return config


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("lora_studio", "{}")
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(about).get("slices", {})  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise StudioError("E_SAFETENSORS", f"{path.name} is damaged: {quote(str(error))}.", "Copy it again.") from error
