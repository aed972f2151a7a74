"""The same work without a browser. With --json, stdout carries JSON and nothing else; logs go to stderr.

Exit codes: 0 success, 1 a StudioError (its code and hint on stderr) or a run that failed, 2 bad usage.
"""

import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError
from lora_studio.events import Ended, to_line
from lora_studio.fields import Knob, knobs
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.settings import Sampling, TrainConfig
from lora_studio.studio import Studio, run_as_json

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Fine-tune a language model with LoRA.")

Root = Annotated[Path | None, typer.Option(help="Folder of runs, datasets and models (default: LORA_STUDIO_ROOT).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Model = Annotated[str, typer.Option(help="starter, a catalogue name, a Hub id or a local folder.")]
Data = Annotated[str, typer.Option(help="A file, orders, plain_english, tickets, or a Hub dataset.")]
Format = Annotated[str, typer.Option(help="How to read the rows, when the guess is wrong.")]
Column = Annotated[list[str] | None, typer.Option(help="ROLE=COLUMN, as often as needed.")]
SHORT = {"learning_rate": "--lr"}  # names that people expect


def with_knobs(*configs: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per knob; their values arrive in its `knobs` dict."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [entry for entry in inspect.signature(command).parameters.values() if entry.name != "settings"]
        options = [_option(setting) for config in configs for setting in knobs(config).values()]
        names = {option.name for option in options}

        def run(**given: Any) -> None:
            settings = {name: given.pop(name) for name in names}
            command(**given, settings=settings)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {entry.name: entry.annotation for entry in (*own, *options)}
        return run

    return decorate


def _option(setting: Knob) -> inspect.Parameter:
    flags = [f"--{setting.name.replace('_', '-')}", *filter(None, [SHORT.get(setting.name)])]
    several = isinstance(setting.default, tuple)
    kind = str if several else setting.type
    default = ",".join(map(str, setting.default)) if several else setting.default
    choices = f" [{', '.join(setting.choices)}]" if setting.choices else ""
    about = typer.Option(*flags, help=f"{setting.help}{choices}.")
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, about]
    )


def pick(config: type, settings: dict[str, Any]) -> Any:
    """The part of the options that belongs to one config; comma lists become tuples."""
    values = {}
    for name, setting in knobs(config).items():
        value = settings[name]
        if isinstance(setting.default, tuple):
            words = [word.strip() for word in value.split(",") if word.strip()]
            value = tuple(int(word) if name == "layers" and word.isdigit() else word for word in words)
        values[name] = value
    return config(**values)


# ---- commands --------------------------------------------------------------------------------------------------------


@app.command()
@with_knobs(LoraSpec, TrainConfig)
def plan(
    settings: dict[str, Any],
    model: Model = "starter",
    data: Data = "",
    as_json: Json = False,
    root: Root = None,
) -> None:
    """What would be adapted, and what it would cost."""
    studio = Studio(root)
    choice = _choice(studio, data, "", None) if data else None
    result = studio.plan(model, pick(LoraSpec, settings), pick(TrainConfig, settings), choice).as_json()
    if as_json:
        return _print_json(result)
    for target in result["targets"]:
        print(f"{target['name']:48} {target['role']:10} {target['shape']!s:14} {target['parameters']:>10,}")
    share = 100 * result["trainable"] / result["total"]
    peak, minutes = result["memory_bytes"]["peak"] / 2**30, result["seconds"] / 60
    print(f"{result['trainable']:,} trainable of {result['total']:,} ({share:.2f} %)", end=" · ")
    print(f"adapter {result['adapter_bytes'] / 2**20:.1f} MB · about {peak:.1f} GB · about {minutes:.1f} min")


@app.command("data")
def inspect_data(
    file: Annotated[str, typer.Argument(help="A file, a sample's name or a Hub dataset.")],
    model: Model = "starter",
    max_length: Annotated[int, typer.Option(help="Tokens per example.")] = 512,
    format: Format = "",
    column: Column = None,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """What was understood of a dataset, and how long its rows are."""
    studio = Studio(root)
    choice = _choice(studio, file, format, column)
    result = studio.inspect(choice, model, TrainConfig(max_length=max_length)).as_json()
    if as_json:
        return _print_json(result)
    columns = ", ".join(f"{role} from {name}" for role, name in result["columns"].items())
    print(f"{result['name']}: {result['rows']} rows, {result['format']} ({columns})")
    print(f"train {result['train']}, held out {result['heldout']}")
    tokens = result["tokens"]
    print(f"tokens: median {tokens['median']}, 95 % below {tokens['p95']}, longest {tokens['max']}")
    print(f"supervised tokens {result['supervised_tokens']}, rows cut {result['cut']}")
    for warning in result["warnings"]:
        print(f"note: {warning}")


@app.command()
@with_knobs(LoraSpec, TrainConfig)
def train(
    data: Data,
    settings: dict[str, Any],
    model: Model = "starter",
    name: Annotated[str, typer.Option(help="Shown in the run list.")] = "",
    format: Format = "",
    column: Column = None,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """Queue a run, wait for it and print its events. Ctrl-C stops it and keeps what it has."""
    studio = Studio(root)
    choice = _choice(studio, data, format, column)
    spec = pick(LoraSpec, settings)
    config = RunConfig(
        name=name or f"{choice.name} r{spec.rank}",
        model=model,
        dataset=choice,
        method=spec,
        train=pick(TrainConfig, settings),
    )
    run = studio.start(config)
    if not as_json:
        print(f"run {run.id}")
    try:
        _follow(studio, run, as_json)
    except KeyboardInterrupt:
        print("stopping after this step and keeping the adapter", file=sys.stderr)
        studio.stop(run.id)
        _follow(studio, run, as_json, start=len(studio.runs.events(run.id)))
    end = studio.runs.get(run.id)
    if end.status not in ("done", "stopped"):
        error = end.error or {}
        raise StudioError(error.get("code", "E_LOST"), error.get("message", end.status), error.get("hint", ""))


@app.command()
def runs(as_json: Json = False, root: Root = None) -> None:
    """All runs, newest first."""
    every = Studio(root).runs.list()
    if as_json:
        return _print_json([run_as_json(run) for run in every])
    for run in every:
        loss = run.latest.get("heldout_loss")
        figure = f"held-out loss {loss:.3f}" if loss is not None else ""
        reason = run.error["message"] if run.error else ""
        print(f"{run.id[:8]}  {run.status:8} {run.step:>5}/{run.steps:<5} {run.name:28} {figure} {reason}")


@app.command()
def stop(run: str, root: Root = None) -> None:
    """Stop a run after its current step and keep its adapter."""
    studio = Studio(root)
    studio.stop(studio.runs.get(run).id)


@app.command()
@with_knobs(Sampling)
def compare(
    run: Annotated[list[str], typer.Argument(help="One run or several on the same base model.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    settings: dict[str, Any],
    strength: Annotated[float, typer.Option(help="0 is the base model, 1 the adapter as trained.")] = 1.0,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """The base model's answer and the adapted one, from one batch."""
    studio = Studio(root)
    chosen = [studio.runs.get(one).id for one in run]
    last = None
    for last in studio.compare(chosen, prompt, strength=strength, sampling=pick(Sampling, settings)):  # noqa: B007
        pass
    assert last is not None, "a comparison always has a last moment"
    answers = [
        {"name": name, "text": answer.text, "tokens": answer.tokens}
        for name, answer in zip(last.names, last.answers, strict=True)
    ]
    if as_json:
        return _print_json({"prompt": prompt, "answers": answers, "base_difference": last.base_difference})
    for answer in answers:
        print(f"--- {answer['name']} ({answer['tokens']} tokens)\n{answer['text']}")


@app.command("eval")
def evaluate(
    run: str,
    data: Annotated[str, typer.Option(help="Another dataset; default: the run's held-out rows.")] = "",
    limit: Annotated[int, typer.Option(help="Most rows to measure.")] = 200,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """Base against adapted: loss, perplexity, and exact match, ROUGE-L, BLEU or accuracy."""
    studio = Studio(root)
    choice = _choice(studio, data, "", None) if data else None
    result = studio.evaluate(studio.runs.get(run).id, choice, limit)
    if as_json:
        return _print_json(result)
    print(f"{result['rows']} rows            base    adapted")
    for name, base in result["base"].items():
        print(f"{name:12} {_figure(base)} {_figure(result['adapted'][name])}")
    if result["capped"]:
        print(f"{result['capped']} answers are longer than what was generated")


@app.command()
def export(
    run: str,
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    merged: Annotated[bool, typer.Option("--merged", help="The whole model with the adapter folded in.")] = False,
    archive: Annotated[bool, typer.Option("--archive", help="Also a zip beside the folder.")] = False,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """Write the adapter in PEFT's layout, or the merged model."""
    studio = Studio(root)
    files = [str(path) for path in studio.export(studio.runs.get(run).id, to, merged=merged, archive=archive)]
    if as_json:
        return _print_json({"files": files})
    print("\n".join(files))


@app.command()
def models(as_json: Json = False) -> None:
    """The catalogue of base models, and which fit this machine."""
    from lora_studio.models import CATALOGUE, fit

    if as_json:
        return _print_json([asdict(entry) | {"fit": fit(entry.parameters)} for entry in CATALOGUE.values()])
    for entry in CATALOGUE.values():
        size, fits = f"{entry.parameters / 1e6:,.0f} M", fit(entry.parameters)
        print(f"{entry.name:16} {size:>8}  {fits:8} {entry.licence:20} {entry.repo}")


@app.command()
def fetch(model: Annotated[str, typer.Argument()] = "starter", root: Root = None) -> None:
    """Put a model on this machine, so that later work needs no network."""
    folder = Studio(root).models.fetch(model, say=lambda message: print(message, file=sys.stderr, flush=True))
    print(folder)


# ---- inside ----------------------------------------------------------------------------------------------------------


def _choice(studio: Studio, data: str, format: str, column: list[str] | None) -> DataChoice:
    pairs = [pair.partition("=") for pair in column or []]
    wrong = [role for role, equals, _ in pairs if not equals]
    if wrong:
        raise typer.BadParameter(f"--column wants ROLE=COLUMN, got {wrong[0]!r}")
    dataset = studio.data.find(data)
    return DataChoice(id=dataset.id, name=dataset.name, format=format, columns={role: name for role, _, name in pairs})


def _follow(studio: Studio, run: Run, as_json: bool, start: int = 0) -> None:
    """Print a run's events until it has ended; a lost run gets the Ended line that its worker could not write."""
    last: dict[str, Any] = {}
    for last in studio.follow(run.id, start):
        print(json.dumps(last, ensure_ascii=False) if as_json else _sentence(last), flush=True)
    end = studio.runs.get(run.id)
    if as_json and last.get("type") != "Ended":
        print(
            to_line(Ended(step=end.step, run=run.id, status=end.status, error=end.error), time=time.time(), attempt=1)
        )


def _sentence(event: dict[str, Any]) -> str:
    step = f"step {event['step']:>4}"
    if event["type"] == "Metric":
        return step + "".join(f"  {name} {value:.4g}" for name, value in event["values"].items() if value is not None)
    if event["type"] == "Sample":
        return f"{step}  sample {event['index'] + 1}: {event['text']!r}"
    if event["type"] == "Started":
        sizes = f"{event['steps']} steps, {event['trainable']:,} of {event['total']:,} parameters"
        return f"{sizes}, {event['precision']} on {event['device']}"
    if event["type"] == "Saved":
        return f"{step}  saved, the best so far"
    if event["type"] == "Warned":
        return event["message"]
    return f"{event['status']} at {step}"


def _figure(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:10.4f}"


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def main() -> None:
    """Run a command; a StudioError becomes two lines on stderr and exit code 1."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except StudioError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        sys.exit(1)
