"""The proof of an export: what was written is loaded again, and must compute what the model in memory computes.

Logits are compared position by position on rows as training saw them, and so are greedy answers (of a classifier: its
labels). Knows no runs and no folders: who exports says what is looked at, before writing and after reading.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lora_studio.core.lean import Tokens
from lora_studio.generate import answers
from lora_studio.settings import Sampling

ROWS, TOKENS = 5, 256  # what is looked at: rows, and so many of the first tokens of each
PROMPTS, ANSWER_TOKENS = 3, 32
# The most that logits may be apart, as a share of the largest. An adapter is what it was; a sum in float32 differs by
# the order of sums; bfloat16 keeps 8 bits of each weight and float16 11. The starter in bfloat16 showed 0.006: four
# times that is allowed.
TOLERANCES = {"adapter": 0.0, "float32": 1e-4, "float16": 3e-3, "bfloat16": 2.5e-2}


@dataclass(frozen=True)
class Look:
    """What a model made of the rows: logits (tokens, vocabulary) of each, and the answers."""

    logits: Sequence[torch.Tensor]
    answers: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """How far the written files are from the model in memory.

    stored: adapter, or the dtype of a merged model. largest, mean: absolute differences of the logits; tolerance: what
    `largest` may be. same: how many of the `answers` are equal. problem: why nothing could be compared.
    """

    stored: str
    computed_in: str = ""
    rows: int = 0
    largest: float = 0.0
    mean: float = 0.0
    tolerance: float = 0.0
    answers: int = 0
    same: int = 0
    problem: str = ""

    @property
    def passed(self) -> bool:
        exact = self.stored != "adapter" or self.same == self.answers
        return not self.problem and self.rows > 0 and self.largest <= self.tolerance and exact

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    @property
    def verdict(self) -> str:
        return "passed" if self.passed else "not made" if self.problem or not self.rows else "failed"

    @property
    def sentence(self) -> str:
        """The verdict with its figures, in plain words."""
        if self.problem:
            return f"Not proven: the saved files could not be compared. {self.problem}"
        if not self.rows:
            return "Not proven: no row can be read any more, so there is nothing to compare on."
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''}"
        said = (
            f"The saved files were loaded again and compared with the model in memory on {rows}: logits"
            f" differ by {self.largest:.2g} at most and {self.mean:.2g} on average (allowed: {self.tolerance:.2g}),"
            f" and {self.same} of {self.answers} greedy answers are the same, computed in {self.computed_in}."
        )
        return said if self.passed else f"{said} That is more than is allowed: do not rely on these files."


def look(model: Any, tokenizer: Any, rows: Sequence[Tokens]) -> Look:
    """What `model` makes of these rows, as it is switched now."""
    rows = rows[:ROWS]
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([list(row.ids[:TOKENS])], device=device)).logits for row in rows]
    logits = [one[0].float().cpu() for one in logits]
    if any(row.label is not None for row in rows):
        return Look(logits, [str(int(one.argmax(-1))) for one in logits])
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
    return Look(logits, answers(model, tokenizer, [_asked(row) for row in rows[:PROMPTS]], sampling))


def compare(before: Look, after: Look, *, stored: str, computed_in: str) -> Proof:
    """The proof from two looks at the same rows, the second at what was saved."""
    if not before.logits:
        return Proof(stored=stored, computed_in=computed_in)
    pairs = list(zip(before.logits, after.logits, strict=True))
    apart = torch.cat([(new - old).abs().flatten() for old, new in pairs])
    size = max(float(old.abs().max()) for old, _ in pairs)
    return Proof(
        stored=stored,
        computed_in=computed_in,
        rows=len(pairs),
        largest=float(apart.max()),
        mean=float(apart.mean()),
        tolerance=TOLERANCES[stored] * size,
        answers=len(before.answers),
        same=sum(old == new for old, new in zip(before.answers, after.answers, strict=True)),
    )


def _asked(row: Tokens) -> Sequence[int]:
    """Where the model begins to answer a row; of a text without a question, its first half."""
    ids = row.ids[:TOKENS]
    start = next((place for place, learnt in enumerate(row.supervised[: len(ids)]) if learnt), 0)
    return ids[: start or max(1, len(ids) // 2)]
