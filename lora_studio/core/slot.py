"""What adds adapters to one layer as it computes, and the gate that says whose rows get how much.

    y = base(x) + scale · ((x Aᵀ) ⊙ g) Bᵀ

A (R, in) and B (out, R) stack the factors of the adapters in use, R the sum of their ranks; g holds the row
weight per column. So g = 0 is the base model bit for bit, rows of one batch may
carry different adapters or blends, and a strength slider is a write into a tensor. The base weight is never written.

What one adapter does to one layer is a Part: LowRank here, Copied here for modules that are trained whole, and
those of the paper's other methods in baselines. A part answers with what it adds to the layer's output.

Masters are fp32; they are cast down to the dtype of x, never x up (casting inputs up and keeping them costs a fifth of
the peak memory and changes no gradient), but for the moment of a product that is quicker in fp32 on a CPU: `Ready`'s,
and those of training for which core.upcast says so.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from lora_studio.core import upcast
from lora_studio.core.layout import Target, dimensions, embedding_scale
from lora_studio.errors import StudioError

FEW = 8  # tokens of a pass up to which a CPU adds fp32 to bf16 faster than it casts, adds and casts back
MANY = 1024  # tokens whose outputs are in fp32 at a time


class Route:
    """Shared by all slots of a model: which adapters are in use and with what weight on which row.

    names     adapters in use; empty means the hooks add nothing at all
    weights   (1 or rows, names): weight of each adapter on each row of the batch
    strength  (names,): the live slider, multiplied onto weights; written in place; training does not see it,
              because recomputed activations would be gated by where the slider has got to in the meantime
    whole     one adapter with weight 1 on every row
    spans     tokens per name, when the batch is one row of sequences end to end and each adapter has some of them;
              empty otherwise
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.weights = torch.empty(1, 0)
        self.strength = torch.empty(0)
        self.whole = False
        self.spans: tuple[int, ...] = ()
        self.ready: set[Slot] = set()  # that have made ready what they add while nothing above changes
        self._kept: dict[tuple, Gates | None] = {}  # the same

    def gates(self, x: torch.Tensor, output: torch.Tensor, training: bool) -> "Gates | None":
        """The gates for a layer with this input and output; None for all ones."""
        if is_compiling():
            return self._made(x, output, training)
        kind = x.shape[0], output.dim(), output.dtype, training, torch.is_inference_mode_enabled()
        if kind not in self._kept:
            self._kept[kind] = self._made(x, output, training)
        return self._kept[kind]

    def _made(self, x: torch.Tensor, output: torch.Tensor, training: bool) -> "Gates | None":
        gate = self.gate(x.shape[0], training)
        if gate is None:
            return None
        return Gates(gate.view(gate.shape[0], *[1] * (output.dim() - 2), -1).to(output.dtype))

    def change(self) -> None:
        """To be called after any of the above was written."""
        for slot in self.ready:
            slot.ready = None
        self.ready.clear()
        self._kept.clear()

    def gate(self, batch: int, training: bool) -> torch.Tensor | None:
        """(1 or batch, names); None for all ones. A row's weight covers its beams, which generate() keeps together."""
        if training and self.whole:
            return None
        weights = self.weights if training else self.weights * self.strength
        if len(weights) == 1 or batch in (1, len(weights)):
            return weights
        assert batch % len(weights) == 0, f"{len(weights)} adapter rows do not divide a batch of {batch}"
        return weights.repeat_interleave(batch // len(weights), dim=0)


class Gates:
    """weights (1 or batch, 1, ..., names): how much of each adapter each row gets, in the dtype of a layer's output."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights
        self._columns: dict[tuple, torch.Tensor] = {}
        self._live: dict[tuple, tuple[slice | None, torch.Tensor]] = {}

    def __len__(self) -> int:
        return self.weights.shape[0]

    def of(self, name: int) -> torch.Tensor:
        """(1 or batch, 1, ..., 1)"""
        return self.weights[..., name : name + 1]

    def columns(self, ranks: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """(1 or batch, 1, ..., R): each name's weight as often as its rank, for (name, rank), ... of one layer."""
        if ranks not in self._columns:
            spans = [self.of(name).expand(*self.weights.shape[:-1], rank) for name, rank in ranks]
            self._columns[ranks] = torch.cat(spans, dim=-1)
        return self._columns[ranks]

    def live(self, ranks: tuple[tuple[int, int], ...]) -> tuple[slice | None, torch.Tensor]:
        """The rows whose columns are not 0, where they lie together, None for all; and these columns, once if alike.

        On a GPU these are all, because it would have to be waited for.
        """
        if ranks not in self._live:
            columns, live = self.columns(ranks), None
            there = columns.flatten(1).any(1).nonzero().flatten().tolist() if columns.device.type == "cpu" else []
            if there and len(there) == 1 + there[-1] - there[0] < len(columns):
                live = slice(there[0], there[-1] + 1)
                columns = columns[live]
            alike = bool(there) and bool((columns == columns[:1]).all())
            self._live[ranks] = live, columns[:1] if alike else columns
        return self._live[ranks]


class Part(nn.Module):
    """What one adapter does to one layer.

    keeps_input, keeps: for its backward the layer's input, and so many elements per token besides.
    """

    keeps_input, keeps = False, 0

    def delta(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's own `output`; the slot gates it."""
        raise NotImplementedError

    def changed(self, layer: nn.Module) -> bool:
        """Whether this part does anything yet."""
        raise NotImplementedError

    def groups(self, ratio_b: float) -> list[dict[str, Any]]:
        """Trainable parameters for the optimizer, with the share of the learning rate that they take."""
        return [{"params": [tensor for tensor in self.parameters() if tensor.requires_grad], "ratio": 1.0}]


class LowRank(Part):
    """scale · B A on one matrix: A (r, in), B (rows, r) for the rows of the layer's output that are adapted.

    variant is a name of spec.VARIANTS; dropout acts on x before A, in training only.
    """

    rows: torch.Tensor | None  # (rows,): where B's rows lie in the layer's output; None for all of them
    squares: torch.Tensor  # (rows,), dora only: ‖W‖² of each row
    start_A: torch.Tensor  # (r, in), pissa only: what A was drawn as; the base already holds this product
    start_B: torch.Tensor

    def __init__(
        self, layer: nn.Module, target: Target, rank: int, scale: float, variant: str = "lora", dropout: float = 0.0
    ) -> None:
        super().__init__()
        rows, width = target.shape
        device = next(layer.parameters()).device
        self.role, self.scale, self.variant, self.dropout = target.role, scale, variant, dropout
        self.keeps_input = variant != "lora-fa" or dropout > 0
        self.keeps = {"lora-fa": rank, "dora": dimensions(layer)[0]}.get(variant, 0)
        self.A = nn.Parameter(torch.zeros(rank, width, device=device), requires_grad=variant != "lora-fa")
        self.B = nn.Parameter(torch.zeros(rows, rank, device=device))
        self.register_buffer("rows", None if target.rows is None else target.rows.to(device), persistent=False)
        self.magnitude: nn.Parameter | None = None
        if variant == "dora":
            self.register_buffer("squares", _squares(self._weight(layer)), persistent=False)  # (rows,) ‖W‖²
            self.magnitude = nn.Parameter(self.squares.sqrt())
            self._norm: tuple[tuple[int, int], torch.Tensor] | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, in) of the adapted matrix."""
        return len(self.B), self.A.shape[1]

    @property
    def stacks(self) -> bool:
        """Whether it is nothing but a product of two factors, which slots stack with those of other adapters."""
        return self.variant not in ("dora", "pissa") and not self.dropout

    def reset(self, layer: nn.Module, generator: torch.Generator) -> None:
        """A as in the authors' code, uniform in ±1/sqrt(in), and B zero, so that training starts at the base model.

        For an embedding the roles are exchanged (A zero, B normal); pissa takes both from W0's singular vectors.
        """
        with torch.no_grad():
            if self.variant == "pissa":
                U, S, Vh = torch.linalg.svd(self._weight(layer).float(), full_matrices=False)
                root = (S[: self.rank] / self.scale).sqrt()
                self.A.copy_(root[:, None] * Vh[: self.rank])
                self.B.copy_(U[:, : self.rank] * root)
                self.register_buffer("start_A", self.A.detach().clone(), persistent=False)
                self.register_buffer("start_B", self.B.detach().clone(), persistent=False)
            elif isinstance(layer, nn.Embedding):
                self.A.zero_()
                self.B.copy_(torch.empty(self.B.shape).normal_(generator=generator))
            else:
                bound = 1 / math.sqrt(self.A.shape[1])
                self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
                self.B.zero_()

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (R, in) and B (rows, R) of the whole update; pissa's is s (B A - B0 A0), of twice the rank."""
        if self.variant != "pissa":
            return self.A.detach(), self.B.detach()
        return torch.cat([self.A.detach(), self.start_A]), torch.cat([self.B.detach(), -self.start_B], dim=1)

    def dense_B(self, out: int, B: torch.Tensor | None = None) -> torch.Tensor:
        """B with a row for each of the layer's `out` outputs: (out, r)."""
        B = self.B if B is None else B
        return B if self.rows is None else B.new_zeros(out, self.rank).index_copy(0, self.rows, B)

    def delta(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        x, out = inputs[0], output.shape[-1]
        added = self._product(layer, x, self.A, self.dense_B(out))
        if self.variant == "pissa":  # the same products in the same order, so that their difference starts at 0 exactly
            added = added - self._product(layer, x, self.start_A, self.dense_B(out, self.start_B))
        if self.magnitude is None:
            return added
        bias: Any = getattr(layer, "bias", None)
        direction = added + (output if bias is None else output - bias)
        stretch = self.magnitude / self.norm(layer) - 1  # (rows,)
        if self.rows is not None:
            stretch = stretch.new_zeros(out).index_copy(0, self.rows, stretch)
        return added + stretch.to(output.dtype) * direction

    def norm(self, layer: nn.Module) -> torch.Tensor:
        """(rows,): ‖W + s B A‖ of each output row, without forming B A, and a constant to the gradient (DoRA, 4.3).

        ‖W‖² + 2s ⟨W Aᵀ, B⟩ + s² ⟨B (A Aᵀ), B⟩. Outside training it is kept until A or B change.
        """
        version = (self.A._version, self.B._version)
        if self._norm and self._norm[0] == version and not layer.training:
            return self._norm[1]
        with torch.no_grad():
            W, A, B, s = self._weight(layer), self.A, self.B, self.scale
            along = upcast.times_transposed(A, W).T if upcast.needed(W) else F.linear(W, A.to(W.dtype))  # (rows, r)
            cross = (along.to(B.dtype) * B).sum(1)
            norm = (self.squares + 2 * s * cross + s * s * ((B @ (A @ A.T)) * B).sum(1)).clamp_min(0).sqrt()
        self._norm = version, norm
        return norm

    def changed(self, layer: nn.Module) -> bool:
        if self.magnitude is not None and not torch.equal(self.magnitude, self.squares.sqrt()):
            return True
        if self.variant == "pissa":
            return not (torch.equal(self.A, self.start_A) and torch.equal(self.B, self.start_B))
        return bool((self.A if isinstance(layer, nn.Embedding) else self.B).any())

    def groups(self, ratio_b: float) -> list[dict[str, Any]]:
        """B learns `ratio_b` times as fast as A under lora+; magnitudes do not decay."""
        groups = [{"params": [self.B], "ratio": ratio_b if self.variant == "lora+" else 1.0}]
        if self.A.requires_grad:
            groups.insert(0, {"params": [self.A], "ratio": 1.0})
        if self.magnitude is not None:
            groups.append({"params": [self.magnitude], "ratio": 1.0, "weight_decay": 0.0})
        return groups

    def _product(self, layer: nn.Module, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """scale · B A x. A dropped x is made again in the backward rather than kept for every layer."""
        if self.dropout and layer.training and not isinstance(layer, nn.Embedding):
            return checkpoint(self._dropped, x, A, B, use_reentrant=False)  # type: ignore[return-value]
        return _product(layer, x, A, B, self.scale)

    def _dropped(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        wide = F.dropout(upcast.widened(x), self.dropout)
        hidden = F.linear(wide, A.to(wide.dtype)) * self.scale
        return F.linear(hidden, B.to(wide.dtype)).to(x.dtype)

    def _weight(self, layer: nn.Module) -> torch.Tensor:
        """(rows, in): the base weight's rows that this part adapts."""
        weight = base_weight(layer)
        return weight if self.rows is None else weight[self.rows]


class Copied(Part):
    """A layer trained whole, on copies of its own parameters: a classifier head, or everything in full fine-tuning.

    While one adapter has every row, the copies stand in place of the base's tensors, which are put aside, not
    written. In a mixed batch the layer is computed a second time with them, and the difference is gated.
    """

    keeps_input = True

    def __init__(self, tensors: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.tensors = nn.ParameterDict(tensors)
        self.standing_in = False

    @contextmanager
    def instead(self, layer: nn.Module) -> Iterator[None]:
        """Inside, the copies are the layer's parameters."""
        own: dict[str, Any] = {name: layer._parameters[name] for name in self.tensors}
        layer._parameters.update({name: tensor.to(own[name].dtype) for name, tensor in self.tensors.items()})
        self.standing_in = True
        try:
            yield
        finally:
            layer._parameters.update(own)
            self.standing_in = False

    def delta(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        with self.instead(layer):
            return type(layer).forward(layer, *inputs) - output

    def changed(self, layer: nn.Module) -> bool:
        own: dict[str, Any] = layer._parameters
        return any(not torch.equal(tensor.to(own[name].dtype), own[name]) for name, tensor in self.tensors.items())


class Slot:
    """All adapters of one layer. It is kept outside the model, which therefore stays as it was.

    ready: what it adds while the model answers, until the route changes; None where that is still to be made.
    """

    def __init__(self, route: Route) -> None:
        self.parts: dict[str, list[Part]] = {}
        self.route = route
        self.ready: Ready | None = None
        self._handle: RemovableHandle | InPlace | None = None

    def hook(self, layer: nn.Module) -> None:
        """Begin to act on `layer`: in place of a linear one's forward, else by a hook, which takes more time."""
        assert self._handle is None, "this slot is hooked already"
        linear = isinstance(layer, nn.Linear)
        self._handle = InPlace(layer, self) if linear else layer.register_forward_hook(self._hooked)

    def unhook(self) -> None:
        """Leave the layer as it was."""
        assert self._handle is not None, "this slot is not hooked"
        self._handle.remove()
        self._handle = None

    def product(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, float] | tuple[()] | None:
        """A, B and scale where all that it does to a layer in training is one product of factors that are trained.

        Empty where it does nothing, None where it does something else.
        """
        parts = [part for name in self.route.names for part in self.parts.get(name, ())]
        if not parts:
            return ()
        one = parts[0]
        if not (self.route.whole and layer.training and len(parts) == 1 and isinstance(one, LowRank)):
            return None
        return (one.A, one.B, one.scale) if one.stacks and one.rows is None and one.A.requires_grad else None

    def _hooked(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        return self.add(layer, inputs[0] if inputs else None, output)

    def add(self, layer: nn.Module, x: Any, output: torch.Tensor) -> torch.Tensor | None:
        """The output of a layer with what the adapters in use add to it for its input x; None where that is nothing."""
        answering = not (layer.training or torch.is_grad_enabled() or is_compiling())
        if answering and self.ready and (changed := self.ready.add(x, output)) is not None:
            return changed
        names, spans = self.route.names, self.route.spans
        live = [
            (column, part)
            for column, name in enumerate(names)
            for part in self.parts.get(name, ())
            if not (type(part) is Copied and part.standing_in)
        ]
        if not live:
            return None
        if x is None or not isinstance(output, torch.Tensor):
            raise _not_by_row(layer)
        if spans:
            flat = output.shape[0] == sum(spans)  # some blocks fold the batch into the tokens
            row, whole = (x[None], output[None]) if flat else (x, output)
            assert whole.shape[:2] == (1, sum(spans)), "the spans are not those of this batch"
            changed = self._by_span(layer, row, whole)
            return changed[0] if flat else changed
        gates = self.route.gates(x, output, layer.training)
        if gates is not None and x.shape[0] == 1 < len(gates) and not isinstance(layer, nn.Embedding):
            raise _not_by_row(layer)
        parts = [(column, part) for column, part in live if isinstance(part, LowRank) and part.stacks]
        if answering and len(parts) == len(live) and not isinstance(layer, nn.Embedding):
            self.ready = Ready(parts, gates, output)
            self.route.ready.add(self)
            return self.ready.add(x, output)
        return _changed(layer, x, output, live, gates)

    def _by_span(self, layer: nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Each adapter changes its own tokens of the row; products of two factors all at once."""
        spans, ones = self.route.spans, [self.parts.get(name, []) for name in self.route.names]
        products = all(isinstance(part, LowRank) and part.stacks for parts in ones for part in parts)
        if products and max(map(len, ones)) == 1 and not isinstance(layer, nn.Embedding):
            factors, scales = [], []
            for part in (parts[0] if parts else None for parts in ones):
                assert part is None or isinstance(part, LowRank)
                factors += [None, None] if part is None else [part.A, part.dense_B(output.shape[-1])]
                scales.append(0.0 if part is None else part.scale)
            return Products.apply(x, output, spans, scales, *factors)  # type: ignore[return-value]
        pieces = zip(ones, x.split(spans, dim=1), output.split(spans, dim=1), strict=True)
        return torch.cat(
            [_changed(layer, one, own, [(0, part) for part in parts]) for parts, one, own in pieces], dim=1
        )


class InPlace:
    """A slot in the place of a linear layer's forward, until it is removed. It does not keep the layer alive.

    own: the forward that was there instead of the class's, such as another library's; it is called, and put back.
    """

    def __init__(self, layer: nn.Module, slot: Slot) -> None:
        self.slot, self.own, self._layer = slot, vars(layer).get("forward"), weakref.ref(layer)
        vars(layer)["forward"] = self

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        layer: Any = self._layer()
        output = type(layer).forward(layer, input) if self.own is None else self.own(input)
        changed = self.slot.add(layer, input, output)
        return output if changed is None else changed

    def remove(self) -> None:
        layer = self._layer()
        if layer is None:
            return
        assert vars(layer)["forward"] is self, "somebody else's forward stands over this one"
        put_back(layer, self.own)

    def __deepcopy__(self, memo: dict[int, Any]) -> "InPlace":
        """For the layer's copy, which is on its way."""
        copy = memo[id(self)] = object.__new__(InPlace)
        copy.slot, copy.own = deepcopy(self.slot, memo), deepcopy(self.own, memo)
        copy._layer = weakref.ref(memo[id(self._layer())])
        return copy


def put_back(layer: nn.Module, own: Callable | None) -> None:
    """Give a layer the forward that it had; None where that was its class's."""
    del vars(layer)["forward"]
    if own is not None:
        vars(layer)["forward"] = own


class Ready:
    """What a slot adds while its model answers, made once and used until the route or a factor changes.

    A (in, R) and B (R, out) of all parts. Rows that get nothing are left out, where the others lie together; the
    weights are in the scale or in B where all of these have the same, else in columns (rows, 1, R). A CPU has them in
    fp32, where such narrow products are quicker than in bf16 for all but very long prompts, and one part's are its own
    and no copies, which would take longer than a prompt's products.
    """

    __slots__ = ("_A", "_B", "_as_of", "_columns", "_dim", "_few", "_live", "_rows", "_scale", "_watched")

    def __init__(self, parts: Sequence[tuple[int, LowRank]], gates: Gates | None, output: torch.Tensor) -> None:
        factors = [factor for _, part in parts for factor in (part.A, part.B)]
        A, B, self._scale = _stack([part for _, part in parts], output.shape[-1])
        A, B = A.detach().T, B.detach().T
        on_cpu = output.device.type == "cpu"
        self._rows, self._dim, self._live, self._columns = None, output.dim(), None, None
        if gates is not None:
            self._rows = len(gates) if len(gates) > 1 else None
            self._live, columns = gates.live(tuple((column, part.rank) for column, part in parts))
            if len(columns) > 1:
                self._columns = columns
            elif len(parts) == 1 and on_cpu and columns.numel():  # some ranks are 0
                self._scale *= float(columns.flatten()[0])
            else:
                B = columns.flatten()[:, None].to(B.dtype) * B
        self._few = FEW * len(A) if on_cpu else 0  # numbers in x
        self._A, self._B = (A, B) if on_cpu else (A.to(output.dtype), B.to(output.dtype))
        views = {self._A.data_ptr(), self._B.data_ptr()} <= {factor.data_ptr() for factor in factors}
        self._watched = () if views else factors
        self._as_of = self._versions()

    def add(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        """output + scale · ((x A) ⊙ columns) B; `output` is written to: it is the layer's own, nobody else's.

        None where the batch is another, or somebody has written to a factor that was copied since.
        """
        if self._rows is not None and (len(x) != self._rows or x.dim() != self._dim):
            return None
        if self._watched and self._as_of != self._versions():
            return None
        y = output = output.contiguous()
        if self._live is not None:
            x, y = x[self._live], y[self._live]
        hidden = x.type_as(self._A) @ self._A  # (batch, ..., R)
        if self._columns is not None:
            hidden.mul_(self._columns)
        if x.numel() <= self._few:
            y.add_(hidden @ self._B, alpha=self._scale)
            return output
        for rows, one in zip(y.flatten(0, -2).split(MANY), hidden.flatten(0, -2).split(MANY), strict=True):
            wide = rows.type_as(one).addmm_(one, self._B, alpha=self._scale)
            if wide is not rows:
                rows.copy_(wide)
        return output

    def _versions(self) -> int:
        return sum(factor._version for factor in self._watched)


def _changed(
    layer: nn.Module,
    x: torch.Tensor,
    output: torch.Tensor,
    parts: Sequence[tuple[int, Part]],
    gates: Gates | None = None,
) -> torch.Tensor:
    """The layer's output with what (column of the gates, part) add to it."""
    stacked = [(column, part) for column, part in parts if isinstance(part, LowRank) and part.stacks]
    changed = _stacked(layer, x, output, stacked, gates) if stacked else output
    for column, part in parts:
        if not (isinstance(part, LowRank) and part.stacks):
            added = part.delta(layer, (x,), output)
            changed = changed + (added if gates is None else gates.of(column) * added)
    return changed


class Before(Part):
    """What an adapter puts in front of every sequence: keys and values that all tokens attend to."""

    length: int  # virtual tokens

    def keys_values(self, model: Any, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer of the model, keys and values (batch, kv_heads, length, head_dim)."""
        raise NotImplementedError


class InputSlot(Slot):
    """The adapters that act before the first layer; it sits on the model itself.

    The cache gets the virtual tokens of each adapter in use, the attention mask shows them to the rows that the
    adapter has, and the positions of these rows begin behind them.
    """

    def hook(self, layer: nn.Module) -> None:
        assert self._handle is None, "this slot is hooked already"
        self._handle = layer.register_forward_pre_hook(self._prepare, with_kwargs=True)

    def _prepare(self, model: Any, inputs: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        names = enumerate(self.route.names)
        live = [(column, part) for column, name in names for part in self.parts.get(name, ())]
        if not live:
            return None
        if inputs:
            inputs, kwargs = (), {"input_ids": inputs[0], **kwargs}
        if kwargs.get("input_ids") is None:
            raise StudioError("E_METHOD", "Virtual tokens need token ids behind them.", "Pass input_ids.")
        ids = kwargs["input_ids"]
        batch, length = ids.shape
        cache = kwargs.get("past_key_values")
        cache = DynamicCache() if cache is None else cache
        ahead = sum(part.length for _, part in live if isinstance(part, Before))
        seen = max(0, cache.get_seq_length() - ahead)  # tokens of earlier calls
        mask = kwargs.get("attention_mask")
        mask = torch.ones(batch, seen + length, dtype=torch.long, device=ids.device) if mask is None else mask
        positions = kwargs.get("position_ids")
        positions = torch.arange(seen, seen + length, device=ids.device)[None] if positions is None else positions
        gate = self.route.gate(batch, model.training)
        shown = []
        fresh = cache.get_seq_length() == 0
        for column, part in live:
            assert isinstance(part, Before)
            on = mask.new_ones(batch) if gate is None else (gate[:, column] != 0).to(mask).expand(batch)
            shown.append(on[:, None].expand(batch, part.length))
            positions = positions + on[:, None] * part.length
            for layer, (keys, values) in enumerate(part.keys_values(model, batch) if fresh else []):
                cache.update(keys, values, layer)
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if most and int(positions.max()) >= most:
            message = f"Virtual tokens and text together are longer than the {most} tokens that this model reads."
            raise StudioError("E_CONTEXT", message, "Shorten the text.")
        mask = torch.cat([*shown, mask], dim=1)
        return inputs, kwargs | {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}


def _not_by_row(layer: nn.Module) -> StudioError:
    """For layers whose input or output has no row per sequence, such as DeBERTa's table of relative positions."""
    message = f"{type(layer).__name__} is computed once for all rows, so they cannot have different adapters here."
    return StudioError("E_ROWS", message, "Use one adapter for the whole batch at a time.")


def base_weight(layer: nn.Module) -> torch.Tensor:
    """The layer's own weight as (out, in), detached: a view. Raises E_QUANTISED when it is packed."""
    weight: torch.Tensor = layer.weight.detach()  # type: ignore[assignment]
    if not weight.is_floating_point():
        raise StudioError(
            "E_QUANTISED",
            "This needs the base weights themselves, and here they are quantised.",
            "Load the base model in bfloat16 or float32, or use variant lora.",
        )
    return weight.T if isinstance(layer, (Conv1D, nn.Embedding)) else weight


def _stacked(
    layer: nn.Module,
    x: torch.Tensor,
    output: torch.Tensor,
    parts: Sequence[tuple[int, LowRank]],
    gates: Gates | None,
) -> torch.Tensor:
    """output + ((x Aᵀ) ⊙ g) Bᵀ over all parts at once."""
    out = output.shape[-1]
    columns = None if gates is None else gates.columns(tuple((column, part.rank) for column, part in parts))
    A, B, scale = _stack([part for _, part in parts], out)
    if isinstance(layer, nn.Embedding):
        return output + _product(layer, x, A, B, scale, columns)
    return Product.apply(x, A, B, scale, columns, output)  # type: ignore[return-value]


def _stack(parts: Sequence[LowRank], out: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (R, in), B (out, R) and what their product is scaled by."""
    if len(parts) == 1:
        return parts[0].A, parts[0].dense_B(out), parts[0].scale
    A = torch.cat([part.A for part in parts])
    return A, torch.cat([part.scale * part.dense_B(out) for part in parts], dim=1), 1.0


def _product(
    layer: nn.Module, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, gates: torch.Tensor | None = None
) -> torch.Tensor:
    """scale · ((x Aᵀ) ⊙ g) Bᵀ; x Aᵀ for an embedding: A's columns at the ids x, scaled as the layer scales its own."""
    if not isinstance(layer, nn.Embedding):
        return Product.apply(x, A, B, scale, gates, None)  # type: ignore[return-value]
    hidden = F.embedding(x, A.T.to(layer.weight.dtype)) * (scale * embedding_scale(layer))
    wide = upcast.widened(hidden if gates is None else hidden * gates)
    return F.linear(wide, B.to(wide.dtype)).to(hidden.dtype)


class Product(torch.autograd.Function):
    """y + scale · ((x Aᵀ) ⊙ g) Bᵀ that keeps x alone for its backward: x Aᵀ and the casts of A and B are made again.

    A GPU keeps the narrow (x Aᵀ) ⊙ g, too: its many small products take it longer than their arithmetic.
    With a frozen A it keeps (x Aᵀ) ⊙ g instead, which is narrow, and x is free to go (LoRA-FA's saving).
    x (batch, ..., in); A (R, in) and B (out, R) fp32 masters; g (1 or batch, 1, ..., R);
    y (batch, ..., out), the layer's own output, to which one matrix product adds; None for 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        scale: float,
        gates: torch.Tensor | None,
        y: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden = _hidden(upcast.widened(x), A, scale, gates)  # (batch, ..., R)
        ctx.scale, trains_A = scale, ctx.needs_input_grad[1]
        narrow = hidden.to(x.dtype) if x.device.type == "cuda" or not trains_A else None
        ctx.save_for_backward(x if trains_A else None, narrow, A, B, gates)
        B = B.to(hidden.dtype)
        if y is None:
            return F.linear(hidden, B).to(x.dtype)
        changed = _copied(y, hidden.dtype)  # no view: some blocks add to it in place
        changed.flatten(0, -2).addmm_(hidden.flatten(0, -2), B.T)
        return changed.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, narrow, A, B, gates = ctx.saved_tensors
        wide: Any = None if x is None else upcast.widened(x)
        gradient = upcast.widened(outer[0])  # (batch, ..., out)
        hidden = _hidden(wide, A, ctx.scale, gates) if narrow is None else upcast.widened(narrow)
        for_x = for_A = for_B = None
        if ctx.needs_input_grad[2]:
            for_B = (gradient.flatten(0, -2).T @ hidden.flatten(0, -2)).to(B.dtype)
        inner = (gradient @ B.to(gradient.dtype)) * ctx.scale  # (batch, ..., R)
        inner = inner if gates is None else inner * gates
        if wide is not None:
            for_A = (inner.flatten(0, -2).T @ wide.flatten(0, -2)).to(A.dtype)
        if ctx.needs_input_grad[0]:
            for_x = (inner @ A.to(inner.dtype)).to(outer[0].dtype)
        return for_x, for_A, for_B, None, None, outer[0] if ctx.needs_input_grad[5] else None


class Products(torch.autograd.Function):
    """The same for several adapters, each on its own tokens: y[span] + scale · (x[span] Aᵀ) Bᵀ.

    x (1, T, in) and y (1, T, out); spans are tokens per adapter, factors A1, B1, A2, B2, ..., both None for an
    adapter that leaves this layer alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor,
        spans: Sequence[int],
        scales: Sequence[float],
        *factors: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.spans, ctx.scales = spans, scales
        ctx.save_for_backward(x, *factors)
        x = upcast.widened(x)
        changed = _copied(y, x.dtype)
        for span, scale, A, B in _with_factors(spans, scales, factors):
            changed[0, span].addmm_(_hidden(x[0, span], A, scale, None), B.to(x.dtype).T)
        return changed.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        x, gradient = upcast.widened(x), upcast.widened(outer[0][0])  # (T, out)
        for_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for_factors: list[torch.Tensor | None] = []
        for span, scale, A, B in _with_factors(ctx.spans, ctx.scales, factors, gaps=True):
            if A is None:
                for_factors += [None, None]
                continue
            inner = (gradient[span] @ B.to(gradient.dtype)) * scale  # (tokens, R)
            hidden = _hidden(x[0, span], A, scale, None)
            trains_A = ctx.needs_input_grad[4 + len(for_factors)]
            for_A = (inner.T @ x[0, span]).to(A.dtype) if trains_A else None
            for_factors += [for_A, (gradient[span].T @ hidden).to(B.dtype)]
            if for_x is not None:
                torch.mm(inner, A.to(inner.dtype), out=for_x[0, span])
        for_x = None if for_x is None else for_x.to(outer[0].dtype)
        return for_x, outer[0] if ctx.needs_input_grad[1] else None, None, None, *for_factors


def _with_factors(
    spans: Sequence[int], scales: Sequence[float], factors: Sequence[Any], gaps: bool = False
) -> Iterator[tuple[slice, float, Any, Any]]:
    """(span, scale, A, B) of each adapter that acts here, and with `gaps` of the others too."""
    start = 0
    for number, (size, scale) in enumerate(zip(spans, scales, strict=True)):
        A, B = factors[2 * number : 2 * number + 2]
        if gaps or A is not None:
            yield slice(start, start + size), scale, A, B
        start += size


def _hidden(x: torch.Tensor, A: torch.Tensor, scale: float, gates: torch.Tensor | None) -> torch.Tensor:
    hidden = F.linear(x, A.to(x.dtype)) * scale
    return hidden if gates is None else hidden * gates


def _copied(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of y in this dtype, contiguous."""
    return y.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _squares(weight: torch.Tensor) -> torch.Tensor:
    """(rows,): squared norm of each row, in fp32."""
    return weight.float().square().sum(1)
