"""LoRA(model): plan, add, use, train, read and remove adapters on one frozen base model.

    lora = LoRA(model)
    lora.add("pirate", LoraSpec(rank=8))
    with lora.use("pirate"):                   # every row adapted
        model(**batch).loss.backward()
    with lora.use(None, "pirate"):             # row 0 the base model, row 1 adapted, one batch
        model.generate(**two_rows)

This module knows tensors only: files are peft_format's, merging is merge's.
"""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_studio.core.layout import Target, dimensions, is_linear, matrices
from lora_studio.core.slot import Part, Route, Slot
from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError, quote
from lora_studio.fields import check

Row = str | None | Mapping[str, float]  # one adapter, the base model, or a blend


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The update of one layer, scale · B A, with B dense."""

    A: torch.Tensor  # (R, in)
    B: torch.Tensor  # (out, R)
    scale: float
    roles: tuple[str, ...]  # the slices in A's row blocks; one empty role when the layer is unsliced
    rank: int  # of one slice; R = len(roles) · rank

    def dense(self) -> torch.Tensor:
        """The full (out, in) update."""
        return self.scale * (self.B @ self.A)


class LoRA:
    """Adapters by name on one base model, whose weights are frozen here and never written."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.requires_grad_(False)
        self.specs: dict[str, LoraSpec] = {}
        self._slots: dict[str, Slot] = {}
        self._route = Route()

    # ---- what there is -------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.specs)

    def plan(self, spec: LoraSpec) -> list[Target]:
        """The matrices that `spec` would adapt, in forward order. Raises E_TARGETS, E_LAYERS or E_CONFIG."""
        return plan(self.model, spec)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """A and B of every layer of one adapter, in forward order."""
        return [tensor for _, part in self._parts(name) for tensor in (part.A, part.B)]

    def delta(self, name: str) -> dict[str, Factors]:
        """The update of each adapted layer, detached, by layer name."""
        return {
            layer: Factors(
                A=part.A.detach(), B=part.dense_B().detach(), scale=part.scale, roles=part.roles, rank=part.rank
            )
            for layer, part in self._parts(name)
        }

    # ---- adding and removing -------------------------------------------------------------------------------------

    def add(self, name: str, spec: LoraSpec, seed: int = 0) -> list[Target]:
        """Attach a fresh adapter that changes nothing yet; the same seed gives the same A on any device."""
        targets = self.plan(spec)
        self._claim(name, spec)
        generator = torch.Generator().manual_seed(seed)
        for layer, slices in _by_layer(targets).items():
            self._put(name, layer, slices, spec.rank, spec.scale, spec.dropout).reset(generator)
        return targets

    def load_state(self, name: str, spec: LoraSpec, layers: Mapping[str, Factors]) -> None:
        """Attach an adapter with given factors. Raises E_KEYS, E_SHAPE or E_NOT_FINITE and then attaches nothing."""
        known = {layer: module for layer, module in self.model.named_modules() if is_linear(module)}
        for layer, factors in layers.items():
            _check_factors(layer, factors, known)
        matrices_of = _by_layer(matrices(self.model))
        self._claim(name, spec)
        for layer, factors in layers.items():
            slices = [target for target in matrices_of.get(layer, []) if target.role in factors.roles]
            module = self.model.get_submodule(layer)
            if len(slices) != len(factors.roles) or not _holds(Part(module, slices, factors.rank, 1.0), factors.B):
                out, width = dimensions(module)
                slices = [Target(name=layer, role="", layer=-1, shape=(out, width))]
            part = self._put(name, layer, slices, len(factors.A) // len(slices), factors.scale, spec.dropout)
            with torch.no_grad():
                part.A.copy_(factors.A)
                part.B.copy_(part.compact_B(factors.B.to(part.B)))

    def remove(self, name: str) -> None:
        """Forget one adapter; the others keep their bits."""
        assert name in self.specs and name not in self._route.names, f"adapter {name} is not there, or in use"
        del self.specs[name]
        for layer, slot in list(self._slots.items()):
            if name in slot.parts:
                del slot.parts[name]
            if not slot.parts:
                slot.unhook()
                del self._slots[layer]

    def detach(self) -> nn.Module:
        """The model as it was before: every adapter and hook gone, gradients still off."""
        for name in self.names:
            self.remove(name)
        return self.model

    # ---- using ---------------------------------------------------------------------------------------------------

    @contextmanager
    def use(self, *rows: Row) -> Iterator[None]:
        """Route the batch inside: one entry for all rows, or one per row; no entry at all is the base model."""
        before = self._route.names, self._route.weights, self._route.strength
        mixes = [{row: 1.0} if isinstance(row, str) else dict(row or {}) for row in rows]
        names = tuple(name for name in self.specs if any(name in mix for mix in mixes))
        unknown = {name for mix in mixes for name in mix} - set(self.specs)
        assert not unknown, f"no adapter called {sorted(unknown)}"
        device = next(self.model.parameters()).device
        weights = [[mix.get(name, 0.0) for name in names] for mix in mixes] or [[]]
        self._route.names = names
        self._route.weights = torch.tensor(weights, device=device)
        self._route.strength = torch.ones(len(names), device=device)
        try:
            yield
        finally:
            self._route.names, self._route.weights, self._route.strength = before

    @contextmanager
    def unhooked(self) -> Iterator[None]:
        """The model without any of our hooks: the untouched base, to check the base rows against."""
        for slot in self._slots.values():
            slot.unhook()
        try:
            yield
        finally:
            for path, slot in self._slots.items():
                slot.hook(self.model.get_submodule(path))

    def set_scale(self, name: str, strength: float) -> None:
        """Change the strength of an adapter in use: an in-place write, live and without recompiling."""
        self._route.strength[self._route.names.index(name)] = strength

    # ---- inside --------------------------------------------------------------------------------------------------

    def _parts(self, name: str) -> Iterator[tuple[str, Part]]:
        assert name in self.specs, f"no adapter called {name}"
        for layer, slot in self._slots.items():
            if name in slot.parts:
                yield layer, slot.parts[name]

    def _claim(self, name: str, spec: LoraSpec) -> None:
        assert name and "." not in name, f"an adapter name is a plain word, got {name!r}"
        assert name not in self.specs, f"adapter {name} exists already"
        self.specs[name] = spec

    def _put(self, name: str, layer: str, slices: list[Target], rank: int, scale: float, dropout: float) -> Part:
        module = self.model.get_submodule(layer)
        if layer not in self._slots:
            self._slots[layer] = Slot(self._route)
            self._slots[layer].hook(module)
        part = Part(module, slices, rank, scale, dropout)
        self._slots[layer].parts[name] = part
        return part


def plan(model: nn.Module, spec: LoraSpec) -> list[Target]:
    """The matrices of `model` that `spec` would adapt; works on the meta device too. See LoRA.plan."""
    check(spec)
    everything = matrices(model)
    if spec.layers:
        depth = 1 + max(target.layer for target in everything)
        wrong = [layer for layer in spec.layers if not 0 <= layer < depth]
        if wrong:
            raise StudioError(
                "E_LAYERS", f"Layer {wrong[0]} does not exist.", f"This model has layers 0 to {depth - 1}."
            )
    chosen: dict[tuple[str, str], Target] = {}
    for wanted in spec.targets:
        hits = _matching(everything, wanted)
        if not hits:
            raise _no_match(everything, wanted)
        chosen.update({(hit.name, hit.role): hit for hit in hits})
    order = {(target.name, target.role): number for number, target in enumerate(everything)}
    picked = [chosen[key] for key in sorted(chosen, key=order.__getitem__)]
    kept = [target for target in picked if not spec.layers or target.layer in spec.layers]
    if not kept:
        raise StudioError("E_TARGETS", "No matrix is selected.", "Choose at least one, for instance attn.q and attn.v.")
    return kept


def _matching(everything: list[Target], wanted: str) -> list[Target]:
    """By role, by dotted name or its ending (then every slice of that layer), or all of them."""
    return [
        target
        for target in everything
        if wanted in ("all-linear", target.role) or target.name == wanted or target.name.endswith(f".{wanted}")
    ]


def _no_match(everything: list[Target], wanted: str) -> StudioError:
    roles = list(dict.fromkeys(target.role for target in everything))
    names = list(dict.fromkeys(target.name.rsplit(".", 1)[-1] for target in everything))
    close = difflib.get_close_matches(wanted, roles + names, n=2, cutoff=0.4)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    return StudioError(
        "E_TARGETS", f"No matrix of this model is called {quote(wanted)}.", f"{meant}It has {', '.join(roles)}."
    )


def _by_layer(targets: list[Target]) -> dict[str, list[Target]]:
    layers: dict[str, list[Target]] = {}
    for target in targets:
        layers.setdefault(target.name, []).append(target)
    return layers


def _holds(part: Part, dense: torch.Tensor) -> bool:
    """Whether these slices carry all of a dense B; training in another program may have filled its zero blocks."""
    if part.A.shape[0] != dense.shape[1]:
        return False
    with torch.no_grad():
        part.B.copy_(part.compact_B(dense.to(part.B)))
        return torch.equal(part.dense_B(), dense.to(part.B))


def _check_factors(layer: str, factors: Factors, known: Mapping[str, nn.Module]) -> None:
    if layer not in known:
        raise StudioError(
            "E_KEYS", f"The adapter has a layer {quote(layer)} that this model lacks.", "Load its own base."
        )
    out, width = dimensions(known[layer])
    if factors.A.shape[1:] != (width,) or factors.B.shape != (out, len(factors.A)):
        raise StudioError(
            "E_SHAPE",
            f"{layer}: A is {tuple(factors.A.shape)} and B {tuple(factors.B.shape)}, the base weight ({out}, {width}).",
            "This adapter was made for another base model.",
        )
    if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
        raise StudioError("E_NOT_FINITE", f"{layer}: the adapter holds values that are not finite.", "Train it again.")
