"""Base against adapted on rows the adapter never saw: loss, perplexity, and what fits the task.

Labels are scored by accuracy, everything else by exact match, ROUGE-L and BLEU (rouge-score, sacrebleu).
"""

import math
from collections.abc import Sequence
from typing import Any

from lora_studio.core.lora import LoRA, Row
from lora_studio.data.batches import encode, prompt_ids
from lora_studio.data.formats import Example
from lora_studio.errors import StudioError
from lora_studio.generate import Sampling, answers
from lora_studio.train import mean_loss

ANSWER_TOKENS = 200


def evaluate(
    lora: LoRA, adapter: str, tokenizer: Any, examples: Sequence[Example], *, max_length: int, labels: bool
) -> dict[str, Any]:
    """{"rows", "base": {...}, "adapted": {...}}; raises E_NO_TARGET when no row has an answer to measure."""
    rows = [
        tokens for tokens in (encode(tokenizer, example, max_length).tokens for example in examples) if tokens.count
    ]
    if not rows:
        raise StudioError("E_NO_TARGET", "There is no row to measure on.", "Hold out some rows, or give --data.")
    result: dict[str, Any] = {"rows": len(rows)}
    sides: dict[str, Row] = {"base": None, "adapted": adapter}
    for side, row in sides.items():
        with lora.use(row):
            loss = mean_loss(lora, rows)
            figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            asked = [example for example in examples if example.messages]
            if asked:
                prompts = [prompt_ids(tokenizer, example.prompt) for example in asked]
                texts = answers(lora.model, tokenizer, prompts, Sampling(max_new_tokens=_longest(tokenizer, asked)))
                figures |= score(texts, [example.target for example in asked], labels=labels)
        result[side] = figures
    return result


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


def _longest(tokenizer: Any, examples: Sequence[Example]) -> int:
    """Room for the longest answer and a little more: a model that has not learnt to stop is cut there."""
    longest = max(len(tokenizer(example.target)["input_ids"]) for example in examples)
    return min(ANSWER_TOKENS, longest + 16)
