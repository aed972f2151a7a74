"""What a model's folder may hold, looked at before any library builds or loads something from it.

config.json is read here first: it must describe a model of a sane size whose code is transformers' own. Weights are
safetensors files, whose headers alone are read. Neither torch nor transformers is imported, nothing is allocated that
a file merely claims. This module does not know architectures; which of them are known is in core.layout.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_studio.errors import StudioError, quote

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CONFIG_BYTES = 2**20
INDEX_BYTES = 64 * 2**20
DEPTH = 16
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
HINT = "The model's files were damaged or made by hand; fetch it again, or choose another."

# What a size of a config may be, by the names that it goes by; the code is for one above it.
_LAYERS = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"
_HEADS = (
    "num_attention_heads n_head n_heads num_heads num_key_value_heads num_kv_heads n_head_kv encoder_attention_heads"
)
_WIDTHS = "hidden_size n_embd d_model embedding_size word_embed_proj_dim head_dim rotary_dim d_kv"
_INNER = "intermediate_size n_inner ffn_dim d_ff ffn_hidden_size moe_intermediate_size encoder_ffn_dim"
_POSITIONS = "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length"
BOUNDS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(_LAYERS.split(), (512, "E_CONFIG")),
    **dict.fromkeys(_HEADS.split(), (1024, "E_CONFIG")),
    **dict.fromkeys(_WIDTHS.split(), (65_536, "E_TOO_LARGE")),
    **dict.fromkeys(_INNER.split(), (1_048_576, "E_TOO_LARGE")),
    **dict.fromkeys(_POSITIONS.split(), (2**25, "E_TOO_LARGE")),
    "num_labels": (1000, "E_CONFIG"),  # transformers gives each a name
    "vocab_size": (2_000_000, "E_TOO_LARGE"),
    "type_vocab_size": (65_536, "E_TOO_LARGE"),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (1024, "E_CONFIG")),
}
MAY_BE_ZERO = ("type_vocab_size", "rotary_dim", "num_experts", "num_local_experts", "n_routed_experts", "n_inner")
MAY_BE_ZERO += ("num_labels",)
LARGEST = 2**31  # whole number that has no bound of its own
ENTRIES = 1024  # of one list or object
UNBOUNDED = ("time_step_limit",)  # the one setting that is rightly infinite
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked. Raises E_MODEL_FILES, E_CONFIG, E_TOO_LARGE, E_REMOTE_CODE, E_QUANTISED."""
    path = folder / CONFIG
    if not path.is_file():
        raise StudioError("E_MODEL_FILES", "There is no config.json.", "It is not a transformers model.")
    config = _read_json(path, CONFIG_BYTES, "E_CONFIG")
    _check_values(config, DEPTH)
    for name, value in _settings(config):
        _check_size(name, value)
        _check_pattern(name, value)
        _check_code(name, value)
    if config.get("quantization_config") or config.get("compression_config"):
        message = "The model's weights are quantised; LoRA Studio packs a model itself and reads only plain ones."
        raise StudioError("E_QUANTISED", message, "Choose the model that it was made from.")
    return config


def wants_own_code(config: Mapping[str, Any]) -> bool:
    """Whether the model brings code. It never runs; a known architecture does without it."""
    return bool(config.get("auto_map"))


def check_weights(folder: Path) -> list[Path]:
    """The safetensors files of a model, each with a sound header. Raises E_PICKLE, E_MODEL_FILES, E_SAFETENSORS."""
    from safetensors import SafetensorError, safe_open

    files = weight_files(folder)
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            message = f"The weights are in {quote(pickles[0])}, which may run code when it is opened."
            hint = "Pickle files are not loaded; choose a model with safetensors, or convert it where you trust it."
            raise StudioError("E_PICKLE", message, hint)
        raise StudioError("E_MODEL_FILES", "There are no safetensors weights.", HINT)
    for path in files:
        if not path.is_file():
            raise StudioError("E_MODEL_FILES", f"The weight file {quote(path.name)} is missing.", "Fetch it again.")
        try:
            with safe_open(path, framework="np") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            message = f"{quote(path.name)} is damaged: {quote(str(error))}."
            raise StudioError("E_SAFETENSORS", message, "Fetch it again.") from error
    return files


def weight_files(folder: Path) -> list[Path]:
    """The files that should hold the weights; none where there is no word of them. Raises E_SAFETENSORS."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    shards = _read_json(folder / INDEX, INDEX_BYTES, "E_SAFETENSORS").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise StudioError("E_SAFETENSORS", f"{INDEX} names no files.", HINT)
    names = {str(name) for name in shards.values()}
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name or "\\" in name:
            raise StudioError("E_SAFETENSORS", f"{INDEX} names {quote(name)}, which is no weight file beside it.", HINT)
    return [folder / name for name in sorted(names)]


def _read_json(path: Path, most: int, code: str) -> dict[str, Any]:
    size = path.stat().st_size
    if size > most:
        raise StudioError(code, f"{path.name} has {size:,} bytes; at most {most:,} are read.", HINT)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StudioError(code, f"{path.name} is not JSON: {quote(str(error))}.", HINT) from None
    if not isinstance(found, dict):
        raise StudioError(code, f"{path.name} is {type(found).__name__}, not an object.", HINT)
    return found


def _check_values(value: Any, depth: int, name: str = "config.json") -> None:
    """Every number finite and no larger, every list no longer, and nothing deeper than in any config that is real."""
    if isinstance(value, float) and not math.isfinite(value) and name not in UNBOUNDED:
        raise StudioError("E_CONFIG", f"{quote(name)} in config.json is {value}.", HINT)
    if isinstance(value, int) and abs(value) > LARGEST and name not in BOUNDS:
        raise StudioError("E_CONFIG", f"{quote(name)} in config.json is a number of {_digits(value)} digits.", HINT)
    if not isinstance(value, (dict, list)):
        return
    if len(value) > ENTRIES:
        message = f"{quote(name)} in config.json has {len(value):,} entries; at most {ENTRIES:,} are read."
        raise StudioError("E_CONFIG", message, HINT)
    if depth == 0:
        raise StudioError("E_CONFIG", "config.json is nested too deeply.", HINT)
    for key, part in value.items() if isinstance(value, dict) else ((name, part) for part in value):
        _check_values(part, depth - 1, str(key))


def _digits(number: int) -> int:
    return len(str(abs(number)))


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting by its name, those of inner configs too."""
    for name, value in config.items():
        yield name, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _settings(inner)


def _check_size(name: str, value: Any) -> None:
    if name not in BOUNDS or value is None:
        return
    most, code = BOUNDS[name]
    least = 0 if name in MAY_BE_ZERO else 1
    values = value if isinstance(value, list) else [value]  # some name a size per layer
    for one in values:
        if type(one) is not int or one < least:
            raise StudioError("E_CONFIG", f"{name} in config.json is {quote(one)}; expected a whole number.", HINT)
        if one > most:
            raise StudioError(code, f"{name} in config.json is {one:,}; at most {most:,} is built.", HINT)


def _check_pattern(name: str, value: Any) -> None:
    """E_CONFIG for kinds of layers with how often each comes ([[kinds, times], ...]), where that makes too many."""
    if name != "attention_types" or not isinstance(value, list):
        return
    most, layers = BOUNDS["num_layers"][0], 0
    for part in value:
        whole = isinstance(part, list) and len(part) == 2 and isinstance(part[0], list) and type(part[1]) is int
        if not whole or part[1] < 0:
            message = f"{name} in config.json is {quote(part)}; expected kinds of layers and a number."
            raise StudioError("E_CONFIG", message, HINT)
        layers += max(1, len(part[0])) * part[1]
    if layers > most:
        message = f"{name} in config.json is for {layers:,} layers; at most {most:,} are built."
        raise StudioError("E_CONFIG", message, HINT)


def _check_code(name: str, value: Any) -> None:
    """E_REMOTE_CODE for settings with which a model would fetch a kernel from the Hub."""
    wanted = list(value.values()) if isinstance(value, dict) else [value]
    attention = name.lstrip("_").startswith("attn_implementation") and any(
        one is not None and one not in ATTENTIONS for one in wanted
    )
    foreign = name.lstrip("_").endswith("implementation") and any("/" in str(one) for one in wanted)
    kernels = name in ("use_kernels", "kernel_config", "hub_kernels") and bool(value)
    if attention or foreign or kernels:
        message = f"{quote(name)} in config.json asks for {quote(value)}: code from elsewhere."
        raise StudioError("E_REMOTE_CODE", message, "Such models are not loaded; choose another.")
