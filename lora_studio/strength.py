"""The held-out loss of one adapter at every strength from none to twice what it was trained with."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_studio.core.lean import Tokens
from lora_studio.core.lora import LoRA
from lora_studio.measure import mean_loss

STRENGTHS = tuple(step / 4 for step in range(9))  # 0 is the base model, 1 the adapter as trained
NEAR = 0.01  # of what the best strength gains: as good as the best


@dataclass(frozen=True, kw_only=True)
class StrengthCurve:
    """Held-out loss by strength, rising; nats per token, or per label."""

    losses: Mapping[float, float]

    @property
    def best(self) -> float | None:
        """The strength with the lowest loss, the weakest of equals; None before one with a finite loss."""
        finite = {strength: loss for strength, loss in self.losses.items() if math.isfinite(loss)}
        return min(finite, key=lambda strength: finite[strength], default=None)

    @property
    def trained_is_best(self) -> bool:
        """Whether strength 1 keeps 99 % of what the best strength gains over the base model."""
        base, trained = (self.losses.get(one, math.nan) for one in (0.0, 1.0))
        best = math.nan if self.best is None else self.losses[self.best]
        return trained - best <= NEAR * (base - best)

    def as_json(self) -> dict[str, Any]:
        points = [
            {"strength": strength, "loss": loss if math.isfinite(loss) else None}
            for strength, loss in self.losses.items()
        ]
        return {"best": self.best, "trained_is_best": self.trained_is_best, "points": points}


def strength_curve(lora: LoRA, name: str, rows: Sequence[Tokens]) -> Iterator[StrengthCurve]:
    """The curve as it grows, on the same rows at each strength."""
    losses: dict[float, float] = {}
    for strength in STRENGTHS:
        with lora.use({name: strength} if strength else None):
            losses[strength] = mean_loss(lora, rows)
        yield StrengthCurve(losses=dict(losses))
