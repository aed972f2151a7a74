"""Base against adapted: figures that are known by construction."""

import math

import pytest

from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.data.formats import Example, Message
from lora_studio.errors import StudioError
from lora_studio.evaluate import evaluate, score
from tests.tiny import causal, tokenizer

ROWS = [Example(messages=(Message("user", f"say {n}"), Message("assistant", "ab cd")), row=n) for n in range(3)]


def test_scores_of_perfect_and_of_foreign_texts() -> None:
    targets = ["the cat sat on the mat", "a b c d e"]
    assert score(targets, targets, labels=False) == pytest.approx({"exact_match": 1.0, "rouge_l": 1.0, "bleu": 1.0})
    assert score(["x y", "z"], targets, labels=False)["exact_match"] == 0.0
    assert score([" billing", "other"], ["billing", "returns"], labels=True) == {"accuracy": 0.5}


def test_a_fresh_adapter_scores_exactly_like_its_base() -> None:
    lora = LoRA(causal("llama", vocabulary=len(tokenizer())))
    lora.add("x", LoraSpec())
    result = evaluate(lora, "x", tokenizer(), ROWS, max_length=99, labels=False)
    assert result["rows"] == 3 and result["base"] == result["adapted"]
    assert result["base"]["perplexity"] == math.exp(result["base"]["loss"])
    assert set(result["base"]) == {"loss", "perplexity", "exact_match", "rouge_l", "bleu"}


def test_plain_text_has_a_loss_and_no_answers() -> None:
    lora = LoRA(causal("llama", vocabulary=len(tokenizer())))
    lora.add("x", LoraSpec())
    result = evaluate(lora, "x", tokenizer(), [Example(text="Once upon a time.")], max_length=99, labels=False)
    assert set(result["base"]) == {"loss", "perplexity"}


def test_nothing_to_measure_is_said() -> None:
    lora = LoRA(causal("llama", vocabulary=len(tokenizer())))
    lora.add("x", LoraSpec())
    with pytest.raises(StudioError) as caught:
        evaluate(lora, "x", tokenizer(), [], max_length=99, labels=False)
    assert caught.value.code == "E_NO_TARGET"
