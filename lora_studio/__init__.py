"""LoRA Studio: fine-tune a language model with LoRA, watch it learn, compare it with its base."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_PUBLIC = {"Studio": "lora_studio.studio", "LoRA": "lora_studio.core.lora", "LoraSpec": "lora_studio.core.spec"}
__all__ = ["LoRA", "LoraSpec", "Studio"]  # made on first use, so that importing the package costs nothing


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(name)
