"""The page under load: a run trains, viewers watch it as the page's own script does, and somebody clicks.

    python -m benchmarks.load            20 viewers for 3 minutes, then 50 for one; about 8 minutes on two cores alone
    python -m benchmarks.load --quick    a tiny model, 20 viewers for 20 seconds, then 50 for 10

An app is started on a folder of its own. Each viewer asks for what is new as often as the page does (live.js); how old
a step is when a viewer has it is told by the time in the run's journal. Clicks are opening a run, choosing a tab, and
an event that goes through Gradio's queue. The step time of the run is taken without viewers, with them, and without.
Besides: how long 1,000 short runs take to list, and then a curve of 100,000 steps to open, in a process that sees them
first.
All traffic stays on the loopback, and is bounded in count and time.
"""

import argparse
import asyncio
import gc
import json
import logging
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import goals
from benchmarks.fresh import measure
from benchmarks.goals import Goal
from benchmarks.paper import machine
from benchmarks.tiny import tiny
from benchmarks.verdict import markdown

log = logging.getLogger("benchmarks")

EVERY_S, LIST_S = 0.7, 4.0  # live.js asks again so long after an answer, and so often for the list of runs
CLICK_S = 1.0  # between two clicks
TIMEOUT_S = 30.0
MOST_S, SLOWER, OPEN_S = 1.0, 1.10, 1.0
RUNS, STEPS = 1_000, 100_000


@dataclass
class Seen:
    """What viewers and clicks met in one stretch of time; seconds."""

    answers: list[float] = field(default_factory=list)
    arrived: list[tuple[int, float]] = field(default_factory=list)  # a step, and when a viewer had it
    ages: list[float] = field(default_factory=list)
    clicks: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def clicked(self) -> list[float]:
        return [one for taken in self.clicks.values() for one in taken]


class Line:
    """A kept connection that asks and is answered in JSON, with next to no work: viewers have machines of their own."""

    def __init__(self, url: httpx.URL) -> None:
        self.host, self.port = url.host, url.port
        self._ends: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Raises OSError, EOFError, ValueError or KeyError for what is no answer."""
        sent = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent
        try:
            async with asyncio.timeout(TIMEOUT_S):
                try:
                    first, answer = await self._ask(request)
                except (ConnectionError, EOFError):  # closed after being idle: a browser opens another one, too
                    self._hang_up()
                    first, answer = await self._ask(request)
        except BaseException:
            self._hang_up()  # or the next answer would be this one's
            raise
        if " 200 " not in f"{first} ":
            raise ValueError(f"{first}: {answer[:100]!r}")
        return json.loads(answer)

    def _hang_up(self) -> None:
        if self._ends:
            self._ends[1].close()
        self._ends = None

    async def _ask(self, request: bytes) -> tuple[str, bytes]:
        if self._ends is None:
            self._ends = await asyncio.open_connection(self.host, self.port, limit=2**20)
        reader, writer = self._ends
        writer.write(request)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        heads = dict(line.split(": ", 1) for line in lines if line)
        return first, await reader.readexactly(int(heads["content-length"]))


class Visitor:
    """One browser's worth of requests."""

    def __init__(self, client: httpx.AsyncClient, config: Mapping[str, Any]) -> None:
        self.client, self.session, self.line = client, secrets.token_hex(8), Line(client.base_url)
        self._live = next(
            one["id"] for one in config["components"] if one["props"].get("elem_id") == "live" and one["type"] == "html"
        )
        self._by_elem = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
        self._events = {(target[0], target[1]): one for one in config["dependencies"] for target in one["targets"]}

    async def poll(self, **ask: Any) -> dict[str, Any]:
        """As live.js asks for what is new of a run."""
        body = {"session_hash": self.session, "component_id": self._live, "fn_name": "poll", "data": ask}
        return await self.line.post("/gradio_api/component_server", body)

    async def queued(self) -> None:
        """The Export tab describes what is chosen, which is nothing: an event that goes through the queue."""
        event = self._events[self._by_elem["export-run"], "change"]
        body = {"fn_index": event["id"], "data": [None], "session_hash": self.session, "event_data": None}
        (await self.client.post("/gradio_api/queue/join", json=body)).raise_for_status()
        asked = {"session_hash": self.session}
        async with self.client.stream("GET", "/gradio_api/queue/data", params=asked) as stream:
            async for line in stream.aiter_lines():
                said = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if said.get("msg") == "process_completed":
                    if not said["success"]:
                        raise RuntimeError(str(said["output"])[:200])
                    return

    async def change_tab(self) -> None:
        """The Compare tab is chosen and lists its runs: an event that does not wait in the queue."""
        event = next(
            one
            for (_, what), one in self._events.items()
            if what == "select" and len(one["inputs"]) == 1 and not one["queue"]
        )
        body = {"fn_index": event["id"], "data": [None], "session_hash": self.session, "event_data": None}
        (await self.client.post("/gradio_api/run/predict", json=body)).raise_for_status()


def main() -> int:
    """0 when everything was measured, whether goals are met or not."""
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%T", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    print(f"# Under load\n\n{time.strftime('%F')}, {machine()}.\n", flush=True)
    stored = [measure("benchmarks.load:opened", {}) for _ in range(1 if options.quick else 3)]
    asked = [
        Goal(text=f"{RUNS:,} runs listed", values=[one["list_s"] for one in stored], most=OPEN_S, unit="seconds"),
        Goal(
            text=f"a curve of {STEPS:,} steps opened",
            values=[one["open_s"] for one in stored],
            most=OPEN_S,
            unit="seconds",
        ),
    ]
    with tempfile.TemporaryDirectory(prefix="lora-studio-bench-") as folder:
        stretches, figures = asyncio.run(_loaded(Path(folder), options))
    asked += stretches
    goals.say(asked)
    goals.finish(options, asked, {"stored": stored, "load": figures})
    return 0


async def _loaded(root: Path, options: argparse.Namespace) -> tuple[list[Goal], dict[str, Any]]:
    many, more = options.viewers
    few_s, many_s, more_s = (10, 20, 10) if options.quick else (60, 180, 60)
    with _app(root) as url:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
            config = (await client.get("/config")).json()
            run, stop = await asyncio.to_thread(_train, url, root, options)
            journal = root / "runs" / run / "events.jsonl"
            await _until_training(journal)
            found: dict[str, tuple[Seen, float]] = {}
            stretches = [("alone", 0, few_s), (f"{many} viewers", many, many_s), ("alone again", 0, few_s)]
            for name, viewers, seconds in [*stretches, (f"{more} viewers", more, more_s)]:
                log.info("%s for %d s", name, seconds)
                began = time.time()
                seen = await _stretch(client, config, run, viewers, seconds)
                took = _step_s(journal, began, time.time())
                _age(seen, journal)
                found[name] = seen, took
            await asyncio.to_thread(stop)
    alone = statistics.mean([found["alone"][1], found["alone again"][1]])
    rows = []
    for name, (seen, took) in found.items():
        clicks = "–" if not seen.clicked else f"{_p(seen.clicked, 50):.2f} / {_p(seen.clicked, 95):.2f}"
        waits = "–" if not seen.ages else f"{_p(seen.ages, 50):.2f} / {_p(seen.ages, 95):.2f}"
        answers = "–" if not seen.answers else f"{_p(seen.answers, 50):.2f} / {_p(seen.answers, 95):.2f}"
        rows.append(
            [
                name,
                f"{len(seen.answers):,}",
                answers,
                waits,
                clicks,
                str(len(seen.errors)),
                f"{took:.3f}",
                f"{took / alone:.2f}",
            ]
        )
    heads = [
        "",
        "answers",
        "answered in, s: p50 / p95",
        "a step's age when seen",
        "clicks",
        "errors",
        "a step takes, s",
        "of alone",
    ]
    print(f"Training {options.model}. Seconds, median / 95th of 100.\n\n{markdown(heads, rows)}\n", flush=True)
    watched, slower = found[f"{many} viewers"]
    for problem in sorted(set(watched.errors))[:5]:
        print(f"error: {problem}")
    asked = [
        Goal(
            text=f"{many} viewers, a step's age when seen, p95",
            values=[_p(watched.ages, 95)],
            most=MOST_S,
            unit="seconds",
        ),
        Goal(text=f"{many} viewers, an answer, p95", values=[_p(watched.answers, 95)], most=MOST_S, unit="seconds"),
        Goal(text=f"{many} viewers, a click, p95", values=[_p(watched.clicked, 95)], most=MOST_S, unit="seconds"),
        Goal(text=f"{many} viewers, errors", values=[len(watched.errors)], most=0, unit="errors"),
        Goal(text=f"a training step with {many} viewers / without", values=[slower / alone], most=SLOWER),
    ]
    figures = {
        name: {
            "answers": len(seen.answers),
            "errors": len(seen.errors),
            "step_s": took,
            **{f"{kind}_p{share}": _p(times, share) for kind, times in _kinds(seen) for share in (50, 95) if times},
        }
        for name, (seen, took) in found.items()
    }
    return asked, figures


def _kinds(seen: Seen) -> list[tuple[str, list[float]]]:
    return [("answer", seen.answers), ("age", seen.ages), ("click", seen.clicked), *seen.clicks.items()]


# ---- viewers and clicks ----------------------------------------------------------------------------------------------


async def _stretch(
    client: httpx.AsyncClient, config: Mapping[str, Any], run: str, viewers: int, seconds: float
) -> Seen:
    """Everybody watches and somebody clicks for so long."""
    seen, until = Seen(), time.monotonic() + seconds
    watching = [
        _watch(Visitor(client, config), run, until, seen, number / max(viewers, 1)) for number in range(viewers)
    ]
    await asyncio.gather(
        *watching, _click(Visitor(client, config), run, until, seen) if viewers else asyncio.sleep(seconds)
    )
    return seen


async def _watch(visitor: Visitor, run: str, until: float, seen: Seen, share: float) -> None:
    """One viewer, from opening the page on."""
    await asyncio.sleep(share * EVERY_S)  # they did not come in the same instant
    start, token, listed = 0, "", -LIST_S
    while time.monotonic() < until:
        began = time.monotonic()
        lists = began - listed > LIST_S
        listed = began if lists else listed
        try:
            news = await visitor.poll(run=run, start=start, list=lists, known=token, log=False)
        except (OSError, EOFError, ValueError, KeyError) as error:
            seen.errors.append(repr(error)[:200])
        else:
            seen.answers.append(time.monotonic() - began)
            if start:  # what was there before this viewer came has no age
                seen.arrived += [(step, time.time()) for step in news["train"][0]]
            start, token = news["next"], news.get("token", token)
        await asyncio.sleep(EVERY_S)


async def _click(visitor: Visitor, run: str, until: float, seen: Seen) -> None:
    """Somebody who opens the run, chooses a tab, chooses a run, and begins again."""
    clicks = {
        "open a run": lambda: visitor.poll(run=run, start=0, list=True, known="", log=True),
        "choose a tab": visitor.change_tab,
        "through the queue": visitor.queued,
    }
    while time.monotonic() < until:
        for name, act in clicks.items():
            began = time.monotonic()
            try:
                await act()
            except (httpx.HTTPError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
                seen.errors.append(f"{name}: {error!r}"[:200])
            else:
                seen.clicks.setdefault(name, []).append(time.monotonic() - began)
            await asyncio.sleep(CLICK_S)


def _age(seen: Seen, journal: Path) -> None:
    """How old each step was when a viewer had it, by the journal's own times."""
    told = {one["step"]: one["time"] for one in _steps(journal)}
    seen.ages += [when - told[step] for step, when in seen.arrived if step in told]


# ---- the run ---------------------------------------------------------------------------------------------------------


@contextmanager
def _app(root: Path) -> Iterator[str]:
    """`python app.py` on a free port and an empty root."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"LORA_STUDIO_ROOT": str(root), "LORA_STUDIO_HOST": "127.0.0.1", "LORA_STUDIO_PORT": str(port)}
    with (root / "app.log").open("wb") as printed:
        here = Path(__file__).resolve().parents[1]
        app = subprocess.Popen(
            [sys.executable, "app.py"], cwd=here, env={**os.environ, **told}, stdout=printed, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/config", timeout=2).is_success:
                        break
                time.sleep(0.2)
            else:
                raise SystemExit((root / "app.log").read_text()[-2000:])
            yield f"http://127.0.0.1:{port}"
        finally:
            app.terminate()
            app.wait(20)


def _train(url: str, root: Path, options: argparse.Namespace) -> tuple[str, Any]:
    """Queue a long run through the app's own endpoints; its id, and what stops it and waits for its end."""
    from gradio_client import Client

    client = Client(url, verbose=False)
    model = str(tiny(root / "tiny")) if options.model == "tiny" else options.model
    rows = "".join(json.dumps({"prompt": f"Count {n}", "completion": f"{n} and {n + 1}"}) + "\n" for n in range(200))
    data = client.predict(text=rows, name="numbers", api_name="/add_dataset")
    run = client.predict(dataset=data, model=model, steps=100_000, batch_size=2, api_name="/start_run")

    def stop() -> None:
        client.predict(run=run, api_name="/stop_run")
        while client.predict(run=run, api_name="/run_status")["status"] in ("queued", "running"):
            time.sleep(0.5)

    return run, stop


async def _until_training(journal: Path) -> None:
    deadline = time.monotonic() + 300
    while sum(1 for _ in _steps(journal)) < 10:
        if time.monotonic() > deadline:
            raise SystemExit("the run does not train")
        await asyncio.sleep(0.5)


def _steps(journal: Path) -> Iterator[dict[str, Any]]:
    """The training steps of a run's journal."""
    if not journal.exists():
        return
    for line in journal.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n") and b"train_loss" in line:
            record = json.loads(line)
            if record["type"] == "Metric":
                yield record


def _step_s(journal: Path, since: float, until: float) -> float:
    """Seconds that a step took between two moments, on average."""
    times = [one["time"] for one in _steps(journal) if since <= one["time"] <= until]
    return (times[-1] - times[0]) / (len(times) - 1)


def _p(values: Sequence[float], share: int) -> float:
    """The value below which so many of 100 lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share / 100 * (len(ordered) - 1)))]


# ---- much to show ----------------------------------------------------------------------------------------------------


def opened(_: Mapping[str, Any]) -> dict[str, float]:
    """In a process of its own: seconds to list RUNS runs and to open a curve of STEPS steps, for the first time."""
    from lora_studio.events import Metric, Started, to_line
    from lora_studio.runs.config import DataChoice, RunConfig
    from lora_studio.runs.store import write_json
    from lora_studio.studio import Studio
    from lora_studio.ui.live import answer

    with tempfile.TemporaryDirectory(prefix="lora-studio-bench-") as folder:
        studio = Studio(folder)
        made = [
            studio.runs.create(RunConfig(name=f"run {n}", dataset=DataChoice(id="0" * 32)), {}) for n in range(RUNS)
        ]
        for run in made:
            started = to_line(
                Started(steps=3, trainable=1, total=1, device="cpu", precision="float32", train_rows=1, heldout_rows=1),
                time=1.0,
                attempt=1,
            )
            steps = [to_line(Metric(step=n, values={"train_loss": 1 / n}), time=1.0, attempt=1) for n in range(1, 4)]
            (run.path / "events.jsonl").write_text("\n".join([started, *steps, ""]))
            write_json(run.path / "exit.json", {"status": "done", "step": 3, "values": {"best_loss": 1.0}, "time": 2.0})
        first = Studio(folder)
        start = time.perf_counter()
        assert len(first.runs.list()) == RUNS
        listed = time.perf_counter()
        long = made[0].path / "events.jsonl"
        lines = (
            to_line(Metric(step=n, values={"train_loss": 1 / n}), time=1.0, attempt=1) for n in range(1, STEPS + 1)
        )
        long.write_text("\n".join([*lines, ""]))
        gc.freeze()  # as the app does, once its libraries are loaded
        fresh = Studio(folder)
        begun = time.perf_counter()
        news = json.dumps(answer(fresh, {"run": made[0].id, "start": 0}))
        done = time.perf_counter()
    return {"list_s": listed - start, "open_s": done - begun, "open_bytes": len(news)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="", help="what the run trains; the starter, with --quick a tiny one")
    parser.add_argument("--viewers", type=int, nargs=2, default=(20, 50), metavar=("MANY", "MORE"))
    parser.add_argument("--quick", action="store_true", help="a tiny model and seconds instead of minutes")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    options.model = options.model or ("tiny" if options.quick else "starter")
    return options


if __name__ == "__main__":
    sys.exit(main())
