"""What leaves the studio: adapter folder, merged model, archive, model card, and the line that repeats the run."""

import contextlib
import shlex
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lora_studio.core.lora import LoRA
from lora_studio.core.merge import merged_state, rounding_error
from lora_studio.data.library import SAMPLES
from lora_studio.errors import StudioError, quote
from lora_studio.peft_format import CONFIG, WEIGHTS
from lora_studio.runs.config import Run

MODEL_CONFIG = "config.json"
TAG = "lora-studio"  # in every card; says that an export is ours
DOWNLOAD = "download-"
DOWNLOAD_KEPT_S = 3600


def command_line(run: Run) -> str:
    """The train command that repeats this run; only what differs from the defaults is spelled out."""
    config = run.config
    titles = {sample.title: name for name, sample in SAMPLES.items()}
    named = config.dataset.name
    data = named if named in SAMPLES else titles.get(named, config.dataset.id)
    words = ["python", "-m", "lora_studio", "train", "--model", config.model, "--data", data]
    if config.dataset.format:
        words += ["--format", config.dataset.format]
    for role, column in config.dataset.columns.items():
        words += ["--column", f"{role}={column}"]
    for part in (config.method, config.train):
        for setting in fields(part):
            value = getattr(part, setting.name)
            if value != setting.default:
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words += [f"--{setting.name.replace('_', '-')}", text]
    return shlex.join(words)


def check_folder(to: Path, *, merged: bool = False, archive: bool = False) -> None:
    """E_EXISTS where an export to `to`, an absolute path, would mix with or replace what it did not write itself."""
    again = "README.md" in (found := _names(to)) and _is_ours(to / "README.md")
    again = again and (CONFIG in found, MODEL_CONFIG in found) == (not merged, merged)
    if found and not again:
        message = f"{quote(str(to))} is not empty and holds no earlier export of this kind."
        raise StudioError("E_EXISTS", message, "Give a new or an empty folder.")
    if archive and archive_of(to).exists() and not again:
        raise StudioError("E_EXISTS", f"{quote(str(archive_of(to)))} is there already.", "Give another name.")


def export_adapter(run: Run, to: Path) -> list[Path]:
    """Copy the adapter, with a model card, into `to`. Raises E_NO_ADAPTER."""
    if not run.has_adapter:
        raise StudioError("E_NO_ADAPTER", f"{quote(run.name)} has not saved an adapter yet.", "Wait for an evaluation.")
    with _staged(to) as (stage, files):
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(run.path / "adapter" / name, stage / name)
        (stage / "README.md").write_text(model_card(run), encoding="utf-8")
    return files


def export_merged(run: Run, lora: LoRA, name: str, tokenizer: Any, to: Path) -> list[Path]:
    """Write a plain transformers folder with the adapter folded in.

    The sum is made in float32 and rounded once, to the dtype in which the base is loaded here: the studio loads it
    to compare answers, in float32 on a CPU below 400 M parameters. The card says what rounding changed.
    """
    dtype = next(lora.model.parameters()).dtype
    stored = f"Merged in float32 and stored in {_name(dtype)}."
    if dtype != torch.float32:
        error = 100 * rounding_error(lora, name, dtype)
        stored = (
            f"Merged in float32 and rounded once to {_name(dtype)}, which changes the updates by at most {error:.2g} %"
        )
        stored += " (norm of the rounding error over norm of the update, in the worst layer)."
    with _staged(to) as (stage, files):
        lora.model.save_pretrained(stage, state_dict=merged_state(lora, name, dtype))
        tokenizer.save_pretrained(stage)
        (stage / "README.md").write_text(model_card(run, stored), encoding="utf-8")
    for stale in {*to.glob("model*.safetensors*")} - {*files}:  # of an export in other shards, loaded before the new
        stale.unlink()
    return files


def pack(files: Sequence[Path], folder: Path, to: Path) -> Path:
    """Zip just these files of `folder` (not the folder itself) as `to`."""
    part = to.with_name(f"{to.name}.part")
    with zipfile.ZipFile(part, "w") as packed:  # stored, because weights do not get smaller
        for file in files:
            packed.write(file, file.relative_to(folder))
    return part.replace(to)


def archive_of(folder: Path) -> Path:
    """The zip that stands beside an export."""
    return folder.with_name(f"{folder.name}.zip")


def fresh_download(exports: Path) -> Path:
    """A new folder inside `exports` for one download; downloads older than an hour are removed."""
    exports.mkdir(parents=True, exist_ok=True)
    for folder in exports.glob(f"{DOWNLOAD}*"):
        with contextlib.suppress(OSError):  # gone in the meantime, or a link, which rmtree refuses
            if time.time() - folder.stat().st_mtime > DOWNLOAD_KEPT_S:
                shutil.rmtree(folder)
    return Path(tempfile.mkdtemp(prefix=DOWNLOAD, dir=exports))


def model_card(run: Run, stored: str = "") -> str:
    """README.md of an export: base, method, data and the run's own figures.

    stored: how the weights of a merged model were stored; empty for an adapter.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config, figures = run.config, run.summary
    library = "transformers" if stored else "peft"
    about = ModelCardData(library_name=library, tags=["lora", TAG], base_model=run.facts.get("repo"))
    what = "A merged model, which needs no adapter: a LoRA update of" if stored else "A LoRA adapter for"
    lines = [
        f"# {_plain(run.name)}",
        f"{what} `{config.model}` (revision `{run.facts.get('revision', 'unknown')}`), "
        f"{config.method.variant}, rank {config.method.rank}, alpha {config.method.alpha:g}, "
        f"on {', '.join(config.method.targets)}.",
        f"Trained for {run.step} steps on `{_plain(config.dataset.name)}` (fingerprint `{config.dataset.id}`).",
        stored,
        _table(figures),
        "Repeat it with:",
        f"```\n{command_line(run)}\n```",
    ]
    return str(ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(line for line in lines if line) + "\n"))


def _table(figures: Mapping[str, Any]) -> str:
    names = {"base_loss": "Held-out loss, base", "best_loss": "Held-out loss, adapted", "best_step": "Best step"}
    rows = [f"| {names[key]} | {figures[key]:.4g} |" for key in names if key in figures]
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else ""


@contextlib.contextmanager
def _staged(to: Path) -> Iterator[tuple[Path, list[Path]]]:
    """(a folder to write into, the files as they lie in `to` afterwards); if writing fails, `to` is as it was."""
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{quote(str(to))} cannot be made: {error.strerror}."
        raise StudioError("E_WRITE", message, "Give another folder.") from None
    files: list[Path] = []
    with tempfile.TemporaryDirectory(prefix=".export-", dir=to) as stage:
        yield Path(stage), files
        for path in sorted(path for path in Path(stage).rglob("*") if path.is_file()):
            file = to / path.relative_to(stage)  # some tokenizers write a folder of chat templates
            file.parent.mkdir(exist_ok=True)
            files.append(path.replace(file))


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        raise StudioError("E_EXISTS", f"{quote(str(folder))} lies in or is a file.", "Give a folder.") from None
    except OSError as error:
        hint = "Check the path and who may read it."
        raise StudioError("E_READ", f"{quote(str(folder))} cannot be read: {error.strerror}.", hint) from None


def _is_ours(card: Path) -> bool:
    """Whether a README was written by `model_card`: by the tag in its front matter."""
    try:
        front = card.read_text(encoding="utf-8").split("---")[1]
    except (OSError, ValueError, IndexError):
        return False
    return f"- {TAG}\n" in front


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(text: str) -> str:
    """User text inside the card: one line, no markup."""
    return "".join(sign if sign.isalnum() or sign in " ._-," else " " for sign in text).strip() or "adapter"
