"""Desk: what a handler receives first: the Studio as its visitor sees it, and how far the start of the app has come.

The page is up before torch is imported and before the starter model is here. Handlers that need either ask the
desk for the Studio and wait there; the page's header says what they wait for.

The app has one desk, which knows everybody's work and is no handler's where visitors are told apart: `mine` makes of
a handler what Gradio calls, and gives it the desk of whoever asked. So it cannot reach another's run or dataset,
whatever id it is sent.
"""

import copy
import functools
import gc
import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from lora_studio.errors import StudioError
from lora_studio.models import STARTER, ModelLibrary, hardware
from lora_studio.owners import NOBODY
from lora_studio.runs.config import DataChoice, Run
from lora_studio.studio import Studio
from lora_studio.ui.boundary import toasted
from lora_studio.visitors import Downloads, Pages, Rate, Visitor, nobody, visitor_of

log = logging.getLogger(__name__)
NO_RUN = "E_NO_RUN", "No run is chosen.", "Train one first; it appears here with its first evaluation."
NO_DATA = "E_NO_DATA", "No dataset is chosen.", "Take an example in the Data tab, or bring a file."
RETRY_S = 60  # between two attempts to fetch the starter model
REMEMBERED = 16  # Studios of visitors, each with the rows it read last


class Desk:
    """Handlers receive it first. visitors: whether they are told apart; else everything is everybody's."""

    def __init__(self, studio: Studio, *, visitors: bool = False) -> None:
        self.visitors, self.limits = visitors, studio.limits
        self.downloads, self.pages = Downloads(), Pages()
        self._studio, self._start = studio, _Start(studio.models)
        self._starts = Rate(studio.limits.starts_a_minute)
        self._who: Visitor | None = None
        self._refusal: StudioError | None = None
        self._remembered: OrderedDict[tuple, Studio] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self) -> "Desk":
        """Prepare in the background; call once the page is served."""
        self._start.begin()
        return self

    def status(self) -> dict[str, Any]:
        """For the header: the hardware, what is going on or missing, and whether that may still change."""
        said = self._start.status()
        return said | {"line": f"{self._refusal}", "problem": True} if self._refusal else said

    @property
    def studio(self) -> Studio:
        """The Studio as the visitor sees it. Raises E_VISITOR where nobody can tell who that is."""
        if not self.visitors:
            return self._studio
        assert self._who, "a handler holds the desk that knows everybody's work; wrap it with mine"
        if self._refusal:
            raise self._refusal
        return self._studio_of(self._who)

    def ready(self, model: str = "") -> Studio:
        """The Studio, once the libraries are loaded and, when `model` is the starter, it is on this machine."""
        self._start.wait_for(model)
        return self.studio

    def run(self, chosen: str | None) -> Run:
        """The run that a tab has chosen. Raises E_NO_RUN where there is none, E_RUN_NOT_FOUND."""
        if not chosen:
            raise StudioError(*NO_RUN)
        return self.studio.runs.get(chosen)

    def may_start(self) -> None:
        """Count one start of training. Raises E_TOO_MANY, when the visitor has had as many within a minute."""
        for client in {self._who.owner or "", self._who.address} if self._who else ():
            if wait := self._starts.wait_s(client):
                message = f"More than {self._starts.most:.0f} runs were started within a minute."
                raise StudioError("E_TOO_MANY", message, f"Wait {wait:.0f} s.")

    def hand_out(self, path: Path) -> str:
        """The address from which the visitor, and nobody else, may fetch a file, once; it goes with its folder."""
        return f"download/{self.downloads.offer(path, (self._who and self._who.owner) or NOBODY)}"

    def of(self, request: gr.Request | None) -> "Desk":
        """This desk for whoever sent the request; what that one may not is said when the Studio is asked for."""
        if not self.visitors:
            return self
        assert request, "Gradio gives every handler the request"
        came: Any = getattr(request, "request", None) or request  # a server function gets FastAPI's
        scoped = copy.copy(self)
        scoped._who = visitor_of(came)
        page = getattr(request, "session_hash", None) if came is not request else None
        if scoped._who.owner is None:
            scoped._refusal = nobody()
        elif page and not self.pages.belongs(page, scoped._who.browser):
            scoped._refusal = StudioError("E_PAGE", "This page was opened in another browser.", "Load it again.")
        return scoped

    def mine(self, handler: Callable[..., Any], *given: Any) -> Callable[..., Any]:
        """A handler, a function or generator of a Desk, `given` and plain values, as Gradio calls it: with the request.

        Problems that it does not place itself are toasts.
        """
        guarded, signature = toasted(handler), inspect.signature(handler)
        _, *parameters = signature.parameters.values()
        asked = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=gr.Request)
        shown = signature.replace(parameters=[asked, *parameters[len(given) :]])

        @functools.wraps(handler)
        def once(request: gr.Request, *args: Any, **kwargs: Any) -> Any:
            return guarded(self.of(request), *given, *args, **kwargs)

        @functools.wraps(handler)
        def stream(request: gr.Request, *args: Any, **kwargs: Any) -> Iterator[Any]:
            yield from guarded(self.of(request), *given, *args, **kwargs)

        made: Any = stream if inspect.isgeneratorfunction(guarded) else once
        made.__signature__ = shown  # Gradio finds out from these what to call it with
        made.__annotations__ = {name: one.annotation for name, one in shown.parameters.items()}
        made.__annotations__["return"] = shown.return_annotation
        return made

    def _studio_of(self, who: Visitor) -> Studio:
        key = who.owner, who.operator
        with self._lock:
            found = self._remembered.pop(key, None)
            if found is None:
                found = self._studio.by(who.operator) if who.operator else self._studio.of(who.owner or "")
            self._remembered[key] = found
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return found


def data_choice(choice: Mapping[str, Any] | None) -> DataChoice:
    """The dataset that the Data tab has chosen. Raises E_NO_DATA where there is none."""
    if not choice:
        raise StudioError(*NO_DATA)
    return DataChoice(**choice)


class _Start:
    """How far the app has come: its libraries, then the starter model."""

    def __init__(self, models: ModelLibrary) -> None:
        self._models = models
        self._libraries = threading.Event()  # torch and transformers are imported, or cannot be
        self._starter = threading.Event()  # the starter model is here, or could not be fetched
        self._broken: StudioError | None = None
        self._missing: StudioError | None = None
        self._hardware, self._line = "", "Loading the libraries"

    def begin(self) -> None:
        threading.Thread(target=self._prepare, name="prepare", daemon=True).start()

    def wait_for(self, model: str) -> None:
        self._libraries.wait()
        if self._broken:
            raise self._broken
        if model == STARTER:
            self._starter.wait()
            if self._missing:
                raise self._missing

    def status(self) -> dict[str, Any]:
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
        gc.collect()
        gc.freeze()  # what the libraries keep is no garbage; no later collection needs to look through it
        self._libraries.set()
        while not self._broken and not self._fetch_starter():
            threading.Event().wait(RETRY_S)

    def _fetch_starter(self) -> bool:
        try:
            self._line = "Looking for the starter model"
            self._models.fetch(STARTER, say=self._say)
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
