"""Training on a GPU: the same comparison with random weights of realistic sizes, per second and by the device's memory.

    python -m benchmarks.training --data pairs.jsonl --device cuda

Called by `training`. Without a CUDA device it says that nothing was measured; nothing here is copied from reading.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import goals, training, work
from benchmarks.fresh import Failed, measure
from benchmarks.goals import Goal, paired
from benchmarks.paper import machine
from benchmarks.training import Way
from lora_studio.errors import StudioError

log = logging.getLogger("benchmarks")

WAYS = {
    "ours16": training.WAYS["ours16"],
    "peft16": Way("PEFT + Trainer, bf16", "peft", "bfloat16"),
    "sft-packed": Way("TRL SFTTrainer packed, bf16", "sft", "bfloat16", packed=True),
}
ONCE = ("sft-packed",)  # not in every repetition: it makes three times the steps, and no goal asks for it

# Random weights, as no models of this size are at hand; shapes of well-known models of 1.5 and 8 billion parameters.
LARGE = {
    "1.5 B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "8 B": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
}

ROWS = 16  # a step: as many as the other ways take of 8 B in 80 GB


def run(options: argparse.Namespace) -> int:
    """The same comparison with random weights of realistic sizes, per second and by memory of the device."""
    import torch

    if not WAYS.keys() & set(options.only):
        raise StudioError(
            "E_DATA", f"Nothing of {', '.join(options.only)} is measured on CUDA.", f"Ways are {', '.join(WAYS)}."
        )
    print(f"# Training on CUDA\n\n{time.strftime('%F')}, {machine()}.\n", flush=True)
    if not torch.cuda.is_available():
        print("not measured: no CUDA device", flush=True)
        goals.finish(options, [], {"cuda": "not measured: no CUDA device"})
        return 0
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    reached: list[Goal] = []
    print(f"{figures['device']}, {torch.cuda.mem_get_info()[1] / 2**30:.0f} GB.\n")
    for size in options.sizes:
        shape = LARGE[size]
        weights = 2 * parameters(shape)
        if 2.5 * weights > torch.cuda.mem_get_info()[0]:
            print(f"{size}: not measured: {weights / 1e9:.0f} GB of weights want more memory than is free.\n")
            continue
        with tempfile.TemporaryDirectory(prefix="lora-studio-bench-") as folder:
            spec = training.told(options, options.batch or ROWS, Path(folder)) | {"shape": shape}
            print(f"## {size}\n\n{in_words(spec, options)}\n", flush=True)
            found = _large(options, spec)
        figures[size] = found
        if not found:
            print(f"{size}: not measured: no way of training came to its end.\n")
            continue
        print(f"{training.table(found)}\n\n{training.losses(found)}\n", flush=True)
        reached += on_a_gpu(size, found)
    goals.say(reached)
    goals.finish(options, reached, figures)
    return 0


def on_a_gpu(size: str, found: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """What was asked of a GPU, as far as it was measured."""
    asked = []
    if "ours16" in found and "peft16" in found:
        ours, theirs = found["ours16"], found["peft16"]
        speed = paired(ours["speed"], theirs["speed"])
        memory = paired(ours["peak_bytes"], theirs["peak_bytes"])
        asked.append(Goal(text=f"{size}: supervised tokens per second, ours / PEFT + Trainer", values=speed, least=2.5))
        asked.append(Goal(text=f"{size}: memory of the device, ours / PEFT + Trainer", values=memory, most=0.5))
        if size == "8 B":
            text = f"{size}: fraction of the card's measured bf16 matrix rate"
            asked.append(Goal(text=text, values=ours["of_peak"], least=0.45, unit="of it"))
    return asked


def in_words(spec: Mapping[str, Any], options: argparse.Namespace) -> str:
    """What is trained on what."""
    timed = spec["batches"][spec["warmup"] :]
    rows = len(timed[0])
    real = statistics.fmean(sum(len(ids) for ids, _ in batch) for batch in timed)
    padded = statistics.fmean(rows * max(len(ids) for ids, _ in batch) for batch in timed)
    return (
        f"A llama of random weights in bf16, LoRA r=8 alpha=16 on q and v, batches of {rows} rows: {real:.0f} real and "
        f"{padded:.0f} padded tokens a step; {len(timed)} timed steps behind {spec['warmup']}, {options.repeats} "
        "repetitions in turn, each in a process of its own; s are of the wall clock; median (least–most)."
    )


def _large(options: argparse.Namespace, spec: dict[str, Any]) -> dict[str, Any]:
    """Every way on one size. A way that fails (no memory, no kernel) is named on stderr and left out."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    trainable = measure("benchmarks.contenders:start", spec)["trainable"]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**spec["shape"]))
    sizes = work.sizes_of(model, trainable)
    tokens = sum(len(ids) for ids, _ in spec["batches"][-1])
    supervised = sum(sum(marks[1:]) for _, marks in spec["batches"][-1])
    shapes = [(*one, count) for one, count in work.shapes_of(model, tokens, supervised, "cuda").items()]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS if name in options.only}
    asked = {"shapes": shapes, "precision": "bfloat16", "device": "cuda"}
    rate = measure("benchmarks.work:matrix_rate", asked)["rate"]
    print(f"Matrix products of the model's own shapes: {rate / 1e12:.0f} TFLOP/s.\n", flush=True)
    for number in range(options.repeats):
        for name in list(runs):
            way = WAYS[name]
            told = {**spec, "way": way.way, "precision": way.precision, "packed": way.packed, "defaults": False}
            if number and name in ONCE:
                continue
            try:
                answer = measure("benchmarks.contenders:trained", told)
            except Failed as error:
                log.warning("%s: not measured: %s", name, error)
                del runs[name]
                continue
            spent = sum(step["wall_s"] for step in answer["steps"])
            log.info("%d %s: %.2f s, %.0f MB", number + 1, name, spent, answer["peak_bytes"] / 1e6)
            runs[name].append(answer)
    return {
        name: training.summary(spec, sizes, answers, WAYS[name], {"bfloat16": [rate] * len(answers)}, "wall_s")
        for name, answers in runs.items()
    }


def parameters(shape: Mapping[str, Any]) -> int:
    """Of a llama of this shape."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    heads = 1 if shape["tie_word_embeddings"] else 2
    return shape["num_hidden_layers"] * block + heads * shape["vocab_size"] * hidden + hidden
