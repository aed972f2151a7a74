"""Readers: what goes in comes out unchanged, and what cannot be read says why and where."""

import csv
import io
import json
import os
import random
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from lora_studio.data import readers
from lora_studio.data.formats import convert, guess
from lora_studio.data.readers import PARAGRAPH_LENGTH, Limits, read, read_path, read_text
from lora_studio.errors import StudioError
from tests.bad.corpus import cases, lines, parquet, parquet_bomb

BAD = list(cases())
NASTY = [
    "",
    " ",
    "None",
    "NA",
    "null",
    "nan",
    "inf",
    "007",
    "1e5",
    "True",
    '"',
    '""',
    ",",
    ";",
    "\t",
    "|",
    "\n",
    "a\nb",
]
NASTY += ["é", "漢字", "👩‍👩‍👧", "e\u0301", "\u202eabc", "\u2028", "\x0b", "'", "\\", "=1+1", "<b>", "#", "[1]", "{}"]


def rows_of(content: bytes | str, name: str = "a.csv", limits: Limits = readers.LAPTOP):
    return table_of(content, name, limits).rows


def table_of(content: bytes | str, name: str = "a.csv", limits: Limits = readers.LAPTOP):
    return read(io.BytesIO(content if isinstance(content, bytes) else content.encode()), name, limits)


def code_of(content: bytes | str, name: str = "a.csv", limits: Limits = readers.LAPTOP) -> str:
    return error_of(content, name, limits).code


def error_of(content: bytes | str, name: str = "a.csv", limits: Limits = readers.LAPTOP) -> StudioError:
    with pytest.raises(StudioError) as caught:
        table_of(content, name, limits)
    return caught.value


def some_rows(seed: int, columns: int = 3) -> list[dict[str, str]]:
    chance = random.Random(seed)
    names = [f"column {number}" for number in range(columns)]
    return [{name: "".join(chance.choices(NASTY, k=chance.randrange(4))) for name in names} for _ in range(30)]


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("case", BAD, ids=[case.name for case in BAD])
def test_every_bad_file_gives_its_code_and_says_what_to_do(case):
    with pytest.raises(StudioError) as caught:
        table = read(io.BytesIO(case.content), case.file)
        convert(table, *guess(table))
    assert caught.value.code == case.code
    assert caught.value.hint
    assert len(str(caught.value)) <= 300


def test_the_corpus_names_every_case_once():
    assert len({case.name for case in BAD}) == len(BAD) >= 30


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("seed", range(5))
def test_csv_round_trip_keeps_every_cell(seed, delimiter):
    rows = some_rows(seed)
    table = table_of(as_csv(rows, delimiter), "a.csv")
    assert list(table.rows) == rows
    assert bool(table.warnings) == (delimiter != ",")


@pytest.mark.parametrize("seed", range(5))
def test_all_kinds_give_the_same_rows(seed):
    rows = some_rows(seed)
    assert list(rows_of(lines(*rows), "a.jsonl")) == rows
    assert list(rows_of(json.dumps(rows, indent=2), "a.json")) == rows
    assert list(rows_of(json.dumps({"version": 1, "data": rows}), "a.json")) == rows
    assert list(rows_of(parquet(pyarrow.Table.from_pylist(rows)), "a.parquet")) == rows
    assert list(rows_of(as_csv(rows, "\t"), "a.tsv")) == rows


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_decides_the_encoding(encoding):
    text = as_csv(some_rows(1))
    assert table_of(text.encode(encoding)) == table_of(text)


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_line_ends_do_not_matter(newline):
    text = as_csv(some_rows(2))
    mixed = "".join(part + ("\n" if index % 2 else newline) for index, part in enumerate(text.split("\n")[:-1]))
    assert rows_of(text.replace("\n", newline)) == rows_of(mixed) == rows_of(text)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_where_the_file_is_cut_into_chunks_does_not_matter(size, monkeypatch):
    text = as_csv(some_rows(3)).replace("\n", "\r\n").encode("utf-8-sig")
    whole = table_of(text)
    bad = error_of(text + b"\xff").message
    monkeypatch.setattr(readers, "CHUNK_BYTES", size)
    assert table_of(text) == whole
    assert error_of(text + b"\xff").message == bad
    assert f"Byte {len(text):,} " in bad
    assert "Byte 6 (0xc3)" in error_of(b"q,a\nx,\xc3(\n").message  # found with the byte behind it


def test_the_offset_of_a_bad_byte_counts_from_the_start_of_the_file():
    assert "Byte 10 (0xff)" in error_of(b"\xef\xbb\xbfq,a\nx,\n\xff").message


def test_nul_characters_are_removed_and_counted():
    table = table_of("question,answer\nwhy\0,because\n")
    assert table.rows == ({"question": "why", "answer": "because"},)
    assert table.warnings == ("1 NUL characters removed",)


def test_blank_lines_are_no_rows():
    assert len(rows_of("q,a\n\n1,2\n\n\n3,4\n\n")) == 2
    assert len(rows_of('\n{"a":1}\n\n \n{"a":2}\n', "a.jsonl")) == 2


def test_a_comma_in_a_cell_does_not_change_the_delimiter():
    text = 'q;a\n"one, two";three\nfour, five;six\n'
    assert rows_of(text)[1] == {"q": "four, five", "a": "six"}


def test_a_header_that_looks_like_data_is_a_warning():
    assert table_of("What is this?,A test.\nAnd that?,Another.\n").warnings


def test_errors_count_lines_behind_a_cell_of_several_lines():
    head = 'q,a\n"one\ntwo\nthree",4\n'
    assert error_of(head + "5\n").message.startswith("Line 5 has 1 values")
    assert error_of(head + '"5,6\n7,8\n').message.startswith("Line 5:")
    assert error_of(head + '"a ""b""\nc","5,6\n7,8\n').message.startswith("Line 6:")
    assert error_of(head + '"5\n""6"" ,\n7,8\n').message.startswith("Line 5:")


def test_a_json_error_names_line_and_column():
    assert "Line 3, column 7 " in error_of('{"a":1}\n\n{"a": }\n{"a":2}\n', "a.jsonl").message
    assert "Line 2, column 8 " in error_of('[{"a":1},\n {"b": }]', "a.json").message
    assert "Row 2 " in error_of('[{"a":1}, {"a":NaN}]', "a.json").message


def test_a_torn_last_line_costs_that_line_and_nothing_else():
    rows = [{"a": "é漢"}, {"a": "👩 ok"}, {"a": "last é漢👩"}]
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    start = whole.rindex(b"{")
    for torn in [whole[:end] for end in range(start + 1, len(whole) - 2)] + [whole[:-1] + b"\xe2"]:
        table = table_of(torn, "a.jsonl")
        assert list(table.rows) == rows[:2], torn
        assert table.warnings == ("1 bad line at the end ignored",)
    assert list(rows_of(whole[:-1], "a.jsonl")) == rows


def test_json_lines_and_json_are_told_apart_by_content():
    rows = some_rows(4)
    as_lines, as_list = lines(*rows), json.dumps(rows, indent=1).encode()
    assert rows_of(as_lines, "a.json") == rows_of(as_lines, "a.jsonl") == tuple(rows)
    assert rows_of(as_list, "a.jsonl") == rows_of(as_list, "a.json")
    assert table_of(as_lines, "a.json").warnings
    assert table_of(as_list, "a.jsonl").warnings


def test_json_values_are_kept_exactly():
    row = {"a": 10**30 + 1, "b": [1, {"c": None}], "d": True, "e": 0.1, "f": -0.0}
    assert repr(rows_of(lines(row), "a.jsonl")[0]) == repr(row)


def test_missing_keys_are_null_and_columns_are_in_order_of_appearance():
    table = table_of('{"b":1}\n{"a":2,"b":3}\n{"c":4}\n', "a.jsonl")
    assert table.columns == ("b", "a", "c")
    assert table.rows[2] == {"b": None, "a": None, "c": 4}


def test_repeated_keys_and_half_characters_are_warnings():
    table = table_of('{"a":"x","a":"y"}\n{"a":"\\ud800!"}\n{"a":"\\ud83d\\ude00"}\n', "a.jsonl")
    assert [row["a"] for row in table.rows] == ["y", "\ufffd!", "😀"]
    assert len(table.warnings) == 2


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_nesting_is_allowed_up_to_the_limit_and_not_beyond(name):
    def nested(depth: int) -> str:
        text = '{"a":' + "[" * (depth - 1) + "1" + "]" * (depth - 1) + "}"
        return f"[{text}]" if name == "a.json" else text

    assert rows_of(nested(Limits().depth), name)
    assert code_of(nested(Limits().depth + 1), name) == "E_DEPTH"


def test_every_limit_holds_at_its_number_and_not_below():
    rows = [{"a": "x", "b": "y"}] * 10
    text = as_csv(rows)
    assert len(rows_of(text, limits=Limits(rows=10, columns=2, file_bytes=len(text), row_bytes=7))) == 10
    assert code_of(text, limits=Limits(rows=9)) == "E_TOO_LARGE"
    assert code_of(text, limits=Limits(columns=1)) == "E_COLUMNS"
    assert code_of(text, limits=Limits(file_bytes=len(text) - 1)) == "E_TOO_LARGE"
    assert code_of(text, limits=Limits(row_bytes=6)) == "E_ROW_TOO_LONG"
    assert code_of(text, limits=Limits(decoded_bytes=1000)) == "E_TOO_LARGE_DECODED"


def test_a_parquet_bomb_is_refused_before_it_fills_the_memory():
    bomb = parquet_bomb()
    assert len(bomb) < 100_000
    tracemalloc.start()
    assert code_of(bomb, "a.parquet") == "E_TOO_LARGE_DECODED"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert pyarrow.default_memory_pool().max_memory() < 2**29  # one batch, not all rows


def peak_of(content: bytes, name: str, limits: Limits, code: str) -> int:
    """Most bytes that Python held while refusing a file."""
    tracemalloc.start()
    assert code_of(content, name, limits) == code
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("head", [b"[", b'{"data": [', b'{"unused": [[1], "x"], "data": ['])
def test_a_json_document_is_refused_before_it_fills_the_memory(head):
    # {"data": [...]} was decoded whole: 8 MB against a limit of 1 MiB took 202 MB
    content = head + b",\n".join([b'{"a": [[], [], []]}'] * 400_000) + (b"]}" if b"{" in head else b"]")
    assert peak_of(content, "a.json", Limits(decoded_bytes=2**20), "E_TOO_LARGE_DECODED") < 2**24


def test_one_long_row_of_a_json_document_is_refused_before_it_is_decoded():
    content = b'[{"a": [' + b",".join([b"[]"] * 1_000_000) + b"]}]"
    assert peak_of(content, "a.json", Limits(row_bytes=2**19), "E_ROW_TOO_LONG") < 2**25


def test_a_text_file_has_a_limit_of_its_own_because_it_is_held_whole():
    content = b"word\n\n" * 500_000
    assert peak_of(content, "a.txt", Limits(text_bytes=2**20), "E_TOO_LARGE") < 2**18
    assert peak_of(content, "a.txt", Limits(decoded_bytes=2**20), "E_TOO_LARGE_DECODED") < 4 * len(content)
    assert len(rows_of(b"word\n\n" * 10, "a.txt", Limits(text_bytes=60))) == 10


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("shape", ["{}", '{{"n": 12, "unused": [1, [2]], "data": {}, "more": "é"}}'])
def test_a_json_document_is_the_same_however_it_is_cut_into_pieces(size, shape, monkeypatch):
    rows = [*some_rows(size), {"a": 12.5, "b": None, "c": {"d": [True, "\ud83d\ude00"]}}]
    content = shape.format(json.dumps(rows, indent=20))  # more white space than one piece holds
    whole = table_of(content, "a.json")
    monkeypatch.setattr(readers, "CHUNK_BYTES", size)
    assert table_of(content, "a.json") == whole
    assert len(whole.rows) == len(rows)
    assert str(error_of(content + "x", "a.json")).startswith(f"Line {content.count(chr(10)) + 1:,}, column ")
    twice = content.replace('"a": 12.5', '"a": 1, "a": 12.5')
    assert any(note.startswith("1 repeated") for note in table_of(twice, "a.json").warnings)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_json_lines_named_json_are_read_as_lines_in_every_encoding(encoding):
    table = table_of('{"a": "é"}\n\n{"a": "ü"}\n'.encode(encoding), "a.json")
    assert [row["a"] for row in table.rows] == ["é", "ü"]
    assert len(table.warnings) == 1


def test_parquet_lists_and_structs_come_out_as_json_values():
    rows = [{"messages": [{"role": "user", "content": "x"}], "n": 1, "f": 0.5, "b": None}]
    assert list(rows_of(parquet(pyarrow.Table.from_pylist(rows)), "a.parquet")) == rows


def test_a_text_file_is_its_paragraphs_or_else_its_lines():
    assert [row["text"] for row in rows_of("one\ntwo\n\n \nthree\n", "a.txt")] == ["one\ntwo", "three"]
    assert [row["text"] for row in rows_of("one\ntwo\nthree\n", "a.txt")] == ["one", "two", "three"]


@pytest.mark.parametrize("block", ["word " * 5_000, "x" * 20_000, "one\n" * 6_000])
def test_a_long_paragraph_is_cut_without_losing_a_character(block):
    paragraphs = ["short", block.strip(), "end"]
    table = table_of("\n\n".join(paragraphs), "a.txt")
    pieces = [row["text"] for row in table.rows]
    assert "".join(pieces) == "".join(paragraphs)
    assert max(map(len, pieces)) <= PARAGRAPH_LENGTH
    assert len(table.warnings) == 1


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('[{"a": "x"}]', "json"),
        ('{"data": [{"a": "x"}]}', "json"),
        ('{\n "data": [{"a": "x"}]\n}', "json"),
        ('{"a": "x"}\n{"a": "y"}', "jsonl"),
        ("question,answer\nwhy,so\n", "csv"),
        ("question;answer\nwhy;so\n", "csv"),
        ("question\tanswer\nwhy\tso\n", "tsv"),
        ("Once upon a time, there was a king.\nHe was old, and tired.\n", "txt"),
        ("[Chorus]\nla la la", "txt"),
        ("hello", "txt"),
    ],
)
def test_pasted_text_is_read_as_what_it_looks_like(text, kind):
    assert read_text(text).kind == kind


def test_pasted_text_without_a_character_is_empty():
    with pytest.raises(StudioError, match="empty"):
        read_text(" \n")


def test_a_path_must_be_a_file_that_is_there_and_may_be_read(tmp_path, monkeypatch):
    def code(path):
        with pytest.raises(StudioError) as caught:
            read_path(path)
        return caught.value.code

    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "locked.csv").write_text("q,a\n1,2\n")
    assert code(tmp_path) == "E_NOT_FILE"
    assert code(tmp_path / "pipe.csv") == "E_NOT_FILE"
    assert code(readers.Path("/dev/zero")) == "E_NOT_FILE"
    assert code(tmp_path / "none.csv") == "E_NOT_FOUND"
    assert code(tmp_path / "locked.csv" / "x.csv") == "E_NOT_FOUND"
    assert code(tmp_path / "nul\0.csv") == "E_NOT_FOUND"

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    assert read_path(tmp_path / "locked.csv").rows == read_path(tmp_path / "locked.csv", "upload.csv").rows
    monkeypatch.setattr(readers, "open", refuse, raising=False)
    assert code(tmp_path / "locked.csv") == "E_READ"
