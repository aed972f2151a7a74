"""The memory that a run is forecast to take, against what its process then took.

    python -m benchmarks.training --data pairs.jsonl --forecast             eight settings of LoRA, ten minutes
    python -m benchmarks.training --data pairs.jsonl --forecast methods     its variants and the paper's other methods

Called by `training`. Every setting is a run of the app: planned by Studio, started, trained for a few steps in a worker
of its own and stopped. The models besides the starter get random weights in a temporary folder. The constants of
`lora_studio.estimate` were fitted on other settings than these.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.fresh import measure
from benchmarks.goals import Goal
from benchmarks.paper import machine
from benchmarks.verdict import markdown

STEPS = 60  # of the planned run
TRAINED = 3  # of them, behind the probe of its longest batch
WITHIN = 0.10


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run; model: the command line's, or a name of SHAPES. kind: of another method than LoRA."""

    model: str = ""
    precision: str
    batch: int
    longest: int = 512
    lora: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""

    @property
    def label(self) -> str:
        if self.kind:
            return f"{self.kind}, {self.precision}, batch {self.batch}"
        about = {"rank": 8, "targets": ("attn.q", "attn.v"), **self.lora}
        layers = f", {len(self.lora['layers'])} layers" if "layers" in self.lora else ""
        matrices = "+".join(one.removeprefix("attn.") for one in about["targets"])
        cut = f", at most {self.longest} tokens" if self.longest != 512 else ""
        variant = f"{self.lora['variant']}, " if "variant" in self.lora else ""
        return f"{variant}{self.precision}, batch {self.batch}{cut}, r={about['rank']} {matrices}{layers}"


# kind, configuration; the vocabulary is the command line model's, whose tokenizer they borrow.
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "llama, 70 M": (
        "llama",
        {
            "hidden_size": 512,
            "intermediate_size": 1792,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
    "llama, 300 M": (
        "llama",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 20,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
        },
    ),
    "qwen2, 190 M": (
        "qwen2",
        {
            "hidden_size": 768,
            "intermediate_size": 3584,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
    ),
    "gpt2, 125 M": ("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "llama, 160 M": (
        "llama",
        {
            "hidden_size": 640,
            "intermediate_size": 2304,
            "num_hidden_layers": 18,
            "num_attention_heads": 10,
            "num_key_value_heads": 5,
        },
    ),
    "qwen3, 110 M": (
        "qwen3",
        {
            "hidden_size": 576,
            "intermediate_size": 2048,
            "num_hidden_layers": 14,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
        },
    ),
    "gpt_neox, 130 M": (
        "gpt_neox",
        {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 14, "num_attention_heads": 10},
    ),
    "mistral, 210 M": (
        "mistral",
        {
            "hidden_size": 896,
            "intermediate_size": 3072,
            "num_hidden_layers": 14,
            "num_attention_heads": 14,
            "num_key_value_heads": 7,
        },
    ),
    "gpt2, 90 M": ("gpt2", {"n_embd": 640, "n_layer": 12, "n_head": 10}),
}

FITTED = (  # the settings that the constants of estimate.py were chosen on
    Setting(precision="bfloat16", batch=8),
    Setting(precision="float32", batch=8),
    Setting(precision="bfloat16", batch=4, lora={"targets": ("all-linear",)}),
    Setting(precision="bfloat16", batch=16),
    Setting(precision="float32", batch=3, lora={"rank": 64}),
    Setting(precision="bfloat16", batch=12, longest=160, lora={"rank": 16, "targets": ("all-linear",)}),
    Setting(precision="float32", batch=8, lora={"rank": 4, "layers": tuple(range(20, 30))}),
    Setting(model="llama, 70 M", precision="bfloat16", batch=8),
    Setting(model="llama, 70 M", precision="float32", batch=6),
    Setting(model="llama, 300 M", precision="bfloat16", batch=4, lora={"rank": 16, "targets": ("all-linear",)}),
    Setting(model="qwen2, 190 M", precision="float32", batch=2),
    Setting(model="qwen2, 190 M", precision="bfloat16", batch=10, longest=256, lora={"rank": 2}),
    Setting(model="gpt2, 125 M", precision="bfloat16", batch=8),
    Setting(model="gpt2, 125 M", precision="float32", batch=5, lora={"targets": ("attn.q", "attn.k", "attn.v")}),
)
SETTINGS = (  # others
    Setting(precision="bfloat16", batch=6, lora={"rank": 32, "targets": ("attn.q", "attn.k", "attn.v", "attn.o")}),
    Setting(precision="float32", batch=12, longest=200),
    Setting(precision="bfloat16", batch=24, lora={"rank": 4, "layers": tuple(range(15, 30))}),
    Setting(model="llama, 160 M", precision="bfloat16", batch=10),
    Setting(model="qwen3, 110 M", precision="float32", batch=4, lora={"targets": ("all-linear",)}),
    Setting(model="gpt_neox, 130 M", precision="bfloat16", batch=6),
    Setting(model="mistral, 210 M", precision="float32", batch=6, longest=300),
    Setting(model="gpt2, 90 M", precision="bfloat16", batch=12),
)
METHODS = (
    Setting(precision="bfloat16", batch=8, lora={"variant": "dora"}),
    Setting(precision="float32", batch=8, lora={"variant": "dora"}),
    Setting(precision="bfloat16", batch=6, lora={"variant": "dora", "targets": ("all-linear",)}),
    Setting(precision="bfloat16", batch=8, lora={"variant": "lora-fa"}),
    Setting(precision="float32", batch=6, kind="prefix"),
    Setting(precision="float32", batch=4, kind="prompt"),
    Setting(precision="float32", batch=6, kind="adapter_h"),
    Setting(precision="bfloat16", batch=8, kind="adapter_p"),
    Setting(precision="bfloat16", batch=8, kind="bitfit"),
    Setting(precision="float32", batch=4, kind="full"),
    Setting(precision="float32", batch=8, kind="top"),
)


def run(options: argparse.Namespace) -> int:
    """The table and its goal: every setting within a tenth."""
    print(f"# Memory forecast\n\n{time.strftime('%F')}, {machine()}.\n", flush=True)
    settings = {"lora": SETTINGS, "methods": METHODS}[options.forecast]
    settings = (settings[0], settings[4]) if options.quick else settings
    lines, found, errors = [], [], []
    with tempfile.TemporaryDirectory(prefix="lora-studio-bench-") as temporary:
        folder = Path(temporary)
        for setting in settings:
            one = of(setting, options, folder)
            error = one["forecast"] / one["measured"] - 1
            errors.append(abs(error))
            found.append({"model": setting.model or options.model, "setting": setting.label, "error": error, **one})
            megabytes = [f"{one[name] / 1e6:.0f}" for name in ("forecast", "measured")]
            lines.append([setting.model or options.model, setting.label, *megabytes, f"{error:+.1%}"])
    print(markdown(["model", "setting", "forecast MB", "measured MB", "error"], lines) + "\n")
    text = f"largest error of the memory forecast, {len(settings)} settings"
    worst = Goal(text=text, values=[max(errors)], most=WITHIN, unit="of the measured peak")
    goals.say([worst])
    goals.finish(options, [worst], {"settings": found})
    return 0


def of(setting: Setting, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Forecast and measured peak of one run, in bytes."""
    from lora_studio.core.spec import BaselineSpec, LoraSpec
    from lora_studio.fields import build
    from lora_studio.runs.config import DataChoice, RunConfig
    from lora_studio.settings import TrainConfig
    from lora_studio.studio import Studio

    studio = Studio(folder / "studio")
    dataset = studio.data.add(options.data)
    columns = {"prompt": options.prompt, "completion": options.answer} if options.prompt and options.answer else {}
    choice = DataChoice(id=dataset.id, format="prompt_completion" if columns else "", columns=columns)
    method = BaselineSpec(kind=setting.kind) if setting.kind else build(LoraSpec, {**setting.lora})
    train = TrainConfig(
        steps=STEPS,
        batch_size=setting.batch,
        max_length=setting.longest,
        precision=setting.precision,
        evaluations=1,
        samples=0,
        seed=options.seed,
    )
    model = _written(setting.model, options.model, folder) if setting.model else options.model
    run = studio.start(RunConfig(name="forecast", model=model, dataset=choice, method=method, train=train))
    for event in studio.follow(run.id):
        if event["type"] == "Metric" and event["step"] >= TRAINED:
            studio.stop(run.id)
    run = studio.runs.get(run.id)
    if "memory_bytes" not in run.summary:
        raise RuntimeError(f"{setting.label}: {run.status}, {run.error}")
    parts = run.facts["estimate"]["memory_bytes"]
    return {"forecast": parts["peak"], "measured": run.summary["memory_bytes"], "parts": parts}


def _written(name: str, tokenizer: str, folder: Path) -> str:
    """The folder of a model with random weights, written once."""
    place = folder / name.replace(" ", "").replace(",", "-")
    if not place.exists():
        measure("benchmarks.forecast:write", {"name": name, "tokenizer": tokenizer, "folder": str(place)})
    return str(place)


def write(spec: Mapping[str, Any]) -> dict[str, Any]:
    """In a process of its own: draw the weights and write them, with the other model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_studio.models import ModelLibrary
    from lora_studio.studio import default_root

    tokenizer = ModelLibrary(default_root()).tokenizer(spec["tokenizer"])
    kind, shape = SHAPES[spec["name"]]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(spec["folder"])
    tokenizer.save_pretrained(spec["folder"])
    return {"parameters": sum(tensor.numel() for tensor in model.parameters())}
