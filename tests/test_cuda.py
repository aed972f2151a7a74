"""What only a CUDA GPU can show: its kernels, its attention, training there, memory that really runs out.

Skipped where there is none. The CPU is the other side of most of these equalities.
"""

import copy
import dataclasses
import gc
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lora_studio import recorded
from lora_studio.core import flash, functions, kernels, lean, together
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.data.batches import Encoded
from lora_studio.events import Metric, Probed, Warned
from lora_studio.generate import Sampling, answers, compare
from lora_studio.measure import leanly, losses, shares_prefix
from lora_studio.runs.config import DataChoice, RunConfig
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio
from lora_studio.train import Job, train, train_together
from tests.tiny import CAUSAL, causal, tiny_model, tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")

LENGTHS = (9, 4, 9, 17)
DTYPES = [torch.float32, torch.bfloat16]


def apart(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference over that of the exact value."""
    return float((ours.double().cpu() - exact.double().cpu()).norm() / exact.double().cpu().norm())


def rows(
    seed: int = 0, lengths: tuple[int, ...] = LENGTHS, words: int = 90, shared: Sequence[int] = ()
) -> list[lean.Tokens]:
    """Rows of drawn tokens, behind those that all of them share, if any."""
    draws = torch.Generator().manual_seed(seed)
    ids = [[*shared, *torch.randint(3, words, (length,), generator=draws).tolist()] for length in lengths]
    return [lean.Tokens(one, [place > len(shared) + 1 for place in range(len(one))]) for one in ids]


def adapted(model: torch.nn.Module, device: str = "cuda", dtype: torch.dtype = torch.float32) -> LoRA:
    lora = LoRA(copy.deepcopy(model).to(device, dtype))
    lora.add("x", LoraSpec(rank=3, targets=("all-linear",)))
    draws = torch.Generator().manual_seed(1)
    for tensor in lora.parameters("x"):
        tensor.data.copy_(torch.empty(tensor.shape).normal_(0, 0.1, generator=draws))
    return lora


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 96, 1536, 8960])
@pytest.mark.parametrize(("dtype", "weights"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)])
def test_each_kernel_gives_what_its_formula_gives_in_double_precision(
    width: int, dtype: torch.dtype, weights: torch.dtype
) -> None:
    torch.manual_seed(width)
    x, gate, outer = (torch.randn(1, 37, width, device="cuda").to(dtype) for _ in range(3))
    weight = (1 + torch.randn(width, device="cuda") / 4).to(weights)
    assert kernels.usable(x), "Triton makes no kernels here"
    near = 1e-6 if dtype == torch.float32 else 5e-3  # a half-precision rounding or two

    wide = x.double().requires_grad_()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    (gradient,) = torch.autograd.grad(exact, wide, outer.double())
    leaf = x.clone().requires_grad_()
    ours = functions.RMSNorm.apply(leaf, weight, 1e-5)
    assert ours.dtype == dtype and apart(ours, exact) < near
    assert apart(torch.autograd.grad(ours, leaf, outer)[0], gradient) < near

    pair = x.double().requires_grad_(), gate.double().requires_grad_()
    total = pair[0] + pair[1]
    exact = total, total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    gradients = torch.autograd.grad(exact, pair, (gate.double(), outer.double()))
    leaves = x.clone().requires_grad_(), gate.clone().requires_grad_()
    ours = functions.NormedSum.apply(*leaves, weight, 1e-5)
    assert all(one.dtype == dtype and apart(one, other) < near for one, other in zip(ours, exact, strict=True))
    for mine, theirs in zip(torch.autograd.grad(ours, leaves, (gate, outer)), gradients, strict=True):
        assert apart(mine, theirs) < near
    ours = functions.NormedSum.apply(leaves[0], None, weight, 1e-5)
    assert torch.equal(ours[0], x) and apart(ours[1], functions.RMSNorm.apply(x, weight, 1e-5)) == 0

    pair = gate.double().requires_grad_(), x.double().requires_grad_()
    exact = torch.nn.functional.silu(pair[0]) * pair[1]
    gradients = torch.autograd.grad(exact, pair, outer.double())
    leaves = gate.clone().requires_grad_(), x.clone().requires_grad_()
    ours = functions.Gated.apply(*leaves, torch.nn.SiLU())
    assert apart(ours, exact) < near
    for mine, theirs in zip(torch.autograd.grad(ours, leaves, outer), gradients, strict=True):
        assert apart(mine, theirs) < near


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(1, 8), (3, 64), (8, 96), (32, 128)])
def test_turning_by_positions_is_what_transformers_does(heads: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x = torch.randn(1, 37, heads, width, device="cuda").to(dtype).transpose(1, 2).requires_grad_()
    angles = torch.randn(1, 37, width, device="cuda")
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin)
    ours = functions.Turned.apply(x, cos, sin)
    outer = torch.randn_like(theirs)
    near = 1e-6 if dtype == torch.float32 else 3e-3
    assert apart(ours, theirs) < near and ours[0].transpose(0, 1).is_contiguous()
    assert apart(*(torch.autograd.grad(one, x, outer)[0] for one in (ours, theirs))) < near


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "phi3", "gpt_neox", "cohere"])
def test_models_turn_by_kernel_where_they_turn_halves(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = kernels.turned
    assert kernels.usable(torch.ones(1, device="cuda"))  # asked once, it tries them all
    monkeypatch.setattr(kernels, "turned", lambda x, *given, **named: (calls.append(1), kernel(x, *given, **named))[1])
    lora = adapted(causal(family))
    with lora.use("x"):
        losses(lora, rows())
    whole = family not in ("gpt_neox", "cohere")  # the first turns a part of each head, the other turns pairs
    assert len(calls) == (4 if whole else 2) * lora.model.config.num_hidden_layers  # q and k, on the trial and then


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", [50, 5000, 128_256])
def test_cross_entropy_in_one_buffer_is_that_of_double_precision(words: int, dtype: torch.dtype) -> None:
    torch.manual_seed(words)
    logits = 4 * torch.randn(5, words, device="cuda").to(dtype)
    labels = torch.randint(words, (5,), device="cuda")
    wide = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum(), wide)
    assert apart(kernels.cross_entropy_(logits, labels), exact) < 1e-6
    assert apart(logits, gradient) < (1e-6 if dtype == torch.float32 else 5e-3)
    logits[1, 7] = math.nan
    assert kernels.cross_entropy_(logits, labels).isnan().tolist() == [False, True, False, False, False]


def test_a_kernel_takes_what_does_not_lie_in_one_piece() -> None:
    both = torch.randn(1, 5, 64, device="cuda")
    gate, up = both.chunk(2, dim=-1)
    assert not gate.is_contiguous()
    torch.testing.assert_close(kernels.silu_gate(gate, up), torch.nn.functional.silu(gate) * up)
    outer, apart = torch.randn(1, 5, 32, device="cuda"), (gate.contiguous(), up.contiguous())
    for mine, theirs in zip(*(kernels.silu_gate_backward(outer, *pair) for pair in ((gate, up), apart)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", [("attn.q", "attn.v"), ("all-linear",)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_layers_that_compute_together_give_the_same(
    family: str, targets: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for joins in (True, False):
        monkeypatch.setattr(together, "can_join", lambda weight, joins=joins: joins)
        lora = LoRA(copy.deepcopy(causal(family)).to("cuda", dtype))
        lora.add("x", LoraSpec(rank=3, targets=targets))
        draws = torch.Generator().manual_seed(1)
        for tensor in lora.parameters("x"):
            tensor.data.copy_(torch.empty(tensor.shape).normal_(0, 0.1, generator=draws))
        lora.model.train()
        with lora.use("x"):
            each = losses(lora, rows())
            each.mean().backward()
        found.append((each.detach(), torch.cat([one.grad.flatten() for one in lora.parameters("x")])))
    near = (1e-6, 1e-5) if dtype == torch.float32 else (5e-3, 0.15)  # in half precision each of them is so far off
    assert apart(found[0][0], found[1][0]) < near[0] and apart(found[0][1], found[1][1]) < near[1]


# ---- the packed way --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_losses_and_gradients_are_those_of_the_cpu_in_fp32(family: str, dtype: torch.dtype) -> None:
    """bf16 goes through torch's attention for variable lengths, fp32 sequence by sequence."""
    model, found = causal(family), []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        lora = adapted(model, device, kind)
        lora.model.train()
        with lora.use("x"):
            each = losses(lora, rows())
            each.mean().backward()
        found.append((each.detach(), torch.cat([one.grad.flatten() for one in lora.parameters("x")])))
    (exact, gradient), (ours, mine) = found
    assert apart(ours, exact) < (1e-4 if dtype == torch.float32 else 2e-2)
    assert apart(mine, gradient) < (1e-3 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_prefix_computed_once_gives_the_losses_and_gradients_of_the_cpu(family: str, dtype: torch.dtype) -> None:
    model, found, batch = causal(family), [], rows(shared=range(5, 25))
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        lora = adapted(model, device, kind)
        lora.model.train()
        seen: list[int] = []
        words: torch.nn.Module = lora.model.get_input_embeddings()  # type: ignore[operator]
        words.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].shape[1]))
        with lora.use("x"):
            assert shares_prefix(lora, ["x"])
            each = losses(lora, batch)
            each.mean().backward()
        assert seen == [20 + sum(LENGTHS)]
        found.append((each.detach(), torch.cat([one.grad.flatten() for one in lora.parameters("x")])))
    (exact, gradient), (ours, mine) = found
    assert apart(ours, exact) < (1e-4 if dtype == torch.float32 else 2e-2)
    assert apart(mine, gradient) < (1e-3 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("short", [flash.LONGEST, 0], ids=["our kernel", "torch's kernel"])
@pytest.mark.parametrize("lengths", [LENGTHS, (150, 64, 1, 90, 200)], ids=["a block", "some blocks"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)])
def test_attention_to_a_prefix_that_lies_with_another_is_attention_by_sequence(
    heads: tuple[int, int], lengths: tuple[int, ...], short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(flash, "LONGEST", short)
    packed = lean.pack_groups([rows(0, lengths, shared=range(5, 25)), rows(1, shared=range(30, 37))], share=True)
    laid, total = packed.lengths, sum(packed.lengths)
    q, k, v = (
        torch.randn(1, n, total, 64, device="cuda").bfloat16().requires_grad_() for n in (heads[0], *heads[1:] * 2)
    )
    outer = torch.randn(1, total, heads[0], 64, device="cuda").bfloat16()
    ours = lean._variable_length(q, k, v, laid, 0.2)
    parts = []
    for place in laid.places():
        whole = [torch.cat([tensor[:, :, span] for span in place], dim=2).double() for tensor in (q, k, v)]
        own = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True, scale=0.2, enable_gqa=True)
        parts.append(own[:, :, place[-1].start - place[-1].stop :])
    exact = torch.cat(parts, dim=2).transpose(1, 2)
    assert apart(ours, exact) < 1e-2
    theirs = torch.autograd.grad(exact, (q, k, v), outer.double())
    for mine, other in zip(torch.autograd.grad(ours, (q, k, v), outer), theirs, strict=True):
        assert apart(mine, other) < 1e-2


def test_attention_of_short_sequences_has_the_same_bits_every_time() -> None:
    lengths = lean.Lengths((150, 64, 1, 90, 200))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, sum(lengths), 64, device="cuda").bfloat16().requires_grad_() for n in (8, 2, 2))
    outer = torch.randn(1, sum(lengths), 8, 64, device="cuda").bfloat16()
    assert flash.takes(q, lengths.longest)
    first, *others = (
        torch.autograd.grad(lean._variable_length(q, k, v, lengths, 0.2), (q, k, v), outer) for _ in "123"
    )
    assert all(torch.equal(one, other) for more in others for one, other in zip(first, more, strict=True))


@pytest.mark.parametrize("short", [flash.LONGEST, 0], ids=["our kernel", "torch's kernel"])
@pytest.mark.parametrize("lengths", [LENGTHS, (150, 64, 1, 90, 200)], ids=["a block", "some blocks"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)])
def test_attention_for_variable_lengths_is_attention_by_sequence(
    heads: tuple[int, int], lengths: tuple[int, ...], short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(flash, "LONGEST", short)
    total = sum(lengths)
    q, k, v = (
        torch.randn(1, n, total, 64, device="cuda").bfloat16().requires_grad_() for n in (heads[0], *heads[1:] * 2)
    )
    outer = torch.randn(1, total, heads[0], 64, device="cuda").bfloat16()
    ours = lean._variable_length(q, k, v, lean.Lengths(lengths), 0.2)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(one.double() for one in part), is_causal=True, scale=0.2, enable_gqa=True
        )
        for part in zip(*(tensor.split(lengths, dim=2) for tensor in (q, k, v)), strict=True)
    ]
    exact = torch.cat(parts, dim=2).transpose(1, 2)
    assert apart(ours, exact) < 1e-2
    theirs = torch.autograd.grad(exact, (q, k, v), outer.double())
    for mine, other in zip(torch.autograd.grad(ours, (q, k, v), outer), theirs, strict=True):
        assert apart(mine, other) < 1e-2


# ---- training --------------------------------------------------------------------------------------------------------

CONFIG = TrainConfig(steps=8, batch_size=4, learning_rate=0.01, evaluations=2, samples=0, save_every=4)


def job(
    device: str = "cuda", *, model: torch.nn.Module | None = None, spec: LoraSpec | None = None, **changes: Any
) -> Job:
    lora = LoRA(copy.deepcopy(model or causal("llama")).to(device))
    config = dataclasses.replace(CONFIG, **changes)
    lora.add("x", spec or LoraSpec(rank=4, targets=("all-linear",)), seed=config.seed)
    words = lora.model.config.vocab_size - 5
    data = [Encoded(one, place) for place, one in enumerate(rows(2, LENGTHS * 4, words))]
    return Job(lora=lora, adapter="x", tokenizer=None, train=data[2:], heldout=data[:2], config=config)


def values(events: list, name: str) -> list[float]:
    return [event.values[name] for event in events if isinstance(event, Metric) and name in event.values]


def test_a_run_is_that_of_the_cpu_step_by_step() -> None:
    for name in ("train_loss", "heldout_loss"):
        ours, theirs = (values(list(train(job(device))), name) for device in ("cuda", "cpu"))
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_restored_run_ends_as_the_unbroken_one(dropout: float) -> None:
    """With its own random states on the GPU. torch's gradients there may add up in another order."""
    spec = LoraSpec(rank=4, targets=("attn.q", "attn.v"), dropout=dropout)
    whole = job(spec=spec)
    every = values(list(train(whole)), "train_loss")
    first = job(spec=spec)
    for event in train(first):
        if isinstance(event, Metric) and event.step == 4 and "train_loss" in event.values:
            break
    second = job(spec=spec)
    second.restore(first.state())
    assert values(list(train(second)), "train_loss") == pytest.approx(every[4:], rel=1e-5)
    for ours, theirs in zip(second.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_adapters_trained_together_end_as_if_each_had_trained_alone() -> None:
    ranks = (1, 4, 8)

    def jobs(lora: LoRA, chosen: tuple[int, ...]) -> list[Job]:
        made = []
        for rank in chosen:
            lora.add(f"r{rank}", LoraSpec(rank=rank, targets=("attn.q", "attn.v")), seed=rank)
            data = [Encoded(one, place) for place, one in enumerate(rows(2, LENGTHS * 4))]
            made.append(
                Job(lora=lora, adapter=f"r{rank}", tokenizer=None, train=data[2:], heldout=data[:2], config=CONFIG)
            )
        return made

    found: dict[int, list] = {}
    for number, event in train_together(jobs(LoRA(causal("llama").cuda()), ranks)):
        found.setdefault(number, []).append(event)
    for number, rank in enumerate(ranks):
        (alone,) = jobs(LoRA(causal("llama").cuda()), (rank,))
        assert values(found[number], "train_loss") == pytest.approx(values(list(train(alone)), "train_loss"), abs=1e-4)


@pytest.mark.parametrize("shared", [0, 21])
@pytest.mark.parametrize("family", recorded.KNOWN)
def test_a_recorded_pass_gives_the_losses_and_gradients_of_a_plain_one(family: str, shared: int) -> None:
    lora = adapted(causal(family), dtype=torch.bfloat16)
    parts = [rows(seed, (9, 4, 9, 17 + seed), shared=range(5, 5 + shared)) for seed in (1, 2, 3, 1)]
    lora.model.train()
    recordings = recorded.Recordings(lora.model, lora.parameters("x"), shares=shares_prefix(lora, ["x"]))
    assert recorded.recordable(lora, "x")

    def plainly(part: list[lean.Tokens]) -> torch.Tensor:
        loss = losses(lora, part).sum() / 30
        loss.backward()
        return loss.detach()

    def gradient(
        way: Callable[[list[lean.Tokens]], torch.Tensor | None], part: list[lean.Tokens]
    ) -> list[torch.Tensor]:
        for tensor in lora.parameters("x"):
            tensor.grad = None
        loss = way(part)
        assert loss is not None, recordings.why_not
        return [loss, torch.cat([one.grad.flatten() for one in lora.parameters("x")])]

    with lora.use("x"), leanly(lora, parts[0]):
        for part in parts:
            exact, ours = gradient(plainly, part), gradient(lambda part: recordings.run(part, 30), part)
            assert apart(ours[0], exact[0]) < 2e-3 and apart(ours[1], exact[1]) < 3e-2
        before = torch.cat([one.grad.flatten() for one in lora.parameters("x")])
        assert all(bool(size.keys) == bool(shared) for size in recordings._made)
        recordings.run(parts[0], 30)  # a second pass of one step adds up
        assert apart(torch.cat([one.grad.flatten() for one in lora.parameters("x")]), 2 * before) < 1e-3


@pytest.mark.parametrize(("family", "dropout"), [("mistral", 0.0), ("mixtral", 0.0), ("llama", 0.3), ("gemma2", 0.0)])
def test_what_cannot_be_recorded_trains_as_ever(family: str, dropout: float) -> None:
    """Nobody tried it, experts that are chosen by values, random numbers, capped logits."""
    work = job(model=causal(family).bfloat16(), spec=LoraSpec(rank=4, targets=("attn.q",), dropout=dropout))
    assert len(values(list(train(work)), "train_loss")) == CONFIG.steps and work.share.recordings is None


def test_a_run_in_bf16_is_the_same_recorded_and_not_and_is_recorded() -> None:
    found = []
    for may in (True, False):
        work = job(model=causal("llama").bfloat16(), steps=30)
        curve, made = [], 0
        for event in train(work):
            work.share.may_record &= may
            made = max(made, len(work.share.recordings or ()))
            curve.append(event)
        found.append(values(curve, "train_loss"))
        assert bool(made) == may and not len(work.share.recordings or ())  # given back at the end
    assert found[0] == pytest.approx(found[1], rel=5e-3)


# ---- memory ----------------------------------------------------------------------------------------------------------


def middling() -> torch.nn.Module:
    """Of a size at which a batch takes far more than the weights."""
    torch.manual_seed(0)
    return causal("llama", vocabulary=256, hidden_size=256, intermediate_size=1024, num_hidden_layers=4)


@contextmanager
def only(more: int) -> Iterator[None]:
    """Inside, the GPU gives torch no more than `more` bytes beyond what its tensors hold now."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def long_job(**changes: Any) -> Job:
    work = job(model=middling(), batch_size=32, **changes)
    data = [Encoded(one, place) for place, one in enumerate(rows(3, (400,) * 64, 250))]
    return dataclasses.replace(work, train=data[2:], heldout=data[:2])


def test_memory_that_runs_out_makes_passes_smaller_and_changes_no_loss() -> None:
    plain = list(train(long_job(steps=3)))
    taken = next(event.memory_bytes for event in plain if isinstance(event, Probed))
    work = long_job(steps=3)
    with only((taken - torch.cuda.memory_allocated()) // 4):
        events = list(train(work))
    assert values(events, "train_loss") == pytest.approx(values(plain, "train_loss"), rel=1e-3)
    assert [event.code for event in events if isinstance(event, Warned)].count("W_MEMORY") >= 1
    assert work.share.accumulate > 1


def test_recomputed_activations_take_less_memory_and_change_no_loss() -> None:
    runs = [list(train(long_job(steps=2, checkpointing=choice))) for choice in ("off", "on")]
    kept, made_again = (next(e.memory_bytes for e in events if isinstance(e, Probed)) for events in runs)
    assert values(runs[0], "train_loss") == pytest.approx(values(runs[1], "train_loss"), rel=1e-4)
    assert made_again < 0.6 * kept


# ---- answering and whole runs ----------------------------------------------------------------------------------------


def test_base_and_adapter_answer_in_one_batch_what_each_says_alone() -> None:
    words = tokenizer()
    lora = adapted(causal("llama", vocabulary=len(words)))
    sampling = Sampling(max_new_tokens=12)
    prompt = [5, 6, 7, 8]
    (*_, last) = compare(lora, words, prompt, [None, "x"], sampling)
    base = answers(lora.model, words, [prompt], sampling)
    with lora.use("x"):
        ours = answers(lora.model, words, [prompt], sampling)
    assert [one.text for one in last] == [*base, *ours] and base != ours


def test_a_run_of_the_app_trains_on_the_gpu_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """A worker of its own, from the queue to the adapter's files; killed on its way."""
    model, studio = tiny_model(tmp_path / "model"), Studio(tmp_path / "root")
    text = "\n".join(json.dumps({"prompt": f"say {n}", "completion": "ab" * (1 + n % 3)}) for n in range(40))
    train = TrainConfig(steps=400, batch_size=4, save_every=20, evaluations=2, samples=1)
    config = RunConfig(model=str(model), dataset=DataChoice(id=studio.data.add_text(text).id), train=train)
    studio.supervisor.start()
    try:
        run = studio.start(config)
        killed = False
        for event in studio.follow(run.id, interval_s=0.02):  # it goes on by itself
            if event["step"] >= 60 and not killed:
                studio.supervisor.kill(run.path, "local")
                killed = True
    finally:
        studio.supervisor.close()
    ended = studio.runs.get(run.id)
    assert killed and ended.status == "done", ended.error
    events = studio.runs.curve(run.id)
    steps = [one["step"] for one in events if one["type"] == "Metric" and "train_loss" in one["values"]]
    assert steps == list(range(1, 401))
    started = next(one for one in events if one["type"] == "Started")
    assert started["device"].startswith("cuda") and started["precision"] == "bfloat16"
    assert all(
        math.isfinite(one["values"]["heldout_loss"]) for one in events if "heldout_loss" in one.get("values", ())
    )
    assert list(itertools.islice((run.path / "adapter").glob("*.safetensors"), 1))
