"""LoRA(model): plan, add, use, train, read and remove adapters on one frozen base model.

    lora = LoRA(model)
    lora.add("pirate", LoraSpec(rank=8))
    with lora.use("pirate"):                   # every row adapted
        model(**batch).loss.backward()
    with lora.use(None, "pirate"):             # row 0 the base model, row 1 adapted, one batch
        model.generate(**two_rows)

This module knows tensors only: files are adapters', merging is merge's, the paper's other methods are baselines'.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_studio.core.layout import Target, dimensions, drops, experts, is_adaptable, matrices
from lora_studio.core.slot import Before, Copied, InputSlot, LowRank, Part, Route, Slot, base_weight
from lora_studio.core.spec import LoraSpec, Method
from lora_studio.errors import StudioError, quote
from lora_studio.fields import check

Row = str | None | Mapping[str, float]  # one adapter, the base model, or a blend
Parts = dict[str, list[Part]]  # layer -> what an adapter does there; "" is the model itself


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """The update of one matrix, scale · B A; with a magnitude, DoRA's rescaling of its rows as well."""

    layer: str  # dotted name
    role: str
    A: torch.Tensor  # (r, in)
    B: torch.Tensor  # (rows, r)
    scale: float
    rows: torch.Tensor | None = None  # (rows,): where B's rows lie in the layer's output; None for all of them
    magnitude: torch.Tensor | None = None  # (rows,)

    @property
    def rank(self) -> int:
        return len(self.A)

    def dense(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The full (rows, in) update; with a magnitude it depends on the base `weight` (rows, in)."""
        update = self.scale * (self.B @ self.A)
        if self.magnitude is None:
            return update
        assert weight is not None, "a DoRA update depends on the base weight"
        adapted = weight.to(update) + update
        return adapted * (self.magnitude / adapted.norm(dim=1))[:, None] - weight.to(update)


class LoRA:
    """Adapters by name on one base model, whose weights are frozen here and never written."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.requires_grad_(False)
        self.specs: dict[str, Method] = {}
        self._parts: dict[str, Parts] = {}  # by adapter
        self._slots: dict[str, Slot] = {}  # by layer
        self._route = Route()
        self.folded = False  # an adapter is merged into the weights just now
        self._standing = ExitStack()  # of the trained copies that stand in for the base's tensors just now

    # ---- what there is -------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.specs)

    def plan(self, spec: LoraSpec) -> list[Target]:
        """The matrices that `spec` would adapt, in forward order. Raises the E_ codes of `plan`."""
        return plan(self.model, spec)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The trainable parameters of one adapter, in forward order, tied ones once."""
        every = (tensor for _, part in self.parts(name) for tensor in part.parameters() if tensor.requires_grad)
        return list(dict.fromkeys(every))

    def groups(self, name: str, ratio_b: float = 1.0) -> list[dict[str, Any]]:
        """The same for an optimizer: {"params", "ratio"}, the ratio being the share of the learning rate they take.

        ratio_b: how many times faster B learns than A under variant lora+.
        """
        merged: dict[tuple, dict[str, Any]] = {}
        taken: set[nn.Parameter] = set()
        for _, part in self.parts(name):
            for group in part.groups(ratio_b):
                fresh = [tensor for tensor in group.pop("params") if tensor not in taken]
                taken.update(fresh)
                merged.setdefault(tuple(group.items()), {"params": [], **group})["params"] += fresh
        return [group for group in merged.values() if group["params"]]

    def delta(self, name: str) -> list[Factors]:
        """The update of each adapted matrix, detached, in forward order."""
        return [_factors(layer, part) for layer, part in self.parts(name) if isinstance(part, LowRank)]

    def copies(self, name: str) -> dict[str, torch.Tensor]:
        """What was trained whole, detached, by parameter name; a tied tensor under each of its names."""
        return {
            f"{layer}.{parameter}": tensor.detach()
            for layer, part in self.parts(name)
            if isinstance(part, Copied)
            for parameter, tensor in part.tensors.items()
        }

    def parts(self, name: str) -> Iterator[tuple[str, Part]]:
        """(layer, part) of one adapter, in forward order."""
        assert name in self.specs, f"no adapter called {name}"
        for layer, ones in self._parts[name].items():
            for part in ones:
                yield layer, part

    def changed(self, name: str) -> bool:
        """Whether the adapter does anything to the base model."""
        return any(part.changed(self.model.get_submodule(layer)) for layer, part in self.parts(name))

    def finite(self, name: str) -> bool:
        """Whether all its values are numbers."""
        return all(bool(tensor.isfinite().all()) for tensor in self.parameters(name))

    @property
    def in_use(self) -> tuple[str, ...]:
        """The adapters that some row has just now."""
        return self._route.names

    def unreached(self, name: str) -> list[str]:
        """After a backward: layers whose update got no gradient, since the model reads their weight past the layer."""
        parts = [(layer, part) for layer, part in self.parts(name) if isinstance(part, LowRank)]
        return [layer for layer, part in parts if part.B.grad is None]

    def packs(self, name: str) -> bool:
        """Whether sequences may be laid end to end under it; virtual tokens want a row per sequence."""
        return not any(isinstance(part, Before) for _, part in self.parts(name))

    def only_factors(self, name: str) -> bool:
        """Whether it is low-rank factors alone, and nothing is trained whole."""
        return all(isinstance(part, LowRank) for _, part in self.parts(name))

    def draws(self, name: str) -> bool:
        """Whether training it draws random numbers, in the adapter or in the model."""
        return drops(self.model) or any(isinstance(part, LowRank) and part.dropout for _, part in self.parts(name))

    def shares(self, name: str) -> bool:
        """Whether it may train on a span of a row (`use_spans`) and end as if alone: it packs, each of its layers sees
        every token, and nothing in it or in the model draws random numbers.
        """
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        on_head = any(self.model.get_submodule(layer) is head for layer, _ in self.parts(name))
        return self.packs(name) and not self.draws(name) and not on_head

    # ---- adding and removing -------------------------------------------------------------------------------------

    def add(self, name: str, spec: LoraSpec, seed: int = 0) -> list[Target]:
        """Attach a fresh adapter that changes nothing yet; the same seed gives the same A on any device."""
        targets = self.plan(spec)
        parts = low_rank(self.model, spec, targets)
        generator = torch.Generator().manual_seed(seed)
        for layer, ones in parts.items():
            for part in ones:
                assert isinstance(part, LowRank)
                part.reset(self.model.get_submodule(layer), generator)
        self.attach(name, spec, parts | copied(self.model, spec.modules_to_save))
        return targets

    def attach(self, name: str, spec: Method, parts: Parts) -> None:
        """Attach what has been built; every other way of adding ends here."""
        assert name and "." not in name, f"an adapter name is a plain word, got {name!r}"
        assert name not in self.specs, f"adapter {name} exists already"
        assert not self.folded, "an adapter is merged in just now; leave `merged` first"
        self.specs[name], self._parts[name] = spec, parts
        for layer, ones in parts.items():
            if layer not in self._slots:
                self._slots[layer] = (Slot if layer else InputSlot)(self._route)
                self._slots[layer].hook(self.model.get_submodule(layer))
            self._slots[layer].parts[name] = ones

    def load_state(
        self, name: str, spec: LoraSpec, factors: Sequence[Factors], copies: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Attach an adapter with given values. Raises E_KEYS, E_SHAPE or E_NOT_FINITE and then attaches nothing."""
        for one in factors:
            self._check(one)
        order = {target.name: number for number, target in enumerate(matrices(self.model))}
        parts: Parts = {}
        for one in sorted(factors, key=lambda one: order.get(one.layer, len(order))):
            variant = "dora" if one.magnitude is not None else spec.variant if spec.variant != "pissa" else "lora"
            shape = (len(one.B), one.A.shape[1])
            target = Target(name=one.layer, role=one.role, layer=-1, shape=shape, rows=one.rows)
            layer = self.model.get_submodule(one.layer)
            part = LowRank(layer, target, one.rank, one.scale, variant, spec.dropout)
            with torch.no_grad():
                part.A.copy_(one.A)
                part.B.copy_(one.B)
                if part.magnitude is not None and one.magnitude is not None:
                    part.magnitude.copy_(one.magnitude)
            parts.setdefault(one.layer, []).append(part)
        whole = copied(self.model, spec.modules_to_save)
        fill_copies(whole, copies or {})
        self.attach(name, spec, parts | whole)

    def remove(self, name: str) -> None:
        """Forget one adapter; the others keep their bits."""
        assert name in self.specs and name not in self._route.names, f"adapter {name} is not there, or in use"
        del self.specs[name]
        for layer in self._parts.pop(name):
            slot = self._slots[layer]
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
        """Route the batch inside: one entry for all rows, or one per row; no entry at all is the base model.

        Call model.train() before it, and the backward inside it: recomputed activations need the same route.
        """
        mixes = [{row: 1.0} if isinstance(row, str) else dict(row or {}) for row in rows]
        unknown = {name for mix in mixes for name in mix} - set(self.specs)
        assert not unknown, f"no adapter called {sorted(unknown)}"
        names = tuple(name for name in self.specs if any(name in mix for mix in mixes))
        weights = [[mix.get(name, 0.0) for name in names] for mix in mixes] or [[]]
        whole = mixes == [dict.fromkeys(names, 1.0)] and len(names) == 1
        with self._routed(names, weights, whole):
            yield

    @contextmanager
    def use_spans(self, spans: Mapping[str, int]) -> Iterator[None]:
        """Route one row of sequences end to end: the first spans[name] tokens run the first name, and so on.

        For training several adapters in one pass; every adapter must be one that `shares`.
        """
        assert spans.keys() <= self.specs.keys() and all(map(self.packs, spans)), f"cannot be joined: {list(spans)}"
        with self._routed(tuple(spans), [[1.0] * len(spans)], False, tuple(spans.values())):
            yield

    @contextmanager
    def _routed(
        self, names: tuple[str, ...], weights: Sequence[Sequence[float]], whole: bool, spans: tuple[int, ...] = ()
    ) -> Iterator[None]:
        route = self._route
        before = route.names, route.weights, route.strength, route.whole, route.spans
        standing = (part for one in before[0] for _, part in self.parts(one) if isinstance(part, Copied))
        assert not any(part.standing_in for part in standing), "leave the outer `use` first: copies stand in there"
        assert not (names and self.folded), "an adapter is merged in just now; it would act twice"
        device = next(self.model.parameters()).device
        route.names, route.whole, route.spans = names, whole, spans
        route.weights = torch.tensor(weights, device=device)
        route.strength = torch.ones(len(names), device=device)
        route.change()
        try:
            with self._standing:
                if whole:
                    self._stand_in(names[0])
                yield
        finally:
            route.names, route.weights, route.strength, route.whole, route.spans = before
            route.change()

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
        """Change the strength of an adapter in use: an in-place write, live and without recompiling.

        It acts in evaluation mode only; in training the strength is 1. Call it between forwards, not during one.
        """
        self._route.strength[self._route.names.index(name)] = strength
        self._route.change()
        if not self.model.training:
            self._standing.close()  # copies are gated from here on

    def _stand_in(self, name: str) -> None:
        """Put the trained copies of an adapter that has every row in the place of the base's own tensors."""
        for layer, part in self.parts(name):
            if isinstance(part, Copied):
                self._standing.enter_context(part.instead(self.model.get_submodule(layer)))

    def _check(self, one: Factors) -> None:
        known = dict(self.model.named_modules())
        if one.layer not in known or not is_adaptable(known[one.layer]):
            message = f"The adapter has a layer {quote(one.layer)} that this model lacks."
            raise StudioError("E_KEYS", message, "Load its own base.")
        out, width = dimensions(known[one.layer])
        rows = out if one.rows is None else len(one.rows)
        good = one.A.shape[1:] == (width,) and one.B.shape == (rows, len(one.A))
        if not good or (one.magnitude is not None and one.magnitude.shape != (rows,)):
            shapes = f"A is {tuple(one.A.shape)} and B {tuple(one.B.shape)}, the base weight ({rows}, {width})"
            raise StudioError("E_SHAPE", f"{one.layer}: {shapes}.", "This adapter was made for another base model.")
        check_finite(one.layer, *(tensor for tensor in (one.A, one.B, one.magnitude) if tensor is not None))


def plan(model: nn.Module, spec: LoraSpec) -> list[Target]:
    """The matrices of `model` that `spec` would adapt; works on the meta device too.

    Raises E_CONFIG, E_TARGETS, E_LAYERS, E_RANK, E_MOE or E_VARIANT.
    """
    check(spec)
    everything = matrices(model)
    if spec.layers:
        depth = 1 + max(target.layer for target in everything)
        wrong = [layer for layer in spec.layers if not 0 <= layer < depth]
        if wrong:
            message = f"Layer {wrong[0]} does not exist."
            raise StudioError("E_LAYERS", message, f"This model has layers 0 to {depth - 1}.")
    picked = set[int]()
    for wanted in spec.targets:
        _refuse_experts(model, wanted)
        picked.update(_matching(everything, wanted))
    for wanted in (*spec.rank_pattern, *spec.alpha_pattern):
        _matching(everything, wanted)
    kept = [everything[number] for number in sorted(picked)]
    kept = [target for target in kept if not spec.layers or target.layer in (-1, *spec.layers)]
    if not kept:
        raise StudioError("E_TARGETS", "No matrix is selected.", "Choose at least one, for instance attn.q and attn.v.")
    for target in kept:
        rank, most = spec.rank_of(target), min(target.shape)
        if rank > most:
            message = f"Rank {rank} is more than {quote(target.name)} ({target.role}) has: it is {target.shape}."
            raise StudioError("E_RANK", message, f"Give a rank of {most} or less.")
        if target.role == "embed" and spec.variant not in ("lora", "rslora", "lora+"):
            message = f"Variant {spec.variant} is not made for embeddings."
            raise StudioError("E_VARIANT", message, "Take lora, or leave the embedding out.")
    return kept


def low_rank(model: nn.Module, spec: LoraSpec, targets: Sequence[Target]) -> Parts:
    """The parts of `spec` on these matrices, not yet drawn: A and B are zero."""
    parts: Parts = {}
    for target in targets:
        layer = model.get_submodule(target.name)
        rank, scale = spec.rank_of(target), spec.scale_of(target)
        part = LowRank(layer, target, rank, scale, spec.variant, spec.dropout)
        parts.setdefault(target.name, []).append(part)
    return parts


def copied(model: nn.Module, modules: Sequence[str]) -> Parts:
    """fp32 copies of every parameter in the named modules, a tied parameter copied once. Raises E_TARGETS."""
    masters: dict[nn.Parameter, nn.Parameter] = {}
    parts: Parts = {}
    for wanted in modules:
        found = [path for path, _ in model.named_modules() if path == wanted or path.endswith(f".{wanted}")]
        if not found:
            message = f"This model has no module {quote(wanted)} to train whole."
            raise StudioError("E_TARGETS", message, f"It has {', '.join(name for name, _ in model.named_children())}.")
        for top in found:
            for path, module in model.get_submodule(top).named_modules(prefix=top):
                own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
                for tensor in own.values():
                    if not tensor.is_floating_point():
                        message = f"{path} is quantised, and so cannot be trained whole."
                        raise StudioError("E_QUANTISED", message, "Load the base model in bfloat16 or float32.")
                    masters.setdefault(tensor, nn.Parameter(tensor.detach().clone().float()))
                if own:
                    parts[path] = [Copied({name: masters[tensor] for name, tensor in own.items()})]
    return parts


def fill_copies(parts: Parts, values: Mapping[str, torch.Tensor]) -> None:
    """Write saved values into copies, name by name and complete. Raises E_KEYS, E_SHAPE, E_NOT_FINITE."""
    wanted = {
        f"{layer}.{name}": tensor
        for layer, ones in parts.items()
        for part in ones
        if isinstance(part, Copied)
        for name, tensor in part.tensors.items()
    }
    for name in sorted(wanted.keys() ^ values.keys()):
        lacks = "lacks" if name in wanted else "has, and this model does not expect,"
        raise StudioError("E_KEYS", f"The adapter {lacks} the tensor {quote(name)}.", "Load its own base.")
    for name, tensor in wanted.items():
        if tensor.shape != values[name].shape:
            message = f"{name} is {tuple(values[name].shape)} in the adapter and {tuple(tensor.shape)} in this model."
            raise StudioError("E_SHAPE", message, "This adapter was made for another base model.")
        check_finite(name, values[name])
    first: dict[torch.Tensor, str] = {}
    for name, tensor in wanted.items():
        twin = first.setdefault(tensor, name)
        if not torch.equal(values[twin], values[name]):
            message = f"{twin} and {name} are one tensor in this model, and two different ones in the adapter."
            raise StudioError("E_TIED", message, "Save the adapter with one of them.")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(values[name])


def check_finite(name: str, *tensors: torch.Tensor) -> None:
    """Raises E_NOT_FINITE: one bad value would spread to every row, the base's included (0 · inf)."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise StudioError("E_NOT_FINITE", f"{name}: the adapter holds values that are not finite.", "Train it again.")


def weight(model: nn.Module, one: Factors) -> torch.Tensor:
    """(rows, in): the base weight that these factors change, in fp32 at least. Raises E_QUANTISED."""
    full = base_weight(model.get_submodule(one.layer))
    part = full if one.rows is None else full[one.rows]
    return part.to(torch.promote_types(part.dtype, torch.float32))


def _factors(layer: str, part: LowRank) -> Factors:
    A, B = part.factors()
    magnitude = None if part.magnitude is None else part.magnitude.detach()
    return Factors(layer=layer, role=part.role, A=A, B=B, scale=part.scale, rows=part.rows, magnitude=magnitude)


def _matching(everything: Sequence[Target], wanted: str) -> list[int]:
    """Numbers of the matrices that a name means: a role, a dotted name or its ending, all-linear. Raises E_TARGETS."""
    hits = [number for number, target in enumerate(everything) if target.answers_to(wanted)]
    if hits:
        return hits
    roles = list(dict.fromkeys(target.role for target in everything))
    names = list(dict.fromkeys(target.name.rsplit(".", 1)[-1] for target in everything))
    close = difflib.get_close_matches(wanted, roles + names, n=2, cutoff=0.4)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    message = f"No matrix of this model is called {quote(wanted)}."
    raise StudioError("E_TARGETS", message, f"{meant}It has {', '.join(roles)}.")


def _refuse_experts(model: nn.Module, wanted: str) -> None:
    """Mixture-of-experts weights are three-dimensional and routed per token; no slot fits them."""
    found = experts(model)
    named = any(path.endswith(f".{wanted}") or f".{wanted}." in path or path == wanted for path in found)
    if found and (wanted in ("all-linear", "mlp.gate", "mlp.up", "mlp.down") or named):
        message = f"{quote(wanted)} reaches into a mixture of experts ({found[0]})."
        raise StudioError("E_MOE", message, "Experts cannot be adapted here; choose attention matrices.")
