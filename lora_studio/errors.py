"""The one exception whose text is written for the person at the screen; and what no text may hold."""

import re
from collections.abc import Mapping
from typing import Any

SECRETS = re.compile(r"\bhf_(?:oauth_[\w.-]{8,}|[A-Za-z0-9]{20,})|(?i:\bbearer\s+)[\w.~+/=-]{8,}")


class StudioError(Exception):
    """A user's mistake or a failed precondition: what happened, where, and what to do about it.

    code     stable identifier such as "E_EMPTY"; tests and scripts match on it
    message  names the place, what was found and what was expected
    hint     the next thing to try; may be empty
    change   settings of the form that would do it; may be empty
    """

    def __init__(self, code: str, message: str, hint: str = "", change: Mapping[str, Any] | None = None) -> None:
        super().__init__(code, message, hint, change)  # all of it, so that the error survives pickling
        self.code, self.message, self.hint, self.change = code, message, hint, dict(change or {})

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


def quote(value: object, limit: int = 80) -> str:
    """The user's own value inside a message: printable, quoted and at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def redacted(text: str) -> str:
    """The text without tokens, whatever quoted them."""
    return SECRETS.sub("[token]", text)
