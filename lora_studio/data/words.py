"""Rows as a model's tokenizer reads them: text -> token ids, which of them are learnt from, and their texts.

A conversation is rendered with the tokenizer's own chat template; a model without one gets the plain template below.
Supervised are the assistant's words and the mark that ends its turn, found by where they lie in the rendered text.
A control token such as </s> that stands inside somebody's words is read as the letters it is written with: it is
parted behind its first letter, so that only the template can say where a turn ends.

Tokenizer and template are a stranger's, and a template is a program. A `Guarded` tokenizer therefore reads in the
sandbox only; a worker, a process of its own, reads by itself, with a clock set on the template.
This file does not know where rows come from, what is cut off, or how a model is trained.
"""

import json
import math
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from lora_studio.data.formats import Example, Message
from lora_studio.errors import StudioError, quote
from lora_studio.limits import GIB
from lora_studio.sandbox import Bounds, Sandbox

SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}  # the plain template's
CUT = "\ufdd0"  # no character: Unicode keeps it for use inside a program
TEMPLATE_LENGTH = 64 * 1024
TEMPLATE_S = 4  # for one rendering in a worker
BATCH_LENGTH = 100_000  # characters that are read in one call
CPU_S, CHARACTERS_A_SECOND = 2.0, 250_000  # of work in one call: so much, and more for more text
WAITING_S = 20  # that a busy machine may add to it
GROWTH = 64  # times as long as its tokens, at most, a decoder may make a text
READ_TOO = (".json", ".jinja", ".model", ".txt")  # beside weights, in a model's folder
LOADING = Bounds(wall_s=60, cpu_s=30, memory=GIB, on_top=True)


@dataclass(frozen=True)
class Reading:
    """One row uncut: token ids, whether each is learnt from, and the text of each where it was asked for."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    texts: tuple[str, ...]
    quoted: int  # control tokens in somebody's words


class Plain(NamedTuple):
    """One text without a template: its ids, whether each is one that the tokenizer put around it, and their texts."""

    ids: list[int]
    around: list[bool]
    texts: list[str]
    quoted: int


class Guarded:
    """A tokenizer whose folder is a stranger's: what it does to text it does in the sandbox.

    Its facts (marks, names of tokens) and the way back from ids to text are at hand; calling it is not.
    most_s: of a processor, that one reading may take in all.
    """

    def __init__(self, tokenizer: Any, folder: Path, most_s: float = math.inf) -> None:
        vars(self).update(own=tokenizer, folder=folder, most_s=most_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["own"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.own, name, value)

    def __len__(self) -> int:
        return len(self.own)

    def decode(self, *ids: Any, **options: Any) -> Any:
        """As the tokenizer's own; E_TOKENIZER where it gives up, which is no Exception."""
        try:
            return self.own.decode(*ids, **options)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of a library in Rust
                raise
            raise StudioError("E_TOKENIZER", "The model's tokenizer cannot write its tokens.", "Try another.") from None

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a guarded tokenizer reads through lora_studio.data.words")


def check(folder: Path) -> None:
    """Load the tokenizer of a folder where it can do no harm. Raises E_TOKENIZER."""
    try:
        _READER.call(f"{__name__}:load", str(folder), _version(folder), bounds=LOADING)
    except StudioError as error:
        raise StudioError("E_TOKENIZER", error.message, "Choose another model.") from None


def check_decoder(tokenizer: Any) -> None:
    """E_TOKENIZER for one whose way back from ids to text, which goes on in the app, may cost what it likes."""
    decoder, growth = tokenizer.backend_tokenizer.decoder, 1
    for part in _objects(json.loads(decoder.__getstate__()) if decoder else {}):
        if "Regex" in part:
            message = f"The tokenizer's decoder looks for the expression {quote(part['Regex'], 40)}."
            raise StudioError("E_TOKENIZER", message, "Such tokenizers are not used; choose another model.")
        growth *= 1 + len(part.get("content", "")) if part.get("type") == "Replace" else 1
    if growth > GROWTH:
        message = f"The tokenizer's decoder could make a text {growth:,} times as long."
        raise StudioError("E_TOKENIZER", message, "Such tokenizers are not used; choose another model.")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


def read_rows(tokenizer: Any, examples: Sequence[Example], *, texts: bool = False) -> list[Reading]:
    """Every row as token ids, uncut; with `texts`, the text of each token too. Raises E_TEMPLATE, E_TOKENIZER."""
    found = _ask(tokenizer, "shown rows" if texts else "rows", [_plainly(example) for example in examples])
    return [
        Reading(tuple(ids), tuple(mark == "1" for mark in marks), tuple(texts), quoted)
        for ids, marks, texts, quoted in found
    ]


def read_texts(tokenizer: Any, given: Sequence[str], *, around: bool = True, texts: bool = False) -> list[Plain]:
    """Texts that no template frames; with `around`, the tokens that the tokenizer itself puts around a text.

    With `texts`, the text of each token too.
    """
    found = _ask(tokenizer, "shown texts" if texts else "texts", [[text, around] for text in given])
    return [Plain(*one) for one in found]


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids that a model continues with its answer; the same text that training put before the answer."""
    return _ask(tokenizer, "prompts", [[[message.role, message.content] for message in messages]])[0]


def rendered(tokenizer: Any, conversations: Sequence[Sequence[Message]], *, reply: bool = True) -> list[str]:
    """Each conversation as the text that the model reads; with `reply`, up to where the assistant begins to speak."""
    talks = [[[message.role, message.content] for message in messages] for messages in conversations]
    return _ask(tokenizer, "asked texts" if reply else "rendered texts", talks)


def render(tokenizer: Any, messages: Sequence[Message], *, reply: bool = False) -> str:
    """The conversation as one text; with `reply`, up to where the assistant begins to speak."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if template := getattr(tokenizer, "chat_template", None):
        if len(str(template)) > TEMPLATE_LENGTH:
            message = f"The model's chat template has {len(str(template)):,} characters; at most {TEMPLATE_LENGTH:,}."
            raise StudioError("E_TEMPLATE", message, "Try another model.")
        try:
            with _clock():
                return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply)
        except MemoryError:
            raise
        except Exception as error:  # templates are programs of their own and raise what they like
            raise StudioError(
                "E_TEMPLATE", f"The model's chat template refused the row: {quote(str(error))}.", "Try another model."
            ) from error
    end = tokenizer.eos_token or ""
    text = "".join(
        f"{SPEAKERS[turn['role']]}: {turn['content']}{end if turn['role'] == 'assistant' else ''}\n" for turn in turns
    )
    return f"{text}{SPEAKERS['assistant']}:" if reply else text


# ---- reading, here or in the sandbox ---------------------------------------------------------------------------------


def _ask(tokenizer: Any, what: str, items: list[Any]) -> list[Any]:
    if not isinstance(tokenizer, Guarded):
        return _read(tokenizer, what, items)
    folder, version = str(tokenizer.folder), _version(tokenizer.folder)
    found, left_s = [], tokenizer.most_s
    for batch, length in _batches(items):
        spent = min(CPU_S + length / CHARACTERS_A_SECOND, left_s)
        try:
            if left_s <= 0:  # all visitors wait for one reader
                raise StudioError("E_READING_LIMIT", f"Reading took more than {tokenizer.most_s:.3g} s of work.")
            _READER.call(f"{__name__}:load", folder, version, bounds=LOADING)
            bounds = Bounds(wall_s=WAITING_S + spent, cpu_s=spent, memory=GIB // 2, on_top=True)
            read, took_s = _READER.call(f"{__name__}:answer", folder, version, what, batch, bounds=bounds)
            found += read
            left_s -= took_s
        except StudioError as error:
            if error.code not in ("E_READING_LIMIT", "E_READING"):
                raise
            code, which = ("E_TEMPLATE", "chat template") if tokenizer.chat_template else ("E_TOKENIZER", "tokenizer")
            message = f"The model's {which} does not come to an end or takes too much memory: {error.message}"
            raise StudioError(code, message, "Try another model, or shorter or fewer rows.") from None
    return found


def _batches(items: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Items in groups of about BATCH_LENGTH characters, and how many they have."""
    batch, length = [], 0
    for item in items:
        size = len(str(item))
        if batch and length + size > BATCH_LENGTH:
            yield batch, length
            batch, length = [], 0
        batch.append(item)
        length += size
    if batch:
        yield batch, length


def load(folder: str, version: int) -> bool:
    """In the sandbox: have this tokenizer at hand."""
    return _loaded(folder, version) is not None


def answer(folder: str, version: int, what: str, items: list[Any]) -> tuple[list[Any], float]:
    """In the sandbox: read these items with the tokenizer of a folder; and the work of it, in seconds."""
    begun = time.process_time()
    return _read(_loaded(folder, version), what, items), time.process_time() - begun


@lru_cache(maxsize=4)
def _loaded(folder: str, version: int) -> Any:
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # a tokenizer needs none, and it is large
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the library raises a dozen kinds for a broken folder
        raise StudioError(
            "E_TOKENIZER", f"The model's tokenizer does not load: {quote(str(error))}.", "Try another."
        ) from None


def _version(folder: Path) -> int:
    """A number that changes with the files of a tokenizer."""
    files = sorted(path for path in folder.iterdir() if path.suffix in READ_TOO and path.is_file())
    stamps = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    return zlib.crc32(repr(stamps).encode())


_READER = Sandbox()  # one for the process: a tokenizer takes a second to load


# ---- reading, with the tokenizer at hand -----------------------------------------------------------------------------


def _read(tokenizer: Any, what: str, items: list[Any]) -> list[Any]:
    pattern = _control(tokenizer)
    return [_READ[what](tokenizer, pattern, item) for item in items]


def _plainly(example: Example) -> dict[str, Any]:
    turns = [[message.role, message.content] for message in example.messages]
    return {"messages": turns, "text": example.text, "row": example.row}


def _row(tokenizer: Any, pattern: re.Pattern[str], item: Mapping[str, Any], texts: bool = False) -> list[Any]:
    """[ids, marks as 0 and 1, texts, quoted control tokens] of one row."""
    messages = [Message(role, _part(pattern, content)) for role, content in item["messages"]]
    plain = _part(pattern, item["text"])
    quoted = (plain + "".join(message.content for message in messages)).count(CUT)
    if plain:
        text = plain + (tokenizer.eos_token or "")
        spans = [(0, len(text))]
    else:
        text, spans = _spans(tokenizer, messages, item["row"])
    templated = bool(getattr(tokenizer, "chat_template", None)) and not plain
    found = list(_pieces(tokenizer, text, around=not templated))
    learnt = (end > start and any(first <= start < last for first, last in spans) for _, start, end, _ in found)
    marks = "".join("1" if one else "0" for one in learnt)
    return [[token for token, *_ in found], marks, _shown(tokenizer, text, found) if texts else [], quoted]


def _text(tokenizer: Any, pattern: re.Pattern[str], item: tuple[str, bool], texts: bool = False) -> list[Any]:
    """[ids, which are around, texts, quoted control tokens] of one text."""
    text = _part(pattern, item[0])
    found = list(_pieces(tokenizer, text, around=item[1]))
    shown = _shown(tokenizer, text, found) if texts else []
    return [[token for token, *_ in found], [around for *_, around in found], shown, text.count(CUT)]


def _shown(tokenizer: Any, text: str, found: Sequence[tuple[int, int, int, bool]]) -> list[str]:
    """The text of each token, together all of it; a sign made of several tokens stands with the first of them."""
    at, shown = 0, []
    for token, start, end, _ in found:
        shown.append(text[at:end].replace(CUT, "") if end > start else str(tokenizer.convert_ids_to_tokens(token)))
        at = max(at, end)
    return shown


def _prompt(tokenizer: Any, pattern: re.Pattern[str], item: list[list[str]]) -> list[int]:
    text = render(tokenizer, [Message(role, _part(pattern, content)) for role, content in item], reply=True)
    templated = bool(getattr(tokenizer, "chat_template", None))
    return [token for token, *_ in _pieces(tokenizer, text, around=not templated)]


def _rendered(tokenizer: Any, _: re.Pattern[str], item: list[list[str]], reply: bool = False) -> str:
    return render(tokenizer, [Message(role, content) for role, content in item], reply=reply)


_READ: dict[str, Callable[[Any, re.Pattern[str], Any], Any]] = {
    "rows": _row,
    "shown rows": partial(_row, texts=True),
    "texts": _text,
    "shown texts": partial(_text, texts=True),
    "prompts": _prompt,
    "rendered texts": _rendered,
    "asked texts": partial(_rendered, reply=True),
}


def _spans(tokenizer: Any, messages: Sequence[Message], row: int) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and where in it the supervised characters lie."""
    text = render(tokenizer, messages).rstrip()
    spans = []
    for turn, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = render(tokenizer, messages[:turn], reply=True)
        after = render(tokenizer, messages[: turn + 1]).rstrip()
        if text.startswith(before) and text.startswith(after):
            spans.append((len(before), len(after)))
    asked = [said for message in messages if message.role == "user" and (said := message.content.strip())]
    left_out = asked and not any(said in text for said in asked)
    if left_out or not spans:
        what = "leaves out what the user says" if left_out else "does not show where the answer begins"
        message = f"Row {row:,}: the model's chat template {what}."
        raise StudioError("E_TEMPLATE", message, "Use another model, or plain text rows.")
    return text, spans


def _pieces(tokenizer: Any, text: str, *, around: bool) -> Iterator[tuple[int, int, int, bool]]:
    """(id, start, end, whether put around) of every token; the text is read in parts where it was parted."""
    parts = text.split(CUT)
    at, closing = 0, []
    for number, part in enumerate(parts):
        whole = around and number == 0  # the first part brings what stands before and behind
        encoding = tokenizer(
            part, add_special_tokens=whole, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        outside = encoding["special_tokens_mask"] if whole else [0] * len(encoding["input_ids"])
        found = [
            (token, at + start, at + end, bool(mark))
            for token, (start, end), mark in zip(
                encoding["input_ids"], encoding["offset_mapping"], outside, strict=True
            )
        ]
        if number == 0 and len(parts) > 1:
            last = len(found) - next((back for back, one in enumerate(reversed(found)) if not one[3]), len(found))
            found, closing = found[:last], found[last:]
        yield from found
        at += len(part) + len(CUT)
    yield from closing


def _control(tokenizer: Any) -> re.Pattern[str]:
    """What finds, in somebody's words, every place at which a control token of the tokenizer is written out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {str(token) for token in added if token.special} | {str(token) for token in tokenizer.all_special_tokens}
    return _places(tuple(sorted(name for name in names if len(name) > 1)))


@lru_cache(maxsize=16)
def _places(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"(?={'|'.join(map(re.escape, names))})." if names else "(?!)", re.DOTALL)


def _part(pattern: re.Pattern[str], text: str) -> str:
    """The text, parted behind the first letter of every control token in it."""
    return pattern.sub(rf"\g<0>{CUT}", text.replace(CUT, ""))


@contextmanager
def _clock() -> Iterator[None]:
    """E_TEMPLATE for a template that goes on and on, where signals reach: in the main thread of a worker."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def over(*_: object) -> None:
        raise TimeoutError(f"it did not come to an end within {TEMPLATE_S} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, TEMPLATE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
