"""Seconds from Start to the first training step, with a spare worker and without.

    python -m benchmarks.start [--model starter --data orders]

A step begins when everything is loaded: the run says Started, and the first forward and backward, the probe's, is under
way. The probe's end and the first trained step are shown too; how long they take is the machine's affair. Start is
`Studio.start` on a form whose plan is known, as it is on the page; the events carry the worker's own clock.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import goals
from benchmarks.goals import Goal
from benchmarks.paper import machine
from benchmarks.verdict import markdown

MOST_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="starter", help="a model that is on this machine")
    parser.add_argument("--data", default="orders", help="a sample's name or a file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    print(f"# From Start to the first step\n\n{time.strftime('%F')}, {machine()}.\n", flush=True)
    found: dict[str, list[dict[str, float]]] = {"spare": [], "cold": []}
    with tempfile.TemporaryDirectory(prefix="lora-studio-bench-") as folder:
        for _ in range(options.repeats):
            for kind, times in found.items():
                times.append(once(Path(folder), options.model, options.data, spare=kind == "spare"))
    columns = ("begins", "probed", "trained")
    rows = [[kind, *(goals.middle([one[name] for one in times]) for name in columns)] for kind, times in found.items()]
    heads = ["worker", "the first step begins, s", "the probe has ended, s", "step 1 has ended, s"]
    print(markdown(heads, rows) + "\n")
    begins = [one["begins"] for one in found["spare"]]
    goal = Goal(text="from Start to the first step, with a spare worker", values=begins, most=MOST_S, unit="seconds")
    goals.say([goal])
    goals.finish(options, [goal], found)


def once(root: Path, model: str, data: str, *, spare: bool) -> dict[str, float]:
    """Seconds from Start to three moments of one run."""
    from lora_studio.runs.config import DataChoice, RunConfig
    from lora_studio.settings import TrainConfig
    from lora_studio.studio import Studio

    studio = Studio(root)
    dataset = studio.data.find(data)
    train = TrainConfig(steps=5, evaluations=1, samples=0)
    config = RunConfig(name="start", model=model, dataset=DataChoice(id=dataset.id, name=dataset.name), train=train)
    studio.plan(config.model, config.method, config.train, config.dataset, config.task)
    executor = studio.supervisor.executors["local"]
    if spare:
        executor.prepare()
        _wait_until_idle()
    start, seen = time.time(), {}
    run = studio.start(config)
    for event in studio.follow(run.id, interval_s=0.02):
        seen.setdefault(_moment(event), event["time"] - start)
        if "trained" in seen:
            studio.stop(run.id)
    executor.close()
    return {name: seen[name] for name in ("begins", "probed", "trained")}


def _moment(event: dict[str, Any]) -> str:
    trained = event["type"] == "Metric" and event["step"] == 1
    return "trained" if trained else {"Started": "begins", "Probed": "probed"}.get(event["type"], "")


def _wait_until_idle() -> None:
    """Until our children, the spare worker among them, use no processor any more: it has imported all and waits."""
    children, used = psutil.Process().children(), -1.0
    while (now := sum(sum(child.cpu_times()[:2]) for child in children)) != used or now < 1.0:
        used = now
        time.sleep(1.0)


if __name__ == "__main__":
    main()
