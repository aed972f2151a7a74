"""What leaves the studio: adapters, merged models, combinations, archives, cards, and the line that repeats a run."""

import contextlib
import copy
import math
import shlex
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_studio import adapters, peft_format
from lora_studio.core.lora import LoRA
from lora_studio.core.merge import combine, merged_state, rounding, unties
from lora_studio.core.spec import BASELINES, BaselineSpec, LoraSpec, Method
from lora_studio.data.library import SAMPLES
from lora_studio.errors import StudioError, quote
from lora_studio.fields import knobs
from lora_studio.inside import smaller
from lora_studio.runs.config import Run, width_in_words

MODEL_CONFIG = "config.json"
SORTS = (peft_format.CONFIG, adapters.METHOD, MODEL_CONFIG)  # one of them says what an export is
TAG = "lora-studio"  # in every card; says that an export is ours
DOWNLOAD = "download-"
DOWNLOAD_KEPT_S = 3600
DTYPES = ("float32", "bfloat16", "float16")  # of a merged model


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What storing a merged model changed, measured.

    layers: norm of the rounding error over norm of the update. logits: the stored model, opened again, against the
    base with its adapter, both computing in `computed_in`; the largest and the mean absolute difference on `rows` rows.
    """

    dtype: str
    layers: Mapping[str, float]
    computed_in: str
    rows: int
    largest: float
    mean: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"worst_layer": max(self.layers, key=self.layers.__getitem__, default="")}

    @property
    def sentence(self) -> str:
        worst = max(self.layers.values(), default=0.0)
        said = f"Merged in float32 and stored in {self.dtype}"
        if worst:
            said += f", which changes the updates by at most {100 * worst:.2g} %"
            said += " (norm of the rounding error over norm of the update, in the worst layer)"
        if self.rows:
            said += f". Opened again, its logits on {self.rows} rows differ from the unmerged model's by"
            said += f" {self.largest:.2g} at most and {self.mean:.2g} on average, computed in {self.computed_in}"
        return f"{said}."


def command_line(run: Run) -> str:
    """The train command that repeats this run; only what differs from the defaults is spelled out.

    Of a run that was brought along, the command that brings its folder along again.
    """
    config = run.config
    if run.brought:
        folder = ["python", "-m", "lora_studio", "adopt", "FOLDER"]
        return shlex.join([*folder, "--model", config.model, "--name", config.name])
    titles = {sample.title: name for name, sample in SAMPLES.items()}
    named = config.dataset.name
    data = named if named in SAMPLES else titles.get(named, config.dataset.id)
    words = ["python", "-m", "lora_studio", "train", "--model", config.model, "--data", data]
    if config.dataset.format:
        words += ["--format", config.dataset.format]
    for role, column in config.dataset.columns.items():
        words += ["--column", f"{role}={column}"]
    if config.task == "classify":  # everything else is what the command line would do by itself
        words += ["--task", config.task]
    if isinstance(config.method, BaselineSpec):
        words += ["--method", config.method.kind]
    for part in (config.method, config.train):
        for name, setting in knobs(type(part)).items():
            value = getattr(part, name)
            said = value != setting.default or (name == "learning_rate" and isinstance(config.method, BaselineSpec))
            if name != "kind" and said:
                words += [f"--{name.replace('_', '-')}", _word(value)]
    return shlex.join(words)


def _word(value: Any) -> str:
    """A setting as the command line takes it."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={number}" for name, number in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_folder(to: Path, sort: str, *, archive: bool = False) -> None:
    """E_EXISTS where an export to `to`, an absolute path, would mix with or replace what it did not write itself.

    sort: the file of SORTS that the export is going to write.
    """
    again = "README.md" in (found := _names(to)) and _is_ours(to / "README.md") and found & {*SORTS} == {sort}
    if found and not again:
        message = f"{quote(str(to))} is not empty and holds no earlier export of this kind."
        raise StudioError("E_EXISTS", message, "Give a new or an empty folder.")
    if archive and archive_of(to).exists() and not again:
        raise StudioError("E_EXISTS", f"{quote(str(archive_of(to)))} is there already.", "Give another name.")


def sort_of(run: Run, *, merged: bool) -> str:
    """Which of SORTS an export of this run is."""
    return MODEL_CONFIG if merged else adapters.files(run.path / "adapter")[0]


def export_adapter(run: Run, to: Path) -> list[Path]:
    """Copy the adapter, with a model card, into `to`. Raises E_NO_ADAPTER."""
    if not run.has_adapter:
        raise StudioError("E_NO_ADAPTER", f"{quote(run.name)} has not saved an adapter yet.", "Wait for an evaluation.")
    with _staged(to) as (stage, files):
        for name in adapters.files(run.path / "adapter"):
            shutil.copyfile(run.path / "adapter" / name, stage / name)
        (stage / "README.md").write_text(model_card(run), encoding="utf-8")
    return files


def export_merged(
    run: Run, lora: LoRA, name: str, tokenizer: Any, to: Path, *, dtype: str, rows: Sequence[Sequence[int]] = ()
) -> tuple[list[Path], Rounding]:
    """Write a plain transformers folder with the adapter folded in, and measure what that changed.

    The sum is made in float32 and rounded once, to `dtype`. rows: token ids on which the logits are compared.
    Raises E_MERGE for methods that are no change of weights, and E_NOT_FINITE when `dtype` cannot hold the model.
    """
    model, kind = lora.model, getattr(torch, dtype)
    layers = rounding(lora, name, kind)
    with torch.inference_mode(), lora.use(name):
        wanted = [model(input_ids=_row(ids, model)).logits.float().cpu() for ids in rows]
    with _staged(to) as (stage, files):
        _save_model(lora, name, stage, dtype, run.labels)
        tokenizer.save_pretrained(stage)
        found = _measured(type(model), stage, model, rows, wanted)
        if not all(math.isfinite(value) for value in (*layers.values(), *found)):
            message = f"The merged model does not fit into {dtype}: some of its values are not finite."
            raise StudioError("E_NOT_FINITE", message, "Choose bfloat16 or float32.")
        largest, mean = found
        computed_in = _name(next(model.parameters()).dtype)
        done = Rounding(dtype=dtype, layers=layers, computed_in=computed_in, rows=len(rows), largest=largest, mean=mean)
        (stage / "README.md").write_text(model_card(run, done.sentence), encoding="utf-8")
    for stale in {*to.glob("model*.safetensors*")} - {*files}:  # of an export in other shards, loaded before the new
        stale.unlink()
    return files, done


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


def _measured(
    kind: type, folder: Path, model: Any, rows: Sequence[Sequence[int]], wanted: Sequence[torch.Tensor]
) -> tuple[float, float]:
    """Largest and mean difference of the logits of the model in `folder` to those `wanted`, row by row."""
    if not rows:
        return 0.0, 0.0
    first = next(model.parameters())
    again: Any = kind
    again = again.from_pretrained(
        folder,
        dtype=first.dtype,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        attn_implementation=_attention(model),
    )
    again = again.to(first.device).eval()
    with torch.inference_mode():
        apart = [
            (again(input_ids=_row(ids, again)).logits.float().cpu() - logits).abs()
            for ids, logits in zip(rows, wanted, strict=True)
        ]
    together = torch.cat([one.flatten() for one in apart])
    return float(together.max()), float(together.mean())


def export_smaller(run: Run, lora: LoRA, rank: int, to: Path) -> list[Path]:
    """Write the run's adapter, which `lora` has under its id, cut to `rank`. Raises E_RANK, E_NOT_LORA."""
    with _staged(to) as (stage, files):
        smaller(lora, run.id, rank, stage, _base(run))
        (stage / "README.md").write_text(smaller_card(run, rank), encoding="utf-8")
    return files


def export_combined(
    runs: Sequence[Run], weights: Sequence[float], lora: LoRA, to: Path, *, rank: int | None
) -> list[Path]:
    """Write one adapter that is the weighted sum of those that `lora` has under the runs' ids. Raises E_COMBINE."""
    factors = combine(lora, {run.id: weight for run, weight in zip(runs, weights, strict=True)}, rank)
    widest = max(len(one.A) for one in factors)
    targets = tuple(dict.fromkeys(one.role or one.layer for one in factors))
    spec = LoraSpec(rank=widest, alpha=float(widest), targets=targets)
    lora.load_state("combined", spec, factors)
    try:
        with _staged(to) as (stage, files):
            adapters.save(lora, "combined", stage, _base(runs[0]))
            (stage / "README.md").write_text(combined_card(runs, weights, rank), encoding="utf-8")
    finally:
        lora.remove("combined")
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
    config = run.config
    portable, why = (True, "") if stored else adapters.portable(run.path / "adapter")
    lines = [
        f"# {_plain(run.name)}",
        f"{_what(config.method, merged=bool(stored))} `{config.model}` (revision "
        f"`{run.facts.get('revision', 'unknown')}`), {_settings(config.method)}.",
        _origin(run),
        f"It chooses one of {len(run.labels)} labels: {', '.join(map(_plain, run.labels))}." if run.labels else "",
        stored,
        "" if portable else _opens(config.method, why),
        _table(run.summary),
        "Repeat it with:",
        f"```\n{command_line(run)}\n```",
    ]
    peft = isinstance(config.method, LoraSpec)
    return _card(lines, library="transformers" if stored else "peft" if peft else None, base=run.facts.get("repo"))


def _origin(run: Run) -> str:
    """What a run was trained on, or where its adapter comes from."""
    if run.brought:
        named = _plain(run.facts["origin"]["base_model"])
        return f"Made elsewhere, for a base that its files call `{named}`; nothing is known here of its training."
    data = run.config.dataset
    return f"Trained for {run.step} steps on `{_plain(data.name)}` (fingerprint `{data.id}`)."


def smaller_card(run: Run, rank: int) -> str:
    """README.md of a run's adapter that was cut to a lower rank."""
    config, table = run.config, _table(run.summary)
    strongest = "strongest direction" if rank == 1 else f"{rank} strongest directions"
    lines = [
        f"# {_plain(run.name)}, rank {rank}",
        f"A LoRA adapter for `{config.model}` (revision `{run.facts.get('revision', 'unknown')}`): the {strongest} of"
        f" each matrix of run `{run.id}`, which was trained with {_settings(config.method)}.",
        f"The figures of the whole adapter, not of this one:\n\n{table}" if table else "",
        "Repeat the run with:",
        f"```\n{command_line(run)}\n```",
    ]
    return _card(lines, library="peft", base=run.facts.get("repo"))


def combined_card(runs: Sequence[Run], weights: Sequence[float], rank: int | None) -> str:
    """README.md of a combination of several runs' adapters."""
    how = f"cut to its best approximation of rank {rank}" if rank else "exact, as wide as they are together"
    parts = [f"- {weight:g} × {_plain(run.name)} (run `{run.id}`)" for run, weight in zip(runs, weights, strict=True)]
    lines = [
        "# Combined adapter",
        f"A LoRA adapter for `{runs[0].config.model}`: the weighted sum of {len(runs)} others, {how}.",
        "\n".join(parts),
    ]
    return _card(lines, library="peft", base=runs[0].facts.get("repo"))


def _card(lines: Sequence[str], *, library: str | None, base: str | None) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    about = ModelCardData(library_name=library, tags=["lora", TAG], base_model=base)
    return str(ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(line for line in lines if line) + "\n"))


def _what(method: Method, *, merged: bool) -> str:
    name = "LoRA" if isinstance(method, LoraSpec) else BASELINES[method.kind][0]
    if merged:
        return f"A merged model, which needs no adapter: {name}, folded into"
    return "A LoRA adapter for" if isinstance(method, LoraSpec) else f"What the method “{name}” trained for"


def _settings(method: Method) -> str:
    if isinstance(method, BaselineSpec):
        return width_in_words(method) or "which has no settings of its own"
    others = [f"{name} {_word(getattr(method, name))}" for name in ("rank_pattern", "alpha_pattern", "layers")]
    others = [other.replace("_", " ") for other in others if not other.endswith(" ")]
    said = f"{method.variant}, rank {method.rank}, alpha {method.alpha:g}, on {', '.join(method.targets)}"
    return ", ".join([said, *others])


def _opens(method: Method, why: str) -> str:
    """Where an adapter that is not portable opens."""
    if isinstance(method, BaselineSpec):
        return f"It opens in LoRA Studio only: {why}"
    return f"It opens in PEFT and here; vLLM does not take it: {why}"


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


def _base(run: Run) -> str:
    """The name under which others find the base model."""
    return run.facts.get("repo") or run.config.model


def _row(ids: Sequence[int], model: Any) -> torch.Tensor:
    return torch.tensor([list(ids)], device=next(model.parameters()).device)


def _attention(model: Any) -> str:
    """As the model itself was loaded; a folder's config could otherwise ask for something else."""
    return getattr(model.config, "_attn_implementation", None) or "eager"


def _plain(text: str) -> str:
    """User text inside the card: one line, no markup."""
    return "".join(sign if sign.isalnum() or sign in " ._-," else " " for sign in text).strip() or "adapter"
