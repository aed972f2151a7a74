"""What the rows mean: FORMATS turns a table's columns into messages or plain text.

A format says which roles it needs, what columns with these roles are usually called, and how one row
becomes an Example. This module does not know files, tokens or chat templates.
"""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_studio.data.readers import Table
from lora_studio.errors import StudioError, quote

SPEAKERS = {  # what data sets call them -> what chat templates call them
    **{"system": "system", "developer": "system"},
    **{"user": "user", "human": "user", "prompter": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"},
}
LEFT_OUT, REPEATED = "rows left out: nothing to learn in them", "rows repeat an earlier row"  # after their number
MOST_LABELS = 100  # that a run may choose among
NEVER_TEXT = ("id", "idx", "index", "uuid", "split", "url")  # columns no guess takes


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One row to learn from: a conversation that ends with the answer, or plain text."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    row: int = 0  # in the file, from 1

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the answer; empty for plain text."""
        return self.messages[:-1]

    @property
    def target(self) -> str:
        """The answer, which is the last message; empty for plain text."""
        return self.messages[-1].content if self.messages else ""


Notes = Counter[str]  # what happened to rows -> how many


@dataclass(frozen=True)
class Format:
    """How rows of one shape become Examples."""

    name: str
    label: str
    roles: tuple[str, ...]
    optional: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]]  # role -> usual column names
    convert: Callable[["Cells", Notes], Example]  # one row; an Example without a target is dropped


@dataclass(frozen=True)
class Cells:
    """One row seen through a mapping of roles to columns."""

    row: Mapping[str, Any]
    number: int
    columns: Mapping[str, str]

    def value(self, role: str) -> Any:
        return self.row[self.columns[role]] if role in self.columns else None

    def text(self, role: str) -> str:
        """The cell as text: numbers and true/false as JSON writes them, nothing as ""."""
        value = self.value(role)
        if value is None or isinstance(value, str):
            return value or ""
        if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
            return json.dumps(value)
        message = f"Row {self.number:,}, column {quote(self.columns[role], 40)} is {quote(value, 60)}; expected text."
        raise StudioError("E_TYPE", message, "Choose a column of text, or flatten this one.")


def guess(table: Table) -> tuple[str, dict[str, str]]:
    """The format a table most likely has, and {role: column}; always something `convert` can try."""
    usual = _usual(table.columns)
    if {"role", "content"} <= usual.keys() or {"from", "value"} <= usual.keys():
        message = "The rows are turns of one conversation; expected one conversation per row."
        raise StudioError("E_CHAT", message, 'Write {"messages": [{"role": "user", "content": "..."}, ...]} per line.')
    for format in FORMATS.values():
        found = _find_columns(format, usual)
        if format.name == "text" or any(role not in found for role in format.roles):
            continue
        if format.name != "messages" or _is_chat(table, found["messages"]):
            return format.name, found
    return _guess_from_values(table, usual)


def columns_for(format: str, columns: Sequence[str]) -> dict[str, str]:
    """{role: column} for a chosen format: by the usual names, what is left in file order."""
    wanted, usual = _named(format), _usual(columns)
    found = _find_columns(wanted, usual)
    taken = {*found.values(), *(usual[name] for name in NEVER_TEXT if name in usual)}
    free = [column for column in columns if column not in taken]
    missing = [role for role in wanted.roles if role not in found]
    return found | dict(zip(missing, free, strict=False))


def convert(table: Table, format: str, columns: Mapping[str, str]) -> tuple[list[Example], list[str]]:
    """Every usable row as an Example, and a warning for each kind of row that was left out or changed."""
    chosen = _named(format)
    columns = {role: column for role, column in columns.items() if column}
    _check_mapping(chosen, columns, table)
    notes = Notes()
    examples = []
    for number, row in enumerate(table.rows, 1):
        example = chosen.convert(Cells(row, number, columns), notes)
        if (example.target or example.text).strip():
            examples.append(example)
    if not examples:
        empty = quote(columns[chosen.roles[-1]], 40)
        message = f"All {len(table.rows):,} rows have nothing to learn in column {empty}."
        raise StudioError("E_NO_TARGET", message, "Choose the column that holds the answers.")
    if dropped := len(table.rows) - len(examples):
        notes[LEFT_OUT] = dropped
    if repeated := len(examples) - len({(example.messages, example.text) for example in examples}):
        notes[REPEATED] = repeated
    return examples, [f"{count:,} {what}" for what, count in notes.items() if count]


def asked(table: Table) -> list[Example]:
    """Every row as something to ask, its columns as guessed; an answer need not be in it. Raises as `convert` does."""
    format, columns = guess(table)
    return [FORMATS[format].convert(Cells(row, number, columns), Notes()) for number, row in enumerate(table.rows, 1)]


def labels_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """The different answers of the rows, sorted: what a classifier chooses among. Raises E_LABELS."""
    labels = sorted({example.target.strip() for example in examples})
    hint = "Choose the column that holds the labels, or the task that writes text."
    if "" in labels:
        row = next(example.row for example in examples if not example.target.strip())
        raise StudioError("E_LABELS", f"Row {row:,} has no label.", hint)
    if len(labels) < 2:
        only = f": {quote(labels[0], 40)}" if labels else ""
        message = f"The rows have {len(labels)} different label{'s'[: len(labels) != 1]}{only}; expected at least 2."
        raise StudioError("E_LABELS", message, hint)
    if len(labels) > MOST_LABELS:
        message = f"The rows have {len(labels):,} different labels; at most {MOST_LABELS} are learnt."
        raise StudioError("E_LABELS", message, hint)
    return tuple(labels)


# The formats, one row each


def _from_chat(cells: Cells, notes: Notes) -> Example:
    turns = _turns(cells)
    messages = tuple(_message(turn, cells.number) for turn in turns)
    if system := cells.text("system"):
        messages = (Message("system", system), *messages)
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise _bad_chat(cells.number, "has no answer by the assistant")
    if "system" in roles[1:]:
        wrong = "has two system messages" if roles.count("system") > 1 else "has its system message after another one"
        raise _bad_chat(cells.number, wrong)
    if roles[roles[0] == "system"] == "assistant":
        raise _bad_chat(cells.number, "begins with the assistant")
    while messages[-1].role != "assistant":
        notes["messages behind the last answer left out"] += 1
        messages = messages[:-1]
    return Example(messages, row=cells.number)


def _from_pair(cells: Cells, notes: Notes) -> Example:
    return _answered(cells, cells.text("prompt"), cells.text("completion"), notes)


def _from_instruction(cells: Cells, notes: Notes) -> Example:
    parts = (cells.text("instruction"), cells.text("input"))
    return _answered(cells, "\n\n".join(part for part in parts if part.strip()), cells.text("output"), notes)


def _from_label(cells: Cells, notes: Notes) -> Example:
    label = cells.value("label")
    whole = isinstance(label, float) and label.is_integer()  # a column of numbers with a gap in it, written elsewhere
    notes["labels such as 1.0 read as 1"] += whole
    return _answered(cells, cells.text("text"), str(int(label)) if whole else cells.text("label"), notes)


def _from_text(cells: Cells, notes: Notes) -> Example:
    return Example(text=cells.text("text"), row=cells.number)


def _answered(cells: Cells, prompt: str, answer: str, notes: Notes) -> Example:
    system = cells.text("system")
    if answer.strip() and not prompt.strip():
        notes["rows have an answer but no prompt"] += 1
    messages = (Message("user", prompt), Message("assistant", answer))
    return Example((Message("system", system), *messages) if system.strip() else messages, row=cells.number)


# Conversations


def _turns(cells: Cells) -> list[Any]:
    turns = cells.value("messages")
    if isinstance(turns, str):  # a table cell that holds JSON
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise _bad_chat(cells.number, f"is {quote(turns, 40)}, not a JSON list of messages") from None
    if not isinstance(turns, list) or not turns:
        raise _bad_chat(
            cells.number, "has no messages" if turns in ([], None) else f"is {quote(turns, 40)}, not a list"
        )
    return turns


def _message(turn: Any, row: int) -> Message:
    if not isinstance(turn, dict):
        raise _bad_chat(row, f"has the message {quote(turn, 40)}, not an object")
    role = turn.get("role") or turn.get("from")
    if not role:
        raise _bad_chat(row, "has a message without a role")
    if not isinstance(role, str) or role.lower() not in SPEAKERS:
        raise _bad_chat(row, f"has the unknown role {quote(role, 40)}")
    if turn.get("tool_calls"):
        raise _bad_chat(row, "calls tools, which is not supported")
    content = next((turn[key] for key in ("content", "value") if turn.get(key) is not None), None)
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str):
        raise _bad_chat(row, f"has the content {quote(content, 40)}, not text")
    return Message(SPEAKERS[role.lower()], content)


def _bad_chat(row: int, wrong: str) -> StudioError:
    hint = "A conversation is an optional system message, then user and assistant in turn."
    return StudioError("E_CHAT", f"Row {row:,} {wrong}.", hint)


def _is_chat(table: Table, column: str) -> bool:
    value = next((row[column] for row in table.rows if row[column]), None)
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


# Columns


def _named(format: str) -> Format:
    if format not in FORMATS:
        raise StudioError("E_FORMAT", f"There is no format {quote(format)}.", f"Give one of: {', '.join(FORMATS)}.")
    return FORMATS[format]


def _usual(columns: Sequence[str]) -> dict[str, str]:
    """Columns by their names as other people write them; of two alike the first."""
    return {re.sub(r"\W+", "_", name.strip().lower()): name for name in reversed(columns)}


def _find_columns(format: Format, usual: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for role in (*format.roles, *format.optional):
        names = [usual[name] for name in format.names[role] if name in usual]
        if names and names[0] not in found.values():
            found[role] = names[0]
    return found


def _guess_from_values(table: Table, usual: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Prompt and completion in the order of the file, or text where there is one column."""
    ids = {usual[name] for name in NEVER_TEXT if name in usual}
    columns = [name for name in table.columns if name not in ids] or list(table.columns)
    texts = [name for name in columns if _is_text(table, name)] or columns
    if len(columns) == 2:
        return "prompt_completion", {"prompt": columns[0], "completion": columns[1]}
    if len(texts) == 1:
        return "text", {"text": texts[0]}
    known = _find_columns(FORMATS["prompt_completion"], usual)
    answer = known.get("completion")
    prompt = known.get("prompt") or next(name for name in texts if name != answer)
    return "prompt_completion", {"prompt": prompt, "completion": answer or next(t for t in texts if t != prompt)}


def _is_text(table: Table, column: str) -> bool:
    return isinstance(next((row[column] for row in table.rows if row[column] is not None), None), str)


def _check_mapping(format: Format, columns: Mapping[str, str], table: Table) -> None:
    present = quote(", ".join(table.columns), 100)
    for role in format.roles:
        if role not in columns:
            message = f"No column is chosen for the {role}; the columns are {present}."
            raise StudioError("E_MISSING_COLUMN", message, f"Choose the column that holds the {role}.")
    for role, column in columns.items():
        if role not in format.names:
            known = ", ".join((*format.roles, *format.optional))
            raise StudioError("E_FORMAT", f"{format.label} has no role {quote(role, 40)}.", f"It has: {known}.")
        if column not in table.columns:
            close = difflib.get_close_matches(column, table.columns, 1)
            message = f"There is no column {quote(column, 40)}; the columns are {present}."
            hint = f"Did you mean {quote(close[0], 40)}?" if close else "Choose one of them."
            raise StudioError("E_MISSING_COLUMN", message, hint)


USUAL_NAMES = {  # role -> what its column is usually called, in lower case
    "messages": ("messages", "conversations", "conversation", "chat", "dialog"),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
    "prompt": ("prompt", "question", "input", "query", "source", "user", "before"),
    "completion": ("completion", "answer", "response", "output", "target", "assistant", "reply", "after"),
    "text": ("text", "sentence", "message", "review", "content", "document"),
    "label": ("label", "labels", "class", "category", "intent", "sentiment", "tag"),
    "system": ("system", "system_prompt"),
}


def _format(
    name: str, label: str, convert: Callable[[Cells, Notes], Example], roles: str, optional: str = "system"
) -> Format:
    needed, extra = tuple(roles.split()), tuple(optional.split())
    return Format(name, label, needed, extra, {role: USUAL_NAMES[role] for role in needed + extra}, convert)


FORMATS: dict[str, Format] = {  # a guess takes the first that fits
    format.name: format
    for format in (
        _format("messages", "Conversations", _from_chat, "messages"),
        _format("instruction", "Instruction and answer", _from_instruction, "instruction output", "input system"),
        _format("prompt_completion", "Prompt and answer", _from_pair, "prompt completion"),
        _format("text_label", "Text and label", _from_label, "text label", optional=""),
        _format("text", "Plain text", _from_text, "text", optional=""),
    )
}
