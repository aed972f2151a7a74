"""What the Inside tab and `analyze` tell of an adapter: figures of real factors, the rank curve, smaller adapters."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from lora_studio import inside
from lora_studio.adapters import load, save
from lora_studio.cli import app
from lora_studio.core.baselines import add
from lora_studio.core.lean import Tokens
from lora_studio.core.lora import LoRA, weight
from lora_studio.core.spec import BaselineSpec, LoraSpec, Method
from lora_studio.errors import StudioError
from lora_studio.measure import mean_loss
from lora_studio.owners import NOBODY
from lora_studio.runs.config import DataChoice, RunConfig
from lora_studio.runs.store import write_json
from lora_studio.studio import Studio
from lora_studio.ui import inside_tab
from lora_studio.ui.desk import Desk
from tests.tiny import causal, classifier

ROWS = [Tokens([n % 7 + 3, 11, n % 5 + 20, 4, 9, n % 3 + 40], [False] * 2 + [True] * 4) for n in range(12)]


def drawn(lora: LoRA, name: str, spec: LoraSpec, seed: int = 1) -> None:
    """An adapter with every value drawn, as if trained."""
    lora.add(name, spec)
    draws = torch.Generator().manual_seed(seed)
    for tensor in lora.parameters(name):
        tensor.data += 0.2 * torch.randn(tensor.shape, generator=draws)


def fitted(lora: LoRA, name: str, spec: LoraSpec, steps: int = 60) -> None:
    """An adapter that has learnt ROWS."""
    lora.add(name, spec)
    optimizer = torch.optim.AdamW(lora.parameters(name), lr=0.02)
    ids = torch.tensor([row.ids for row in ROWS])
    labels = ids.masked_fill(~torch.tensor([row.supervised for row in ROWS]), -100)
    for _ in range(steps):
        with lora.use(name):
            lora.model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def learnt() -> LoRA:
    """Adapters "x" of rank 8 and "y" of rank 2 on one llama."""
    lora = LoRA(causal("llama"))
    fitted(lora, "x", LoraSpec(rank=8, targets=("all-linear",)))
    drawn(lora, "y", LoraSpec(rank=2, targets=("attn.q", "embed")))
    return lora


def logits(lora: LoRA, name: str | None) -> torch.Tensor:
    with torch.no_grad(), lora.use(name):
        return lora.model(input_ids=torch.arange(3, 25).view(2, 11), use_cache=False).logits


# ---- report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_figure_is_that_of_the_dense_update(family: str) -> None:
    lora = LoRA(causal(family))
    drawn(lora, "x", LoraSpec(rank=3, alpha=5.0, targets=("attn.q", "mlp.down", "embed")))
    modules = {(module.name, module.role): module for module in inside.report(lora, "x").modules}
    assert len(modules) == 5
    for factors in lora.delta("x"):
        found, dense, W = modules[factors.layer, factors.role], factors.dense(), weight(lora.model, factors)
        assert found.delta_norm == pytest.approx(float(dense.norm()), rel=1e-5)
        assert found.relative_norm == pytest.approx(float(dense.norm() / W.norm()), rel=1e-5)
        assert found.singular_values == pytest.approx(torch.linalg.svdvals(dense)[:3].tolist(), rel=1e-4)
        assert 1 <= found.effective_rank <= 3 and 1 <= found.rank99 <= 3
        U, _, Vh = torch.linalg.svd(dense)
        along = float((U[:, :3].T @ W @ Vh[:3].T).norm())
        assert found.amplification.factor == pytest.approx(found.delta_norm / along, rel=1e-3)


def test_layers_are_numbered_and_the_embedding_has_none() -> None:
    lora = LoRA(causal("gpt2"))
    lora.add("y", LoraSpec(targets=("attn.q", "embed")))
    places = [(module.layer, module.role) for module in inside.report(lora, "y").modules]
    assert places == [(None, "embed"), (0, "attn.q"), (1, "attn.q")]


def test_the_json_has_the_promised_shape(learnt: LoRA) -> None:
    told = json.loads(json.dumps(inside.report(learnt, "y", "x").as_json(), allow_nan=False))
    assert set(told) == {"modules", "amplification", "similarity"} and len(told["amplification"]) == 3
    keys = {"name", "role", "layer", "delta_norm", "relative_norm", "effective_rank", "rank99", "singular_values"}
    assert set(told["modules"][0]) == keys
    assert {"name", "rank", "along_delta", "along_weight", "along_random", "factor"} <= set(told["amplification"][0])
    assert inside.report(learnt, "y").as_json()["similarity"] is None


def test_a_fresh_adapter_changes_nothing_and_says_so() -> None:
    lora = LoRA(causal("llama"))
    lora.add("x", LoraSpec(rank=4))
    told = inside.report(lora, "x", "x").as_json()
    assert {module["relative_norm"] for module in told["modules"]} == {0.0}
    assert {module["effective_rank"] for module in told["modules"]} == {0.0}
    assert {row["factor"] for row in told["amplification"]} == {0.0}
    assert told["similarity"]["modules"][0]["phi_update"] == []  # no update, no directions
    json.dumps(told, allow_nan=False)


# ---- similarity --------------------------------------------------------------------------------------------------


def test_similarity_is_on_shared_matrices_and_one_with_itself(learnt: LoRA) -> None:
    own = inside.similarity(learnt, "x", "x")
    assert own.alone == (0, 0) and len(own.modules) == 14
    for overlap in own.modules:
        for grid in (overlap.phi, overlap.phi_update):
            assert [line[place] for place, line in enumerate(grid)] == pytest.approx([1.0] * len(grid), abs=1e-3)
    two = inside.similarity(learnt, "x", "y")
    assert two.names == ("x", "y") and two.alone == (12, 1)
    assert {overlap.role for overlap in two.modules} == {"attn.q"}
    first = two.modules[0]
    assert (len(first.phi), len(first.phi[0])) == (8, 2) and first.baseline[7][0] == first.baseline[7][1] == 8 / 32


def test_the_same_seed_starts_with_the_same_directions() -> None:
    lora = LoRA(causal("llama"))
    for name, rank, seed in (("a", 8, 0), ("b", 2, 5)):
        lora.add(name, LoraSpec(rank=rank), seed=seed)
    lora.add("c", LoraSpec(rank=8), seed=0)
    assert inside.similarity(lora, "a", "c").modules[0].phi[0][0] == 1.0
    assert inside.similarity(lora, "a", "b").modules[0].phi[0][0] < 0.9


def test_adapters_with_nothing_in_common_are_named(learnt: LoRA) -> None:
    lora = LoRA(causal("llama"))
    for name, role in (("a", "attn.q"), ("b", "attn.v")):
        lora.add(name, LoraSpec(targets=(role,)))
    with pytest.raises(StudioError) as caught:
        inside.report(lora, "a", "b")
    assert caught.value.code == "E_NOTHING_SHARED"


# ---- ranks -------------------------------------------------------------------------------------------------------


def test_the_curve_goes_from_the_base_to_the_whole_and_leaves_all_as_it_was(learnt: LoRA) -> None:
    before = {key: tensor.clone() for key, tensor in learnt.model.state_dict().items()}
    own = [tensor.clone() for tensor in learnt.parameters("x")]
    moments = list(inside.rank_curve(learnt, "x", ROWS))
    curve = moments[-1]
    assert [list(moment.losses) for moment in moments[:5]] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 4], [0, 1, 2, 4, 8]]
    with learnt.use():
        assert curve.losses[0] == pytest.approx(mean_loss(learnt, ROWS), rel=1e-6)
    with learnt.use("x"):
        assert curve.losses[8] == mean_loss(learnt, ROWS)
    assert curve.losses[8] < curve.losses[0] - 0.4  # it learns what a random head lets it
    assert curve.parameters[0] == 0
    assert curve.parameters[8] == sum(tensor.numel() for tensor in learnt.parameters("x")) == 4 * curve.parameters[2]
    assert learnt.names == ("x", "y") and not any(moment.smallest for moment in moments[:4])
    assert all(torch.equal(tensor, before[key]) for key, tensor in learnt.model.state_dict().items())
    assert all(map(torch.equal, own, learnt.parameters("x")))


def test_the_smallest_rank_is_found_between_the_doublings(learnt: LoRA) -> None:
    curve = list(inside.rank_curve(learnt, "x", ROWS))[-1]
    found, gain = curve.smallest, curve.losses[0] - curve.losses[8]
    assert found is not None and found - 1 in curve.losses  # its neighbour was measured and is not good enough
    assert curve.losses[0] - curve.losses[found] >= 0.99 * gain > curve.losses[0] - curve.losses[found - 1]
    told = curve.as_json()
    assert told["rank"] == 8 and told["smallest"] == found
    assert [point["rank"] for point in told["points"]] == sorted(curve.losses)


@pytest.mark.parametrize(
    ("losses", "smallest", "following"),
    [
        ({0: 5.0}, None, 1),
        ({0: 5.0, 1: 4.0}, None, 2),
        ({0: 5.0, 1: 4.0, 2: 3.0, 4: 1.0}, None, 6),
        ({0: 5.0, 1: 4.0, 2: 3.0, 4: 1.0, 6: 1.0}, 4, 3),
        ({0: 5.0, 1: 4.0, 2: 3.0, 3: 1.03, 4: 1.0, 6: 1.0}, 3, None),
        ({0: 5.0, 1: 4.0, 2: 3.0, 4: 1.1, 6: 1.0}, 6, 5),
        ({0: 5.0, 1: 5.5, 2: 5.0, 4: 5.0, 6: 5.0}, None, None),  # nothing was gained
        ({0: 5.0, 1: 0.5, 2: 3.0, 4: 1.0, 6: 1.0}, 1, None),  # better than the whole is good enough
        ({0: 5.0, 1: math.nan, 2: math.nan, 4: math.nan, 6: math.nan}, None, None),
    ],
)
def test_which_rank_is_smallest_and_which_is_next(losses: dict, smallest: int | None, following: int | None) -> None:
    curve = inside.RankCurve(rank=6, losses=losses, parameters=dict.fromkeys(losses, 0))
    assert curve.smallest == smallest and inside._next_rank(curve) == following
    json.dumps(curve.as_json(), allow_nan=False)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "lora-fa", "lora+", "pissa"])
def test_truncating_at_the_full_rank_changes_no_logit_under_any_variant(variant: str) -> None:
    lora = LoRA(causal("gpt2"))
    drawn(lora, "x", LoraSpec(rank=4, alpha=3.0, variant=variant, rank_pattern={"attn.v": 2}))
    whole = max(factors.rank for factors in lora.delta("x"))  # pissa's update has twice the rank
    with inside._truncated(lora, "x", whole) as temporary:
        torch.testing.assert_close(logits(lora, temporary), logits(lora, "x"), rtol=1e-4, atol=1e-5)
    assert lora.names == ("x",)


def test_rank_zero_keeps_what_was_trained_whole() -> None:
    lora = LoRA(classifier("bert"))
    drawn(lora, "x", LoraSpec(rank=2, modules_to_save=("classifier",)))
    with inside._truncated(lora, "x", 0) as temporary:
        kept = lora.copies(temporary)
        assert kept and all(torch.equal(kept[name], tensor) for name, tensor in lora.copies("x").items())
        none = logits(lora, temporary)
    assert not torch.equal(none, logits(lora, None)) and not torch.equal(none, logits(lora, "x"))


def test_a_classifier_has_a_curve_too() -> None:
    lora = LoRA(classifier("bert"))
    drawn(lora, "x", LoraSpec(rank=2, modules_to_save=("classifier",)))
    rows = [Tokens(row.ids, [False] * 6, label=place % 3) for place, row in enumerate(ROWS)]
    *_, curve = inside.rank_curve(lora, "x", rows)
    with lora.use("x"):
        assert curve.losses[2] == mean_loss(lora, rows) and set(curve.losses) == {0, 1, 2}


def test_a_failed_measurement_leaves_no_adapter_behind(learnt: LoRA, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> float:
        raise RuntimeError

    monkeypatch.setattr(inside, "mean_loss", broken)
    with pytest.raises(RuntimeError):
        list(inside.rank_curve(learnt, "x", ROWS))
    assert learnt.names == ("x", "y")


def test_a_smaller_adapter_is_saved_and_loads_with_the_same_logits(learnt: LoRA, tmp_path: Path) -> None:
    with inside.smaller(learnt, "x", 3) as cut:
        save(learnt, cut, tmp_path, "base")
        wanted = logits(learnt, cut)
    fresh = LoRA(causal("llama"))
    spec = load(fresh, tmp_path, "small")
    assert isinstance(spec, LoraSpec) and spec.rank == 3 and {one.rank for one in fresh.delta("small")} == {3}
    torch.testing.assert_close(logits(fresh, "small"), wanted, rtol=1e-5, atol=1e-6)
    assert learnt.names == ("x", "y")


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_a_rank_that_the_adapter_does_not_have_is_refused(learnt: LoRA, rank: int) -> None:
    with pytest.raises(StudioError) as caught, inside.smaller(learnt, "x", rank):
        pass
    assert caught.value.code == "E_RANK" and "8" in str(caught.value)


def test_a_method_without_factors_is_named() -> None:
    lora = LoRA(causal("gpt2"))
    add(lora, "b", BaselineSpec(kind="bitfit"))
    for call in (inside.report, lambda *given: list(inside.rank_curve(*given, ROWS))):
        with pytest.raises(StudioError) as caught:
            call(lora, "b")
        assert caught.value.code == "E_NOT_LORA" and "BitFit" in str(caught.value)


# ---- studio, command line and page -------------------------------------------------------------------------------

EVIL = "<img src=x onerror=alert(1)>"


class ReadyDesk(Desk):
    """A desk whose libraries are loaded; no starter model is looked for."""

    def ready(self, model: str = "") -> Studio:
        return self.studio


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Desk:
    """Three ended runs on one model: "wide" of rank 4, "narrow" of rank 2 under a name like a tag, and "biases"."""
    studio = Studio(tmp_path_factory.mktemp("root"))
    dataset = studio.data.find("tickets")
    lora = LoRA(studio.models.load(str(tiny), precision="float32", on="cpu"))
    methods: dict[str, Method] = {
        "wide": LoraSpec(rank=4, targets=("attn.q", "attn.v")),
        EVIL: LoraSpec(rank=2),
        "biases": BaselineSpec(kind="bitfit"),
    }
    for name, method in methods.items():
        choice = DataChoice(id=dataset.id, name=dataset.name)
        config = RunConfig(name=name, model=str(tiny), dataset=choice, method=method)
        run = studio.runs.create(config, {})
        add(lora, run.id, method)
        for tensor in lora.parameters(run.id):
            tensor.data += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
        save(lora, run.id, run.path / "adapter", str(tiny))
        (run.path / "worker.log").touch()
        write_json(run.path / "exit.json", {"status": "done", "values": {}})
    return ReadyDesk(studio)


def id_of(desk: Desk, name: str) -> str:
    return next(run.id for run in desk.studio.runs.list() if run.name == name)


def test_studio_keeps_the_latest_report_until_the_adapter_is_saved_anew(desk: Desk) -> None:
    studio, run = desk.studio, id_of(desk, "wide")
    seen = studio.inside(run)
    assert len(seen.modules) == 4 and studio.inside(run[:8]) is seen
    both = studio.inside(run, id_of(desk, EVIL))
    assert both.similarity is not None and both.modules == seen.modules
    weights = studio.runs.get(run).path / "adapter" / "adapter_model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert studio.inside(run) is not seen


def test_studio_measures_the_ranks_on_held_out_rows(desk: Desk) -> None:
    *_, curve = desk.studio.rank_curve(id_of(desk, "wide"))
    assert curve.rank == 4 and set(curve.losses) >= {0, 1, 2, 4} and curve.parameters[4] == 2 * curve.parameters[2]


def test_studio_writes_the_smaller_adapter_with_a_card_and_packs_it(desk: Desk, tiny: Path, tmp_path: Path) -> None:
    run = id_of(desk, "wide")
    done = desk.studio.smaller(run, 1, tmp_path / "small")
    assert done.proof.passed and done.proof.largest == 0 and done.proof.rows
    assert {file.name for file in done.files} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = (tmp_path / "small" / "README.md").read_text()
    assert "the strongest direction of each matrix" in card and run in card and "rank 4" in card
    *_, curve = desk.studio.rank_curve(run)
    assert done.proof.sentence in card and f"held-out rows is {curve.losses[1]:.4g}" in card
    lora = LoRA(desk.studio.models.load(str(tiny), precision="float32", on="cpu"))
    load(lora, tmp_path / "small", "small")
    assert [factors.rank for factors in lora.delta("small")] == [1] * 4
    (archive,) = desk.studio.archive(run, rank=1).files
    assert archive.name == f"adapter-{run[:8]}-r1.zip" and archive.is_relative_to(desk.studio.exports)


@pytest.mark.parametrize("name", ["biases", "wide"])
def test_studio_refuses_what_has_no_such_rank(desk: Desk, tmp_path: Path, name: str) -> None:
    with pytest.raises(StudioError) as caught:
        desk.studio.smaller(id_of(desk, name), 5, tmp_path)
    assert caught.value.code == {"biases": "E_NOT_LORA", "wide": "E_RANK"}[name] and not list(tmp_path.iterdir())


def told(desk: Desk, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `analyze` prints."""
    capsys.readouterr()
    app(["analyze", *words, "--root", str(desk.studio.root)], standalone_mode=False)
    return capsys.readouterr().out


def test_analyze_prints_one_json_document(desk: Desk, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wide, narrow = id_of(desk, "wide"), id_of(desk, EVIL)
    plain = json.loads(told(desk, capsys, wide[:8], "--json"))
    assert set(plain) == {"modules", "amplification", "similarity"} and plain["similarity"] is None
    words = [wide, narrow, "--ranks", "--smaller", "2", "--to", str(tmp_path / "small"), "--json"]
    full = json.loads(told(desk, capsys, *words))
    assert full["similarity"]["names"] == [wide, narrow] and full["ranks"]["rank"] == 4
    assert sorted(Path(file).name for file in full["files"]) == sorted(os.listdir(tmp_path / "small"))


def test_analyze_prints_a_table_for_people(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(desk, capsys, id_of(desk, "wide"), id_of(desk, EVIL), "--ranks")
    assert said.count("self_attn.q_proj") == 4 and "held-out loss" in said and "of 4" in said


def test_the_tab_shows_a_report_and_one_matrix(desk: Desk) -> None:
    wide, narrow = id_of(desk, "wide"), id_of(desk, EVIL)
    said, results, change, matrix, shared, amplified, table, *_, problem = inside_tab.look(desk, wide, None)
    assert problem == "" and results.visible and not shared.visible and "<b>4</b> matrices" in said
    assert change["data"][0]["type"] == "heatmap" and len(amplified["data"]) == 2 and table.count("<tr>") == 5
    assert matrix.value in [value for _, value in matrix.choices] and len(matrix.choices) == 4
    values, line, similarity, _, problem = inside_tab.show_matrix(desk, wide, "", matrix.value, inside_tab.WHOLE)
    assert problem == "" and len(values["data"][0]["y"]) == 4 and similarity == {} and "of 4" in line
    assert inside_tab.look(desk, wide, narrow)[4].visible
    for which in (inside_tab.WHOLE, inside_tab.OF_A):
        *_, similarity, line, problem = inside_tab.show_matrix(desk, wide, narrow, matrix.value, which)
        assert problem == "" and len(similarity["data"]) == 2 and "by chance 0.031" in line
        assert EVIL not in json.dumps(similarity)


def test_the_tab_answers_in_sentences_when_there_is_nothing_to_show(desk: Desk) -> None:
    said, results, *_, problem = inside_tab.look(desk, id_of(desk, "biases"), None)
    assert "BitFit" in said and "Choose a LoRA run" in said and not results.visible and problem == ""
    assert "E_NO_RUN" in inside_tab.look(desk, None, None)[-1]
    assert "E_NO_RUN" in list(inside_tab.measure(desk, None))[-1][-1]
    assert "E_RANK" in inside_tab.pack_smaller(desk, id_of(desk, "wide"), None)[-1]
    assert "E_RANK" in inside_tab.pack_smaller(desk, id_of(desk, "wide"), 9)[-1]
    assert inside_tab.show_matrix(desk, None, None, None, inside_tab.WHOLE) == ({}, "", {}, "", "")


def test_only_lora_runs_on_the_same_base_are_offered_for_comparison(desk: Desk) -> None:
    wide, narrow = id_of(desk, "wide"), id_of(desk, EVIL)
    offered = inside_tab.list_others(desk, wide, narrow)
    assert [value for _, value in offered.choices] == [inside_tab.ALONE, narrow] and offered.value == narrow
    assert inside_tab.list_others(desk, narrow, narrow).value == inside_tab.ALONE
    assert len(inside_tab.list_others(desk, None, None).choices) == 1


def test_the_dial_measures_says_and_packs(desk: Desk) -> None:
    moments = list(inside_tab.measure(desk, id_of(desk, "wide")))
    figure, said, curve, rank, problem = moments[-1]
    assert rank.maximum == 4 and "100 %</b> of the gain" in inside_tab.read_dial(curve, 4)
    assert inside_tab.read_dial({}, 3) == inside_tab.read_dial(curve, None) == ""
    assert problem == "" and len(moments) >= 6 and figure["data"][0]["x"][:3] == ["0", "1", "2"]
    assert "held-out rows" in said and 1 <= rank.value <= 4
    address, proof, problem = inside_tab.pack_smaller(desk, id_of(desk, "wide"), 2.0)
    assert "proof passed" in proof
    file = desk.downloads.take(address.removeprefix("download/"), NOBODY)
    assert problem == "" and file and file.name.endswith("-r2.zip") and file.is_file()


@pytest.mark.parametrize(
    ("smallest", "said"), [(3, "rank 3 keeps 99 %"), (16, "All 16 directions are needed"), (None, "no better than")]
)
def test_the_verdict_of_the_dial(smallest: int | None, said: str) -> None:
    points = [{"rank": rank, "loss": 1.0, "parameters": 1000 * rank} for rank in (0, 3, 16)]
    told = inside_tab.verdict({"rank": 16, "smallest": smallest, "points": points})
    assert said in told and ("3,000 parameters instead of 16,000" in told) == (smallest == 3)


def test_the_dial_reads_what_was_measured_and_says_what_was_not() -> None:
    losses = {0: 3.0, 1: 2.5, 4: 1.004, 16: 1.0}
    points = [{"rank": rank, "loss": loss, "parameters": 1000 * rank} for rank, loss in losses.items()]
    read = {rank: inside_tab.read_dial({"rank": 16, "points": points}, rank) for rank in (1, 2, 4, 16)}
    assert "<b>25 %</b> of the gain, 1,000 parameters instead of 16,000" in read[1]
    assert "was not measured; the held-out loss is 2.5 at rank 1 and 1.004 at rank 4" in read[2]
    assert "<b>99.8 %</b> of the gain" in read[4]  # never rounded up to all of it
    assert "<b>100 %</b> of the gain." in read[16]
