"""An adapter made by PEFT comes in, works as a run in every tab, and goes out again as the same function."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from lora_studio.card import command_line, model_card
from lora_studio.errors import StudioError
from lora_studio.limits import LAPTOP, Limits
from lora_studio.owners import owner_name
from lora_studio.runs.config import DataChoice, Run
from lora_studio.studio import Studio
from tests.tiny import tiny_model

IDS = torch.arange(5, 27).view(2, 11)
NAMED = "someone/<b>else</b>"  # the base that the files name: shown, never loaded


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path / "root", LAPTOP)


def made_by_peft(base: Path, folder: Path, **settings: object) -> torch.Tensor:
    """Write a PEFT adapter with every value drawn to `folder`; the logits of the adapted model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    about = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**about))
    draws = torch.Generator().manual_seed(1)
    for name, tensor in adapted.named_parameters():
        if "lora_" in name:
            tensor.data += torch.empty(tensor.shape).normal_(0, 0.2, generator=draws)
    adapted.save_pretrained(folder)
    change(folder, base_model_name_or_path=NAMED)
    return logits(adapted)


def change(folder: Path, **values: object) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def opened_by_peft(base: Path, folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(model, folder))


def adopted(studio: Studio, tiny: Path, folder: Path, **settings: object) -> tuple[Run, torch.Tensor]:
    wanted = made_by_peft(tiny, folder, **settings)
    return studio.adopt(folder, str(tiny), "from elsewhere"), wanted


def code_of(call) -> str:
    with pytest.raises(StudioError) as caught:
        call()
    assert caught.value.hint
    return caught.value.code


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_what_peft_made_goes_out_again_with_equal_logits(
    studio: Studio, tiny: Path, tmp_path: Path, settings: dict
) -> None:
    run, wanted = adopted(studio, tiny, tmp_path / "adapter", **settings)
    studio.export(run.id, tmp_path / "again")
    torch.testing.assert_close(opened_by_peft(tiny, tmp_path / "again"), wanted, rtol=1e-5, atol=1e-5)
    studio.export(run.id, tmp_path / "merged", merged=True, dtype="float32")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)


def test_its_files_are_proven_on_a_general_text(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    run, _ = adopted(studio, tiny, tmp_path / "theirs")
    for merged in (False, True):
        proof = studio.export(run.id, tmp_path / f"out-{merged}", merged=merged).proof
        assert proof.passed and proof.rows > 0
    card = (tmp_path / "out-False" / "README.md").read_text()
    assert "made elsewhere" in card and "No rows were held out" not in card


def test_it_is_a_run_that_is_done_and_all_that_needs_an_adapter_works(
    studio: Studio, tiny: Path, tmp_path: Path
) -> None:
    run, _ = adopted(studio, tiny, tmp_path / "adapter")
    assert (run.status, run.has_adapter, run.brought, run.steps, run.resumable) == ("done", True, True, 0, False)
    assert studio.runs.list() == [run] and studio.runs.events(run.id) == [] and studio.heldout(run.id) == []
    assert run.facts["origin"]["base_model"] == NAMED and run.config.model == str(tiny)
    assert {path.name for path in run.path.iterdir()} == {"adapter", "run.json", "exit.json"}
    studio.supervisor.tick()
    assert studio.runs.get(run.id) == run  # nobody trains it

    *_, last = studio.compare([run.id], "hello")
    base, answer = last.answers
    assert last.base_difference == 0 and base.text != answer.text
    modules = studio.inside(run.id).modules
    assert [len(module.singular_values) for module in modules] == [3] * 4 and all(one.delta_norm for one in modules)
    rows = studio.data.add_text("question,answer\n" + "".join(f"why {n},so {n}\n" for n in range(8)))
    figures = studio.evaluate(run.id, DataChoice(id=rows.id))
    assert figures["rows"] == 8 and figures["base"]["loss"] != figures["adapted"]["loss"]
    assert [path.name for path in studio.smaller(run.id, 1, tmp_path / "small").files]
    assert "Made elsewhere" in model_card(run) and "<b>" not in model_card(run)
    assert command_line(run) == f"python -m lora_studio adopt FOLDER --model {tiny} --name 'from elsewhere'"


def test_what_wants_held_out_rows_says_that_there_are_none(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    run, _ = adopted(studio, tiny, tmp_path / "adapter")
    assert code_of(lambda: studio.evaluate(run.id)) == "E_NO_TARGET"
    assert code_of(lambda: next(studio.rank_curve(run.id))) == "E_NO_HELDOUT"
    assert code_of(lambda: studio.resume(run.id)) == "E_RUN_DONE"
    studio.delete(run.id)
    assert studio.runs.list() == []


def test_a_model_without_a_chat_template_is_asked_in_plain_text(studio: Studio, tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "plain")
    (base / "chat_template.jinja").unlink()
    run, _ = adopted(studio, base, tmp_path / "adapter")
    assert run.config.dataset.format == "text"
    *_, last = studio.compare([run.id], "once upon")
    assert last.answers[0].text != last.answers[1].text


def test_a_wrong_base_is_refused_by_both_names_and_nothing_is_stored(
    studio: Studio, tiny: Path, tmp_path: Path
) -> None:
    made_by_peft(tiny_model(tmp_path / "wide", hidden_size=64), tmp_path / "adapter")
    with pytest.raises(StudioError, match=r"fits '.*'; it was made for 'someone/<b>else</b>'") as caught:
        studio.adopt(tmp_path / "adapter", str(tiny))
    assert caught.value.code == "E_BASE"
    assert studio.runs.list() == [] and not list(studio.root.glob("claimed-*"))
    assert not list((studio.root / "runs").glob("*.new"))


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"peft_type": "LOHA"}, "E_PEFT_VARIANT"),
        ({"bias": "all"}, "E_PEFT_VARIANT"),
        ({"task_type": "SEQ_CLS"}, "E_PEFT_VARIANT"),
        ({"lora_dropout": 0.95}, "E_CONFIG"),
        ({"r": 4}, "E_SHAPE"),
    ],
)
def test_what_cannot_be_carried_is_named(studio: Studio, tiny: Path, tmp_path: Path, values: dict, code: str) -> None:
    made_by_peft(tiny, tmp_path / "adapter")
    change(tmp_path / "adapter", **values)
    assert code_of(lambda: studio.adopt(tmp_path / "adapter", str(tiny))) == code
    assert studio.runs.list() == []


def test_limits_hold_for_what_is_brought(tiny: Path, tmp_path: Path) -> None:
    made_by_peft(tiny, tmp_path / "adapter")
    for limits, code in ((Limits(file_bytes=1000), "E_TOO_LARGE"), (Limits(rank=2), "E_LIMIT")):
        studio = Studio(tmp_path / code, limits)
        assert code_of(lambda studio=studio: studio.adopt(tmp_path / "adapter", str(tiny))) == code
        assert studio.runs.list() == []


def test_it_belongs_to_whoever_brought_it(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    ann, bob = (studio.of(owner_name("visitor", letter * 32)) for letter in "ab")
    run, _ = adopted(ann, tiny, tmp_path / "adapter")
    assert ann.runs.list() == [run] and run.owner == ann.owner
    assert bob.runs.list() == []
    for call in (bob.runs.get, bob.inside, bob.archive, lambda one: next(bob.compare([one], "x"))):
        assert code_of(lambda call=call: call(run.id)) == "E_RUN_NOT_FOUND"


def test_only_what_was_read_is_kept(studio: Studio, tiny: Path, tmp_path: Path) -> None:
    made_by_peft(tiny, tmp_path / "adapter")
    change(tmp_path / "adapter", auto_mapping={"x": "/etc"}, note="sesame")
    (tmp_path / "adapter" / "evil.py").write_text("1/0")
    run = studio.adopt(tmp_path / "adapter", str(tiny))
    kept = run.path / "adapter"
    assert sorted(path.name for path in kept.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((kept / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny) and "sesame" not in json.dumps(config)
    assert "auto_mapping" not in config and run.name == "r3, brought along"
