"""What leaves the studio: adapters and merged models with card and proof, combinations, smaller ranks, archives."""

import contextlib
import copy
import math
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_studio import adapters, peft_format
from lora_studio.card import TAG, Background, base_of, combined_card, model_card, modelfile_source, smaller_card
from lora_studio.core import upcast
from lora_studio.core.lean import Tokens
from lora_studio.core.lora import LoRA
from lora_studio.core.merge import combine, merged_state, rounding, unties
from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError, quote
from lora_studio.inside import smaller
from lora_studio.measure import mean_loss
from lora_studio.modelfile import modelfile, turns_of
from lora_studio.proof import Proof, compare, look
from lora_studio.runs.config import Run

MODEL_CONFIG = "config.json"
MODELFILE = "Modelfile"
SORTS = (peft_format.CONFIG, adapters.METHOD, MODEL_CONFIG)  # one of them says what an export is
DOWNLOAD = "download-"
DOWNLOAD_KEPT_S = 3600
DTYPES = ("float32", "bfloat16", "float16")  # of a merged model


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What storing a merged model in `dtype` changed, by layer: norm of the rounding error over norm of the update."""

    dtype: str
    layers: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"worst_layer": max(self.layers, key=self.layers.__getitem__, default="")}

    @property
    def sentence(self) -> str:
        worst = max(self.layers.values(), default=0.0)
        said = f"Merged in float32 and stored in {self.dtype}"
        if worst:
            said += f", which changes the updates by at most {100 * worst:.2g} %"
            said += " (norm of the rounding error over norm of the update, in the worst layer)"
        return f"{said}."


def check_folder(to: Path, sort: str, *, archive: bool = False) -> None:
    """E_EXISTS where an export to `to`, an absolute path, would mix with or replace what it did not write itself.

    sort: the file of SORTS that the export is going to write.
    """
    again = "README.md" in (found := _names(to)) and _is_ours(to / "README.md") and found & {*SORTS} == {sort}
    if found and not again:
        message = f"{quote(str(to))} is not empty and holds no earlier export of this kind."
        raise StudioError("E_EXISTS", message, "Give a new or an empty folder.")
    if archive and archive_of(to).exists() and not (again and _is_our_archive(archive_of(to))):
        raise StudioError("E_EXISTS", f"{quote(str(archive_of(to)))} is there already.", "Give another name.")


def sort_of(run: Run, *, merged: bool) -> str:
    """Which of SORTS an export of this run is."""
    return MODEL_CONFIG if merged else adapters.files(run.path / "adapter")[0]


def export_adapter(
    run: Run, to: Path, tokenizer: Any, prove: Callable[[Path], Proof], more: Background
) -> tuple[list[Path], Proof]:
    """Copy the adapter, with its proof, a card and a Modelfile, into `to`. Raises E_NO_ADAPTER.

    prove: looks at the copied files. tokenizer: the base model's, None where it cannot be had.
    """
    if not run.has_adapter:
        raise StudioError("E_NO_ADAPTER", f"{quote(run.name)} has not saved an adapter yet.", "Wait for an evaluation.")
    with _staged(to) as (stage, files):
        for name in adapters.files(run.path / "adapter"):
            shutil.copyfile(run.path / "adapter" / name, stage / name)
        proof = prove(stage)
        if adapters.plain(stage):
            _write_modelfile(run, tokenizer, stage, merged=False)
        (stage / "README.md").write_text(model_card(run, proof=proof, more=more), encoding="utf-8")
    return files, proof


def export_merged(
    run: Run, lora: LoRA, tokenizer: Any, to: Path, *, dtype: str, rows: Sequence[Tokens], more: Background
) -> tuple[list[Path], Rounding, Proof]:
    """Write a plain transformers folder with the run's adapter folded in, and measure what that changed.

    The sum is made in float32 and rounded once, to `dtype`. lora: has the adapter under the run's id. rows: what the
    proof is made on. Raises E_MERGE for methods that are no change of weights, and E_NOT_FINITE when `dtype` cannot
    hold the model.
    """
    model, kind = lora.model, getattr(torch, dtype)
    layers = rounding(lora, run.id, kind)
    with lora.use(run.id):
        before = look(model, tokenizer, rows)
    with _staged(to) as (stage, files):
        _save_model(lora, run.id, stage, dtype, run.labels)
        tokenizer.save_pretrained(stage)
        again = _read_again(type(model), stage, model)
        proof = compare(before, look(again, tokenizer, rows), stored=dtype, computed_in=_name(model.dtype))
        if not all(math.isfinite(value) for value in (*layers.values(), proof.largest)):
            message = f"The merged model does not fit into {dtype}: some of its values are not finite."
            raise StudioError("E_NOT_FINITE", message, "Choose bfloat16 or float32.")
        done = Rounding(dtype=dtype, layers=layers)
        _write_modelfile(run, tokenizer, stage, merged=True)
        (stage / "README.md").write_text(model_card(run, done.sentence, proof, more), encoding="utf-8")
    for stale in {*to.glob("model*.safetensors*")} - {*files}:  # of an export in other shards, loaded before the new
        stale.unlink()
    return files, done, proof


def _write_modelfile(run: Run, tokenizer: Any, folder: Path, *, merged: bool) -> None:
    """For Ollama, which runs models that write text."""
    if tokenizer is not None and not run.labels:
        text = modelfile(tokenizer, turns_of(tokenizer), modelfile_source(run, merged=merged))
        (folder / MODELFILE).write_text(text, encoding="utf-8")


def _save_model(lora: LoRA, name: str, folder: Path, dtype: str, labels: Sequence[str]) -> None:
    """Weights and a configuration that says what they are; the model and its own configuration stay as they were."""
    model, state = lora.model, merged_state(lora, name, getattr(torch, dtype))
    apart = unties(lora, name)
    for place, source in {} if apart else getattr(model, "all_tied_weights_keys", {}).items():
        state[place] = state[source]  # rounded apart; as one tensor it is written once
    about = copy.deepcopy(model.config)
    model.save_pretrained(folder, state_dict=state)
    about.architectures, about.dtype = [type(model).__name__], dtype
    if labels:
        about.id2label, about.label2id = dict(enumerate(labels)), {label: n for n, label in enumerate(labels)}
    if apart:
        about.tie_word_embeddings = False
    about.save_pretrained(folder)


def _read_again(kind: type, folder: Path, like: Any) -> Any:
    """The model in `folder`, on the device and in the dtype of `like`."""
    again: Any = kind
    again = again.from_pretrained(
        folder,
        dtype=like.dtype,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        attn_implementation=_attention(like),
    )
    again = again.to(like.device).eval()
    upcast.apply(again)
    return again


def export_smaller(
    run: Run, lora: LoRA, tokenizer: Any, rank: int, to: Path, *, rows: Sequence[Tokens], heldout: Sequence[Tokens]
) -> tuple[list[Path], Proof]:
    """Write the run's adapter, which `lora` has under its id, cut to `rank`, with its proof and its held-out loss.

    rows: what the proof is made on. Raises E_RANK, E_NOT_LORA.
    """
    with smaller(lora, run.id, rank) as cut, _staged(to) as (stage, files):
        adapters.save(lora, cut, stage, base_of(run))
        proof = _prove_beside(lora, tokenizer, cut, stage, rows)
        with lora.use(cut):
            loss = mean_loss(lora, heldout) if heldout else None
        (stage / "README.md").write_text(smaller_card(run, rank, loss, proof), encoding="utf-8")
    return files, proof


def export_combined(
    runs: Sequence[Run],
    weights: Sequence[float],
    lora: LoRA,
    tokenizer: Any,
    to: Path,
    *,
    rank: int | None,
    rows: Sequence[Tokens],
) -> tuple[list[Path], Proof]:
    """Write one adapter that is the weighted sum of those that `lora` has under the runs' ids, with its proof.

    rows: what the proof is made on. Raises E_COMBINE.
    """
    factors = combine(lora, {run.id: weight for run, weight in zip(runs, weights, strict=True)}, rank)
    widest = max(len(one.A) for one in factors)
    targets = tuple(dict.fromkeys(one.role or one.layer for one in factors))
    spec = LoraSpec(rank=widest, alpha=float(widest), targets=targets)
    lora.load_state("combined", spec, factors)
    try:
        with _staged(to) as (stage, files):
            adapters.save(lora, "combined", stage, base_of(runs[0]))
            proof = _prove_beside(lora, tokenizer, "combined", stage, rows)
            (stage / "README.md").write_text(combined_card(runs, weights, rank, proof), encoding="utf-8")
    finally:
        lora.remove("combined")
    return files, proof


def _prove_beside(lora: LoRA, tokenizer: Any, name: str, folder: Path, rows: Sequence[Tokens]) -> Proof:
    """That the adapter in `folder`, loaded again beside the others, is the one that `lora` has under `name`."""
    again = f"{name} again"
    with lora.use(name):
        before = look(lora.model, tokenizer, rows)
    adapters.load(lora, folder, again)
    try:
        with lora.use(again):
            after = look(lora.model, tokenizer, rows)
    finally:
        lora.remove(again)
    return compare(before, after, stored="adapter", computed_in=_name(lora.model.dtype))


def pack(files: Sequence[Path], folder: Path, to: Path) -> Path:
    """Zip just these files of `folder` (not the folder itself) as `to`. Raises E_DISK."""
    part = to.with_name(f"{to.name}.part")
    try:
        with zipfile.ZipFile(part, "w") as packed:  # stored, because weights do not get smaller
            for file in files:
                packed.write(file, file.relative_to(folder))
        return part.replace(to)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        message = f"{quote(to.name)} cannot be written: {error.strerror}."
        raise StudioError("E_DISK", message, "Free some space on the disk.") from error


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
        return _has_tag(card.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _is_our_archive(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as packed:
            return _has_tag(packed.read("README.md").decode())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def _has_tag(card: str) -> bool:
    return f"- {TAG}\n" in "".join(card.split("---")[1:2])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention(model: Any) -> str:
    """As the model itself was loaded; a folder's config could otherwise ask for something else."""
    return getattr(model.config, "_attn_implementation", None) or "eager"
