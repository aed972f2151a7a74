"""Folding an adapter into the base weights: W = W0 + scale · B A (paper section 4.1, no added latency).

In place only inside `merged()`, which keeps W0 and copies it back, because subtracting B A again would drift.
For export the sum is made in fp32 and rounded once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_studio.core.lora import LoRA


def _sum(lora: LoRA, path: str, delta: torch.Tensor) -> torch.Tensor:
    """The weight of the layer `path` with `delta` (out, in) folded in, in fp32 and in the layer's own layout."""
    layer = lora.model.get_submodule(path)
    return layer.weight.detach().float() + _update(layer, delta)


def _update(layer: nn.Module, delta: torch.Tensor) -> torch.Tensor:
    """`delta` (out, in) in the layout of the layer's own weight."""
    return delta.T if isinstance(layer, Conv1D) else delta


@contextmanager
def merged(lora: LoRA, name: str, strength: float = 1.0) -> Iterator[nn.Module]:
    """The model with the adapter folded in; afterwards every weight has its old bits back."""
    kept: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for path, factors in lora.delta(name).items():
                layer = lora.model.get_submodule(path)
                kept[path] = layer.weight.detach().clone()
                layer.weight.copy_(layer.weight.float() + strength * _update(layer, factors.dense()))
        yield lora.model
    finally:
        with torch.no_grad():
            for path, weight in kept.items():
                lora.model.get_submodule(path).weight.copy_(weight)


def merged_state(lora: LoRA, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A state dict with the adapter folded in: summed in fp32, then rounded once to `dtype`. The model is untouched."""
    state = {key: value.detach() for key, value in lora.model.state_dict().items()}
    for path, factors in lora.delta(name).items():
        state[f"{path}.weight"] = _sum(lora, path, factors.dense())
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def rounding_error(lora: LoRA, name: str, dtype: torch.dtype) -> float:
    """What rounding to `dtype` does to a merge: max over layers of |rounded - exact| / |update|, Frobenius norms."""
    worst = 0.0
    for path, factors in lora.delta(name).items():
        delta = factors.dense()
        exact = _sum(lora, path, delta)
        changed, size = float((exact.to(dtype).float() - exact).norm()), float(delta.norm())
        worst = max(worst, changed / size if size else 0.0)
    return worst
