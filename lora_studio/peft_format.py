"""A LoRA adapter on disk in PEFT's layout, both ways, driven by the tensors.

`adapter_model.safetensors` holds, behind base_model.model.<layer>., lora_A.weight (R, in) and lora_B.weight
(out, R), lora_embedding_A (r, vocabulary) and lora_embedding_B (dim, r), and lora_magnitude_vector (out,) for
DoRA; what was trained whole stands under its own name. `adapter_config.json` holds the small, old-stable set of
keys that every version reads.

An adapter on q and v of a fused matrix becomes one dense pair: A stacks the slices' factors and B is
block-structured. Which slices they were stands in the safetensors header, so that our own files come back as they
were. One scale, alpha / r, holds for every layer of a file: what differs is folded into B, because some loaders
look at no pattern.

Only these two files are ever opened, and the base that they name is shown, never loaded.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_studio.core.layout import dimensions, heads, is_adaptable, matrices
from lora_studio.core.lora import Factors, LoRA, check_finite
from lora_studio.core.slot import base_weight
from lora_studio.core.spec import VARIANTS, LoraSpec
from lora_studio.errors import StudioError, quote

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PICKLE = "adapter_model.bin"
CONFIG_BYTES, WEIGHTS_BYTES = 2**20, 4 * 2**30
MOST_RANK = 65_536  # of a sum of adapters, too
FLOATS = ("F64", "F32", "F16", "BF16")  # what factors are stored in
KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<kind>A\.weight|B\.weight|embedding_A|embedding_B|magnitude_vector)")
NAMES = {  # in the file -> which factor
    **{"A.weight": "A", "embedding_A": "A", "B.weight": "B", "embedding_B": "B"},
    "magnitude_vector": "magnitude",
}
BASE_COPY = ".base_layer.weight"  # PEFT puts the base's embedding beside an update of it
# What changes the meaning of the tensors in ways that this loader does not carry; falsy values are harmless.
UNSUPPORTED = (
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
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
PORTABLE_HEADS = {"classifier", "score"}  # trained whole, and vLLM takes them


def save(lora: LoRA, name: str, folder: Path, base_model: str) -> None:
    """Write one adapter and read it back; `base_model` is the name a loader should look for."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = lora.specs[name]
    assert isinstance(spec, LoraSpec), "PEFT's layout is for LoRA"
    layers = _by_layer(lora.delta(name))
    scales = {layer: _common(ones) for layer, ones in layers.items()}
    scale = _most_common(list(scales.values()))
    scales = {layer: own if math.isclose(own, scale, rel_tol=1e-9) else scale for layer, own in scales.items()}
    tensors = {f"{PREFIX}{key}": value.cpu().clone() for key, value in lora.copies(name).items()}  # tied ones apart
    for layer, ones in layers.items():
        tensors |= _pair(lora.model, layer, ones, scales[layer])
    slices = {layer: {one.role: one.rank for one in ones} for layer, ones in layers.items() if ones[0].role}
    about = {"format": "pt", "lora_studio": json.dumps({"slices": slices, "variant": _plain_variant(spec)})}
    save_file(tensors, folder / WEIGHTS, metadata=about)
    ranks = {layer: sum(one.rank for one in ones) for layer, ones in layers.items()}
    config = _config(lora, spec, ranks, scales, base_model)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    written = _read_tensors(folder / WEIGHTS)[0]
    assert written.keys() == tensors.keys() and all(torch.equal(written[key], tensors[key]) for key in tensors)


def load(lora: LoRA, folder: Path, name: str) -> LoraSpec:
    """Attach the adapter in `folder`, or nothing of it.

    Raises E_ADAPTER_FILES, E_PICKLE, E_TOO_LARGE, E_SAFETENSORS, E_DTYPE, E_PEFT_VARIANT, E_RANK, E_BASE, E_KEYS,
    E_SHAPE and E_NOT_FINITE.
    """
    config = read_config(folder)
    tensors, about = _read_tensors(folder / WEIGHTS)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    copies: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        inner = key.removeprefix(PREFIX)
        if inner.endswith(BASE_COPY) and _is_the_bases(lora.model, inner.removesuffix(BASE_COPY), tensor):
            continue
        match = KEY.fullmatch(inner.removesuffix(".weight") if "magnitude" in inner else inner)
        if not key.startswith(PREFIX) or (not match and not _saved_whole(inner, config)):
            message = f"The adapter holds {quote(key)}, which is neither a LoRA factor nor a module saved whole."
            raise StudioError("E_KEYS", message, "Only LoRA is read.")
        if match:
            layers.setdefault(match["layer"], {})[NAMES[match["kind"]]] = tensor.float()
        else:
            copies[inner] = tensor.float()
    if not layers:
        raise StudioError("E_KEYS", "The adapter holds no LoRA factors.", "It was saved empty; save it again.")
    _check_base(lora.model, layers, config)
    factors = []
    for layer, parts in layers.items():
        slices = about.get("slices")
        factors += _factors(lora.model, layer, parts, config, slices.get(layer) if isinstance(slices, dict) else None)
    saved = [module for module in config.get("modules_to_save") or () if any(_within(key, module) for key in copies)]
    spec = replace(_spec(config, about, factors), modules_to_save=tuple(saved))
    lora.load_state(name, spec, factors, copies)
    return spec


def pairs(folder: Path) -> list[Factors]:
    """Both factors of every layer as they lie in the file, a fused matrix as one; no base is needed.

    Raises as `load` does for files that are damaged or foreign.
    """
    config, (tensors, _) = read_config(folder), _read_tensors(folder / WEIGHTS)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key.removeprefix(PREFIX))
        if match and NAMES[match["kind"]] != "magnitude":
            check_finite(key, tensor)
            layers.setdefault(match["layer"], {})[NAMES[match["kind"]]] = tensor.float()
    return [
        Factors(layer=layer, role="", A=both["A"], B=both["B"], scale=_scale(config, layer, len(both["A"])))
        for layer, both in layers.items()
        if both.keys() == {"A", "B"}
    ]


def portable(folder: Path) -> tuple[bool, str]:
    """Whether vLLM takes the adapter in `folder` too, and why not."""
    config = read_config(folder)
    tensors, _ = _read_tensors(folder / WEIGHTS)
    if config.get("use_dora"):
        return False, "It is DoRA, which vLLM does not load."
    if foreign := set(config.get("modules_to_save") or ()) - PORTABLE_HEADS:
        return False, f"It carries the module {min(foreign)}, trained whole, which vLLM does not load."
    if any("lora_embedding_" in key for key in tensors):
        return False, "It adapts the embedding, which vLLM does not do for every model."
    power = 0.5 if config.get("use_rslora") else 1.0
    common = config["lora_alpha"] / config["r"] ** power
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            alpha = _patterned(config["alpha_pattern"], layer, config["lora_alpha"])
            if not math.isclose(alpha / len(A) ** power, common, rel_tol=1e-9):
                return False, f"{layer} has a scale of its own, and vLLM takes one for all."
    return True, "PEFT, vLLM and others load it as it is."


# ---- writing ---------------------------------------------------------------------------------------------------------


def _by_layer(factors: Sequence[Factors]) -> dict[str, list[Factors]]:
    layers: dict[str, list[Factors]] = {}
    for one in factors:
        layers.setdefault(one.layer, []).append(one)
    return layers


def _pair(model: Any, layer: str, ones: Sequence[Factors], scale: float) -> dict[str, torch.Tensor]:
    """The tensors of one layer: its slices as one dense pair, in which every product is scaled by `scale`."""
    module = model.get_submodule(layer)
    out, key = dimensions(module)[0], f"{PREFIX}{layer}.lora_"
    B = torch.zeros(out, sum(one.rank for one in ones))
    at = 0
    for one in ones:
        rows = slice(None) if one.rows is None else one.rows.cpu()
        B[rows, at : at + one.rank] = one.B.cpu() if one.scale == scale else one.B.cpu() * (one.scale / scale)
        at += one.rank
    A = torch.cat([one.A.cpu() for one in ones])
    if isinstance(module, nn.Embedding):
        return {f"{key}embedding_A": A, f"{key}embedding_B": B}
    tensors = {f"{key}A.weight": A, f"{key}B.weight": B}
    if any(one.magnitude is not None for one in ones):
        magnitude = _row_norms(module)
        for one in ones:
            magnitude[slice(None) if one.rows is None else one.rows.cpu()] = one.magnitude.cpu()  # type: ignore[union-attr]
        tensors[f"{key}magnitude_vector"] = magnitude
    return tensors


def _row_norms(module: nn.Module, held_in: torch.dtype = torch.float32) -> torch.Tensor:
    """(out,): what DoRA's magnitude is where nothing was trained, on a base held in this dtype."""
    return base_weight(module).to(held_in).float().square().sum(1).sqrt().cpu()


def _plain_variant(spec: LoraSpec) -> str:
    """The variant that the saved factors have; pissa's two pairs are one plain pair of twice the rank."""
    return "lora" if spec.variant == "pissa" else spec.variant


def _common(ones: Sequence[Factors]) -> float:
    return _most_common([one.scale for one in ones])


def _most_common(values: Sequence[Any]) -> Any:
    """The first of those that occur most often."""
    return max(dict.fromkeys(values), key=values.count)


def _config(
    lora: LoRA, spec: LoraSpec, ranks: Mapping[str, int], scales: Mapping[str, float], base_model: str
) -> dict[str, Any]:
    rank = _most_common(list(ranks.values()))
    power = 0.5 if spec.variant == "rslora" else 1.0
    alphas = {layer: _tidy(scales[layer] * ranks[layer] ** power) for layer in ranks}
    odd = [layer for layer in ranks if ranks[layer] != rank]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads(lora.model) else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": next(alphas[layer] for layer in ranks if ranks[layer] == rank),
        "lora_dropout": spec.dropout,
        "bias": "none",
        "target_modules": _suffixes(lora, set(ranks)),
        "modules_to_save": list(spec.modules_to_save) or None,
        "fan_in_fan_out": any(isinstance(lora.model.get_submodule(layer), Conv1D) for layer in ranks),
        "init_lora_weights": True,
        "use_rslora": spec.variant == "rslora",
        "use_dora": spec.variant == "dora",
        "rank_pattern": {re.escape(layer): ranks[layer] for layer in odd},
        "alpha_pattern": {re.escape(layer): alphas[layer] for layer in odd},
    }


def _tidy(alpha: float) -> float:
    """16.0 as 16, which is what other programs write; anything else unrounded to 12 digits."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else float(f"{alpha:.12g}")


def _suffixes(lora: LoRA, layers: set[str]) -> list[str]:
    """The short names, when they select exactly these layers; else the full ones."""
    short = {layer.rsplit(".", 1)[-1] for layer in layers}
    every = [path for path, module in lora.model.named_modules() if is_adaptable(module)]
    selected = {path for path in every if path.rsplit(".", 1)[-1] in short}
    return sorted(short if selected == layers else layers)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _check_base(model: Any, layers: Mapping[str, Mapping[str, torch.Tensor]], config: Mapping[str, Any]) -> None:
    """Raise E_BASE where nothing of the adapter fits the model; where something does, what does not is named later."""
    known = dict(model.named_modules())

    def fits(layer: str, parts: Mapping[str, torch.Tensor]) -> bool:
        module = known.get(layer)
        if module is None or not is_adaptable(module):
            return False
        out, width = dimensions(module)
        A, B = parts.get("A"), parts.get("B")
        return A is None or B is None or A.dim() != 2 or (A.shape[1] == width and len(B) == out)

    if not any(fits(layer, parts) for layer, parts in layers.items()):
        ours = Path(getattr(model.config, "name_or_path", "")).name or model.config.model_type
        theirs = quote(config.get("base_model_name_or_path"), 60)
        message = f"No layer of the adapter fits {quote(ours, 60)}; it was made for {theirs}."
        raise StudioError("E_BASE", message, "Choose the base that it was trained on.")


def _factors(
    model: Any, layer: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any], slices: Any
) -> list[Factors]:
    """One layer of the file: its slices, where the header names them and the tensors bear it out, else the whole."""
    if not {"A", "B"} <= parts.keys() or parts["A"].dim() != 2 or parts["B"].dim() != 2:
        raise StudioError("E_KEYS", f"{layer} does not have one A and one B.", "The adapter file is incomplete.")
    A, B, magnitude = parts["A"], parts["B"], parts.get("magnitude")
    if (magnitude is not None) != bool(config.get("use_dora")):
        message = f"{layer} and use_dora in the config do not agree on a magnitude."
        raise StudioError("E_KEYS", message, "The two files do not belong together.")
    if magnitude is not None and isinstance(dict(model.named_modules()).get(layer), nn.Embedding):
        raise StudioError("E_PEFT_VARIANT", f"{layer} is an embedding under DoRA.", "That cannot be saved again here.")
    rank = _patterned(config["rank_pattern"], layer, config["r"])
    if rank != len(A):
        message = f"{layer}: the config says rank {rank}, A has {len(A)} rows."
        raise StudioError("E_SHAPE", message, "The two files do not belong together.")
    scale = _scale(config, layer, rank)
    own = [target for target in matrices(model) if target.name == layer]
    role = own[0].role if len(own) == 1 else ""
    whole = Factors(layer=layer, role=role, A=A, B=B, scale=scale, magnitude=magnitude)
    return _sliced(model, whole, slices, own) or [whole]


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """What the product of a layer's factors is multiplied with."""
    alpha = _patterned(config["alpha_pattern"], layer, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _sliced(model: Any, whole: Factors, slices: Any, own: Sequence[Any]) -> list[Factors]:
    """The slices that `whole` is made of; none when training elsewhere has filled its zero blocks."""
    if isinstance(slices, list):  # of equal rank, as older files say
        slices = {str(role): len(whole.A) // max(1, len(slices)) for role in slices}
    if not isinstance(slices, dict) or not all(type(rank) is int and rank > 0 for rank in slices.values()):
        return []
    rows_of = {target.role: target.rows for target in own if target.rows is not None}
    if not slices or not slices.keys() <= rows_of.keys() or sum(slices.values()) != len(whole.A):
        return []
    if whole.magnitude is not None and len(whole.magnitude) != len(whole.B):
        return []
    found, at = [], 0
    left, untouched = whole.B.clone(), torch.ones(len(whole.B), dtype=torch.bool)
    if len(whole.B) != dimensions(model.get_submodule(whole.layer))[0]:
        return []
    for role, rank in slices.items():
        rows, span = rows_of[role], slice(at, at + rank)
        magnitude = None if whole.magnitude is None else whole.magnitude[rows]
        part = replace(whole, role=role, A=whole.A[span], B=whole.B[rows, span], rows=rows, magnitude=magnitude)
        found.append(part)
        left[rows, span] = 0
        untouched[rows] = False
        at += rank
    if left.any():
        return []
    if whole.magnitude is not None:
        layer, kept = model.get_submodule(whole.layer), whole.magnitude[untouched]
        norms = (_row_norms(layer, dtype)[untouched] for dtype in (torch.float32, torch.bfloat16, torch.float16))
        if not any(torch.allclose(kept, norm, rtol=1e-6) for norm in norms):  # of the base as it was trained on
            return []
    return found


def _is_the_bases(model: Any, layer: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is just the base's own weight; another one would silently be lost."""
    known = dict(model.named_modules())
    own = getattr(known.get(layer), "weight", None)
    return own is not None and own.shape == tensor.shape and torch.equal(own.detach().cpu(), tensor.to(own.dtype))


def _saved_whole(key: str, config: Mapping[str, Any]) -> bool:
    return any(_within(key, module) for module in config.get("modules_to_save") or ())


def _within(key: str, module: str) -> bool:
    """Whether a parameter's name lies in a module named by its ending."""
    return f".{key}".rpartition(f".{module}.")[1] != ""


def _spec(config: Mapping[str, Any], about: Mapping[str, Any], factors: Sequence[Factors]) -> LoraSpec:
    """What the adapter is, as nearly as one spec can say it; the factors themselves are exact."""
    variant = "rslora" if config.get("use_rslora") else "dora" if config.get("use_dora") else "lora"
    if config.get("use_dora") or about.get("variant") in ("lora-fa", "lora+"):
        variant = str(about.get("variant") or "dora")
    ranks = [one.rank for one in factors]
    rank = _most_common(ranks)
    scale = _most_common([one.scale for one in factors if one.rank == rank])
    roles = dict.fromkeys(one.role or one.layer for one in factors)
    odd = {one.layer: one for one in factors if (one.rank, one.scale) != (rank, scale)}
    return LoraSpec(
        variant=variant,
        rank=rank,
        alpha=float(scale / VARIANTS[variant](1.0, rank)),
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=tuple(roles),
        rank_pattern={layer: one.rank for layer, one in odd.items() if one.rank != rank},
        alpha_pattern={layer: one.scale / VARIANTS[variant](1.0, one.rank) for layer, one in odd.items()},
    )


def _patterned(pattern: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the name or its ending, read as a regular expression by PEFT.

    Here the keys are compared as text: an escaped dot is a dot. A key with other signs of a pattern is refused.
    """
    for key, value in (pattern or {}).items():
        if re.search(r"\\[A-Za-z0-9]", key):
            raise StudioError("E_PEFT_VARIANT", f"The pattern {quote(key)} is not a plain name.", "Save it with names.")
        plain = key.replace("\\", "").removeprefix("^").removesuffix("$")
        if re.search(r"[*+?|()\[\]{}^$]", plain):
            raise StudioError(
                "E_PEFT_VARIANT", f"The pattern {quote(key)} is not a plain layer name.", "Save it with names."
            )
        if layer == plain or layer.endswith(f".{plain}"):
            return value
    return default


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json with PEFT's defaults. Raises E_PICKLE, E_ADAPTER_FILES, E_PEFT_VARIANT and E_RANK."""
    if (folder / PICKLE).is_file() and not (folder / WEIGHTS).is_file():
        message = f"The adapter is in {PICKLE}, which may run code when it is opened."
        raise StudioError("E_PICKLE", message, f"Save it as {WEIGHTS}, where you trust it.")
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise StudioError(
            "E_ADAPTER_FILES", f"{CONFIG} and {WEIGHTS} must both be there.", "Other formats are not read."
        )
    if (folder / CONFIG).stat().st_size > CONFIG_BYTES:
        raise StudioError("E_ADAPTER_FILES", f"{CONFIG} is too large to be one.", "Copy the adapter again.")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (ValueError, RecursionError) as error:
        raise StudioError("E_ADAPTER_FILES", f"{CONFIG} is not JSON.", "Copy the adapter again.") from error
    if not isinstance(config, dict):
        raise StudioError("E_ADAPTER_FILES", f"{CONFIG} is not an object.", "Copy the adapter again.")
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
    return _checked(config)


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    """The config with PEFT's defaults for what is missing. Raises E_ADAPTER_FILES for values that mean nothing."""
    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}
    full = {**config, **{key: value for key, value in defaults.items() if config.get(key) is None}}
    modules = full.get("modules_to_save") or []
    good = {
        "r": _is_number(full["r"], whole=True),
        "lora_alpha": _is_number(full["lora_alpha"]),
        "lora_dropout": full["lora_dropout"] == 0 or (_is_number(full["lora_dropout"]) and full["lora_dropout"] < 1),
        "rank_pattern": _is_pattern(full["rank_pattern"], whole=True),
        "alpha_pattern": _is_pattern(full["alpha_pattern"]),
        "modules_to_save": isinstance(modules, list) and all(isinstance(module, str) for module in modules),
    }
    wrong = [key for key, fine in good.items() if not fine]
    if wrong:
        message = f"{wrong[0]} in {CONFIG} is {quote(full[wrong[0]])}."
        raise StudioError("E_ADAPTER_FILES", message, "The file was damaged or made by hand; save the adapter again.")
    rank = max(full["r"], *full["rank_pattern"].values(), 1)
    if rank > MOST_RANK:
        raise StudioError("E_RANK", f"The adapter says rank {rank:,}; at most {MOST_RANK:,} is read.", "Save it anew.")
    return full


def _is_number(value: Any, whole: bool = False) -> bool:
    """A finite number above 0."""
    return type(value) in ((int,) if whole else (int, float)) and math.isfinite(value) and value > 0


def _is_pattern(value: Any, whole: bool = False) -> bool:
    return isinstance(value, dict) and all(_is_number(number, whole) for number in value.values())


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor of a file and our header in it; none is read before all are found to be plain numbers."""
    check_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("lora_studio", "{}")
            for key in file.keys():  # noqa: SIM118
                if (kind := file.get_slice(key).get_dtype()) not in FLOATS:
                    message = f"{quote(key)} is stored as {kind}; expected one of {', '.join(FLOATS)}."
                    raise StudioError("E_DTYPE", message, "Save the adapter in bfloat16 or float32.")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StudioError("E_SAFETENSORS", f"{path.name} is damaged: {quote(str(error))}.", "Copy it again.") from error
    try:
        header = json.loads(about)
    except (ValueError, RecursionError):
        header = {}  # another program's; without it slices come back as whole matrices
    return tensors, header if isinstance(header, dict) else {}


def check_size(path: Path) -> None:
    """Raise E_TOO_LARGE for a file that is larger than any adapter."""
    size = path.stat().st_size
    if size > WEIGHTS_BYTES:
        message = f"{path.name} has {size / 2**30:.1f} GiB; an adapter has at most {WEIGHTS_BYTES / 2**30:.0f}."
        raise StudioError("E_TOO_LARGE", message, "Give an adapter, not a whole model.")
