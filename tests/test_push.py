"""To the Hub: exactly the exported files, into a repository of one's own, and no trace of the token."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from lora_studio import proof
from lora_studio.errors import StudioError, redacted
from lora_studio.push import check_target
from lora_studio.studio import Studio
from tests.fakehub import FakeHub
from tests.test_export import finished

CANARY = "hf_CANARYcanaryCANARYcanary0123456789"


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path / "root")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on which the canary is Ann's token, for the client in this process."""
    (tmp_path / "hub").mkdir()
    with FakeHub(uploads=tmp_path / "hub", accounts={CANARY: "ann"}) as fake:
        own = huggingface_hub.HfApi
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # large files go by LFS then
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: own(token=token, endpoint=fake.endpoint))
        yield fake


def code_of(call) -> str:
    with pytest.raises(StudioError) as caught:
        call()
    assert CANARY not in f"{caught.value}{caught.value.__cause__}{caught.value.args}" and caught.value.hint
    assert caught.value.__cause__ is None
    return caught.value.code


def _at(client: huggingface_hub.HfApi, endpoint: str) -> huggingface_hub.HfApi:
    client.endpoint = endpoint
    return client


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("merged", [False, True])
def test_exactly_the_exported_files_arrive(
    studio: Studio, tiny: Path, hub: FakeHub, tmp_path: Path, merged: bool
) -> None:
    run, _ = finished(studio, tiny)
    done = studio.push(run.id, "orders", CANARY, merged=merged)
    assert done.address == f"{hub.endpoint}/ann/orders" and done.proof.passed and "ann/orders" not in hub.public
    there, here = hub.uploads / "ann" / "orders", tmp_path / "here"
    assert names(there) == sorted(done.files)
    studio.export(run.id, here, merged=merged)
    assert names(here) == names(there)
    assert all((there / name).read_bytes() == (here / name).read_bytes() for name in names(here))
    assert not list(studio.exports.iterdir())  # what was packed is gone


def test_the_token_is_found_nowhere_afterwards(
    studio: Studio,
    tiny: Path,
    hub: FakeHub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    run, _ = finished(studio, tiny)
    studio.push(run.id, "orders", CANARY)
    hub.accounts.clear()
    assert code_of(lambda: studio.push(run.id, "other", CANARY)) == "E_HUB_TOKEN"
    hub.accounts[CANARY] = "ann"
    assert code_of(lambda: studio.push(run.id, "bob/other", CANARY)) == "E_HUB_TOKEN"
    known = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: _at(known(token), "http://127.0.0.1:9"))
    assert code_of(lambda: studio.push(run.id, "other", CANARY)) == "E_HUB_OFFLINE"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if CANARY.encode() in path.read_bytes()]
    assert CANARY not in caplog.text and CANARY not in repr(vars(studio))


def test_a_repository_of_another_kind_is_left_alone(studio: Studio, tiny: Path, hub: FakeHub) -> None:
    run, _ = finished(studio, tiny)
    thesis = hub.uploads / "ann" / "thesis"
    thesis.mkdir(parents=True)
    (thesis / "README.md").write_text("# My thesis")
    hub.repos["models"]["ann/thesis"] = thesis
    assert code_of(lambda: studio.push(run.id, "thesis", CANARY)) == "E_HUB_TAKEN"
    assert names(thesis) == ["README.md"]
    studio.push(run.id, "orders", CANARY)
    assert code_of(lambda: studio.push(run.id, "orders", CANARY, private=False)) == "E_HUB_TAKEN"  # it is private


def test_files_that_failed_their_proof_are_not_uploaded(
    studio: Studio, tiny: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished(studio, tiny)
    monkeypatch.setitem(proof.TOLERANCES, "float32", 0.0)
    assert code_of(lambda: studio.push(run.id, "orders", CANARY, merged=True)) == "E_PROOF"
    assert not hub.requests


def test_an_earlier_export_is_replaced_with_its_weights(studio: Studio, tiny: Path, hub: FakeHub) -> None:
    run, _ = finished(studio, tiny)
    studio.push(run.id, "orders", CANARY, private=False)
    there = hub.uploads / "ann" / "orders"
    (there / "picture.svg").write_text("<svg/>")
    done = studio.push(run.id, "orders", CANARY, merged=True, private=False)
    assert names(there) == sorted([*done.files, "picture.svg"]) and "ann/orders" in hub.public
    assert not (there / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b/c", "https://huggingface.co/a/b", "-x", "a--b", "x" * 97])
def test_what_is_no_name_or_no_token_is_said_before_anything_is_exported(studio: Studio, tiny: Path, name: str) -> None:
    run, _ = finished(studio, tiny)
    assert code_of(lambda: studio.push(run.id, name, CANARY)) == "E_HUB_NAME"
    for token in ("", "short", f"{CANARY}\nX-Evil: 1", f"{CANARY} {CANARY}", "hf_ä" * 9):
        assert code_of(lambda token=token: studio.push(run.id, "orders", token)) == "E_HUB_TOKEN"
    assert not studio.exports.exists()
    for good in ("orders", "my.orders_2", "ann/orders"):
        check_target(good, CANARY)


def test_tokens_of_both_kinds_are_taken_out_of_texts() -> None:
    for token in (CANARY, "hf_oauth_eyJhbGciOi.J9-x_y", "Bearer abcdefghijkl"):
        assert token.removeprefix("Bearer ") not in redacted(f"said {token}, then more")
    assert redacted("hf_hub_download stays") == "hf_hub_download stays"
    assert io.StringIO(redacted(CANARY)).read() == "[token]"
