"""Readers, formats, settings and headers under random and damaged inputs: an answer or a StudioError, no other error.

FUZZ is a number of examples for each of them, for a night; by default all of them together take 2,000.
"""

import io
import json
import os
import struct
from pathlib import Path

import pyarrow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from lora_studio import model_files
from lora_studio.core.spec import LoraSpec
from lora_studio.data.formats import FORMATS, convert, guess
from lora_studio.data.readers import Table, normalise, read, read_normalised, text_kind
from lora_studio.errors import StudioError
from lora_studio.fields import build
from lora_studio.limits import Limits
from lora_studio.settings import TrainConfig
from tests.bad.corpus import cases, parquet

SMALL = Limits(file_bytes=2**16, text_bytes=2**16, decoded_bytes=2**18, rows=500, row_bytes=2**12, columns=16, depth=8)
KINDS = ("csv", "tsv", "json", "jsonl", "txt", "parquet")


def fuzz(share: int):
    """So many of the 2,000, or FUZZ of them."""
    count = int(os.environ.get("FUZZ", share))
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, suppress_health_check=slow, derandomize="FUZZ" not in os.environ)


def answered(content: bytes, name: str) -> Table | None:
    """The table, all of it sound, or None where a StudioError said why not."""
    try:
        table = read(io.BytesIO(content), name, SMALL)
    except StudioError as error:
        assert error.code.startswith("E_") and error.message and len(str(error)) <= 320
        return None
    assert 0 < len(table.columns) <= SMALL.columns and len(table.rows) <= SMALL.rows
    assert all(row.keys() == set(table.columns) for row in table.rows)
    json.dumps(table.rows, allow_nan=True, ensure_ascii=False).encode()  # no half characters
    choices = [(name, dict.fromkeys(format.roles, table.columns[0])) for name, format in FORMATS.items()]
    for choose in (lambda: guess(table), *(lambda choice=choice: choice for choice in choices)):
        try:
            convert(table, *choose())
        except StudioError as error:
            assert len(str(error)) <= 320
    return table


TEXT = some.text(some.sampled_from("ab,;\t|\"'\n\r\\{}[]:01-.eENa \ufeff\u2028é漢\ud800\U0001f469"), max_size=200)
VALUE = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=20),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@fuzz(500)
@given(
    content=some.binary(max_size=300) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
    kind=some.sampled_from(KINDS),
)
def test_any_bytes_as_any_kind(content: bytes, kind: str) -> None:
    answered(content, f"a.{kind}")


@fuzz(300)
@given(
    rows=some.lists(some.dictionaries(some.text(max_size=6), VALUE, max_size=4), max_size=6),
    kind=some.sampled_from(("json", "jsonl")),
)
def test_any_values_of_json_come_out_as_json_reads_them(rows: list[dict], kind: str) -> None:
    text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    table = answered(text.encode(), f"a.{kind}")
    if table and "\\ud" not in text:  # halves of characters are replaced, and said to be
        assert [{key: row[key] for key in known} for row, known in zip(table.rows, rows, strict=True)] == rows


WHOLE = [case for case in cases() if len(case.content) < 2**14]
GOOD = [
    ("a.csv", b'q,a\n"one ""x""\ntwo",3\n4,5\n'),
    ("a.jsonl", b'{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y"}]}\n' * 3),
    ("a.json", b'{"n": 1, "data": [{"prompt": "a", "completion": "\\u00e9"}, {"prompt": null, "completion": 1.5}]}'),
    ("a.parquet", parquet(pyarrow.table({"q": ["x", None] * 20, "a": [[1, 2], []] * 20}))),
    ("a.txt", "one\n\ntwo é".encode()),
    *((case.file, case.content) for case in WHOLE),
]
DAMAGE = some.tuples(some.floats(0, 1), some.sampled_from(("flip", "cut", "double", "zero")), some.integers(0, 255))


def damaged(content: bytes, at: float, how: str, value: int) -> bytes:
    place = int(at * len(content))
    if how == "cut":
        return content[:place]
    if how == "double":
        return content[:place] + content[place // 2 :]
    if how == "zero":
        return content[:place] + bytes(8) + content[place + 8 :]
    return content[:place] + bytes([value]) + content[place + 1 :]


@fuzz(700)
@given(file=some.sampled_from(GOOD), damages=some.lists(DAMAGE, min_size=1, max_size=4))
def test_files_that_were_damaged(file: tuple[str, bytes], damages: list[tuple[float, str, int]]) -> None:
    name, content = file
    for one in damages:
        content = damaged(content, *one)
    answered(content, name)


@fuzz(100)
@given(content=TEXT.map(lambda text: text.encode("utf-8", "replace")), kind=some.sampled_from(("csv", "jsonl", "txt")))
def test_what_is_kept_of_a_file_is_what_was_read_in_it(content: bytes, kind: str, tmp_path: Path) -> None:
    import dataclasses
    import uuid

    source, rows = tmp_path / f"{uuid.uuid4()}.{kind}", tmp_path / str(uuid.uuid4())
    source.write_bytes(content)
    table = answered(content, source.name)
    try:
        about = normalise(str(source), source.name, str(rows), dataclasses.asdict(SMALL))
    except StudioError:
        assert table is None
        return
    assert read_normalised(rows.open("rb"), about["kind"], about["columns"], about["warnings"]) == table


@fuzz(100)
@given(text=TEXT)
def test_pasted_text_has_some_kind(text: str) -> None:
    assert text_kind(text) in KINDS


@fuzz(150)
@given(
    values=some.dictionaries(some.sampled_from([*vars(LoraSpec()), *vars(TrainConfig()), "other"]), VALUE, max_size=3)
)
def test_settings_are_right_or_named(values: dict) -> None:
    for config in (LoraSpec, TrainConfig):
        try:
            made = build(config, values)
        except StudioError as error:
            assert error.code == "E_CONFIG" and error.hint
        else:
            assert all(
                getattr(made, name) == (tuple(one) if isinstance(one, list) else one) for name, one in values.items()
            )


@fuzz(75)
@given(
    values=some.dictionaries(
        some.sampled_from([*model_files.BOUNDS, "auto_map", "rope_theta", "_attn_implementation"]), VALUE, max_size=4
    )
)
def test_a_models_settings_are_bounded_or_named(values: dict, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    try:
        found = model_files.read_config(tmp_path)
    except StudioError as error:
        assert error.code in ("E_CONFIG", "E_TOO_LARGE", "E_REMOTE_CODE", "E_QUANTISED") and error.hint
        return
    for name, (most, _) in model_files.BOUNDS.items():
        sizes = found.get(name) if isinstance(found.get(name), list) else [found.get(name)]
        assert all(size is None or 0 <= size <= most for size in sizes)


@fuzz(75)
@given(
    head=some.binary(max_size=60) | VALUE.map(lambda value: json.dumps(value).encode()),
    length=some.integers(0, 2**64 - 1) | some.none(),
)
def test_weights_with_any_header_are_refused_by_name(head: bytes, length: int | None, tmp_path: Path) -> None:
    size = struct.pack("<Q", len(head) if length is None else length)
    (tmp_path / "model.safetensors").write_bytes(size + head)
    try:
        model_files.check_weights(tmp_path)
    except StudioError as error:
        assert error.code == "E_SAFETENSORS" and error.hint
