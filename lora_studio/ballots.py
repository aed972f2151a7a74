"""Ballots(home): the blind tests of one owner, each a small file HOME/blind/<id>.json that is replaced whole.

The newest are kept. One app has a root, so one lock lets changes wait for each other. Knows no models.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lora_studio.blind import Trial, from_json
from lora_studio.errors import StudioError, quote
from lora_studio.runs import disk
from lora_studio.runs.store import ID, read_json, write_json

log = logging.getLogger(__name__)

MOST = 10
_WRITING = threading.Lock()


class Ballots:
    """All blind tests of one home folder."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "blind"

    def add(self, trial: Trial) -> None:
        """Keep a new one, instead of the oldest where there are MOST."""
        with _WRITING:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(trial)
            for old in self._newest_first()[MOST:]:
                old.unlink(missing_ok=True)

    def get(self, id: str) -> Trial:
        """The blind test with this id. Raises E_TRIAL_NOT_FOUND."""
        value = read_json(self._path(id)) if ID.fullmatch(id) else None
        try:
            if value is not None:
                return from_json(value)
        except (KeyError, TypeError) as error:
            log.warning("blind test %s cannot be read: %s", id, error)
        raise StudioError("E_TRIAL_NOT_FOUND", f"There is no blind test {quote(id, 40)}.", "Start one.")

    def newest(self) -> Trial | None:
        """The one that was voted on last."""
        for path in self._newest_first():
            try:
                return self.get(path.stem)
            except StudioError:  # damaged, which `get` has logged
                continue
        return None

    def change(self, id: str, by: Callable[[Trial], Trial]) -> Trial:
        """Replace a blind test by what `by` makes of it. Raises E_TRIAL_NOT_FOUND."""
        with _WRITING:
            before = self.get(id)
            after = by(before)
            if after != before:
                self._write(after)
        return after

    def _write(self, trial: Trial) -> None:
        try:
            write_json(self._path(trial.id), asdict(trial))
        except OSError as error:
            if disk.is_full(error, self.folder):
                raise StudioError("E_DISK", "The disk is full; this was not kept.", "Delete runs.") from None
            raise

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.json"

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"), key=lambda path: -path.stat().st_mtime_ns)
