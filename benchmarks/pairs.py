"""Prompt and completion pairs of real text, from a file given by path, as the app reads and tokenises them."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_studio.errors import StudioError

Row = tuple[list[int], list[bool]]  # token ids, and which of them are supervised


def examples(path: Path, prompt: str = "", answer: str = "") -> list[Any]:
    """The file's rows as conversations; columns as named, else as the app guesses them. Raises the reader's errors."""
    from lora_studio.data.formats import convert, guess
    from lora_studio.data.readers import read_path

    table = read_path(path)
    if prompt and answer:
        return convert(table, "prompt_completion", {"prompt": prompt, "completion": answer})[0]
    return convert(table, *guess(table))[0]


def rows(tokenizer: Any, conversations: Sequence[Any], shortest: int, longest: int, count: int) -> list[Row]:
    """The first `count` conversations of so many tokens, in the file's order. Raises E_DATA when there are fewer."""
    found = list(itertools.islice(every(tokenizer, conversations, shortest, longest), count))
    if len(found) < count:
        message = f"The file has {len(found)} rows of {shortest} to {longest} tokens; {count} are needed."
        raise StudioError("E_DATA", message, "Give a longer file with --data, or fewer steps.")
    return found


def every(tokenizer: Any, conversations: Sequence[Any], shortest: int, longest: int) -> Iterator[Row]:
    """All conversations of so many tokens with something to learn, in the file's order."""
    from lora_studio.data.batches import encode

    for one in conversations:
        tokens = encode(tokenizer, one, longest + 1).tokens
        if shortest <= len(tokens.ids) <= longest and tokens.count:
            yield list(tokens.ids), list(tokens.supervised)


def batches(every: Sequence[Row], size: int, steps: int, seed: int) -> list[list[Row]]:
    """The batches that the app's own training makes of these rows, in its order."""
    from lora_studio.core.lean import Tokens
    from lora_studio.settings import TrainConfig
    from lora_studio.train import _batches

    tokens = [Tokens(ids, marks) for ids, marks in every]
    place = {id(one): number for number, one in enumerate(tokens)}
    config = TrainConfig(steps=steps, batch_size=size, seed=seed)
    return [[every[place[id(one)]] for one in batch] for batch in _batches(tokens, config, steps)]
