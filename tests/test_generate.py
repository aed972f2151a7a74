"""Our decoding loop against transformers' generate, and the two panes against each other."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_studio.core.baselines import add
from lora_studio.core.layout import heads
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import BaselineSpec, LoraSpec, Method
from lora_studio.errors import StudioError
from lora_studio.generate import Sampling, answers, base_difference, classify, compare, stream
from tests.tiny import CAUSAL, causal, classifier, tokenizer

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17]]


def tokens(
    model: torch.nn.Module, prompts: list[list[int]], sampling: Sampling, stop: frozenset[int] = frozenset()
) -> list:
    steps = list(stream(model, prompts, sampling, stop, pad=1))
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_rows_of_a_left_padded_batch_are_transformers_own(family: str) -> None:
    """And so is each row alone, where nothing is masked and attention goes step by step."""
    model = causal(family)
    ours = tokens(model, PROMPTS, Sampling(max_new_tokens=9))
    for prompt, row in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=9, min_new_tokens=9, do_sample=False, eos_token_id=None
        )
        assert row == theirs[0, len(prompt) :].tolist() == tokens(model, [prompt], Sampling(max_new_tokens=9))[0]


def with_adapter(strength: float = 0.5) -> LoRA:
    lora = LoRA(causal("llama", vocabulary=len(tokenizer())))
    lora.add("x", LoraSpec(rank=3, targets=("all-linear",)))
    draws = torch.Generator().manual_seed(1)
    for tensor in lora.parameters("x"):
        tensor.data.normal_(0, strength, generator=draws)
    return lora


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_side_by_side_rows_are_what_each_would_say_alone(temperature: float) -> None:
    lora, sampling = with_adapter(), Sampling(max_new_tokens=12, temperature=temperature, seed=3)
    (*_, last) = compare(lora, tokenizer(), PROMPTS[0], [None, "x"], sampling)
    base = answers(lora.model, tokenizer(), [PROMPTS[0]], sampling)
    with lora.use("x"):
        adapted = answers(lora.model, tokenizer(), [PROMPTS[0]], sampling)
    assert [answer.text for answer in last] == [*base, *adapted] and base != adapted
    assert all(answer.done for answer in last)


def test_with_strength_zero_sampled_panes_are_equal_word_for_word() -> None:
    lora = with_adapter()
    sampling = Sampling(max_new_tokens=20, temperature=1.3, top_p=0.9, seed=5)
    (*_, last) = compare(lora, tokenizer(), PROMPTS[0], [None, {"x": 0.0}], sampling)
    assert last[0] == last[1] and last[0].tokens > 0


def test_the_base_pane_is_equal_to_the_untouched_model_and_a_touched_one_is_caught() -> None:
    lora = with_adapter()
    assert base_difference(lora, PROMPTS[0], [None, "x"]) == 0.0
    slot: Any = next(slot for path, slot in lora._slots.items() if path.endswith("layers.0.mlp.up_proj"))
    original = slot.add
    slot.add = lambda *call: original(*call) + 1  # an adapter that leaks into all rows
    assert base_difference(lora, PROMPTS[0], [None, "x"]) > 0


def test_a_row_ends_at_its_stop_token_and_the_others_go_on() -> None:
    model = causal("llama")
    free = tokens(model, PROMPTS, Sampling(max_new_tokens=8))
    stop = free[0][3]
    ended = tokens(model, PROMPTS, Sampling(max_new_tokens=8), frozenset([stop]))
    for full, cut in zip(free, ended, strict=True):
        assert cut == (full[: full.index(stop)] if stop in full else full)


def test_sampling_follows_the_model_and_the_seed() -> None:
    model = causal("llama")
    sampling = Sampling(max_new_tokens=16, temperature=1.0, seed=1)
    assert tokens(model, PROMPTS[:1], sampling) == tokens(model, PROMPTS[:1], sampling)
    other = Sampling(max_new_tokens=16, temperature=1.0, seed=2)
    assert tokens(model, PROMPTS[:1], sampling) != tokens(model, PROMPTS[:1], other)
    narrow = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.01)
    assert tokens(model, PROMPTS[:1], narrow) == tokens(model, PROMPTS[:1], Sampling(max_new_tokens=16))


def test_answers_come_back_in_the_order_of_the_prompts() -> None:
    model, words = causal("llama", vocabulary=len(tokenizer())), tokenizer()
    together = answers(model, words, PROMPTS, Sampling(max_new_tokens=6), batch=2)
    assert together == [answers(model, words, [prompt], Sampling(max_new_tokens=6))[0] for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_probabilities_of_labels_are_each_rows_own(family: str) -> None:
    lora = LoRA(classifier(family))
    heads = ("classifier",) if family == "bert" else ("score",)
    lora.add("x", LoraSpec(rank=3, modules_to_save=heads))
    draws = torch.Generator().manual_seed(1)
    for tensor in lora.parameters("x"):
        tensor.data.normal_(0, 0.5, generator=draws)
    names, ids = ("bad", "fair", "good"), PROMPTS[2]
    together = classify(lora, [None, "x", {"x": 0.5}], ids, names)
    assert [sum(row) for row in together] == pytest.approx([1, 1, 1])
    for row, alone in zip(together, (None, "x", {"x": 0.5}), strict=True):
        assert row == pytest.approx(classify(lora, [alone], ids, names)[0], abs=1e-5)
    with torch.no_grad():
        plain = lora.detach()(input_ids=torch.tensor([ids])).logits.softmax(-1)[0]
    assert together[0] == pytest.approx(plain.tolist(), abs=1e-6) and together[0] != together[1]


@pytest.mark.parametrize("method", [LoraSpec(rank=3), BaselineSpec(kind="full"), BaselineSpec(kind="bitfit")])
def test_encoders_that_share_a_part_of_their_attention_among_rows_are_compared_row_by_row(method: Method) -> None:
    """DeBERTa with relative positions passes one table through q and k for the whole batch."""
    options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True}
    model = classifier("deberta-v2", **options, norm_rel_ebd="layer_norm", position_buckets=4)
    lora = LoRA(model)
    add(lora, "x", replace(method, modules_to_save=heads(model)))
    for tensor in lora.parameters("x"):
        tensor.data += torch.empty(tensor.shape).normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    base, adapted = classify(lora, [None, {"x": 1.0}], (3, 4, 5), ("a", "b", "c"))
    assert base != adapted and base_difference(lora, (3, 4, 5), [None, {"x": 1.0}]) == 0.0
    with pytest.raises(StudioError) as caught, torch.no_grad(), lora.use(None, "x"):
        model(input_ids=torch.tensor([[3, 4, 5]] * 2))
    assert caught.value.code == "E_ROWS"
