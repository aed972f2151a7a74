"""A conversation with two models: one person's messages, each model's own answers, and what of it still fits.

Knows no model and no page; how a tokenizer reads messages is in data.words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_studio.data.formats import Message
from lora_studio.data.words import SPEAKERS, prompt_ids
from lora_studio.errors import StudioError

SIDES = ("base", "adapted")


@dataclass(frozen=True)
class Turn:
    """What was said and what each side answered, nothing yet in the newest turn; strength: the adapted side's."""

    said: str
    base: str = ""
    adapted: str = ""
    strength: float = 1.0


@dataclass(frozen=True)
class Moment:
    """The answers so far, base first, and what each side no longer read."""

    answers: Sequence[Any]  # generate.Answer
    left_out: tuple[int, int]  # oldest turns
    template: str  # a remark, where the model has no template of its own
    base_difference: float  # as results.Comparison's
    exact: bool


def messages(turns: Sequence[Turn], side: str) -> list[Message]:
    """The conversation as one side knows it, up to what was said last."""
    found = []
    for turn in turns:
        found += [Message("user", turn.said), Message("assistant", getattr(turn, side))]
    return found[:-1]


def fitting(tokenizer: Any, turns: Sequence[Turn], side: str, tokens: int, characters: int) -> tuple[list[int], int]:
    """Token ids of as many of the newest turns as fit, and how many older ones are left out. Raises E_CONTEXT.

    tokens, characters: that the conversation may have.
    """
    for left_out in range(len(turns)):
        said = messages(turns[left_out:], side)
        newest = left_out == len(turns) - 1
        if sum(len(message.content) for message in said) > characters and not newest:
            continue
        ids = prompt_ids(tokenizer, said)
        if len(ids) <= tokens:
            return ids, left_out
        if newest:
            message = f"The message is {len(ids):,} tokens long; {max(tokens, 0):,} fit beside the answer."
            raise StudioError("E_CONTEXT", message, "Shorten it, or ask for a shorter answer.")
    raise AssertionError("a conversation has at least one turn")


def template_remark(tokenizer: Any) -> str:
    """What a person should know of a model without a chat template; empty for the others."""
    if getattr(tokenizer, "chat_template", None):
        return ""
    user, assistant = SPEAKERS["user"], SPEAKERS["assistant"]
    return f"This model has no chat template; it reads plain lines: “{user}: …” and “{assistant}: …”."
