"""How much arithmetic a step must do, and how fast this machine multiplies matrices of the model's own shapes.

The useful work of a step is what no implementation can leave out: the blocks forward and backward to the input of
every layer (4 per weight and token), the head at supervised positions (4), causal attention (6 · width · Σ length²
a layer) and the trained factors (6 per parameter and token). What is padded, recomputed, materialised or, of a prefix
that all rows share, computed more than once a step is not useful.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lora_studio.core.lean import Tokens, shared_prefix

ROUNDS = 5
Shape = tuple[int, int, int]  # tokens, in, out


def useful(sizes: Mapping[str, int], batch: Sequence[Any]) -> float:
    """Floating-point operations of one step on these rows; sizes as `sizes_of` gives them."""
    lengths = [len(ids) for ids, _ in batch]
    tokens = sum(lengths) - (len(batch) - 1) * shared_prefix([Tokens(ids, marks) for ids, marks in batch])
    supervised = sum(sum(marks[1:]) for _, marks in batch)
    attention = 6 * sizes["width"] * sizes["layers"] * sum(length**2 for length in lengths)
    return (4 * sizes["body"] + 6 * sizes["trained"]) * tokens + 4 * sizes["head"] * supervised + attention


def sizes_of(model: Any, trained: int) -> dict[str, int]:
    """Parameters in the blocks' matrices and in the head, blocks, and the width over which heads attend."""
    from lora_studio.core.layout import blocks

    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {
        "body": sum(tensor.numel() for tensor in blocks(model)[1].parameters() if tensor.dim() == 2),
        "head": text.vocab_size * text.hidden_size,
        "layers": text.num_hidden_layers,
        "width": text.num_attention_heads * head_dim,
        "trained": trained,
    }


def shapes_of(model: Any, tokens: int, supervised: int, device: str = "cpu") -> dict[Shape, int]:
    """The step's matrix products with frozen weights, forward and backward, and how often each comes."""
    from lora_studio.core.functions import CHUNK
    from lora_studio.core.layout import blocks

    counts: dict[Shape, int] = {}
    for module in blocks(model)[1].modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2:
            out, width = weight.shape
            for shape in ((tokens, width, out), (tokens, out, width)):
                counts[shape] = counts.get(shape, 0) + 1
    text = model.config.get_text_config()
    chunk = min(CHUNK[device], supervised)
    for shape in ((chunk, text.hidden_size, text.vocab_size), (chunk, text.vocab_size, text.hidden_size)):
        counts[shape] = counts.get(shape, 0) + max(1, round(supervised / chunk))
    return counts


def matrix_rate(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Operations per second over all shapes as often as they come: per CPU second, or on CUDA per second.

    spec: "shapes" ((tokens, in, out, count), ...), "precision", "device". The median of a few rounds. A CPU without
    bfloat16 products is measured in fp32 for them, as they are made there.
    """
    import torch

    from lora_studio.core import upcast

    device = spec["device"]
    dtype = upcast.widened(torch.empty(0, dtype=getattr(torch, spec["precision"]), device=device)).dtype

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    repeats, rounds = (10 if device == "cuda" else 1), []
    for number in range(ROUNDS + 1):  # the first is warm-up
        spent = done = 0.0
        for tokens, width, out, count in spec["shapes"]:
            x = torch.randn(tokens, width, dtype=dtype, device=device)
            weight = torch.randn(out, width, dtype=dtype, device=device)
            either = []
            for product in (x.new_empty(tokens, out), x.new_empty(out, tokens).T):  # the quicker layout counts
                torch.mm(x, weight.T, out=product)  # pages and caches are warm, as in a running step
                begin = clock()
                for _ in range(repeats):
                    torch.mm(x, weight.T, out=product)
                either.append((clock() - begin) / repeats * count)
            spent += min(either)
            done += 2.0 * tokens * width * out * count
        if number:
            rounds.append(done / spent)
    return {"rate": statistics.median(rounds), "best": max(rounds)}
