"""The paper in miniature: trains, measures and prints tables a to h, each beside the paper's own figures.

    python -m benchmarks.paper --data-dir FOLDER                  the full run, about an hour on two cores alone
    python -m benchmarks.paper --data-dir FOLDER --quick          every table, under five minutes
    python -m benchmarks.paper --data-dir FOLDER --only c,d --cache results/

FOLDER holds sst2_train.tsv, sst2_dev.tsv, cola_train.tsv and e2e_dev.csv; LORA_STUDIO_BENCH_DATA names it as well.
The tables are Markdown on stdout, progress goes to stderr. With --cache an interrupted run goes on where it was.
"""

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import rows
from benchmarks.report import FULL, QUICK, Report, Scale
from lora_studio.errors import StudioError

log = logging.getLogger("benchmarks")

DATA = "LORA_STUDIO_BENCH_DATA"


def tables() -> dict[str, Callable[..., Report]]:
    """Table by letter; imported late, so that --help needs no torch."""
    from benchmarks import costs, inside, quality

    return {
        "a": quality.glue,
        "b": quality.text,
        "c": quality.matrices,
        "d": quality.ranks,
        "e": inside.similarity,
        "f": inside.amplified,
        "g": costs.latency,
        "h": costs.sizes,
    }


NEEDS = {"a": ("sst2", "cola"), "b": ("e2e",), **dict.fromkeys("cdef", ("sst2",)), **dict.fromkeys("gh", ("e2e",))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the asked tables; 0 when all came out, 1 with a reason on stderr otherwise."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%T", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        with _cache(options.cache) as cache:
            reports = run(options, cache)
    except StudioError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(_document(reports)))
    return 0


def run(options: argparse.Namespace, cache: Path) -> list[Report]:
    """Make and print the tables one by one, so that what is done is seen at once."""
    from benchmarks.trials import Bench
    from lora_studio.models import ModelLibrary
    from lora_studio.studio import default_root

    scale = QUICK if options.quick else FULL
    every = tables()
    models = {"sst2": options.encoder, "cola": options.encoder, "e2e": options.model}
    asked = sorted({task for letter in options.only for task in NEEDS[letter]})
    data = {task: read(task, options.data_dir, scale) for task in asked}
    bench = Bench(ModelLibrary(default_root()), models, data, cache)
    print(f"# The paper in miniature\n\n{heading(options)}\n", flush=True)
    reports = []
    for letter in options.only:
        start = time.monotonic()
        report = every[letter](bench, scale)
        report.wall_s = time.monotonic() - start
        print(report.text, flush=True)
        reports.append(report)
    return reports


def read(task: str, folder: Path, scale: Scale) -> rows.Rows:
    """The rows of one task, at the asked scale. Raises E_DATA."""
    if task == "e2e":
        return rows.e2e(folder, tuning=scale.tuning_meanings, heldout=scale.meanings)
    return {"sst2": rows.sst2, "cola": rows.cola}[task](folder, tuning=scale.tuning_rows, heldout=scale.heldout_rows)


def heading(options: argparse.Namespace) -> str:
    kind = (
        "quick run: few steps, seeds and rows, so that verdicts are about the code, not about the paper"
        if options.quick
        else "full run"
    )
    return f"{time.strftime('%F')}, {machine()}; {kind}."


def machine() -> str:
    """Processor, cores and versions, without a host name."""
    import torch
    import transformers

    cpu = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if cpu.exists()
        else []
    )
    name = names[0] if names else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}"


def _document(reports: Sequence[Report]) -> dict:
    return {
        "ratios": {name: value for report in reports for name, value in report.ratios.items()},
        "figures": {report.letter: report.figures for report in reports},
        "verdicts": {report.letter: [claim.sentence for claim in report.claims] for report in reports},
        "machine": machine(),
        "date": time.strftime("%F"),
    }


@contextmanager
def _cache(folder: Path | None) -> Iterator[Path]:
    """The folder of results; a temporary one when none is given."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lora-studio-bench-") as temporary:
        yield Path(temporary)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, help=f"folder of the data files; else {DATA}")
    parser.add_argument("--encoder", default="minilm", help="encoder of tables a, c, d, e, f: a name or a folder")
    parser.add_argument("--model", default="starter", help="language model of tables b, g, h: a name or a folder")
    parser.add_argument("--quick", action="store_true", help="every table in under five minutes on two cores")
    parser.add_argument("--only", default="abcdefgh", help="tables to make, such as a,c", type=_letters)
    parser.add_argument("--cache", type=Path, help="folder that keeps every single result")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    if options.data_dir is None and os.environ.get(DATA):
        options.data_dir = Path(os.environ[DATA])
    if options.data_dir is None:
        parser.error(f"give the data folder with --data-dir, or as {DATA}")
    return options


def _letters(text: str) -> tuple[str, ...]:
    letters = tuple(dict.fromkeys(text.replace(",", "").replace(" ", "")))
    if not letters or set(letters) - set(NEEDS):
        raise argparse.ArgumentTypeError(f"tables are a to h, got {text!r}")
    return tuple(sorted(letters))


if __name__ == "__main__":
    sys.exit(main())
