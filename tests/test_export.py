"""What leaves the studio opens elsewhere: PEFT reads the adapter, plain transformers the merged model."""

import json
import zipfile
from pathlib import Path

import peft
import pytest
import torch
import transformers

from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError
from lora_studio.export import command_line, model_card
from lora_studio.models import ModelLibrary
from lora_studio.peft_format import save
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


def test_the_merged_model_opens_in_plain_transformers(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    run, wanted = finished(studio, tiny)
    studio.export(run.id, tmp_path / "merged", merged=True)
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
