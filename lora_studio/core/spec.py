"""What an adapter is to be, without a model: variant, rank, alpha, target matrices, layers.

Paper section 4.1: h = W0 x + scale · B A x with A of shape (rank, in) and B of shape (out, rank). The paper's
scale is alpha / rank; rank-stabilised LoRA (arXiv 2312.03732) uses alpha / sqrt(rank).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lora_studio.fields import knob

# variant -> scale(alpha, rank). One table for forward, merge, save, estimate and analysis alike.
VARIANTS: dict[str, Callable[[float, int], float]] = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}

# Named choices of target matrices; the first is the paper's (section 4.2 and Table 5).
PRESETS: dict[str, tuple[str, ...]] = {
    "Attention q + v (the paper)": ("attn.q", "attn.v"),
    "All attention": ("attn.q", "attn.k", "attn.v", "attn.o"),
    "All linear": ("all-linear",),
}


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """One LoRA adapter before it has a model."""

    variant: str = knob("lora", choices=tuple(VARIANTS), label="Variant", help="lora, or rank-stabilised rslora")
    rank: int = knob(8, min=1, max=1024, label="Rank", help="How many directions each update may use")
    alpha: float = knob(
        16.0, min=0.001, max=65536, label="Alpha", help="Strength; the update is scaled by alpha / rank"
    )
    dropout: float = knob(0.0, min=0.0, max=0.9, label="Dropout", help="Share of inputs dropped in the adapter path")
    targets: tuple[str, ...] = knob(
        ("attn.q", "attn.v"),
        label="Target matrices",
        help="Roles such as attn.q, module names, or all-linear",
    )
    layers: tuple[int, ...] = knob((), label="Layers", help="Layer numbers to adapt; empty means all")

    @property
    def scale(self) -> float:
        """What the product B A is multiplied with."""
        return VARIANTS[self.variant](self.alpha, self.rank)
