"""Where an error becomes words on the page: the one place, for every handler.

A StudioError was written for the person at the screen and is shown as it is, escaped; anything else is logged
and shown as one plain sentence. A handler is wrapped by where its problem is to appear: beside its control
(`problem_last`), in place of its result (`problem_instead`), in what a script of the page is answered
(`problem_in_answer`), or as a toast (`toasted`).
"""

import functools
import html
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from lora_studio.errors import StudioError, redacted
from lora_studio.runs.config import change_in_words

log = logging.getLogger(__name__)

TRY = "<button type='button' class='try-example'>Try the example</button>"  # header.js knows what it does
NONE = "no-runs"  # the class of a list of runs that is empty; only beside one the offer is seen
OFFER = f"<span class='no-run'>There is no run to choose yet. {TRY}</span>"


def _press(control: str, words: str) -> str:
    """A button that presses a control of the page; header.js knows what it does."""
    return f"<button type='button' class='cure' data-press='{control}'>{words}</button>"


CURES = {  # one button, where one is enough
    "E_NO_DATA": TRY,
    "E_NO_RUN": TRY,
    "E_NO_ANSWER": _press("#chips [data-known=true]", "Take a held-out row"),
    "E_NO_ANSWERS": _press("#answer-all", "Answer all"),
    "E_NO_TEXT": _press("#compare-ways button[role=tab]", "Open Answers"),
}
UNEXPECTED = StudioError(
    "E_UNEXPECTED", "Something went wrong inside the app.", "Try again; the app's own output has the details."
)


def explain(error: Exception) -> StudioError:
    """The error as the person may read it; what was not meant for a person is logged."""
    if isinstance(error, StudioError):
        return error
    log.error("a handler failed", exc_info=error)
    return UNEXPECTED


def as_html(error: Exception) -> str:
    """The problem as a panel: what happened, what to do, the code in small, and the button that cures it."""
    said = explain(error)
    hint = f" {html.escape(redacted(said.hint))}" if said.hint else ""
    return (
        f"<div class='problem' role='alert'><b>{html.escape(redacted(said.message))}</b>{hint}"
        f" <code>{html.escape(said.code)}</code>{_cure(said)}</div>"
    )


def _cure(said: StudioError) -> str:
    if words := change_in_words(said.change):
        change = html.escape(json.dumps(said.change))
        return f"<button type='button' class='cure' data-change='{change}'>Use {html.escape(words)}</button>"
    return CURES.get(said.code, "")


def as_toast(error: Exception) -> gr.Error:
    """The problem as an exception that Gradio shows in a corner of the page and gives to API clients."""
    said = explain(error)
    return gr.Error(html.escape(redacted(f"{said} ({said.code})"), quote=False), duration=12, print_exception=False)


def problem_last(others: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The handler has `others` outputs, and one more that shows the problem or is cleared; works for generators."""
    left_alone = (gr.skip(),) * others

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def once(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            try:
                return (*_as_tuple(handler(*args, **kwargs)), "")
            except Exception as error:
                return (*left_alone, as_html(error))

        @functools.wraps(handler)
        def stream(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
            try:
                for values in handler(*args, **kwargs):
                    yield (*_as_tuple(values), "")
            except Exception as error:
                yield (*left_alone, as_html(error))

        return stream if inspect.isgeneratorfunction(handler) else once

    return decorate


def problem_instead(handler: Callable[..., str]) -> Callable[..., str]:
    """The handler gives one piece of HTML; a problem takes its place."""

    @functools.wraps(handler)
    def guarded(*args: Any, **kwargs: Any) -> str:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            return as_html(error)

    return guarded


def problem_in_answer(handler: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The handler answers a script of the page, which shows what stands under "problem"."""

    @functools.wraps(handler)
    def guarded(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            return {"problem": redacted(str(explain(error)))}

    return guarded


def toasted(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler has no place for a problem, so it is shown as a toast; also for API endpoints."""

    @functools.wraps(handler)
    def once(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise as_toast(error) from None

    @functools.wraps(handler)
    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from handler(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise as_toast(error) from None

    return stream if inspect.isgeneratorfunction(handler) else once


def _as_tuple(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)
