"""What leaves the studio opens elsewhere: PEFT reads the adapter, plain transformers the merged model."""

import errno
import json
import os
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_studio.adapters import load, save
from lora_studio.card import Background, command_line, model_card
from lora_studio.core.baselines import add
from lora_studio.core.lean import Tokens
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import BaselineSpec, LoraSpec, Method
from lora_studio.errors import StudioError
from lora_studio.export import export_merged
from lora_studio.models import ModelLibrary
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.runs.store import write_json
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from tests.tiny import tiny_model

IDS = torch.arange(5, 27).view(2, 11)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


def finished(
    studio: Studio,
    tiny: Path,
    name: str = "orders r8",
    method: Method = LoraSpec(),
    labels: tuple[str, ...] = (),
    seed: int = 1,
) -> tuple[Run, torch.Tensor]:
    """A run folder as a worker leaves it, and what its adapted model computes."""
    rows = [("prompt", "completion"), ("text", "label")][bool(labels)]
    answers = labels or ("b", "d")
    lines = [json.dumps(dict(zip(rows, (letter, answers[n % 2]), strict=True))) for n, letter in enumerate("acegi")]
    dataset = studio.data.add_text("\n".join(lines))
    config = RunConfig(
        name=name,
        model=str(tiny),
        task="classify" if labels else "causal",
        dataset=DataChoice(id=dataset.id, name=dataset.name),
        method=method,
    )
    run = studio.runs.create(
        config, {"revision": studio.models.revision(str(tiny))} | ({"labels": list(labels)} if labels else {})
    )
    lora = LoRA(ModelLibrary(studio.root).load(str(tiny), precision="float32", on="cpu", labels=len(labels)))
    add(lora, "x", method)
    draws = torch.Generator().manual_seed(seed)
    for tensor in lora.parameters("x"):
        tensor.data += torch.empty(tensor.shape).normal_(0, 0.2, generator=draws)
    save(lora, "x", run.path / "adapter", str(tiny))
    write_json(
        run.path / "exit.json", {"status": "done", "values": {"base_loss": 2.0, "best_loss": 1.0, "best_step": 3}}
    )
    with torch.no_grad(), lora.use("x"):
        return studio.runs.get(run.id), lora.model(input_ids=IDS).logits


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_the_zip_holds_an_adapter_that_peft_loads_with_equal_logits(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    run, wanted = finished(studio, tiny)
    with zipfile.ZipFile(studio.archive(run.id).files[0]) as archive:
        names = ["Modelfile", "README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert sorted(archive.namelist()) == names
        for name in archive.namelist():
            (tmp_path / name).write_bytes(archive.read(name))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base, tmp_path)), wanted, rtol=1e-5, atol=1e-5)


def test_the_merged_model_opens_in_plain_transformers(
    studio: Studio, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, wanted = finished(studio, tiny)
    words = transformers.AutoTokenizer.from_pretrained(tiny)
    monkeypatch.setattr(studio.models, "tokenizer", lambda _: words)
    words.chat_template = {"default": words.chat_template, "tool": "x"}  # transformers writes a folder for these
    files = studio.export(run.id, tmp_path / "merged", merged=True, archive=True).files
    with zipfile.ZipFile(files[-1]) as archive:
        assert "additional_chat_templates/tool.jinja" in archive.namelist()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert not [path for path in (tmp_path / "merged").iterdir() if path.suffix in (".bin", ".pt")]


def test_comparing_leaves_the_base_untouched_for_a_merged_export_afterwards(
    studio: Studio, tiny: Path, tmp_path: Path
) -> None:
    run, _ = finished(studio, tiny)
    for _ in studio.compare([run.id], "hello"):
        pass
    studio.export(run.id, tmp_path / "one", merged=True)
    studio.export(run.id, tmp_path / "two", merged=True)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def code_of(call) -> str:
    with pytest.raises(StudioError) as caught:
        call()
    assert caught.value.hint
    return caught.value.code


def test_a_download_lies_under_the_root_and_only_old_downloads_are_swept(studio: Studio, tiny: Path) -> None:
    run, _ = finished(studio, tiny)
    first, second = (studio.archive(run.id).files[0] for _ in range(2))
    assert first != second and {first.parents[1], second.parents[1]} == {studio.exports} == {studio.root / "exports"}
    assert list(first.parent.iterdir()) == [first]  # what was packed is gone
    strangers = [studio.exports / "mine", studio.root / "datasets"]
    outside = Path(tempfile.mkdtemp(prefix="lora-studio-"))  # such folders of anybody were swept
    strangers[0].mkdir()
    for folder in (first.parent, *strangers, outside):
        os.utime(folder, (0, 0))
    (studio.exports / "download-link").symlink_to(outside)
    third = studio.archive(run.id).files[0]
    assert not first.exists() and second.exists() and third.exists()
    assert all(folder.is_dir() for folder in (*strangers, outside))
    outside.rmdir()


def test_a_disk_that_is_full_while_a_download_is_packed_is_said_and_left_clean(
    studio: Studio, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished(studio, tiny)

    def full(self: zipfile.ZipFile, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    assert code_of(lambda: studio.archive(run.id)) == "E_DISK"
    assert list(studio.exports.iterdir()) == []
    assert code_of(lambda: studio.export(run.id, tmp_path / "here", archive=True)) == "E_DISK"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("here.zip")]


@pytest.mark.parametrize("merged", [False, True])
def test_an_export_never_mixes_with_the_files_of_others(
    studio: Studio, tiny: Path, tmp_path: Path, merged: bool
) -> None:
    run, _ = finished(studio, tiny)
    mine, file = tmp_path / "mine", tmp_path / "file"
    mine.mkdir()
    (mine / "config.json").write_text("precious")
    (mine / "adapter_config.json").write_text("precious")
    (mine / "README.md").write_text("# My thesis")
    file.write_text("precious")
    for to in (mine, file, file / "below", mine / ".." / "mine"):
        assert code_of(lambda to=to: studio.export(run.id, to, merged=merged, archive=True)) == "E_EXISTS"
    assert [path.read_text() for path in (mine / "config.json", file)] == ["precious", "precious"]
    assert sorted(path.name for path in mine.iterdir()) == ["README.md", "adapter_config.json", "config.json"]
    (tmp_path / "new.zip").write_text("precious")
    assert code_of(lambda: studio.export(run.id, tmp_path / "new", merged=merged, archive=True)) == "E_EXISTS"
    studio.export(run.id, tmp_path / "later", merged=merged)
    (tmp_path / "later.zip").write_text("precious")  # beside an export of ours
    assert code_of(lambda: studio.export(run.id, tmp_path / "later", merged=merged, archive=True)) == "E_EXISTS"
    assert (tmp_path / "later.zip").read_text() == "precious"


@pytest.mark.parametrize("merged", [False, True])
def test_an_export_replaces_the_earlier_one_and_packs_only_its_own_files(
    studio: Studio, tiny: Path, tmp_path: Path, merged: bool
) -> None:
    run, _ = finished(studio, tiny)
    to = tmp_path / "out.v1"
    to.mkdir()  # an empty folder is welcome
    first = studio.export(run.id, to / ".." / to.name, merged=merged, archive=True).files
    assert first[-1] == tmp_path / "out.v1.zip" and {path.parent for path in first[:-1]} == {to}
    (to / "notes.txt").write_text("not for others")
    (to / "model-00001-of-00002.safetensors").write_text("a shard of an earlier export")
    second = studio.export(run.id, to, merged=merged, archive=True).files
    assert second == first and (to / "notes.txt").exists()
    assert (to / "model-00001-of-00002.safetensors").exists() != merged  # it would be loaded with the new ones
    with zipfile.ZipFile(second[-1]) as archive:
        assert sorted(archive.namelist()) == sorted(path.name for path in second[:-1])
    assert code_of(lambda: studio.export(run.id, to, merged=not merged)) == "E_EXISTS"  # they do not go together


def test_an_export_that_fails_leaves_the_earlier_one_as_it_was(
    studio: Studio, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished(studio, tiny)
    files = studio.export(run.id, tmp_path / "out", merged=True).files
    before = {path: path.read_bytes() for path in files}

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fail)
    for name in ("out", "new"):
        with pytest.raises(OSError, match="disk full"):
            studio.export(run.id, tmp_path / name, merged=True)
    assert not list((tmp_path / "new").iterdir())
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_card_of_a_merged_model_is_that_of_a_model(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    run, _ = finished(studio, tiny)
    done = studio.export(run.id, tmp_path / "merged", merged=True)
    rounding, proof = done.rounding, done.proof
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card and "peft" not in card
    assert "a merged model" in card.lower() and rounding.sentence in card and rounding.dtype == "float32"
    assert proof.sentence in card and proof.passed and proof.rows == 1 and not any(rounding.layers.values())
    assert 0 < proof.largest < 1e-4 and proof.largest < proof.tolerance < 1e-3 and proof.same == proof.answers == 1


def test_what_rounding_changes_is_measured_by_layer_and_on_logits(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    run, _ = finished(studio, tiny)
    done = studio.export(run.id, tmp_path / "merged", merged=True, dtype="bfloat16")
    about, found = json.loads((tmp_path / "merged" / "config.json").read_text()), done.rounding
    assert (about["dtype"], found.dtype, done.proof.computed_in) == ("bfloat16", "bfloat16", "float32")
    lora = LoRA(ModelLibrary(studio.root).load(str(tiny), precision="float32", on="cpu"))
    load(lora, run.path / "adapter", run.id)
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    for factors in lora.delta(run.id):
        key = f"{factors.layer}.weight"
        delta, weight = factors.dense(), lora.model.get_parameter(key)
        assert saved[key].dtype == torch.bfloat16
        error = float((saved[key].float() - weight - delta).norm() / delta.norm())
        assert found.layers[key] == pytest.approx(error, rel=1e-3) and error > 0
    ids, proof = torch.tensor([studio._heldout_rows(run)[0].ids]), done.proof
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad(), lora.use(run.id):
        apart = (again(input_ids=ids).logits - lora.model(input_ids=ids).logits).abs()
    assert (proof.largest, proof.mean) == pytest.approx((float(apart.max()), float(apart.mean())), rel=1e-3)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"stored in bfloat16, which changes the updates by at most {100 * max(found.layers.values()):.2g} %" in card
    assert found.as_json()["worst_layer"] in found.layers and json.dumps(found.as_json())
    assert lora.model.config.dtype != "bfloat16"


def test_a_base_that_is_loaded_rounded_is_merged_as_it_is(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    run, _ = finished(studio, tiny)
    lora = LoRA(ModelLibrary(studio.root).load(str(tiny), precision="bfloat16", on="cpu"))
    load(lora, run.path / "adapter", run.id)
    words = ModelLibrary(studio.root).tokenizer(str(tiny))
    rows = [Tokens([5, 6], [False, True])]
    to = tmp_path / "merged"
    files, _, proof = export_merged(run, lora, words, to, dtype="bfloat16", rows=rows, more=Background())
    assert proof.computed_in == "bfloat16" and proof.rows == 1 and to / "README.md" in files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_embeddings_stay_one_tensor_or_are_parted_when_one_is_adapted(
    studio: Studio, tmp_path: Path, dtype: str
) -> None:
    model = tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    for targets, tied in ((("attn.q",), True), (("embed", "attn.q"), False)):
        run, wanted = finished(studio, model, method=LoraSpec(targets=targets))
        studio.export(run.id, tmp_path / targets[0], merged=True, dtype=dtype)
        assert json.loads((tmp_path / targets[0] / "config.json").read_text())["tie_word_embeddings"] == tied
        assert ("lm_head.weight" in load_file(tmp_path / targets[0] / "model.safetensors")) != tied
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / targets[0], dtype=torch.float32)
        torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-4 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("method", [LoraSpec(targets=("attn.q",)), BaselineSpec(kind="full")])
def test_a_merged_classifier_knows_the_names_of_its_labels(
    studio: Studio, tiny: Path, tmp_path: Path, method: Method
) -> None:
    run, wanted = finished(studio, tiny, method=replace(method, modules_to_save=("score",)), labels=("no", "yes"))
    studio.export(run.id, tmp_path / "merged", merged=True)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.id2label == {0: "no", 1: "yes"} and merged.config.label2id == {"no": 0, "yes": 1}
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert "one of 2 labels: no, yes" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["adapter_h", "prefix"])
def test_what_is_no_change_of_weights_is_exported_as_an_adapter_only(
    studio: Studio, tiny: Path, tmp_path: Path, kind: str
) -> None:
    run, wanted = finished(studio, tiny, method=BaselineSpec(kind=kind, width=3))
    assert code_of(lambda: studio.export(run.id, tmp_path / "merged", merged=True)) == "E_MERGE"
    assert not list((tmp_path / "merged").glob("*"))
    files = studio.export(run.id, tmp_path / "out").files
    assert {path.name for path in files} == {"README.md", "lora_studio.json", "adapter_model.safetensors"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "opens in LoRA Studio only" in card and "library_name" not in card and f"--method {kind}" in card
    lora = LoRA(ModelLibrary(studio.root).load(str(tiny), precision="float32", on="cpu"))
    load(lora, tmp_path / "out", "again")
    with torch.no_grad(), lora.use("again"):
        assert torch.equal(lora.model(input_ids=IDS).logits, wanted)
    lora_run, _ = finished(studio, tiny)  # files of two kinds do not lie in one folder
    assert code_of(lambda: studio.export(lora_run.id, tmp_path / "out")) == "E_EXISTS"


def test_a_dtype_that_is_none_is_refused(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    run, _ = finished(studio, tiny)
    assert code_of(lambda: studio.export(run.id, tmp_path / "x", merged=True, dtype="int3")) == "E_DTYPE"


@pytest.mark.parametrize("method", [LoraSpec(rank=4), LoraSpec(rank=3, variant="rslora", targets=("attn.q", "mlp.up"))])
def test_a_combination_is_the_blend_of_its_adapters(
    studio: Studio, tiny: Path, tmp_path: Path, method: LoraSpec
) -> None:
    runs = [finished(studio, tiny, seed=seed, method=one)[0] for seed, one in enumerate((method, LoraSpec(rank=2)))]
    ids = [run.id for run in runs]
    done = studio.combine(ids, [0.5, 0.25], tmp_path / "sum")
    assert done.proof.passed and done.proof.sentence in (tmp_path / "sum" / "README.md").read_text()
    assert {path.name for path in done.files} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    lora = LoRA(ModelLibrary(studio.root).load(str(tiny), precision="float32", on="cpu"))
    for run in runs:
        load(lora, run.path / "adapter", run.id)
    with torch.no_grad(), lora.use({ids[0]: 0.5, ids[1]: 0.25}):
        blend = lora.model(input_ids=IDS).logits
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base, tmp_path / "sum")), blend, rtol=0, atol=1e-5)
    assert "0.25 × orders r8" in (tmp_path / "sum" / "README.md").read_text()
    studio.combine(ids, [0.5, 0.25], tmp_path / "cut", rank=2)
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 2
    assert studio._hand.loaded and "combined" not in studio._hand.loaded.lora.names


def test_a_combination_that_cannot_be_made_says_why(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    plain, other = (finished(studio, tiny, method=one)[0].id for one in (LoraSpec(), BaselineSpec(kind="bitfit")))
    dora = finished(studio, tiny, method=LoraSpec(variant="dora"))[0].id
    for runs, weights, code in (
        ([plain], [0.5, 0.5], "E_WEIGHTS"),
        ([plain, plain], [0.5, 0.5], "E_WEIGHTS"),
        ([plain], [float("nan")], "E_WEIGHTS"),
        ([plain, other], [0.5, 0.5], "E_COMBINE"),
        ([plain, dora], [0.5, 0.5], "E_COMBINE"),
    ):
        assert code_of(lambda runs=runs, weights=weights: studio.combine(runs, weights, tmp_path / "x")) == code
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("method", "said"),
    [(LoraSpec(), ""), (LoraSpec(variant="dora"), "DoRA"), (BaselineSpec(kind="bitfit"), "Only LoRA")],
)
def test_the_card_says_who_else_opens_an_adapter(studio: Studio, tiny: Path, method: Method, said: str) -> None:
    card = model_card(finished(studio, tiny, method=method)[0])
    assert said in card and bool(said) == ("vLLM does not take it" in card or "LoRA Studio only" in card)


def test_the_command_line_spells_out_what_differs_from_the_defaults() -> None:
    config = RunConfig(
        name="n",
        dataset=DataChoice(id="0" * 32, name="Café orders", format="prompt_completion", columns={"prompt": "a b"}),
        method=LoraSpec(rank=4, targets=("attn.q", "mlp.up"), rank_pattern={"mlp.up": 2}, modules_to_save=("score",)),
        train=TrainConfig(steps=7),
    )
    run = Run(id="1" * 32, path=Path("."), config=config, status="done", created=0.0)
    begins = (
        "python -m lora_studio train --model starter --data orders --format prompt_completion --column 'prompt=a b' "
    )
    assert command_line(run) == f"{begins}--rank 4 --targets attn.q,mlp.up --rank-pattern mlp.up=2 --steps 7"
    other = replace(config, method=BaselineSpec(kind="prefix", width=5), task="classify", train=TrainConfig())
    said = f"{begins}--task classify --method prefix --width 5 --learning-rate 0.005"  # unsaid, it would be another
    assert command_line(replace(run, config=other)) == said


def test_the_card_holds_the_figures_and_no_markup_of_the_users(studio: Studio, tiny: Path) -> None:
    run, _ = finished(studio, tiny, name="<img onerror=x> [a](javascript:b)\n---\nbase_model: evil")
    card = model_card(run)
    front = card.split("---")[1]
    assert "library_name: peft" in front and "evil" not in front
    assert "<img" not in card and "javascript:b)" not in card and "| Best step | 3 |" in card


def test_a_run_without_an_adapter_says_so(studio: Studio, tmp_path: Path) -> None:
    run = studio.runs.create(RunConfig(name="n", dataset=DataChoice(id="0" * 32)), {})
    for action in (lambda: studio.export(run.id, tmp_path / "x"), lambda: list(studio.compare([run.id], "hello"))):
        with pytest.raises(StudioError) as caught:
            action()
        assert caught.value.code == "E_NO_ADAPTER"


def test_an_empty_prompt_and_a_foreign_strength_are_refused(studio: Studio, tiny: Path) -> None:
    run, _ = finished(studio, tiny)
    for prompt, strength, code in (
        (" ", 1.0, "E_NO_PROMPT"),
        ("x", -1.0, "E_STRENGTH"),
        ("x", float("nan"), "E_STRENGTH"),
    ):
        with pytest.raises(StudioError) as caught:
            list(studio.compare([run.id], prompt, strength=strength))
        assert caught.value.code == code
    assert json.loads((run.path / "run.json").read_text())["config"]["model"] == str(tiny)
