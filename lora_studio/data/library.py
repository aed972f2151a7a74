"""DataLibrary: datasets kept on disk under content-hash ids, and the split into training and held-out rows.

A dataset is the folder root/datasets/<id> with source.<kind>, the bytes as they came, and dataset.json, what
was understood of them. It is written elsewhere and renamed into place, so it is there whole or not at all.
No text of a user becomes a path. This module does not know models, tokens or runs.
"""

import dataclasses
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
from lora_studio.data.readers import EXTENSIONS, Table, open_file, read, read_path, text_kind
from lora_studio.errors import StudioError, quote
from lora_studio.hub import is_hub_id
from lora_studio.limits import LAPTOP, Limits

log = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parents[2] / "assets"
COPY_BYTES = 2**20
STREAM_RETRIES = 3  # the client's own default waits for minutes


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

        token: None for the login of this machine, False for no login at all; on a Space, where the machine's login is
        the host's, nobody else borrows it.
        """
        if token is None and os.environ.get("SPACE_ID"):
            token = False
        if not is_hub_id(repo):
            raise StudioError("E_HUB_ID", f"{quote(repo)} is no dataset id.", "Write owner/name as on huggingface.co.")
        rows, chosen = _hub_rows(repo, split, config, token)
        with tempfile.TemporaryFile() as file:
            notes = _write_lines(file, rows, max_rows, self.limits)
            file.seek(0)
            return self._keep(file, "hub.jsonl", f"{repo} ({chosen})", "hub", notes)

    def find(self, what: str) -> Dataset:
        """A dataset by its id, a sample's name, a file's path or a Hub id, in this order."""
        if _is_id(what) and (self.folder / what).is_dir():
            return self.get(what)
        if what in SAMPLES:
            return self.add_sample(what)
        path = Path(what)
        on_the_hub = is_hub_id(what) and path.suffix.lower() not in EXTENSIONS and not path.exists()
        return self.add_hub(what) if on_the_hub else self.add(path)

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

    def table(self, id: str) -> Table:
        """The rows of a dataset."""
        return read_path(self.get(id).path, limits=self.limits)

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
            with open(folder / "source", "w+b") as copy:
                digest = _copy(file, copy, self.limits)
                table = read(copy, file_name, self.limits)
                os.fsync(copy.fileno())
                size = copy.seek(0, os.SEEK_END)
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

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        """A folder beside the datasets, gone afterwards unless it was renamed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="incoming-", dir=self.folder))
        try:
            yield folder
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


def _is_id(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def _copy(file: BinaryIO, copy: BinaryIO, limits: Limits) -> Any:
    """Copy as much as may be read and return its hash."""
    digest, size = hashlib.sha256(), 0
    while (chunk := file.read(COPY_BYTES)) and size <= limits.file_bytes:  # one chunk more, for `read` to refuse
        size += copy.write(chunk)
        digest.update(chunk)
    return digest


# The Hugging Face Hub; its address is HF_ENDPOINT of the environment


def _hub_rows(
    repo: str, split: str | None, config: str | None, token: str | bool | None
) -> tuple[Iterator[dict[str, Any]], str]:
    """The rows of one split as they arrive, and the split's name."""
    import datasets
    import huggingface_hub
    from datasets import config as client

    client.STREAMING_READ_MAX_RETRIES = client.STREAMING_OPEN_MAX_RETRIES = STREAM_RETRIES
    client.USE_PARQUET_EXPORT = client.HF_UPDATE_DOWNLOAD_COUNTS = False  # talk to the Hub and to nobody else
    place = f"hf://datasets/{repo}"  # with the scheme, so that a local folder of that name is never taken
    with _hub_errors(repo):
        huggingface_hub.HfApi().auth_check(repo, repo_type="dataset", token=token)
        try:
            splits = datasets.load_dataset(place, name=config, streaming=True, token=token)
        except ValueError:
            names = datasets.get_dataset_config_names(place, token=token)
            if config in names or (config is None and len(names) < 2):
                raise
            wrong = f"has no configuration {quote(config, 40)}" if config else "has several configurations"
            hint = f"Give one of: {quote(', '.join(names), 150)}."
            raise StudioError("E_HUB_CONFIG", f"{repo} {wrong}.", hint) from None
    names = [str(name) for name in splits]
    chosen = split or str("train" if "train" in names or not names else names[0])
    if chosen not in names or (split is None and chosen != "train" and len(names) > 1):
        message = f"{repo} has no split {quote(chosen, 40)}."
        raise StudioError("E_HUB_SPLIT", message, f"Give one of: {quote(', '.join(names), 150)}.")

    def rows() -> Iterator[dict[str, Any]]:
        with _hub_errors(repo):
            stream = splits[chosen]
            yield from stream.decode(False) if stream.features else stream  # pictures stay bytes, refused below

    return rows(), chosen


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """What the clients of the Hub raise, as errors a person can act on."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        hint = f"Ask for access at huggingface.co/datasets/{repo} and log in with `hf auth login`."
        raise StudioError("E_HUB_GATED", f"{repo} is open only to those who were granted access.", hint) from None
    except errors.RepositoryNotFoundError:
        hint = "Check owner and name; for a private one log in with `hf auth login`."
        raise StudioError("E_HUB_NOT_FOUND", f"There is no public dataset {repo} on the Hub.", hint) from None
    except errors.HfHubHTTPError as error:
        message = f"The Hub answered {error.response.status_code} for {repo}."
        raise StudioError("E_OFFLINE", message, "Try again later, or give a file.") from None
    except (DatasetsError, ValueError, RuntimeError, ImportError) as error:
        message = f"{repo} cannot be read as a table: {quote(str(error), 120)}."
        raise StudioError("E_HUB_DATA", message, "Download its files and give one of them.") from None
    except (errors.HTTPError, OSError):  # pyright: ignore[reportPrivateImportUsage]
        raise StudioError(
            "E_OFFLINE", f"The Hub does not answer; {repo} was not loaded.", "Check the network."
        ) from None


def _write_lines(file: BinaryIO, rows: Iterator[dict[str, Any]], max_rows: int, limits: Limits) -> tuple[str, ...]:
    """Write at most `max_rows` rows as JSON lines and return a warning if there were more."""

    def refuse(value: object) -> str:
        message = f"The dataset holds values of type {type(value).__name__}; expected text and numbers."
        raise StudioError("E_TYPE", message, "Choose a dataset of texts.")

    size = 0
    for number, row in enumerate(rows):
        if number == max_rows:
            return (f"Only the first {max_rows:,} rows were taken.",)
        finite = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        size += file.write(json.dumps(finite, default=refuse).encode() + b"\n")
        if size > limits.file_bytes:
            raise StudioError("E_TOO_LARGE", f"The first {number:,} rows fill {size:,} bytes.", "Take fewer rows.")
    return ()
