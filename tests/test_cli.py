"""The command line as a user runs it: JSON alone on stdout, codes and hints on stderr, exit codes 0, 1, 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: str, root: Path, stop_after_s: float = 120) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LORA_STUDIO_ROOT": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lora_studio", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=stop_after_s, check=False
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studio")


@pytest.fixture(scope="module")
def trained(home: Path, tiny: Path) -> list[dict]:
    """The events of one run on a file with prompts and answers."""
    rows = [json.dumps({"question": f"say {n}", "answer": "ab" * (1 + n % 3)}) for n in range(20)]
    (home / "rows.jsonl").write_text("\n".join(rows))
    words = ["--steps", "30", "--lr", "0.1", "--targets", "all-linear", "--batch-size", "4", "--evaluations", "2"]
    done = run("train", "--model", str(tiny), "--data", str(home / "rows.jsonl"), "--json", *words, root=home)
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
    done = run("compare", id[:8], "--prompt", "say 3", "--max-new-tokens", "16", "--json", root=home)
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
    import shlex

    from lora_studio.export import command_line
    from lora_studio.studio import Studio

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
}


@pytest.mark.parametrize("what", WRONG)
def test_a_users_mistake_is_a_code_and_a_hint_on_stderr_and_exit_code_one(
    what: str, home: Path, tiny: Path, trained: list[dict]
) -> None:
    (home / "empty.csv").write_bytes(b"")
    (home / "picture.csv").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    words, code = WRONG[what]
    done = run(*(word.format(home=home, tiny=tiny) for word in words), "--json", root=home)
    assert done.returncode == 1 and done.stdout == ""
    first, hint, *rest = done.stderr.splitlines()
    assert first.startswith(f"{code}: ") and hint and not rest


def test_bad_usage_is_exit_code_two(home: Path) -> None:
    assert run("plan", "--no-such-option", root=home).returncode == 2
    assert run("compare", root=home).returncode == 2
    assert run("data", "x.csv", "--column", "prompt", root=home).returncode == 2
