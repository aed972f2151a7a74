"""Finding and loading models: folders, the Hub (a stand-in on loopback), and every refusal by its code."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_studio.errors import StudioError
from lora_studio.models import CATALOGUE, ModelLibrary, fit, inference_precision, training_precision
from tests.fakehub import FakeHub


def test_a_local_folder_loads_with_its_tokenizer_and_template(tiny: Path, tmp_path: Path) -> None:
    models = ModelLibrary(tmp_path)
    model = models.load(str(tiny), precision="bfloat16", on="cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    assert models.tokenizer(str(tiny)).chat_template and models.present(str(tiny))
    skeleton = models.skeleton(str(tiny))
    assert {tensor.device.type for tensor in skeleton.parameters()} == {"meta"}
    sizes = [sum(tensor.numel() for tensor in one.parameters()) for one in (model, skeleton)]
    assert sizes[0] == sizes[1]


def changed(tiny: Path, to: Path, what: str) -> Path:
    shutil.copytree(tiny, to)
    config = json.loads((to / "config.json").read_text())
    if what == "remote code":
        config |= {"auto_map": {"AutoModelForCausalLM": "model.Model"}, "model_type": "foreign"}
        (to / "model.py").write_text(f"open({str(to / 'ran')!r}, 'w')")
    elif what == "unknown type":
        config["model_type"] = "nothing"
    elif what == "an encoder":
        config = {"model_type": "bert"}
    elif what == "truncated weights":
        (to / "model.safetensors").write_bytes((to / "model.safetensors").read_bytes()[:500])
    elif what == "other shapes":
        config["hidden_size"] = 64
    elif what == "a tensor missing":
        tensors = load_file(to / "model.safetensors")
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    elif what == "only a pickle":
        (to / "model.safetensors").rename(to / "pytorch_model.bin")
    elif what == "no tokenizer":
        for file in to.glob("tokenizer*"):
            file.unlink()
    (to / "config.json").write_text(json.dumps(config))
    return to


REFUSED = {
    "remote code": "E_REMOTE_CODE",
    "unknown type": "E_ARCH",
    "an encoder": "E_ARCH",
    "truncated weights": "E_SAFETENSORS",
    "other shapes": "E_SAFETENSORS",
    "a tensor missing": "E_SAFETENSORS",
    "only a pickle": "E_SAFETENSORS",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_that_is_not_right_is_refused_by_name(what: str, tiny: Path, tmp_path: Path) -> None:
    folder = changed(tiny, tmp_path / "model", what)
    with pytest.raises(StudioError) as caught:
        ModelLibrary(tmp_path).load(str(folder), precision="float32", on="cpu")
    assert caught.value.code == REFUSED[what] and caught.value.hint
    assert not (folder / "ran").exists()


def test_code_that_comes_with_a_known_architecture_is_not_run(tiny: Path, tmp_path: Path) -> None:
    folder = changed(tiny, tmp_path / "model", "remote code")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelLibrary(tmp_path).load(str(folder), precision="float32", on="cpu")
    assert type(model).__name__ == "LlamaForCausalLM" and not (folder / "ran").exists()


def test_a_missing_tokenizer_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StudioError) as caught:
        ModelLibrary(tmp_path).tokenizer(str(changed(tiny, tmp_path / "model", "no tokenizer")))
    assert caught.value.code == "E_TOKENIZER"


@pytest.mark.parametrize("name", ["", "no such thing", "../../etc", "a/b/c", "http://x/y", "-rf", "a/../b", "\x00"])
def test_what_is_no_model_name_is_said_at_once(name: str, tmp_path: Path) -> None:
    with pytest.raises(StudioError) as caught:
        ModelLibrary(tmp_path).skeleton(name)
    assert caught.value.code == "E_MODEL_ID" and "starter" in caught.value.hint


FETCH = """
import sys
from pathlib import Path
from lora_studio.errors import StudioError
from lora_studio.models import ModelLibrary
models = ModelLibrary(Path(sys.argv[1]))
for name in sys.argv[2:]:
    try:
        models.skeleton(name), models.tokenizer(name)
        model = models.load(name, precision="float32", on="cpu")
        print(name, sum(p.numel() for p in model.parameters()), models.revision(name), models.present(name))
    except StudioError as error:
        print(name, error.code)
"""


def fetch(root: Path, environment: dict[str, str], *names: str) -> list[str]:
    """A fresh process, because the Hub's client reads its address when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LORA_STUDIO"))}
    command = [sys.executable, "-c", FETCH, str(root), *names]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.splitlines()


def test_a_hub_model_is_fetched_once_and_then_needs_no_network(tiny: Path, tmp_path: Path) -> None:
    pickled = changed(tiny, tmp_path / "pickled", "only a pickle")
    repos = {"some/tiny": tiny, "some/gated": tiny, "some/pickled": pickled}
    with FakeHub(models=repos, gated={"some/gated"}) as hub:
        environment = hub.environment(tmp_path / "home")
        lines = fetch(tmp_path, environment, "some/tiny", "some/none", "some/gated", "some/pickled")
        assert lines[0].startswith("some/tiny 3") and lines[0].endswith("True")
        assert lines[1:] == ["some/none E_MODEL_NOT_FOUND", "some/gated E_GATED", "some/pickled E_PICKLE"]
        assert not any(".bin" in request or ".py" in request for request in hub.requests)
    offline = fetch(tmp_path, environment, "some/tiny", "some/other")
    assert offline == [lines[0], "some/other E_OFFLINE"]


def test_a_download_that_was_cut_off_goes_on_where_it_was(tiny: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    model = ModelLibrary(tmp_path).load(str(tiny), precision="float32", on="cpu")
    model.save_pretrained(sharded, max_shard_size="60KB")
    shutil.copy(tiny / "tokenizer.json", sharded)
    shutil.copy(tiny / "tokenizer_config.json", sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    with FakeHub(models={"some/sharded": sharded}) as hub:
        environment = hub.environment(tmp_path / "home")
        first = fetch(tmp_path, environment, "some/sharded")
        next((tmp_path / "models" / "hub").glob("**/snapshots/*/model-00001-*.safetensors")).unlink()
        assert fetch(tmp_path, environment, "some/sharded") == first and first[0].endswith("True")


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path / "home")}
        assert fetch(tmp_path, environment, "some/tiny") == ["some/tiny E_OFFLINE"]


def test_precision_and_fit_follow_the_machine() -> None:
    assert training_precision("cpu") in ("float32", "bfloat16")
    assert inference_precision("cpu", 134_515_008) == "float32"
    assert fit(1_000) == "fits" and fit(10**13) == "too big"
    assert len(CATALOGUE) >= 10 and all(entry.licence and entry.parameters for entry in CATALOGUE.values())
