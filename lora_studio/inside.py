"""Looking inside one trained adapter: section 7 of the paper for every matrix it changes, and what a lower rank costs.

    report      size, singular values and effective rank of each update, and what it amplifies (Table 7)
    similarity  how much of two adapters' directions is shared (equation 4, Figures 3 and 4)
    rank_curve  held-out loss when only the strongest directions are kept
    smaller     the adapter with only those, to be used or saved

For DoRA the figures are those of its low-rank part. What an adapter trains whole, such as a classifier head, has no
factors: it is left out of the figures and kept as it is in a smaller adapter.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lora_studio.core import analysis
from lora_studio.core.lean import Tokens
from lora_studio.core.lora import Factors, LoRA, weight
from lora_studio.core.spec import BASELINES, BaselineSpec, LoraSpec
from lora_studio.errors import StudioError, quote
from lora_studio.measure import mean_loss

KEEP = 0.99  # of what the whole adapter gained: good enough for a smaller one
TEMPORARY = "truncated"  # the name of an adapter that is attached for one measurement


@dataclass(frozen=True, kw_only=True)
class Module:
    """One adapted matrix and what became of it."""

    name: str  # dotted name of the layer
    role: str
    layer: int | None  # number of the block; None outside the blocks
    delta_norm: float  # ‖ΔW‖
    relative_norm: float  # ‖ΔW‖ / ‖W‖
    effective_rank: float
    rank99: int  # directions that hold 99 % of ‖ΔW‖²
    singular_values: tuple[float, ...]
    amplification: analysis.Amplification

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "amplification"}

    def amplification_as_json(self) -> dict[str, Any]:
        """This matrix's row of table 7; a factor without bound is None."""
        row, factor = self.amplification, self.amplification.factor
        place = {"name": self.name, "role": self.role, "layer": self.layer}
        return {**place, **asdict(row), "factor": factor if math.isfinite(factor) else None}


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """φ(i, j) of two adapters on one matrix, of A alone and of the update B A, and that of random directions."""

    name: str
    role: str
    layer: int | None
    phi: list[list[float]]
    phi_update: list[list[float]]  # empty when one of the updates is zero
    baseline: list[list[float]]  # max(i, j) / the width of A


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Two adapters of one base, on the matrices that both adapt."""

    names: tuple[str, str]
    modules: tuple[Overlap, ...]
    alone: tuple[int, int]  # how many matrices only the first, only the second adapts


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that can be said of an adapter without running the model."""

    modules: tuple[Module, ...]
    similarity: Similarity | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "modules": [module.as_json() for module in self.modules],
            "amplification": [module.amplification_as_json() for module in self.modules],
            "similarity": asdict(self.similarity) if self.similarity else None,
        }


@dataclass(frozen=True, kw_only=True)
class RankCurve:
    """Held-out loss by the rank that was kept; the last one is the whole adapter.

    Rank 0 is the base model, together with whatever else the adapter has: a trained head, DoRA's magnitudes.
    """

    rank: int  # of the whole adapter
    losses: Mapping[int, float] = field(default_factory=dict)  # by rank, rising
    parameters: Mapping[int, int] = field(default_factory=dict)  # in A and B

    @property
    def smallest(self) -> int | None:
        """The smallest measured rank that keeps 99 % of what the whole adapter gained; None if it gained nothing."""
        base, whole = self.losses.get(0), self.losses.get(self.rank)
        if base is None or whole is None or not base > whole:
            return None
        return min(rank for rank, loss in self.losses.items() if base - loss >= KEEP * (base - whole))

    def as_json(self) -> dict[str, Any]:
        points = [
            {"rank": rank, "loss": loss if math.isfinite(loss) else None, "parameters": self.parameters[rank]}
            for rank, loss in self.losses.items()
        ]
        return {"rank": self.rank, "smallest": self.smallest, "points": points}


def report(lora: LoRA, name: str, other: str | None = None) -> Report:
    """Every adapted matrix of `name`, in forward order; with `other`, also what the two have in common.

    Raises E_NOT_LORA, E_QUANTISED, E_NOTHING_SHARED.
    """
    modules = tuple(_module(lora, factors) for factors in _factors(lora, name))
    return Report(modules=modules, similarity=None if other is None else similarity(lora, name, other))


def similarity(lora: LoRA, name: str, other: str) -> Similarity:
    """φ of two adapters on each matrix that both adapt. Raises E_NOT_LORA, E_NOTHING_SHARED."""
    first, second = ({(one.layer, one.role): one for one in _factors(lora, each)} for each in (name, other))
    shared = [key for key in first if key in second]
    if not shared:
        message = "The two adapters have no matrix in common."
        raise StudioError("E_NOTHING_SHARED", message, "Choose runs that adapt the same matrices.")
    return Similarity(
        names=(name, other),
        modules=tuple(_overlap(first[key], second[key]) for key in shared),
        alone=(len(first) - len(shared), len(second) - len(shared)),
    )


def rank_curve(lora: LoRA, name: str, rows: Sequence[Tokens]) -> Iterator[RankCurve]:
    """The curve as it grows: ranks 0, 1, 2, 4 and so on to the whole, then between the last two candidates.

    The halving at the end finds the smallest rank that is good enough, provided that the loss falls with the rank.
    The model and the adapter stay as they are. Raises E_NOT_LORA.
    """
    factors = _factors(lora, name)
    curve = RankCurve(rank=max(one.rank for one in factors))
    rank: int | None = 0
    while rank is not None:
        losses = {**curve.losses, rank: _loss(lora, name, rank, rows, whole=rank == curve.rank)}
        counts = {kept: sum(min(kept, one.rank) * (len(one.B) + one.A.shape[1]) for one in factors) for kept in losses}
        curve = replace(curve, losses=dict(sorted(losses.items())), parameters=counts)
        yield curve
        rank = _next_rank(curve)


@contextmanager
def smaller(lora: LoRA, name: str, rank: int) -> Iterator[str]:
    """Inside, what `name` is with only its `rank` strongest directions per matrix is attached, under the name given.

    Raises E_NOT_LORA, E_RANK.
    """
    whole = max(one.rank for one in _factors(lora, name))
    if not 1 <= rank <= whole:
        message = f"The rank is {quote(rank)}, this adapter has {whole}."
        raise StudioError("E_RANK", message, f"Give a whole number between 1 and {whole}.")
    with _truncated(lora, name, rank) as temporary:
        yield temporary


# ---- inside ------------------------------------------------------------------------------------------------------


def _factors(lora: LoRA, name: str) -> list[Factors]:
    spec = lora.specs[name]
    if isinstance(spec, BaselineSpec):
        message = f"This run was trained by {BASELINES[spec.kind][0]}, which has no low-rank factors to look into."
        raise StudioError("E_NOT_LORA", message, "Choose a LoRA run.")
    return lora.delta(name)


def _module(lora: LoRA, factors: Factors) -> Module:
    update = analysis.spectrum(factors)
    row = analysis.amplification(update, weight(lora.model, factors))
    return Module(
        name=factors.layer,
        role=factors.role,
        layer=_block(factors.layer),
        delta_norm=update.norm,
        relative_norm=update.norm / row.weight_norm if row.weight_norm else 0.0,
        effective_rank=update.effective_rank,
        rank99=update.rank_keeping(0.99),
        singular_values=tuple(update.S.tolist()),
        amplification=row,
    )


def _overlap(first: Factors, second: Factors) -> Overlap:
    own = [analysis.directions(one.A) for one in (first, second)]
    updates = [analysis.spectrum(one) for one in (first, second)]
    strong = [update.V[:, : update.rank] for update in updates]
    baseline = analysis.random_phi(own[0].shape[1], own[1].shape[1], len(own[0]))
    return Overlap(
        name=first.layer,
        role=first.role,
        layer=_block(first.layer),
        phi=_rounded(analysis.phi(*own)),
        phi_update=_rounded(analysis.phi(*strong)) if all(update.rank for update in updates) else [],
        baseline=_rounded(baseline),
    )


@contextmanager
def _truncated(lora: LoRA, name: str, rank: int) -> Iterator[str]:
    """Inside, an adapter with the best approximation of that rank is attached beside `name`."""
    spec = lora.specs[name]
    assert isinstance(spec, LoraSpec)
    factors = [analysis.truncate(one, rank) for one in lora.delta(name)]
    variant = "dora" if spec.variant == "dora" else "lora"  # what is left of the others is a plain product
    less = {one.layer: one.rank for one in factors if one.rank < rank}  # their scale is 1, as for all
    patterns = {"rank_pattern": less, "alpha_pattern": {layer: float(own) for layer, own in less.items()}}
    fresh = replace(spec, variant=variant, rank=max(rank, 1), alpha=float(max(rank, 1)), dropout=0.0, **patterns)
    lora.load_state(TEMPORARY, fresh, factors, lora.copies(name))
    try:
        yield TEMPORARY
    finally:
        lora.remove(TEMPORARY)


def _loss(lora: LoRA, name: str, rank: int, rows: Sequence[Tokens], *, whole: bool) -> float:
    """Held-out loss with `rank` directions per matrix, or with the adapter as it is."""
    if whole:
        with lora.use(name):
            return mean_loss(lora, rows)
    with _truncated(lora, name, rank) as temporary, lora.use(temporary):
        return mean_loss(lora, rows)


def _next_rank(curve: RankCurve) -> int | None:
    """The rank to measure next; None when the curve is complete."""
    last = max(curve.losses)
    if last < curve.rank:
        return min(max(1, 2 * last), curve.rank)
    if curve.smallest is None:
        return None
    below = max(rank for rank in curve.losses if rank < curve.smallest)
    return (below + curve.smallest) // 2 if curve.smallest - below > 1 else None


def _block(layer: str) -> int | None:
    """The number in a dotted name: model.layers.3.self_attn.q_proj is in block 3."""
    return next((int(part) for part in layer.split(".") if part.isdecimal()), None)


def _rounded(grid: Any) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in grid.tolist()]
