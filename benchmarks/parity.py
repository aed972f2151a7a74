"""The same losses in less: bf16 against fp32 after many steps, and our steps against a plain loop's.

    python -m benchmarks.training --data pairs.jsonl --parity [--batch 4]

Called by `training`. One comparison is of two trainings of the app on the same rows, 200 steps, by the mean loss of
held-out rows that neither saw. The other trains in fp32 on the same batches with PEFT in a plain loop of torch, rows
padded and all logits made, and compares the losses step by step.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import goals, pairs
from benchmarks.fresh import measure
from benchmarks.goals import Goal
from benchmarks.paper import machine
from benchmarks.verdict import markdown

STEPS = 200
COMPARED = 10  # steps against the plain loop
HELDOUT = 40  # rows
RATE = 1e-3
WITHIN = 0.005  # of the held-out loss
CLOSE = 1e-5  # of the loss of a step


def run(options: argparse.Namespace) -> int:
    """Both tables and their goals."""
    from benchmarks.training import prepared

    print(f"# Parity\n\n{time.strftime('%F')}, {machine()}.\n", flush=True)
    options.steps, options.warmup = COMPARED, 0
    if options.quick:
        options.steps = 3
    with tempfile.TemporaryDirectory(prefix="lora-studio-bench-") as folder:
        spec, _ = prepared(options, Path(folder))
        ours, naive = (
            measure("benchmarks.contenders:trained", {**spec, "way": way, "precision": "float32"})["steps"]
            for way in ("ours", "naive")
        )
    apart = [abs(one["loss"] - other["loss"]) / other["loss"] for one, other in zip(ours, naive, strict=True)]
    lines = [
        [str(number), f"{one['loss']:.6f}", f"{other['loss']:.6f}", f"{difference:.1e}"]
        for number, (one, other, difference) in enumerate(zip(ours, naive, apart, strict=True), 1)
    ]
    print(markdown(["step, fp32", "ours", "plain loop", "relative difference"], lines) + "\n", flush=True)
    text = "largest relative difference of a step's loss, fp32, ours and a plain loop"
    same = Goal(text=text, values=[max(apart)], most=CLOSE, unit="of it")

    told = _rows(options)
    found = {
        precision: measure("benchmarks.parity:learnt", {**told, "precision": precision})
        for precision in ("float32", "bfloat16")
    }
    lines = [
        [precision, f"{one['before']:.4f}", f"{one['train_loss']:.4f}", f"{one['after']:.4f}"]
        for precision, one in found.items()
    ]
    head = [f"base, {told['steps']} steps", "held-out before", "last training loss", "held-out after"]
    print(markdown(head, lines) + "\n")
    most = abs(found["bfloat16"]["after"] / found["float32"]["after"] - 1)
    text = f"held-out loss after {told['steps']} steps, bf16 away from fp32"
    close = Goal(text=text, values=[most], most=WITHIN, unit="of it")
    goals.say([same, close])
    goals.finish(options, [same, close], {"steps": {"ours": ours, "naive": naive}, "heldout": found})
    return 0


def _rows(options: argparse.Namespace) -> dict[str, Any]:
    """Rows to train on and rows held out, of the whole file."""
    from lora_studio.models import ModelLibrary
    from lora_studio.studio import default_root

    tokenizer = ModelLibrary(default_root()).tokenizer(options.model)
    conversations = pairs.examples(options.data, options.prompt, options.answer)
    every = list(pairs.every(tokenizer, conversations, options.shortest, options.longest))
    return {
        "model": options.model,
        "rows": every[HELDOUT:],
        "heldout": every[:HELDOUT],
        "steps": 5 if options.quick else STEPS,
        "batch": options.batch,
        "seed": options.seed,
    }


def learnt(spec: Mapping[str, Any]) -> dict[str, float]:
    """In a process of its own: train as the app does, and measure the held-out rows before and after."""
    from benchmarks.contenders import metrics
    from lora_studio.core.lean import Tokens
    from lora_studio.core.lora import LoRA
    from lora_studio.core.spec import LoraSpec
    from lora_studio.data.batches import Encoded
    from lora_studio.measure import mean_loss
    from lora_studio.models import ModelLibrary
    from lora_studio.settings import TrainConfig
    from lora_studio.studio import default_root
    from lora_studio.train import Job

    lora = LoRA(ModelLibrary(default_root()).load(spec["model"], precision=spec["precision"], on="cpu"))
    lora.add("run", LoraSpec(), seed=spec["seed"])
    config = TrainConfig(
        steps=spec["steps"],
        batch_size=spec["batch"],
        learning_rate=RATE,
        evaluations=1,
        samples=0,
        precision=spec["precision"],
        seed=spec["seed"],
    )
    rows = [Encoded(Tokens(ids, marks), 0) for ids, marks in spec["rows"]]
    heldout = [Tokens(ids, marks) for ids, marks in spec["heldout"]]
    before = mean_loss(lora, heldout)
    job = Job(lora=lora, adapter="run", tokenizer=None, train=rows, heldout=(), config=config)
    *_, last = (values["train_loss"] for values in metrics(job))
    with lora.use("run"):
        after = mean_loss(lora, heldout)
    return {"before": before, "train_loss": last, "after": after}
