"""The adapter folder of a run: PEFT's layout for LoRA, a layout of our own for the paper's other methods.

The other methods have no common format elsewhere. Their folder holds `lora_studio.json` (the method) and the trained
tensors, fp32, by layer and parameter name; only this project reads it.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_studio import peft_format
from lora_studio.core.baselines import build
from lora_studio.core.lora import LoRA, Parts, check_finite
from lora_studio.core.spec import BaselineSpec, LoraSpec, Method
from lora_studio.errors import StudioError, quote
from lora_studio.fields import build as build_config

METHOD = "lora_studio.json"
WEIGHTS = peft_format.WEIGHTS


def save(lora: LoRA, name: str, folder: Path, base_model: str) -> None:
    """Write one adapter of any method; `base_model` is the name a loader should look for."""
    spec = lora.specs[name]
    if isinstance(spec, LoraSpec):
        peft_format.save(lora, name, folder, base_model)
        return
    folder.mkdir(parents=True, exist_ok=True)
    parts: Parts = {}
    for layer, part in lora.parts(name):
        parts.setdefault(layer, []).append(part)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _tensors(parts).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    written = load_file(folder / WEIGHTS)
    assert written.keys() == tensors.keys() and all(torch.equal(written[key], tensors[key]) for key in tensors)
    about = {"base_model": base_model, "method": asdict(spec)}
    (folder / METHOD).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def load(lora: LoRA, folder: Path, name: str) -> Method:
    """Attach the adapter in `folder`. Raises E_METHOD, E_CONFIG and the codes of peft_format.load."""
    if not (folder / METHOD).is_file():
        return peft_format.load(lora, folder, name)
    try:
        peft_format.check_size(folder / WEIGHTS)
        spec = build_config(BaselineSpec, json.loads((folder / METHOD).read_bytes())["method"])
        saved = load_file(folder / WEIGHTS)
    except (ValueError, KeyError, TypeError, RecursionError, OSError, SafetensorError) as error:
        message = f"{METHOD} or {WEIGHTS} is missing or damaged: {quote(str(error))}."
        raise StudioError("E_ADAPTER_FILES", message, "Copy the adapter again.") from error
    parts = build(lora.model, spec)
    wanted = _tensors(parts)
    for key in sorted(wanted.keys() ^ saved.keys()):
        message = f"The adapter and this model do not agree on {quote(key)}."
        raise StudioError("E_KEYS", message, "Load its own base.")
    for key, tensor in wanted.items():
        if tensor.shape != saved[key].shape:
            message = f"{key} is {tuple(saved[key].shape)} in the adapter and {tuple(tensor.shape)} in this model."
            raise StudioError("E_SHAPE", message, "This adapter was made for another base model.")
        check_finite(key, saved[key])
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(saved[key])
    lora.attach(name, spec, parts)
    return spec


def files(folder: Path) -> tuple[str, ...]:
    """The names of the files that make up the adapter in `folder`."""
    return (METHOD, WEIGHTS) if (folder / METHOD).is_file() else (peft_format.CONFIG, WEIGHTS)


def portable(folder: Path) -> tuple[bool, str]:
    """Whether other programs, vLLM included, take the adapter in `folder` too, and why or why not."""
    if (folder / METHOD).is_file():
        return False, "Only LoRA has a format that other programs read."
    return peft_format.portable(folder)


def plain(folder: Path) -> bool:
    """Whether the adapter is B A, alpha / rank times, with one alpha and one rank for all, and no more.

    That is what llama.cpp and Ollama compute. They read neither patterns nor another scale, and have no words for a
    magnitude or for modules that are saved whole.
    """
    if (folder / METHOD).is_file():
        return False
    config = peft_format.read_config(folder)
    odd = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
    return not any(config.get(name) for name in odd)


def _tensors(parts: Parts) -> dict[str, Any]:
    """Trainable tensors by layer and name; one that is tied stands under the first of its names."""
    found: dict[torch.nn.Parameter, str] = {}
    for layer, ones in parts.items():
        for part in ones:
            for name, tensor in part.named_parameters():
                found.setdefault(tensor, ".".join(filter(None, [layer, name.removeprefix("tensors.")])))
    return {key: tensor for tensor, key in found.items()}
