"""An adapter made elsewhere becomes a run: two files of PEFT's layout come in, and a folder of our own stays.

Everything is read and checked on the base that the person chose before anything is stored; what is stored is written
anew from the tensors that were checked. The base that the files name is kept as text and never looked for.
"""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_studio import peft_format
from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError, quote
from lora_studio.fields import check
from lora_studio.limits import Limits
from lora_studio.runs.config import DataChoice, RunConfig, check_limits, short
from lora_studio.settings import TrainConfig

FILES = (peft_format.CONFIG, peft_format.WEIGHTS)
NAMED_CHARACTERS = 200  # of the base that an adapter names


def take(folder: Path, to: Path, limits: Limits) -> dict[str, str]:
    """Copy the two files, and no other, to the new folder `to`; what they say of where they come from.

    Raises E_PICKLE, E_ADAPTER_FILES, E_PEFT_VARIANT, E_RANK and E_TOO_LARGE.
    """
    config = peft_format.read_config(folder)
    _check_size(folder / peft_format.WEIGHTS, limits)
    to.mkdir(parents=True)
    for name in FILES:
        shutil.copyfile(folder / name, to / name)
    kind = config.get("task_type")
    if kind not in (None, "CAUSAL_LM"):
        message = f"This adapter is for the task {quote(kind, 40)}; one that writes text has CAUSAL_LM."
        raise StudioError("E_PEFT_VARIANT", message, "Its labels are not in the file, so it cannot be used here.")
    with (to / peft_format.WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"base_model": str(config.get("base_model_name_or_path") or "")[:NAMED_CHARACTERS], "sha256": digest}


def draft(model: str, name: str, template: Any) -> RunConfig:
    """The config of a run whose adapter is still to be read: no rows, no steps.

    template: of the model's chat, or None. It decides how a prompt reaches the model, since no rows say it.
    """
    rows = DataChoice(id="", format="prompt_completion" if template else "text")
    return check(RunConfig(name=name, model=model, dataset=rows, train=TrainConfig(steps=0)))


def settled(config: RunConfig, spec: LoraSpec, limits: Limits) -> RunConfig:
    """The config with what was read. Raises E_CONFIG and E_LIMIT for what nobody could have trained here."""
    found = replace(config, method=check(spec), name=config.name or f"{short(spec)}, brought along")
    check_limits(found, limits)
    return found


def _check_size(weights: Path, limits: Limits) -> None:
    """Raise E_TOO_LARGE for a file that is larger than any adapter, or than what one may bring."""
    peft_format.check_size(weights)
    size = weights.stat().st_size
    if size > limits.file_bytes:
        message = f"{weights.name} has {size / 2**20:,.0f} MB; at most {limits.file_bytes / 2**20:,.0f} are taken."
        raise StudioError("E_TOO_LARGE", message, "Cut its rank, or run LoRA Studio on a machine of your own.")
