"""The engine benchmarks' own logic, on tiny models: all ways do the same work, and figures are what they say."""

import itertools
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import contenders, cuda, forecast, fresh, generation, goals, pairs, parity, study, training, work
from benchmarks.goals import Goal, paired
from lora_studio.core.functions import CHUNK
from lora_studio.core.lean import Tokens, shared_prefix
from lora_studio.core.lora import LoRA
from lora_studio.errors import StudioError
from lora_studio.models import ModelLibrary
from tests.tiny import causal, tiny_model, tokenizer

WORDS = ["a", "ship", "in", "the", "bay", "waits", "for", "wind"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"ask": " ".join(WORDS[: 1 + n % 5]), "say": " ".join(WORDS[: 2 + n % 7]) + f" {n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def spec(model: str, data: Path, tmp_path: Path) -> dict[str, Any]:
    """What a process of `training` is told, for three steps of four rows."""
    rows = pairs.rows(tokenizer(), pairs.examples(data, "ask", "say"), 1, 200, 12)
    told = {
        "model": model,
        "tokenizer": model,
        "rows": rows,
        "batches": pairs.batches(rows, 4, 3, 0),
        "warmup": 1,
        "device": "cpu",
        "precision": "float32",
        "seed": 0,
        "adapter": str(tmp_path / "adapter"),
        "folder": str(tmp_path / "trainer"),
        "packed": False,
    }
    contenders.start(told)
    return told


# ---- goals -----------------------------------------------------------------------------------------------------------


def test_a_goal_goes_by_the_median_and_says_plainly_that_it_is_missed() -> None:
    values = [1.0, 3.0, 2.0]
    assert Goal(text="x", values=values, least=2.0).met and Goal(text="x", values=values, most=2.0).met
    missed = Goal(text="speed", values=values, least=2.1)
    assert not missed.met and missed.sentence == "NOT MET: speed: 2 (1 to 3) times, at least 2.1 asked."
    assert Goal(text="x", values=[0.5], most=1.0).sentence == "Met: x: 0.5 times, at most 1 asked."


def test_ratios_pair_the_repetitions() -> None:
    assert paired([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 2.0])


def test_the_last_line_is_json_with_what_every_reader_needs(capsys: pytest.CaptureFixture) -> None:
    asked = [Goal(text="a", values=[1.0], least=2.0), Goal(text="b", values=[3.0], least=2.0)]
    goals.finish(Namespace(json=True), asked, {"some": [1, 2]})
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"ratios", "figures", "machine", "date"} <= last.keys()
    assert last["ratios"] == {"a": 1.0, "b": 3.0} and last["not_met"] == ["a"]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_within_their_bounds_and_in_the_files_order(data: Path) -> None:
    conversations = pairs.examples(data, "ask", "say")
    everything = list(pairs.every(tokenizer(), conversations, 1, 10_000))
    bounds = sorted(len(ids) for ids, _ in everything)
    shortest, longest = bounds[10], bounds[30]
    kept = pairs.rows(tokenizer(), conversations, shortest, longest, 15)
    assert kept == [row for row in everything if shortest <= len(row[0]) <= longest][:15]
    with pytest.raises(StudioError, match="are needed"):
        pairs.rows(tokenizer(), conversations, shortest, longest, 1000)


def test_every_row_is_in_one_batch_of_a_pass(data: Path) -> None:
    rows = pairs.rows(tokenizer(), pairs.examples(data, "ask", "say"), 1, 200, 12)
    batches = pairs.batches(rows, 4, 3, seed=5)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert sorted(row for batch in batches for row in batch) == sorted(rows)


# ---- work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_useful_work_is_that_of_the_products_attention_and_factors(family: str) -> None:
    net = causal(family)
    trained, lengths = 1000, (7, 5)
    sizes = work.sizes_of(net, trained)
    batch = [(list(range(length)), [False, *[True] * (length - 1)]) for length in lengths]
    tokens = sum(lengths)
    supervised = tokens - len(batch)
    products = sum(2 * t * i * o * count for (t, i, o), count in work.shapes_of(net, tokens, supervised).items())
    attention = 6 * sizes["width"] * sizes["layers"] * (7**2 + 5**2)
    assert {t for t, _, _ in work.shapes_of(net, tokens, 1000)} == {tokens, CHUNK["cpu"]}  # the head goes by chunks
    assert work.useful(sizes, batch) == products + attention + 6 * trained * tokens
    learnt = [(ids, [False] * 4 + marks[4:]) for ids, marks in batch]  # both begin with 0, 1, 2
    fewer = 4 * sizes["head"] * 2 * 3 + (4 * sizes["body"] + 6 * trained) * 3
    assert work.useful(sizes, learnt) == work.useful(sizes, batch) - fewer


def test_the_matrix_rate_is_a_positive_number_of_a_fresh_process() -> None:
    asked = {"shapes": [[8, 16, 32, 2], [8, 32, 16, 1]], "precision": "float32", "device": "cpu"}
    found = fresh.measure("benchmarks.work:matrix_rate", asked, threads=1)
    assert 0 < found["rate"] <= found["best"] and found["peak_bytes"] > 0 and found["process_cpu_s"] > 0


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(fresh.Failed, match="no_such_function"):
        fresh.measure("benchmarks.work:no_such_function", {})


def test_a_process_waits_without_spinning_unless_it_is_to_be_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    told = fresh.environment(3)
    assert told["OMP_NUM_THREADS"] == "3" and told["OMP_WAIT_POLICY"] == "PASSIVE" and told["GOMP_SPINCOUNT"] == "0"
    assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & fresh.environment(3, awake=True).keys()


# ---- the ways of training --------------------------------------------------------------------------------------------


def test_ours_trainer_and_a_plain_loop_do_the_same_work(spec: dict[str, Any]) -> None:
    found = {way: contenders.trained({**spec, "way": way})["steps"] for way in ("ours", "peft", "naive")}
    ours = found["ours"]
    assert len(ours) == len(spec["batches"]) - spec["warmup"]
    for step, batch in zip(ours, spec["batches"][1:], strict=True):
        spared = (len(batch) - 1) * shared_prefix([Tokens(*row) for row in batch])  # a prefix comes once a pass
        assert step["processed"] + spared == step["real"] == sum(len(ids) for ids, _ in batch)
        assert step["supervised"] == sum(sum(marks[1:]) for _, marks in batch) > 0
    for way in ("peft", "naive"):
        for one, other in zip(ours, found[way], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert (other["real"], other["supervised"]) == (one["real"], one["supervised"])
            assert other["processed"] >= other["real"]


def test_models_of_random_weights_are_the_same_in_every_process(spec: dict[str, Any]) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    spec |= {"shape": {**shape, "vocab_size": len(tokenizer())}, "warmup": 0, "adapter": spec["adapter"] + "-shape"}
    contenders.start(spec)
    ours, theirs = (contenders.trained({**spec, "way": way})["steps"] for way in ("ours", "peft"))
    assert [step["loss"] for step in theirs] == pytest.approx([step["loss"] for step in ours], rel=1e-5)


def test_full_fine_tuning_begins_at_the_same_loss(spec: dict[str, Any]) -> None:
    spec["warmup"] = 0
    full = contenders.trained({**spec, "way": "full"})["steps"]
    ours = contenders.trained({**spec, "way": "ours"})["steps"]
    assert full[0]["loss"] == pytest.approx(ours[0]["loss"], rel=1e-5) and full[-1]["loss"] != ours[-1]["loss"]


@pytest.mark.parametrize("packed", [False, True])
def test_sft_sees_every_supervised_token(spec: dict[str, Any], packed: bool) -> None:
    pytest.importorskip("trl", reason="trl is needed for the benchmark alone: benchmarks/requirements.txt")
    spec |= {"warmup": 0, "way": "sft", "packed": packed}
    steps = contenders.trained(spec)["steps"]
    assert sum(step["supervised"] for step in steps) == sum(sum(marks[1:]) for _, marks in spec["rows"])
    if packed:
        assert all(step["processed"] == step["real"] for step in steps)
    else:
        spec["packed"] = False
        ours = contenders.trained({**spec, "way": "ours"})["steps"]
        assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in ours], rel=1e-4)


def test_too_few_rows_for_a_timed_step_are_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="warm-up"):
        contenders.trained({**spec, "way": "naive", "warmup": 3})


# ---- training --------------------------------------------------------------------------------------------------------


def test_without_cuda_it_says_so_and_ends_well(data: Path, capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, so the comparison would run")
    assert training.main(["--data", str(data), "--device", "cuda", "--json"]) == 0
    said = capsys.readouterr().out
    assert "not measured: no CUDA device" in said and json.loads(said.splitlines()[-1])["ratios"] == {}


@pytest.mark.parametrize("size, billions", [("1.5 B", 1.5), ("8 B", 8.0)])
def test_the_large_shapes_are_as_large_as_they_are_called(size: str, billions: float) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        net = LlamaForCausalLM(LlamaConfig(**cuda.LARGE[size]))
    exact = sum(tensor.numel() for tensor in net.parameters())
    assert cuda.parameters(cuda.LARGE[size]) == exact == pytest.approx(billions * 1e9, rel=0.05)


def test_the_table_and_its_goals_come_from_paired_repetitions(
    model: str, data: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole program, its processes replaced by made-up answers: twice as fast, a quarter of the memory."""
    drift = itertools.count(1)

    def made_up(function: str, asked: dict[str, Any], **_: Any) -> dict[str, Any]:
        if function.endswith("matrix_rate"):
            return {"rate": 1e9}
        if function.endswith("start"):
            return {"trainable": 10}
        slow = next(drift) * (1.0 if asked["way"] == "ours" else 2.0)
        steps = [
            {"cpu_s": slow, "wall_s": 1.0, "loss": 2.0, "supervised": 100, "real": 150, "processed": 200}
            for _ in asked["batches"][asked["warmup"] :]
        ]
        return {"steps": steps, "peak_bytes": 25 if asked["way"] == "ours" else 100}

    monkeypatch.setattr(training, "measure", made_up)
    told = ["--data", str(data), "--prompt", "ask", "--answer", "say", "--model", model, "--shortest", "1"]
    assert training.main([*told, "--batch", "3", "--only", "ours16,peft32", "--repeats", "2", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    memory = next(value for name, value in last["ratios"].items() if name.startswith("peak memory"))
    speed = next(value for name, value in last["ratios"].items() if name.startswith("supervised tokens"))
    # round 1: ours 1, theirs 2·2; round 2 begins with the other way: theirs 3·2, ours 4
    assert memory == 0.25 and speed == pytest.approx((4 / 1 + 6 / 4) / 2)
    assert len(last["figures"]["ways"]["ours16"]["seconds"]) == 2


# ---- parity, forecast ------------------------------------------------------------------------------------------------


def test_parity_measures_rows_that_are_not_trained_on(spec: dict[str, Any]) -> None:
    told = {**spec, "rows": spec["rows"][4:], "heldout": spec["rows"][:4], "steps": 4, "batch": 2}
    found = parity.learnt(told)
    assert found["after"] != found["before"] and found == parity.learnt(told)


def test_the_forecast_is_tried_on_other_models_too() -> None:
    kinds = {setting.model for setting in forecast.SETTINGS}
    assert len(forecast.SETTINGS) >= 6 and len(kinds - {""}) >= 2 and kinds - {""} <= forecast.SHAPES.keys()
    assert len({(setting.model, setting.label) for setting in forecast.SETTINGS}) == len(forecast.SETTINGS)


def test_a_model_of_random_weights_is_one_that_the_app_loads(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(forecast.SHAPES, "tiny", ("llama", shape))
    forecast.write({"name": "tiny", "tokenizer": model, "folder": str(tmp_path / "written")})
    loaded = ModelLibrary(tmp_path).load(str(tmp_path / "written"), precision="float32", on="cpu")
    assert loaded.config.vocab_size == len(tokenizer())


# ---- generation ------------------------------------------------------------------------------------------------------


def test_generation_times_every_way_in_every_round(model: str) -> None:
    told = {"model": model, "precision": "float32", "tokens": 3, "rounds": 2, "seed": 0}
    found = generation.timed(told)
    assert found["decode"].keys() == found["prefill"].keys() == set(generation.WAYS)
    assert all(len(values) == 2 and min(values) > 0 for values in found["decode"].values())
    assert generation.reached({("float32", 1): found})[-1].met  # a strength is a write into a tensor


def test_two_runs_are_held_against_one_batch_and_five_answers_against_one() -> None:
    decode = {"base": [2.0, 3.0], "adapted": [2.0, 5.0], "both": [2.0, 4.0], "five": [3.0, 5.1], "merged": [2.0, 5.0]}
    one = {"decode": decode, "prefill": decode, "answer": decode, "change_s": 1e-6}
    assert generation.together(one) == [2.0, 2.0]
    (five,) = (goal for goal in generation.reached({("bfloat16", 1): one}) if "four adapters" in goal.text)
    assert five.values == pytest.approx([1.5, 1.7]) and five.met
    assert not any("four adapters" in goal.text for goal in generation.reached({("float32", 1): one}))


# ---- study -----------------------------------------------------------------------------------------------------------


def test_ranks_in_one_pass_learn_what_each_learns_alone() -> None:
    lora = LoRA(causal("llama", vocabulary=study.VOCABULARY))
    told = {"steps": 4, "seed": 0}
    rows = study._random_rows(16, told)
    together = study._race(lora, rows, True, told)
    alone = study._race(lora, rows, False, told)
    assert [len(ones) for ones in together["losses"]] == [4] * len(study.RANKS)
    assert torch.tensor(together["losses"]).allclose(torch.tensor(alone["losses"]), rtol=0, atol=study.EQUAL)
    assert together["step_s"] > 0 and not lora.names


@pytest.mark.parametrize("tokens", study.TOKENS)
def test_a_step_of_random_rows_has_so_many_tokens(tokens: int) -> None:
    made = study._random_rows(tokens, {"seed": 0})
    assert made["batch"] * len(made["rows"][0][0]) == tokens and len(made["rows"]) >= made["batch"]


@pytest.mark.parametrize(("seconds", "met"), [(1.0, True), (1.01, False)])
def test_one_pass_may_never_be_slower(
    seconds: float, met: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    point = {"alone": [1.0, 1.02], "together": [seconds, seconds * 1.02], "besides": 1}
    fast, same = {"alone": [3.0], "together": [1.0], "besides": 1}, {"alone": [1.0], "together": [2.0], "besides": 0}
    curve = [{"tokens": 16, **point}, {"tokens": study.NEAR, **fast}, {"tokens": 512, **same}]
    monkeypatch.setattr(study, "measure", lambda *_, **__: {"curve": curve})
    asked, _ = study.curves(Namespace(quick=True, steps=2, repeats=2, seed=0))
    assert [goal.met for goal in asked if "slowest" in goal.text] == [met] * len(study.SMALL)
    capsys.readouterr()


@pytest.mark.parametrize(("tokens", "same"), [(study.NEAR, False), (1024, True)])
def test_adapters_that_take_turns_make_the_operations_that_each_makes_alone(tokens: int, same: bool) -> None:
    """So a study is never slower: where one pass would gain nothing it does exactly what one by one does."""
    shape = {**study.SMALL["4 layers of 64"], "num_hidden_layers": 1, "vocab_size": 64}
    spec = {"shape": shape, "seed": 0, "model": "", "steps": 2}
    lora = LoRA(contenders.base(spec, "float32", "cpu"))
    rows = study._random_rows(tokens, spec)
    rows["rows"] = [([word % 64 for word in ids], marks) for ids, marks in rows["rows"]]
    study._race(lora, rows, False, spec)  # the model's frugal forms are found once
    together, alone = (study._operations(lora, rows, way, spec) for way in (True, False))
    assert (together == alone) is same and together.total() <= alone.total()


def test_processes_are_compared_repetition_by_repetition() -> None:
    def one(cpu: float, peak: int, *losses: list[float]) -> dict[str, Any]:
        return {"process_cpu_s": cpu, "process_wall_s": 2 * cpu, "peak_bytes": peak, "losses": list(losses)}

    together = [one(10.0, 150, [1.0, 0.5], [2.0, 1.0])]
    alone = [[one(8.0, 100, [1.0, 0.5]), one(9.0, 120, [2.0, 1.25])]]
    found = study._processes(together, alone)
    assert found["alone_cpu_s"] == [17.0] and found["together_cpu_s"] == [10.0]
    assert found["memory"] == [1.25] and found["apart"] == 0.25
