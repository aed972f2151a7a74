"""The ways of training that are compared. Each runs in a process of its own and trains on the batches that it is given.

ours      lora_studio.train.train(Job): what a run of the app does
peft      PEFT's LoRA under transformers.Trainer, rows padded to the longest of the batch
sft       PEFT's LoRA under TRL's SFTTrainer; packed: rows laid end to end up to 1024 tokens, two such rows a step
full      transformers.Trainer on all weights
naive     PEFT's LoRA in a plain loop of torch: padded rows, all logits

Every LoRA starts at the same A, read from the adapter folder that `start` writes. All learn at the same constant
rate with AdamW and clip the gradient at 1, so that the losses step by step show that the same work is done.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.fresh import peak_bytes
from benchmarks.pairs import Row
from lora_studio.core.lean import IGNORED

RATE = 2e-4
FULL_RATE = 2e-5  # of full fine-tuning, which bears less
PACK = 1024  # tokens of a row that TRL packs
Spec = Mapping[str, Any]


def start(spec: Spec) -> dict[str, Any]:
    """Write the adapter that every LoRA starts from into spec["adapter"], in PEFT's layout."""
    from lora_studio import adapters
    from lora_studio.core.lora import LoRA

    lora = LoRA(base(spec, "bfloat16", spec["device"]))
    lora.add("run", _lora(spec), seed=spec["seed"])
    adapters.save(lora, "run", Path(spec["adapter"]), spec["model"])
    return {"trainable": sum(tensor.numel() for tensor in lora.parameters("run"))}


def trained(spec: Spec) -> dict[str, Any]:
    """Train as spec["way"] says: {"steps": [...], "peak_bytes"}; the first `warmup` steps are in neither.

    A step has "loss", "supervised", "real" and "processed" tokens, "cpu_s" and "wall_s".
    """
    ways = {"ours": _ours, "peft": _trainer, "sft": _sft, "full": _trainer, "naive": _naive}
    clock = _Clock(spec["device"])
    ways[spec["way"]](spec, clock)
    timed = clock.steps[spec["warmup"] :]
    assert timed, f"{spec['way']} made {len(clock.steps)} steps of these rows, and none is left behind the warm-up"
    timed = [{**step, "loss": float(step["loss"])} for step in timed]
    return {"steps": timed, "peak_bytes": max(clock.peak, clock.most_held())}


class _Clock:
    """Notes what each step took, from the end of the one before it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps: list[dict[str, Any]] = []
        self.fed: list[tuple[int, int, int]] = []  # supervised, real and processed tokens of the batches to come
        self.losses: list[float | torch.Tensor] = []
        self.peak = 0  # noted before training
        self.last = self._now()

    def feed(self, supervised: int, real: int, processed: int) -> None:
        """A batch is on its way to the model; loaders may be one ahead."""
        self.fed.append((supervised, real, processed))

    def lap(self) -> None:
        """A step has ended; a GPU may still be at it, or at the next one."""
        now, number = self._now(), len(self.steps)
        supervised, real, processed = self.fed[number]
        self.steps.append(
            {
                "cpu_s": now[0] - self.last[0],
                "wall_s": now[1] - self.last[1],
                "loss": self.losses[number],
                "supervised": supervised,
                "real": real,
                "processed": processed,
            }
        )
        self.last = now

    def most_held(self) -> int:
        """Most bytes held so far: by tensors on the device, or by the process on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_bytes()

    def wait(self) -> None:
        """For a GPU that is still at work."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _now(self) -> tuple[float, float]:
        return time.process_time(), time.perf_counter()


# ---- ours ------------------------------------------------------------------------------------------------------------


def _ours(spec: Spec, clock: _Clock) -> None:
    """Nothing is held out and nothing sampled, so that the steps are all there is to time."""
    from lora_studio.core.lean import Tokens
    from lora_studio.core.lora import LoRA
    from lora_studio.data.batches import Encoded
    from lora_studio.settings import TrainConfig
    from lora_studio.train import Job

    precision = spec["precision"]
    lora = LoRA(base(spec, precision, spec["device"]))
    lora.add("run", _lora(spec), seed=spec["seed"])
    config = TrainConfig(
        steps=len(spec["batches"]),
        batch_size=len(spec["batches"][0]),
        learning_rate=RATE,
        schedule="constant",
        warmup=0.0,
        evaluations=1,
        samples=0,
        precision=precision,
        seed=spec["seed"],
    )
    rows = [Encoded(Tokens(ids, marks), 0) for ids, marks in spec["rows"]]
    job = Job(lora=lora, adapter="run", tokenizer=None, train=rows, heldout=(), config=config)
    for batch in spec["batches"]:
        tokens = [Tokens(ids, marks) for ids, marks in batch]
        real = sum(len(one.ids) for one in tokens)
        processed = sum(map(job.share.size, itertools.chain(*job.share.rounds(tokens))))
        clock.feed(sum(one.count for one in tokens), real, processed)
    clock.peak = clock.most_held()  # training may reset the system's own note of it
    for values in metrics(job):
        clock.losses.append(values["train_loss"])  # with it has all of this step arrived
        clock.lap()


def metrics(job: Any) -> Iterator[Mapping[str, float]]:
    """Train one job of the app; the figures of each step, as soon as it is done."""
    from lora_studio.events import Metric
    from lora_studio.train import train

    for event in train(job):
        if isinstance(event, Metric) and "train_loss" in event.values:
            yield event.values


# ---- transformers and TRL --------------------------------------------------------------------------------------------


def _trainer(spec: Spec, clock: _Clock) -> None:
    from transformers import Trainer, TrainingArguments

    class Noted(_Noting, Trainer):
        pass

    model = _theirs(spec) if spec["way"] == "peft" else base(spec, "float32", spec["device"])
    arguments = TrainingArguments(**_arguments(spec))
    rows: Any = [_features(row) for batch in spec["batches"] for row in batch]  # a list serves as a dataset
    trainer = Noted(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=_counted(_pad, clock),
    )
    trainer.clock = clock
    trainer.add_callback(_laps(clock, spec["warmup"]))
    trainer.train()


def _sft(spec: Spec, clock: _Clock) -> None:
    """TRL's own defaults but for gradient_checkpointing and bf16, which it would switch on; see `sft_arguments`."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from lora_studio.models import ModelLibrary
    from lora_studio.studio import default_root

    class Noted(_Noting, SFTTrainer):
        pass

    rows = [_features(row) for batch in spec["batches"] for row in batch]
    tokenizer = ModelLibrary(default_root()).tokenizer(spec["tokenizer"])
    settings = sft_arguments(spec["packed"], spec.get("defaults", False))
    arguments = SFTConfig(**{**_arguments(spec), **settings})
    trainer = Noted(
        model=_theirs(spec), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.data_collator = _counted(trainer.data_collator, clock)
    trainer.clock = clock
    trainer.add_callback(_laps(clock, spec["warmup"]))
    trainer.train()


def sft_arguments(packed: bool, defaults: bool) -> dict[str, Any]:
    """What is asked of SFTTrainer beyond what Trainer is asked; `defaults` leaves it its checkpointing and bf16."""
    settings: dict[str, Any] = {"max_length": PACK, "packing": packed}
    if packed:
        settings["per_device_train_batch_size"] = 2
        settings["max_steps"] = -1
        settings["num_train_epochs"] = 1
    if defaults:
        settings |= {"gradient_checkpointing": True, "bf16": True}
    return settings


class _Noting:
    """A trainer that keeps the rows' order and notes each loss unrounded."""

    clock: _Clock

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        loss = super().compute_loss(*given, **named)  # type: ignore[misc]
        self.clock.losses.append(loss.detach())  # not read yet: a GPU need not wait for that
        return loss


def _arguments(spec: Spec) -> dict[str, Any]:
    """One pass over the batches as they are, at a constant rate, with no logs, files or reports."""
    return {
        "output_dir": spec["folder"],
        "per_device_train_batch_size": len(spec["batches"][0]),
        "max_steps": len(spec["batches"]),
        "learning_rate": FULL_RATE if spec["way"] == "full" else RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "bf16": spec["precision"] == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": spec["device"] == "cpu",
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": spec["seed"],
    }


def _laps(clock: _Clock, warmup: int) -> Any:
    """A GPU is waited for where the time begins and where it ends, not at every step."""
    from transformers import TrainerCallback

    class Laps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (warmup, state.max_steps):
                clock.wait()
            clock.lap()

    return Laps()


def _counted(collate: Callable[[Any], Any], clock: _Clock) -> Callable[[Any], Any]:
    """The collator, telling the clock what goes through it."""

    def counting(rows: Sequence[Mapping[str, Any]]) -> Any:
        batch = collate(rows)
        real = sum(len(row["input_ids"]) for row in rows)
        supervised = int((batch["labels"][:, 1:] != IGNORED).sum())
        clock.feed(supervised, real, batch["input_ids"].numel())
        return batch

    return counting


def _pad(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded on the right to the longest row."""

    def column(name: str, filling: int) -> torch.Tensor:
        values = [torch.tensor(row[name]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filling)

    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows], True)
    return {"input_ids": column("input_ids", 0), "attention_mask": mask, "labels": column("labels", IGNORED)}


def _features(row: Row) -> dict[str, list[int]]:
    ids, marks = row
    return {"input_ids": ids, "labels": [one if kept else IGNORED for one, kept in zip(ids, marks, strict=True)]}


# ---- a plain loop ----------------------------------------------------------------------------------------------------


def _naive(spec: Spec, clock: _Clock) -> None:
    model = _theirs(spec).train()
    trainable = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
    for batch in spec["batches"]:
        inputs = _counted(_pad, clock)([_features(row) for row in batch])
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(loss.item())
        clock.lap()


# ---- what they share -------------------------------------------------------------------------------------------------


def _theirs(spec: Spec) -> Any:
    """The base under PEFT, at the shared start. On CUDA bf16 weights, as is usual there; else fp32 and autocast."""
    from peft import PeftModel

    half = spec["device"] == "cuda" and spec["precision"] == "bfloat16"
    model = base(spec, "bfloat16" if half else "float32", spec["device"])
    return PeftModel.from_pretrained(model, spec["adapter"], is_trainable=True)


def _lora(spec: Spec) -> Any:
    from lora_studio.core.spec import LoraSpec
    from lora_studio.fields import build

    return build(LoraSpec, spec.get("lora") or {})


def base(spec: Spec, precision: str, device: str) -> Any:
    """The named model, or with a "shape" a llama of random weights, the same each time."""
    if spec.get("shape") is None:
        from lora_studio.models import ModelLibrary
        from lora_studio.studio import default_root

        return ModelLibrary(default_root()).load(spec["model"], precision=precision, on=device)
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_studio.core import upcast

    torch.manual_seed(spec["seed"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, precision))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**spec["shape"])).eval()
    finally:
        torch.set_default_dtype(before)
    upcast.apply(model)  # as at loading
    return model
