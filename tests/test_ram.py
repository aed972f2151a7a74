"""The memory that there is: the machine's, or less by a control group of either version."""

from pathlib import Path

import psutil
import pytest

from lora_studio import ram

GB = 2**30
FILES = {
    2: ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the control groups of a machine of 64 GB, 40 of them free."""
    own = psutil.virtual_memory()
    monkeypatch.setattr(ram.psutil, "virtual_memory", lambda: own._replace(total=64 * GB, available=40 * GB))
    monkeypatch.setattr(ram, "CGROUP", tmp_path)
    return tmp_path


def group(folder: Path, version: int, limit: str, used: int, cache: int) -> None:
    (folder / "memory").mkdir()
    texts = (limit, str(used), f"anon 1\n{FILES[version][3]} {cache}")
    for name, text in zip(FILES[version], texts, strict=False):
        (folder / name).write_text(f"{text}\n")


def test_without_a_group_it_is_the_machines(machine: Path) -> None:
    assert (ram.available(), ram.total()) == (40 * GB, 64 * GB)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_its_limit_less_what_it_uses_and_cannot_give_back(machine: Path, version: int) -> None:
    group(machine, version, str(16 * GB), 9 * GB, 4 * GB)
    assert (ram.available(), ram.total()) == (11 * GB, 16 * GB)


def test_the_machine_may_have_less_free_than_the_group_allows(machine: Path) -> None:
    group(machine, 2, str(60 * GB), GB, 0)
    assert (ram.available(), ram.total()) == (40 * GB, 60 * GB)


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_a_group_without_a_limit_changes_nothing(machine: Path, limit: str) -> None:
    group(machine, 2 if limit == "max" else 1, limit, 50 * GB, 0)
    assert (ram.available(), ram.total()) == (40 * GB, 64 * GB)


def test_more_used_than_allowed_leaves_nothing(machine: Path) -> None:
    group(machine, 2, str(2 * GB), 3 * GB, 0)
    assert ram.available() == 0
