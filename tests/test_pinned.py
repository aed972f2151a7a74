"""What a worker trains on is what was planned, within the limits of the place."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lora_studio.core.spec import LoraSpec
from lora_studio.errors import StudioError
from lora_studio.runs.attempt import Attempt
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.runs.store import claim
from lora_studio.runs.worker import work
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from tests.tiny import TEMPLATE


def planned(root: Path, tiny: Path, patch: pytest.MonkeyPatch) -> tuple[Run, Path]:
    """A run that waits, and the folder of its model."""
    studio, model = Studio(root), root / "model"
    shutil.copytree(tiny, model)
    patch.setattr(studio.supervisor, "tick", lambda: None)
    choice = DataChoice(id=studio.data.add_text("question,answer\n" + "q,a\nr,b\ns,c\n" * 4).id)
    train = replace(TrainConfig(), steps=1, batch_size=2, max_length=64, precision="float32")
    return studio.start(RunConfig(model=str(model), dataset=choice, method=LoraSpec(rank=2), train=train)), model


def ends(run: Run) -> dict:
    with claim(run.path) as lock:
        assert lock
        work([Attempt(run.path, lock)])
    return json.loads((run.path / "exit.json").read_text())


def test_a_model_that_was_changed_since_the_plan_is_not_trained_on(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = planned(tmp_path, tiny, monkeypatch)
    about = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(about | {"rope_theta": 123.0}))
    assert ends(run)["error"]["code"] == "E_CHANGED"


def test_a_model_that_is_as_planned_is_trained(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = planned(tmp_path, tiny, monkeypatch)
    (model / "chat_template.jinja").write_text(TEMPLATE)  # beside what makes the weights
    assert ends(run)["status"] == "done"


def test_a_model_that_was_changed_since_is_not_compared_with(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = planned(tmp_path, tiny, monkeypatch)
    assert ends(run)["status"] == "done"
    studio, about = Studio(tmp_path), json.loads((model / "config.json").read_text())
    assert list(studio.compare([run.id], "q"))
    (model / "config.json").write_text(json.dumps(about | {"rope_theta": 123.0}))
    fresh = Studio(tmp_path)  # one that has the base in memory still has the right one
    monkeypatch.setattr(fresh.supervisor, "tick", lambda: None)
    with pytest.raises(StudioError) as caught:
        list(fresh.compare([run.id], "q"))
    assert caught.value.code == "E_CHANGED"
    later = fresh.start(replace(run.config, name="later"))  # on the base as it is now
    assert ends(later)["status"] == "done"
    with pytest.raises(StudioError) as caught:
        list(fresh.compare([later.id, run.id], "q"))
    assert caught.value.code == "E_MIXED_BASES"
    assert list(fresh.compare([later.id], "q"))


def test_a_worker_opens_no_folder_where_nobody_may_name_one(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = planned(tmp_path, tiny, monkeypatch)
    monkeypatch.setenv("LORA_STUDIO_VISITORS", "1")
    assert ends(run)["error"]["code"] == "E_PATH"
