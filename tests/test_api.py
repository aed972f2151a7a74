"""The endpoints as a program meets them: gradio_client and bare HTTP against the app as it is served."""

import inspect
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import gradio_client
import httpx
import pytest

from lora_studio.errors import StudioError
from lora_studio.settings import RATES, TrainConfig
from lora_studio.studio import Studio
from lora_studio.ui import api
from tests.browser import served_alone
from tests.tiny import tiny_model
from tests.visits import ReadyDesk

ID = re.compile(r"[0-9a-f]{32}")
ROWS = "\n".join(json.dumps({"question": f"how many {n}", "answer": f"just {n}"}) for n in range(12))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("served")
    tiny_model(root / "models" / "starter")
    with served_alone(root) as address:
        yield address


def curl(client: httpx.Client, name: str, /, **given: Any) -> Any:
    """The last answer of an endpoint, as the two lines of curl in the README get it."""
    event = client.post(f"/gradio_api/call/v2/{name}", json=given).raise_for_status().json()["event_id"]
    said = client.get(f"/gradio_api/call/{name}/{event}").text
    ended, _, data = said.strip().rpartition("event: ")[2].partition("\ndata: ")
    assert ended == "complete", said
    return json.loads(data)[0]


def test_a_program_goes_the_whole_way(url: str) -> None:
    program = gradio_client.Client(url, verbose=False, download_files=False)

    def ask(name: str, *given: Any, **more: Any) -> Any:
        return program.predict(*given, api_name=f"/{name}", **more)

    dataset = ask("add_dataset", ROWS, "questions")
    sample = ask("fetch_dataset", "orders")
    kept = {one["id"]: one for one in ask("list_datasets")}
    assert kept.keys() == {dataset, sample} and kept[dataset]["rows"] == 12
    assert kept[dataset]["columns"] == ["question", "answer"]
    seen = ask("describe_dataset", dataset, max_length=8)
    assert seen["rows"] == seen["train"] + seen["heldout"] == 12 and seen["cut"] == 12 and seen["health"]

    planned = ask("plan", rank=2, steps=12, dataset=dataset)
    assert planned["trainable"] == sum(one["parameters"] for one in planned["targets"]) > 0
    run = ask("start_run", dataset, rank=2, steps=12, batch_size=2)
    assert ID.fullmatch(run) and ask("list_runs")[0]["id"] == run
    events: list[dict[str, Any]] = []
    while ask("run_status", run)["status"] in ("queued", "running"):
        events += ask("run_events", run, len(events))
    events += ask("run_events", run, len(events))
    assert ask("run_status", run)["status"] == "done" and events == ask("run_events", run)
    assert {one["step"] for one in events if "train_loss" in one.get("values", {})} == set(range(1, 13))

    moments = list(program.submit(run, "how many 3", 0.0, 4, api_name="/compare"))
    assert moments[-1][0] == moments[-1][1]  # at strength 0 the adapter is not there
    base, adapted, again = ask("compare_runs", [run, run], "how many 3", 1.0, 4)
    assert adapted == again and isinstance(base, str)
    measured = ask("evaluate", run)
    assert measured["rows"] == seen["heldout"] and measured["base"].keys() == measured["adapted"].keys()
    assert ask("evaluate", run, dataset, 5)["rows"] == 5
    packed = ask("export", run)
    answer = httpx.get(f"{url}/{packed['download']}")
    files = zipfile.ZipFile(io.BytesIO(answer.content)).namelist()
    assert {Path(file).name for file in files} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert packed["file"] in answer.headers["content-disposition"]
    assert httpx.get(f"{url}/{packed['download']}").status_code == 404  # once
    with pytest.raises(Exception, match="E_RUN_NOT_FOUND"):
        ask("run_status", "0" * 32)


def test_two_lines_of_curl_do_the_same(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        dataset = curl(client, "add_dataset", text=ROWS, name="by curl")
        assert dataset in [one["id"] for one in curl(client, "list_datasets")]
        run = curl(client, "start_run", dataset=dataset, steps=400, batch_size=2)
        assert curl(client, "stop_run", run=run) == "stopping"
        while curl(client, "run_status", run=run)["status"] in ("queued", "running"):
            pass
        assert curl(client, "run_status", run=run)["status"] == "stopped"
        assert curl(client, "list_runs")[0]["id"] == run


def test_what_there_is_to_call_explains_itself(url: str) -> None:
    told = httpx.get(f"{url}/gradio_api/info").json()["named_endpoints"]
    names = {name for name, made in vars(api).items() if inspect.isfunction(made) and made.__module__ == api.__name__}
    public = {name for name in names if not name.startswith("_")} - {"register"}
    assert {name.strip("/") for name in told} == public  # nothing of the page is among them
    for name in public:
        made, shown = getattr(api, name), told[f"/{name}"]
        _, *parameters = inspect.signature(made).parameters.values()
        assert [one["parameter_name"] for one in shown["parameters"]] == [one.name for one in parameters]
        assert shown["description"].startswith(inspect.getdoc(made).partition("\n")[0].split(".")[0]), name
        for one in shown["parameters"]:
            assert f"{one['parameter_name']}: " in inspect.getdoc(made) and one["type"], (name, one)


def test_another_method_takes_its_own_learning_rate(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = ReadyDesk(Studio(tmp_path))
    monkeypatch.setattr(desk.studio.supervisor, "tick", lambda: None)
    dataset = api.add_dataset(desk, "question,answer\nhi,hello\nbye,goodbye\n")
    for method, rate in (("lora", TrainConfig.learning_rate), ("full", TrainConfig.learning_rate * RATES["full"])):
        run = api.start_run(desk, dataset, model=str(tiny), method=method)
        assert desk.studio.runs.get(run).config.train.learning_rate == pytest.approx(rate)
    run = api.start_run(desk, dataset, model=str(tiny), method="full", learning_rate=0.001)
    assert desk.studio.runs.get(run).config.train.learning_rate == 0.001


@pytest.mark.parametrize("limit", [0, -1, api.EVALUATED + 1])
def test_so_many_rows_are_measured_at_most(tmp_path: Path, limit: int) -> None:
    with pytest.raises(StudioError, match="cannot be measured"):
        api.evaluate(ReadyDesk(Studio(tmp_path)), "0" * 32, limit=limit)


def test_a_sample_is_no_repository(tmp_path: Path) -> None:
    desk = ReadyDesk(Studio(tmp_path))
    assert desk.studio.data.get(api.fetch_dataset(desk, "tickets")).source == "sample"
    with pytest.raises((StudioError, gr.Error), match="no dataset id"):
        api.fetch_dataset(desk, "/etc/passwd")
