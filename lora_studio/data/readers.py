"""Strict readers: the bytes of a csv, tsv, json, jsonl, parquet or txt file become rows, or a named error.

Nothing is guessed behind the user's back: cells of csv and tsv stay the text they are, a short row is an
error, and whatever was repaired or skipped is a warning. Files are read piece by piece and limits hold while
reading, not afterwards; a txt file alone is held whole, because its last line may decide how the first is read,
and has a smaller limit for that.
The app reads in the sandbox (`normalise`) and then only what was written there (`read_normalised`).
This module does not know what the rows mean, where files are kept, or that a network exists.
"""

import codecs
import csv
import io
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NoReturn

from lora_studio.errors import StudioError, quote
from lora_studio.limits import LAPTOP, MIB, Limits

HEAD_BYTES = 64 * 1024  # as much of a file as is looked at before it is parsed
CHUNK_BYTES = MIB
PARQUET_BATCH_ROWS = 64  # few, because a page of some kilobytes may hold megabytes per row
NAME_LENGTH = 200
PARAGRAPH_LENGTH = 8_000  # characters; longer paragraphs of a txt file are cut at white space
NUMBER_LENGTH = 1_000  # digits
ENDING = 16  # characters before the end of a text that was cut, in which its JSON may be wrong for that reason alone

EXTENSIONS = {
    **{".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".txt": "txt", ".md": "txt", ".parquet": "parquet"},
    **{".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"},
}
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
ZIP, GZIP, BZIP, XZ = b"PK\x03\x04", b"\x1f\x8b", b"BZh91AY&SY", b"\xfd7zXZ\x00"
ARCHIVES = (ZIP, b"PK\x05\x06", GZIP, BZIP, XZ, b"7z\xbc\xaf", b"(\xb5/\xfd", b"Rar!")
BINARIES = {
    "a picture": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8"),
    "a document": (b"%PDF-", b"\xd0\xcf\x11\xe0"),
    "a program": (b"\x7fELF", b"MZ\x90\x00"),
    "a database": (b"SQLite format 3\x00", b"ARROW1\x00"),
    "a model": (b"GGUF",),
}
BYTE_ORDER_MARKS = (  # UTF-32 before UTF-16, whose mark is the beginning of the other
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of one file; every row has every column."""

    kind: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


Row = dict[str, Any]
LINE_END, PARAGRAPH_END = re.compile(r"\n"), re.compile(r"\n(?:[^\S\n]*\n)+")
WHITE_SPACE = re.compile(r"[ \t\n\r]*")  # of JSON
Notes = Counter[str]  # what was repaired -> how often; 0 for a remark without a number


def read(source: BinaryIO, name: str, limits: Limits = LAPTOP) -> Table:
    """The rows of an open, seekable file; `name` is used for its extension only."""
    kind, rows, columns, notes = _begin(source, name, limits)
    kept = tuple(rows)
    _fill(kept, columns)
    return Table(kind=kind, columns=tuple(columns), rows=kept, warnings=_warnings(notes))


def normalise(source: str, name: str, to: str, bounds: Mapping[str, Any]) -> dict[str, Any]:
    """Write the rows of a file to a new file `to`, as JSON lines, one row in memory at a time; what is known of them.

    For the sandbox, hence plain values only; bounds: a Limits as a mapping.
    """
    limits = Limits(**bounds)
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    count = size = 0
    with open_file(Path(source)) as file, open(to, "xb") as out:
        kind, rows, columns, notes = _begin(file, name, limits)
        for row in rows:
            count += 1
            size += out.write(encode(row).encode() + b"\n")
            if size > limits.decoded_bytes:
                raise _too_large_decoded(f"Row {count:,}", limits)
    return {"kind": kind, "columns": list(columns), "rows": count, "warnings": list(_warnings(notes))}


def read_normalised(lines: Iterable[bytes], kind: str, columns: Sequence[str], warnings: Sequence[str] = ()) -> Table:
    """The table that `normalise` wrote."""
    rows = tuple(json.loads(line) for line in lines)
    _fill(rows, columns)
    return Table(kind=kind, columns=tuple(columns), rows=rows, warnings=tuple(warnings))


def read_path(path: Path, name: str = "", limits: Limits = LAPTOP) -> Table:
    """The rows of a file on disk; `name` replaces the path's own name where that one has lost its extension."""
    with open_file(path) as source:
        return read(source, name or path.name, limits)


def read_text(text: str, limits: Limits = LAPTOP) -> Table:
    """The rows of pasted text: JSON, JSON lines, a table with a header, or else plain text."""
    return read(io.BytesIO(text.encode("utf-8", "replace")), f"pasted.{text_kind(text)}", limits)


def open_file(path: Path) -> BinaryIO:
    """An open regular file; folders, pipes and devices are E_NOT_FILE and are never opened."""
    hint = "Check the path and who may read it."
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise StudioError(
                "E_NOT_FILE", f"{quote(str(path))} is a folder or a device, not a file.", "Give one file."
            )
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL character in the path
        raise StudioError("E_NOT_FOUND", f"There is no file {quote(str(path))}.", hint) from None
    except OSError as error:
        raise StudioError("E_READ", f"{quote(str(path))} cannot be read: {error.strerror}.", hint) from None


def file_kind(name: str) -> str:
    """The key of READERS that a file name's extension stands for."""
    extension = PurePath(name).suffix.lower()
    if extension in EXTENSIONS:
        return EXTENSIONS[extension]
    found = f"files ending in {quote(extension)}" if extension else "files without an extension"
    raise StudioError("E_FILE_TYPE", f"Cannot read {found}.", f"Give one of: {', '.join(READERS)}.")


def text_kind(text: str) -> str:
    """The key of READERS that pasted text looks like."""
    if re.match(r"\s*\[\s*[{\]]", text):
        return "json"
    if re.match(r'\s*\{\s*["}]', text):
        first, _, rest = text.strip().partition("\n")
        return "jsonl" if rest and first.rstrip().endswith("}") else "json"
    lines = [line for line in text[:HEAD_BYTES].splitlines() if line.strip()][:2]
    delimiter = _sniff("\n".join(lines), ",")
    widths = [len(next(csv.reader([line], delimiter=delimiter))) for line in lines]
    is_table = len(lines) == 2 and widths[0] == widths[1] > 1
    if is_table and all(re.fullmatch(r" ?\w[\w.-]*( [\w.-]+)?", name) for name in lines[0].split(delimiter)):
        return "tsv" if delimiter == "\t" else "csv"
    return "txt"


# What every kind of file has to pass, before and after its reader


def _look(source: BinaryIO, name: str, limits: Limits) -> str:
    """The kind of a file, once its size and its first bytes agree with it; leaves `source` at its beginning."""
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    head = source.read(HEAD_BYTES)
    source.seek(0)
    if size <= HEAD_BYTES and not head.strip():
        raise StudioError("E_EMPTY", f"The file is empty ({size} bytes).", "Save it again or choose another one.")
    if size > limits.file_bytes:
        raise StudioError(
            "E_TOO_LARGE", f"The file has {_size(size)}; at most {_size(limits.file_bytes)} are read.", "Split it."
        )
    if head.startswith(ARCHIVES) or head[257:262] == b"ustar":
        hint = "Unpack it and give the file inside; save a spreadsheet as CSV."
        raise StudioError("E_ARCHIVE", f"{quote(name)} is a compressed archive.", hint)
    kind = file_kind(name)
    _refuse_other_content(head, kind)
    if kind != "parquet":
        _refuse_binary(head)
    return kind


def _refuse_other_content(head: bytes, kind: str) -> None:
    for what, beginnings in BINARIES.items():
        if head.startswith(beginnings):
            raise StudioError("E_TYPE_MISMATCH", f"The file is {what}, not {kind}.", "Choose the data file itself.")
    if head.startswith(b"PAR1") and kind != "parquet":
        raise StudioError(
            "E_TYPE_MISMATCH", f"The file is Parquet, not {kind}.", "Rename it so that it ends in .parquet."
        )
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)", head, re.IGNORECASE):
        hint = "The download gave a page instead of the data, perhaps a login or an error. Download the file itself."
        raise StudioError("E_HTML", f"The file is a web page, not {kind}.", hint)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        hint = "Fetch the data with `git lfs pull`, or download the file from its page."
        raise StudioError("E_LFS_POINTER", "The file only points to data kept in Git LFS.", hint)
    if kind == "parquet" and not head.startswith(b"PAR1"):
        raise _broken_parquet("it does not begin with PAR1")


def _refuse_binary(head: bytes) -> None:
    if _encoding(head) != "utf-8":
        return
    half = len(head) / 2
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) > 0.4 * half and min(even, odd) < 0.1 * half:
        guess = "UTF-16-LE" if odd > even else "UTF-16-BE"
        message = f"Byte {0 if even > odd else 1} is 0: the text is {guess} without a byte order mark."
        raise StudioError("E_ENCODING", message, "Save it as UTF-8.")
    controls = sum(head.count(byte) for byte in range(32) if byte not in b"\t\n\v\f\r\x1b")
    if controls > 0.05 * len(head):
        message = f"{controls:,} of the first {len(head):,} bytes are control bytes: this is no text file."
        raise StudioError("E_NOT_TEXT", message, "Export the data as CSV or JSON lines.")


def _begin(source: BinaryIO, name: str, limits: Limits) -> tuple[str, Iterator[Row], dict[str, None], Notes]:
    """The kind of a file and its rows; columns and notes are complete once the rows have been taken."""
    kind, notes, columns = _look(source, name, limits), Notes(), dict[str, None]()
    return kind, _bounded(READERS[kind](source, limits, notes), limits, columns), columns, notes


def _bounded(rows: Iterable[Row], limits: Limits, columns: dict[str, None]) -> Iterator[Row]:
    """The rows, while `columns` collects their names in order of appearance; limits hold row by row."""
    decoded = 0
    for number, row in enumerate(rows, 1):
        if number > limits.rows:
            raise _too_many_rows(limits)
        decoded += _weight(row, number, limits.depth)
        if decoded > limits.decoded_bytes:
            raise _too_large_decoded(f"Row {number:,}", limits)
        if not row.keys() <= columns.keys():
            columns.update(dict.fromkeys(row))
            _check_columns(list(columns), limits)
        yield row
    if not columns:
        raise StudioError("E_NO_ROWS", "The file has no rows of data.", "Add at least one row.")


def _fill(rows: Iterable[Row], columns: Collection[str]) -> None:
    """Put nothing where JSON has left out a member."""
    for row in rows:
        if len(row) < len(columns):
            row.update({name: None for name in columns if name not in row})


def _warnings(notes: Notes) -> tuple[str, ...]:
    return tuple(f"{count:,} {what}" if count else what for what, count in notes.items())


def _check_columns(names: list[str], limits: Limits) -> None:
    if len(names) > limits.columns:
        hint = "Keep the columns you want to train on."
        raise StudioError("E_COLUMNS", f"{len(names):,} columns; at most {limits.columns} are read.", hint)
    for number, name in enumerate(names, 1):
        if not name.strip() or len(name) > NAME_LENGTH:
            what = "has no name" if not name.strip() else f"has a name of {len(name):,} characters: {quote(name, 40)}"
            hint = "Name every column in the first line. An unnamed row number? Save without the index."
            raise StudioError("E_COLUMN_NAME", f"Column {number} {what}.", hint)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        places = [index for index, name in enumerate(names, 1) if name == twice][:2]
        message = f"Columns {places[0]} and {places[1]} are both named {quote(twice)}."
        raise StudioError("E_DUP_COLUMN", message, "Give every column its own name.")


def _weight(value: Any, row: int, depth: int) -> int:
    """About the bytes a value takes in memory; E_DEPTH where it is nested deeper than `depth`."""
    if isinstance(value, str):
        return 50 + len(value)
    if not isinstance(value, (dict, list)):
        return 32
    if depth == 0:
        raise _too_deep(f"Row {row:,}")
    parts = value.values() if isinstance(value, dict) else value
    return 64 + sum(16 + _weight(part, row, depth - 1) for part in parts)


# Text: encodings, lines


def _chunks(source: BinaryIO, notes: Notes, torn: str | None = None) -> Iterator[str]:
    """The decoded text in pieces, every line end as a newline; `torn` stands for a character cut off at the end."""
    decoder = codecs.getincrementaldecoder(_encoding(source.read(4)))()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    source.seek(0)
    offset, begun = 0, False
    while True:
        chunk = source.read(CHUNK_BYTES)
        waiting = len(decoder.getstate()[0])  # bytes of a character that began in the chunk before
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            if chunk or torn is None:
                place = offset - waiting + error.start
                message = f"Byte {place:,} (0x{error.object[error.start]:02x}) is not valid {error.encoding.upper()}."
                raise StudioError("E_ENCODING", message, "Save the file as UTF-8.") from None
            text = torn
        offset += len(chunk)
        if text and not begun:
            begun, text = True, text.removeprefix("\ufeff")
        if "\0" in text:
            notes["NUL characters removed"] += text.count("\0")
            text = text.replace("\0", "")
        yield newlines.decode(text, final=not chunk)
        if not chunk:
            return


def _lines(source: BinaryIO, limits: Limits, notes: Notes, torn: str | None = None) -> Iterator[str]:
    """Lines with their newline; one longer than a row may be is E_ROW_TOO_LONG before it is all in memory."""
    number, rest = 1, ""
    for text in _chunks(source, notes, torn):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            _check_length(len(line), f"Line {number:,}", limits)
            yield line + "\n"
            number += 1
        _check_length(len(rest), f"Line {number:,}", limits)
    if rest:
        yield rest


def _head(source: BinaryIO) -> str:
    """The beginning of the text; leaves `source` at its beginning."""
    head = source.read(HEAD_BYTES)
    source.seek(0)
    return head.decode(_encoding(head), "ignore").removeprefix("\ufeff")


def _encoding(head: bytes) -> str:
    return next((name for mark, name in BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8")


# csv and tsv


def _read_delimited(source: BinaryIO, limits: Limits, notes: Notes, usual: str) -> Iterator[Row]:
    delimiter = _sniff(_head(source), usual)
    if delimiter != usual:
        notes[f"Columns are separated by {DELIMITERS[delimiter]}, not by {DELIMITERS[usual]}."] = 0
    records = _records(_lines(source, limits, notes), delimiter, limits)
    _, header = next(records, (1, []))
    columns = [name.strip() for name in header]
    _check_columns(columns, limits)
    if any(re.search(r"[.!?]$", name) or len(name) > 60 for name in columns):
        notes["The first line was read as column names, but it looks like data."] = 0
    for line, cells in records:
        if len(cells) != len(columns):
            message = f"Line {line:,} has {len(cells)} values, the header has {len(columns)} columns."
            hint = f"Put quotes around text that contains {quote(delimiter)} or a line break."
            raise StudioError("E_RAGGED", message, hint)
        yield dict(zip(columns, cells, strict=True))


def _records(lines: Iterator[str], delimiter: str, limits: Limits) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, cells) of every record that is not a blank line."""
    csv.field_size_limit(max(csv.field_size_limit(), limits.row_bytes))  # process-wide, hence only ever raised
    pending: list[str] = []  # the lines of the record being read
    start = 1

    def feed() -> Iterator[str]:
        size = 0
        for line in lines:
            size = len(line) + (size if pending else 0)
            pending.append(line)
            if size > limits.row_bytes + len(pending):  # + newlines
                raise _bad_quote(start, pending, delimiter, f"not closed within {_size(limits.row_bytes)}")
            yield line

    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            raise _bad_quote(start, pending, delimiter, "not closed properly") from None
        if cells is None:
            return
        if cells:
            yield start, cells
        start = reader.line_num + 1
        pending.clear()


def _bad_quote(start: int, lines: list[str], delimiter: str, wrong: str) -> StudioError:
    """E_QUOTE naming the line in which the last quoted cell of the record begins."""
    opened, quoted, before = 0, False, delimiter
    for index, line in enumerate(lines):
        for character in line if '"' in line else "\n":
            if character == '"' and quoted:
                quoted = False
            elif character == '"' and before in (delimiter, "\n", '"'):
                quoted = True  # after another quote: it was a doubled one, inside the cell
                opened = opened if before == '"' else index
            before = character
    message = f"Line {start + opened:,}: a quoted value begins there and is {wrong}."
    return StudioError("E_QUOTE", message, 'Close the quote; write a quote inside a quoted value twice: "".')


def _sniff(head: str, usual: str) -> str:
    """The delimiter that splits the header and agrees best with the lines below it; `usual` where none does."""
    best, best_score = usual, (0.0, 0)
    lines = head.splitlines()[:40]
    for delimiter in sorted(DELIMITERS, key=lambda candidate: candidate != usual):
        widths = [len(cells) for cells in csv.reader(lines, delimiter=delimiter) if cells][:20]
        if widths and widths[0] > 1:
            score = (widths.count(widths[0]) / len(widths), widths[0])
            best, best_score = max((best, best_score), (delimiter, score), key=lambda pair: pair[1])
    return best


# json and jsonl


class _Refused(Exception):
    """A literal that is valid for Python's parser and not for us: (code, what is wrong)."""


def _read_jsonl(source: BinaryIO, limits: Limits, notes: Notes) -> Iterator[Row]:
    if _head(source).lstrip().startswith("["):
        notes["The file is one JSON list, not JSON lines; it was read as that."] = 0
        yield from _read_json(source, limits, notes)
        return
    decoder = _decoder(notes)
    failed, good = None, 0
    for number, line in enumerate(_lines(source, limits, notes, torn="\ufffd"), 1):
        text = line.rstrip()
        if not text:
            continue
        if failed:
            raise failed
        try:
            value = _decode_line(decoder, text, number)
        except StudioError as error:
            if error.code != "E_JSON":
                raise
            failed = error  # forgiven if nothing follows: a download or a writer was cut off
            continue
        good += 1
        row = _as_row(value, place := f"Line {number:,}")
        yield _whole_characters(row, notes, place, limits.depth) if "\\u" in text else row
    if failed and not good:
        raise failed
    if failed:
        notes["bad line at the end ignored"] = 1


def _read_json(source: BinaryIO, limits: Limits, notes: Notes) -> Iterator[Row]:
    if _is_json_lines(source, limits):
        notes["The file holds JSON lines, not one JSON document; it was read as that."] = 0
        yield from _read_jsonl(source, limits, notes)
        return
    document = _Document(source, limits, notes)
    if document.peek() == "[":
        for number, value in enumerate(document.elements(), 1):
            yield _as_row(value, f"Row {number:,}")
    elif document.peek() == "{":
        yield from _in_object(document)
    else:
        _as_row(document.value("The file"), "The file")
    if document.peek():
        raise document.bad("Extra data")


class _Document:
    """One JSON document, decoded value by value out of a window that is never much longer than a row may be."""

    def __init__(self, source: BinaryIO, limits: Limits, notes: Notes) -> None:
        self._limits, self._notes = limits, notes
        self._found = Notes()  # in the value being decoded, which may have to be decoded again
        self._decoder = _decoder(self._found)
        self._pieces = _chunks(source, notes)
        self._text, self._at = "", 0  # the window, and the place reached in it
        self._line, self._column = 1, 0  # before the window: the line it begins in, and the characters of that line

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            self._at = _skip(self._text, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, sign: str) -> bool:
        """Whether `sign` comes next; then it is passed."""
        found = self.peek() == sign
        self._at += found
        return found

    def expect(self, sign: str, instead: str = "") -> None:
        """Pass `sign`; anything else is E_JSON."""
        if not self.take(sign):
            raise self.bad(f"Expecting {sign!r}{instead}")

    def value(self, place: str) -> Any:
        """The value that comes next; E_ROW_TOO_LONG before a longer one is decoded."""
        self.peek()
        while True:
            self._found.clear()
            try:
                value, end = _raw_decode(self._decoder, self._text, self._at, place)
                whole, broken = end < len(self._text), None
            except json.JSONDecodeError as error:
                value, end, whole, broken = None, len(self._text), False, error
                if error.pos < end - ENDING and not error.msg.startswith("Unterminated string"):
                    raise self.bad(error.msg, error.pos) from None
            _check_length(end - self._at, place, self._limits)
            if not whole and self._more():
                continue  # at the end of the window it may be longer than it looks
            if broken:
                raise self.bad(broken.msg, broken.pos) from None
            escaped = self._text.find("\\u", self._at, end) >= 0
            self._at = end
            self._notes.update(self._found)
            return _whole_characters(value, self._notes, place, self._limits.depth) if escaped else value

    def elements(self) -> Iterator[Any]:
        """The values of the list that comes next."""
        self.expect("[")
        number = 1
        while not (number == 1 and self.take("]")):
            yield self.value(f"Row {number:,}")
            if self.take("]"):
                return
            self.expect(",", " or ']'")
            number += 1

    def bad(self, reason: str, at: int | None = None) -> StudioError:
        """E_JSON at a place of the window, by default the one reached."""
        at = self._at if at is None else at
        line = self._line + self._text.count("\n", 0, at)
        column = at - self._text.rfind("\n", 0, at)
        return _bad_json(reason, line, column if line > self._line else column + self._column)

    def _more(self) -> bool:
        """Whether there was another piece; it is put behind what the window still needs."""
        piece = next(self._pieces, None)
        if piece is None:
            return False
        passed = self._text[: self._at]
        lines = passed.count("\n")
        self._column = len(passed) - passed.rfind("\n") - 1 + (0 if lines else self._column)
        self._line += lines
        self._text, self._at = self._text[self._at :] + piece, 0
        return True


def _in_object(document: _Document) -> Iterator[Row]:
    """The rows of a document like {"data": [...]}: its only member that is a list of objects."""
    lists: list[str] = []
    document.expect("{")
    while not document.take("}"):
        if document.peek() != '"':
            raise document.bad("Expecting a name in double quotes")
        key = document.value("The file")
        document.expect(":")
        if document.peek() != "[":
            document.value(f"Member {quote(key, 40)}")
        else:
            wanted = False
            for number, value in enumerate(document.elements(), 1):
                if number == 1 and isinstance(value, dict):
                    wanted = True
                    lists.append(key)
                    if len(lists) > 1:
                        raise _not_one_list(lists)
                if wanted:
                    yield _as_row(value, f"Row {number:,}")
        if document.take("}"):
            break
        document.expect(",", " or '}'")
        if document.peek() == "}":
            raise document.bad("Expecting a name in double quotes")
    if not lists:
        raise _not_one_list(lists)


def _not_one_list(names: list[str]) -> StudioError:
    found = f"the lists of objects {quote(', '.join(names), 100)}" if names else "no list of objects"
    message = f"The file is one object with {found}; expected one list."
    return StudioError("E_TYPE", message, 'Write [{"prompt": "...", "completion": "..."}, ...].')


def _decoder(notes: Notes) -> json.JSONDecoder:
    def whole(digits: str) -> int:
        if len(digits) > NUMBER_LENGTH:
            raise _Refused("E_NUMBER", f"a number of {len(digits):,} digits; at most {NUMBER_LENGTH:,} are read")
        return int(digits)

    def real(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise _Refused("E_NUMBER", f"the number {quote(digits, 30)}, which is too large")
        return value

    def constant(name: str) -> NoReturn:
        raise _Refused("E_JSON_NAN", f"the literal {name}, which is not JSON")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            notes["repeated keys; the last value was taken"] += len(pairs) - len(row)
        return row

    return json.JSONDecoder(parse_int=whole, parse_float=real, parse_constant=constant, object_pairs_hook=members)


def _raw_decode(decoder: json.JSONDecoder, text: str, at: int, place: str) -> tuple[Any, int]:
    """The value that begins at `at` and the place behind it; raises JSONDecodeError where it is no JSON."""
    try:
        return decoder.raw_decode(text, at)
    except _Refused as refused:
        code, what = refused.args
        raise StudioError(code, f"{place} holds {what}.", "Write it as text in quotes, or null.") from None
    except RecursionError:
        raise _too_deep(place) from None


def _decode_line(decoder: json.JSONDecoder, text: str, number: int) -> Any:
    """The value that is line `number`."""
    try:
        value, end = _raw_decode(decoder, text, _skip(text, 0), f"Line {number:,}")
    except json.JSONDecodeError as error:
        raise _bad_json(error.msg, number, error.pos + 1) from None
    if (end := _skip(text, end)) < len(text):
        raise _bad_json("Extra data", number, end + 1)
    return value


def _skip(text: str, at: int) -> int:
    """The place of the next character that is not white space."""
    return at + len(match.group()) if (match := WHITE_SPACE.match(text, at)) else at


def _is_json_lines(source: BinaryIO, limits: Limits) -> bool:
    """Whether the first line is a whole object and more follows; leaves `source` at its beginning."""
    if not _head(source).lstrip().startswith("{"):
        return False
    lines = (line for line in _lines(source, limits, Notes()) if not line.isspace())
    try:
        first, second = next(lines, ""), next(lines, "")
        return bool(second) and isinstance(_decode_line(_decoder(Notes()), first, 1), dict)
    except StudioError:
        return False
    finally:
        source.seek(0)


def _as_row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        what = {list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        raise StudioError("E_TYPE", f"{place} is {what}; expected an object.", 'Write {"prompt": "...", ...}.')
    return value


def _whole_characters(value: Any, notes: Notes, place: str, depth: int) -> Any:
    """The value with every half of a surrogate pair, which no encoding can hold, replaced; E_DEPTH as in _weight."""
    if isinstance(value, str) and (count := len(re.findall("[\ud800-\udfff]", value))):
        notes["half characters (lone surrogates) replaced"] += count
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if not isinstance(value, (dict, list)):
        return value
    if depth == 0:
        raise _too_deep(place)
    if isinstance(value, list):
        return [_whole_characters(part, notes, place, depth - 1) for part in value]
    return {
        _whole_characters(key, notes, place, depth): _whole_characters(part, notes, place, depth - 1)
        for key, part in value.items()
    }


# parquet


def _read_parquet(source: BinaryIO, limits: Limits, notes: Notes) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(source)
        _check_parquet(file, limits)
        decoded = 0
        for batch in file.iter_batches(PARQUET_BATCH_ROWS):  # sizes in the file may lie: decode, count, drop
            decoded += batch.nbytes
            if decoded > limits.decoded_bytes:
                raise _too_large_decoded("The file", limits)
        for batch in file.iter_batches(PARQUET_BATCH_ROWS):
            yield from batch.to_pylist()
    except MemoryError:  # Arrow's own is one of its exceptions too
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken_parquet(str(error).splitlines()[0]) from None


def _check_parquet(file: Any, limits: Limits) -> None:
    """Refuse by the footer alone what can be refused by it."""
    schema, metadata = file.schema_arrow, file.metadata
    _check_columns(schema.names, limits)
    refused = [f"{field.name} ({field.type})" for field in schema if not _is_plain(field.type)]
    if refused:
        message = f"Columns of types that are not read: {quote(', '.join(refused), 150)}."
        raise StudioError("E_TYPE", message, "Leave them out or turn them into text.")
    if metadata.num_rows > limits.rows:
        raise _too_many_rows(limits)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if sum(group.total_byte_size for group in groups) > limits.decoded_bytes:
        raise _too_large_decoded("The file", limits)


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    return types.is_integer(kind) or types.is_floating(kind) or str(kind) in ("string", "large_string", "bool", "null")


# txt


def _read_txt(source: BinaryIO, limits: Limits, notes: Notes) -> Iterator[Row]:
    """Paragraphs, or lines where no blank line separates paragraphs."""
    size = source.seek(0, os.SEEK_END)
    if size > limits.text_bytes:
        message = f"The text file has {_size(size)}; at most {_size(limits.text_bytes)} are read."
        raise StudioError("E_TOO_LARGE", message, 'Split it, or write JSON lines: {"text": "..."}.')
    source.seek(0)
    text = "".join(_chunks(source, notes)).strip("\n")
    for block in _split(text, PARAGRAPH_END if PARAGRAPH_END.search(text) else LINE_END):
        pieces = list(_pieces(block))
        if len(pieces) > 1:
            notes[f"paragraphs longer than {PARAGRAPH_LENGTH:,} characters cut into pieces"] += 1
        yield from ({"text": piece} for piece in pieces)


def _split(text: str, between: re.Pattern[str]) -> Iterator[str]:
    """As between.split(text), one by one."""
    start = 0
    for match in between.finditer(text):
        yield text[start : match.start()]
        start = match.end()
    yield text[start:]


def _pieces(block: str) -> Iterator[str]:
    """The block in pieces of at most PARAGRAPH_LENGTH characters, cut behind white space where there is some."""
    start = 0
    while len(block) - start > PARAGRAPH_LENGTH:
        end = start + PARAGRAPH_LENGTH
        cut = max(block.rfind(space, start + PARAGRAPH_LENGTH // 2, end) for space in " \n\t") + 1 or end
        yield block[start:cut]
        start = cut
    if block[start:].strip():
        yield block[start:]


# Errors that several readers share


def _check_length(length: int, place: str, limits: Limits) -> None:
    if length > limits.row_bytes:
        hint = "Cut long texts into several rows; check that line breaks are kept."
        raise StudioError("E_ROW_TOO_LONG", f"{place} is longer than {_size(limits.row_bytes)}.", hint)


def _too_deep(place: str) -> StudioError:
    return StudioError("E_DEPTH", f"{place} is nested too deeply.", "Flatten it into columns of text.")


def _too_many_rows(limits: Limits) -> StudioError:
    return StudioError("E_TOO_LARGE", f"The file has more than {limits.rows:,} rows.", "Split it or take a sample.")


def _too_large_decoded(place: str, limits: Limits) -> StudioError:
    message = f"{place} takes the data past {_size(limits.decoded_bytes)} once unpacked."
    return StudioError("E_TOO_LARGE_DECODED", message, "Split the file or take a sample of its rows.")


def _broken_parquet(reason: str) -> StudioError:
    hint = "Write or download it again; an upload may have been cut off."
    return StudioError("E_PARQUET", f"The Parquet file cannot be read: {quote(reason, 120)}.", hint)


def _bad_json(reason: str, line: int, column: int) -> StudioError:
    hint = "Check quotes, commas and brackets there; comments and trailing commas are not JSON."
    return StudioError("E_JSON", f"Line {line:,}, column {column:,} is not valid JSON: {reason}.", hint)


def _size(size: int) -> str:
    return f"{size / MIB:,.0f} MiB" if size >= MIB else f"{size:,} bytes"


READERS: dict[str, Callable[[BinaryIO, Limits, Notes], Iterator[Row]]] = {
    "csv": partial(_read_delimited, usual=","),
    "tsv": partial(_read_delimited, usual="\t"),
    "json": _read_json,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "txt": _read_txt,
}
