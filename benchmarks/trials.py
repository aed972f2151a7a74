"""One training and what came of it: a Trial is the whole of its settings, a Bench runs it with the app's own code.

Every result is a small JSON file under a name made of its settings, the rows and the model's revision, so that an
interrupted run goes on where it was, and tables that share a training share its result. Results do not know which
version of the code made them: after a change to the code, take a new folder.
"""

import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.rows import Rows
from lora_studio import adapters
from lora_studio.core import baselines
from lora_studio.core.layout import heads
from lora_studio.core.lean import class_logits
from lora_studio.core.lora import Factors, LoRA
from lora_studio.core.spec import LoraSpec, Method
from lora_studio.data.batches import Encoded, encode, encode_label
from lora_studio.data.formats import Example
from lora_studio.data.words import prompt_ids
from lora_studio.events import Metric, Started
from lora_studio.generate import answers
from lora_studio.measure import mean_loss
from lora_studio.models import ModelLibrary
from lora_studio.settings import Sampling, TrainConfig
from lora_studio.train import Job, train

log = logging.getLogger(__name__)

NAME = "trial"  # of the adapter, in the model and on disk
LENGTH = {"sst2": 80, "cola": 80, "e2e": 160}  # tokens that a row may have; the longest here has 67, 47, 142
SHORT = {"sst2": 28, "cola": 14, "e2e": 160}  # tokens of the longest row that is learnt from: padding is paid for
ANSWER = 60  # tokens; one reference in a hundred is longer
PRECISION = {"sst2": "float32", "cola": "float32", "e2e": "bfloat16"}  # of the base; what is trained is float32


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The settings of one training. where: measured on the rows that are reported, or on the tuning rows."""

    task: str  # sst2, cola or e2e
    method: Method | None  # None: the model as it is
    rate: float = 0.0
    steps: int = 0
    batch: int = 1
    seed: int = 0
    where: str = "heldout"


class Bench:
    """Models, rows and finished results of one run of the benchmark."""

    def __init__(self, loader: ModelLibrary, models: Mapping[str, str], rows: Mapping[str, Rows], cache: Path) -> None:
        self.loader, self.models, self.rows, self.cache = loader, models, rows, cache
        self._loaded: dict[tuple[str, str], LoRA] = {}
        self._encoded: dict[tuple[str, str], list[Encoded]] = {}
        cache.mkdir(parents=True, exist_ok=True)

    # ---- results -----------------------------------------------------------------------------------------------------

    def result(self, trial: Trial, keep: bool = False) -> dict[str, Any]:
        """What a trial gave, run now unless it is known: {"scores", "trainable", "total", "seconds", ...}.

        keep: its adapter is to be there afterwards too, for `factors`.
        """
        path = self._path(trial)
        if path.exists() and (not keep or path.with_suffix("").is_dir()):
            return json.loads(path.read_text())
        start = time.monotonic()
        found = self._run(trial, path.with_suffix("") if keep else None)
        found |= {"seconds": time.monotonic() - start, "trial": asdict(trial), "date": time.strftime("%F %T")}
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(found))
        beside.rename(path)  # whole or not there
        name, score = next(iter(found["scores"].items()))
        what = f"{trial.task} {label(trial.method)} rate {trial.rate:g} seed {trial.seed} on {trial.where}"
        log.info("%s: %s %.3f (%.0f s)", what, name, score, found["seconds"])
        return found

    def factors(self, trial: Trial) -> list[Factors]:
        """The trained updates of a LoRA trial, in forward order."""
        self.result(trial, keep=True)
        lora = self.lora(trial.task)
        adapters.load(lora, self._path(trial).with_suffix(""), NAME)
        try:
            return lora.delta(NAME)
        finally:
            lora.remove(NAME)

    def lora(self, task: str, precision: str = "") -> LoRA:
        """The task's base model, loaded once; every trial adds its adapter and removes it."""
        precision = precision or PRECISION[task]
        if (task, precision) not in self._loaded:
            labels = len(self.rows[task].labels)
            model = self.loader.load(self.models[task], precision=precision, on="cpu", labels=labels)
            self._loaded[task, precision] = LoRA(model)
        return self._loaded[task, precision]

    def complete(self, task: str, method: Method) -> Method:
        """The method with the task's classification head trained along."""
        return replace(method, modules_to_save=heads(self.lora(task).model)) if self.rows[task].labels else method

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _path(self, trial: Trial) -> Path:
        about = [
            asdict(trial),
            type(trial.method).__name__,
            LENGTH[trial.task],
            SHORT[trial.task],
            PRECISION[trial.task],
        ]
        about += [self.rows[trial.task].fingerprint, self.loader.revision(self.models[trial.task])]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        return self.cache / f"{trial.task}-{digest}.json"

    def _run(self, trial: Trial, folder: Path | None) -> dict[str, Any]:
        lora = self.lora(trial.task)
        if trial.method is None:
            return {"scores": self._scores(trial, None), "trainable": 0, "total": _size(lora.model), "head": 0}
        baselines.add(lora, NAME, self.complete(trial.task, trial.method), trial.seed)
        try:
            found = self._train(trial, lora)
            found["scores"] = self._scores(trial, NAME)
            found["head"] = (
                sum(_size(lora.model.get_submodule(name)) for name in heads(lora.model))
                if self.rows[trial.task].labels
                else 0
            )
            if folder is not None:
                adapters.save(lora, NAME, folder, self.models[trial.task])
        finally:
            lora.remove(NAME)
        return found

    def _train(self, trial: Trial, lora: LoRA) -> dict[str, Any]:
        job = self.job(trial, lora)
        found: dict[str, Any] = {}
        losses: list[float] = []
        for event in train(job):
            if isinstance(event, Started):
                found |= {"trainable": event.trainable, "total": event.total}
            elif isinstance(event, Metric) and "train_loss" in event.values:
                losses.append(event.values["train_loss"])
        return found | {"train_loss": statistics.fmean(losses[-10:])}

    def job(self, trial: Trial, lora: LoRA) -> Job:
        """The app's own training of this trial; the adapter is attached already."""
        config = TrainConfig(
            steps=trial.steps,
            batch_size=trial.batch,
            learning_rate=trial.rate,
            evaluations=1,
            samples=0,
            max_length=LENGTH[trial.task],
            precision=PRECISION[trial.task],
            seed=trial.seed,
        )
        tokenizer = self.loader.tokenizer(self.models[trial.task])
        rows = self.encoded(trial.task, "train")
        return Job(lora=lora, adapter=NAME, tokenizer=tokenizer, train=rows, heldout=(), config=config)

    def encoded(self, task: str, part: str) -> list[Encoded]:
        """One part of a task's rows as token ids; training rows that are too long are left out."""
        if (task, part) not in self._encoded:
            rows, tokenizer = self.rows[task], self.loader.tokenizer(self.models[task])
            examples: Sequence[Example] = getattr(rows, part)
            encoded = [
                encode_label(tokenizer, example, rows.labels, LENGTH[task])
                if rows.labels
                else encode(tokenizer, example, LENGTH[task])
                for example in examples
            ]
            longest = SHORT[task] if part == "train" else LENGTH[task]
            self._encoded[task, part] = [row for row in encoded if len(row.tokens.ids) <= longest]
        return self._encoded[task, part]

    def _scores(self, trial: Trial, adapter: str | None) -> dict[str, Any]:
        if self.rows[trial.task].labels:
            return self._label_scores(trial, adapter)
        lora = self.lora(trial.task)
        with lora.use(adapter):
            loss = mean_loss(lora, [row.tokens for row in self.encoded(trial.task, trial.where)])
            return {"loss": loss} if trial.where == "tuning" else self._text_scores(trial.task, lora) | {"loss": loss}

    def _label_scores(self, trial: Trial, adapter: str | None) -> dict[str, Any]:
        lora = self.lora(trial.task)
        rows = sorted((row.tokens for row in self.encoded(trial.task, trial.where)), key=lambda tokens: len(tokens.ids))
        guesses: list[int] = []
        with torch.no_grad(), lora.use(adapter):
            for start in range(0, len(rows), 64):  # of similar length, so that little is padded
                guesses += class_logits(lora.model, rows[start : start + 64]).argmax(-1).tolist()
        return label_scores([tokens.label or 0 for tokens in rows], guesses)

    def _text_scores(self, task: str, lora: LoRA) -> dict[str, Any]:
        rows, tokenizer = self.rows[task], self.loader.tokenizer(self.models[task])
        prompts = [prompt_ids(tokenizer, example.prompt) for example in rows.heldout]
        texts = answers(lora.model, tokenizer, prompts, Sampling(max_new_tokens=ANSWER))
        return text_scores(texts, rows.references) | {"sample": texts[0]}


def label_scores(truth: Sequence[int], guesses: Sequence[int]) -> dict[str, float]:
    """Accuracy and, for two classes 0 and 1, Matthews' coefficient, which is then the plain correlation."""
    right = statistics.fmean(one == other for one, other in zip(truth, guesses, strict=True))
    constant = len(set(truth)) < 2 or len(set(guesses)) < 2  # no correlation with a constant: 0 by convention
    return {
        "accuracy": right,
        "matthews": 0.0 if constant else float(numpy.corrcoef(numpy.array(truth), numpy.array(guesses))[0, 1]),
    }


def text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """BLEU of the corpus and ROUGE-L of each text, both against all its references; in points of 100."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    most = max(map(len, references))
    streams = [[one[n] if n < len(one) else None for one in references] for n in range(most)]
    scorer = RougeScorer(["rougeL"])
    rouge = [
        100 * scorer.score_multi(one, text)["rougeL"].fmeasure for text, one in zip(texts, references, strict=True)
    ]
    bleu = corpus_bleu(list(texts), streams).score  # type: ignore[arg-type]
    return {"rouge_l": statistics.fmean(rouge), "bleu": bleu, "rouge_l_each": rouge}


def label(method: Method | None) -> str:
    """A method in a few words, its budget included."""
    if method is None:
        return "no training"
    if isinstance(method, LoraSpec):
        matrices = "".join(role.removeprefix("attn.") for role in method.targets)
        return f"{ {'lora': 'LoRA', 'dora': 'DoRA'}.get(method.variant, method.variant) } {matrices} r={method.rank}"
    names = {
        "full": "full fine-tuning",
        "top": f"top {method.size} blocks",
        "bitfit": "BitFit",
        "prefix": f"prefix, keys and values, {method.size}",
        "prompt": f"prefix, embeddings, {method.size}",
    }
    return names.get(method.kind, f"adapter {method.kind[-1].upper()} w={method.size}")


def _size(module: Any) -> int:
    return sum(tensor.numel() for tensor in module.parameters())
