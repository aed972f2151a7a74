"""Folding an adapter into the base weights: W = W0 + scale · B A (paper section 4.1, no added latency).

In place only inside `merged()`, which keeps W0 and copies it back, because subtracting B A again would drift.
For export the sum is made in fp32 and rounded once, and `rounding` says what that changed. Bottlenecks and virtual
tokens have no weight to go into: that is the latency of the paper's Table 1.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_studio.core.analysis import truncate
from lora_studio.core.baselines import Bias
from lora_studio.core.lora import Factors, LoRA, weight
from lora_studio.core.slot import Copied, LowRank, base_weight
from lora_studio.core.spec import BASELINES, BaselineSpec
from lora_studio.errors import StudioError


@contextmanager
def merged(lora: LoRA, name: str, strength: float = 1.0) -> Iterator[nn.Module]:
    """The model with the adapter folded in; afterwards every weight has its old bits back.

    Raises E_MERGE, E_QUANTISED, and E_TIED when a changed weight also serves elsewhere.
    """
    assert not lora.folded and not lora.in_use, "one adapter at a time is merged in, and none is in use then"
    changes = _changes(lora, name)
    if unties(lora, name):
        message = "This adapter changes the embedding, which the output head shares, and it changes only one of them."
        raise StudioError("E_TIED", message, "Use it unmerged, or export the merged model, which parts the two.")
    own = dict(lora.model.named_parameters(remove_duplicate=False))
    kept: dict[torch.Tensor, torch.Tensor] = {}
    lora.folded = True
    try:
        with torch.no_grad():
            for key, new in changes.items():
                weight = own[key]
                if weight not in kept:  # a tied one comes under each of its names
                    kept[weight] = weight.detach().clone()
                    weight.copy_(_wide(weight) + strength * (new - _wide(weight)))
        yield lora.model
    finally:
        lora.folded = False
        with torch.no_grad():
            for weight, old in kept.items():
                weight.copy_(old)


def merged_state(lora: LoRA, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A state dict with the adapter folded in: summed in fp32, then rounded once to `dtype`. The model is untouched.

    Where a tied weight is changed in one place only, the two are apart afterwards; see `unties`.
    """
    state = {key: value.detach() for key, value in lora.model.state_dict().items()} | _changes(lora, name)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def unties(lora: LoRA, name: str) -> bool:
    """Whether folding in changes one of two parameters that share their storage, and not the other alike."""
    places: dict[int, set[str]] = {}
    for key, tensor in lora.model.named_parameters(remove_duplicate=False):
        places.setdefault(id(tensor), set()).add(key)
    whole = lora.copies(name)  # copied once, so both places change alike
    changed = {f"{one.layer}.weight" for one in lora.delta(name)} | whole.keys()
    return any(len(shared) > 1 and shared & changed and not shared <= whole.keys() for shared in places.values())


def rounding(lora: LoRA, name: str, dtype: torch.dtype) -> dict[str, float]:
    """What rounding to `dtype` does to a merge, by parameter: |rounded - exact| / |update|, Frobenius norms."""
    own = dict(lora.model.named_parameters(remove_duplicate=False))
    errors = {}
    for key, exact in _changes(lora, name).items():
        size = float((exact - own[key]).norm())
        errors[key] = float((exact.to(dtype) - exact).norm()) / size if size else 0.0
    return errors


def combine(lora: LoRA, mix: Mapping[str, float], rank: int | None = None) -> list[Factors]:
    """One adapter that does what a weighted sum of several does: Σ weight · scale · B A, matrix by matrix.

    Without a rank the factors are laid side by side, which is exact and of the summed rank; with one, the sum is
    cut to its best approximation of that rank (truncated SVD). Raises E_COMBINE.
    """
    together: dict[tuple, list[Factors]] = {}
    for name, share in mix.items():
        if isinstance(lora.specs[name], BaselineSpec) or lora.copies(name):
            raise StudioError("E_COMBINE", f"{name} is more than low-rank updates.", "Combine plain LoRA adapters.")
        for one in lora.delta(name):
            if one.magnitude is not None:
                message = f"{name} is a DoRA adapter, whose magnitudes do not add up."
                raise StudioError("E_COMBINE", message, "Combine plain LoRA adapters.")
            key = (one.layer, None if one.rows is None else tuple(one.rows.tolist()))
            together.setdefault(key, []).append(replace(one, B=share * one.scale * one.B, scale=1.0))
    sums = []
    for ones in together.values():
        A, B = torch.cat([one.A for one in ones]), torch.cat([one.B for one in ones], dim=1)
        whole = replace(ones[0], A=A, B=B)
        sums.append(whole if rank is None else truncate(whole, rank))
    return sums


def _changes(lora: LoRA, name: str) -> dict[str, torch.Tensor]:
    """Every parameter that folding in replaces, exact in fp32, by its name in the model. Raises E_MERGE."""
    model = lora.model
    changes = {key: _wide(value) for key, value in lora.copies(name).items()}
    for layer, part in lora.parts(name):
        if isinstance(part, Bias) and getattr(model.get_submodule(layer), "bias", None) is not None:
            changes[f"{layer}.bias"] = _wide(model.get_submodule(layer).bias.detach()) + part.bias.detach()
        elif not isinstance(part, (LowRank, Copied)):
            spec = lora.specs[name]
            label = BASELINES[spec.kind][0] if isinstance(spec, BaselineSpec) else "This method"
            message = f"{label} adds layers of its own; the base weights have no place for them."
            raise StudioError("E_MERGE", message, "Export the adapter, or train LoRA, which merges.")
    for one in lora.delta(name):
        module = model.get_submodule(one.layer)
        key, turned = f"{one.layer}.weight", isinstance(module, (Conv1D, nn.Embedding))
        own = _wide(base_weight(module))
        full = changes.get(key, own.T if turned else own).clone()
        target = full.T if turned else full  # (out, in), a view
        rows = slice(None) if one.rows is None else one.rows
        target[rows] += one.dense(weight(model, one) if one.magnitude is not None else None)
        changes[key] = full
    return changes


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """At least fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
