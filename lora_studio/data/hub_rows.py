"""Rows of a dataset on the Hugging Face Hub as JSON lines. For the sandbox: it decodes what strangers have uploaded.

The Hub's address is HF_ENDPOINT of the environment. Both clients are imported here at the top, so that the bounds of
the sandbox are those of the work. This module does not know where the rows are kept or what they mean.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import huggingface_hub
from datasets import config as client
from datasets import data_files
from datasets.exceptions import DatasetsError
from huggingface_hub import errors

from lora_studio.errors import StudioError, quote

client.STREAMING_READ_MAX_RETRIES = client.STREAMING_OPEN_MAX_RETRIES = 3  # its own default waits for minutes
client.USE_PARQUET_EXPORT = client.HF_UPDATE_DOWNLOAD_COUNTS = False  # talk to the Hub and to nobody else

_resolve = data_files.resolve_pattern


def _resolve_own(pattern: str, base_path: str, *given: Any, **more: Any) -> list[str]:
    """The files of a pattern in a dataset's README; the client looks for one elsewhere before it refuses it."""
    if "::" in pattern or not (data_files.is_relative_path(pattern) or pattern.startswith("hf://datasets/")):
        message = f"The dataset's README names files that are not in it: {quote(pattern, 60)}."
        raise StudioError("E_HUB_DATA", message, "Download its files and give one of them.")
    return _resolve(pattern, base_path, *given, **more)


data_files.resolve_pattern = _resolve_own


def fetch(
    repo: str, split: str | None, config: str | None, token: str | bool | None, max_rows: int, to: str, most_bytes: int
) -> dict[str, Any]:
    """Write at most `max_rows` rows to the new file `to`; {"split": its name, "notes": what was left out}."""
    rows, chosen = _rows(repo, split, config, token)
    return {"split": chosen, "notes": _write_lines(to, rows, max_rows, most_bytes)}


def _rows(
    repo: str, split: str | None, config: str | None, token: str | bool | None
) -> tuple[Iterator[dict[str, Any]], str]:
    """The rows of one split as they arrive, and the split's name."""
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


def _write_lines(to: str, rows: Iterator[dict[str, Any]], max_rows: int, most_bytes: int) -> list[str]:
    """Write at most `max_rows` rows as JSON lines and return a warning if there were more."""

    def refuse(value: object) -> str:
        message = f"The dataset holds values of type {type(value).__name__}; expected text and numbers."
        raise StudioError("E_TYPE", message, "Choose a dataset of texts.")

    with open(to, "xb") as file:
        size = 0
        for number, row in enumerate(rows):
            if number == max_rows:
                return [f"Only the first {max_rows:,} rows were taken."]
            finite = {key: None if isinstance(one, float) and math.isnan(one) else one for key, one in row.items()}
            line = json.dumps(finite, default=refuse).encode() + b"\n"
            size += len(line)
            if size > most_bytes:
                message = f"The first {number + 1:,} rows fill {size:,} bytes."
                raise StudioError("E_TOO_LARGE", message, "Take fewer rows.")
            file.write(line)
    return []
