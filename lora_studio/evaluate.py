"""Base against adapted on rows the adapter never saw: loss, perplexity, and what fits the task.

Labels are scored by accuracy, everything else by exact match, ROUGE-L and BLEU (rouge-score, sacrebleu). The base
of a classifier is the same model with its head as it was drawn, before any training: its accuracy is about chance.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_studio.core.lean import Tokens
from lora_studio.core.lora import LoRA
from lora_studio.data.batches import encode_all, encode_labels
from lora_studio.data.formats import Example
from lora_studio.data.words import prompt_ids, read_texts
from lora_studio.errors import StudioError
from lora_studio.generate import Sampling, answers
from lora_studio.measure import figures

ANSWER_TOKENS = 200


def evaluate(
    lora: LoRA,
    adapter: str,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_length: int,
    labels: bool,
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """{"rows", "capped", "base": {...}, "adapted": {...}}, every figure of the same rows.

    A row counts when `max_length` leaves something of its answer. capped: rows whose answer is longer than
    ANSWER_TOKENS, which no generated text can match. labels: score the written answers as labels.
    classes: the labels of a classifier, which writes nothing; loss and accuracy are measured.
    A figure that is not finite is None. Raises E_NO_TARGET when no row has an answer to measure, E_LABELS
    when one has a label that is not among `classes`.
    """
    if classes:
        labelled = _some([one.tokens for one in encode_labels(tokenizer, examples, classes, max_length)])
        return {"rows": len(labelled), "capped": 0, **_sides(lora, adapter, lambda: figures(lora, labelled))}
    encoded = encode_all(tokenizer, examples, max_length)
    pairs = [(example, one.tokens) for example, one in zip(examples, encoded, strict=True)]
    rows = _some([tokens for _, tokens in pairs if tokens.count])
    asked = [example for example, tokens in pairs if tokens.count and example.messages]  # all of them, or plain texts
    lengths = [len(one.ids) for one in read_texts(tokenizer, [example.target for example in asked], around=False)]

    def measure() -> dict[str, float]:
        loss = figures(lora, rows)["loss"]
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss}
        if asked:
            prompts = [prompt_ids(tokenizer, example.prompt) for example in asked]
            # a little more than the longest answer: a model that has not learnt to stop is cut there
            sampling = Sampling(max_new_tokens=min(ANSWER_TOKENS, max(lengths) + 16))
            texts = answers(lora.model, tokenizer, prompts, sampling)
            found |= score(texts, [example.target for example in asked], labels=labels)
        return found

    capped = sum(length > ANSWER_TOKENS for length in lengths)
    return {"rows": len(rows), "capped": capped, **_sides(lora, adapter, measure)}


def _sides(lora: LoRA, adapter: str, measure: Callable[[], Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """What is measured of the base model and of the adapted one; a figure that is not finite is None."""
    result = {}
    for side, row in {"base": None, "adapted": adapter}.items():
        with lora.use(row):
            result[side] = {name: value if math.isfinite(value) else None for name, value in measure().items()}
    return result


def _some(rows: list[Tokens]) -> list[Tokens]:
    """The rows; E_NO_TARGET when there are none."""
    if not rows:
        raise StudioError("E_NO_TARGET", "There is no row to measure on.", "Hold out some rows, or give --data.")
    return rows


def score(texts: Sequence[str], targets: Sequence[str], *, labels: bool) -> dict[str, float]:
    """Shares in 0..1; BLEU too, as sacrebleu's 0..100 divided by 100."""
    pairs = [(text.strip(), target.strip()) for text, target in zip(texts, targets, strict=True)]
    exact = sum(text == target for text, target in pairs) / len(pairs)
    if labels:
        return {"accuracy": exact}
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    rouge = RougeScorer(["rougeL"])
    overlap = sum(rouge.score(target, text)["rougeL"].fmeasure for text, target in pairs) / len(pairs)
    bleu = corpus_bleu([text for text, _ in pairs], [[target for _, target in pairs]]).score / 100
    return {"exact_match": exact, "rouge_l": overlap, "bleu": bleu}
