"""Every bad input of the design's list, one after the other: a named code or a warning, and nothing else happens."""

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import pytest

from lora_studio.errors import StudioError
from lora_studio.limits import SPACE
from lora_studio.sandbox import Bounds, once
from tests.bad.bench import Bad, Bench
from tests.bad.corpus import parquet_bomb
from tests.bad.everything import everything

NUMBERS = [
    f"{part}{number:02}" for part, most in {"D": 72, "C": 22, "M": 25, "A": 16}.items() for number in range(1, most + 1)
]
ALL = everything()


def test_the_corpus_holds_every_number_of_the_list() -> None:
    assert len(NUMBERS) == 135
    here = {one.number for one in ALL} - {"D00"}
    assert here == set(NUMBERS)
    assert not [name for name, count in Counter((one.number, one.name) for one in ALL).items() if count > 1]
    print(f"{len(ALL)} bad inputs for {len(here)} numbers")


@pytest.mark.parametrize("bad", ALL, ids=[f"{one.number} {one.name[:60]}" for one in ALL])
def test_it_is_answered(bad: Bad, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, tiny, monkeypatch)
    if bad.expected.startswith("E_"):
        with pytest.raises(StudioError) as caught:
            bad.act(bench)
        assert caught.value.code == bad.expected, str(caught.value)
        assert caught.value.hint and len(str(caught.value)) <= 300 and "Traceback" not in str(caught.value)
        if bad.number[0] == "D":
            assert len(list(bench.library.folder.glob("incoming-*"))) == 0, "half a dataset is left"
    else:
        said = bad.act(bench)
        assert bad.expected == "ok" or said, "no warning"
    assert not list(tmp_path.rglob("ran")), "code of a stranger was run"


@pytest.mark.skipif(sys.platform != "linux", reason="its peak memory is read in /proc")
def test_the_worst_files_take_less_memory_than_a_space_has_for_them(tmp_path: Path) -> None:
    worst = {
        "20 GB in 40 kB": ("a.parquet", parquet_bomb()),
        "40 MB in each of 64 rows": ("a.parquet", parquet_bomb(64, 40_000_000)),
        "one line of 50 MB": ("a.jsonl", b'{"a":"' + b"x" * (50 * 10**6 - 20) + b'"}\n'),
        "50 MB of empty lists": ("a.json", b"[" + b"[]," * (16 * 10**6) + b"[]]"),
        "200,000 rows": ("a.csv", b"q,a\n" + b"question,answer\n" * 200_000),
        "100,000 lists deep": ("a.json", b"[" * 100_000),
    }
    peaks = {}
    for name, (file, content) in worst.items():
        (tmp_path / file).write_bytes(content)
        to = str(tmp_path / f"{len(peaks)}.rows")
        arguments = (str(tmp_path / file), file, to, dataclasses.asdict(SPACE))
        peaks[name] = once("tests.boxed:peak_of_reading", *arguments, bounds=Bounds.of(SPACE), file_bytes=2**30)
    print({name: f"{peak / 2**20:.0f} MiB" for name, peak in peaks.items()})
    assert all(0 < peak < SPACE.reading_bytes for peak in peaks.values())
    assert peaks["200,000 rows"] < 100 * 2**20  # row by row, not all at once
