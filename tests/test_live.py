"""The live view: what it asks for and is told, and the page of a run that grows and of one that has ended."""

import fcntl
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from lora_studio.core.spec import BaselineSpec, LoraSpec
from lora_studio.events import Event, Learned, Metric, Sample, Saved, Started, to_line
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.runs.store import RunStore, write_json
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from lora_studio.ui import live
from tests.browser import Watch, overflow, served_alone
from tests.tiny import tiny_model
from tests.visits import FACTS, rows, trained

EVIL = "<img src=x onerror=alert(1)>"
STEPS, POINTS = 20_000, 10_000


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Studio:
    one = Studio(tmp_path)
    monkeypatch.setattr(one.supervisor, "tick", lambda: False)
    return one


@pytest.fixture
def run(studio: Studio, tiny: Path) -> Run:
    kept = studio.data.add_text(rows("words"), "words")
    return trained(studio, tiny, DataChoice(id=kept.id, name="words"), "words r2 q+v")


def test_the_chart_shows_one_curve_at_a_time_and_only_of_those_there_are(studio: Studio) -> None:
    run = put(studio.runs, "long")
    say(run, *(metric(step) for step in range(1, 4)), Metric(step=3, values={"heldout_loss": 1.0, "general_loss": 3.0}))
    for curve in live.CURVES:
        told = live.answer(studio, {"run": run.id, "start": 0, "curve": curve})
        assert told["curve"] == curve and told["train"][1] == [
            float(f"{metric(step).values[curve]:.5g}") for step in range(1, 4)
        ]
        assert (told["general"], told["heldout"]) == (
            (([3], [3.0]), ([3], [1.0])) if curve == "train_loss" else (([], []), ([], []))
        )
    for odd in (None, "", "seconds_left", 7, ["train_loss"], EVIL):
        assert live.answer(studio, {"run": run.id, "start": 0, "curve": odd})["curve"] == "train_loss"


def test_an_update_of_a_long_run_is_below_one_kilobyte(studio: Studio) -> None:
    run = put(studio.runs, "long")
    say(run, *(metric(step) for step in range(1, POINTS)))
    with (run.path / "worker.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for curve in live.CURVES:
            seen = live.answer(studio, {"run": run.id, "start": 0, "curve": curve, "list": True})
            assert len(seen["train"][0]) <= live.POINTS + 2
            say(run, *(metric(step) for step in range(POINTS, POINTS + 5)))
            ask = {"run": run.id, "start": seen["next"], "curve": curve, "list": True, "known": seen["token"]}
            assert len(json.dumps(live.answer(studio, ask))) < 1000


def test_the_record_comes_once_and_of_a_shared_run_without_rows(studio: Studio, run: Run) -> None:
    first = live.answer(studio, {"run": run.id, "start": 0})
    assert first["learned"]["verdict"] == "learnt" and first["learned"]["rows"] and first["learned"]["ranks"] == [1, 4]
    assert "learned" not in live.answer(studio, {"run": run.id, "start": first["next"]})
    shared = live.public(first, studio.runs.get(run.id))
    assert shared["learned"]["rows"] == [] and shared["learned"]["sentence"] == first["learned"]["sentence"]


@pytest.mark.parametrize(("more", "rank"), [(True, 4), (False, 1), ("yes", 1), (None, 1)])
def test_another_rank_is_what_the_run_says_and_not_the_page(studio: Studio, run: Run, more: Any, rank: int) -> None:
    said = live.try_another_rank(studio, {"run": run.id, "more": more, "rank": 99})
    fresh = studio.runs.get(said["run"])
    assert not said["problem"] and fresh.config.method.rank == rank and fresh.name == f"words r{rank} q+v"  # type: ignore
    assert live.try_another_rank(studio, {"run": "../x", "more": more})["problem"]


def test_a_method_without_a_rank_offers_none(studio: Studio) -> None:
    run = put(studio.runs, "full", method=BaselineSpec(kind="full"))
    assert live.other_ranks(run) == [] and live.other_ranks(put(studio.runs, "one", method=LoraSpec(rank=1))) == [2]
    assert "no rank" in live.try_another_rank(studio, {"run": run.id})["problem"]


# ---- the page --------------------------------------------------------------------------------------------------------


def put(store: RunStore, name: str, **more: Any) -> Run:
    """A run that has begun."""
    train = TrainConfig(steps=STEPS)
    config = RunConfig(name=name, model="starter", dataset=DataChoice(id="0" * 32, name="orders"), train=train, **more)
    run = store.create(config, {})
    say(run, Started(steps=STEPS, **FACTS))
    (run.path / "worker.log").touch()
    return run


def say(run: Run, *events: Event) -> None:
    with (run.path / "events.jsonl").open("a") as journal:
        journal.write("".join(to_line(event, time=0.0, attempt=1) + "\n" for event in events))


def metric(step: int) -> Metric:
    values = {
        "train_loss": 2 * math.exp(-step / 4000) + 0.1 * math.sin(step),
        "learning_rate": 0.005 * (1 - step / (STEPS + 1)),
        "grad_norm": 1.2345 + math.cos(step),
        "tokens_per_s": 345.6789,
        "seconds_left": 1234.5678,
        "memory_bytes": 1_534_567_890.0,
    }
    return Metric(step=step, values=values)


def learnt(**changes: Any) -> Learned:
    """A record with markup in everything that a person or a model wrote."""
    texts = {"prompt": f"two teas {EVIL}", "target": "tea: 2", "base": f"Two teas, sir! {EVIL}", "adapted": "tea: 2"}
    made = [{"part": part, **texts, "base_loss": 2.0, "loss": 0.1} for part in ("train", "heldout") for _ in range(5)]
    score = {"name": "exact_match", "rows": 48, "base": 0.0, "adapted": 0.75, "low": 0.61, "high": 0.85}
    said = {"verdict": "learnt", "sentence": "It learnt: the loss went from 2 to 0.1.", "advice": "Compare it."}
    losses = {"train": [2.0, 0.1], "heldout": [2.0, 0.1], "general": [3.0, 3.1]}
    return Learned(step=4, losses=losses, metric={**score, "interval": "Wilson"}, rows=made, **(said | changes))


def ended(store: RunStore) -> Run:
    run = put(store, "orders r8 q+v")
    say(run, Metric(step=0, values={"heldout_loss": 2.0, "general_loss": 3.0}))
    say(run, Sample(step=0, index=0, prompt=EVIL, text=f"one two three {EVIL}", target="one 2 three"))
    say(run, *(metric(step) for step in range(1, 5)))
    say(run, Metric(step=4, values={"heldout_loss": 0.1, "general_loss": 3.1}), Saved(step=4, heldout_loss=0.1))
    say(run, Sample(step=4, index=0, prompt=EVIL, text="one 2 three", target="one 2 three"), learnt())
    (run.path / "adapter").mkdir()
    (run.path / "adapter" / "adapter_model.safetensors").touch()
    values = {"base_loss": 2.0, "best_loss": 0.1, "best_step": 4, "seconds": 3.0, "memory_bytes": 1e9}
    write_json(run.path / "exit.json", {"status": "done", "step": 4, "values": values})
    return store.get(run.id)


DRAWN = "() => document.querySelector('#live .plot').data.map(line => line.x.length)"
NEARLY = 0.99 * POINTS  # a long curve comes thinned, to its very end
LAST = "step => document.querySelector('#live .plot')?.data?.[1].x.at(-1) >= step"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    tiny_model(folder / "models" / "starter")
    return folder


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with served_alone(root) as address:
        yield address


def span(page: Page) -> list:
    return page.evaluate("() => (({xaxis, yaxis}) => [xaxis.range, yaxis.range])"
                         "(document.querySelector('#live .plot').layout)")  # fmt: skip


@pytest.mark.nightly
def test_a_long_curve_grows_under_a_zoom_that_stays_and_everybody_sees_the_same(
    url: str, root: Path, browser: Browser
) -> None:
    run = put(RunStore(root), "long")
    say(run, *(metric(step) for step in range(1, POINTS + 1)), Metric(step=POINTS, values={"general_loss": 3.1}))
    with (run.path / "worker.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        watch = Watch(page, url)
        page.goto(f"{url}/?run={run.id}")
        page.wait_for_function(LAST, arg=NEARLY, timeout=120_000)
        assert max(page.evaluate(DRAWN)) <= 1500
        node = page.query_selector("#live .plot .main-svg")
        box = page.locator("#live .plot .nsewdrag").first.bounding_box()
        assert box
        page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.8, steps=4)
        page.mouse.up()
        page.wait_for_function("() => document.querySelector('#live .plot').layout.xaxis.range[0] > 1000")
        zoomed = span(page)
        say(run, *(metric(step) for step in range(POINTS + 1, POINTS + 6)))
        page.wait_for_function(
            "count => document.querySelector('#live [data-points]').dataset.points >= count",
            arg=int(page.locator("#live [data-points]").get_attribute("data-points") or 0) + 1,
            timeout=120_000,
        )
        assert span(page) == zoomed and page.evaluate("node => node.isConnected", node)

        page.get_by_role("button", name="Gradient norm").click()
        page.wait_for_function(LAST, arg=NEARLY, timeout=120_000)
        expect(page.locator("#live .forgetting")).to_be_hidden()
        page.get_by_role("button", name="Loss", exact=True).click()
        page.locator("#live .forgetting").click()
        expect(page.locator("#live .forgetting")).to_have_attribute("aria-pressed", "true", timeout=120_000)
        page.wait_for_function("() => document.querySelector('#live .plot').data[4].visible === true")

        other = browser.new_context().new_page()
        other.goto(page.url)
        watch.reload(page)
        for viewer in (page, other):
            viewer.wait_for_function(LAST, arg=NEARLY, timeout=120_000)
        assert watch.wrong == []


@pytest.mark.nightly
@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_the_card_says_what_was_learnt_and_marks_what_changed(
    url: str, root: Path, browser: Browser, width: int, theme: str
) -> None:
    run = ended(RunStore(root))
    page = browser.new_page(viewport={"width": width, "height": 900})
    watch = Watch(page, url)
    page.goto(f"{url}/?run={run.id}&__theme={theme}")
    card = page.locator("#live .result")
    expect(card.locator(".verdict")).to_have_text("It learnt: the loss went from 2 to 0.1.", timeout=120_000)
    expect(card).to_contain_text("Exact match on 48 held-out rows; 95 % interval 61 % to 85 % (Wilson)")
    expect(card).to_contain_text("It forgot a little: loss on general text 3.00 → 3.10")
    expect(card.locator("summary")).to_have_count(2)
    first = card.locator("article").first
    expect(first).to_contain_text(EVIL)
    expect(first.locator(".after mark")).to_have_text(["tea:", "2"])
    expect(first.locator(".drop")).to_contain_text("2.00 → 0.100 (-95 %)")
    expect(page.locator("#live .samples .after mark")).to_have_text("2")
    assert page.locator("#live img").count() == 0 and overflow(page) <= 0
    for name in ("Compare", "Try rank 4", "Try rank 16", "Export"):
        expect(card.get_by_role("button", name=name, exact=True)).to_be_visible()
    expect(page.locator(f"#live nav [data-pick='{run.id}']")).to_contain_text("learnt · held-out loss 0.100")
    card.get_by_role("button", name="Export", exact=True).click()
    expect(page.get_by_role("tab", name="5 Export")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#export-run input")).to_have_value("orders r8 q+v · held-out loss 0.1")
    assert watch.wrong == []
