"""What one table hands to the printer, and how much work a run may do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.verdict import Claim, markdown


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is trained and measured. The same code runs at any scale."""

    seeds: tuple[int, ...]  # of every training on the encoder
    grid: tuple[float, ...]  # learning rates tried, as multiples of the method's centre
    steps: int  # table a
    short_steps: int  # tables c and d, whose adapters e and f look into
    tuning_steps: int
    batch: int
    tuning_rows: int
    heldout_rows: int
    text_steps: int  # table b
    text_tuning_steps: int
    text_batch: int
    meanings: int  # held-out meaning representations
    tuning_meanings: int
    glue: tuple[str, ...]  # methods of table a on SST-2
    cola: tuple[str, ...]  # and on CoLA, which takes more training than this to learn at all
    text: tuple[str, ...]  # methods of table b
    rounds: int  # of table g, after one that is not counted
    shapes: tuple[tuple[int, int], ...]  # of table g: batch, tokens


# The budget of the full run, in minutes on two cores of this class alone, is in the docstring of `paper`.
EVERY_GLUE = ("full", "bitfit", "adapter_h", "adapter_p", "top", "lora", "dora")
EVERY_TEXT = ("full", "bitfit", "adapter_h", "adapter_l", "top", "prefix", "prompt", "lora")
FULL = Scale(
    seeds=(0, 1, 2),
    grid=(1 / 3, 1.0, 3.0),
    steps=120,
    short_steps=80,
    tuning_steps=40,
    batch=16,
    tuning_rows=400,
    heldout_rows=1000,
    text_steps=32,
    text_tuning_steps=6,
    text_batch=8,
    meanings=32,
    tuning_meanings=32,
    glue=EVERY_GLUE,
    cola=("full", "bitfit", "lora"),
    text=EVERY_TEXT,
    rounds=30,
    shapes=((1, 1), (1, 128), (8, 64)),
)
QUICK = Scale(
    seeds=(0, 1),
    grid=(1.0,),
    steps=25,
    short_steps=8,
    tuning_steps=0,
    batch=16,
    tuning_rows=50,
    heldout_rows=200,
    text_steps=4,
    text_tuning_steps=0,
    text_batch=4,
    meanings=8,
    tuning_meanings=4,
    glue=("full", "bitfit", "adapter_h", "lora"),
    cola=("full", "bitfit", "adapter_h", "lora"),
    text=("full", "adapter_l", "prefix", "lora"),
    rounds=7,
    shapes=((1, 1), (1, 128)),
)


@dataclass(kw_only=True)
class Report:
    """One table: what it says, on which settings, and its figures for machines."""

    letter: str
    title: str
    tables: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    trained_s: float = 0.0  # of the trainings behind the table, whenever they were run
    wall_s: float = 0.0  # of this run

    def add_table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.tables.append(markdown(head, rows))

    def results(self, name: str, found: Sequence[Mapping[str, Any]]) -> None:
        """Note the scores of some trainings under a name, and the time that they took."""
        self.figures[name] = [one["scores"] for one in found]
        self.trained_s += sum(one["seconds"] for one in found)

    def ratio(self, name: str, ours: float, theirs: float) -> None:
        """Note a ratio for machines; none where it would divide by zero."""
        if theirs:
            self.ratios[name] = ours / theirs

    @property
    def text(self) -> str:
        """The table in Markdown."""
        spent = f"Wall time {self.wall_s:.0f} s"
        if self.trained_s:
            spent += f"; the trainings behind it took {self.trained_s:.0f} s when they were run"
        parts = [
            f"## ({self.letter}) {self.title}",
            *self.tables,
            "\n".join(f"- {claim.sentence}" for claim in self.claims),
        ]
        return "\n\n".join([*parts, " ".join([*self.settings, f"{spent}."])]) + "\n"
