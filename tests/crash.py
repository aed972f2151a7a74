"""What a kill looks like to code that runs in the test's own process."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest


class Crash(BaseException):
    """The process is no more; nothing catches it."""


def break_off(patch: pytest.MonkeyPatch, functions: Sequence[tuple[Any, str]], at: int) -> list[str]:
    """Let the process end instead of the at-th call of one of these (owner, name); the calls so far."""
    made: list[str] = []

    def crashing(real: Callable, name: str) -> Callable:
        def call(*given: Any, **named: Any) -> Any:
            made.append(name)
            if len(made) == at:
                raise Crash
            return real(*given, **named)

        return call

    for owner, name in functions:
        patch.setattr(owner, name, crashing(getattr(owner, name), name))
    return made
