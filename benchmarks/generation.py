"""What answering side by side costs: several models in one batch, unmerged against merged, changing the strength.

    python -m benchmarks.generation                 about ten minutes on two cores alone
    python -m benchmarks.generation --quick         about two

The app's own decoding loop writes the same number of tokens in every way, greedily and past any end mark. The ways
take turns at every token, each on a copy of the model, so that the machine's drift hits all alike; precisions and
threads have a process each. Times are those of the clock, with threads that wait as the app's own do, so the machine
should have nothing else to do; the ratios for the prompt's pass are said beside those of decoding steps, and what
unmerged takes longer of an answer, prompt and all.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks import goals
from benchmarks.fresh import measure
from benchmarks.goals import Goal, middle, paired
from benchmarks.paper import machine
from benchmarks.verdict import markdown
from lora_studio.errors import StudioError

log = logging.getLogger("benchmarks")

PROMPT = 50  # tokens
PROMPTS = 5  # passes of it in a round, of which the median counts
TOGETHER = 1.9  # two rows in one batch against two runs, bf16
SIDE_BY_SIDE = 1.6  # base and four adapters in one batch against the base alone, bf16
OVERHEAD = 1.05  # unmerged against merged
CHANGE_S = 1e-3  # of a new strength
WAYS = ("base", "adapted", "both", "five", "merged")
ROWS: dict[str, tuple[str | None, ...]] = {  # of the batch
    "base": (None,),
    "adapted": ("run",),
    "both": (None, "run"),
    "five": (None, "run", "second", "third", "fourth"),
    "merged": (),
}
CHANGES = 1000  # of the strength


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything was measured, whether goals are met or not; 1 with a reason on stderr otherwise."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%T", stream=sys.stderr)
    print(f"# Generation\n\n{time.strftime('%F')}, {machine()}.\n", flush=True)
    found = {}
    try:
        for precision in ("bfloat16", "float32"):
            for threads in (1, 2):
                spec = {"model": options.model, "precision": precision, "tokens": options.tokens}
                told = {**spec, "rounds": options.rounds, "seed": options.seed}
                found[precision, threads] = measure("benchmarks.generation:timed", told, threads=threads, awake=True)
                log.info("%s, %d threads: done", precision, threads)
    except StudioError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    print(f"{in_words(options)}\n\n{table(found)}\n")
    asked = reached(found)
    goals.say(asked)
    figures = {f"{precision}, {threads} threads": one for (precision, threads), one in found.items()}
    goals.finish(options, asked, figures)
    return 0


def timed(spec: Mapping[str, Any]) -> dict[str, Any]:
    """In a process of its own: {"decode": {way: ms a step, a value a round}, "prefill": of the prompt, "change_s"}.

    "answer" is both together: the prompt, and as many steps as there are tokens.
    """
    import torch

    every = {way: _adapted(spec) for way in WAYS}
    torch.manual_seed(spec["seed"])
    vocabulary = every["base"].model.get_input_embeddings().num_embeddings
    prompt = torch.randint(vocabulary, (PROMPT,)).tolist()
    decode: dict[str, list[float]] = {way: [] for way in WAYS}
    prefill: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(spec["rounds"] + 1):  # the first is warm-up
        spent = _answered(every, prompt, spec["tokens"])
        again = [_answered(every, prompt, 1, turn) for turn in range(1, PROMPTS)]
        for way, (first, *steps) in spent.items() if number else ():
            prefill[way].append(1000 * statistics.median([first, *(one[way][0] for one in again)]))
            decode[way].append(1000 * statistics.median(steps))
    steps = spec["tokens"] - 1  # the first token is the prompt's
    answer = {
        way: [first + steps * step for first, step in zip(prefill[way], decode[way], strict=True)] for way in WAYS
    }
    return {"decode": decode, "prefill": prefill, "answer": answer, "change_s": _change(every["both"])}


def _adapted(spec: Mapping[str, Any]) -> Any:
    """The model with as many adapters as any way needs, the same each time."""
    import torch

    from lora_studio.core.lora import LoRA
    from lora_studio.core.spec import LoraSpec
    from lora_studio.models import ModelLibrary
    from lora_studio.studio import default_root

    lora = LoRA(ModelLibrary(default_root()).load(spec["model"], precision=spec["precision"], on="cpu"))
    torch.manual_seed(spec["seed"])
    for name in filter(None, ROWS["five"]):
        lora.add(name, LoraSpec(), seed=spec["seed"])
        with torch.no_grad():
            for tensor in lora.parameters(name):
                tensor.normal_(0, 0.02)  # a trained adapter has no zeros
    return lora


def _answered(every: Mapping[str, Any], prompt: Sequence[int], tokens: int, turn: int = 0) -> dict[str, list[float]]:
    """Seconds of the prompt's pass and of each decoding step behind it, the ways taking turns at every one of them.

    turn: which way has the first.
    """
    from lora_studio.core.merge import merged
    from lora_studio.generate import stream
    from lora_studio.settings import Sampling

    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    streams = {}
    with ExitStack() as inside:
        for way, lora in every.items():
            if way == "merged":
                inside.enter_context(merged(lora, "run"))
                inside.enter_context(lora.unhooked())
            else:
                inside.enter_context(lora.use(*ROWS[way]))
            prompts = [prompt] * max(1, len(ROWS[way]))
            streams[way] = stream(lora.model, prompts, Sampling(max_new_tokens=tokens), frozenset())
        for number in range(tokens):
            first = (turn + number) % len(WAYS)
            for way in WAYS[first:] + WAYS[:first]:
                start = time.perf_counter()
                next(streams[way])
                spent[way].append(time.perf_counter() - start)
    return spent


def _change(lora: Any) -> float:
    """Seconds that a change of the strength takes while an adapter is in use: the median of many."""
    spent = []
    with lora.use(None, "run"):
        for number in range(CHANGES):
            start = time.perf_counter()
            lora.set_scale("run", number / CHANGES)
            spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def together(one: Mapping[str, Any], part: str = "decode") -> list[float]:
    """How many times the two runs' time one batch of both takes less, round by round."""
    two = [base + adapted for base, adapted in zip(one[part]["base"], one[part]["adapted"], strict=True)]
    return paired(two, one[part]["both"])


def slowed(one: Mapping[str, Any], part: str = "decode") -> list[float]:
    """How many times longer unmerged takes than merged, round by round."""
    return paired(one[part]["adapted"], one[part]["merged"])


def reached(found: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[Goal]:
    """What was asked, at every precision and number of threads that it was asked of."""
    asked = []
    for (precision, threads), one in found.items():
        where = f"{precision}, {threads} thread{'s' if threads > 1 else ''}"
        if precision == "bfloat16":
            text = f"{where}: two runs / one batch of base and adapted, a decoding step"
            asked.append(Goal(text=text, values=together(one), least=TOGETHER))
            text = f"{where}: base and four adapters in one batch / one answer alone, a decoding step"
            five = paired(one["decode"]["five"], one["decode"]["base"])
            asked.append(Goal(text=text, values=five, most=SIDE_BY_SIDE))
        for what, slower in (("a decoding step", slowed(one)), ("prompt and answer", slowed(one, "answer"))):
            asked.append(Goal(text=f"{where}: unmerged / merged, {what}", values=slower, most=OVERHEAD))
    changes = [one["change_s"] for one in found.values()]
    asked.append(Goal(text="changing the strength", values=changes, most=CHANGE_S, unit="seconds"))
    return asked


def table(found: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    """Milliseconds that a decoding step takes in every way, and the ratios of the rounds."""
    ratios = (
        "two runs / both",
        "same, the prompt",
        "five / base",
        "unmerged / merged",
        "same, the prompt",
        "same, an answer",
    )
    head = ["ms a step", *WAYS, *ratios]
    lines = []
    for (precision, threads), one in found.items():
        decode = one["decode"]
        lines.append(
            [
                f"{precision}, {threads} thread{'s' if threads > 1 else ''}",
                *(middle(decode[way], 1) for way in WAYS),
                middle(together(one)),
                middle(together(one, "prefill")),
                middle(paired(decode["five"], decode["base"])),
                middle(slowed(one), 3),
                middle(slowed(one, "prefill"), 3),
                middle(slowed(one, "answer"), 3),
            ]
        )
    return markdown(head, lines)


def in_words(options: argparse.Namespace) -> str:
    """What was measured, for the reader of the table."""
    return (
        f"Model {options.model}, LoRA r=8 on q and v, a prompt of {PROMPT} tokens, {options.tokens} new ones; a round "
        f"takes the median step of each way, {options.rounds} rounds: median (least–most). Both: row 0 the base, row 1 "
        "adapted; five: the base and four adapters. Merged: folded in, without hooks."
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="starter", help="a name or a folder")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of every answer")
    parser.add_argument("--rounds", type=int, default=9, help="how often every way is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few rounds and tokens")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.tokens = 3, 10
    return options


if __name__ == "__main__":
    sys.exit(main())
