"""The benchmark's own arithmetic: splits, verdicts, scores, and the paper's parameter counts. No data, no training."""

import dataclasses
import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import paper, published, quality, rows
from benchmarks.report import FULL, QUICK
from benchmarks.rows import apart
from benchmarks.trials import SHORT, Bench, Trial, label_scores, text_scores
from benchmarks.verdict import (
    CONFIRMED,
    NOT_CONFIRMED,
    WITHIN_NOISE,
    at_least,
    judge,
    measured,
    median_noise,
    paired_noise,
    pooled_noise,
)
from lora_studio.core.spec import paper_count
from lora_studio.errors import StudioError
from lora_studio.models import ModelLibrary
from tests.tiny import tiny_model, tokenizer

# ---- rows ------------------------------------------------------------------------------------------------------------


def data(folder: Path) -> Path:
    """Made-up rows in the four files' own shapes."""
    draw = random.Random(0)
    words = ["good", "bad", "dull", "fine", "warm", "odd"]
    texts = [" ".join(draw.choices(words, k=5)) + f" {n}" for n in range(240)]
    for name, part in (("train", texts[:200]), ("dev", texts[200:])):
        (folder / f"sst2_{name}.tsv").write_text("".join(f"{one}\t{n % 2}\n" for n, one in enumerate(part)))
    lines = [f'gj04\t{n % 2}\t{"*" if n % 2 else ""}\tHe said "{one}\n' for n, one in enumerate(texts)]
    (folder / "cola_train.tsv").write_text("".join(lines))
    pairs = [f'"name[{n // 3}], area[x]","The {n // 3}, no {n}, is here."\n' for n in range(90)]
    (folder / "e2e_dev.csv").write_text("mr,ref\n" + "".join(pairs))
    return folder


@pytest.mark.parametrize("seed", range(3))
def test_a_group_is_never_in_two_parts(seed: int) -> None:
    ones = [(f"group {n % 37}", n) for n in range(200)]
    parts = apart(ones, lambda one: one[0], [5, 7], seed)
    groups = [{name for name, _ in part} for part in parts]
    assert [len(one) for one in groups] == [5, 7, 25]
    assert not any(groups[i] & groups[j] for i in range(3) for j in range(i))
    assert sorted(one for part in parts for one in part) == sorted(ones)


def test_a_split_depends_on_the_rows_and_the_seed_alone() -> None:
    ones = [str(n) for n in range(50)]
    shuffled = random.Random(1).sample(ones, 50)
    same = [sorted(part) for part in apart(shuffled, str, [10])]
    assert [sorted(part) for part in apart(ones, str, [10])] == same
    assert [sorted(part) for part in apart(ones, str, [10], seed=1)] != same


def test_held_out_meanings_keep_all_their_references_and_are_not_trained_on(tmp_path: Path) -> None:
    found = rows.e2e(data(tmp_path), tuning=4, heldout=6)
    kept, tuned, trained = ({rows.meaning(one) for one in part} for part in (found.heldout, found.tuning, found.train))
    assert (len(kept), len(tuned), len(trained)) == (6, 4, 20) and not (
        kept & tuned or kept & trained or tuned & trained
    )
    assert [len(one) for one in found.references] == [3] * 6
    assert all(one.target in found.references[n] for n, one in enumerate(found.heldout))


def test_the_first_line_of_a_file_without_header_is_a_row_and_quotes_are_text(tmp_path: Path) -> None:
    found = rows.sst2(data(tmp_path), tuning=10, heldout=30)
    assert (len(found.train), len(found.tuning), len(found.heldout)) == (190, 10, 30)
    cola = rows.cola(tmp_path, tuning=10, heldout=20)
    assert (len(cola.tuning), len(cola.heldout)) == (10, 20) and cola.train[0].prompt[0].content.startswith('He said "')
    kinds = [one.target for one in cola.train]
    assert kinds.count("0") == kinds.count("1") > 90  # all but what evens them out


def test_other_rows_are_another_fingerprint(tmp_path: Path) -> None:
    one, again = (rows.cola(data(tmp_path), tuning=10, heldout=20) for _ in range(2))
    assert one.fingerprint == again.fingerprint != rows.cola(tmp_path, tuning=10, heldout=21).fingerprint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudioError, match=r"cola_train\.tsv"):
        rows.cola(tmp_path, tuning=1, heldout=1)


# ---- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "noise", "floor", "verdict"),
    [
        (0.5, 0.3, 0.0, CONFIRMED),
        (-0.5, 0.3, 0.0, NOT_CONFIRMED),
        (0.2, 0.3, 0.0, WITHIN_NOISE),
        (-0.2, 0.3, 0.0, WITHIN_NOISE),
        (-0.5, 0.3, -1.0, CONFIRMED),  # half a point below is within one point
        (-1.1, 0.3, -1.0, WITHIN_NOISE),
        (-1.5, 0.3, -1.0, NOT_CONFIRMED),
        (9.0, None, 0.0, WITHIN_NOISE),  # a spread that nobody measured settles nothing
        (0.0, 0.0, 0.0, WITHIN_NOISE),
        (math.nan, 0.1, 0.0, NOT_CONFIRMED),
    ],
)
def test_the_verdict(difference: float, noise: float | None, floor: float, verdict: str) -> None:
    assert judge(difference, noise, floor) == verdict


def test_the_sentence_is_made_of_the_figures() -> None:
    claim = at_least("LoRA is at or above X.", 90.5, 89.25, 0.5, unit="points", paper="95.1 against 94.8")
    assert claim.sentence == (
        "Confirmed: LoRA is at or above X. Here 90.50 against 89.25 points, difference +1.25 ± 0.50; "
        "the paper: 95.1 against 94.8."
    )
    alone = at_least("LoRA is at or above X.", 1.0, 2.0, None, unit="points", paper="-")
    assert alone.sentence.startswith("Within noise") and "of unknown noise" in alone.sentence
    assert "it is 291.90 times" in measured("Y.", 291.9, 0.0, floor=100, unit="times", paper="-").sentence


def test_nothing_is_confirmed_where_nothing_was_learnt() -> None:
    level = at_least("X.", 50.0, 40.0, 2.0, chance=50.0, unit="points", paper="-")
    assert level.judgement == WITHIN_NOISE and "neither is clearly above the 50.00 of no learning" in level.sentence
    assert at_least("X.", 53.0, 40.0, 2.0, chance=50.0, unit="points", paper="-").judgement == CONFIRMED


def test_noise_is_two_standard_errors() -> None:
    assert pooled_noise([[1.0, 3.0], [5.0, 7.0]]) == pytest.approx(2 * math.sqrt(2 * 2.0 / 2))
    assert pooled_noise([[1.0], [2.0]]) is None
    assert paired_noise([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]) == 0  # always one better: no noise in that
    assert paired_noise([1.0, 4.0], [0.0, 1.0]) == pytest.approx(2 * statistics.stdev([1, 3]) / math.sqrt(2))


def test_the_noise_of_a_median_shrinks_with_the_root_of_the_count_and_bears_outliers() -> None:
    draws = torch.randn(4000, generator=torch.Generator().manual_seed(0)).tolist()
    assert median_noise(draws) == pytest.approx(2 * 1.2533 / math.sqrt(4000), rel=0.05)
    assert median_noise([*draws, 1e9]) == pytest.approx(median_noise(draws), rel=0.01)


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_matthews_is_its_closed_form() -> None:
    draw = random.Random(0)
    truth, guesses = ([draw.random() < share for _ in range(300)] for share in (0.7, 0.6))
    tp, tn, fp, fn = (
        sum((one, other) == pair for one, other in zip(truth, guesses, strict=True))
        for pair in ((1, 1), (0, 0), (0, 1), (1, 0))
    )
    wanted = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    scores = label_scores([int(one) for one in truth], [int(one) for one in guesses])
    assert scores["matthews"] == pytest.approx(wanted, abs=1e-12)
    assert scores["accuracy"] == pytest.approx((tp + tn) / 300)
    assert label_scores([0, 1, 1], [1, 1, 1])["matthews"] == 0


def test_a_text_is_scored_against_the_best_of_its_references() -> None:
    references = [("the cat sat on the mat today", "a cat was there"), ("dogs bark loudly at night here",)]
    exact = text_scores([references[0][1], references[1][0]], references)
    assert exact["rouge_l_each"] == [100, 100] and exact["bleu"] == pytest.approx(100)
    assert text_scores(["a cat was there", "nothing of it"], references)["rouge_l_each"] == [100, 0]


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "width", "matrices", "millions"),
    [
        ("lora", 4, 4, 37.7),  # Table 4 and T15
        ("lora", 4, 2, 18.9),  # section 4.2: 35 MB in fp16
        ("lora", 1, 2, 4.7),
        ("adapter_h", 1, 0, 7.08),
        ("prompt", 264, 0, 3.24),  # 256 virtual tokens in front and 8 behind
    ],
)
def test_the_formulae_give_the_papers_gpt_3_counts(kind: str, width: int, matrices: int, millions: float) -> None:
    count = paper_count(kind, layers=96, hidden=12_288, width=width, matrices=matrices)
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if millions > 10 else 0.02)


def test_budgets_of_table_a_are_level() -> None:
    counts = {
        name: paper_count(method.kind, layers=6, hidden=384, width=method.width)
        for name, method in quality.GLUE.items()
        if getattr(method, "kind", "").startswith("adapter")
    }
    lora = paper_count("lora", layers=6, hidden=384, width=8)
    assert lora == 73_728 and counts == {"adapter_h": 78_432, "adapter_p": 76_128}


def test_every_choice_of_matrices_costs_the_same() -> None:
    assert {len(spec.targets) * spec.rank for spec in quality.MATRICES.values()} == {8}


def test_both_scales_know_every_method_and_the_paper_has_a_line_for_each() -> None:
    for scale in (FULL, QUICK):
        assert set(scale.glue) <= set(quality.GLUE) and set(scale.text) <= set(quality.TEXT)
        assert {*scale.glue, *scale.text} <= set(quality.CENTRES)
    assert set(quality.GLUE) == set(published.GLUE) and set(quality.TEXT) < set(published.E2E)


# ---- the whole run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a tiny encoder and a tiny language model, both wide enough for rank 64."""
    here = data(tmp_path_factory.mktemp("bench"))
    tiny_model(here / "writer", hidden_size=64)
    words = tokenizer()
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 48}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(here / "encoder")
    words.save_pretrained(here / "encoder")
    return here


SMALL = dataclasses.replace(
    QUICK, grid=(0.5, 1.0), steps=2, short_steps=2, tuning_steps=1, text_steps=2, text_tuning_steps=1, rounds=3,
    heldout_rows=20, tuning_rows=6, meanings=4, tuning_meanings=2, shapes=((1, 128), (2, 4)),
)  # fmt: skip


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *more: str) -> tuple[str, dict]:
    monkeypatch.setattr(paper, "QUICK", SMALL)
    for task in SHORT:
        monkeypatch.setitem(SHORT, task, 200)  # this tokenizer makes a token of every byte
    models = ["--encoder", str(folder / "encoder"), "--model", str(folder / "writer")]
    assert paper.main(["--data-dir", str(folder), "--quick", "--json", *models, *more]) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_every_table_comes_out_and_an_interrupted_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, document = run(folder, monkeypatch, capsys, "--cache", str(tmp_path))
    assert all(f"## ({letter})" in out for letter in "abcdefgh")
    assert set(document) >= {"ratios", "figures", "machine", "date"} and set(document["figures"]) == set("abcdefgh")
    assert all(math.isfinite(value) for value in document["ratios"].values())
    assert document["ratios"]["h checkpoint full / lora"] > 1
    assert all(claims for claims in document["verdicts"].values())

    trials = sorted(tmp_path.glob("*.json"))
    lost = next(path for path in trials if json.loads(path.read_text())["trial"]["task"] == "sst2")
    lost.unlink()
    trained: list[Trial] = []
    once = Bench._run
    monkeypatch.setattr(Bench, "_run", lambda self, trial, folder: trained.append(trial) or once(self, trial, folder))
    _, again = run(folder, monkeypatch, capsys, "--cache", str(tmp_path), "--only", "a,c,d,e,f")
    assert len(trained) == 1 and sorted(tmp_path.glob("*.json")) == trials  # the same settings, the same name
    for letter in "acdef":  # and the same seed, the same score
        assert again["figures"][letter] == document["figures"][letter]


def test_a_result_is_known_by_everything_that_makes_it(folder: Path, tmp_path: Path) -> None:
    def name(length: int = 20, **settings: object) -> str:
        found = rows.cola(folder, tuning=6, heldout=length)
        bench = Bench(ModelLibrary(tmp_path), {"cola": str(folder / "encoder")}, {"cola": found}, tmp_path)
        return bench._path(Trial(**({"task": "cola", "method": quality.GLUE["lora"], "rate": 1e-3} | settings))).name

    others = [{"rate": 2e-3}, {"seed": 1}, {"steps": 2}, {"batch": 2}, {"where": "tuning"}, {"method": None}]
    others += [{"method": quality.GLUE[one]} for one in ("dora", "full", "adapter_h")] + [{"length": 21}]
    assert len({name(), *(name(**one) for one in others)}) == 1 + len(others) and name() == name()


def test_the_command_line_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv(paper.DATA, raising=False)
    for wrong in ([], ["--data-dir", ".", "--only", "a,z"]):
        with pytest.raises(SystemExit) as error:
            paper.main(wrong)
        assert error.value.code == 2
    assert paper.main(["--data-dir", str(tmp_path)]) == 1 and "E_DATA" in capsys.readouterr().err
