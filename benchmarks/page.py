"""What one update of the live chart costs with 10,000 points on it: bytes, main thread of the browser, zoom.

    python -m benchmarks.page [--points 10000]

The app is served as it is, and Chromium shows a run that is still training: this program holds the run's lock and
writes its journal, five steps at a time. Bytes are the answer's body, as it goes over the wire. The main thread's time
is what Chromium counts as tasks, in processor time, so that other programs do not count; from before the steps are
written until they are drawn, with whatever else the page does meanwhile. The zoom is dragged with the mouse.
"""

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Response

from benchmarks import goals
from benchmarks.goals import Goal
from benchmarks.paper import machine
from benchmarks.verdict import markdown
from lora_studio.events import Event, Metric, Started, to_line
from lora_studio.runs.config import DataChoice, RunConfig
from lora_studio.runs.store import RunStore, claim
from lora_studio.settings import TrainConfig
from tests.browser import chromium, served
from tests.tiny import tiny_model

MOST_BYTES, MOST_MS, STEPS_AT_ONCE = 1000, 120.0, 5
TAKEN = "count => Number(document.querySelector('#live [data-points]').dataset.points) >= count"
DRAWN = "step => document.querySelector('#live .plot')?.data?.[1].x.at(-1) >= step"
AXES = "(({ layout }) => [layout.xaxis.range, layout.yaxis.range])(document.querySelector('#live .plot'))"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--points", type=int, default=10_000, help="on the chart before the first update")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    print(f"# An update of the live chart\n\n{time.strftime('%F')}, {machine()}.\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="lora-studio-bench-") as folder:
        found = measured(Path(folder), options.points, options.updates)
    heads = ["an update", "median", "largest"]
    figures = {"body, bytes": "bytes", "headers, bytes": "headers", "main thread, ms": "task_ms"}
    rows = [
        [text, f"{statistics.median(found[name]):.0f}", f"{max(found[name]):.0f}"] for text, name in figures.items()
    ]
    print(markdown(heads, [*rows, ["zoom kept", f"{sum(found['kept']):.0f} of {len(found['kept'])}", ""]]) + "\n")
    at, kept = f"with {options.points:,} points", [statistics.fmean(found["kept"])]
    asked = [
        Goal(text=f"an update {at}", values=found["bytes"], most=MOST_BYTES, unit="bytes"),
        Goal(text=f"main thread of an update {at}", values=found["task_ms"], most=MOST_MS, unit="ms"),
        Goal(text="updates that left the zoom alone", values=kept, least=1.0, unit="of all"),
    ]
    goals.say(asked)
    goals.finish(options, asked, found)


def measured(root: Path, points: int, updates: int) -> dict[str, list[float]]:
    """Per update: bytes of body and headers, milliseconds of the main thread; and whether a zoom was kept."""
    tiny_model(root / "models" / "starter")
    told = {"LORA_STUDIO_MODELS": str(root / "models"), "HF_HUB_OFFLINE": "1"}
    with training(RunStore(root), points) as (run, on), served(root, **told) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        answers: list[Response] = []
        page.on("response", lambda answer: answers.append(answer) if "component_server" in answer.url else None)
        page.goto(f"{url}/?run={run}")
        page.wait_for_function(DRAWN, arg=0.99 * points, timeout=120_000)  # a long curve comes thinned, to the very end
        for _ in range(3):  # what is compiled at the first update
            update(page, on)
        busy = clock(page)
        found: dict[str, list[float]] = {"bytes": [], "headers": [], "task_ms": [], "kept": []}
        for _ in range(updates):
            answers.clear()
            before = busy()
            update(page, on)
            found["task_ms"].append(1000 * (busy() - before))
            sizes = [answer.request.sizes() for answer in answers if drew(answer)]
            found["bytes"] += [size["responseBodySize"] for size in sizes]
            found["headers"] += [size["responseHeadersSize"] for size in sizes]
        zoom(page)
        chosen = page.evaluate(AXES)
        for _ in range(updates):
            update(page, on, zoomed=True)
            found["kept"].append(float(page.evaluate(AXES) == chosen))
        return found


@contextmanager
def training(store: RunStore, points: int) -> Iterator[tuple[str, Callable[[], int]]]:
    """The id of a run that trains, as it looks from outside, and what takes it some steps on and says how far it is."""
    config = RunConfig(name="long", dataset=DataChoice(id="0" * 32, name="rows"), train=TrainConfig(steps=2 * points))
    run, dice = store.create(config, {}), random.Random(0)
    step = 0

    def write(*events: Event) -> None:
        with (run.path / "events.jsonl").open("a") as journal:
            journal.write("".join(f"{to_line(event, time=time.time(), attempt=1)}\n" for event in events))

    def on(count: int = STEPS_AT_ONCE) -> int:
        nonlocal step
        reached = range(step + 1, step + count + 1)
        write(*(Metric(step=one, values=figures(one)) for one in reached))
        step = reached[-1]
        return step

    def figures(step: int) -> dict[str, float]:
        loss, rate = 2 * math.exp(-step / 4000) + 0.2 * dice.random(), 0.005 * (1 - step / (2 * points))
        pace = {"tokens_per_s": 345.6789, "seconds_left": 1234.5678, "memory_bytes": 1_534_567_890}
        return {"train_loss": loss, "learning_rate": rate, "grad_norm": 0.5 + dice.random(), **pace}

    about = {"trainable": 1, "total": 2, "device": "cpu", "precision": "float32", "train_rows": 3, "heldout_rows": 1}
    write(Started(steps=2 * points, **about))
    on(points)
    with claim(run.path):
        yield run.id, on


def update(page: Page, on: Callable[[], int], *, zoomed: bool = False) -> None:
    """Some steps more, until they are drawn; zoomed in, what is new may lie outside and is only taken in."""
    known = int(page.locator("#live [data-points]").first.get_attribute("data-points") or 0)
    step = on()
    given = (TAKEN, known + STEPS_AT_ONCE) if zoomed else (DRAWN, step)
    page.wait_for_function(given[0], arg=given[1], polling=100, timeout=30_000)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def drew(answer: Response) -> bool:
    """Whether an answer brought points of the curve."""
    said: Any = answer.json()
    return bool(isinstance(said, dict) and (said.get("train") or [[]])[0])


def clock(page: Page) -> Callable[[], float]:
    """Seconds of a processor that the page's main thread has worked so far."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy() -> float:
        told = session.send("Performance.getMetrics")["metrics"]
        return next(one["value"] for one in told if one["name"] == "TaskDuration")

    return busy


def zoom(page: Page) -> None:
    """Drag a box over a part of the chart."""
    box = page.locator("#live .plot .nsewdrag").first.bounding_box()
    assert box, "the chart is in view"
    whole = page.evaluate(AXES)
    x, y, width, height = (box[name] for name in ("x", "y", "width", "height"))
    page.mouse.move(x + 0.2 * width, y + 0.1 * height)
    page.mouse.down()
    page.mouse.move(x + 0.5 * width, y + 0.8 * height, steps=5)
    page.mouse.up()
    page.wait_for_function(f"whole => JSON.stringify({AXES}) !== JSON.stringify(whole)", arg=whole, timeout=10_000)


if __name__ == "__main__":
    main()
