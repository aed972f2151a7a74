"""DataLibrary: datasets kept on disk under content-hash ids, and the split into training and held-out rows.

A dataset is the folder root/datasets/<id> with source.<kind>, the bytes as they came, rows.jsonl, what the sandbox
read in them, and dataset.json, what was understood. It is written elsewhere and renamed into place, so it is there
whole or not at all. The source is parsed once, in the sandbox; the app and its workers open the rows alone.
No text of a user becomes a path. This module does not know models, tokens or runs.
"""

import dataclasses
import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lora_studio.data.formats import Example, columns_for, convert, guess
from lora_studio.data.readers import EXTENSIONS, Table, open_file, read_normalised, text_kind
from lora_studio.errors import StudioError, quote
from lora_studio.hub import is_hub_id
from lora_studio.limits import LAPTOP, Limits
from lora_studio.sandbox import Bounds, once

log = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parents[2] / "assets"
COPY_BYTES = 2**20
ROWS = "rows.jsonl"
GLANCE_BYTES = 2 * COPY_BYTES  # of a file that is read and not kept


class Sample(NamedTuple):
    """A dataset that comes with the app."""

    file: str
    title: str
    about: str


SAMPLES = {
    "orders": Sample("orders.jsonl", "Café orders", "An informal message becomes JSON: items, sizes, name."),
    "plain_english": Sample(
        "plain_english.csv", "Plain English", "A sentence of legal prose becomes one of plain words."
    ),
    "tickets": Sample("tickets.csv", "Support tickets", "A customer's message gets the label of a department."),
}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is known of one kept dataset; `format` and `mapping` are the guess a person may correct."""

    id: str
    name: str
    kind: str
    path: Path
    rows: int
    columns: tuple[str, ...]
    format: str
    mapping: dict[str, str]
    warnings: tuple[str, ...]
    created: float  # seconds since 1970
    source: str  # "file" | "text" | "hub" | "sample"
    digest: str = ""  # sha256 of rows.jsonl


class DataLibrary:
    """All datasets of one root folder."""

    def __init__(self, root: Path, limits: Limits = LAPTOP) -> None:
        self.folder = root / "datasets"
        self.limits = limits

    def add(self, path: Path, name: str | None = None) -> Dataset:
        """Keep a copy of a file; a file that cannot be read as a table raises, and nothing is kept."""
        with open_file(path) as file:
            return self._keep(file, path.name, display_name(name or path.name), "file")

    def add_text(self, text: str, name: str = "pasted text") -> Dataset:
        """Keep pasted text."""
        file = io.BytesIO(text.encode("utf-8", "replace"))
        return self._keep(file, f"pasted.{text_kind(text)}", display_name(name), "text")

    def add_sample(self, name: str) -> Dataset:
        """Keep one of SAMPLES."""
        if name not in SAMPLES:
            raise StudioError("E_SAMPLE", f"There is no sample {quote(name)}.", f"Give one of: {', '.join(SAMPLES)}.")
        sample = SAMPLES[name]
        with open_file(ASSETS / sample.file) as file:
            return self._keep(file, sample.file, sample.title, "sample")

    def add_hub(
        self,
        repo: str,
        split: str | None = None,
        config: str | None = None,
        max_rows: int = 20_000,
        token: str | bool | None = None,
    ) -> Dataset:
        """Keep the first rows of a dataset on the Hugging Face Hub as JSON lines.

        token: None for the login of this machine, False for no login at all; where strangers come, they do not borrow
        the host's.
        """
        if token is None and not self.limits.host_login:
            token = False
        if not is_hub_id(repo):
            raise StudioError("E_HUB_ID", f"{quote(repo)} is no dataset id.", "Write owner/name as on huggingface.co.")
        with self._incoming() as folder:
            limits, lines = self.limits, folder / "hub.jsonl"
            found = once(
                "lora_studio.data.hub_rows:fetch",
                *(repo, split, config, token, max_rows, str(lines), limits.file_bytes),
                bounds=Bounds.of(limits),
                file_bytes=limits.file_bytes,
                network=True,
            )
            with lines.open("rb") as file:
                return self._keep(file, lines.name, f"{repo} ({found['split']})", "hub", tuple(found["notes"]))

    def find(self, what: str) -> Dataset:
        """A dataset by its id, a sample's name, a file's path or a Hub id, in this order."""
        if _is_id(what) and (self.folder / what).is_dir():
            return self.get(what)
        if what in SAMPLES:
            return self.add_sample(what)
        path, here = Path(what), self.limits.local_paths
        if is_hub_id(what) and path.suffix.lower() not in EXTENSIONS and not (here and path.exists()):
            return self.add_hub(what)
        if not here:
            message = f"{quote(what)} is no dataset, no sample and no id on the Hub; paths are not opened here."
            raise StudioError("E_PATH", message, "Upload the file, or paste its text.")
        return self.add(path)

    def get(self, id: str) -> Dataset:
        """The dataset with this id."""
        try:
            if _is_id(id):
                return self._load(id)
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("dataset %s cannot be loaded: %s", id, error)
        raise StudioError(
            "E_DATASET_NOT_FOUND", f"There is no dataset {quote(id)}.", "Choose one of the list or add it."
        )

    def delete(self, id: str) -> None:
        """Forget a dataset and its file; runs that were trained on it keep their adapters."""
        folder = self.get(id).path.parent
        with self._incoming() as aside:
            folder.rename(aside / id)  # at once, whoever may be looking

    def table(self, id: str) -> Table:
        """The rows of a dataset. Raises E_CHANGED where they are not the ones that were read from its file."""
        dataset = self.get(id)
        rows = dataset.path.with_name(ROWS)
        if not rows.is_file():  # kept by an earlier version
            with self._incoming() as folder:
                self._parse(dataset.path, dataset.path.name, folder / ROWS)
                (folder / ROWS).replace(rows)
        return _opened(rows, dataset)

    def bytes_of(self, id: str) -> int:
        """How large the rows of a dataset are, as they lie on the disk."""
        path = self.get(id).path
        rows = path.with_name(ROWS)
        return (rows if rows.is_file() else path).stat().st_size

    def glance(self, path: Path, rows: int) -> Table:
        """The rows of a small file, at most so many, read as `add` reads them; nothing is kept."""
        few = DataLibrary(self.folder.parent, dataclasses.replace(self.limits, rows=rows, file_bytes=GLANCE_BYTES))
        with few._incoming() as folder:
            return _opened(folder / ROWS, few._parse(path, path.name, folder / ROWS))

    def mapping(self, dataset: Dataset, format: str = "") -> dict[str, str]:
        """{role: column} as guessed with the dataset, or for another format."""
        return dataset.mapping if format in ("", dataset.format) else columns_for(format, dataset.columns)

    def examples(
        self, id: str, format: str = "", columns: Mapping[str, str] | None = None
    ) -> tuple[list[Example], list[str]]:
        """The examples of a dataset and the warnings on the way; "" and None stand for the guess."""
        dataset = self.get(id)
        if columns is None:
            columns = self.mapping(dataset, format)
        return convert(self.table(id), format or dataset.format, columns)

    def _keep(self, file: BinaryIO, file_name: str, name: str, source: str, notes: tuple[str, ...] = ()) -> Dataset:
        with self._incoming() as folder:
            self._check_room()
            with open(folder / "source", "w+b") as copy:
                digest = _copy(file, copy, self.limits)
                os.fsync(copy.fileno())
                size = copy.seek(0, os.SEEK_END)
            read = self._parse(folder / "source", file_name, folder / ROWS)
            table = _opened(folder / ROWS, read)
            format, mapping = guess(table)
            id = self._free_id(digest, table.kind)
            dataset = Dataset(
                id=id,
                name=name,
                kind=table.kind,
                path=self.folder / id / f"source.{table.kind}",
                rows=len(table.rows),
                columns=table.columns,
                format=format,
                mapping=mapping,
                warnings=(*table.warnings, *notes),
                created=time.time(),
                source=source,
                digest=read.digest,
            )
            (folder / "source").rename(folder / dataset.path.name)
            facts = {key: value for key, value in dataclasses.asdict(dataset).items() if key not in ("id", "path")}
            with open(folder / "dataset.json", "w", encoding="utf-8") as about:
                json.dump(facts, about, indent=1)
                about.flush()
                os.fsync(about.fileno())
            if (self.folder / id).is_dir() and not self._is_whole(id, size):
                with self._incoming() as aside, suppress(FileNotFoundError):
                    (self.folder / id).rename(aside / "damaged")
            try:
                folder.rename(self.folder / id)
            except OSError:
                if not (self.folder / id).is_dir():
                    raise
        return self.get(id)  # the first one, if the same bytes were kept before

    def _check_room(self) -> None:
        """Raise E_DISK or E_LIMIT where one dataset more would be too much."""
        limits, free = self.limits, shutil.disk_usage(self.folder).free
        if free < limits.reserve_bytes:
            raise _disk_full(free)
        kept = sum(path.stat().st_size for path in self.folder.glob("*/*")) if math.isfinite(limits.kept_bytes) else 0
        if kept + 2 * limits.file_bytes > limits.kept_bytes:
            message = f"The datasets here fill {kept / 1e6:,.0f} MB of the {limits.kept_bytes / 1e6:,.0f} MB for you."
            hint = f"What is not used for {limits.idle_hours:.0f} hours is deleted; until then train on what is there."
            raise StudioError("E_LIMIT", message, hint)

    def _parse(self, source: Path, name: str, rows: Path) -> "_Read":
        """Write the rows of a file, in the sandbox, and make sure they are on the disk."""
        limits = self.limits
        found = once(
            "lora_studio.data.readers:normalise",
            *(str(source), name, str(rows), dataclasses.asdict(limits)),
            bounds=Bounds.of(limits),
            file_bytes=limits.decoded_bytes + limits.row_bytes,
        )
        with rows.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return _Read(found["kind"], tuple(found["columns"]), tuple(found["warnings"]), digest)

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        """A folder beside the datasets, gone afterwards unless it was renamed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="incoming-", dir=self.folder))
        try:
            yield folder
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(shutil.disk_usage(self.folder).free) from None
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _free_id(self, digest: Any, kind: str) -> str:
        """The content hash; with the kind in it where the same bytes are kept already as another kind."""
        kept = (self.folder / digest.hexdigest()[:32]).glob("source.*")
        if any(path.name != f"source.{kind}" for path in kept):
            digest.update(kind.encode())
        return digest.hexdigest()[:32]

    def _is_whole(self, id: str, size: int) -> bool:
        """Whether a dataset can be loaded and its bytes are all there."""
        try:
            return self.get(id).path.stat().st_size == size
        except (StudioError, OSError):
            return False

    def _load(self, id: str) -> Dataset:
        facts = json.loads((self.folder / id / "dataset.json").read_text(encoding="utf-8"))
        facts |= {"columns": tuple(facts["columns"]), "warnings": tuple(facts["warnings"])}
        return Dataset(id=id, path=self.folder / id / f"source.{facts['kind']}", **facts)

    def list(self) -> list[Dataset]:  # the last method: behind it, `list` is no longer the built-in one
        """All datasets, newest first."""
        found = []
        for folder in self.folder.glob("*/"):
            try:
                found.append(self.get(folder.name))
            except StudioError:
                continue  # a copy that is still being written, or a damaged one, which get() has logged
        return sorted(found, key=lambda dataset: (-dataset.created, dataset.id))


class _Read(NamedTuple):
    """What the sandbox says of a file."""

    kind: str
    columns: tuple[str, ...]
    warnings: tuple[str, ...]
    digest: str


def split(examples: Iterable[Example], holdout: float = 0.1, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(training, held-out) in file order; examples with equal prompts stay together.

    Which prompts are held out depends on the prompts and the seed alone, not on the order of the rows.
    """
    examples = list(examples)
    if not 0 <= holdout < 1:
        raise StudioError("E_SPLIT", f"The held-out share is {quote(holdout)}.", "Give a number from 0 to below 1.")
    if holdout == 0:
        return examples, []
    groups: dict[str, int] = {}
    keys = [_split_key(example, seed) for example in examples]
    for key in keys:
        groups[key] = groups.get(key, 0) + 1
    if len(groups) < 2:
        message = f"{len(examples)} rows with {len(groups)} different prompts cannot be split."
        raise StudioError("E_TOO_FEW", message, "Add rows, or hold out nothing (0).")
    wanted = max(1, round(holdout * len(examples)))
    held: set[str] = set()
    taken = 0
    for key in sorted(groups):
        if taken + groups[key] <= wanted and len(held) < len(groups) - 1:
            held.add(key)
            taken += groups[key]
    held = held or {min(groups, key=lambda key: (groups[key], key))}  # every prompt has many rows
    pairs = list(zip(keys, examples, strict=True))
    return [kept for key, kept in pairs if key not in held], [kept for key, kept in pairs if key in held]


def display_name(text: str) -> str:
    """A file's or a person's name for it as one short printable line, without folders."""
    last = re.split(r"[/\\]", text.strip().rstrip("/\\"))[-1]
    printable = "".join(" " if unicodedata.category(sign)[0] in "CZ" else sign for sign in last)
    return " ".join(printable.split())[:80] or "dataset"


def _split_key(example: Example, seed: int) -> str:
    said = [(message.role, message.content) for message in example.prompt] or example.text
    return hashlib.sha256(json.dumps([seed, said]).encode()).hexdigest()


def _disk_full(free: int) -> StudioError:
    message = f"Only {free / 1e6:,.0f} MB of the disk are free; the dataset was not kept."
    return StudioError("E_DISK", message, "Make room, for instance by deleting runs.")


def _is_id(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def _opened(path: Path, about: "_Read | Dataset") -> Table:
    """The rows in rows.jsonl. Raises E_CHANGED."""
    digest = hashlib.sha256()

    def lines(file: BinaryIO) -> Iterator[bytes]:
        for line in file:
            digest.update(line)
            yield line

    hint = "Add its file again."
    try:
        with path.open("rb") as file:
            table = read_normalised(lines(file), about.kind, about.columns, about.warnings)
    except (ValueError, TypeError, OSError) as error:
        raise StudioError("E_CHANGED", f"The rows of the dataset cannot be read: {quote(str(error))}.", hint) from None
    if about.digest and digest.hexdigest() != about.digest:
        raise StudioError("E_CHANGED", "The rows of the dataset were changed since it was added.", hint)
    return table


def _copy(file: BinaryIO, copy: BinaryIO, limits: Limits) -> Any:
    """Copy as much as may be read and return its hash."""
    digest, size = hashlib.sha256(), 0
    while (chunk := file.read(COPY_BYTES)) and size <= limits.file_bytes:  # one chunk more, for the reader to refuse
        size += copy.write(chunk)
        digest.update(chunk)
    return digest
