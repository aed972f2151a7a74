"""Desk: the Studio behind the page, and how far the start of the app has come.

The page is up before torch is imported and before the starter model is here. Handlers that need either ask the
desk for the Studio and wait there; the page's header says what they wait for.
"""

import logging
import threading
from typing import Any

from lora_studio.errors import StudioError
from lora_studio.models import STARTER, hardware
from lora_studio.studio import Studio

log = logging.getLogger(__name__)
RETRY_S = 60  # between two attempts to fetch the starter model


class Desk:
    """One per app; handlers receive it first."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._libraries = threading.Event()  # torch and transformers are imported, or cannot be
        self._starter = threading.Event()  # the starter model is here, or could not be fetched
        self._broken: StudioError | None = None
        self._missing: StudioError | None = None
        self._hardware, self._line = "", "Loading the libraries"

    def begin(self) -> "Desk":
        """Prepare in the background; call once the page is served."""
        threading.Thread(target=self._prepare, name="prepare", daemon=True).start()
        return self

    def ready(self, model: str = "") -> Studio:
        """The Studio, once the libraries are loaded and, when `model` is the starter, it is on this machine."""
        self._libraries.wait()
        if self._broken:
            raise self._broken
        if model == STARTER:
            self._starter.wait()
            if self._missing:
                raise self._missing
        return self.studio

    def status(self) -> dict[str, Any]:
        """For the header: the hardware, what is going on or missing, and whether that may still change."""
        problem = self._broken or self._missing
        line = f"{problem}" if problem else self._line
        settled = self._starter.is_set() and not self._missing
        return {"hardware": self._hardware, "line": line, "problem": bool(problem), "settled": settled}

    def _prepare(self) -> None:
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401

            self._hardware = hardware()
        except (ImportError, OSError, RuntimeError) as error:
            log.exception("the libraries do not load")
            self._broken = StudioError("E_INSTALL", f"torch does not load: {error}.", "Run the installation again.")
        self._libraries.set()
        while not self._broken and not self._fetch_starter():
            threading.Event().wait(RETRY_S)

    def _fetch_starter(self) -> bool:
        try:
            self._line = "Looking for the starter model"
            self.studio.models.fetch(STARTER, say=self._say)
            self._missing, self._line = None, ""
        except StudioError as error:
            self._missing = error
        except Exception:
            log.exception("the starter model could not be fetched")
            self._missing = StudioError(
                "E_STARTER", "The starter model could not be fetched.", "Choose another model; this is tried again."
            )
        self._starter.set()
        return self._missing is None

    def _say(self, line: str) -> None:
        log.info("%s", line)
        self._line = line
