"""Model folders: damaged, too large, of no known kind, or with code in them."""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from lora_studio.core.baselines import plan
from lora_studio.core.spec import LoraSpec
from lora_studio.data.batches import encode_all
from lora_studio.limits import SPACE
from lora_studio.models import ModelLibrary
from tests.bad.bench import Bench, bad, every, examples
from tests.tiny import tokenizer

every(
    "M01",
    "E_MODEL_ID",
    {repr(name): lambda b, name=name: b.load(name) for name in ("startr", "../../etc", "a/b/c", "-rf")},
)


def on_the_hub(bench: Bench, said: Any) -> Any:
    """Fetch a model from a Hub that answers so, or raises it."""

    def answer(*_: Any, **__: Any) -> Any:
        if isinstance(said, Exception):
            raise said
        return said

    bench.patch.setattr(huggingface_hub.HfApi, "model_info", answer)
    return ModelLibrary(bench.folder).fetch("some/model")


REFUSAL = {"response": httpx.Response(403, request=httpx.Request("GET", "http://hub/some/model"))}
LARGE = SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors", size=2**60)])
bad("M01", "an id that does not exist", "E_MODEL_NOT_FOUND")(
    lambda b: on_the_hub(b, errors.RepositoryNotFoundError("no such model", **REFUSAL))
)
bad("M02", "a gated model", "E_GATED")(lambda b: on_the_hub(b, errors.GatedRepoError("gated", **REFUSAL)))
bad("M03", "no network", "E_OFFLINE")(lambda b: on_the_hub(b, OSError("Network is unreachable")))
bad("M25", "larger than the disk", "E_DISK")(lambda b: on_the_hub(b, LARGE))
bad("M04", "no config.json", "E_MODEL_ID")(lambda b: (os.remove(b.model() / "config.json"), b.load(b.folder / "model")))


def with_config(bench: Bench, content: bytes) -> Any:
    folder = bench.model()
    (folder / "config.json").write_bytes(content)
    return bench.load(folder)


every(
    "M04",
    "E_CONFIG",
    {
        "a web page": lambda b: with_config(b, b"<!doctype html><title>Sign in</title>"),
        "100,000 lists": lambda b: with_config(b, b"[" * 100_000),
        "100 objects": lambda b: with_config(b, b'{"a":' * 100 + b"1" + b"}" * 100),
        "a list": lambda b: with_config(b, b"[]"),
        "not UTF-8": lambda b: with_config(b, b'{"a":"\xff"}'),
        "2 MB": lambda b: with_config(b, b'{"a":"' + b"x" * 2**21 + b'"}'),
    },
)
every(
    "M05",
    "E_ARCH",
    {
        "an unknown type": lambda b: b.load(b.model(model_type="nothing")),
        "none": lambda b: b.load(b.model(model_type=None)),
    },
)
every(
    "M06",
    "E_ARCH",
    {
        kind: lambda b, kind=kind: with_config(b, json.dumps({"model_type": kind}).encode())
        for kind in ("t5", "clip", "whisper", "bert")
    },
)
bad("M06", "a type that is not in the table, on a Space", "E_ARCH")(
    lambda b: ModelLibrary(b.folder, replace(SPACE, local_paths=True)).skeleton(str(b.model(model_type="mamba")))
)
OWN_CODE = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}


def canary(bench: Bench, **config: Any) -> Path:
    """A model that brings code, which would leave a mark."""
    folder = bench.model(**config)
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    return folder


@bad("M07", "code of its own", "E_REMOTE_CODE")
def own_code(bench: Bench) -> None:
    folder = canary(bench, model_type="foreign", **OWN_CODE)
    try:
        bench.load(folder)
    finally:
        assert not (folder / "ran").exists()


@bad("M07", "code beside a known architecture", "ok")
def own_code_unused(bench: Bench) -> None:
    folder = canary(bench, **OWN_CODE)
    assert type(bench.load(folder)).__module__.startswith("transformers.") and not (folder / "ran").exists()


@bad("M07", "code of its tokenizer", "E_TOKENIZER")
def own_tokenizer(bench: Bench) -> None:
    canary(bench)
    own = {"auto_map": {"AutoTokenizer": ["own.Words", "own.Words"]}, "tokenizer_class": "Words"}
    (bench.folder / "model" / "tokenizer.json").unlink()
    tokens(bench, **own)


every(
    "M08",
    "E_REMOTE_CODE",
    {
        f"{name}: {value}": lambda b, name=name, value=value: b.load(b.model(**{name: value}))
        for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
        for value in ("someone/kernel", "someone/kernel:fn", {"": "someone/kernel"})
    },
)
bad("M08", "of an inner config", "E_REMOTE_CODE")(
    lambda b: b.load(b.model(text_config={"_attn_implementation": "someone/kernel"}))
)
every(
    "M09",
    "E_CONFIG",
    {
        str(wrong): lambda b, wrong=wrong: b.load(b.model(**wrong))
        for wrong in (
            {"hidden_size": -1},
            {"hidden_size": "32"},
            {"hidden_size": 32.5},
            {"num_attention_heads": 0},
            {"num_attention_heads": 7},
            {"vocab_size": True},
            {"num_hidden_layers": [0]},
        )
    },
)
every(
    "M10",
    "E_TOO_LARGE",
    {
        str(wrong): lambda b, wrong=wrong: b.load(b.model(**wrong))
        for wrong in (
            {"vocab_size": 10**12, "hidden_size": 10**6},
            {"hidden_size": 2**20},
            {"intermediate_size": 2**30},
        )
    },
)
bad("M10", "more parameters than are trained here", "E_TOO_LARGE")(
    lambda b: b.load(
        b.model(hidden_size=8192, intermediate_size=65_536, head_dim=2048), replace(SPACE, local_paths=True)
    )
)
every(
    "M11",
    "E_CONFIG",
    {
        "20,000 layers": lambda b: b.load(b.model(num_hidden_layers=20_000)),
        "10**30 layers": lambda b: b.load(b.model(num_hidden_layers=10**30)),
    },
)
every(
    "M11",
    "E_CONFIG",
    {
        name: lambda b, wrong=wrong: b.load(b.model(**wrong))
        for name, wrong in {
            "3,000,000 labels": {"num_labels": 3_000_000},
            "a label too many": {"num_labels": 1001},
            "names for 2,000 labels": {"id2label": dict.fromkeys(map(str, range(2000)), "x")},
            "numbers for 2,000 labels": {"label2id": {f"x{number}": number for number in range(2000)}},
            "10**9 layers in a pattern": {
                "model_type": "gpt_neo",
                "attention_types": [[["global", "local"], 10**9]],
                "num_layers": 2,
            },
            "a pattern of patterns": {"model_type": "gpt_neo", "attention_types": [[["global"] * 300, 3]]},
            "a pattern of no number": {"model_type": "gpt_neo", "attention_types": [[["global"], "9" * 9]]},
            "the same inside": {"text_config": {"num_labels": 10**6}},
            "a list of 5,000": {"layer_types": ["full_attention"] * 5000},
            "a list inside a list": {"anything": [{"long_factor": [1.0] * 5000}]},
            "a number of 11 digits": {"anything": 10**10},
        }.items()
    },
)
every(
    "M12",
    "E_CONFIG",
    {
        name: lambda b, name=name, value=value: b.load(b.model(**{name: value}))
        for name, value in (
            ("rms_norm_eps", float("nan")),
            ("rope_theta", float("inf")),
            ("initializer_range", -float("inf")),
        )
    },
)


def renamed(bench: Bench, to: str) -> Path:
    folder = bench.model()
    (folder / "model.safetensors").rename(folder / to)
    return folder


every(
    "M13",
    "E_PICKLE",
    {name: lambda b, name=name: b.load(renamed(b, name)) for name in ("pytorch_model.bin", "model.pt", "x.ckpt")},
)
bad("M13", "no weights at all", "E_MODEL_FILES")(lambda b: b.load(renamed(b, "notes.txt")))


def indexed(bench: Bench, *names: str, content: str = "") -> Any:
    folder = renamed(bench, "model-00001-of-00002.safetensors")
    index = {"weight_map": {f"tensor {number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(content or json.dumps(index))
    return bench.load(folder)


bad("M14", "a part missing", "E_MODEL_FILES")(
    lambda b: indexed(b, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
)
every(
    "M14",
    "E_SAFETENSORS",
    {
        repr(name): lambda b, name=name: indexed(b, name)
        for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "pytorch_model.bin", "..\\x.safetensors")
    }
    | {"no index": lambda b: indexed(b, content="[1]"), "an empty one": lambda b: indexed(b, content="{}")},
)


def with_weights(bench: Bench, content: bytes) -> Any:
    folder = bench.model()
    (folder / "model.safetensors").write_bytes(content)
    return bench.load(folder)


def header(about: dict[str, Any] | str, data: bytes = b"") -> bytes:
    text = (about if isinstance(about, str) else json.dumps(about)).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, end: int, shape: Sequence[int] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


every(
    "M15",
    "E_SAFETENSORS",
    {
        name: lambda b, content=content: with_weights(b, content)
        for name, content in {
            "empty": b"",
            "seven bytes": b"\1" * 7,
            "a header of 2^40": struct.pack("<Q", 2**40) + b"{}",
            "a header beyond its end": struct.pack("<Q", 500) + b"{}",
            "a header that is no JSON": header("<html>"),
            "a deep header": header("[" * 100_000),
            "tensors that overlap": header({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
            "a hole": header({"a": tensor(0, 8), "b": tensor(16, 24)}, bytes(24)),
            "cut off": header({"a": tensor(0, 8)}, bytes(4)),
            "an unknown type": header({"a": tensor(0, 8, dtype="F7")}, bytes(8)),
            "a shape of another size": header({"a": tensor(0, 8, (3,))}, bytes(8)),
            "negative": header({"a": tensor(0, 8, (-2,))}, bytes(8)),
            "a product beyond 64 bits": header({"a": tensor(0, 8, (2**40, 2**40))}, bytes(8)),
        }.items()
    },
)
every(
    "M16",
    "E_SHAPE",
    {
        "another width in the config": lambda b: b.load(b.model(hidden_size=64)),
        "a tensor missing": lambda b: b.load(b.tensors(lambda found: found.pop("model.layers.1.mlp.up_proj.weight"))),
        "a tensor of another shape": lambda b: b.load(
            b.tensors(lambda found: found.update({"model.norm.weight": torch.ones(31)}))
        ),
        "more layers in the config": lambda b: b.load(b.model(num_hidden_layers=3)),
    },
)


def tokens(bench: Bench, **changes: Any) -> Any:
    """The tokenizer of the tiny model with other settings, as the app loads it."""
    folder = bench.folder / "model"
    if not folder.exists():
        bench.model()
    about = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    kept = {key: one for key, one in about.items() if one is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return ModelLibrary(bench.folder, guarded=True).tokenizer(str(folder))


bad("M17", "no padding token", "ok")(lambda b: encode_all(tokens(b, pad_token=None), examples(("a", "b")), 64))


@bad("M18", "padding that is the end of text", "ok")
def padding_is_the_end(bench: Bench) -> None:
    encoded = encode_all(tokens(bench, pad_token="<|end|>"), examples(("a", "b")), 64)[0].tokens
    assert encoded.supervised[-1]  # the end is learnt all the same


def without_tokenizer(bench: Bench, content: str | None = None) -> Any:
    folder = bench.model()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
        (folder / "tokenizer_config.json").write_text("{}")
    return ModelLibrary(bench.folder, guarded=True).tokenizer(str(folder))


every(
    "M19",
    "E_TOKENIZER",
    {
        "none": without_tokenizer,
        "a web page": lambda b: without_tokenizer(b, "<html>"),
        "a deep one": lambda b: without_tokenizer(b, "[" * 100_000),
        "of no model": lambda b: without_tokenizer(b, '{"version": "1.0"}'),
        "more words than the model has": lambda b: (b.model(vocab_size=100), tokens(b)),
    },
)


def with_decoder(bench: Bench, *decoders: dict[str, Any]) -> Any:
    about = json.loads((bench.tiny / "tokenizer.json").read_text())
    about["decoder"] = {"type": "Sequence", "decoders": [*decoders, {"type": "Fuse"}]}
    return without_tokenizer(bench, json.dumps(about))


SPACES = {"type": "Strip", "content": "a", "start": 2, "stop": 2}
every(
    "M19",
    "E_TOKENIZER",
    {
        "an expression in its decoder": lambda b: with_decoder(
            b, {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
        ),
        "the same one deeper": lambda b: with_decoder(
            b, {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}]}
        ),
        "a decoder that doubles 60 times": lambda b: with_decoder(
            b, *[{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 60
        ),
        "a decoder that gives up": lambda b: (
            (words := with_decoder(b, SPACES)).decode([words.own.convert_tokens_to_ids("a")]) or words
        ),
    },
)
bad("M19", "the decoder of a Llama", "ok")(
    lambda b: with_decoder(
        b,
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ).decode([9, 10])
)
bad("M20", "no chat template", "ok")(lambda b: b.template(""))
every(
    "M21",
    "E_TEMPLATE",
    {
        "a mistake": lambda b: b.template("{% for %}"),
        "one that refuses": lambda b: b.template("{{ raise_exception('no') }}"),
        "one that drops what is said": lambda b: b.template("{% for m in messages %}{{ m['role'] }}{% endfor %}"),
        "one that drops the question": lambda b: b.template(
            "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
        ),
        "an endless loop": lambda b: b.template("{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3),
        "a list that grows": lambda b: b.template(
            "{% set ns = namespace(x=[0] * 1000) %}{% for i in range(99999) %}{% set ns.x = ns.x * 10 %}{% endfor %}"
        ),
        "a text that doubles": lambda b: b.template(
            "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
        ),
        "a way to the system": lambda b: b.template(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch ran') }}"
        ),
        "64 KiB": lambda b: b.template("{# " + "x" * 2**17 + " #}" + tokenizer().chat_template),
    },
)
every(
    "M22",
    "E_QUANTISED",
    {
        method: lambda b, method=method: b.load(b.model(quantization_config={"quant_method": method, "bits": 4}))
        for method in ("gptq", "awq", "bitsandbytes", "fp8")
    },
)


@bad("M23", "tied embeddings", "ok")
def tied(bench: Bench) -> None:
    folder = bench.model(tie_word_embeddings=True)
    found = load_file(folder / "model.safetensors")
    found.pop("lm_head.weight", None)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    model = bench.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert plan(model, LoraSpec(rank=2))


every(
    "M24",
    "E_NOT_FINITE",
    {
        str(value): lambda b, value=value: b.load(
            b.tensors(lambda found: found["model.layers.0.mlp.up_proj.weight"].fill_(value))
        )
        for value in (float("nan"), float("inf"))
    },
)
bad("M01", "a folder of this machine, on a Space", "E_PATH")(lambda b: b.load(b.tiny, SPACE))
