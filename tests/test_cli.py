"""The command line as a user runs it: JSON alone on stdout, codes and hints on stderr, exit codes 0, 1, 2."""

import io
import json
import os
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from lora_studio import cli
from lora_studio.card import command_line
from lora_studio.core.spec import BaselineSpec, LoraSpec, Method
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from tests.tiny import tiny_encoder

ROOT = Path(__file__).parents[1]


def process(*words: str, root: Path, stop_after_s: float = 120) -> subprocess.CompletedProcess[str]:
    """A process of its own, as a user starts it."""
    environment = os.environ | {"LORA_STUDIO_ROOT": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lora_studio", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=stop_after_s, check=False
    )


def run(*words: str, root: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has the libraries loaded."""
    out, err = io.StringIO(), io.StringIO()
    asked = patch.object(sys, "argv", ["lora_studio", *words])
    with asked, patch.dict(os.environ, LORA_STUDIO_ROOT=str(root)), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            return subprocess.CompletedProcess(words, int(end.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("typer ends with SystemExit")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studio")


@pytest.fixture(scope="module")
def trained(home: Path, tiny: Path) -> list[dict]:
    """The events of one run on a file with prompts and answers."""
    rows = [json.dumps({"question": f"say {n}", "answer": "ab" * (1 + n % 3)}) for n in range(20)]
    (home / "rows.jsonl").write_text("\n".join(rows))
    words = ["--steps", "30", "--lr", "0.1", "--targets", "all-linear", "--batch-size", "4", "--evaluations", "2"]
    done = process("train", "--model", str(tiny), "--data", str(home / "rows.jsonl"), "--json", *words, root=home)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_train_prints_one_event_a_line_and_ends_with_the_run_and_its_status(trained: list[dict]) -> None:
    assert {"type", "step", "time", "attempt"} <= set(trained[0])
    assert trained[-1]["type"] == "Ended" and trained[-1]["status"] == "done" and len(trained[-1]["run"]) == 32
    metrics = [event for event in trained if event["type"] == "Metric"]
    assert {event["step"] for event in metrics} == set(range(31)) and all("values" in event for event in metrics)


def test_runs_lists_it(trained: list[dict], home: Path, tiny: Path) -> None:
    (entry,) = json.loads(run("runs", "--json", root=home).stdout)
    assert {"id", "name", "status", "step", "steps", "model", "error", "created"} <= set(entry)
    assert (entry["id"], entry["status"], entry["model"]) == (trained[-1]["run"], "done", str(tiny))


def test_compare_gives_both_answers_and_the_base_is_the_untouched_models(
    trained: list[dict], home: Path, tiny: Path
) -> None:
    import torch
    import transformers

    id = trained[-1]["run"]
    done = process("compare", id[:8], "--prompt", "say 3", "--max-new-tokens", "16", "--json", root=home)
    result = json.loads(done.stdout)
    base, adapted = result["answers"]
    assert (base["name"], adapted["name"], result["prompt"], result["base_difference"]) == ("base", id, "say 3", 0.0)
    assert base["text"] != adapted["text"] and base["tokens"] and adapted["tokens"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(tiny)
    asked = words.apply_chat_template(
        [{"role": "user", "content": "say 3"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**asked, max_new_tokens=16, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert base["text"] == words.decode(ids, skip_special_tokens=True).strip("\n")
    zero = json.loads(
        run("compare", id, "--prompt", "say 3", "--max-new-tokens", "16", "--strength", "0", "--json", root=home).stdout
    )
    assert zero["answers"][0]["text"] == zero["answers"][1]["text"] == base["text"]


def test_eval_and_export_and_data_and_plan_print_their_shapes(trained: list[dict], home: Path, tiny: Path) -> None:
    id = trained[-1]["run"]
    figures = json.loads(run("eval", id, "--json", root=home).stdout)
    assert figures["rows"] == 2 and set(figures["base"]) == set(figures["adapted"]) == {
        "loss",
        "perplexity",
        "exact_match",
        "rouge_l",
        "bleu",
    }
    assert figures["adapted"]["loss"] < figures["base"]["loss"]
    files = json.loads(run("export", id, "--to", str(home / "out"), "--archive", "--json", root=home).stdout)["files"]
    assert all(Path(file).is_file() for file in files) and files[-1].endswith("out.zip")
    seen = json.loads(run("data", str(home / "rows.jsonl"), "--model", str(tiny), "--json", root=home).stdout)
    assert (seen["format"], seen["rows"], seen["train"], seen["heldout"]) == ("prompt_completion", 20, 18, 2)
    assert {"median", "p95", "max"} == set(seen["tokens"]) and {
        "columns",
        "cut",
        "supervised_tokens",
        "warnings",
    } <= set(seen)
    plan = json.loads(run("plan", "--model", str(tiny), "--rank", "4", "--json", root=home).stdout)
    assert plan["trainable"] == sum(target["parameters"] for target in plan["targets"])
    assert (
        {"name", "role", "shape", "parameters"} == set(plan["targets"][0])
        and plan["memory_bytes"]["peak"]
        and plan["seconds"]
    )


def test_the_line_that_repeats_a_run_repeats_it(trained: list[dict], home: Path) -> None:
    words = shlex.split(command_line(Studio(home).runs.get(trained[-1]["run"])))
    assert words[:4] == ["python", "-m", "lora_studio", "train"]
    again = [json.loads(line) for line in run(*words[3:], "--json", root=home).stdout.splitlines()]
    losses = [
        [
            event["values"]["train_loss"]
            for event in events
            if event["type"] == "Metric" and "train_loss" in event["values"]
        ]
        for events in (trained, again)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "method",
    [
        LoraSpec(rank=3, variant="dora", layers=(0, 1), rank_pattern={"attn.q": 2}, alpha_pattern={"mlp.up": 0.5}),
        LoraSpec(targets=("embed", "all-linear"), modules_to_save=("score",)),
        *(BaselineSpec(kind=kind) for kind in ("full", "bitfit", "adapter_l")),
        BaselineSpec(kind="top", width=1),
    ],
)
@pytest.mark.parametrize("task", ["causal", "classify"])
def test_the_line_that_repeats_a_run_asks_for_the_same(
    home: Path, tiny: Path, method: Method, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Studio(home).data.add_text('{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}')
    config = RunConfig(
        name="n",
        model=str(tiny),
        task=task,
        dataset=DataChoice(id=dataset.id, name=dataset.name),
        method=method,
        train=TrainConfig(steps=3, learning_rate=1e-4, schedule="cosine", lr_ratio_b=4.0),
    )
    run = Run(id="1" * 32, path=home, config=config, status="done", created=0.0)
    started: list[RunConfig] = []

    def start(_: Studio, again: RunConfig) -> Run:
        started.append(again)
        return run

    monkeypatch.setattr(Studio, "start", start)
    monkeypatch.setattr(cli, "_follow", lambda *_: None)
    monkeypatch.setattr("lora_studio.runs.store.RunStore.get", lambda *_: run)
    words = [*shlex.split(command_line(run))[3:], "--root", str(home), "--name", "n"]
    done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert replace(started[0], method=config.method) == config  # heads are added when it starts
    assert replace(started[0].method, modules_to_save=method.modules_to_save) == method


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def test_an_encoder_learns_labels_from_a_file_without_being_told(home: Path, encoder: Path) -> None:
    rows = [f'"{letter * (2 + n)}",{letter}' for n in range(10) for letter in "ab"]
    (home / "labels.csv").write_text("\n".join(["text,label", *rows]))
    words = ["--model", str(encoder), "--data", str(home / "labels.csv"), "--steps", "30", "--lr", "0.02", "--json"]
    plan = json.loads(run("plan", *words, "--method", "adapter_h", "--width", "4", root=home).stdout)
    assert plan["trainable"] == sum(piece["parameters"] for piece in plan["targets"])
    assert {"classifier"} < {piece["role"] for piece in plan["targets"]}
    done = run("train", *words, "--method", "adapter_h", "--width", "4", "--holdout", "0.2", root=home)
    assert done.returncode == 0, done.stderr
    id = json.loads(done.stdout.splitlines()[-1])["run"]
    figures = json.loads(run("eval", id, "--json", root=home).stdout)
    assert set(figures["base"]) == set(figures["adapted"]) == {"loss", "accuracy"}
    assert figures["adapted"]["loss"] < figures["base"]["loss"]
    base, adapted = json.loads(run("compare", id, "--prompt", "bbbb", "--json", root=home).stdout)["answers"]
    assert set(base["chances"]) == {"a", "b"} and sum(adapted["chances"].values()) == pytest.approx(1)
    assert max(adapted["chances"], key=adapted["chances"].get) == "b" and adapted["text"].startswith("b ")
    refused = run("export", id, "--merged", "--to", str(home / "merged"), root=home)
    assert refused.returncode == 1 and "E_MERGE: " in refused.stderr
    files = json.loads(run("export", id, "--to", str(home / "adapted"), "--json", root=home).stdout)["files"]
    assert sorted(Path(file).name for file in files) == ["README.md", "adapter_model.safetensors", "lora_studio.json"]


def test_a_merged_export_says_what_rounding_changed_and_a_combination_is_written(
    trained: list[dict], home: Path
) -> None:
    id = trained[-1]["run"]
    merged = run("export", id, "--merged", "--dtype", "float16", "--to", str(home / "half"), "--json", root=home)
    rounding, proof = (json.loads(merged.stdout)[name] for name in ("rounding", "proof"))
    assert rounding["dtype"] == proof["stored"] == "float16" and proof["passed"] and proof["rows"] == 2
    assert 0 < proof["mean"] <= proof["largest"] <= proof["tolerance"]
    assert rounding["worst_layer"] in rounding["layers"] and max(rounding["layers"].values()) > 0
    done = run("combine", id, "--weights", "0.5", "--rank", "2", "--to", str(home / "sum"), "--json", root=home)
    assert all(Path(file).is_file() for file in json.loads(done.stdout)["files"])
    assert run("combine", id, "--weights", "a", "--to", str(home / "x"), root=home).returncode == 2


WRONG = {
    "an empty file": (["data", "{home}/empty.csv"], "E_EMPTY"),
    "a PNG named csv": (["data", "{home}/picture.csv"], "E_TYPE_MISMATCH"),
    "an unknown column": (
        ["data", "{home}/rows.jsonl", "--column", "prompt=nope", "--column", "completion=answer"],
        "E_MISSING_COLUMN",
    ),
    "no such file": (["data", "{home}/nothing.csv"], "E_NOT_FOUND"),
    "rank 0": (["plan", "--model", "{tiny}", "--rank", "0"], "E_CONFIG"),
    "no matching matrix": (["plan", "--model", "{tiny}", "--targets", "attn.z"], "E_TARGETS"),
    "no such model": (["plan", "--model", "nobody"], "E_MODEL_ID"),
    "no network": (["plan", "--model", "nobody/nothing"], "E_OFFLINE"),
    "no such run": (["compare", "abcdef", "--prompt", "x"], "E_RUN_NOT_FOUND"),
    "layers that are no numbers": (["plan", "--model", "{tiny}", "--layers", "x"], "E_CONFIG"),
    "a rank above a matrix": (["plan", "--model", "{tiny}", "--rank", "17"], "E_RANK"),
    "a rank above one matrix": (["plan", "--model", "{tiny}", "--rank-pattern", "attn.v=17"], "E_RANK"),
    "alpha 0": (["plan", "--model", "{tiny}", "--alpha", "0"], "E_CONFIG"),
    "a rank that is no number": (["plan", "--model", "{tiny}", "--rank-pattern", "attn.q=x"], "E_CONFIG"),
    "a pattern without a name": (["plan", "--model", "{tiny}", "--rank-pattern", "4"], "E_TARGETS"),
    "a pattern for nothing": (["plan", "--model", "{tiny}", "--alpha-pattern", "attn.z=4"], "E_TARGETS"),
    "no such variant": (["plan", "--model", "{tiny}", "--variant", "qlora"], "E_CONFIG"),
    "no such method": (["plan", "--model", "{tiny}", "--method", "magic"], "E_METHOD"),
    "no such task": (["plan", "--model", "{tiny}", "--task", "dream"], "E_TASK"),
    "a rank without LoRA": (["plan", "--model", "{tiny}", "--method", "bitfit", "--rank", "4"], "E_METHOD"),
    "a width for LoRA": (["plan", "--model", "{tiny}", "--width", "4"], "E_METHOD"),
    "more blocks than there are": (["plan", "--model", "{tiny}", "--method", "top", "--width", "3"], "E_METHOD"),
    "a prefix that fills the context": (
        ["plan", "--model", "{tiny}", "--method", "prompt", "--width", "2048"],
        "E_METHOD",
    ),
    "a prefix for an encoder": (["plan", "--model", "{encoder}", "--method", "prefix"], "E_METHOD"),
    "text from an encoder": (["plan", "--model", "{encoder}", "--task", "causal"], "E_ARCH"),
    "one label": (["plan", "--model", "{encoder}", "--data", "{home}/one.csv"], "E_LABELS"),
    "no labels": (["plan", "--model", "{encoder}", "--data", "{home}/plain.txt", "--task", "classify"], "E_LABELS"),
    "answers that are no labels": (["plan", "--model", "{tiny}", "--data", "orders", "--task", "classify"], "E_LABELS"),
    "a dtype of no kind": (["export", "{run}", "--to", "{home}/y", "--merged", "--dtype", "int3"], "E_DTYPE"),
    "other weights than runs": (["combine", "{run}", "--weights", "1,2", "--to", "{home}/y"], "E_WEIGHTS"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_users_mistake_is_a_code_and_a_hint_on_stderr_and_exit_code_one(
    what: str, home: Path, tiny: Path, encoder: Path, trained: list[dict]
) -> None:
    (home / "one.csv").write_text("text,label\na,x\nb,x\n")
    (home / "plain.txt").write_text("a line\n\nanother line\n")
    (home / "empty.csv").write_bytes(b"")
    (home / "picture.csv").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    words, code = WRONG[what]
    names = {"home": home, "tiny": tiny, "encoder": encoder, "run": trained[-1]["run"]}
    start = process if what in ("no network", "one label") else run  # offline is decided when a process starts
    done = start(*(word.format(**names) for word in words), "--json", root=home)
    assert done.returncode == 1 and done.stdout == ""
    first, hint, *rest = done.stderr.splitlines()
    assert first.startswith(f"{code}: ") and hint and not rest


def test_bad_usage_is_exit_code_two(home: Path) -> None:
    assert run("plan", "--no-such-option", root=home).returncode == 2
    assert run("compare", root=home).returncode == 2
    assert run("data", "x.csv", "--column", "prompt", root=home).returncode == 2


def test_a_run_is_paused_and_resumed_to_its_end(trained: list[dict], home: Path) -> None:
    studio = Studio(home)
    first = studio.runs.get(trained[-1]["run"])
    short = replace(first.config, name="short", train=replace(first.config.train, steps=2))
    waiting = studio.runs.create(short, {})
    assert run("pause", waiting.id[:8], root=home).returncode == 0
    assert studio.runs.get(waiting.id).status == "paused"
    done = run("resume", waiting.id[:8], "--json", root=home)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and events[-1]["status"] == "done" and events[-1]["run"] == waiting.id
    again = run("resume", waiting.id, root=home)
    assert again.returncode == 1 and "E_RUN_DONE" in again.stderr and len(again.stderr.splitlines()) == 2
    studio.runs.delete(waiting.id)


def test_help_lists_what_may_be_chosen(home: Path) -> None:
    said = " ".join(run("train", "--help", root=home).stdout.split())
    for words in ("[lora, rslora, dora,", "[lora, full, top,", "[auto, causal, classify]", "[linear, cosine,"):
        assert words in said, words


def test_epochs_take_the_place_of_the_default_steps(tiny: Path) -> None:
    given = {name: None for config in (LoraSpec, TrainConfig) for name in cli.knobs(config)}
    given |= {name: getattr(TrainConfig, name) for name in cli.knobs(TrainConfig) if hasattr(TrainConfig, name)}
    assert cli._training({**given, "epochs": 2.0}, "lora").total_steps(8) == 2
    assert cli._training({**given, "epochs": 2.0, "steps": 7}, "lora").steps == 7
    assert cli._training(given, "lora").steps == TrainConfig.steps


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["data", "orders", "--max-length", "-5"], "E_CONFIG"),
        (["export", "RUN", "--to", "new", "--dtype", "float16"], "E_DTYPE"),
        (["plan", "--layers", "0-1"], "E_CONFIG"),
    ],
)
def test_what_would_be_ignored_or_means_nothing_is_refused(
    words: list[str], code: str, home: Path, trained: list[dict], tiny: Path
) -> None:
    given = [str(home / "new") if word == "new" else trained[-1]["run"] if word == "RUN" else word for word in words]
    done = run(*given, *(["--model", str(tiny)] if words[0] != "export" else []), root=home)
    assert done.returncode == 1 and done.stderr.startswith(f"{code}: ") and not (home / "new").exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("runs", "--root", str(tmp_path / "file" / "below"), root=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("E_ROOT: ")
