"""What a person sets for training and for answering; plain values, so that a form needs no torch to be drawn."""

import math
from dataclasses import dataclass, replace

from lora_studio.errors import StudioError
from lora_studio.fields import knob

QUANTISED = ("int8", "nf4")  # precisions of the blocks' matrices alone; everything else is then in bfloat16
# Learning rates as a share of LoRA's, from the paper's GPT-3 runs (Table 12); methods not named bear at least as much.
RATES = {"full": 1 / 40, "top": 1 / 40, "adapter_h": 1 / 2, "adapter_p": 1 / 2, "adapter_l": 1 / 2, "prefix": 1 / 2}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast and on what, apart from the adapter itself."""

    steps: int = knob(25, min=0, max=1_000_000, label="Steps", help="Optimizer steps; 0 takes epochs instead")
    epochs: float = knob(0.0, min=0.0, max=1000.0, label="Epochs", help="Passes over the data, when steps is 0")
    batch_size: int = knob(8, min=1, max=1024, label="Batch", help="Examples per step")
    batch_tokens: int = knob(
        0,
        min=0,
        max=10_000_000,
        label="Batch in tokens",
        help="Tokens per step instead of examples; 0 goes by examples",
    )
    accumulate: int = knob(
        1, min=1, max=1024, label="Accumulate", help="Split a step into this many parts; same result"
    )
    learning_rate: float = knob(
        5e-3,
        min=1e-7,
        max=1.0,
        label="Learning rate",
        help="Peak; larger models want less, 1e-3 at a billion parameters",
    )
    lr_ratio_b: float = knob(
        16.0, min=0.01, max=1000.0, label="Rate of B", help="Variant lora+ only: B learns this many times faster than A"
    )
    schedule: str = knob(
        "linear", choices=("linear", "cosine", "constant"), label="Schedule", help="How the learning rate falls"
    )
    warmup: float = knob(0.06, min=0.0, max=1.0, label="Warm-up", help="Share of the steps in which the rate rises")
    weight_decay: float = knob(0.0, min=0.0, max=1.0, label="Weight decay", help="AdamW's, on what is trained")
    clip_norm: float = knob(1.0, min=0.0, max=1000.0, label="Clip norm", help="Largest gradient norm; 0 never clips")
    max_length: int = knob(512, min=8, max=131_072, label="Length limit", help="Tokens per example; the rest is cut")
    holdout: float = knob(0.1, min=0.0, max=0.5, label="Held out", help="Share of the rows kept to measure on")
    evaluations: int = knob(3, min=1, max=1000, label="Evaluations", help="How often the held-out loss is measured")
    patience: int = knob(
        0, min=0, max=1000, label="Patience", help="Evaluations without a better held-out loss before it ends; 0 never"
    )
    save_every: int = knob(
        0, min=0, max=1_000_000, label="Save every", help="Steps between checkpoints; 0 saves about every half minute"
    )
    samples: int = knob(3, min=0, max=20, label="Samples", help="Held-out prompts answered at each evaluation")
    precision: str = knob(
        "auto",
        choices=("auto", "float32", "bfloat16", *QUANTISED),
        label="Precision",
        help="Of the frozen base; auto fits the machine, bfloat16 halves the memory, int8 and nf4 need a CUDA GPU",
    )
    checkpointing: str = knob(
        "auto",
        choices=("auto", "on", "off"),
        label="Activation checkpointing",
        help="Computes activations twice instead of keeping them; auto does so when memory runs short",
    )
    seed: int = knob(0, min=0, max=2**31 - 1, label="Seed", help="Same seed, same run")

    def at_usual_rate_of(self, method: str) -> "TrainConfig":
        """With the method's own default for the learning rate, where this one has LoRA's: it would be far too high."""
        if self.learning_rate != TrainConfig.learning_rate or method not in RATES:
            return self
        return replace(self, learning_rate=round(self.learning_rate * RATES[method], 9))

    def usual_rate(self, parameters: int, method: str = "lora") -> float:
        """A learning rate that short runs of a method bear on a model of this size: it falls with the size's root."""
        return RATES.get(method, 1.0) * 5e-3 * min(1.0, math.sqrt(135e6 / parameters))

    def total_steps(self, rows: int, tokens: int = 0) -> int:
        """Steps for this many training rows and tokens. Raises E_CONFIG when neither steps nor epochs is given."""
        together = max(1, self.batch_tokens * rows // max(1, tokens)) if self.batch_tokens else self.batch_size
        total = self.steps or math.ceil(self.epochs * rows / min(together, rows))
        if total < 1:
            raise StudioError("E_CONFIG", "Steps and epochs are both 0.", "Give at least one step.")
        return total


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is picked."""

    max_new_tokens: int = knob(128, min=1, max=4096, label="New tokens", help="Longest answer, in tokens")
    temperature: float = knob(0.0, min=0.0, max=4.0, label="Temperature", help="0 takes the likeliest token each time")
    top_p: float = knob(1.0, min=0.01, max=1.0, label="Top p", help="Sample among the likeliest tokens of this mass")
    seed: int = knob(0, min=0, max=2**31 - 1, label="Seed", help="Same seed, same text")
