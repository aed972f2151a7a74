"""What is to be trained, without a model: a LoRA adapter, or one of the methods that the paper compares it with.

Paper section 4.1: h = W0 x + scale · B A x with A of shape (rank, in) and B of shape (out, rank). The paper's
scale is alpha / rank; rank-stabilised LoRA (arXiv 2312.03732) uses alpha / sqrt(rank). The other variants change
what is trained or where it starts, not the scale:

    dora     a magnitude per output row as well (arXiv 2402.09353)
    lora-fa  A stays as drawn, B alone is trained (arXiv 2308.03303)
    lora+    B learns faster than A (arXiv 2402.12354)
    pissa    A and B start at the main singular directions of W0 (arXiv 2404.02948)

Section 5.1 of the paper describes the other methods and counts their parameters; `paper_count` has its formulae.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_studio.fields import knob

# variant -> scale(alpha, rank). One table for forward, merge, save, estimate and analysis alike.
VARIANTS: dict[str, Callable[[float, int], float]] = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
    "dora": lambda alpha, rank: alpha / rank,
    "lora-fa": lambda alpha, rank: alpha / rank,
    "lora+": lambda alpha, rank: alpha / rank,
    "pissa": lambda alpha, rank: alpha / rank,
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

    variant: str = knob(
        "lora",
        choices=tuple(VARIANTS),
        label="Variant",
        help="How A, B and the scale are used; lora is the paper's",
    )
    rank: int = knob(8, min=1, max=1024, label="Rank", help="How many directions each update may use")
    alpha: float = knob(
        16.0, min=0.001, max=65536, label="Alpha", help="Strength; the update is scaled by alpha / rank"
    )
    dropout: float = knob(0.0, min=0.0, max=0.9, label="Dropout", help="Share of inputs dropped in the adapter path")
    targets: tuple[str, ...] = knob(
        ("attn.q", "attn.v"),
        label="Target matrices",
        help="Roles such as attn.q or embed, module names, or all-linear",
    )
    layers: tuple[int, ...] = knob((), label="Layers", help="Layer numbers to adapt; empty means all")
    rank_pattern: Mapping[str, int] = knob(
        {}, min=1, max=1024, label="Rank pattern", help="Other ranks for some matrices, such as mlp.down=4"
    )
    alpha_pattern: Mapping[str, float] = knob(
        {}, min=0.001, max=65536, label="Alpha pattern", help="Other alphas for some matrices, such as mlp.down=8"
    )
    modules_to_save: tuple[str, ...] = field(default=())  # trained whole and saved along, such as a classifier

    def rank_of(self, target: Any) -> int:
        """The rank on one layout.Target: its own from the pattern, else the common one."""
        return next((rank for key, rank in self.rank_pattern.items() if target.answers_to(key)), self.rank)

    def scale_of(self, target: Any) -> float:
        """What the product B A is multiplied with on one layout.Target."""
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if target.answers_to(key)), self.alpha)
        return VARIANTS[self.variant](alpha, self.rank_of(target))

    def parameters(self, target: Any) -> int:
        """Trainable parameters on one layout.Target: rank · (in + out); DoRA adds out, lora-fa leaves A out."""
        out, width = target.shape
        rank = self.rank_of(target)
        return rank * (out if self.variant == "lora-fa" else out + width) + (out if self.variant == "dora" else 0)


# kind -> (label, what its width means, the width when none is given)
BASELINES: dict[str, tuple[str, str, int]] = {
    "full": ("Full fine-tuning", "", 0),
    "top": ("Top blocks only", "blocks", 2),
    "bitfit": ("BitFit: biases only", "", 0),
    "adapter_h": ("Adapter H (Houlsby)", "bottleneck width", 8),
    "adapter_p": ("Adapter P (Pfeiffer)", "bottleneck width", 16),
    "adapter_l": ("Adapter L (Lin)", "bottleneck width", 16),
    "prefix": ("Prefix: keys and values", "virtual tokens", 16),
    "prompt": ("Prefix: embeddings", "virtual tokens", 16),
}
VIRTUAL = ("prefix", "prompt")  # those that put virtual tokens in front of the text
METHODS = ("lora", *BASELINES)


@dataclass(frozen=True, kw_only=True)
class BaselineSpec:
    """One of the methods that the paper compares LoRA with (section 5.1)."""

    kind: str = knob("full", choices=tuple(BASELINES), label="Method", help="How the model is adapted")
    width: int = knob(
        0, min=0, max=4096, label="Width", help="Bottleneck, virtual tokens or blocks of a method; 0 takes its usual"
    )
    modules_to_save: tuple[str, ...] = field(default=())  # trained whole and saved along, such as a classifier

    @property
    def size(self) -> int:
        """The width, or the kind's usual one."""
        return self.width or BASELINES[self.kind][2]


Method = LoraSpec | BaselineSpec


def paper_count(kind: str, *, layers: int, hidden: int, width: int, matrices: int = 2) -> int:
    """|Θ| of section 5.1 for a model of `layers` blocks of width `hidden`, square matrices throughout.

    width: rank, bottleneck or virtual tokens. matrices: how many a block adapts (LoRA only).
    """
    adapter = 2 * hidden * width + width + hidden
    return {
        "lora": 2 * layers * matrices * hidden * width,
        "adapter_h": 2 * layers * adapter,
        "adapter_p": layers * adapter,
        "adapter_l": layers * (adapter + 2 * hidden),  # and a LayerNorm each
        "prefix": 2 * layers * hidden * width,  # keys and values
        "prompt": hidden * width,
    }[kind]
