"""The forward hook that adds adapters to one linear layer, and the gate that says whose rows get how much.

    y = base(x) + ((x Aᵀ) ⊙ g) Bᵀ

A (R, in) and B (out, R) stack the factors of the adapters in use, R the sum of their ranks; g holds
scale · row weight per column. So g = 0 is the base model bit for bit, rows of one batch may carry different
adapters or blends, and a strength slider is a write into a tensor. The base weight is never written.

Masters are fp32; they are cast down to the dtype of x, never x up (casting inputs up costs a fifth of the
peak memory and changes no gradient).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_studio.core.layout import Target, dimensions


class Route:
    """Shared by all slots of a model: which adapters are in use and with what weight on which row.

    names     adapters in use; empty means the hooks add nothing at all
    weights   (1 or rows, names): weight of each adapter on each row of the batch
    strength  (names,): the live slider, multiplied onto weights; written in place
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.weights = torch.empty(1, 0)
        self.strength = torch.empty(0)

    def gate(self, batch: int) -> torch.Tensor:
        """(1 or batch, names). A row's weight covers all its beams, which generate() keeps next to each other."""
        weights = self.weights * self.strength
        if len(weights) in (1, batch):
            return weights
        assert batch % len(weights) == 0, f"{len(weights)} adapter rows do not divide a batch of {batch}"
        return weights.repeat_interleave(batch // len(weights), dim=0)


class Part(nn.Module):
    """One adapter in one layer: n slices of its output rows, each with its own A and B of rank r.

    A (n·r, in); B compact (adapted rows, r); scale multiplies B A. One slice without rows is the whole layer.
    """

    rows: torch.Tensor  # (adapted rows,): where B's rows belong in the output
    block: torch.Tensor  # (adapted rows,): which slice they belong to

    def __init__(
        self, layer: nn.Module, slices: Sequence[Target], rank: int, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.out, width = dimensions(layer)
        self.roles = tuple(target.role for target in slices)
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.whole = any(target.rows is None for target in slices)
        assert len(slices) == 1 or not self.whole, "a whole layer cannot be sliced as well"
        rows = [torch.arange(self.out) if target.rows is None else target.rows for target in slices]
        count = sum(map(len, rows))
        device = next(layer.parameters()).device
        self.A = nn.Parameter(torch.zeros(len(slices) * rank, width, device=device))
        self.B = nn.Parameter(torch.zeros(count, rank, device=device))
        if not self.whole:
            block = torch.cat([torch.full((len(numbers),), n) for n, numbers in enumerate(rows)])
            self.register_buffer("rows", torch.cat(rows).to(device), persistent=False)
            self.register_buffer("block", block.to(device), persistent=False)

    def reset(self, generator: torch.Generator) -> None:
        """A as in the authors' code, uniform in ±1/sqrt(in); B zero, so that training starts at the base model."""
        bound = 1 / math.sqrt(self.A.shape[1])
        fresh = torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.A.copy_(fresh)
            self.B.zero_()

    def dense_B(self) -> torch.Tensor:
        """B as one (out, n·r) matrix: block-structured with zero rows where nothing is adapted."""
        if self.whole:
            return self.B
        full = self.B.new_zeros(self.out, len(self.roles), self.rank)
        return full.index_put((self.rows, self.block), self.B).flatten(1)

    def compact_B(self, dense: torch.Tensor) -> torch.Tensor:
        """The inverse of dense_B: (out, n·r) -> (adapted rows, r)."""
        if self.whole:
            return dense
        return dense.view(self.out, len(self.roles), self.rank)[self.rows, self.block]


class Slot:
    """All adapters of one linear layer. It is kept outside the model, which therefore stays as it was."""

    def __init__(self, route: Route) -> None:
        self.parts: dict[str, Part] = {}
        self.route = route
        self._handle: RemovableHandle | None = None

    def hook(self, layer: nn.Module) -> None:
        """Begin to act on `layer`."""
        assert self._handle is None, "this slot is hooked already"
        self._handle = layer.register_forward_hook(self._add)

    def unhook(self) -> None:
        """Leave the layer as it was."""
        assert self._handle is not None, "this slot is not hooked"
        self._handle.remove()
        self._handle = None

    def _add(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        parts = [(column, self.parts[name]) for column, name in enumerate(self.route.names) if name in self.parts]
        if not parts:
            return None
        x = inputs[0]  # (batch, ..., in)
        gate = self.route.gate(x.shape[0]).to(x.dtype)
        gates = [(gate[:, column, None] * part.scale).expand(-1, len(part.A)) for column, part in parts]
        g = torch.cat(gates, dim=1).view(-1, *[1] * (x.dim() - 2), sum(len(part.A) for _, part in parts))
        A = torch.cat([part.A for _, part in parts]) if len(parts) > 1 else parts[0][1].A
        B = torch.cat([part.dense_B() for _, part in parts], dim=1) if len(parts) > 1 else parts[0][1].dense_B()
        dropout = max(part.dropout for _, part in parts)  # adapters that train together share one mask
        if dropout and layer.training:
            x = F.dropout(x, dropout)
        hidden = F.linear(x, A.to(x.dtype))  # (batch, ..., R)
        return output + F.linear(hidden * g, B.to(x.dtype)).to(output.dtype)
