"""The base model in memory: one for all owners, with the adapters of the runs that are asked for.

Whoever uses it holds `busy`: one forward at a time. This file does not know what is asked of the model.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lora_studio.core.spec import VIRTUAL, BaselineSpec
from lora_studio.errors import StudioError, quote
from lora_studio.models import ModelLibrary
from lora_studio.runs.config import Run

LIBRARIES = 4  # revisions of which the tokenizer and the structure are kept


@dataclass
class Loaded:
    """A base model with the adapters that are on it, by run id."""

    key: tuple[str, str, tuple[str, ...], str]  # name, revision, labels, precision
    lora: Any
    tokenizer: Any


class AtHand:
    """Loads a base when it is another than before, and the adapters each time."""

    def __init__(self, models: ModelLibrary) -> None:
        self.models = models
        self.loaded: Loaded | None = None
        self._libraries: dict[tuple[str, str], ModelLibrary] = {}  # by model and revision
        self.busy = threading.Lock()

    @contextmanager
    def of(self, views: Sequence[Run], precision: str = "") -> Iterator[Loaded]:
        """`with_adapters`, and nobody else's use of the model meanwhile."""
        with self.busy:
            yield self.with_adapters(views, precision)

    def with_adapters(self, views: Sequence[Run], precision: str = "") -> Loaded:
        """The runs' base model with their adapters attached; call with `busy` held.

        precision: of the base; empty takes what suits comparing on this machine.
        """
        from lora_studio.adapters import load

        if not views:
            raise no_run()
        for view in views:
            check_adapter(view)
        bases = {view.config.model for view in views}
        if len(bases) > 1:
            raise StudioError(
                "E_MIXED_BASES", f"These runs have different bases: {', '.join(sorted(bases))}.", "Choose one."
            )
        if len({view.revision for view in views}) > 1:
            message = f"{quote(views[0].config.model)} was another when some of these runs were trained on it."
            raise StudioError("E_MIXED_BASES", message, "Choose runs of the same revision.")
        if len({view.labels for view in views}) > 1:
            message = "These runs have different labels, or some choose labels and some write text."
            raise StudioError("E_MIXED_BASES", message, "Choose runs that learnt the same task.")
        loaded = self.base(views[0], precision or self.precision(views[0]))
        for name in loaded.lora.names:  # others take memory, and a running run may have saved a better one since
            loaded.lora.remove(name)
        for view in views:
            load(loaded.lora, view.path / "adapter", view.id)
        return loaded

    def base(self, view: Run, precision: str) -> Loaded:
        """The run's base as it was when the run was planned. Raises E_CHANGED where it is another now."""
        from lora_studio.core.lora import LoRA
        from lora_studio.models import device

        model, revision, labels = view.config.model, view.revision, view.labels
        key = model, revision, labels, precision
        if self.loaded is None or self.loaded.key != key:
            self.loaded = None  # free the old one first
            models = self.models_of(view)
            lora = LoRA(models.load(model, precision=precision, on=device(), labels=len(labels)))
            self.loaded = Loaded(key, lora, models.tokenizer(model))
        return self.loaded

    def models_of(self, view: Run) -> ModelLibrary:
        """The models, with the run's base at the run's own revision."""
        key = view.config.model, view.revision
        if key not in self._libraries:
            for old in [*self._libraries][: 1 - LIBRARIES]:
                del self._libraries[old]
            self._libraries[key] = self.models.at(*key)
        return self._libraries[key]

    def precision(self, view: Run) -> str:
        """In which the base of a run is loaded for comparing."""
        from lora_studio.models import device, inference_precision

        return inference_precision(device(), self.parameters(view))

    def exact(self, view: Run) -> str:
        """In which it is loaded for merging: float32, where two of it fit into the memory that is free."""
        from lora_studio.models import memory

        return "float32" if 2.5 * 4 * self.parameters(view) < memory()[0] else self.precision(view)

    def parameters(self, view: Run) -> int:
        skeleton = self.models_of(view).skeleton(view.config.model, labels=len(view.labels))
        return sum(tensor.numel() for tensor in skeleton.parameters())

    def room(self, views: Sequence[Run], loaded: Loaded) -> int:
        """Tokens that a prompt and its answer may have together, beside the virtual ones of these runs."""
        from lora_studio.models import context

        methods = [view.config.method for view in views]
        virtual = [one.size for one in methods if isinstance(one, BaselineSpec) and one.kind in VIRTUAL]
        return (context(loaded.lora.model) or sys.maxsize) - max(virtual, default=0)


def check_adapter(view: Run) -> None:
    """Raise E_NO_ADAPTER for a run that has none yet."""
    if not view.has_adapter:
        message = f"{quote(view.name)} has not saved an adapter yet."
        raise StudioError("E_NO_ADAPTER", message, "Wait for an evaluation.")


def no_run() -> StudioError:
    return StudioError("E_RUN_NOT_FOUND", "No run is chosen.", "Choose at least one.")
