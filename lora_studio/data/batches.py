"""Examples -> token ids with a mark on every supervised token, and what their lengths look like.

A conversation is rendered with the tokenizer's own chat template; a model without one gets the plain
template below. Supervised are the assistant's words and the mark that ends its turn, found by where they lie
in the rendered text. For a classifier there is no template: the text alone is read, the answer is a label.
This file does not know where rows come from or how a model is trained.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_studio.core.lean import Tokens
from lora_studio.data.formats import Example, Message
from lora_studio.errors import StudioError, quote

SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}  # the plain template's


@dataclass(frozen=True)
class Encoded:
    """One example as the model sees it; `cut` tokens at its end did not fit."""

    tokens: Tokens
    cut: int


@dataclass(frozen=True)
class Piece:
    """A run of rendered text for the preview; kind: context, trained or cut."""

    text: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Token statistics of a dataset under one tokenizer and length limit; lengths are before cutting."""

    median: int
    p95: int
    max: int
    cut: int  # examples that lose tokens
    unsupervised: int  # examples left without a supervised token
    total: int  # tokens kept, of all examples
    supervised: int
    histogram: tuple[int, ...]  # 20 equal bins from 0 to `max`


def render(tokenizer: Any, messages: Sequence[Message], *, reply: bool = False) -> str:
    """The conversation as one text; with `reply`, up to where the assistant begins to speak."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if getattr(tokenizer, "chat_template", None):
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply)
        except Exception as error:  # templates are programs of their own and raise what they like
            raise StudioError(
                "E_TEMPLATE", f"The model's chat template refused the row: {quote(str(error))}.", "Try another model."
            ) from error
    end = tokenizer.eos_token or ""
    text = "".join(
        f"{SPEAKERS[turn['role']]}: {turn['content']}{end if turn['role'] == 'assistant' else ''}\n" for turn in turns
    )
    return f"{text}{SPEAKERS['assistant']}:" if reply else text


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids that a model continues with its answer; the same text that training put before the answer."""
    templated = bool(getattr(tokenizer, "chat_template", None))
    return tokenizer(render(tokenizer, messages, reply=True), add_special_tokens=not templated)["input_ids"]


def encode(tokenizer: Any, example: Example, max_length: int) -> Encoded:
    """Token ids and supervision marks, cut on the right at `max_length` tokens."""
    ids, supervised, _ = _tokenize(tokenizer, example)
    cut = max(0, len(ids) - max_length)
    return Encoded(Tokens(tuple(ids[:max_length]), tuple(supervised[:max_length])), cut)


def encode_label(tokenizer: Any, example: Example, labels: Sequence[str], max_length: int) -> Encoded:
    """The last message before the answer as an encoder reads it, and which of `labels` the answer is.

    Cut inside at `max_length` tokens: the special tokens that close a text stay. Raises E_LABELS.
    """
    label = example.target.strip()
    if label not in labels:
        known = quote(", ".join(labels), 100)
        raise StudioError(
            "E_LABELS", f"Row {example.row:,} has the label {quote(label, 40)}; known are {known}.", "Correct the row."
        )
    text = example.prompt[-1].content if example.prompt else ""
    encoding = tokenizer(text, return_special_tokens_mask=True)
    ids, special = list(encoding["input_ids"]), encoding["special_tokens_mask"]
    cut = max(0, len(ids) - max_length)
    if cut:
        closing = next((number for number, mark in enumerate(reversed(special)) if not mark), 0)
        ids = ids[: max_length - closing] + ids[len(ids) - closing :]
    ids = ids or [tokenizer.eos_token_id or 0]  # a model must read something
    return Encoded(Tokens(tuple(ids), (False,) * len(ids), labels.index(label)), cut)


def preview(tokenizer: Any, example: Example, max_length: int) -> list[Piece]:
    """The rendered text token by token: context, trained, or cut off."""
    _, supervised, texts = _tokenize(tokenizer, example)
    kinds = ["trained" if mark else "context" for mark in supervised]
    kinds[max_length:] = ["cut"] * len(kinds[max_length:])
    return [Piece(text, kind) for text, kind in zip(texts, kinds, strict=True)]


def lengths(encoded: Sequence[Encoded]) -> Lengths:
    """Statistics over all examples; raises E_NO_TARGET when nothing is left to learn from."""
    full = sorted(len(one.tokens.ids) + one.cut for one in encoded)
    supervised = [one.tokens.count for one in encoded]
    if not any(supervised):
        raise StudioError(
            "E_NO_TARGET",
            f"None of the {len(encoded)} examples has a token to learn from.",
            "Raise the length limit, or check which column holds the answer.",
        )
    bins = [0] * 20
    for length in full:
        bins[min(19, 20 * length // (full[-1] + 1))] += 1
    return Lengths(
        median=int(statistics.median(full)),
        p95=full[min(len(full) - 1, int(0.95 * len(full)))],
        max=full[-1],
        cut=sum(one.cut > 0 for one in encoded),
        unsupervised=sum(count == 0 for count in supervised),
        total=sum(len(one.tokens.ids) for one in encoded),
        supervised=sum(supervised),
        histogram=tuple(bins),
    )


def _tokenize(tokenizer: Any, example: Example) -> tuple[list[int], list[bool], list[str]]:
    """Ids, supervision marks and the text of each token, uncut."""
    templated = bool(getattr(tokenizer, "chat_template", None)) and not example.text
    text, spans = _spans(tokenizer, example)
    encoding = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    ids, supervised, texts = list(encoding["input_ids"]), [], []
    for token, (start, end) in zip(ids, encoding["offset_mapping"], strict=True):
        supervised.append(end > start and any(first <= start < last for first, last in spans))
        texts.append(text[start:end] if end > start else tokenizer.convert_ids_to_tokens(token))
    return ids, supervised, texts


def _spans(tokenizer: Any, example: Example) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and where in it the supervised characters lie."""
    if example.text:
        text = example.text + (tokenizer.eos_token or "")
        return text, [(0, len(text))]
    text = render(tokenizer, example.messages).rstrip()
    spans = []
    for turn, message in enumerate(example.messages):
        if message.role != "assistant":
            continue
        before = render(tokenizer, example.messages[:turn], reply=True)
        after = render(tokenizer, example.messages[: turn + 1]).rstrip()
        if text.startswith(before) and text.startswith(after):
            spans.append((len(before), len(after)))
    if not spans:
        raise StudioError(
            "E_TEMPLATE",
            f"Row {example.row}: the model's chat template does not show where the answer begins.",
            "Use another model, or plain text rows.",
        )
    return text, spans
