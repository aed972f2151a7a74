"""Bad dataset files: each has one thing wrong and one code that says so."""

import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

MIB = 2**20


class Case(NamedTuple):
    name: str
    file: str
    content: bytes
    code: str


def cases() -> Iterator[Case]:
    """Every bad file; the numbers D01, D02 ... are those of the list of bad inputs in the design."""
    yield from _not_the_data()
    yield from _tables()
    yield from _json()
    yield from _parquet()
    yield from _meaning()


def _not_the_data() -> Iterator[Case]:
    picture = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4
    page = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../data.csv", "q,a\n1,2\n")
    yield Case("D01 nothing", "a.csv", b"", "E_EMPTY")
    yield Case("D01 white space", "a.jsonl", b"\n\n  \n", "E_EMPTY")
    yield Case("D06 UTF-16-LE unmarked", "a.csv", "q,a\nwhy,so\n".encode("utf-16-le"), "E_ENCODING")
    yield Case("D06 UTF-16-BE unmarked", "a.txt", "a long line of text".encode("utf-16-be"), "E_ENCODING")
    yield Case("D07 cp1252", "a.csv", "q,a\ncafé,naïve\n".encode("cp1252"), "E_ENCODING")
    yield Case("D08 invalid UTF-8", "a.jsonl", b'{"a":"ok"}\n{"a":"\xff"}\n', "E_ENCODING")
    yield Case("D08 cut character", "a.csv", "q,a\nx,é".encode()[:-1], "E_ENCODING")
    yield Case("D10 only NUL", "a.csv", bytes(4096), "E_NOT_TEXT")
    yield Case("D10 binary", "a.txt", bytes(range(128)) * 30, "E_NOT_TEXT")
    yield Case("D11 picture", "a.csv", picture, "E_TYPE_MISMATCH")
    yield Case("D11 picture as Parquet", "a.parquet", picture, "E_TYPE_MISMATCH")
    yield Case("D11 program", "a.jsonl", b"\x7fELF\x02\x01\x01" + bytes(100), "E_TYPE_MISMATCH")
    yield Case("D11 document", "a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "E_TYPE_MISMATCH")
    yield Case("D11 Parquet as csv", "a.csv", b"PAR1" + bytes(50) + b"PAR1", "E_TYPE_MISMATCH")
    yield Case("D12 web page", "a.csv", page, "E_HTML")
    yield Case("D12 web page as Parquet", "a.parquet", b"  \n" + page, "E_HTML")
    yield Case("D13 LFS pointer", "a.jsonl", pointer, "E_LFS_POINTER")
    yield Case("D13 LFS pointer as Parquet", "a.parquet", pointer, "E_LFS_POINTER")
    yield Case("D58 gzip", "a.csv.gz", gzip.compress(b"q,a\n" * 1000), "E_ARCHIVE")
    yield Case("D58 gzip renamed", "a.csv", gzip.compress(b"q,a\n" * 1000), "E_ARCHIVE")
    yield Case("D59 zip", "a.jsonl", packed.getvalue(), "E_ARCHIVE")
    yield Case("D59 spreadsheet", "a.xlsx", packed.getvalue(), "E_ARCHIVE")
    yield Case("unknown extension", "a.docm", b"q,a\n1,2\n", "E_FILE_TYPE")
    yield Case("no extension", "data", b"q,a\n1,2\n", "E_FILE_TYPE")


def _tables() -> Iterator[Case]:
    wide = ",".join(f"c{number}" for number in range(10_000))
    yield Case("D02 header only", "a.csv", b"q,a\n", "E_NO_ROWS")
    yield Case("D16 longer row", "a.csv", b"q,a\n1,2\n1,2,3\n", "E_RAGGED")
    yield Case("D17 shorter row", "a.tsv", b"q\ta\n1\t2\n1\n", "E_RAGGED")
    yield Case("D18 unclosed quote", "a.csv", b'q,a\n1,2\n"3,4\n5,6\n', "E_QUOTE")
    yield Case("D18 unclosed quote, long file", "a.csv", b'q,a\n"3,4\n' + (b"5" * 1000 + b",6\n") * 18_000, "E_QUOTE")
    yield Case("D18 text behind a quote", "a.csv", b'q,a\n"3"4,5\n', "E_QUOTE")
    yield Case("D20 two columns of one name", "a.csv", b"q,a,q\n1,2,3\n", "E_DUP_COLUMN")
    yield Case("D20 of one name but for spaces", "a.csv", b"q,a, q\n1,2,3\n", "E_DUP_COLUMN")
    yield Case("D22 unnamed column", "a.csv", b",q,a\n0,1,2\n", "E_COLUMN_NAME")
    yield Case("D22 column name of 100,000", "a.csv", b"q" * 100_000 + b",a\n1,2\n", "E_COLUMN_NAME")
    yield Case("D26 10,000 columns", "a.csv", f"{wide}\n{wide}\n".encode(), "E_COLUMNS")
    yield Case("D26 10,000 keys", "a.jsonl", json.dumps(dict.fromkeys(wide.split(","), 1)).encode(), "E_COLUMNS")
    yield Case("D27 long row", "a.csv", b"q,a\n1," + b"x" * (17 * MIB) + b"\n", "E_ROW_TOO_LONG")


def _json() -> Iterator[Case]:
    deep = b"[" * 100_000 + b"]" * 100_000
    yield Case("D28 long line", "a.jsonl", b'{"a":"' + b"x" * (17 * MIB) + b'"}\n', "E_ROW_TOO_LONG")
    yield Case("D27 long row in a list", "a.json", b'[{"a":"' + b"x" * (17 * MIB) + b'"}]', "E_ROW_TOO_LONG")
    yield Case("D29 two lists", "a.json", b'{"train":[{"a":1}],"test":[{"a":2}]}', "E_TYPE")
    yield Case("D29 columns instead of rows", "a.json", b'{"q":["x","y"],"a":["z","w"]}', "E_TYPE")
    yield Case("no rows", "a.json", b"[]", "E_NO_ROWS")
    yield Case("rows without columns", "a.jsonl", b"{}\n{}\n", "E_NO_ROWS")
    yield Case("D30 nothing but a torn line", "a.jsonl", b'{"prompt": "x", "compl', "E_JSON")
    yield Case("D31 trailing commas", "a.jsonl", b'{"a":1},\n{"a":2},\n', "E_JSON")
    yield Case("D31 comment", "a.jsonl", b'{"a":1}\n# two\n{"a":2}\n', "E_JSON")
    yield Case("D31 trailing comma in a list", "a.json", b'[{"a":1},]', "E_JSON")
    yield Case("D31 unfinished list", "a.json", b'[{"a":1},{"a":2}', "E_JSON")
    yield Case("D31 something behind the list", "a.json", b'[{"a":1}] x', "E_JSON")
    yield Case("D32 a row that is a list", "a.jsonl", b'{"a":1}\n["a"]\n{"a":2}\n', "E_TYPE")
    yield Case("D32 a row that is text", "a.json", b'[{"a":1},"a"]', "E_TYPE")
    yield Case("a document that is a number", "a.json", b"42", "E_TYPE")
    yield Case("D34 depth bomb", "a.json", deep, "E_DEPTH")
    yield Case("D34 depth bomb in a line", "a.jsonl", b'{"a":' + deep + b"}\n", "E_DEPTH")
    yield Case("D34 objects in objects", "a.json", b'[{"a":' * 50_000, "E_DEPTH")
    yield Case("D34 600 lists and an escape", "a.jsonl", b'{"a":"\\u00e9","b":' + _nested(600) + b"}\n", "E_DEPTH")
    yield Case("D34 600 lists in a member", "a.json", b'{"data":[{"a":' + _nested(600) + b"}]}", "E_DEPTH")
    yield Case("D35 5,000 digits", "a.jsonl", b'{"a":' + b"7" * 5_000 + b"}\n", "E_NUMBER")
    yield Case("D35 infinite float", "a.json", b'[{"a":1e999}]', "E_NUMBER")
    yield Case("D36 NaN", "a.jsonl", b'{"a":NaN}\n', "E_JSON_NAN")
    yield Case("D36 Infinity", "a.json", b'[{"a":-Infinity}]', "E_JSON_NAN")
    yield Case("D22 empty key", "a.jsonl", b'{"":1}\n', "E_COLUMN_NAME")


def _nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def _parquet() -> Iterator[Case]:
    whole = parquet(pyarrow.table({"q": ["x"] * 100, "a": ["y"] * 100}))
    middle = whole[: len(whole) // 2]
    times = pyarrow.array([0, 1], pyarrow.timestamp("s"))
    yield Case("D54 not Parquet", "a.parquet", b"q,a\n1,2\n", "E_PARQUET")
    yield Case("D54 truncated", "a.parquet", middle, "E_PARQUET")
    yield Case("D54 without its end", "a.parquet", whole[:-1], "E_PARQUET")
    yield Case("D54 damaged inside", "a.parquet", whole[:8] + b"\xff" * 60 + whole[68:], "E_PARQUET")
    yield Case("D02 no rows", "a.parquet", parquet(pyarrow.table({"q": pyarrow.array([], "string")})), "E_NO_ROWS")
    yield Case("D55 times", "a.parquet", parquet(pyarrow.table({"when": times})), "E_TYPE")
    yield Case("D55 bytes", "a.parquet", parquet(pyarrow.table({"raw": [b"x"]})), "E_TYPE")
    yield Case("D55 categories", "a.parquet", parquet(pyarrow.table({"c": ["x"]}).cast(_categories())), "E_TYPE")
    yield Case("D56 bomb", "a.parquet", parquet_bomb(), "E_TOO_LARGE_DECODED")
    yield Case("D57 too many rows", "a.parquet", parquet(pyarrow.table({"n": pyarrow.nulls(5_000_001)})), "E_TOO_LARGE")


def _meaning() -> Iterator[Case]:
    user, answer, system = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))
    chats = {
        "D41 no role": [{"content": "x"}, answer],
        "D41 unknown role": [{"role": "wizard", "content": "x"}, answer],
        "D41 role that is a number": [{"role": 3, "content": "x"}, answer],
        "D41 two system messages": [system, system, user, answer],
        "D41 system message too late": [user, system, answer],
        "D41 assistant first": [answer, user, answer],
        "D41 assistant right after system": [system, answer],
        "D41 no assistant": [system, user],
        "D41 tool call": [user, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
        "D41 no content": [user, {"role": "assistant"}],
        "D41 message that is text": ["hello", answer],
        "D42 no messages": [],
    }
    good = {"messages": [user, answer]}
    for name, messages in chats.items():
        yield Case(name, "a.jsonl", lines(good, {"messages": messages}), "E_CHAT")
    yield Case("D41 one turn per row", "a.jsonl", lines(user, answer), "E_CHAT")
    yield Case("D41 text instead of messages", "a.jsonl", lines(good, {"messages": "hello"}), "E_CHAT")
    yield Case("D32 a list as answer", "a.jsonl", lines({"prompt": "x", "completion": ["y"]}), "E_TYPE")
    yield Case("D43 all answers empty", "a.csv", b"prompt,completion\nx,\ny,  \n", "E_NO_TARGET")
    yield Case("D43 all answers null", "a.jsonl", lines({"prompt": "x", "completion": None}), "E_NO_TARGET")


def lines(*rows: dict) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(table: pyarrow.Table, **options) -> bytes:
    """A table as the bytes of a Parquet file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, **options)
    return file.getvalue()


def parquet_bomb(rows: int = 20_000, size: int = 1_000_000) -> bytes:
    """Some kilobytes that say so often the same megabyte; the file's own sizes do not show it."""
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, "int32"), ["x" * size])
    return parquet(pyarrow.table({"text": rows}), compression="zstd", store_schema=False)


def _categories() -> pyarrow.Schema:
    return pyarrow.schema([("c", pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))])
