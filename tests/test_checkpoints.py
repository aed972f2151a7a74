"""Checkpoints: whole or not there, whatever breaks off, and back bit for bit."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_studio.errors import StudioError
from lora_studio.runs import checkpoints
from lora_studio.train import State
from tests.crash import Crash, break_off

NOTES = {"best": [0.1 + 0.2, 3], "latest": {"train_loss": 1e-300}, "base": {}}


CALLS = [(os, name) for name in ("fsync", "open", "link", "mkdir", "rmdir", "unlink")]
CALLS += [(Path, name) for name in ("rename", "write_text")]


def state(step: int) -> State:
    """Twelve tensors, so that their names sort otherwise than they count, and every sort of number."""
    draws = torch.Generator().manual_seed(step)
    return State(
        adapter={str(number): torch.randn(2, number + 1, generator=draws) for number in range(12)},
        optimizer={"0.step": torch.tensor(float(step)), "random": draws.get_state(), "0.exp_avg": torch.zeros(0)},
        progress={"step": step, "best": None, "accumulate": 1, "recompute": False},
    )


def best(run: Path, step: int) -> Path:
    """The run's adapter/, rewritten as the worker does: each file replaced."""
    kept = run / "adapter"
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        fresh = run / f"{name}.tmp"
        fresh.write_text(f"{name} of step {step}")
        fresh.replace(kept / name)
    return kept


def the_newest(run: Path) -> checkpoints.Checkpoint:
    path, _ = checkpoints.newest(run)
    assert path
    return checkpoints.load(path)


def test_what_was_saved_comes_back_bit_for_bit_and_in_order(tmp_path: Path) -> None:
    before = state(7)
    checkpoints.save(tmp_path, before, NOTES, best(tmp_path, 5))
    best(tmp_path, 9)  # a better one since
    after = the_newest(tmp_path)
    for name in ("adapter", "optimizer"):
        ours, theirs = getattr(before, name), getattr(after.state, name)
        assert [*ours] == [*theirs]
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert after.state.progress == before.progress and after.notes == NOTES and after.step == 7
    assert after.best and (after.best / "adapter_config.json").read_text() == "adapter_config.json of step 5"


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 100_000_000, 100_000_003):
        checkpoints.save(tmp_path, state(step), NOTES)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-100000000", "step-100000003"] and the_newest(tmp_path).step == 100_000_003
    checkpoints.forget(tmp_path)
    assert not checkpoints.any_saved(tmp_path) and checkpoints.newest(tmp_path) == (None, [])


def synced(patch: pytest.MonkeyPatch) -> set[int]:
    """The files and folders, by inode, that are synced from now on."""
    found: set[int] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        found.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    patch.setattr(os, "fsync", fsync)
    return found


def test_the_first_one_also_syncs_the_run_which_names_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = synced(monkeypatch)
    for step, first in ((1, True), (2, False)):
        found.clear()
        path = checkpoints.save(tmp_path, state(step), NOTES, best(tmp_path, 1))
        assert {one.stat().st_ino for one in (path.parent, path, *path.rglob("*"))} <= found
        assert (tmp_path.stat().st_ino in found) == first


def one_bit_off(data: bytes) -> bytes:
    """In a manifest, of a sum."""
    at = data.find(b'"sha256": "')
    at = at + len('"sha256": "') if at >= 0 else len(data) - 9
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def harm_all(folder: Path) -> list[Callable[[], object]]:
    """Every way in which one file of a checkpoint can be other than it was written."""
    ways: list[Callable[[], object]] = [lambda: (folder / "more.json").write_text("{}")]
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        data = file.read_bytes()
        ways += [
            file.unlink,
            lambda file=file, data=data: file.write_bytes(data[:-1]),
            lambda file=file, data=data: file.write_bytes(data + b"\0"),
            lambda file=file, data=data: file.write_bytes(one_bit_off(data)),
            lambda file=file: file.write_bytes(b""),
        ]
    return ways


def test_one_that_is_not_as_it_was_written_does_not_count_and_the_one_before_it_does(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoints.save(run, state(1), NOTES, best(run, 1))
    checkpoints.save(run, state(2), NOTES, best(run, 1))
    newest = run / "checkpoints" / "step-00000002"
    ways = len(harm_all(newest))
    assert ways == 1 + 5 * 6
    for way in range(ways):
        copy = tmp_path / f"copy{way}"
        shutil.copytree(run, copy)
        harmed = copy / "checkpoints" / newest.name
        harm_all(harmed)[way]()
        assert checkpoints.newest(copy) == (copy / "checkpoints" / "step-00000001", [harmed])
        assert the_newest(copy).step == 1
        checkpoints.save(copy, state(2), NOTES)  # and it can be written anew
        assert the_newest(copy).step == 2


def test_a_crash_at_any_call_leaves_the_old_one_or_the_new_one_and_the_next_save_works(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        checkpoints.save(run, state(step), NOTES, best(run, 1))
    seen, at = set(), 0
    while True:
        at += 1
        copy = tmp_path / f"copy{at}"
        shutil.copytree(run, copy)
        with pytest.MonkeyPatch.context() as patch:
            made = break_off(patch, CALLS, at)
            try:
                checkpoints.save(copy, state(3), NOTES, copy / "adapter")
            except Crash:
                pass
            else:
                break
        found = the_newest(copy)
        seen.add(found.step)
        assert found.best and torch.equal(found.state.adapter["11"], state(found.step).adapter["11"])
        checkpoints.save(copy, state(4), NOTES)
        assert the_newest(copy).step == 4
        left = sorted(path.name for path in (copy / "checkpoints").iterdir())
        assert left[1:] == ["step-00000004"], f"after {made}"
    assert seen == {2, 3} and at > 15


def test_a_write_that_fails_is_said_and_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, state(1), NOTES)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            checkpoints.save(tmp_path, state(2), NOTES)
    assert the_newest(tmp_path).step == 1


def test_what_spoils_a_kept_adapter_in_place_spoils_no_other(tmp_path: Path) -> None:
    kept = best(tmp_path, 1)
    for step in (1, 2):
        checkpoints.save(tmp_path, state(step), NOTES, kept)
    name = "adapter_config.json"
    folders = [tmp_path / "checkpoints" / f"step-0000000{step}" for step in (1, 2)]
    spoilt = folders[1] / "best" / name
    with spoilt.open("r+") as file:
        file.write("X")
    assert checkpoints.newest(tmp_path) == (folders[0], [folders[1]])
    assert (kept / name).read_text() == (folders[0] / "best" / name).read_text() != spoilt.read_text()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"training": {}, "worker": {}, "order": {"adapter": ["x"]}}'])
def test_one_that_vouches_for_nonsense_is_refused_in_words(tmp_path: Path, text: str) -> None:
    path = checkpoints.save(tmp_path, state(1), NOTES)
    (path / "state.json").write_text(text)
    with pytest.raises(StudioError) as caught:
        checkpoints.load(path)
    assert caught.value.code == "E_CHECKPOINT" and caught.value.hint
