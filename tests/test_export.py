"""What leaves the studio opens elsewhere: PEFT reads the adapter, plain transformers the merged model."""

import json
import os
import tempfile
import zipfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError
from lora_studio.export import command_line, export_merged, model_card
from lora_studio.models import ModelLibrary
from lora_studio.peft_format import load, save
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.runs.store import write_json
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio

IDS = torch.arange(5, 27).view(2, 11)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


def finished(studio: Studio, tiny: Path, name: str = "orders r8") -> tuple[Run, torch.Tensor]:
    """A run folder as a worker leaves it, and what its adapted model computes."""
    dataset = studio.data.add_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}')
    config = RunConfig(name=name, model=str(tiny), dataset=DataChoice(id=dataset.id, name=dataset.name))
    run = studio.runs.create(config, {"revision": "abc"})
    lora = LoRA(ModelLibrary(studio.root).load(str(tiny), precision="float32", on="cpu"))
    lora.add("x", LoraSpec())
    draws = torch.Generator().manual_seed(1)
    for tensor in lora.parameters("x"):
        tensor.data.normal_(0, 0.2, generator=draws)
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
    with zipfile.ZipFile(studio.archive(run.id)) as archive:
        assert sorted(archive.namelist()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
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
    files = studio.export(run.id, tmp_path / "merged", merged=True, archive=True)
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
    first, second = studio.archive(run.id), studio.archive(run.id)
    assert first != second and {first.parents[1], second.parents[1]} == {studio.exports} == {studio.root / "exports"}
    assert list(first.parent.iterdir()) == [first]  # what was packed is gone
    strangers = [studio.exports / "mine", studio.root / "datasets"]
    outside = Path(tempfile.mkdtemp(prefix="lora-studio-"))  # such folders of anybody were swept
    strangers[0].mkdir()
    for folder in (first.parent, *strangers, outside):
        os.utime(folder, (0, 0))
    (studio.exports / "download-link").symlink_to(outside)
    third = studio.archive(run.id)
    assert not first.exists() and second.exists() and third.exists()
    assert all(folder.is_dir() for folder in (*strangers, outside))
    outside.rmdir()


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


@pytest.mark.parametrize("merged", [False, True])
def test_an_export_replaces_the_earlier_one_and_packs_only_its_own_files(
    studio: Studio, tiny: Path, tmp_path: Path, merged: bool
) -> None:
    run, _ = finished(studio, tiny)
    to = tmp_path / "out.v1"
    to.mkdir()  # an empty folder is welcome
    first = studio.export(run.id, to / ".." / to.name, merged=merged, archive=True)
    assert first[-1] == tmp_path / "out.v1.zip" and {path.parent for path in first[:-1]} == {to}
    (to / "notes.txt").write_text("not for others")
    (to / "model-00001-of-00002.safetensors").write_text("a shard of an earlier export")
    second = studio.export(run.id, to, merged=merged, archive=True)
    assert second == first and (to / "notes.txt").exists()
    assert (to / "model-00001-of-00002.safetensors").exists() != merged  # it would be loaded with the new ones
    with zipfile.ZipFile(second[-1]) as archive:
        assert sorted(archive.namelist()) == sorted(path.name for path in second[:-1])
    assert code_of(lambda: studio.export(run.id, to, merged=not merged)) == "E_EXISTS"  # they do not go together


def test_an_export_that_fails_leaves_the_earlier_one_as_it_was(
    studio: Studio, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished(studio, tiny)
    files = studio.export(run.id, tmp_path / "out", merged=True)
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
    studio.export(run.id, tmp_path / "merged", merged=True)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card and "peft" not in card
    assert "a merged model" in card.lower() and "float32" in card and "rounding" not in card


def test_the_card_of_a_merged_model_says_how_much_was_rounded_away(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    run, _ = finished(studio, tiny)
    lora = LoRA(ModelLibrary(studio.root).load(str(tiny), precision="bfloat16", on="cpu"))
    load(lora, run.path / "adapter", run.id)
    export_merged(run, lora, run.id, ModelLibrary(studio.root).tokenizer(str(tiny)), tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    errors = []
    for name, factors in lora.delta(run.id).items():
        delta, weight = factors.dense(), lora.model.get_submodule(name).weight.float()
        assert saved[f"{name}.weight"].dtype == torch.bfloat16
        errors.append(float((saved[f"{name}.weight"].float() - weight - delta).norm() / delta.norm()))
    assert max(errors) > 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"rounded once to bfloat16, which changes the updates by at most {100 * max(errors):.2g} %" in card


def test_the_command_line_spells_out_what_differs_from_the_defaults() -> None:
    config = RunConfig(
        name="n",
        dataset=DataChoice(id="0" * 32, name="Café orders", format="prompt_completion", columns={"prompt": "a b"}),
        method=LoraSpec(rank=4, targets=("attn.q", "mlp.up")),
        train=TrainConfig(steps=7),
    )
    run = Run(id="1" * 32, path=Path("."), config=config, status="done", created=0.0)
    assert command_line(run) == (
        "python -m lora_studio train --model starter --data orders --format prompt_completion "
        "--column 'prompt=a b' --rank 4 --targets attn.q,mlp.up --steps 7"
    )


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
