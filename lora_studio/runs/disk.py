"""The disk under a root: written whole or not at all, a reserve for the last words, and what a full disk is called.

    ROOT/.ballast    bytes that mean nothing; they go when the disk is full, so that what must be written still can be
    ROOT/.app.lock   held by the one app of this root

It knows no runs.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lora_studio.errors import StudioError
from lora_studio.limits import MIB

BALLAST, BALLAST_BYTES = ".ballast", 64 * MIB
LOCK, TRIAL = ".app.lock", ".trial"
FULL = (errno.ENOSPC, errno.EDQUOT)

Done = TypeVar("Done")


def sync(path: Path) -> None:
    """Let a file or a folder survive a power cut. Raises OSError; what failed once is to be written anew."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        whole = getattr(fcntl, "F_FULLFSYNC", None)  # macOS, where fsync leaves it in the drive's own memory
        os.fsync(descriptor) if whole is None else fcntl.fcntl(descriptor, whole)
    finally:
        os.close(descriptor)


def append(descriptor: int, data: bytes) -> None:
    """Write all of `data` behind a file's end, or nothing of it: the next line never begins inside this one."""
    size, rest = os.fstat(descriptor).st_size, memoryview(data)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def shorten(path: Path, most: int) -> None:
    """Keep the newest half of a file that others append to, once it is larger than `most` bytes."""
    try:
        size = path.stat().st_size
        if size <= most:
            return
        with path.open("r+b") as file:
            file.seek(size - most // 2)
            kept = file.read()
            file.truncate(0)  # whoever appends goes on behind what is there
        with path.open("ab") as file:
            file.write(b"... the beginning was left out\n" + kept)
    except FileNotFoundError:
        return


# ---- room ------------------------------------------------------------------------------------------------------------


def free(folder: Path) -> int:
    """Bytes that may still be written where `folder` is."""
    return shutil.disk_usage(folder).free


def size(folder: Path) -> int:
    """Bytes of all files in a folder, as far as they are there; a file of two names counts once."""
    files: dict[int, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                about = os.lstat(os.path.join(parent, name))
            except OSError:
                continue
            files[about.st_ino] = about.st_size
    return sum(files.values())


def megabytes(count: float) -> str:
    """12 MB, 1.4 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count, 0) / 1e6:.3g} MB"


def is_full(error: BaseException, folder: Path, needs: int = 0) -> bool:
    """Whether an error of writing is about room: libraries say so in many ways, so the disk is looked at, too."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    words = str(error)
    writing = isinstance(error, OSError) and error.errno in (None, errno.EIO, errno.EFBIG)
    return "No space left" in words or ((writing or "I/O error" in words) and free(folder) < needs)


def full(folder: Path, needs: int) -> StudioError:
    """E_DISK, with figures: what could not be written, and what is left."""
    message = f"The disk is full: saving needs {megabytes(needs)}, {megabytes(free(folder))} are free."
    return StudioError("E_DISK", message, "Make room, for instance by deleting runs, then resume it.")


# ---- the ballast -----------------------------------------------------------------------------------------------------


def keep_ballast(root: Path, size: int = 0) -> bool:
    """Have the reserve there, where it takes at most half of what is free; whether it is."""
    path, fresh, size = root / BALLAST, root / f"{BALLAST}.tmp", size or BALLAST_BYTES
    if path.exists():
        return True
    try:
        if free(root) < 2 * size:
            return False
        with fresh.open("wb") as file:  # of noise, which no file system makes small
            for _ in range(0, size, MIB):
                file.write(os.urandom(MIB))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        return False
    return True


def drop_ballast(root: Path) -> bool:
    """Give the reserve away; False when there was none."""
    try:
        (root / BALLAST).unlink()
    except FileNotFoundError:
        return False
    return True


def at_any_rate(root: Path, act: Callable[..., Done], *given: Any) -> Done:
    """What must not fail for want of some kilobytes: where the disk is full, once more without the ballast."""
    try:
        return act(*given)
    except OSError as error:
        if error.errno not in FULL or not drop_ballast(root):
            raise
        return act(*given)


# ---- one app ---------------------------------------------------------------------------------------------------------


def own(root: Path) -> BinaryIO:
    """The open lock of the root, for as long as this process is its app. Raises E_ROOT_IN_USE."""
    lock = (root / LOCK).open("a+b")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        who = lock.read(20).decode(errors="replace").strip() or "another one"
        lock.close()
        hint = "Open the page of that app, end it, or set LORA_STUDIO_ROOT to another folder."
        raise StudioError(
            "E_ROOT_IN_USE", f"The folder {root} is in use by the app with process id {who}.", hint
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()).encode())
    lock.flush()
    return lock


def try_out(root: Path) -> None:
    """See that the root keeps its word: what is renamed is there, what is locked is locked. Raises E_ROOT.

    On some network file systems every lock is granted, and then two workers would write one run.
    """
    trial, hint = root / f"{TRIAL}.tmp", "Set LORA_STUDIO_ROOT to a folder on a local disk."
    try:
        with _two_handles(trial) as (one, two):
            one.write(b"1")
            one.flush()
            os.fsync(one.fileno())
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                raise StudioError("E_ROOT", f"Files in {root} cannot be locked: a second lock was granted.", hint)
        trial.replace(root / TRIAL)
        sync(root)
        if (root / TRIAL).read_bytes() != b"1":
            raise StudioError("E_ROOT", f"What is written to {root} does not come back.", hint)
    except OSError as error:
        if error.errno not in FULL:
            raise StudioError("E_ROOT", f"The folder {root} cannot be worked in: {error.strerror}.", hint) from error
    finally:
        for path in (trial, root / TRIAL):
            path.unlink(missing_ok=True)


@contextmanager
def _two_handles(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    with path.open("wb") as one, path.open("ab") as two:
        yield one, two
