"""Checkpoints of a run: all that a training goes on from, in folders that are whole or do not count.

    checkpoints/step-00000200/
        adapter.safetensors     the trained tensors at this step
        optimizer.safetensors   their moments, step counts and the random states
        state.json              how far training and its worker had come
        best/                   the best adapter until then, as in the run's adapter/; not before there is one
        MANIFEST.json           sha256 and size of each of these files, written last

A folder is written aside, synced and renamed, and counts only while it is what its manifest says. The two newest
are kept, so one that is damaged has another before it. This file knows no model and no events.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_studio.errors import StudioError
from lora_studio.runs.config import CHECKPOINT
from lora_studio.runs.disk import is_full, sync

if TYPE_CHECKING:  # the page asks about checkpoints before torch is imported
    from lora_studio.train import State

FOLDER, MANIFEST, BEST = "checkpoints", "MANIFEST.json", "best"
KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One that was read: what training goes on from, and what its worker noted beside it."""

    step: int
    state: "State"
    notes: Mapping[str, Any]
    best: Path | None  # the folder of the best adapter until then


def save(run: Path, state: "State", notes: Mapping[str, Any], best: Path | None = None) -> Path:
    """Write a checkpoint of the run in folder `run`; older ones but the last go once it stands.

    notes: JSON of the worker's own. best: a folder whose files are kept along, unchanged. Raises OSError, and then
    the checkpoints that were there still are.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    step = state.progress["step"]
    folder = run / FOLDER
    kept, fresh = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    if not folder.exists():
        folder.mkdir(parents=True)
        sync(run)
    fresh.mkdir()
    try:
        save_file(dict(state.adapter), fresh / "adapter.safetensors")
        save_file(dict(state.optimizer), fresh / "optimizer.safetensors")
    except SafetensorError as error:  # its way to say that it cannot write
        raise OSError(errno.ENOSPC if is_full(error, run) else errno.EIO, str(error)) from error
    order = {"adapter": [*state.adapter], "optimizer": [*state.optimizer]}  # a file sorts its tensors
    (fresh / "state.json").write_text(
        json.dumps({"training": dict(state.progress), "worker": dict(notes), "order": order}, allow_nan=False)
    )
    if best:
        (fresh / BEST).mkdir()
        for file in best.iterdir():
            shutil.copyfile(file, fresh / BEST / file.name)  # no link: what spoils one must not spoil all
    sums = {}
    for file in _files(fresh):
        sync(file)
        sums[str(file.relative_to(fresh))] = {"sha256": _sum(file), "bytes": file.stat().st_size}
    (fresh / MANIFEST).write_text(json.dumps({"step": step, "files": sums}, indent=1))
    sync(fresh / MANIFEST)
    for directory in (fresh / BEST, fresh):
        if directory.is_dir():
            sync(directory)
    if kept.exists():  # only one that does not verify: whoever goes on from a step does not save it again
        shutil.rmtree(kept)
    fresh.rename(kept)
    sync(folder)
    for old in [*_folders(run)[KEPT:], *folder.glob("*.tmp")]:
        shutil.rmtree(old, ignore_errors=True)
    return kept


def newest(run: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that is as it was written, and the newer ones that are not."""
    damaged = []
    for path in _folders(run):
        if _is_whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def load(path: Path) -> Checkpoint:
    """What `save` wrote, of a folder that `newest` gave. Raises E_CHECKPOINT when it cannot be read after all."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from lora_studio.train import State

    try:
        about = json.loads((path / "state.json").read_bytes())
        tensors = {name: load_file(path / f"{name}.safetensors") for name in ("adapter", "optimizer")}
        ordered = {name: {key: tensors[name][key] for key in about["order"][name]} for name in tensors}
        state = State(adapter=ordered["adapter"], optimizer=ordered["optimizer"], progress=about["training"])
        step, notes = state.progress["step"], about["worker"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        message = f"The checkpoint {path.name} cannot be read: {error}."
        raise StudioError("E_CHECKPOINT", message, "Start the run again.") from error
    best = path / BEST
    return Checkpoint(step=step, state=state, notes=notes, best=best if best.is_dir() else None)


def any_saved(run: Path) -> bool:
    """Whether there is a checkpoint at all, whole or not."""
    return bool(_folders(run))


def last_step(run: Path) -> int:
    """The step of the newest checkpoint, whole or not; 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in _folders(run)), default=0)


def sweep(run: Path) -> None:
    """Remove what a save that was broken off has left; only while nobody saves."""
    for left in (run / FOLDER).glob("*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def forget(run: Path) -> None:
    """Remove all checkpoints of a run."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def _folders(run: Path) -> list[Path]:
    """Checkpoints that were renamed into place, newest first."""
    names = ((CHECKPOINT.fullmatch(path.name), path) for path in (run / FOLDER).glob("step-*"))
    found = [(int(match[1]), path) for match, path in names if match]
    return [path for _, path in sorted(found, reverse=True)]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        found = {str(file.relative_to(path)) for file in _files(path)}
        return found == files.keys() and all(
            (path / name).stat().st_size == one["bytes"] and _sum(path / name) == one["sha256"]
            for name, one in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
