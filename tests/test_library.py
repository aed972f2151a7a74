"""DataLibrary: what was added is found again, whole, under an id of its bytes; and the split."""

import errno
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest

from lora_studio import sandbox
from lora_studio.data import library as module
from lora_studio.data import readers
from lora_studio.data.formats import Example, Message
from lora_studio.data.library import SAMPLES, DataLibrary, display_name, split
from lora_studio.data.readers import Limits
from lora_studio.errors import StudioError
from lora_studio.limits import SPACE
from tests.fakehub import FakeHub

CSV = "question,answer\nwhy,so\nhow,thus\n"


@pytest.fixture
def library(tmp_path):
    return DataLibrary(tmp_path / "root")


def code_of(call, *arguments, **options) -> str:
    with pytest.raises(StudioError) as caught:
        call(*arguments, **options)
    assert caught.value.hint
    assert len(str(caught.value)) <= 300
    return caught.value.code


def written(path: Path, content: str = CSV) -> Path:
    path.write_text(content)
    return path


def everything_under(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*")) if folder.exists() else []


# Keeping and finding


def test_a_kept_file_is_the_same_bytes_and_the_same_rows(library, tmp_path):
    source = written(tmp_path / "a.csv")
    dataset = library.add(source)
    assert dataset.path.read_bytes() == source.read_bytes()
    assert library.table(dataset.id).rows == (
        {"question": "why", "answer": "so"},
        {"question": "how", "answer": "thus"},
    )
    assert (dataset.rows, dataset.columns, dataset.format) == (2, ("question", "answer"), "prompt_completion")
    assert library.get(dataset.id) == dataset == DataLibrary(tmp_path / "root").get(dataset.id)
    assert [example.target for example in library.examples(dataset.id)[0]] == ["so", "thus"]
    assert [example.text for example in library.examples(dataset.id, "text", {"text": "answer"})[0]] == ["so", "thus"]


def test_the_same_bytes_are_the_same_dataset(library, tmp_path):
    first = library.add(written(tmp_path / "a.csv"))
    before = everything_under(tmp_path / "root")
    assert library.add(written(tmp_path / "b.csv"), name="another name") == first
    assert library.add_text(CSV) == first
    assert everything_under(tmp_path / "root") == before
    assert library.list() == [first]


def test_the_same_bytes_as_another_kind_are_another_dataset(library, tmp_path):
    as_text = library.add(written(tmp_path / "a.txt"))
    as_table = library.add(written(tmp_path / "a.csv"))
    assert (as_text.kind, as_table.kind) == ("txt", "csv")
    assert as_text.id != as_table.id == library.add(written(tmp_path / "a.csv")).id


def test_a_file_that_cannot_be_read_leaves_nothing_behind(library, tmp_path):
    for name, content in {"a.csv": "q,a\n1\n", "b.jsonl": "", "c.exe": "x", "d.json": "[]"}.items():
        code_of(library.add, written(tmp_path / name, content))
    assert code_of(library.add, tmp_path) == "E_NOT_FILE"
    assert code_of(library.add, tmp_path / "none.csv") == "E_NOT_FOUND"
    assert everything_under(tmp_path / "root" / "datasets") == []
    assert library.list() == []


def test_a_file_over_the_limit_is_refused_and_not_copied_whole(tmp_path, monkeypatch):
    source = io.BytesIO(CSV.encode() * 100)
    source.close = lambda: None  # stays open, to see how far it was read
    monkeypatch.setattr(module, "open_file", lambda path: source)
    monkeypatch.setattr(module, "COPY_BYTES", 4)
    small = DataLibrary(tmp_path / "root", Limits(file_bytes=10))
    assert code_of(small.add, tmp_path / "a.csv") == "E_TOO_LARGE"
    assert source.tell() <= 20
    assert everything_under(tmp_path / "root" / "datasets") == []


def test_the_list_is_newest_first_and_skips_what_is_damaged(library, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(module.time, "time", lambda: next(clock))
    names = [library.add_text(f"q,a\n{number},x\n", name=f"set {number}").name for number in range(4)]
    damaged = library.list()[1]
    (library.folder / damaged.id / "dataset.json").write_text("{")
    (library.folder / "stray").mkdir()
    assert [dataset.name for dataset in library.list()] == [names[3], names[1], names[0]]
    assert code_of(library.get, damaged.id) == "E_DATASET_NOT_FOUND"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"kind": "csv"}', None])
def test_a_damaged_dataset_is_replaced_when_its_file_is_added_again(library, tmp_path, damage):
    first = library.add(written(tmp_path / "a.csv"))
    if damage is None:
        first.path.write_bytes(b"")
    else:
        (library.folder / first.id / "dataset.json").write_text(damage)
    again = library.add(written(tmp_path / "a.csv"))
    assert again.id == first.id and len(library.table(again.id).rows) == 2
    assert library.list() == [again]
    assert sorted(path.name for path in library.folder.iterdir()) == [first.id]


def test_a_dataset_is_on_the_disk_before_it_is_in_its_place(library, tmp_path, monkeypatch):
    synced = []

    def note(descriptor):
        assert library.list() == []
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", note)
    dataset = library.add(written(tmp_path / "a.csv"))
    files = [dataset.path.with_name(name) for name in ("source.csv", "rows.jsonl", "dataset.json")]
    assert synced == [path.stat().st_ino for path in files]


# What the sandbox has read


def test_the_source_is_parsed_once_and_in_another_process(library, tmp_path, monkeypatch):
    calls = []

    def noted(function, *arguments, **options):
        calls.append(function)
        return sandbox.once(function, *arguments, **options)

    monkeypatch.setattr(module, "once", noted)
    monkeypatch.setattr(readers, "_begin", None)  # nothing is parsed here
    dataset = library.add(written(tmp_path / "a.csv"))
    for _ in range(2):
        assert library.table(dataset.id).rows[1] == {"question": "how", "answer": "thus"}
    assert calls == ["lora_studio.data.readers:normalise"]


def test_the_rows_that_are_kept_are_those_of_the_reader(library, tmp_path):
    rows = [{"a": 10**30, "b": -0.0, "c": [1, {"d": None}]}, {"b": "é漢👩\u2028\n", "e": 0.1}]
    source = written(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    dataset = library.add(source)
    assert library.table(dataset.id) == readers.read_path(source)


def test_a_dataset_of_an_earlier_version_is_parsed_when_it_is_opened(library, tmp_path):
    dataset = library.add(written(tmp_path / "a.csv"))
    rows, about = dataset.path.with_name("rows.jsonl"), dataset.path.with_name("dataset.json")
    before = library.table(dataset.id)
    facts = json.loads(about.read_text())
    del facts["digest"]
    about.write_text(json.dumps(facts))
    rows.unlink()
    assert library.table(dataset.id) == before and rows.is_file()
    assert sorted(path.name for path in library.folder.iterdir()) == [dataset.id]


@pytest.mark.parametrize(
    "change", [lambda old: old[:-3], lambda old: old.replace(b"so", b"no"), lambda old: b"[" + old]
)
def test_rows_that_were_changed_are_not_trained_on(library, tmp_path, change):
    dataset = library.add(written(tmp_path / "a.csv"))
    rows = dataset.path.with_name("rows.jsonl")
    rows.write_bytes(change(rows.read_bytes()))
    assert code_of(library.table, dataset.id) == "E_CHANGED"


def test_reading_that_costs_too_much_is_stopped_and_leaves_nothing(tmp_path):
    source = written(tmp_path / "a.jsonl", '{"a":"x"}\n' * 300_000)
    for limits, said in ((Limits(reading_cpu_s=0), "s of work"), (Limits(reading_bytes=2**24), "GiB")):
        library = DataLibrary(tmp_path / "root", limits)
        with pytest.raises(StudioError, match=said) as caught:
            library.add(source)
        assert caught.value.code == "E_READING_LIMIT"
        assert everything_under(library.folder) == []


def test_a_dataset_that_is_deleted_is_gone_and_can_be_added_again(library, tmp_path):
    first, second = library.add(written(tmp_path / "a.csv")), library.add_sample("tickets")
    library.delete(first.id)
    assert library.list() == [second] and code_of(library.get, first.id) == "E_DATASET_NOT_FOUND"
    assert [path.name for path in library.folder.iterdir()] == [second.id]
    assert code_of(library.delete, first.id) == code_of(library.delete, "../x") == "E_DATASET_NOT_FOUND"
    assert library.add(written(tmp_path / "a.csv")).id == first.id


def test_one_visitor_cannot_fill_the_disk(tmp_path):
    limits = Limits(file_bytes=10_000, kept_bytes=25_000, reserve_bytes=0)
    library = DataLibrary(tmp_path / "root", limits)
    for number in range(2):
        library.add_text(f"q,a\n{number}," + "x" * 2000)
    assert code_of(library.add_text, "q,a\n2,x") == "E_LIMIT" and len(library.list()) == 2
    library.delete(library.list()[0].id)
    library.add_text("q,a\n2,x")


def test_a_full_disk_is_named_and_leaves_nothing(library, tmp_path, monkeypatch):
    def fills(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    strict = DataLibrary(tmp_path / "root", Limits(reserve_bytes=2**60))
    assert code_of(strict.add_text, CSV) == "E_DISK"
    monkeypatch.setattr(module, "_copy", fills)
    assert code_of(library.add_text, CSV) == "E_DISK"
    assert everything_under(library.folder) == []


def test_where_strangers_are_a_path_is_not_looked_at(tmp_path, monkeypatch):
    library = DataLibrary(tmp_path / "root", SPACE)
    asked = []
    monkeypatch.setattr(library, "add_hub", asked.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    written(tmp_path / "org" / "plain")
    for path in (written(tmp_path / "a.csv"), "a.csv", "./org/plain", "../a.csv", "none.csv"):
        assert code_of(library.find, str(path)) == "E_PATH"
    library.find("org/plain")
    assert asked == ["org/plain"]
    assert library.find("tickets").source == "sample"


@pytest.mark.parametrize("id", ["", "..", "../../etc/passwd", "A" * 32, "0" * 31, "0" * 32, "0" * 32 + "\n", "/" * 32])
def test_an_id_is_never_a_path(library, id):
    assert code_of(library.get, id) == "E_DATASET_NOT_FOUND"


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "x" * 300, "CON", "a\0b", "a\nb", "\u202egnp.csv", ".bashrc", ""]
)
def test_a_display_name_is_one_short_line_and_no_path(library, tmp_path, name):
    shown = library.add(written(tmp_path / "a.csv"), name=name).name
    assert shown == display_name(name or "a.csv")
    assert shown.isprintable() and 0 < len(shown) <= 80
    assert not set(shown) & set("/\\")
    assert display_name(shown) == shown
    inside = {path.relative_to(library.folder).parts[0] for path in everything_under(library.folder)}
    assert inside == {dataset.id for dataset in library.list()}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_read_without_a_warning(library, name):
    dataset = library.add_sample(name)
    examples, warnings = library.examples(dataset.id)
    assert dataset.source == "sample"
    assert dataset.warnings == () and warnings == []
    assert len(examples) == dataset.rows >= 100
    assert library.find(name) == library.find(dataset.id) == dataset


def test_find_takes_an_id_a_sample_or_a_file_and_says_what_is_missing(library, tmp_path):
    dataset = library.add(written(tmp_path / "a.csv"))
    assert library.find(dataset.id) == library.find(str(tmp_path / "a.csv")) == dataset
    assert code_of(library.find, "data/missing.csv") == "E_NOT_FOUND"
    assert code_of(library.find, "missing") == "E_NOT_FOUND"
    assert code_of(library.find, str(tmp_path)) == "E_NOT_FILE"
    assert code_of(library.add_sample, "pirates") == "E_SAMPLE"


@pytest.mark.parametrize(
    "repo", ["", "squad", "../x", "a/..", "/etc/passwd", "a/b/c", "http://a/b", "a b/c", "a/b\n", "a/.b"]
)
def test_what_is_no_hub_id_is_refused_without_asking_the_hub(library, repo):
    assert code_of(library.add_hub, repo) == "E_HUB_ID"


# The split


def asked(*prompts: str) -> list[Example]:
    return [
        Example((Message("user", prompt), Message("assistant", f"answer {row}")), row=row)
        for row, prompt in enumerate(prompts, 1)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("holdout", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_a_split_is_a_partition_in_file_order_that_no_prompt_straddles(holdout, seed):
    chance = random.Random(seed)
    examples = asked(*(f"prompt {chance.randrange(60)}" for _ in range(200)))
    train, held = split(examples, holdout, seed)
    assert sorted(train + held, key=lambda example: example.row) == examples
    assert [e.row for e in train] == sorted(e.row for e in train)
    assert [e.row for e in held] == sorted(e.row for e in held)
    assert not {e.prompt for e in train} & {e.prompt for e in held}
    assert train and held
    assert len(held) <= max(1, round(holdout * len(examples))) or len({e.prompt for e in held}) == 1
    assert (train, held) == split(examples, holdout, seed)
    shuffled = chance.sample(examples, len(examples))
    assert {e.row for e in split(shuffled, holdout, seed)[1]} == {e.row for e in held}


def test_another_seed_holds_out_other_rows_and_the_share_is_kept():
    examples = asked(*map(str, range(100)))
    held = [split(examples, 0.2, seed)[1] for seed in range(2)]
    assert held[0] != held[1]
    assert len(held[0]) == len(held[1]) == 20


def test_plain_texts_are_split_by_their_text():
    examples = [Example(text=text, row=row) for row, text in enumerate("abcabc", 1)]
    train, held = split(examples, 0.3)
    assert not {e.text for e in train} & {e.text for e in held}


def test_a_split_needs_two_prompts_and_a_share_below_one():
    two = asked("x", "y")
    assert [len(side) for side in split(two, 0.5)] == [1, 1]
    assert [len(side) for side in split(two, 0.99)] == [1, 1]
    assert split(two, 0) == (two, [])
    assert split([], 0) == ([], [])
    for examples in ([], asked("x"), asked("x", "x", "x")):
        assert code_of(split, examples) == "E_TOO_FEW"
    for share in (-0.1, 1, 1.5, float("nan")):
        assert code_of(split, two, share) == "E_SPLIT"


# The Hub: the real clients in a fresh process, because they read HF_ENDPOINT when they are imported

CHILD = """
import importlib, json, os, socket, sys
from pathlib import Path
from lora_studio.data import library as module
from lora_studio.data.library import DataLibrary
from lora_studio.errors import StudioError

def here(function, *arguments, **bounds):  # instead of the sandbox, so that look-ups are noticed
    where, _, name = function.partition(":")
    return getattr(importlib.import_module(where), name)(*arguments)

if "SANDBOXED" not in os.environ:
    module.once = here
real, asked = socket.getaddrinfo, set()

def noted(host, *arguments, **options):
    asked.add(str(host))
    return real(host, *arguments, **options)

socket.getaddrinfo = noted
library, answers = DataLibrary(Path(sys.argv[1])), []
for call in json.loads(sys.argv[2]):
    try:
        dataset = library.add_hub(**call)
        answers.append([dataset.rows, dataset.name, dataset.warnings, library.table(dataset.id).rows])
    except StudioError as error:
        answers.append([error.code, error.message, error.hint])
print(json.dumps({"answers": answers, "hosts": sorted(asked)}))
"""


def in_fresh_process(environment: dict[str, str], folder: Path, calls: list[dict]) -> dict:
    here = Path(module.__file__).parents[2]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder / "root"), json.dumps(calls)],
        env=kept | environment | {"PYTHONPATH": str(here), "NO_PROXY": "127.0.0.1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ROWS = [{"prompt": f"prompt {number}", "completion": "é漢👩"} for number in range(30)]
CONFIGS = "---\nconfigs:\n- config_name: french\n  data_files: f.csv\n- config_name: german\n  data_files: g.csv\n---\n"


def hub_folders(folder: Path) -> dict[str, Path]:
    files = {
        "plain/train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "several/README.md": CONFIGS,
        "several/f.csv": "q,a\nchien,dog\n",
        "several/g.csv": "q,a\nHund,dog\n",
        "splits/validation.csv": "q,a\n1,2\n",
        "splits/test.csv": "q,a\n3,4\n",
        "model/config.json": '{"model_type": "llama"}',
        "model/deep/weights.bin": "x" * 100_000,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    repos = hub_folders(folder / "repos")
    (folder / "org" / "plain").mkdir(parents=True)  # where the process runs: must not be taken for the Hub's
    written(folder / "org" / "plain" / "train.csv")
    calls = {
        "plain": {"repo": "org/plain"},
        "first rows": {"repo": "org/plain", "max_rows": 7},
        "missing": {"repo": "org/missing"},
        "gated": {"repo": "org/gated"},
        "no config": {"repo": "org/several"},
        "config": {"repo": "org/several", "config": "german"},
        "wrong config": {"repo": "org/several", "config": "dutch"},
        "no split": {"repo": "org/splits"},
        "split": {"repo": "org/splits", "split": "test"},
        "wrong split": {"repo": "org/splits", "split": "train"},
    }
    datasets = {f"org/{name}": repos[name] for name in ("plain", "several", "splits")}
    with FakeHub(datasets=datasets | {"org/gated": repos["plain"]}, gated={"org/gated"}) as hub:
        told = in_fresh_process(hub.environment(folder / "home"), folder, list(calls.values()))
    return dict(zip(calls, told["answers"], strict=True)) | {"hosts": told["hosts"]}


def test_a_dataset_of_the_hub_is_kept_row_by_row(hub_answers):
    assert hub_answers["plain"] == [30, "org/plain (train)", [], ROWS]
    assert hub_answers["first rows"] == [7, "org/plain (train)", ["Only the first 7 rows were taken."], ROWS[:7]]
    assert hub_answers["config"][3] == [{"q": "Hund", "a": "dog"}]
    assert hub_answers["split"][3] == [{"q": 3, "a": 4}]


def test_what_the_hub_refuses_has_a_code_each(hub_answers):
    codes = {name: answer[0] for name, answer in hub_answers.items() if isinstance(answer[0], str)}
    assert codes.pop("hosts") == "127.0.0.1"
    assert codes == {
        "missing": "E_HUB_NOT_FOUND",
        "gated": "E_HUB_GATED",
        "no config": "E_HUB_CONFIG",
        "wrong config": "E_HUB_CONFIG",
        "no split": "E_HUB_SPLIT",
        "wrong split": "E_HUB_SPLIT",
    }
    assert "french, german" in hub_answers["no config"][2]
    assert "validation" in hub_answers["no split"][2] and "test" in hub_answers["no split"][2]


def test_nobody_but_the_endpoint_is_ever_looked_up(hub_answers):
    assert hub_answers["hosts"] == ["127.0.0.1"]


def test_a_readme_leads_to_no_file_and_no_host_outside_its_dataset(tmp_path):
    asked, stolen = [], tmp_path / "stolen.jsonl"
    stolen.write_text('{"question": "zebra-4711", "answer": "a"}\n')
    with socket.create_server(("127.0.0.1", 0)) as near:
        port = near.getsockname()[1]

        def listen() -> None:
            with suppress(OSError):
                while True:
                    near.accept()[0].close()
                    asked.append("somebody came")

        named = {
            "path": f"{stolen}",
            "all": f"{tmp_path}/**",
            "file": f"file://{stolen}",
            "local": f"local://{stolen}",
            "up": "../../../stolen.jsonl",
            "http": f"http://127.0.0.1:{port}/a.jsonl",
            "webhdfs": f"webhdfs://127.0.0.1:{port}/a.jsonl",
            "ftp": f"ftp://127.0.0.1:{port}/a.jsonl",
            "zip": f"zip://a.jsonl::http://127.0.0.1:{port}/a.zip",
            "behind": f"a b::ftp://127.0.0.1:{port}/a.jsonl",
            "other": "hf://datasets/org/plain/train.csv",
        }
        repos = {f"org/{name}": tmp_path / "repos" / name for name in named} | {
            "org/plain": tmp_path / "repos" / "plain"
        }
        for folder in repos.values():
            folder.mkdir(parents=True)
            written(folder / "train.csv")
        for name, pattern in named.items():
            about = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": pattern}]}]}
            (tmp_path / "repos" / name / "README.md").write_text(f"---\n{json.dumps(about)}\n---\n")
        threading.Thread(target=listen, daemon=True).start()
        with FakeHub(datasets=repos) as hub:
            told = in_fresh_process(hub.environment(tmp_path / "home"), tmp_path, [{"repo": one} for one in repos])
    answers = dict(zip(repos, told["answers"], strict=True))
    assert answers.pop("org/plain")[0] == 2
    assert {name: answer[0] for name, answer in answers.items()} == dict.fromkeys(
        (f"org/{name}" for name in named), "E_HUB_DATA"
    ) | {"org/up": "E_OFFLINE"}
    assert asked == [] and "zebra" not in json.dumps(told)


def test_a_dataset_of_the_hub_is_decoded_in_the_sandbox(tmp_path):
    repos = hub_folders(tmp_path / "repos")
    with FakeHub(datasets={"org/plain": repos["plain"]}) as hub:
        environment = hub.environment(tmp_path / "home") | {"SANDBOXED": "1"}
        told = in_fresh_process(environment, tmp_path, [{"repo": "org/plain"}, {"repo": "org/missing"}])
    assert told["answers"][0] == [30, "org/plain (train)", [], ROWS] and told["answers"][1][0] == "E_HUB_NOT_FOUND"
    assert told["hosts"] == [], "this process asked the Hub itself"


def test_a_hub_that_does_not_answer_is_said_to_be_offline(tmp_path):
    with socket.socket() as closed:  # bound and not listening: nobody else can answer on this port
        closed.bind(("127.0.0.1", 0))
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        told = in_fresh_process(environment, tmp_path, [{"repo": "org/plain"}])
    assert told["answers"][0][0] == "E_OFFLINE"


def test_the_clients_read_models_from_the_fake_hub_too(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    repos = hub_folders(tmp_path / "repos")
    with FakeHub({"org/model": repos["model"], "org/gated": repos["model"]}, gated={"org/gated"}) as hub:
        where = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache", "token": False}
        got = Path(huggingface_hub.snapshot_download("org/model", **where))
        assert (got / "deep/weights.bin").read_bytes() == (repos["model"] / "deep/weights.bin").read_bytes()
        assert huggingface_hub.HfApi(hub.endpoint).model_info("org/model", token=False).sha == got.name
        with pytest.raises(huggingface_hub.errors.GatedRepoError):
            huggingface_hub.hf_hub_download("org/gated", "config.json", **where)
        with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
            huggingface_hub.snapshot_download("org/missing", **where)
        with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
            huggingface_hub.hf_hub_download("org/model", "missing.json", **where)
    assert "HEAD /org/model/resolve/main/missing.json" in hub.requests
