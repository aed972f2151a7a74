"""Frozen layers that read the same input, as one: q, k and v of a block, or gate and up, with what adapters add.

Three products in a row leave a GPU half idle at the end of each, and the gradients that meet in their input are a pass
over the memory each. Here the weights lie under each other, so that one product makes all outputs, and the gradients
are summed inside the products that make them. The layers stay what they are: when a block calls q's, or gate's, it
computes for all, and the others find their output there.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from lora_studio.core.slot import InPlace, put_back

PIECE = 8192  # numbers that a GPU casts in one block of its threads; of more it would take them in turn
NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Together(torch.autograd.Function):
    """x Wᵢᵀ + bᵢ + scale · (x Aᵢᵀ) Bᵢᵀ of each layer.

    x (..., in); W (outputs of all, in) and b (outputs of all,), or None; sizes: outputs of each layer; factors A1, B1,
    A2, B2, ... in fp32, both None for a layer that no adapter acts on. For its backward it keeps x and the narrow x Aᵀ
    where there are any.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        sizes: Sequence[int],
        scale: float,
        *factors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        rows = x.flatten(0, -2)
        outputs = F.linear(rows, W, b).split(sizes, dim=1)
        A, Bs = _cast(factors, x.dtype)
        hidden = None if A is None else rows @ A.T  # (tokens, ranks)
        for output, B, span in zip(outputs, Bs, _spans(Bs), strict=True):
            if B is not None and hidden is not None:
                output.addmm_(hidden[:, span], B.T, alpha=scale)
        ctx.sizes, ctx.scale = sizes, scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(None if A is None else x, W, A, hidden, *Bs)
        return tuple(_no_view(output, x.shape[:-1]) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, W, A, hidden, *Bs = ctx.saved_tensors
        for_factors: list[torch.Tensor | None] = [None] * (2 * len(Bs))
        if all(one is None for one in outer):
            return (None,) * 5 + tuple(for_factors)
        gradient = _side_by_side(outer, ctx.sizes)
        for_x = gradient @ W if ctx.needs_input_grad[0] else None
        if A is not None:
            inner, columns, spans = torch.empty_like(hidden), gradient.split(ctx.sizes, dim=1), _spans(Bs)
            adapted = [number for number, B in enumerate(Bs) if B is not None]
            for number in adapted:
                torch.mm(columns[number], Bs[number], out=inner[:, spans[number]])
            learn = [number for number in adapted if outer[number] is not None]
            for_A = _in_fp32(inner.T, x.flatten(0, -2))
            for_Bs = [_in_fp32(columns[number].T, hidden[:, spans[number]]) for number in learn]
            torch._foreach_mul_([for_A, *for_Bs], ctx.scale)  # type: ignore[attr-defined]
            for number, for_B in zip(learn, for_Bs, strict=True):
                for_factors[2 * number : 2 * number + 2] = for_A[spans[number]], for_B
            if for_x is not None:
                for_x.addmm_(inner, A, alpha=ctx.scale)
        shape = next(one.shape for one in outer if one is not None)
        for_x = None if for_x is None else for_x.view(*shape[:-1], for_x.shape[1])
        return for_x, None, None, None, None, *for_factors


def _cast(
    factors: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """All A under each other (ranks, in), None where there is none, and each B; a GPU casts them in one go."""
    As = [A for A in factors[::2] if A is not None]
    if not As:
        return None, list(factors[1::2])
    A = torch.empty(sum(map(len, As)), As[0].shape[1], dtype=dtype, device=As[0].device)
    Bs = [None if B is None else torch.empty(B.shape, dtype=dtype, device=B.device) for B in factors[1::2]]
    cast = [*A.split([len(one) for one in As]), *(B for B in Bs if B is not None)]
    masters = [*As, *(B for B in factors[1::2] if B is not None)]
    torch._foreach_copy_(_pieces(cast), _pieces(masters))  # type: ignore[attr-defined]
    return A, Bs


def _pieces(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All of them, a PIECE at a time."""
    return [piece for one in tensors for piece in one.detach().flatten().split(PIECE)]


def _no_view(output: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Columns of a tensor that autograd takes for a tensor of its own: some blocks write into what they get."""
    columns = output.view(*shape, output.shape[1])
    whole = output.new_empty(0)
    return whole.set_(columns.untyped_storage(), columns.storage_offset(), columns.shape, columns.stride())


def _spans(Bs: Sequence[torch.Tensor | None]) -> list[slice]:
    """Where the ranks of each layer lie among those of all."""
    ends = itertools.accumulate((0 if B is None else B.shape[1] for B in Bs), initial=0)
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _in_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in fp32, in which a GPU sums it anyway."""
    narrow = a.device.type == "cuda" and a.dtype != torch.float32
    return torch.mm(a, b, out_dtype=torch.float32) if narrow else (a @ b).float()


def _side_by_side(gradients: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> torch.Tensor:
    """(tokens, outputs of all): gradients (..., outputs of one) as columns of one tensor, 0 for None.

    It is the tensor whose columns they already are, where they are that, in order.
    """
    rows = [None if one is None else one.flatten(0, -2) for one in gradients]
    first = next(one for one in rows if one is not None)
    place, width = first.data_ptr(), sum(sizes)
    for one, size in zip(rows, sizes, strict=True):
        if one is None or one.stride() != (width, 1) or one.data_ptr() != place:
            break
        place += size * one.itemsize
    else:
        if len({one.untyped_storage().data_ptr() for one in rows if one is not None}) == 1:
            return first.as_strided((len(first), width), (width, 1))
    rows = [first.new_zeros(len(first), size) if one is None else one for one, size in zip(rows, sizes, strict=True)]
    return torch.cat(rows, dim=1)


class Group:
    """Some layers of a block that read the same input, and whose forwards are this group's while it acts."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = layers
        self._sizes = [layer.out_features for layer in layers]
        self._weight = _under_each_other([layer.weight for layer in layers])
        self._bias = None if layers[0].bias is None else _under_each_other([layer.bias for layer in layers])
        self._own: list[Callable | None] = []  # forwards, by which None is the class's, while it acts
        self._of: torch.Tensor | None = None  # the input whose outputs are waiting
        self._waiting: dict[int, torch.Tensor] = {}

    @property
    def acts(self) -> bool:
        return bool(self._own)

    def enter(self) -> None:
        self._own = [vars(layer).get("forward") for layer in self._layers]
        for number, layer in enumerate(self._layers):
            vars(layer)["forward"] = partial(self._output, number)

    def leave(self) -> None:
        for layer, own in zip(self._layers, self._own, strict=True):
            put_back(layer, own)
        self._own, self._of = [], None
        self._waiting.clear()

    def _output(self, number: int, input: torch.Tensor) -> torch.Tensor:
        """Of the layer of this number."""
        if input is self._of and number in self._waiting:
            return self._taken(number)
        work = None if number else self._work(input)
        if work is None:
            own, layer = self._own[number], self._layers[number]
            return type(layer).forward(layer, input) if own is None else own(input)
        outputs = Together.apply(input, self._weight, self._bias, self._sizes, *work)
        self._of, self._waiting = input, dict(enumerate(outputs))  # type: ignore[arg-type]
        return self._taken(number)

    def _taken(self, number: int) -> torch.Tensor:
        output = self._waiting.pop(number)
        if not self._waiting:  # nothing of a pass outlives it
            self._of = None
        return output

    def _work(self, x: torch.Tensor) -> tuple[Any, ...] | None:
        """What `Together` is told of the adapters, scale and factors; None where each layer sees to itself."""
        if x.dtype != self._weight.dtype or not self.as_laid:
            return None
        scales, factors = set[float](), []
        for layer, own in zip(self._layers, self._own, strict=True):
            if own is not None and not (isinstance(own, InPlace) and own.own is None):
                return None  # somebody else's
            product = own.slot.product(layer) if own else ()
            if product is None:
                return None
            A, B, scale = product or (None, None, None)
            factors += [A, B]
            scales |= set() if scale is None else {scale}
        return (max(scales, default=1.0), *factors) if len(scales) < 2 else None

    @property
    def as_laid(self) -> bool:
        """Whether the layers still have the weights and biases that were laid."""
        laid, own = [*self._weight.split(self._sizes)], [layer.weight for layer in self._layers]
        if self._bias is not None:
            laid += self._bias.split(self._sizes)
            own += [layer.bias for layer in self._layers]
        return [one.data_ptr() for one in laid] == [one.data_ptr() for one in own]


def _under_each_other(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """All of them in one tensor, in which each lies from here on."""
    with torch.inference_mode(False), torch.no_grad():
        joint = torch.cat([one.detach() for one in parameters])
        for one, piece in zip(parameters, joint.split([len(one) for one in parameters]), strict=True):
            one.data = piece
    return joint


@contextmanager
def joined(model: nn.Module) -> Iterator[None]:
    """Inside, such layers compute together on a GPU."""
    groups = _GROUPS.get(model)
    if groups is None or not all(group.acts or group.as_laid for group in groups[:1]):  # it may be elsewhere now
        groups = _GROUPS[model] = [Group(layers) for layers in _siblings(model)]
    mine = [group for group in groups if not group.acts]  # it may be inside itself
    for group in mine:
        group.enter()
    try:
        yield
    finally:
        for group in mine:
            group.leave()


_GROUPS: WeakKeyDictionary[nn.Module, list[Group]] = WeakKeyDictionary()


def _siblings(model: nn.Module) -> Iterator[list[nn.Linear]]:
    for block in model.modules():
        for names in NAMES:
            layers: list[Any] = [getattr(block, name, None) for name in names]
            if all(type(layer) is nn.Linear and can_join(layer.weight) for layer in layers):
                first, alike = layers[0].weight, {(layer.weight.dtype, layer.bias is None) for layer in layers}
                if len(alike) == 1 and all(layer.in_features == first.shape[1] for layer in layers):
                    yield layers


def can_join(weight: torch.Tensor) -> bool:
    """Whether this weight's products are better made with others'; a CPU is busy with each."""
    return weight.device.type == "cuda" and not weight.requires_grad and type(weight) is nn.Parameter
