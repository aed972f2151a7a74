"""What leaves the studio: adapter folder, merged model, archive, model card, and the line that repeats the run."""

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_studio.core.lora import LoRA
from lora_studio.core.merge import merged_state
from lora_studio.data.library import SAMPLES
from lora_studio.errors import StudioError, quote
from lora_studio.peft_format import CONFIG, WEIGHTS
from lora_studio.runs.config import Run


def command_line(run: Run) -> str:
    """The train command that repeats this run; only what differs from the defaults is spelled out."""
    config = run.config
    samples = {sample.title: name for name, sample in SAMPLES.items()}
    data = samples.get(config.dataset.name, config.dataset.id)
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


def export_adapter(run: Run, to: Path) -> list[Path]:
    """Copy the adapter, with a model card, into `to`. Raises E_NO_ADAPTER."""
    if not run.has_adapter:
        raise StudioError("E_NO_ADAPTER", f"{quote(run.name)} has not saved an adapter yet.", "Wait for an evaluation.")
    to.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(run.path / "adapter" / name, to / name)
    (to / "README.md").write_text(model_card(run), encoding="utf-8")
    return [to / name for name in (CONFIG, WEIGHTS, "README.md")]


def export_merged(run: Run, lora: LoRA, name: str, tokenizer: Any, to: Path) -> list[Path]:
    """Write a plain transformers folder with the adapter folded in, in the base's own dtype."""
    to.mkdir(parents=True, exist_ok=True)
    dtype = next(lora.model.parameters()).dtype
    lora.model.save_pretrained(to, state_dict=merged_state(lora, name, dtype))
    tokenizer.save_pretrained(to)
    (to / "README.md").write_text(model_card(run), encoding="utf-8")
    return sorted(path for path in to.iterdir() if path.is_file())


def archive(folder: Path, to: Path) -> Path:
    """Zip the files of `folder` (not the folder itself) as `to`, which ends in .zip."""
    return Path(shutil.make_archive(str(to.with_suffix("")), "zip", folder))


def model_card(run: Run) -> str:
    """README.md of an export: base, method, data and the run's own figures."""
    from huggingface_hub import ModelCard, ModelCardData

    config, figures = run.config, run.summary
    about = ModelCardData(library_name="peft", tags=["lora", "lora-studio"], base_model=run.facts.get("repo"))
    lines = [
        f"# {_plain(run.name)}",
        f"A LoRA adapter for `{config.model}` (revision `{run.facts.get('revision', 'unknown')}`), "
        f"{config.method.variant}, rank {config.method.rank}, alpha {config.method.alpha:g}, "
        f"on {', '.join(config.method.targets)}.",
        f"Trained for {run.step} steps on `{_plain(config.dataset.name)}` (fingerprint `{config.dataset.id}`).",
        _table(figures),
        "Repeat it with:",
        f"```\n{command_line(run)}\n```",
    ]
    return str(ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(line for line in lines if line) + "\n"))


def _table(figures: Mapping[str, Any]) -> str:
    names = {"base_loss": "Held-out loss, base", "best_loss": "Held-out loss, adapted", "best_step": "Best step"}
    rows = [f"| {names[key]} | {figures[key]:.4g} |" for key in names if key in figures]
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else ""


def _plain(text: str) -> str:
    """User text inside the card: one line, no markup."""
    return "".join(sign if sign.isalnum() or sign in " ._-," else " " for sign in text).strip() or "adapter"
