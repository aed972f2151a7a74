"""The paper's other methods: counts, exactness at the start, gradients, rows, files."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_studio import adapters
from lora_studio.core.baselines import add, plan
from lora_studio.core.lora import LoRA
from lora_studio.core.merge import merged, merged_state
from lora_studio.core.spec import BASELINES, BaselineSpec, LoraSpec, paper_count
from lora_studio.errors import StudioError
from tests.tiny import CAUSAL, causal, classifier, touched

IDS = torch.arange(3, 36).view(3, 11)
AT_REST = [kind for kind in BASELINES if kind not in ("prefix", "prompt")]  # they change nothing before training
SLIDING = ("mistral", "gemma2")  # virtual tokens would slide out of view
POSITIONS = torch.arange(11)[None]


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def disturb(lora: LoRA, name: str, seed: int = 1) -> None:
    draws = torch.Generator().manual_seed(seed)
    for tensor in lora.parameters(name):
        tensor.data += torch.empty(tensor.shape).normal_(0, 0.1, generator=draws)


def with_method(family: str, kind: str, **options: int) -> LoRA:
    lora = LoRA(causal(family))
    add(lora, "x", BaselineSpec(kind=kind, **options))
    return lora


@pytest.mark.parametrize("kind", AT_REST)
@pytest.mark.parametrize("family", CAUSAL)
def test_a_fresh_method_is_the_base_model_bit_for_bit(family: str, kind: str) -> None:
    lora = with_method(family, kind)
    base = logits(lora.model)
    with lora.use("x"):
        assert torch.equal(logits(lora.model), base)
    assert not lora.changed("x")
    disturb(lora, "x")
    with lora.use("x"):
        assert not torch.equal(logits(lora.model), base)
    assert lora.changed("x") and torch.equal(logits(lora.model), base)


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("family", CAUSAL)
def test_rows_of_a_mixed_batch_are_those_of_batches_of_their_own(family: str, kind: str) -> None:
    if kind in ("prefix", "prompt") and family in SLIDING:
        with pytest.raises(StudioError, match="slides"):
            with_method(family, kind)
        return
    lora = with_method(family, kind)
    base = logits(lora.model)
    disturb(lora, "x")
    with lora.use("x"):
        alone = logits(lora.model)
    with lora.use(None, "x", None):
        mixed = logits(lora.model)
    torch.testing.assert_close(mixed[[0, 2]], base[[0, 2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], alone[1], rtol=1e-5, atol=1e-5)
    if kind in AT_REST:
        assert torch.equal(mixed[[0, 2]], base[[0, 2]])
    assert not torch.allclose(mixed[1], base[1], atol=1e-3)


@pytest.mark.parametrize("kind", BASELINES)
def test_training_leaves_the_base_alone_and_moves_every_tensor_of_the_method(kind: str) -> None:
    lora = with_method("gpt2", kind)
    before = copy.deepcopy(lora.model.state_dict())
    own = [tensor.detach().clone() for tensor in lora.parameters("x")]
    optimizer = torch.optim.SGD(lora.parameters("x"), lr=0.1)
    lora.model.train()
    for _ in range(3):
        with lora.use("x"):
            lora.model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = lora.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not any(tensor.requires_grad for tensor in lora.model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(own, lora.parameters("x"), strict=True))


def test_full_fine_tuning_has_the_gradients_of_the_plain_model_tied_weights_included() -> None:
    plain = causal("gpt2").train()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    lora = with_method("gpt2", "full")
    lora.model.train()
    with lora.use("x"):
        lora.model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = dict(plain.named_parameters(remove_duplicate=False))
    for layer, part in lora.parts("x"):
        for name, tensor in part.tensors.items():
            torch.testing.assert_close(tensor.grad, wanted[f"{layer}.{name}"].grad, rtol=1e-6, atol=1e-8)
    assert len(lora.parameters("x")) == len(list(plain.parameters()))


def test_bitfit_has_the_gradients_of_the_models_own_biases() -> None:
    plain = causal("gpt2")
    plain(input_ids=IDS, labels=IDS).loss.backward()
    lora = with_method("gpt2", "bitfit")
    with lora.use("x"):
        lora.model(input_ids=IDS, labels=IDS).loss.backward()
    biases = {name: tensor.grad for name, tensor in plain.named_parameters() if name.endswith(".bias")}
    assert biases.keys() == {f"{layer}.bias" for layer, _ in lora.parts("x")}
    for layer, part in lora.parts("x"):
        torch.testing.assert_close(part.bias.grad, biases[f"{layer}.bias"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi3"])
@pytest.mark.parametrize("kind", BASELINES)
def test_planned_parameters_are_the_trained_ones(family: str, kind: str) -> None:
    lora = with_method(family, kind)
    planned = plan(lora.model, lora.specs["x"])
    assert sum(piece.parameters for piece in planned) == sum(tensor.numel() for tensor in lora.parameters("x"))
    with torch.device("meta"):
        skeleton = type(lora.model)(lora.model.config)
    assert [piece.parameters for piece in plan(skeleton, lora.specs["x"])] == [one.parameters for one in planned]


@pytest.mark.parametrize("kind", ["adapter_h", "adapter_p", "adapter_l", "prefix", "prompt"])
def test_counts_are_the_papers_formulae(kind: str) -> None:
    planned = plan(causal("gpt2"), BaselineSpec(kind=kind, width=5))
    assert sum(piece.parameters for piece in planned) == paper_count(kind, layers=2, hidden=32, width=5)


def test_the_papers_own_counts_come_out() -> None:
    """Section 5.1 and Tables 4, 12 and 15: GPT-3 has 96 blocks of width 12,288."""
    gpt3 = {"layers": 96, "hidden": 12_288}
    assert paper_count("lora", width=4, matrices=2, **gpt3) == 18_874_368
    assert paper_count("lora", width=4, matrices=4, **gpt3) == 37_748_736
    assert paper_count("lora", width=1, matrices=2, **gpt3) == 4_718_592
    assert math.isclose(paper_count("adapter_h", width=1, **gpt3), 7.1e6, rel_tol=0.01)
    assert math.isclose(paper_count("adapter_h", width=8, **gpt3), 40.1e6, rel_tol=0.01)
    assert math.isclose(paper_count("prompt", width=264, **gpt3), 3.2e6, rel_tol=0.02)


def test_models_without_biases_get_one_for_each_matrix_of_a_block() -> None:
    planned = plan(causal("llama"), BaselineSpec(kind="bitfit"))
    assert len(planned) == 2 * 7 and {piece.layer for piece in planned} == {0, 1}


def test_the_top_blocks_are_the_last_ones() -> None:
    assert {piece.layer for piece in plan(causal("llama"), BaselineSpec(kind="top", width=1))} == {1}


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gpt_neox", "phi3", "stablelm"])
def test_virtual_tokens_are_what_the_model_makes_of_tokens_in_front(family: str, kind: str) -> None:
    """Undisturbed, they are the drawn tokens themselves: prepending those to the text gives the same logits."""
    lora = with_method(family, kind, width=4)
    drawn = torch.randint(97, (4,), generator=torch.Generator().manual_seed(0))
    longer = torch.cat([drawn.expand(3, -1), IDS], dim=1)
    with lora.use("x"):
        torch.testing.assert_close(logits(lora.model), logits_base(lora, longer)[:, 4:], rtol=1e-4, atol=1e-5)


def logits_base(lora: LoRA, ids: torch.Tensor) -> torch.Tensor:
    with lora.unhooked():
        return logits(lora.model, ids)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_stand_before_padded_prompts_and_every_step_of_decoding(kind: str) -> None:
    from lora_studio.generate import stream
    from lora_studio.settings import Sampling

    lora = with_method("llama", kind, width=4)
    disturb(lora, "x")

    def texts(prompts: list[list[int]], *rows: str | None) -> list[list[int | None]]:
        with lora.use(*rows):
            steps = list(stream(lora.model, prompts, Sampling(max_new_tokens=6), frozenset()))
        return [list(row) for row in zip(*steps, strict=True)]

    short, long = [5, 6, 7], [8, 9, 10, 11, 12]
    together = texts([short, long, short], "x", "x", None)
    assert together == [texts([short], "x")[0], texts([long], "x")[0], texts([short])[0]]


@pytest.mark.parametrize("kind", BASELINES)
def test_saved_and_loaded_it_computes_the_same(kind: str, tmp_path: Path) -> None:
    lora = with_method("llama", kind)
    disturb(lora, "x")
    with lora.use("x"):
        wanted = logits(lora.model)
    adapters.save(lora, "x", tmp_path, "base")
    again = LoRA(causal("llama"))
    assert adapters.load(again, tmp_path, "y") == lora.specs["x"]
    with again.use("y"):
        assert torch.equal(logits(again.model), wanted)
    assert adapters.files(tmp_path) == ("lora_studio.json", "adapter_model.safetensors")
    assert not adapters.portable(tmp_path)[0]


@pytest.mark.parametrize(
    ("damage", "code"),
    [("kind", "E_CONFIG"), ("width", "E_SHAPE"), ("json", "E_ADAPTER_FILES"), ("weights", "E_ADAPTER_FILES")],
)
def test_a_damaged_folder_is_refused_by_name(damage: str, code: str, tmp_path: Path) -> None:
    adapters.save(with_method("llama", "adapter_p"), "x", tmp_path, "base")
    about = json.loads((tmp_path / "lora_studio.json").read_text())
    if damage == "kind":
        about["method"]["kind"] = "magic"
    if damage == "width":
        about["method"]["width"] = 3
    (tmp_path / "lora_studio.json").write_text("<" if damage == "json" else json.dumps(about))
    if damage == "weights":
        (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    fresh = LoRA(causal("llama"))
    with pytest.raises(StudioError) as caught:
        adapters.load(fresh, tmp_path, "y")
    assert caught.value.code == code and fresh.names == ()


@pytest.mark.parametrize("kind", ["full", "top", "bitfit"])
def test_what_has_a_place_in_the_base_merges_exactly(kind: str) -> None:
    lora = with_method("gpt2", kind)
    disturb(lora, "x")
    with lora.use("x"):
        wanted = logits(lora.model)
    before = copy.deepcopy(lora.model.state_dict())
    with merged(lora, "x"):
        torch.testing.assert_close(logits(lora.model), wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in lora.model.state_dict().items())
    fresh = causal("gpt2")
    fresh.load_state_dict(merged_state(lora, "x", torch.float32))
    torch.testing.assert_close(logits(fresh), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["adapter_h", "prefix", "bitfit"])
def test_what_has_none_is_refused_by_name(kind: str) -> None:
    lora = with_method("llama", kind)
    with pytest.raises(StudioError) as caught, merged(lora, "x"):
        pass
    assert caught.value.code == "E_MERGE" and BASELINES[kind][0] in caught.value.message


@pytest.mark.parametrize(
    ("family", "method", "code"),
    [
        ("llama", BaselineSpec(kind="top", width=3), "E_METHOD"),
        ("llama", BaselineSpec(kind="prefix", width=4000), "E_METHOD"),
        ("llama", BaselineSpec(kind="magic"), "E_CONFIG"),
        ("llama", BaselineSpec(width=-1), "E_CONFIG"),
        ("gpt2", LoraSpec(rank=33), "E_RANK"),
        ("gpt2", LoraSpec(rank=0), "E_CONFIG"),
        ("gpt2", LoraSpec(alpha=0.0), "E_CONFIG"),
        ("gpt2", LoraSpec(rank_pattern={"attn.z": 2}), "E_TARGETS"),
        ("gpt2", LoraSpec(rank_pattern={"attn.q": 0}), "E_CONFIG"),
        ("llama", LoraSpec(targets=("embed",), variant="dora"), "E_VARIANT"),
        ("llama", LoraSpec(modules_to_save=("classifier",)), "E_TARGETS"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_the_model_alone(family: str, method: object, code: str) -> None:
    lora = LoRA(causal(family))
    with pytest.raises(StudioError) as caught:
        add(lora, "x", method)  # type: ignore[arg-type]
    assert caught.value.code == code and caught.value.hint
    assert lora.names == () and not touched(lora.model)


@pytest.mark.parametrize("kind", ["full", "bitfit", "adapter_h", "adapter_p", "top"])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "distilbert"])
def test_encoders_with_a_head_train_every_method_and_the_head(family: str, kind: str) -> None:
    from lora_studio.core.layout import heads

    model = classifier(family)
    lora = LoRA(model)
    add(lora, "x", BaselineSpec(kind=kind, modules_to_save=heads(model)))
    ids = torch.arange(3, 24).view(3, 7)
    with torch.no_grad(), lora.unhooked():
        base = model(input_ids=ids).logits
    model.train()
    with lora.use("x"):
        model.eval()
        nn.functional.cross_entropy(model(input_ids=ids).logits, torch.tensor([0, 1, 2])).backward()
    head = {name for name in lora.copies("x") if name.split(".")[0] in heads(model)}
    assert head and all(tensor.grad is not None for tensor in lora.parameters("x"))
    disturb(lora, "x")
    with torch.no_grad(), lora.use(None, "x", None):
        mixed = model(input_ids=ids).logits
    assert torch.equal(mixed[[0, 2]], base[[0, 2]]) and not torch.allclose(mixed[1], base[1], atol=1e-3)


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("family", ["falcon-7b", "falcon", "gpt_bigcode", "bloom", "opt", "gpt_oss", "nemotron"])
def test_unusual_families_train_every_method_or_say_why_not(family: str, kind: str) -> None:
    """One key head for many query heads, virtual tokens under alibi, routers with a bias of their own."""
    try:
        lora = with_method(family, kind)
    except StudioError as error:
        assert error.code == "E_METHOD" and error.hint
        return
    with lora.use("x"):
        lora.model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss.backward()
    assert all(tensor.grad is not None for tensor in lora.parameters("x"))


@pytest.mark.parametrize("kind", BASELINES)
def test_the_live_strength_reaches_every_method(kind: str) -> None:
    lora = with_method("llama", kind)
    base = logits(lora.model)
    disturb(lora, "x")
    with lora.use("x"):
        full = logits(lora.model)
        lora.set_scale("x", 0.0)
        torch.testing.assert_close(logits(lora.model), base, rtol=1e-5, atol=1e-5)
        lora.set_scale("x", 1.0)
        torch.testing.assert_close(logits(lora.model), full, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(lora.model), base)


def test_copies_stand_in_for_one_use_at_a_time() -> None:
    lora = with_method("llama", "full")
    with lora.use("x"), pytest.raises(AssertionError, match="outer"), lora.use(None):
        pass
    with lora.use(None), lora.use("x"):
        pass


def test_a_prompt_and_another_adapter_share_a_batch() -> None:
    lora = with_method("llama", "prompt", width=4)
    lora.add("y", LoraSpec(rank=3, targets=("all-linear",)))
    disturb(lora, "y")
    alone = {}
    for name in ("x", "y"):
        with lora.use(name):
            alone[name] = logits(lora.model)
    with lora.use("x", "y", None):
        mixed = logits(lora.model)
    torch.testing.assert_close(mixed[0], alone["x"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], alone["y"][1], rtol=1e-4, atol=1e-5)
    with lora.use("x"):
        assert torch.equal(lora.model(IDS).logits, lora.model(input_ids=IDS).logits)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_has_no_row_per_sequence_is_named_in_mixed_rows_and_works_alone(family: str) -> None:
    lora = with_method(family, "full")
    with lora.use("x"):
        logits(lora.model)
    with pytest.raises(StudioError) as caught, lora.use(None, "x", "x"):
        logits(lora.model)
    assert caught.value.code == "E_ROWS"


def test_text_behind_virtual_tokens_that_leaves_the_context_is_named() -> None:
    lora = LoRA(causal("gpt2", n_positions=12))
    add(lora, "x", BaselineSpec(kind="prefix", width=4))
    with pytest.raises(StudioError) as caught, lora.use("x"):
        logits(lora.model)
    assert caught.value.code == "E_CONTEXT"


def test_merged_in_it_cannot_be_used_or_added_to_as_well() -> None:
    lora = LoRA(causal("llama"))
    lora.add("x", LoraSpec(rank=2))
    with merged(lora, "x"):
        with pytest.raises(AssertionError, match="twice"), lora.use("x"):
            pass
        with pytest.raises(AssertionError, match="merged"):
            lora.add("y", LoraSpec(rank=2))
        with lora.use(None):
            pass
    with lora.use("x"), pytest.raises(AssertionError, match="in use"), merged(lora, "x"):
        pass
