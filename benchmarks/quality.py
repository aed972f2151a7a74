"""Tables a to d: how well the methods do, on the encoder (SST-2, CoLA) and on the starter model (E2E)."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import published
from benchmarks.report import Report, Scale
from benchmarks.trials import PRECISION, SHORT, Bench, Trial, label
from benchmarks.verdict import Claim, at_least, mean_sd, paired_noise, pooled_noise
from lora_studio.core.spec import BaselineSpec, LoraSpec, Method

ALPHA = 16.0  # the same for every rank, as in the paper: with alpha / rank the best rate then hardly moves with it
SWEPT = "sst2"  # the task of tables c to f: what is compared must have been learnt
SCORE = {"sst2": "accuracy", "cola": "matthews"}
NAMES = {"sst2": "SST-2, accuracy", "cola": "CoLA, Matthews"}

# Budgets on MiniLM (6 blocks of 384): LoRA 73,728; DoRA 78,336; adapter H 78,432; adapter P 76,128.
GLUE: dict[str, Method] = {
    "full": BaselineSpec(kind="full"),
    "top": BaselineSpec(kind="top", width=2),
    "bitfit": BaselineSpec(kind="bitfit"),
    "adapter_h": BaselineSpec(kind="adapter_h", width=8),
    "adapter_p": BaselineSpec(kind="adapter_p", width=16),
    "lora": LoraSpec(rank=8, alpha=ALPHA),
    "dora": LoraSpec(rank=8, alpha=ALPHA, variant="dora"),
}
# Budgets on the starter (30 blocks of 576, 3 of 9 heads for k and v): LoRA 460,800; adapter H 449,640;
# adapter L 466,920; prefix of keys and values 460,800. A prefix of embeddings of that size would be 800 tokens.
TEXT: dict[str, Method] = {
    "full": BaselineSpec(kind="full"),
    "top": BaselineSpec(kind="top", width=2),
    "bitfit": BaselineSpec(kind="bitfit"),
    "adapter_h": BaselineSpec(kind="adapter_h", width=6),
    "adapter_l": BaselineSpec(kind="adapter_l", width=12),
    "prefix": BaselineSpec(kind="prefix", width=40),
    "prompt": BaselineSpec(kind="prompt", width=40),
    "lora": LoraSpec(rank=8, alpha=ALPHA),
}
# The middle of each method's grid on the encoder and on the starter; every method tries as many rates.
CENTRES: dict[str, tuple[float, float]] = {
    "full": (2e-4, 2e-4),
    "top": (5e-4, 5e-4),
    "bitfit": (5e-3, 1e-2),
    "adapter_h": (3e-3, 5e-3),
    "adapter_p": (3e-3, 5e-3),
    "adapter_l": (3e-3, 5e-3),
    "prefix": (1e-2, 2e-2),
    "prompt": (3e-2, 5e-2),
    "lora": (3e-3, 5e-3),
    "dora": (3e-3, 5e-3),
}
MATRICES = {  # Table 5: the same budget on one, two or four matrices of each block
    name: LoraSpec(rank=8 // len(name), alpha=ALPHA, targets=tuple(f"attn.{one}" for one in name))
    for name in published.MATRICES
}
RANKS = {rank: LoraSpec(rank=rank, alpha=ALPHA) for rank in published.RANKS}


@dataclass(frozen=True)
class Rate:
    """A chosen learning rate and how it was chosen."""

    value: float
    tried: int
    at_the_end: bool  # of the grid: a better one may lie outside

    def __str__(self) -> str:
        return f"{self.value:.2g}{'*' if self.at_the_end else ''}"


def chosen_rate(bench: Bench, scale: Scale, task: str, method: str) -> Rate:
    """The best of the method's grid on the tuning rows, which are taken from the training rows; one seed."""
    text = task == "e2e"
    rates = [CENTRES[method][text] * factor for factor in scale.grid]
    if len(rates) == 1:
        return Rate(rates[0], 1, False)
    scores = [bench.result(tuning_trial(scale, task, method, rate))["scores"] for rate in rates]
    worth = [-one["loss"] if text else one[SCORE[task]] for one in scores]
    best = max(range(len(rates)), key=worth.__getitem__)
    return Rate(rates[best], len(rates), best in (0, len(rates) - 1))


def tuning_trial(scale: Scale, task: str, method: str, rate: float) -> Trial:
    if task == "e2e":
        steps, batch = scale.text_tuning_steps, scale.text_batch
        return Trial(task=task, method=TEXT[method], rate=rate, steps=steps, batch=batch, where="tuning")
    return Trial(task=task, method=GLUE[method], rate=rate, steps=scale.tuning_steps, batch=scale.batch, where="tuning")


def how_rates_were_chosen(scale: Scale, steps: int, rows: str) -> str:
    if len(scale.grid) == 1:
        return "Learning rates: the centre of each method's grid, untuned."
    return (
        f"Learning rates: the best of {len(scale.grid)} per method after {steps} steps, one seed, on {rows} "
        "taken from the training rows; * marks the end of a grid."
    )


# ---- table a -----------------------------------------------------------------------------------------------------


def glue(bench: Bench, scale: Scale) -> Report:
    """Table 2 of the paper."""
    report = Report(letter="a", title="SST-2 and CoLA, MiniLM encoder (the paper's Table 2, RoBERTa)")
    for task in ("sst2", "cola"):
        _glue_task(bench, scale, task, report)
    for task, name in NAMES.items():
        learnt, shown = len(bench.encoded(task, "train")), len(bench.rows[task].heldout)
        report.settings.append(
            f"{name.split(',')[0]}: {learnt:,} training rows of up to {SHORT[task]} tokens, {shown:,} reported rows."
        )
    report.settings += [
        "CoLA's reported rows are held out of its training file, and it learns from as many rows of either label.",
        f"{scale.steps} steps of {scale.batch} rows, {len(scale.seeds)} seeds, mean ± standard deviation; linear",
        "schedule, warm-up 0.06, float32.",
        how_rates_were_chosen(scale, scale.tuning_steps, f"{scale.tuning_rows} sentences"),
        "Noise: two standard errors over seeds, pooled over the methods; the choice of reported rows is not in it",
        "and would move an accuracy of 85 by about ± 1.2 points itself.",
        "Every method trains the classifier as well; the paper's adapters are RoBERTa-large's.",
    ]
    return report


def _glue_task(bench: Bench, scale: Scale, task: str, report: Report) -> None:
    methods = scale.glue if task == "sst2" else scale.cola
    scores: dict[str, list[float]] = {}
    lines = []
    for name in methods:
        rate = chosen_rate(bench, scale, task, name)
        settings = {"task": task, "method": GLUE[name], "rate": rate.value, "steps": scale.steps, "batch": scale.batch}
        found = [bench.result(Trial(seed=seed, **settings)) for seed in scale.seeds]
        report.results(f"{task} {name}", found)
        scores[name] = [100 * one["scores"][SCORE[task]] for one in found]
        paper = published.GLUE[name]
        own = found[0]["trainable"] - found[0]["head"]
        lines.append(
            [
                label(GLUE[name]),
                f"{own:,}" if name != "full" else f"{found[0]['trainable']:,}",
                f"{found[0]['trainable'] / found[0]['total']:.2%}",
                str(rate),
                mean_sd(scores[name]),
                f"{paper[task == 'cola']:.1f}" if paper else "–",
            ]
        )
    head = [f"{NAMES[task]}", "trained, without head", "share, with head", "rate", "ours", "paper"]
    report.add_table(head, lines)
    noise = pooled_noise(scores.values())
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    report.claims += [
        _against(task, other, means, noise, chance(bench, task))
        for other in methods
        if other not in ("lora", "dora", "top")
    ]
    for name in means:
        report.ratio(f"a {task} lora / {name}", means["lora"], means[name])


def _against(task: str, other: str, means: dict[str, float], noise: float | None, level: float) -> Claim:
    """LoRA against one method; full fine-tuning trains everything, so one point below it still counts as level."""
    theirs = published.GLUE[other]
    assert theirs is not None
    paper = published.GLUE_LARGE_LORA if other.startswith("adapter") else published.GLUE["lora"]
    assert paper is not None
    column = int(task == "cola")
    full = other == "full"
    name = "full fine-tuning" if full else f"{label(GLUE[other])}{' of the same size' if other != 'bitfit' else ''}"
    return at_least(
        f"{NAMES[task].split(',')[0]}: LoRA is {'within one point of' if full else 'at or above'} {name}.",
        means["lora"],
        means[other],
        noise,
        floor=-1.0 if full else 0.0,
        chance=level,
        unit="points",
        paper=f"{paper[column]:.1f} against {theirs[column]:.1f}",
    )


def chance(bench: Bench, task: str) -> float:
    """The score in points of always answering the commonest label."""
    truth = [row.target for row in bench.rows[task].heldout]
    return 0.0 if task == "cola" else 100 * max(truth.count(one) for one in bench.rows[task].labels) / len(truth)


# ---- table b -----------------------------------------------------------------------------------------------------


def text(bench: Bench, scale: Scale) -> Report:
    """Table 3 of the paper."""
    report = Report(letter="b", title="E2E, starter model (the paper's Table 3, GPT-2 medium)")
    base = bench.result(Trial(task="e2e", method=None))
    report.results("e2e base", [base])
    found = {"base": base}
    lines = [_text_line("base", base, "–")]
    for name in scale.text:
        rate = chosen_rate(bench, scale, "e2e", name)
        steps, batch = scale.text_steps, scale.text_batch
        found[name] = bench.result(Trial(task="e2e", method=TEXT[name], rate=rate.value, steps=steps, batch=batch))
        report.results(f"e2e {name}", [found[name]])
        lines.append(_text_line(name, found[name], str(rate)))
    head = ["E2E", "trained", "share", "rate", "ROUGE-L", "BLEU", "loss", "paper ROUGE-L", "paper BLEU"]
    report.add_table(head, lines)
    for other in ("full", "prefix", "adapter_l", "adapter_h", "prompt", "bitfit"):
        if other in found:
            report.claims.append(_text_against(other, found))
            ours, theirs = (found[one]["scores"]["rouge_l"] for one in ("lora", other))
            report.ratio(f"b rouge_l lora / {other}", ours, theirs)
    rows = bench.rows["e2e"]
    report.settings += [
        f"{len(bench.encoded('e2e', 'train')):,} training rows; {len(rows.heldout)} meaning representations are held",
        f"out with all their {sum(map(len, rows.references))} references. {scale.text_steps} steps of",
        f"{scale.text_batch} rows, one seed; linear schedule, warm-up 0.06; for every method the base is in",
        f"{PRECISION['e2e']} and what is trained in float32. Greedy answers (the paper: beam 10); sacrebleu's cased",
        "BLEU and ROUGE-L's F1 against the best reference, loss per reference token.",
        how_rates_were_chosen(scale, scale.text_tuning_steps, f"{scale.tuning_meanings} meaning representations"),
        "Noise: two standard errors of the paired ROUGE-L differences over the held-out meaning representations;",
        "another training seed is not in it.",
    ]
    return report


def _text_line(name: str, found: dict, rate: str) -> list[str]:
    scores, paper = found["scores"], published.E2E[name] or (None, None)
    return [
        label(TEXT.get(name)),
        f"{found['trainable']:,}",
        f"{found['trainable'] / found['total']:.2%}",
        rate,
        f"{scores['rouge_l']:.1f}",
        f"{scores['bleu']:.1f}",
        f"{scores['loss']:.3f}",
        *(f"{one:.1f}" if one else "–" for one in reversed(paper)),
    ]


def _text_against(other: str, found: dict[str, dict]) -> Claim:
    ours, theirs = (found[name]["scores"]["rouge_l_each"] for name in ("lora", other))
    paper, lora = published.E2E[other], published.E2E["lora"]
    assert lora is not None
    beside = f"BLEU {lora[0]:.1f} against {paper[0]:.1f}" if paper else "no such row on E2E"
    if paper and paper[1]:
        beside = f"ROUGE-L {lora[1]:.1f} against {paper[1]:.1f}, {beside}"
    return at_least(
        f"E2E: LoRA is at or above {label(TEXT[other])}.",
        statistics.fmean(ours),
        statistics.fmean(theirs),
        paired_noise(ours, theirs),
        chance=found["base"]["scores"]["rouge_l"],
        unit="ROUGE-L",
        paper=beside,
    )


# ---- tables c and d ----------------------------------------------------------------------------------------------


def lora_trial(bench: Bench, scale: Scale, spec: LoraSpec, seed: int) -> Trial:
    """The short SST-2 run of tables c to f; every one at the rate chosen for rank 8 on q and v."""
    rate = chosen_rate(bench, scale, SWEPT, "lora").value
    return Trial(task=SWEPT, method=spec, rate=rate, steps=scale.short_steps, batch=scale.batch, seed=seed)


def matrices(bench: Bench, scale: Scale) -> Report:
    """Table 5 of the paper."""
    report = Report(
        letter="c", title="Which matrices, at one budget: SST-2, MiniLM encoder (the paper's Table 5, GPT-3)"
    )
    head = ["matrices", "rank", "trained, without head", "ours, accuracy", "paper WikiSQL", "paper MNLI-m"]
    scores = _sweep(bench, scale, report, head, MATRICES, published.MATRICES)
    noise, means = pooled_noise(scores.values()), {name: statistics.fmean(one) for name, one in scores.items()}
    paper = published.MATRICES
    for better, worse in (("qv", "q"), ("qv", "k"), ("qkvo", "q")):
        beside = " and ".join(
            f"{one:.1f} against {other:.1f}" for one, other in zip(paper[better], paper[worse], strict=True)
        )
        claim = f"{'+'.join(better)} together are at or above {worse} alone with the same number of parameters."
        report.claims.append(
            at_least(
                claim, means[better], means[worse], noise, chance=chance(bench, SWEPT), unit="points", paper=beside
            )
        )
        report.ratio(f"c {better} / {worse}", means[better], means[worse])
    return report


def ranks(bench: Bench, scale: Scale) -> Report:
    """Table 6 of the paper."""
    report = Report(letter="d", title="Which rank, on q and v: SST-2, MiniLM encoder (the paper's Table 6, GPT-3)")
    head = ["matrices", "rank", "trained, without head", "ours, accuracy", "paper WikiSQL", "paper MNLI-m"]
    scores = _sweep(bench, scale, report, head, RANKS, published.RANKS)
    noise, means = pooled_noise(scores.values()), {rank: statistics.fmean(one) for rank, one in scores.items()}
    paper = published.RANKS
    for rank in (1, 8):
        beside = " and ".join(
            f"{one:.1f} against {other:.1f}" for one, other in zip(paper[rank], paper[64], strict=True)
        )
        claim = f"Rank {rank} is within one point of rank 64."
        report.claims.append(
            at_least(
                claim,
                means[rank],
                means[64],
                noise,
                floor=-1.0,
                chance=chance(bench, SWEPT),
                unit="points",
                paper=beside,
            )
        )
        report.ratio(f"d rank {rank} / rank 64", means[rank], means[64])
    return report


def _sweep(
    bench: Bench, scale: Scale, report: Report, head: Sequence[str], specs: dict, paper: dict
) -> dict[Any, list[float]]:
    """Train every spec with every seed; one line each. Returns the scores by name, in points."""
    scores, lines = {}, []
    for name, spec in specs.items():
        keep = name in (4, 8, 64)  # tables e and f look into these
        found = [bench.result(lora_trial(bench, scale, spec, seed), keep=keep) for seed in scale.seeds]
        report.results(str(name), found)
        scores[name] = [100 * one["scores"][SCORE[SWEPT]] for one in found]
        trained = f"{found[0]['trainable'] - found[0]['head']:,}"
        matrices_ = "+".join(role.removeprefix("attn.") for role in spec.targets)
        lines.append(
            [matrices_, str(spec.rank), trained, mean_sd(scores[name]), *(f"{one:.1f}" for one in paper[name])]
        )
    report.add_table(head, lines)
    report.settings += [
        f"{scale.short_steps} steps of {scale.batch} rows, {len(scale.seeds)} seeds, mean ± standard deviation;",
        f"{len(bench.rows[SWEPT].heldout):,} reported rows; alpha {ALPHA:g} throughout, all at the rate",
        f"{chosen_rate(bench, scale, SWEPT, 'lora')} that table a chose for rank 8 on q and v.",
    ]
    return scores
