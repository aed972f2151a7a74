"""Parameters, bytes and seconds before launch. Parameters are exact, the rest is a forecast that says so.

    weights      P · b                                    P parameters of b bytes; full fine-tuning trains a copy, so
                                                          that they stay and can be compared with
    adapter      16 · n                                   n trainable: fp32 master, gradient, two Adam moments; passes
                                                          side by side have a gradient each
    activations  T · L · (b · e · SPARE + DROPPED · a)    T tokens of the largest round, L layers from the lowest
                                                          trained one, e elements that a layer keeps per token (below),
                                                          SPARE for the allocator and the backward; a attention weights
                                                          per token, which only a model that drops some of them keeps;
                                                          with checkpointing a layer keeps h, and one at a time the rest
    head         V · (4 · CHUNK | 2 · CHUNK + 4 · FEW)    the logits of one chunk in fp32, or in bf16 where products are
                                                          and a few of them in fp32, for each pass of a round; a
                                                          classifier has none
    runtime      the interpreter, its libraries and their buffers

A layer keeps the inputs of its two norms, q, k, v, attention's output (but not a CPU's of long rows), the
feed-forward's gate and up, and what its Parts keep, mostly the input of each matrix that is trained: core.functions and
core.attention say why no more. Rows that are padded are all as long as the longest, and their attention keeps a key and
a value for each head.

Time counts floating-point operations: 2 per parameter and token forward, 2 more in the blocks that the gradient
passes, 2 more for each trained parameter, at a share of the matrix rate that this machine shows in a short
measurement.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_studio import recorded as recordings
from lora_studio.core import attention, lean, upcast
from lora_studio.core.baselines import Piece
from lora_studio.core.functions import CHUNK, IN_FP32
from lora_studio.core.layout import blocks, heads, matrices
from lora_studio.core.spec import VIRTUAL
from lora_studio.data.batches import Lengths
from lora_studio.measure import HELDOUT_TOKENS, SAMPLE_SPARE, SAMPLE_TOKENS
from lora_studio.settings import TrainConfig
from lora_studio.step import MORE, busy

# RUNTIME_BYTES was chosen by least squares on 14 settings of four architectures, benchmarks.forecast.FITTED; SPARE on
# some of them, since a CPU's passes are of 2,048 tokens: four in bfloat16 gave 1.18 to 1.34, two in float32 1.17, 1.24.
RUNTIME_BYTES = 430 * 2**20
SPARE = {2: 1.26, 4: 1.2}  # by bytes of an element
SPARE_CUDA = 1.1  # there tensors alone count; two bf16 settings on an H100 took 1.0 and 1.1, float32 was not measured
UNGATED = 1.5  # tensors of the feed-forward's width that one without a gate keeps
DROPPED = 21.0  # bytes an attention weight keeps where some are dropped, in fp32 whatever the precision
EFFICIENCY = 0.55  # of the measured matrix rate that a training step reaches on this machine's class
STEP_S = 0.03  # of every step, whatever its size
START_S = 9.0  # imports, loading and tokenising before the first step
PACKED = {"int8": 1.0, "nf4": 0.53}  # bytes a weight, with its share of the scales
ASSUMED = Lengths(median=128, p95=256, max=256, cut=0, unsupervised=0, total=12_800, supervised=6_400, histogram=())


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will cost: exact counts, forecast bytes by part (peak is their sum) and forecast seconds."""

    trainable: int
    total: int
    adapter_bytes: int
    memory_bytes: dict[str, int]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    model: Any,
    pieces: Sequence[Piece],
    config: TrainConfig,
    *,
    precision: str,
    device: str,
    lengths: Lengths | None = None,
    rows: int = 100,
    abreast: int = 1,
    recorded: bool = False,
) -> Estimate:
    """Forecast for a model skeleton, what is to be trained and a dataset's length statistics (or 100 assumed rows).

    The lengths have a shared prefix only where passes will have it, too: core.lean.pack_groups. abreast: passes that
    may be made side by side, as step.Share has it. recorded: whether they will be, as recorded.recordable says.
    """
    text = model.config.get_text_config()
    size = 4 if precision == "float32" else 2
    data = lengths or ASSUMED
    trainable = sum(piece.parameters for piece in pieces)
    total = sum(tensor.numel() for tensor in model.parameters())
    passed = text.num_hidden_layers - _lowest(model, pieces)
    spare = SPARE_CUDA if device == "cuda" else SPARE[size]
    pads = _pads(model, pieces)
    in_blocks = device == "cpu" and not pads and _long(config, data, rows) >= attention.long(_query_width(text))
    elements = _kept_elements(model, pieces, pads=pads, in_blocks=in_blocks)
    kept = spare * size * elements + _kept_weights(model, config, data, rows)
    layers = kept + spare * size * text.hidden_size * passed if config.checkpointing == "on" else kept * passed
    room = lean.room(model, device, recorded=recorded, upcasts=size == 2 and _upcasts(device))
    cut = functools.partial(_cut, config, data, room, busy(model), abreast)
    if recorded:
        cut = functools.partial(_filled, config, data, room, text.hidden_size)
    together, row = _long_step(config, data, rows)
    step, short = cut(together, row), cut(together, max(1.0, 2 * data.total / rows - row))
    most = room if short.rounds < step.rounds and not recorded else 0  # of steps in between some fill their rounds
    memory = {
        "weights": total_bytes(model, precision),
        "adapter": (12 + 4 * (step.passes + (step.passes > 1 and step.rounds > 1))) * trainable,
        "activations": int(max(0 if pads else most, _together(config, data, rows, step, pads=pads)) * layers)
        + int(step.again * 2 * _key_width(text) * spare * size * passed if device == "cuda" else 0),
        "head": step.passes * _vocabulary(model) * _logit_bytes(size, device),
        "runtime": RUNTIME_BYTES if device == "cpu" else 0,
    }
    memory["peak"] = sum(memory.values())
    return Estimate(
        trainable=trainable,
        total=total,
        adapter_bytes=4 * trainable,
        memory_bytes=memory,
        seconds=_seconds(model, trainable, passed, config, data, rows, cut, precision, device),
    )


def _lowest(model: Any, pieces: Sequence[Piece]) -> int:
    """The block that the gradient reaches down to: 0 for what lies below them all, their number for a head alone."""
    depth, above = model.config.get_text_config().num_hidden_layers, heads(model)
    return min((max(0, piece.layer) for piece in pieces if piece.name.split(".")[0] not in above), default=depth)


def _vocabulary(model: Any) -> int:
    """Outputs of the head that writes text; 0 for a classifier."""
    return model.config.get_text_config().vocab_size if model.get_output_embeddings() is not None else 0


def _logit_bytes(size: int, device: str) -> int:
    """Of a word's logits that are in memory together."""
    in_fp32 = size == 4 or _upcasts(device)
    return 4 * CHUNK[device] if in_fp32 else 2 * CHUNK[device] + 4 * IN_FP32[device]


def _upcasts(device: str) -> bool:
    """Whether products of bfloat16 tensors are made in fp32."""
    return device == "cpu" and upcast.lacks_bfloat16()


def _pads(model: Any, pieces: Sequence[Piece]) -> bool:
    """Whether training pads its rows: what measure.losses finds of an adapter that is there."""
    return not (_vocabulary(model) and lean.packable(model)) or any(piece.role in VIRTUAL for piece in pieces)


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """A step, as step.Share cuts it: rounds, tokens of the largest and of all, passes of each; whether filled up.

    again: tokens of the shared prefix that a round's rows have with the first, whose keys a GPU lays again.
    """

    rounds: int
    tokens: float
    in_all: float
    again: float
    passes: int = 1
    full: bool = False


def _cut(config: TrainConfig, data: Lengths, room: int, alone: float, abreast: int, rows: float, row: float) -> _Cut:
    """A step on so many rows of so many tokens; up to `alone` of them it is one pass. Each has the shared prefix."""
    shared = data.shared_prefix
    own = rows * (row - shared)

    def of(passes: int) -> _Cut:
        rounds = max(1, config.accumulate, math.ceil(own / max(1, room - passes * shared)))
        rounds = rounds if passes > 1 else max(1, min(round(rows), rounds))
        tokens = passes * shared + own / rounds
        again = max(0.0, rows / rounds - passes) * shared
        return _Cut(rounds=rounds, tokens=tokens, in_all=rounds * tokens, again=again, passes=passes)

    one_by_one, beside = of(1), of(abreast)
    largest = shared + math.ceil(rows / (beside.rounds * abreast)) * (row - shared)
    worth = beside.rounds * abreast * largest <= MORE * one_by_one.rounds * one_by_one.tokens
    return beside if own + shared > alone and beside.rounds * abreast <= rows and worth else one_by_one


def _filled(config: TrainConfig, data: Lengths, room: int, width: int, rows: float, row: float) -> _Cut:
    """The same where passes are recorded."""
    shared, own = data.shared_prefix, max(1, round(row - data.shared_prefix))
    if config.accumulate > 1:
        even = _cut(config, data, room, math.inf, 1, rows, row)
        largest = shared + math.ceil(rows / even.rounds) * own
        usual, most = (recordings.full(math.ceil(tokens), width) for tokens in (even.tokens, largest))
        return replace(even, tokens=most, in_all=even.rounds * usual, full=True)
    passes = recordings.cut([own] * max(1, round(rows)), shared, room, width)
    taken = [recordings.full(shared + own * len(part), width) for part in passes]
    again = (max(map(len, passes)) - 1) * shared
    return _Cut(rounds=len(taken), tokens=max(taken), in_all=sum(taken), again=again, full=True)


def _long_step(config: TrainConfig, data: Lengths, rows: int) -> tuple[float, float]:
    """Rows of a long step, and tokens of each."""
    mean = data.total / rows
    together = min(config.batch_tokens / mean if config.batch_tokens else config.batch_size, rows)
    return together, mean if config.batch_tokens else _long(config, data, rows)


def _together(config: TrainConfig, data: Lengths, rows: int, step: _Cut, *, pads: bool) -> int:
    """Tokens in memory together in a long step."""
    if pads:
        most = min(config.max_length, data.max)  # the longest row is in some batch
        return math.ceil(_long_step(config, data, rows)[0] / step.rounds) * most
    long = _long(config, data, rows)
    apart = step.rounds > 1 and not step.full
    uneven = (long - data.shared_prefix) / 4 if apart else 0  # rows are whole, and dealt longest first
    return int(max(long, step.tokens + uneven))


def _long(config: TrainConfig, data: Lengths, rows: int) -> float:
    """Tokens of a row between the mean and the 95th percentile."""
    return min(config.max_length, (data.total / rows + data.p95) / 2)


def _kept_weights(model: Any, config: TrainConfig, data: Lengths, rows: int) -> float:
    """Bytes of attention weights that a block keeps per token: none, unless some are dropped in training."""
    text = model.config.get_text_config()
    drops = getattr(text, "attention_dropout", 0) or getattr(text, "attn_pdrop", 0)
    return DROPPED * text.num_attention_heads * _long(config, data, rows) if drops else 0.0


def _key_width(text: Any) -> int:
    """Elements of a token's keys in a layer."""
    heads = text.num_attention_heads
    return _query_width(text) // heads * (getattr(text, "num_key_value_heads", None) or heads)


def _query_width(text: Any) -> int:
    """Elements of a token's queries in a layer."""
    heads = text.num_attention_heads
    return heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)


def _kept_elements(model: Any, pieces: Sequence[Piece], *, pads: bool, in_blocks: bool) -> float:
    """Elements a block keeps for its backward per token; in_blocks: attention is computed so, without its output."""
    text = model.config.get_text_config()
    hidden, queries = text.hidden_size, _query_width(text)
    keys = queries if pads else _key_width(text)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    inside = [piece for piece in pieces if piece.layer >= 0]
    roles = {piece.role for piece in inside if piece.keeps_input}
    gated = any(target.role == "mlp.gate" for target in matrices(model))
    kept = 2 * hidden + queries + 2 * keys + (2 if gated else UNGATED) * inner
    kept += sum(piece.keeps for piece in inside) / text.num_hidden_layers
    trained = sum(piece.parameters for piece in inside)
    layers = {piece.layer for piece in inside}
    body = sum(tensor.numel() for tensor in blocks(model)[1].parameters()) * len(layers) / text.num_hidden_layers
    whole = trained > body / 2  # the weights themselves are trained
    kept += queries if whole or "attn.o" in roles or not in_blocks else 0
    kept += hidden if whole or roles & {"attn.q", "attn.k", "attn.v"} else 0
    kept += hidden if whole or roles & {"mlp.gate", "mlp.up"} else 0
    return kept + (inner if whole or "mlp.down" in roles else 0)


def _seconds(
    model: Any,
    trainable: int,
    passed: int,
    config: TrainConfig,
    data: Lengths,
    rows: int,
    cut: Callable[[float, float], _Cut],
    precision: str,
    device: str,
) -> float:
    text = model.config.get_text_config()
    head = _vocabulary(model) * text.hidden_size
    body = sum(tensor.numel() for tensor in blocks(model)[1].parameters())
    kept = max(1, round(rows * (1 - config.holdout)))
    mean = data.total / rows
    steps = config.total_steps(kept, int(kept * mean))
    together = config.batch_tokens / mean if config.batch_tokens else min(config.batch_size, kept)
    step = cut(together, mean)
    tokens = steps * step.in_all
    supervised = steps * together * data.supervised / rows
    measured = min(HELDOUT_TOKENS, config.holdout * data.total)
    measured -= max(0.0, measured / mean - 1) * data.shared_prefix
    rounds = min(config.evaluations, steps) + 1
    backward = body * passed / text.num_hidden_layers + min(trainable, body)
    operations = 2 * (body + backward) * tokens + 4 * head * supervised + 2 * body * measured * rounds
    answer = min(SAMPLE_TOKENS, SAMPLE_SPARE + data.supervised / rows)
    # a classifier writes nothing, and samples are held-out rows
    written = answer if head and config.samples and config.holdout else 0
    decoding = rounds * written * total_bytes(model, precision) / _READ_RATE[device]
    rate = EFFICIENCY * matrix_rate("float32" if precision == "float32" or _upcasts(device) else "bfloat16", device)
    return START_S + STEP_S * steps + operations / rate + decoding


def total_bytes(model: Any, precision: str) -> int:
    """Bytes of the weights in this precision; int8 and nf4 hold the blocks' matrices alone."""
    total = sum(tensor.numel() for tensor in model.parameters())
    if precision not in PACKED:
        return total * (4 if precision == "float32" else 2)
    packed = sum(tensor.numel() for tensor in blocks(model)[1].parameters() if tensor.dim() == 2)
    return int(2 * (total - packed) + PACKED[precision] * packed)


_READ_RATE = {"cpu": 4e9, "mps": 5e10, "cuda": 5e11}  # bytes of weights per second while decoding a token


@functools.cache
def matrix_rate(precision: str, device: str) -> float:
    """Floating-point operations per second of a matrix product here, measured once in about 0.1 s.

    On a CPU one thread is timed by its own processor time, so that a busy machine does not look like a slow one.
    """
    import torch

    threads = torch.get_num_threads()
    clock = time.thread_time if device == "cpu" else time.perf_counter
    a = torch.randn(256, 1024, dtype=getattr(torch, precision), device=device)
    b = torch.randn(1024, 1024, dtype=getattr(torch, precision), device=device)
    best = math.inf
    torch.set_num_threads(1)
    try:
        for _ in range(8):
            start = clock()
            (a @ b).sum().item()
            best = min(best, clock() - start)
    finally:
        torch.set_num_threads(threads)
    return (threads if device == "cpu" else 1) * 2 * 256 * 1024 * 1024 / best
