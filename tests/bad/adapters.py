"""Adapter folders: of another base, of another kind, damaged or hostile."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lora_studio import adapters, peft_format
from lora_studio.core.lora import LoRA
from lora_studio.owners import owner_name
from lora_studio.runs.config import DataChoice
from lora_studio.settings import TrainConfig
from tests.bad.bench import CSV, Bench, bad, every, hollow
from tests.bad.models import header, tensor
from tests.tiny import causal


def first(found: dict[str, torch.Tensor], ending: str = "lora_A.weight") -> str:
    return next(key for key in found if key.endswith(ending))


def swapped(content: bytes, name: str = peft_format.WEIGHTS) -> Callable[[Bench], Any]:
    def act(bench: Bench) -> Any:
        folder = bench.adapter()
        (folder / name).write_bytes(content)
        return bench.attach(folder)

    return act


def removed(name: str, instead: str = "") -> Callable[[Bench], Any]:
    def act(bench: Bench) -> Any:
        folder = bench.adapter()
        (folder / name).rename(folder / (instead or "elsewhere"))
        return bench.attach(folder)

    return act


every(
    "A01",
    "E_BASE",
    {
        "of another architecture": lambda b: b.attach(b.adapter(), "gpt2"),
        "of another width": lambda b: adapters.load(LoRA(causal("llama", hidden_size=64)), b.adapter(), "again"),
    },
)
every(
    "A02",
    "E_SHAPE",
    {
        "r of another number": lambda b: b.attach(b.adapter({"r": 4})),
        "no r": lambda b: b.attach(b.adapter({"r": None})),
    },
)
every(
    "A02",
    "E_ADAPTER_FILES",
    {
        f"{wrong}": lambda b, wrong=wrong: b.attach(b.adapter(wrong))
        for wrong in ({"lora_alpha": "16"}, {"r": 0}, {"r": 2.5})
    },
)
VARIANTS: list[dict[str, Any]] = [
    {"peft_type": kind} for kind in ("LOHA", "LOKR", "IA3", "PREFIX_TUNING", "ADALORA", "OFT", None)
]
VARIANTS += [{"bias": "all"}, {"bias": "lora_only"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "loftq"}]
VARIANTS += [{"rank_pattern": {".*q_proj": 3}}, {"layer_replication": [[0, 2]]}, {"target_parameters": ["experts"]}]
every("A03", "E_PEFT_VARIANT", {str(one): lambda b, one=one: b.attach(b.adapter(one)) for one in VARIANTS})
bad("A03", "DoRA without magnitudes", "E_KEYS")(lambda b: b.attach(b.adapter({"use_dora": True})))
bad("A03", "rank-stabilised", "ok")(lambda b: b.attach(b.adapter({"use_rslora": True})))
bad("A04", "a pickle", "E_PICKLE")(removed(peft_format.WEIGHTS, "adapter_model.bin"))
every("A05", "E_ADAPTER_FILES", {"no weights": removed(peft_format.WEIGHTS), "no config": removed(peft_format.CONFIG)})
every(
    "A05",
    "E_ADAPTER_FILES",
    {
        "a web page": swapped(b"<html>", peft_format.CONFIG),
        "a list": swapped(b"[]", peft_format.CONFIG),
        "a deep one": swapped(b"[" * 100_000, peft_format.CONFIG),
        "2 MB": swapped(b" " * 2**21 + b"{}", peft_format.CONFIG),
    },
)
every(
    "A06",
    "E_KEYS",
    {
        "a tensor that is no factor": lambda b: b.attach(
            b.adapter(change=lambda found: found.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}))
        ),
        "a layer that the model lacks": lambda b: b.attach(
            b.adapter(
                change=lambda found: found.update(
                    {first(found).replace("layers.0", "layers.7"): found.pop(first(found))}
                )
            )
        ),
        "an A without its B": lambda b: b.attach(
            b.adapter(change=lambda found: found.pop(first(found, "lora_B.weight")))
        ),
    },
)
every(
    "A07",
    "E_NOT_FINITE",
    {
        str(value): lambda b, value=value: b.attach(b.adapter(change=lambda found: found[first(found)].fill_(value)))
        for value in (float("nan"), float("inf"))
    },
)
every(
    "A08",
    "E_DTYPE",
    {
        str(dtype): lambda b, dtype=dtype: b.attach(
            b.adapter(change=lambda found: found.update({first(found): found[first(found)].to(dtype)}))
        )
        for dtype in (torch.float8_e4m3fn, torch.int8, torch.bool)
    },
)
every(
    "A09",
    "ok",
    {
        name: lambda b, name=name: b.attach(b.adapter({"base_model_name_or_path": name}))
        for name in ("/etc", "http://x/y", "someone/code", "../..")
    },
)
every(
    "A10",
    "E_TOO_LARGE",
    {"5 GB": lambda b: b.attach(hollow((folder := b.adapter()), peft_format.WEIGHTS, 5 * 2**30).parent or folder)},
)
bad("A11", "no tensors", "E_KEYS")(lambda b: b.attach(b.adapter(change=lambda found: found.clear())))
bad("A12", "a zip", "E_ADAPTER_FILES")(lambda b: b.attach(b.write("adapter.zip", b"PK\x03\x04")))
bad("A12", "one name twice", "E_SAFETENSORS")(
    swapped(header('{"a":' + json.dumps(tensor(0, 8)) + ',"a":' + json.dumps(tensor(0, 4, (1,))) + "}", bytes(8)))
)
every(
    "A13",
    "E_RANK",
    {
        "rank 10**6": lambda b: b.attach(b.adapter({"r": 10**6})),
        "in a pattern": lambda b: b.attach(b.adapter({"rank_pattern": {"q_proj": 10**6}})),
    },
)
bad("A14", "cut off", "E_SAFETENSORS")(
    lambda b: b.attach(
        (f := b.adapter(), (f / peft_format.WEIGHTS).write_bytes((f / peft_format.WEIGHTS).read_bytes()[:300]))[0]
    )
)


@bad("A15", "of another visitor", "E_RUN_NOT_FOUND")
def another_visitors(bench: Bench) -> None:
    studio, config = bench.studio()
    mine, theirs = (studio.of(owner_name("visitor", secret * 32)) for secret in "ab")
    dataset = mine.data.add_text(CSV)
    run = mine.start(replace(config, dataset=DataChoice(id=dataset.id), train=TrainConfig(max_length=64)))
    next(theirs.compare([run.id], "x"))


@bad("A16", "a card with HTML and objects", "ok")
def hostile_card(bench: Bench) -> None:
    folder = bench.adapter()
    (folder / "README.md").write_text("---\nx: !!python/object/apply:os.system ['touch ran']\n---\n<script>1</script>")
    bench.attach(folder)  # nobody opens it
