"""The faults that benchmarks/faults.py makes, a few of each; and a fault that is not borne is told by it."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.tiny import tiny

FEW = replace(faults.QUICK, workers=2, apps=1, damages=10, disks=3, quiet_s=2.0, hung_s=4.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the program sets it: what is compared bit for bit must be summed in one order."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in faults.ALONE.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("name", faults.FAULTS)
def test_it_holds(name: str, model: Path, tmp_path: Path) -> None:
    found = faults.FAULTS[name](tmp_path / name, model, FEW)
    if found.skipped:
        pytest.skip(found.skipped)
    slow = [one for one in found.broken if " took " in one]  # the program's affair, on a machine that is quiet
    assert [one for one in found.broken if one not in slow] == [] and found.rounds > 0
    print(faults.table([found]))


def test_a_checkpoint_that_nobody_checks_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_studio.runs.checkpoints._is_whole", lambda path: (path / "state.json").exists())
    found = faults.damage(tmp_path / "damage", model, replace(FEW, damages=20))
    assert found.broken
    held = found.rounds - len({one.split(":")[0] for one in found.broken})
    assert f"| {found.rounds} | {held} |" in re.sub(" +", " ", faults.table([found]))


def test_a_save_that_writes_in_place_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_studio.runs import checkpoints

    real = checkpoints.save

    def save(run: Path, *given: object, **named: object) -> Path:
        for folder in (run / "checkpoints").glob("step-0000001[05]"):
            (folder / "state.json").unlink(missing_ok=True)  # before the new one stands
        return real(run, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "save", save)
    assert faults.crash_in_save(tmp_path / "save", model, FEW).broken
