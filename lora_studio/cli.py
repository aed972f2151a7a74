"""The same work without a browser. With --json, stdout carries JSON and nothing else; logs go to stderr.

Exit codes: 0 success, 1 a StudioError (its code and hint on stderr) or a run that failed, 2 bad usage.
"""

import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from lora_studio.core.spec import BASELINES, METHODS, LoraSpec, Method
from lora_studio.errors import StudioError
from lora_studio.events import Ended, to_line
from lora_studio.fields import Knob, build, knobs
from lora_studio.results import run_as_json
from lora_studio.runs.config import TASKS, DataChoice, Run, RunConfig, method_of, short
from lora_studio.settings import Sampling, TrainConfig
from lora_studio.studio import Studio
from lora_studio.study import in_words, parse_ranks, parse_rates, parse_targets

# markup would take a list in brackets for a style, and show nothing
app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, help="Fine-tune a language model with LoRA."
)

Root = Annotated[Path | None, typer.Option(help="Folder of runs, datasets and models (default: LORA_STUDIO_ROOT).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Model = Annotated[str, typer.Option(help="starter, a catalogue name, a Hub id or a local folder.")]
Data = Annotated[str, typer.Option(help="A file, orders, plain_english, tickets, or a Hub dataset.")]
Format = Annotated[str, typer.Option(help="How to read the rows, when the guess is wrong.")]
Column = Annotated[list[str] | None, typer.Option(help="ROLE=COLUMN, as often as needed.")]
WIDTHS = ", ".join(f"{means} of {kind} ({usual})" for kind, (_, means, usual) in BASELINES.items() if means)
MethodName = Annotated[
    str, typer.Option(help=f"How the model is adapted [{', '.join(METHODS)}]; full and top have a lower default rate.")
]
Width = Annotated[int, typer.Option(help=f"{WIDTHS}; 0 takes what stands in brackets.")]
Task = Annotated[str, typer.Option(help=f"Write text or choose a label [{', '.join(('auto', *TASKS))}].")]
SHORT = {"learning_rate": "--lr"}  # names that people expect
USUAL = ("learning_rate",)  # without a value they are what is usual for the method


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
    several = isinstance(setting.default, (tuple, Mapping))
    kind = str if several else setting.type
    default = "" if several and not setting.default else ",".join(setting.default) if several else setting.default
    if setting.name in USUAL:
        kind, default = float | None, None
    choices = f" [{', '.join(setting.choices)}]" if setting.choices else ""
    about = typer.Option(*flags, help=f"{setting.help}{choices}.")
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, about]
    )


def pick(config: type, settings: Mapping[str, Any]) -> Any:
    """The part of the options that belongs to one config."""
    return config(**_values(config, settings))


def _values(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Its values: comma lists become tuples, and with NAME=NUMBER mappings."""
    given = {name: setting for name, setting in knobs(config).items() if settings[name] is not None}
    return {name: _parse(setting, settings[name]) for name, setting in given.items()}


def _training(settings: Mapping[str, Any], method: str) -> TrainConfig:
    """The training that the options describe: at the method's usual learning rate unless one is given, and for so
    many epochs, if they are given, instead of the default's steps.
    """
    config = pick(TrainConfig, settings)
    if config.epochs and config.steps == TrainConfig.steps:
        config = replace(config, steps=0)
    return config if settings["learning_rate"] is not None else config.at_usual_rate_of(method)


def _parse(setting: Knob, value: Any) -> Any:
    if not isinstance(setting.default, (tuple, Mapping)):
        return value
    words = [word.strip() for word in value.split(",") if word.strip()]
    if isinstance(setting.default, tuple):
        return tuple(int(word) if setting.name == "layers" and word.isdigit() else word for word in words)
    pairs = [word.rpartition("=") for word in words]
    return {name.strip(): _number(number, get_args(setting.type)[1]) for name, _, number in pairs}


def _number(text: str, kind: type) -> Any:
    """The text as a number of this kind, or as it is, for the checks to refuse in words."""
    try:
        return kind(text)
    except ValueError:
        return text


def _method(name: str, width: int, settings: Mapping[str, Any]) -> Method:
    """What the options describe. Raises E_METHOD also for settings of LoRA that another method would not look at."""
    lora = _values(LoraSpec, settings)
    set_too = [knob for knob, setting in knobs(LoraSpec).items() if lora[knob] != setting.default]
    if name in BASELINES and set_too:
        option = f"--{set_too[0].replace('_', '-')}"
        raise StudioError("E_METHOD", f"{option} is a setting of LoRA, and the method is {name}.", "Leave it out.")
    return method_of(name, width, lora)


# ---- commands --------------------------------------------------------------------------------------------------------


@app.command()
@with_knobs(LoraSpec, TrainConfig)
def plan(
    settings: dict[str, Any],
    model: Model = "starter",
    data: Data = "",
    method: MethodName = "lora",
    width: Width = 0,
    task: Task = "auto",
    as_json: Json = False,
    root: Root = None,
) -> None:
    """What would be adapted, and what it would cost."""
    studio = Studio(root)
    choice = _choice(studio, data, "", None) if data else None
    chosen, task = _method(method, width, settings), studio.task(model, choice, task)
    config = _training(settings, method)
    result = studio.plan(model, chosen, config, choice, task).as_json()
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
    task: Task = "auto",
    as_json: Json = False,
    root: Root = None,
) -> None:
    """What was understood of a dataset, and how long its rows are."""
    studio = Studio(root)
    choice = _choice(studio, file, format, column)
    config = build(TrainConfig, {"max_length": max_length})
    result = studio.inspect(choice, model, config, studio.task(model, choice, task)).as_json()
    if as_json:
        return _print_json(result)
    columns = ", ".join(f"{role} from {name}" for role, name in result["columns"].items())
    print(f"{result['name']}: {result['rows']} rows, {result['format']} ({columns})")
    print(result["health"]["sentence"])
    print(f"train {result['train']}, held out {result['heldout']}")
    tokens = result["tokens"]
    print(f"tokens: median {tokens['median']}, 95 % below {tokens['p95']}, longest {tokens['max']}")
    print(f"supervised tokens {result['supervised_tokens']}, rows cut {result['cut']}")
    health = result["health"]
    print(f"duplicates {health['duplicates']} and {health['near_duplicates']} near, left out {health['empty']}")
    for cost in health["limits"]:
        print(
            f"at {cost['limit']:,} tokens: {cost['cut_answers']:,} answers cut, "
            f"{cost['supervised_tokens_lost']:,} supervised tokens lost"
        )
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
    method: MethodName = "lora",
    width: Width = 0,
    task: Task = "auto",
    as_json: Json = False,
    root: Root = None,
) -> None:
    """Queue a run, wait for it and print its events. Ctrl-C stops it and keeps what it has."""
    studio = Studio(root)
    choice = _choice(studio, data, format, column)
    chosen = _method(method, width, settings)
    config = RunConfig(
        name=name or f"{choice.name} {short(chosen)}",
        model=model,
        task=studio.task(model, choice, task),
        dataset=choice,
        method=chosen,
        train=_training(settings, method),
    )
    run = studio.start(config)
    if not as_json:
        print(f"run {run.id}")
    _follow_to_its_end(studio, run, as_json)


@app.command()
@with_knobs(LoraSpec, TrainConfig)
def sweep(
    data: Data,
    settings: dict[str, Any],
    ranks: Annotated[str, typer.Option(help="Columns of the table, such as 1,2,4,8.")] = "1,2,4,8",
    targets_grid: Annotated[
        str, typer.Option(help="Its rows, such as 'attn.q; attn.q,attn.v; all-linear'; none takes --targets alone.")
    ] = "",
    rates: Annotated[str, typer.Option(help="Learning rates to try in each cell; none takes --lr alone.")] = "",
    model: Model = "starter",
    name: Annotated[str, typer.Option(help="Begins the names of the runs.")] = "",
    format: Format = "",
    column: Column = None,
    task: Task = "auto",
    as_json: Json = False,
    root: Root = None,
) -> None:
    """A study: train every rank with every choice of matrices, and print the table. Ctrl-C stops and keeps all.

    alpha keeps its ratio to the rank, so that each cell has the same scale.
    """
    studio = Studio(root)
    asked = parse_ranks(ranks), parse_targets(targets_grid), parse_rates(rates)
    choice = _choice(studio, data, format, column)
    method = _method("lora", 0, settings)
    assert isinstance(method, LoraSpec)
    config = RunConfig(
        name=name,
        model=model,
        task=studio.task(model, choice, task),
        dataset=choice,
        method=method,
        train=_training(settings, "lora"),
    )
    runs = studio.sweep(config, asked[0], asked[1] or [method.targets], asked[2])
    study = runs[0].config.study
    if not as_json:
        print(f"study {study}, {len(runs)} runs")
    try:
        _follow_study(studio, study, as_json)
    except KeyboardInterrupt:
        print("stopping after this step and keeping the adapters", file=sys.stderr)
        for run in runs:
            studio.stop(run.id)
        for _ in studio.follow_study(study):
            pass
    told = studio.study(study)
    print(json.dumps({"type": "Study", **told.as_json()}, ensure_ascii=False) if as_json else in_words(told))
    broken = [cell for cell in told.every if cell.status in ("failed", "lost")]
    if broken:
        message = f"{len(broken)} of {len(runs)} runs did not end well; the first is {broken[0].name!r}."
        raise StudioError("E_STUDY_RUNS", f"{message} {broken[0].error}".strip(), "`runs` shows each with its reason.")


@app.command()
def runs(as_json: Json = False, root: Root = None) -> None:
    """All runs, newest first."""
    every = Studio(root).runs.list()
    if as_json:
        return _print_json([run_as_json(run) for run in every])
    for run in every:
        loss = run.latest.get("heldout_loss")
        figure = f"held-out loss {loss:.3f}" if loss is not None else ""
        reason = run.error["message"] if run.error else "brought along" if run.brought else ""
        print(f"{run.id[:8]}  {run.status:8} {run.step:>5}/{run.steps:<5} {run.name:28} {figure} {reason}")


@app.command()
def stop(run: str, root: Root = None) -> None:
    """Stop a run after its current step and keep its adapter."""
    studio = Studio(root)
    studio.stop(studio.runs.get(run).id)


@app.command()
def pause(run: str, root: Root = None) -> None:
    """Pause a run after its current step; `resume` goes on exactly there."""
    studio = Studio(root)
    studio.pause(studio.runs.get(run).id)


@app.command()
def resume(run: str, as_json: Json = False, root: Root = None) -> None:
    """Go on with a run that was paused, stopped or lost, and print its events. Ctrl-C stops it again."""
    studio = Studio(root)
    told = len(studio.runs.events(run))
    _follow_to_its_end(studio, studio.resume(run), as_json, told)


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
    """The base model's answer and the adapted one, from one batch; of classifiers the chance of each label."""
    studio = Studio(root)
    chosen = [studio.runs.get(one).id for one in run]
    last = None
    for last in studio.compare(chosen, prompt, strength=strength, sampling=pick(Sampling, settings)):  # noqa: B007
        pass
    assert last is not None, "a comparison always has a last moment"
    answers: list[dict[str, Any]] = [
        {"name": name, "text": answer.text, "tokens": answer.tokens}
        for name, answer in zip(last.names, last.answers, strict=True)
    ]
    for answer, chances in zip(answers, last.chances, strict=False):
        answer["chances"] = chances
    if as_json:
        return _print_json({"prompt": prompt, "answers": answers, "base_difference": last.base_difference})
    for answer in answers:
        size = "" if "chances" in answer else f" ({answer['tokens']} tokens)"
        print(f"--- {answer['name']}{size}\n{answer['text']}")


@app.command("eval")
def evaluate(
    run: str,
    data: Annotated[str, typer.Option(help="Another dataset; default: the run's held-out rows.")] = "",
    limit: Annotated[int, typer.Option(help="Most rows to measure.", min=1)] = 200,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """Base against adapted: loss, perplexity, and exact match, ROUGE-L, BLEU or accuracy."""
    studio = Studio(root)
    choice = _choice(studio, data, "", None) if data else None
    id = studio.runs.get(run).id
    learned = studio.learned(id)
    result: dict[str, Any] = {**studio.evaluate(id, choice, limit), "learned": learned}
    if as_json:
        return _print_json(result)
    print(f"{result['rows']} rows            base    adapted")
    for name, base in result["base"].items():
        print(f"{name:12} {_figure(base)} {_figure(result['adapted'][name])}")
    if result["capped"]:
        print(f"{result['capped']} answers are longer than what was generated")
    if learned:
        print(_sentence(dict(learned)))


@app.command()
def analyze(
    run: str,
    other: Annotated[str, typer.Argument(metavar="[RUN2]", help="Another run, to compare its directions with.")] = "",
    ranks: Annotated[bool, typer.Option("--ranks", help="Also the held-out loss at smaller ranks.")] = False,
    smaller: Annotated[int, typer.Option(help="Save the adapter cut to this rank, in the folder --to.")] = 0,
    to: Annotated[Path | None, typer.Option(help="Folder for the smaller adapter.")] = None,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """Inside an adapter: how much each matrix changed, in how many directions, and what that amplifies."""
    if bool(smaller) != bool(to):
        raise typer.BadParameter("--smaller RANK and --to DIR go together")
    studio = Studio(root)
    id = studio.runs.get(run).id
    result = studio.inside(id, studio.runs.get(other).id if other else None).as_json()
    if ranks:
        result["ranks"] = [moment.as_json() for moment in studio.rank_curve(id)][-1]
    if to:
        done = studio.smaller(id, smaller, to)
        result |= {"files": [str(path) for path in done.files], "proof": done.proof.as_json()}
    if as_json:
        return _print_json(result)
    _print_analysis(result)
    if to:
        print(f"Proof {done.proof.verdict}. {done.proof.sentence}")


@app.command()
def export(
    run: str,
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    merged: Annotated[bool, typer.Option("--merged", help="The whole model with the adapter folded in.")] = False,
    archive: Annotated[bool, typer.Option("--archive", help="Also a zip beside the folder.")] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the merged weights: float32, bfloat16 or float16; as loaded here by default.")
    ] = "",
    as_json: Json = False,
    root: Root = None,
) -> None:
    """Write the adapter, in PEFT's layout when it is LoRA, or the merged model."""
    studio = Studio(root)
    if dtype and not merged:
        raise StudioError(
            "E_DTYPE", "Only merged weights are written in another type.", "Add --merged, or leave it out."
        )
    done = studio.export(studio.runs.get(run).id, to, merged=merged, archive=archive, dtype=dtype)
    files = [str(path) for path in done.files]
    if as_json:
        rounding = {"rounding": done.rounding.as_json()} if done.rounding else {}
        return _print_json({"files": files, "proof": done.proof.as_json(), **rounding})
    print("\n".join(files))
    if done.rounding:
        print(done.rounding.sentence)
    print(f"Proof {done.proof.verdict}. {done.proof.sentence}")


@app.command()
def combine(
    run: Annotated[list[str], typer.Argument(help="Runs of LoRA on the same base model.")],
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    weights: Annotated[str, typer.Option(help="One number per run, such as 0.5,0.5; equal shares by default.")] = "",
    rank: Annotated[int, typer.Option(min=0, help="Cut to the nearest of this rank; 0 keeps the exact sum.")] = 0,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """One adapter out of several: their weighted sum."""
    studio = Studio(root)
    shares = [_number(word, float) for word in weights.split(",")] if weights else [1 / len(run)] * len(run)
    wrong = [share for share in shares if isinstance(share, str)]
    if wrong:
        raise typer.BadParameter(f"--weights wants numbers with commas between them, got {wrong[0]!r}")
    done = studio.combine(run, shares, to, rank=rank or None)
    files = [str(path) for path in done.files]
    if as_json:
        return _print_json({"files": files, "proof": done.proof.as_json()})
    print("\n".join(files))
    print(f"Proof {done.proof.verdict}. {done.proof.sentence}")


@app.command()
def report(
    run: str,
    to: Annotated[Path, typer.Option(help="The file to write, such as report.html.")],
    as_json: Json = False,
    root: Root = None,
) -> None:
    """One HTML file about a run: curves, answers, data, settings. It opens offline, and quotes held-out rows."""
    studio = Studio(root)
    file = str(studio.report(studio.runs.get(run).id, to))
    if as_json:
        return _print_json({"files": [file]})
    print(file)


@app.command()
def adopt(
    folder: Annotated[Path, typer.Argument(help="Holds adapter_config.json and adapter_model.safetensors.")],
    model: Model = "starter",
    name: Annotated[str, typer.Option(help="Shown in the run list.")] = "",
    as_json: Json = False,
    root: Root = None,
) -> None:
    """Bring an adapter that was made elsewhere, in PEFT's layout, into the run list; --model is its base."""
    studio = Studio(root)
    run = studio.adopt(folder, model, name)
    if as_json:
        return _print_json(run_as_json(run))
    print(f"run {run.id}")


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


def _follow_to_its_end(studio: Studio, run: Run, as_json: bool, start: int = 0) -> None:
    """Print a run's events from number `start` on; Ctrl-C stops it. Raises what it failed with."""
    try:
        _follow(studio, run, as_json, start)
    except KeyboardInterrupt:
        print("stopping after this step and keeping the adapter", file=sys.stderr)
        studio.stop(run.id)
        _follow(studio, run, as_json, start=len(studio.runs.events(run.id)))
    end = studio.runs.get(run.id)
    if end.status not in ("done", "stopped", "paused"):
        error = end.error or {}
        raise StudioError(error.get("code", "E_LOST"), error.get("message", end.status), error.get("hint", ""))


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


def _follow_study(studio: Studio, study: str, as_json: bool) -> None:
    """Print the events of all runs of a study; for people, each run's first, measured and last ones."""
    names = {run.id: run.name for run in studio.studies()[study]}
    for event in studio.follow_study(study):
        if as_json:
            print(json.dumps(event, ensure_ascii=False), flush=True)
        elif event["type"] in ("Started", "Ended") or "heldout_loss" in event.get("values", {}):
            print(f"{names.get(event['run'], event['run'][:8]):24} {_sentence(event)}", flush=True)


def _sentence(event: dict[str, Any]) -> str:
    step = f"step {event['step']:>4}"
    if event["type"] == "Metric":
        return step + "".join(f"  {name} {value:.4g}" for name, value in event["values"].items() if value is not None)
    if event["type"] == "Sample":
        return f"{step}  sample {event['index'] + 1}: {event['text']!r}"
    if event["type"] == "Started":
        sizes = f"{event['steps']} steps, {event['trainable']:,} of {event['total']:,} parameters"
        return f"{sizes}, {event['precision']} on {event['device']}"
    if event["type"] == "Probed":
        cut = f", in {event['accumulate']} parts" if event["accumulate"] > 1 else ""
        figures = f"{event['memory_bytes'] / 2**30:.1f} GB, {event['seconds_step']:.1f} s"
        return f"measured: {figures} for the heaviest step{cut}, about {event['seconds']:.0f} s in all"
    if event["type"] == "Saved":
        return f"{step}  saved, the best so far"
    if event["type"] == "Warned":
        return event["message"]
    if event["type"] == "Learned":
        return f"{event['sentence']} {event['advice']}"
    return f"{event['status']} at {step}"


def _print_analysis(result: dict[str, Any]) -> None:
    from lora_studio.charts import percent

    print(f"{'matrix':44} {'role':10} {'change':>9} {'effective rank':>15} {'99 % in':>8} {'amplifies':>10}")
    for module, row in zip(result["modules"], result["amplification"], strict=True):
        change = percent(module["relative_norm"])
        rank = f"{module['effective_rank']:.1f} of {len(module['singular_values'])}"
        factor = "-" if row["factor"] is None else f"{row['factor']:.3g}x"
        print(f"{module['name']:44} {module['role']:10} {change:>9} {rank:>15} {module['rank99']:>8} {factor:>10}")
    if result["similarity"]:
        print("\nshared directions      first of each (by chance)   all (by chance)")
        for one in result["similarity"]["modules"]:
            phi, chance = one["phi_update"], one["baseline"]
            if phi:
                whole = chance[len(phi) - 1][len(phi[0]) - 1]
                print(f"{one['name']:44} {phi[0][0]:.3f} ({chance[0][0]:.3f})  {phi[-1][-1]:.3f} ({whole:.3f})")
    for point in result.get("ranks", {}).get("points", []):
        good = "  keeps 99 % of the gain" if point["rank"] == result["ranks"]["smallest"] else ""
        loss, size = _figure(point["loss"]), f"{point['parameters']:,} parameters"
        print(f"rank {point['rank']:>4}  held-out loss {loss}  {size:>24}{good}")
    print("\n".join(result.get("files", [])), end="\n" if "files" in result else "")


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
