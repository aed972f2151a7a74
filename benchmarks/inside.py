"""Tables e and f: what the updates are made of (section 7 of the paper), on the adapters that table d trained."""

import statistics
from itertools import combinations, product

import torch

from benchmarks import published
from benchmarks.quality import RANKS, SWEPT, lora_trial
from benchmarks.report import Report, Scale
from benchmarks.trials import Bench
from benchmarks.verdict import at_least, measured, paired_noise
from lora_studio.core.analysis import Amplification, amplification, directions, phi, random_phi, spectrum
from lora_studio.core.lora import Factors, weight

ROLES = {"q": "attn.q", "v": "attn.v"}
SHOWN = (1, 2, 4, 8, 64)


def similarity(bench: Bench, scale: Scale) -> Report:
    """Figures 3 and 4 of the paper as tables."""
    report = Report(letter="e", title="How alike the subspaces are: phi(i, j) (the paper's Figures 3 and 4, GPT-3)")
    of = {(rank, seed): _factors(bench, scale, rank, seed) for rank, seed in product((8, 64), scale.seeds)}
    # Other seeds: A keeps much of what it was drawn as, and one seed draws the same first rows at every rank.
    ranks = [(of[8, one], of[64, other]) for one, other in product(scale.seeds, repeat=2) if one != other]
    seeds = [(of[64, one], of[64, other]) for one, other in combinations(scale.seeds, 2)]
    across = {letter: _mean_phi(ranks, role, report) for letter, role in ROLES.items()}
    between = {letter: _mean_phi(seeds, role, report) for letter, role in ROLES.items()}
    width = of[8, scale.seeds[0]][0].A.shape[1]
    for what, maps, (rows, columns) in (
        ("rank 8 (i) in rank 64 (j)", across, (8, 64)),
        ("two seeds of rank 64", between, (64, 64)),
    ):
        random = random_phi(rows, columns, width)
        for letter, grids in maps.items():
            mean = torch.stack(grids).mean(0)
            chosen = [i for i in SHOWN if i <= rows]
            lines = [
                [f"i={i}", *(f"{mean[i - 1, j - 1]:.2f} ({random[i - 1, j - 1]:.2f})" for j in SHOWN)] for i in chosen
            ]
            report.add_table([f"Δ{letter}, {what}", *(f"j={j}" for j in SHOWN)], lines)
            name = f"{letter} {what.replace(' (i)', '').replace(' (j)', '')}"
            report.figures[name] = {f"{i},{j}": float(mean[i - 1, j - 1]) for i in chosen for j in SHOWN}
    _similarity_claims(report, across, between, width)
    report.settings += [
        f"Mean over the {len(across['q']) // len(ranks)} blocks and {len(ranks)} pairs of runs with different seeds;",
        f"in brackets what random subspaces of {width} dimensions give, max(i, j) / {width}. Right singular vectors",
        "of the update B A. The adapters are table d's.",
    ]
    return report


def _similarity_claims(report: Report, across: dict, between: dict, width: int) -> None:
    first = [float(grid[0, 0]) for grids in across.values() for grid in grids]
    rest = [float(grid[-1, 7]) for grids in across.values() for grid in grids]  # all 8 in the first 8 of the other
    random = float(random_phi(8, 64, width)[7, 7])
    report.claims += [
        measured(
            "The first direction of rank 8 is the first of rank 64 too: phi(1, 1) > 0.5.",
            statistics.fmean(first),
            _spread(first),
            floor=0.5,
            unit=f"(random {1 / width:.3f})",
            paper="above 0.5 for q and for v",
        ),
        at_least(
            "The first direction is shared more than the first eight together.",
            statistics.fmean(first),
            statistics.fmean(rest),
            paired_noise(first, rest),
            unit=f"(phi(1, 1) against phi(8, 8); random {1 / width:.3f} and {random:.3f})",
            paper="only the top direction overlaps strongly",
        ),
    ]
    q, v = ([float(grid[7, 7]) for grid in between[letter]] for letter in ("q", "v"))
    seeds_random = float(random_phi(64, 64, width)[7, 7])
    report.claims += [
        measured(
            "Two seeds find common directions, which random matrices do not have: phi(8, 8) above random.",
            statistics.fmean([*q, *v]),
            _spread([*q, *v]),
            floor=seeds_random,
            unit=f"(random {seeds_random:.2f})",
            paper="visibly above two Gaussian matrices",
        ),
        at_least(
            "The seeds share more directions in Δq than in Δv.",
            statistics.fmean(q),
            statistics.fmean(v),
            paired_noise(q, v),
            unit="(phi(8, 8))",
            paper="Δq has more common directions than Δv",
        ),
    ]
    report.ratios["e phi(1, 1) rank 8 in 64 / random"] = statistics.fmean(first) * width
    report.ratios["e phi(8, 8) two seeds / random"] = statistics.fmean([*q, *v]) / seeds_random


def _mean_phi(pairs: list, role: str, report: Report) -> list[torch.Tensor]:
    """phi of every block and pair of runs, in that order of nesting from the inside; notes what A alone gives."""
    grids, of_A = [], []
    for ours, theirs in pairs:
        for one, other in zip(_of(ours, role), _of(theirs, role), strict=True):
            grids.append(phi(spectrum(one).V, spectrum(other).V))
            of_A.append(float(phi(directions(one.A), directions(other.A))[0, 0]))
    report.figures.setdefault("phi(1, 1) of A alone", []).append({role: statistics.fmean(of_A)})
    return grids


def amplified(bench: Bench, scale: Scale) -> Report:
    """Table 7 of the paper."""
    report = Report(letter="f", title="How much the update amplifies: W_q (the paper's Table 7, GPT-3)")
    lora = bench.lora(SWEPT)
    lines, factor = [], {}
    for rank in published.AMPLIFICATION:
        found = [
            amplification(spectrum(one), weight(lora.model, one))
            for seed in scale.seeds
            for one in _of(_factors(bench, scale, rank, seed), ROLES["q"])
        ]
        factor[rank] = [one.factor for one in found]
        ours = _columns(found)
        lines.append([f"rank {rank}, ours", *(f"{one:.3f}" for one in ours)])
        lines.append([f"rank {rank}, paper", *(f"{one:.2f}" for one in published.AMPLIFICATION[rank])])
        report.figures[f"rank {rank}"] = dict(
            zip(("along_delta", "along_weight", "along_random", "delta_norm", "factor"), ours, strict=True)
        )
        along, random = [one.along_delta for one in found], [one.along_random for one in found]
        report.claims += [
            measured(
                f"Rank {rank}: the update amplifies its directions, the factor is above 1.",
                statistics.fmean(factor[rank]),
                _spread(factor[rank]),
                floor=1.0,
                unit="times",
                paper=f"{published.AMPLIFICATION[rank][4]:g}",
            ),
            at_least(
                f"Rank {rank}: W already has more in the update's directions than in random ones.",
                statistics.fmean(along),
                statistics.fmean(random),
                paired_noise(along, random),
                unit="in ‖Uᵀ W V‖",
                paper=f"{published.AMPLIFICATION[rank][0]:g} against {published.AMPLIFICATION[rank][2]:g}",
            ),
        ]
        report.ratios[f"f amplification rank {rank}"] = statistics.fmean(factor[rank])
    low, high = factor.values()
    report.claims.append(
        at_least(
            "The smaller rank amplifies more than the larger.",
            statistics.fmean(low),
            statistics.fmean(high),
            paired_noise(low, high),
            unit="times",
            paper="21.5 against 1.9",
        )
    )
    report.add_table(["W_q", "‖UᵀWV‖, of ΔW", "of W", "of random", "‖ΔW‖", "factor"], lines)
    report.settings += [
        f"Mean over all blocks and {len(scale.seeds)} seeds; the paper shows block 48 of 96. The adapters are",
        f"table d's, trained for {scale.short_steps} steps, so ‖ΔW‖ is small. The factor is ‖ΔW‖ / ‖UᵀWV‖, with the",
        "scale alpha / rank in ΔW.",
    ]
    return report


def _columns(found: list[Amplification]) -> list[float]:
    names = ("along_delta", "along_weight", "along_random", "delta_norm", "factor")
    return [statistics.fmean(getattr(one, name) for one in found) for name in names]


def _factors(bench: Bench, scale: Scale, rank: int, seed: int) -> list[Factors]:
    return bench.factors(lora_trial(bench, scale, RANKS[rank], seed))


def _of(factors: list[Factors], role: str) -> list[Factors]:
    return [one for one in factors if one.role == role]


def _spread(values: list[float]) -> float | None:
    """Two standard errors of a mean; blocks and pairs of runs count as independent, which they are not quite."""
    return 2 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
