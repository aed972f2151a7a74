"""Base against adapted: figures that are known by construction."""

import json
import math

import pytest
import torch

from lora_studio import evaluate as module
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.data.formats import Example, Message
from lora_studio.errors import StudioError
from lora_studio.evaluate import evaluate, score
from tests.tiny import causal, classifier, tokenizer

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


def broken(lora: LoRA) -> None:
    """An adapter whose factors are not finite, as after a run that exploded."""
    lora.add("x", LoraSpec())
    for tensor in lora.parameters("x"):
        tensor.data.fill_(math.inf)


def test_figures_that_are_not_finite_are_null() -> None:
    lora = LoRA(causal("llama", vocabulary=len(tokenizer())))
    broken(lora)
    result = evaluate(lora, "x", tokenizer(), ROWS, max_length=99, labels=False)
    assert result["adapted"]["loss"] is None and result["adapted"]["perplexity"] is None
    assert result["adapted"]["exact_match"] == 0.0 and result["base"]["loss"] > 0
    json.dumps(result, allow_nan=False)  # `eval --json` ended in a ValueError


def test_answers_longer_than_the_cap_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoRA(causal("llama", vocabulary=len(tokenizer())))
    lora.add("x", LoraSpec())
    monkeypatch.setattr(module, "ANSWER_TOKENS", 5)  # one token per byte: "ab cd" just fits
    assert evaluate(lora, "x", tokenizer(), ROWS, max_length=99, labels=False)["capped"] == 0
    monkeypatch.setattr(module, "ANSWER_TOKENS", 4)
    assert evaluate(lora, "x", tokenizer(), ROWS, max_length=99, labels=False)["capped"] == 3


def test_all_figures_are_of_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoRA(causal("llama", vocabulary=len(tokenizer())))
    lora.add("x", LoraSpec())
    asked = []
    monkeypatch.setattr(module, "answers", lambda _, __, prompts, ___: [asked.extend(prompts), *["ab cd"] * 3][1:])
    long = Example(messages=(Message("user", "x" * 200), Message("assistant", "ef")), row=3)  # its answer is cut off
    result = evaluate(lora, "x", tokenizer(), [long, *ROWS], max_length=50, labels=False)
    assert result["rows"] == 3 and len(asked) == 2 * 3 and result["base"]["exact_match"] == 1.0


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


LABELLED = [
    Example(messages=(Message("user", f"text {n}"), Message("assistant", "bad" if n % 3 else "good")), row=n)
    for n in range(9)
]


def test_a_classifier_is_measured_by_accuracy_and_loss_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "answers", None)
    lora = LoRA(classifier("bert", labels=2, vocabulary=len(tokenizer())))
    lora.add("x", LoraSpec(modules_to_save=("classifier",)))
    fresh = evaluate(lora, "x", tokenizer(), LABELLED, max_length=99, labels=True, classes=("bad", "good"))
    assert fresh["rows"] == 9 and fresh["base"] == fresh["adapted"] and set(fresh["base"]) == {"loss", "accuracy"}
    head = lora.copies("x")
    head["classifier.weight"].zero_()
    head["classifier.bias"].copy_(torch.tensor([math.log(3), 0.0]))  # always "bad", with probability 3/4
    result = evaluate(lora, "x", tokenizer(), LABELLED, max_length=99, labels=True, classes=("bad", "good"))
    assert result["base"] == fresh["base"]
    wanted = {"accuracy": 6 / 9, "loss": (6 * math.log(4 / 3) + 3 * math.log(4)) / 9}
    assert result["adapted"] == pytest.approx(wanted, abs=1e-6)


def test_rows_with_a_label_that_was_not_learnt_cannot_be_measured() -> None:
    lora = LoRA(classifier("bert", labels=2, vocabulary=len(tokenizer())))
    lora.add("x", LoraSpec())
    with pytest.raises(StudioError) as caught:
        evaluate(lora, "x", tokenizer(), LABELLED, max_length=99, labels=True, classes=("bad", "fair"))
    assert caught.value.code == "E_LABELS"
