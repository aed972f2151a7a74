"""A set of prompts and what several models answer to them, as a table that can be taken away.

A prompt may come with the answer that is wanted; then each answer is scored against it, by evaluate's own figures.
Knows no model; the texts of strangers are read by the sandbox before they come here.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_studio.data.formats import Example, Message
from lora_studio.errors import StudioError
from lora_studio.evaluate import score
from lora_studio.limits import Limits

BASE = "base"  # stands for the base model where otherwise a run's id stands
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would run
FIRST_WORDS = 8  # of a plain text, for the model to go on from


@dataclass(frozen=True)
class Prompt:
    """What is asked, and the answer that is wanted, if one is known."""

    messages: tuple[Message, ...]
    target: str = ""

    @property
    def text(self) -> str:
        """What is asked last."""
        return self.messages[-1].content


@dataclass(frozen=True)
class Answers:
    """The answers that are there: by number of the prompt, one text per name."""

    names: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    texts: Mapping[int, tuple[str, ...]]

    @property
    def scored(self) -> bool:
        return any(prompt.target for prompt in self.prompts)


def whole(text: str) -> str:
    """A person's text without half pairs of surrogates, which can neither be tokenised nor written to a file."""
    return text.encode("utf-8", "replace").decode()


def saying(text: str) -> list[Prompt]:
    """A text as one prompt; none where nothing is said."""
    return [Prompt((Message("user", whole(text)),))] if text.strip() else []


def typed(text: str) -> list[Prompt]:
    """One prompt a line."""
    return [prompt for line in text.split("\n") for prompt in saying(line.strip())]


def of_examples(examples: Sequence[Example]) -> list[Prompt]:
    """Rows as prompts; of a plain text the first words. A row that asks nothing is left out."""
    prompts = []
    for one in examples:
        begun = saying(" ".join(one.text.split()[:FIRST_WORDS]))
        prompts += [Prompt(one.prompt, one.target)] if one.messages else begun
    return [prompt for prompt in prompts if prompt.text.strip()]


def check_set(prompts: Sequence[Prompt], models: int, new_tokens: int, limits: Limits) -> None:
    """Raise E_NO_PROMPT or E_LIMIT when this is nothing to ask, or more than may be asked at once."""
    if not prompts:
        raise StudioError("E_NO_PROMPT", "The prompt is empty.", "Write one, or take held-out rows.")
    if len(prompts) > limits.prompts:
        message = f"There are {len(prompts):,} prompts; at most {limits.prompts:,} are answered at once."
        raise StudioError("E_LIMIT", message, "Take fewer.")
    longest = max(sum(len(message.content) for message in prompt.messages) for prompt in prompts)
    if longest > limits.prompt_characters:
        message = f"A prompt has {longest:,} characters, at most {limits.prompt_characters:,} are taken."
        raise StudioError("E_LIMIT", message, "Shorten it.")
    if new_tokens > limits.answer_tokens:
        message = f"An answer of {new_tokens:,} tokens is too long here."
        raise StudioError("E_LIMIT", message, f"Ask for at most {limits.answer_tokens:,}.")
    if (asked := len(prompts) * models * new_tokens) > limits.set_tokens:
        message = f"{len(prompts):,} prompts, {models} models and {new_tokens:,} tokens an answer are {asked:,} tokens."
        raise StudioError("E_LIMIT", message, f"Here it may be {limits.set_tokens:,}: take fewer, or shorter answers.")


def scores(answer: str, target: str) -> dict[str, float]:
    """exact_match (0 or 1) and rouge_l (0..1) of one answer; empty where no target is known."""
    if not target:
        return {}
    found = score([answer], [target], labels=False)
    return {name: found[name] for name in ("exact_match", "rouge_l")}


def means(answers: Answers) -> list[dict[str, float]]:
    """For each name, how many rows with a target are answered ("rows") and the means of their scores."""
    found = []
    for place in range(len(answers.names)):
        rows = [
            scores(texts[place], answers.prompts[number].target)
            for number, texts in answers.texts.items()
            if answers.prompts[number].target
        ]
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ())}
        found.append({"rows": len(rows), **mean})
    return found


def as_csv(answers: Answers) -> bytes:
    """The answered prompts as a table; a cell that a spreadsheet would take for a formula begins with an apostrophe."""
    marks = ("exact_match", "rouge_l") if answers.scored else ()
    head = ["prompt", *(["target"] if answers.scored else []), *answers.names]
    head += [f"{mark}: {name}" for name in answers.names for mark in marks]
    lines: list[list[str]] = [head]
    for number, texts in sorted(answers.texts.items()):
        prompt = answers.prompts[number]
        cells = [prompt.text, *([prompt.target] if answers.scored else []), *texts]
        for text in texts:
            found = scores(text, prompt.target)
            cells += [f"{found[mark]:.4g}" if found else "" for mark in marks]
        lines.append(cells)
    file = io.StringIO(newline="")
    csv.writer(file).writerows([[_harmless(cell) for cell in line] for line in lines])
    return file.getvalue().encode()


def as_jsonl(answers: Answers) -> bytes:
    """The answered prompts, a JSON object a line, every text as it is."""
    rows = []
    for number, texts in sorted(answers.texts.items()):
        prompt = answers.prompts[number]
        row: dict[str, Any] = {"messages": [vars(message) for message in prompt.messages]}
        row |= {"target": prompt.target} if prompt.target else {}
        rows.append({**row, "answers": [{"name": n, "text": t} for n, t in zip(answers.names, texts, strict=True)]})
    return lines_of(rows)


def lines_of(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _harmless(cell: str) -> str:
    return f"'{cell}" if cell.startswith(FORMULA) else cell
