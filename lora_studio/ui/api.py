"""The endpoints for programs: typed, with stable names, the same Studio underneath. Docstrings become their help."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from gradio.events import api

from lora_studio.core.spec import LoraSpec, Method
from lora_studio.data.library import SAMPLES
from lora_studio.errors import StudioError
from lora_studio.fields import build
from lora_studio.models import STARTER
from lora_studio.results import run_as_json
from lora_studio.runs.config import DataChoice, RunConfig, method_of, short
from lora_studio.settings import Sampling, TrainConfig
from lora_studio.ui.desk import Desk

SPEC, TRAIN = LoraSpec(), TrainConfig()  # their defaults are the endpoints'
EVALUATED = 200  # rows at most: each is answered twice


def register(desk: Desk) -> None:
    """Declare the endpoints; call it first inside Blocks, so that no event of the page takes their names."""
    for quick in (
        *(add_dataset, list_datasets, describe_dataset),
        *(plan, start_run, list_runs, run_status, run_events, stop_run),
    ):
        api(desk.mine(quick), api_name=quick.__name__, queue=False)
    api(desk.mine(fetch_dataset), api_name="fetch_dataset")
    for slow in (compare, compare_runs, evaluate, export):
        api(desk.mine(slow), api_name=slow.__name__, concurrency_id="model", concurrency_limit=1)


def add_dataset(desk: Desk, text: str, name: str = "pasted text") -> str:
    """Keep a dataset given as CSV, JSON or JSON lines and return its id.

    Args:
        text: The rows.
        name: What to call it.
    """
    return desk.studio.data.add_text(text, name).id


def fetch_dataset(desk: Desk, repo: str) -> str:
    """Keep a sample that comes with the app, or a dataset of the Hugging Face Hub, and return its id.

    Args:
        repo: orders, plain_english or tickets; or owner/name as on huggingface.co.
    """
    data = desk.studio.data
    return (data.add_sample(repo) if repo in SAMPLES else data.add_hub(repo)).id


def list_datasets(desk: Desk) -> list[dict[str, Any]]:
    """The datasets kept here: id, name, rows, columns, and how they are read."""
    return [
        {
            "id": one.id,
            "name": one.name,
            "rows": one.rows,
            "columns": list(one.columns),
            "format": one.format,
            "mapping": one.mapping,
            "warnings": list(one.warnings),
        }
        for one in desk.studio.data.list()
    ]


def describe_dataset(
    desk: Desk, dataset: str, model: str = STARTER, max_length: int = TRAIN.max_length, task: str = "auto"
) -> dict[str, Any]:
    """A dataset as a model will see it: rows, split, token lengths, what the length limit cuts, duplicates, overlap.

    Args:
        dataset: Id of a dataset.
        model: Whose tokenizer counts: starter, a catalogue name, a Hub id or a local folder.
        max_length: Tokens of a row; what is behind them is cut.
        task: causal writes text, classify chooses a label, auto takes what suits model and data.
    """
    choice, config = DataChoice(id=dataset), build(TrainConfig, {"max_length": max_length})
    studio = desk.ready(model)
    return studio.inspect(choice, model, config, studio.task(model, choice, task)).as_json()


def plan(
    desk: Desk,
    model: str = STARTER,
    rank: int = SPEC.rank,
    targets: str = ",".join(SPEC.targets),
    steps: int = TRAIN.steps,
    batch_size: int = TRAIN.batch_size,
    dataset: str = "",
    method: str = "lora",
    width: int = 0,
    task: str = "auto",
) -> dict[str, Any]:
    """What a run would adapt and cost: matrices, parameters, bytes, seconds.

    Args:
        model: starter, a catalogue name, a Hub id or a local folder.
        rank: Rank of the adapter.
        targets: Roles such as attn.q, comma-separated, or all-linear.
        steps: Optimizer steps.
        batch_size: Examples per step.
        dataset: Id of a dataset, for a better forecast.
        method: lora, or one of the paper's other methods: full, top, bitfit, adapter_h, adapter_p, adapter_l,
            prefix, prompt. Rank and targets are LoRA's.
        width: Of a method that has one; 0 takes its usual.
        task: causal writes text, classify chooses a label, auto takes what suits model and data.
    """
    config = build(TrainConfig, {"steps": steps, "batch_size": batch_size})
    choice = DataChoice(id=dataset) if dataset else None
    studio = desk.ready(model)
    chosen, task = _method(method, width, rank, targets), studio.task(model, choice, task)
    return studio.plan(model, chosen, config, choice, task).as_json()


def start_run(
    desk: Desk,
    dataset: str,
    model: str = STARTER,
    rank: int = SPEC.rank,
    targets: str = ",".join(SPEC.targets),
    learning_rate: float = TRAIN.learning_rate,
    steps: int = TRAIN.steps,
    batch_size: int = TRAIN.batch_size,
    seed: int = TRAIN.seed,
    name: str = "",
    method: str = "lora",
    width: int = 0,
    task: str = "auto",
) -> str:
    """Queue a training run and return its id at once.

    Args:
        dataset: Id of a dataset, as add_dataset returns it.
        model: starter, a catalogue name, a Hub id or a local folder.
        rank: Rank of the adapter.
        targets: Roles such as attn.q, comma-separated, or all-linear.
        learning_rate: Peak of the schedule. Where it is LoRA's default, another method takes its own.
        steps: Optimizer steps.
        batch_size: Examples per step.
        seed: Same seed, same run.
        name: Shown in the run list.
        method: lora, or one of the paper's other methods: full, top, bitfit, adapter_h, adapter_p, adapter_l,
            prefix, prompt. Rank and targets are LoRA's.
        width: Of a method that has one; 0 takes its usual.
        task: causal writes text, classify chooses a label, auto takes what suits model and data.
    """
    studio = desk.ready(model)
    chosen, choice = _method(method, width, rank, targets), DataChoice(id=dataset)
    values = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    config = RunConfig(
        name=name or f"{short(chosen)} from the API",
        model=model,
        task=studio.task(model, choice, task),
        dataset=replace(choice, name=studio.data.get(dataset).name),
        method=chosen,
        train=build(TrainConfig, values).at_usual_rate_of(method),
    )
    desk.may_start()
    return studio.start(config).id


def list_runs(desk: Desk) -> list[dict[str, Any]]:
    """All runs, the newest first: id, name, status, step, model, summary and the settings of each."""
    return [run_as_json(run) for run in desk.studio.runs.list()]


def run_status(desk: Desk, run: str) -> dict[str, Any]:
    """State, step, newest figures and, once ended, summary or error of a run.

    Args:
        run: Id from start_run.
    """
    view = desk.studio.runs.get(run)
    return {
        "id": view.id,
        "name": view.name,
        "status": view.status,
        "step": view.step,
        "steps": view.steps,
        "latest": dict(view.latest),
        "summary": dict(view.summary),
        "error": dict(view.error) if view.error else None,
    }


def run_events(desk: Desk, run: str, start: int = 0) -> list[dict[str, Any]]:
    """The events of a run from number `start` on: metrics, samples, warnings and its end.

    Args:
        run: Id from start_run.
        start: How many events the caller has already.
    """
    view = desk.studio.runs.get(run)
    return desk.studio.runs.events(view.id, max(0, start))


def stop_run(desk: Desk, run: str) -> str:
    """Ask a run to end after its current step; its adapter is kept.

    Args:
        run: Id from start_run.
    """
    desk.studio.stop(desk.studio.runs.get(run).id)
    return "stopping"


def compare(
    desk: Desk, run: str, prompt: str, strength: float = 1.0, max_new_tokens: int = Sampling().max_new_tokens
) -> Iterator[tuple[str, str]]:
    """The base model's and the adapted model's answer to one prompt, as they grow.

    Args:
        run: Id of a run that has an adapter.
        prompt: What both are asked.
        strength: 0 is the base model, 1 as trained.
        max_new_tokens: Longest answer, in tokens.
    """
    view = desk.studio.runs.get(run)
    sampling = build(Sampling, {"max_new_tokens": max_new_tokens})
    studio = desk.ready(view.config.model)
    with closing(studio.compare([view.id], prompt, strength=strength, sampling=sampling)) as moments:
        for moment in moments:
            base, adapted = moment.answers
            yield base.text, adapted.text


def compare_runs(
    desk: Desk,
    runs: list[str],
    prompt: str,
    strength: float = 1.0,
    max_new_tokens: int = Sampling().max_new_tokens,
) -> Iterator[list[str]]:
    """The base model's answer and each run's to one prompt, from one batch, as they grow; the base model's first.

    Args:
        runs: Ids of runs on the same base model that have an adapter.
        prompt: What all are asked.
        strength: 0 is the base model, 1 as trained.
        max_new_tokens: Longest answer, in tokens.
    """
    views = [desk.studio.runs.get(run) for run in runs]
    sampling = build(Sampling, {"max_new_tokens": max_new_tokens})
    studio = desk.ready(views[0].config.model if views else "")
    asked = [view.id for view in views]
    with closing(studio.compare(asked, prompt, strength=strength, sampling=sampling)) as moments:
        for moment in moments:
            yield [answer.text for answer in moment.answers]


def evaluate(desk: Desk, run: str, dataset: str = "", limit: int = 50) -> dict[str, Any]:
    """Base model against adapted model: loss, perplexity, and exact match, ROUGE-L, BLEU or accuracy as fits the rows.

    Args:
        run: Id of a run that has an adapter.
        dataset: Id of another dataset; empty measures on the run's held-out rows.
        limit: Most rows to measure, up to 200.
    """
    if not 1 <= limit <= EVALUATED:
        message = f"{limit:,} rows cannot be measured in one call."
        raise StudioError("E_LIMIT", message, f"Give a number from 1 to {EVALUATED}.")
    view = desk.studio.runs.get(run)
    studio = desk.ready(view.config.model)
    return studio.evaluate(view.id, DataChoice(id=dataset) if dataset else None, limit)


def export(desk: Desk, run: str, merged: bool = False, dtype: str = "") -> dict[str, Any]:
    """Pack a run's adapter, or the model with it merged in; the answer says from which address to fetch the zip, once.

    It also says what was seen when the files were loaded again: do not rely on files whose proof has not passed.

    Args:
        run: Id of a run that has an adapter.
        merged: False packs the adapter in PEFT's layout, True the whole model.
        dtype: Of merged weights: float32, bfloat16 or float16; empty takes what suits this machine.
    """
    view = desk.studio.runs.get(run)
    done = desk.ready(view.config.model).archive(view.id, merged=merged, dtype=dtype)
    told = {"file": done.files[-1].name, "download": desk.hand_out(done.files[-1]), "proof": done.proof.as_json()}
    return told | ({"rounding": done.rounding.as_json()} if done.rounding else {})


compare.__annotations__["return"] = tuple[str, str]  # Gradio reads the type of one yield
compare_runs.__annotations__["return"] = list[str]


def _method(name: str, width: int, rank: int, targets: str) -> Method:
    chosen = tuple(filter(None, (role.strip() for role in targets.split(","))))
    if not chosen and name == "lora":
        raise StudioError("E_TARGETS", "No matrix is named.", "Give roles such as attn.q,attn.v or all-linear.")
    return method_of(name, width, {"rank": rank, "targets": chosen})
