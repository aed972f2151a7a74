"""The lean way through a causal model: no padding, and logits only where a token is supervised.

A step's sequences are laid end to end in one row with their own position ids. Attention runs per sequence
through transformers' attention interface, so no sequence sees another and no quadratic mask is built. The
head is applied to supervised positions alone, a chunk at a time, and its gradient is made in the forward, so
the logits of a step are never in memory together. Both give the loss of the plain padded path; models and
methods that cannot be packed are padded, with the same head: `padded_losses`.

A model that chooses a label instead of writing text gets its rows padded on the right: `class_logits`.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_studio.core import attention, flash, functions, kernels, together, upcast
from lora_studio.core.layout import ENCODERS

IGNORED = -100  # label of a position that is not supervised
PASS = {"cpu": 2048, "mps": 4096, "cuda": 16_384}  # tokens in memory together at most
WIDE = 9 * 2**20  # tokens times width that keep a GPU's matrix products busy
PACKED, STEPWISE = "lora_studio_packed", "lora_studio_stepwise"
FEW = 32  # rows that a decoding step has at most, to be multiplied as columns
ATTENTIONS = frozenset(("full_attention", "sliding_attention", "chunked_attention"))  # kinds of a config's layers
BY_LENGTH = ("dynamic", "longrope")  # rotations that look at how long the text is
TURNS = "apply_rotary_pos_emb"  # what transformers' models call the turning of q and k by their positions
BLOCK = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")  # what such a block consists of
DEAF = ("nemotron",)  # their blocks take keyword arguments and do not hand them to the attention


@dataclass(frozen=True)
class Tokens:
    """One sequence: token ids and, position by position, whether the token is supervised; or a label of the whole."""

    ids: Sequence[int]
    supervised: Sequence[bool]
    label: int | None = None

    @property
    def count(self) -> int:
        """What the loss averages over: supervised tokens that have a token before them, or the one label."""
        return sum(self.supervised[1:]) if self.label is None else 1


@dataclass(frozen=True)
class KeyRows:
    """How keys are laid for sequences that begin with tokens of others: each sequence whole, one behind the other.

    order: the token in each row. ends (sequences + 1,): where the rows of each end. A token's rows are
    rows[starts[t] : starts[t + 1]]. Behind the last end both name rows and tokens of no consequence.
    """

    order: torch.Tensor
    ends: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, places: Sequence[attention.Place], *, most: int = 0) -> "KeyRows":
        """For sequences of these tokens, on the CPU; with `most` there are so many rows."""
        order = torch.tensor([token for place in places for span in place for token in range(span.start, span.stop)])
        sizes = [sum(span.stop - span.start for span in place) for place in places]
        counts = torch.bincount(order)
        spare = most - len(order) if most else 0
        assert spare >= 0, "the sequences have more rows"
        return cls(
            order=F.pad(order, (0, spare)),
            ends=torch.tensor((0, *itertools.accumulate(sizes)), dtype=torch.int32),
            starts=F.pad(counts.cumsum(0), (1, 0)),
            rows=F.pad(order.argsort(stable=True), (0, spare)),
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.order, self.ends, self.starts, self.rows


class Lengths(tuple[int, ...]):
    """Tokens of each of some sequences that lie end to end.

    A sequence may begin with tokens that lie with another: `ahead` says where, for each; the tuple counts what lies in
    its own place, `longest` all of it.

    On a GPU also `ends` (sequences + 1,): where they end, so that all layers share one tensor. With `ends` given they
    are where that says at the time, of at most `longest` tokens, and the tuple itself says no more than their sum; so
    do `keys` for what begins with tokens of others.
    """

    def __new__(
        cls,
        lengths: Sequence[int],
        *,
        ahead: Sequence[slice | None] = (),
        ends: torch.Tensor | None = None,
        keys: KeyRows | None = None,
        longest: int = 0,
    ) -> "Lengths":
        return super().__new__(cls, lengths)

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        ahead: Sequence[slice | None] = (),
        ends: torch.Tensor | None = None,
        keys: KeyRows | None = None,
        longest: int = 0,
    ) -> None:
        self._ahead = list(ahead) or [None] * len(lengths)
        self._ends, self._keys, self.known = ends, keys, ends is None
        self._arrangements: dict[float, attention.Arrangement] = {}
        self.longest = longest or max(lengths)

    def arrangement(self, device: torch.device, long: float = math.inf) -> attention.Arrangement:
        """How they are laid to be attended to, but for those of `long` tokens; made once for all layers."""
        if long not in self._arrangements:
            self._arrangements[long] = attention.Arrangement(self.places(), device, long)
        return self._arrangements[long]

    def places(self) -> list[attention.Place]:
        """The tokens that each sequence consists of."""
        own = [slice(end - length, end) for length, end in zip(self, itertools.accumulate(self), strict=True)]
        return [(one,) if ahead is None else (ahead, one) for ahead, one in zip(self._ahead, own, strict=True)]

    def ends(self, device: torch.device) -> torch.Tensor:
        if self._ends is None:
            self._ends = torch.tensor((0, *itertools.accumulate(self)), dtype=torch.int32, device=device)
        return self._ends

    @property
    def shared(self) -> int:
        """Most tokens that a sequence has with another."""
        return max((ahead.stop - ahead.start for ahead in self._ahead if ahead), default=0)

    @property
    def again(self) -> int:
        """Tokens that sequences have with others, counted for each of them."""
        return sum(ahead.stop - ahead.start for ahead in self._ahead if ahead)

    def followed_by(self, lengths: Sequence[int]) -> "Lengths":
        """These sequences, and behind them some that have nothing of others."""
        return Lengths((*self, *lengths), ahead=[*self._ahead, *[None] * len(lengths)], longest=self.longest)

    def keys(self, device: torch.device) -> KeyRows | None:
        """How keys are laid; None where they lie as they are, no sequence having any of another."""
        if self._keys is None and any(self._ahead):
            self._keys = KeyRows(*(one.to(device) for one in KeyRows.of(self.places()).tensors()))
        return self._keys


@dataclass(frozen=True)
class Packed:
    """Sequences end to end: ids, positions and next-token labels (1, T), the length of each, tokens of each group."""

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    lengths: Lengths
    spans: tuple[int, ...]


def pack(batch: Sequence[Tokens], device: torch.device | str = "cpu") -> Packed:
    """Lay sequences end to end; labels are shifted so that position t predicts token t + 1."""
    return pack_groups([batch], device)


def pack_groups(
    groups: Sequence[Sequence[Tokens]], device: torch.device | str = "cpu", *, share: bool = False
) -> Packed:
    """Lay groups of sequences end to end; with `share` the prefix that all of a group have lies there once.

    It lies with the first of them. The same weights make the same of it in every sequence, so it is computed once, and
    its gradient is the sum over them all.
    """
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    ahead: list[slice | None] = []
    ends = [0]
    for group in groups:
        shared = shared_prefix(group) if share else 0
        prefix = slice(len(ids), len(ids) + shared)
        for number, tokens in enumerate(group):
            start = shared if number else 0
            ids += tokens.ids[start:]
            positions += range(start, len(tokens.ids))
            labels += _labels(tokens)[start:]
            lengths.append(len(tokens.ids) - start)
            ahead.append(prefix if start else None)
        ends.append(len(ids))
    ids_t, positions_t, labels_t = (torch.tensor([row], device=device) for row in (ids, positions, labels))
    longest = max(len(tokens.ids) for group in groups for tokens in group)
    spans = tuple(after - before for before, after in itertools.pairwise(ends))
    return Packed(ids_t, positions_t, labels_t, Lengths(lengths, ahead=ahead, longest=longest), spans)


def shared_prefix(batch: Sequence[Tokens]) -> int:
    """Tokens that all of these sequences begin with, so far as none of them has to predict a supervised one."""
    if len(batch) == 1:
        return 0
    unsupervised = min(_first_supervised(tokens) for tokens in batch) - 1
    return max(0, min(len(common_prefix([tuple(tokens.ids) for tokens in batch])), unsupervised))


def can_share(model: nn.Module, device: str) -> bool:
    """Whether sequences may begin with tokens of others on this kind of device.

    A GPU takes a kernel and torch's attention for variable lengths for it, which knows no windows here.
    """
    config: Any = model.config
    text = config.get_text_config()
    windows = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    if device == "cuda":
        return not windows and kernels.usable(torch.empty(1, device=device)) and _takes("scale")
    return device == "cpu"


def laid(batch: Sequence[Tokens], *, share: bool) -> int:
    """Tokens that `pack_groups` lays for one group."""
    return sum(len(tokens.ids) for tokens in batch) - (len(batch) - 1) * (shared_prefix(batch) if share else 0)


def common_prefix(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of these begin with."""
    first, last = min(rows), max(rows)  # all others lie between them
    different = (place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
    return first[: next(different, len(first))]


def _first_supervised(tokens: Tokens) -> int:
    """Its place; behind the last token where there is none. The very first has nothing before it to be told from."""
    return next((place for place, kept in enumerate(tokens.supervised) if kept and place), len(tokens.ids))


def _labels(tokens: Tokens) -> list[int]:
    """Next-token labels of one sequence; the last position predicts nothing."""
    following = zip(tokens.ids[1:], tokens.supervised[1:], strict=True)
    return [token if kept else IGNORED for token, kept in following] + [IGNORED]


def room(model: nn.Module, device: str, *, recorded: bool, upcasts: bool) -> int:
    """Tokens of a pass in training: as many as keep the matrix products busy. More would only take memory.

    Half of them where weights rest in bfloat16 and `upcasts`, which is done for the memory's sake. A pass on a GPU that
    is not `recorded` waits for Python, however few its tokens are, so there are few passes.
    """
    config: Any = model.config
    most = PASS[device] // 2 if upcasts else PASS[device]
    return min(most, max(1024, WIDE // config.get_text_config().hidden_size)) if recorded else most


def packable(model: nn.Module) -> bool:
    """Whether the packed path computes what this model means: plain softmax attention that sdpa covers."""
    config: Any = model.config
    text = config.get_text_config()
    plain = text.model_type not in DEAF and not getattr(text, "attn_logit_softcapping", None)
    return _through_interface(model) and plain and not _mixes_tokens(model)


def _mixes_tokens(model: nn.Module) -> bool:
    """Whether something besides attention carries from one token to the next, past the end of a sequence."""
    config: Any = model.config
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return not ATTENTIONS.issuperset(kinds) or any(isinstance(module, nn.Conv1d) for module in model.modules())


def rotates_by_length(model: nn.Module) -> bool:
    """Whether its rotations of positions change with the longest text; transformers writes them into the model then."""
    config: Any = model.config
    text = config.get_text_config()
    rotations = str(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None))
    return any(kind in rotations for kind in BY_LENGTH)


def _through_interface(model: nn.Module) -> bool:
    """Whether its attention is what the interface says; falcon and stablelm have sdpa code of their own."""
    return bool(getattr(model, "_supports_sdpa", False) and getattr(model, "_supports_attention_backend", False))


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Inside, the model attends per packed sequence and expects `sequence_lengths` in its forward."""
    with _attending(model, PACKED):
        yield


@contextmanager
def stepwise_attention(model: nn.Module) -> Iterator[None]:
    """Inside, a model with fewer key heads than query heads answers faster on a CPU, token by token."""
    config: Any = model.config
    text = config.get_text_config()
    grouped = getattr(text, "num_key_value_heads", None) not in (None, getattr(text, "num_attention_heads", None))
    plain = text._attn_implementation == "sdpa" and _through_interface(model)
    with _attending(model, STEPWISE) if grouped and plain else nullcontext():
        yield


@contextmanager
def few_at_once(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers in fp32 on a CPU multiply the few vectors of a decoding step as columns, not as rows.

    torch's kernel for two to FEW rows takes up to twice as long for the same product; one row is quick as it is.
    """
    layers = model.modules() if next(model.parameters()).device.type == "cpu" else ()
    mine = [one for one in layers if type(one) is nn.Linear and one.weight.dtype == torch.float32]
    for layer in mine:
        layer.__class__ = _ByColumns
    try:
        yield
    finally:
        for layer in mine:
            layer.__class__ = nn.Linear


class _ByColumns(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1, input.shape[-1])
        if not 1 < len(rows) <= FEW:
            return super().forward(input)
        y = torch.mm(self.weight, rows.t()).t().contiguous()
        return (y if self.bias is None else y + self.bias).reshape(*input.shape[:-1], -1)


@contextmanager
def _attending(model: nn.Module, how: str) -> Iterator[None]:
    config: Any = model.config
    text = config.get_text_config()
    before = text._attn_implementation
    text._attn_implementation = how
    try:
        yield
    finally:
        text._attn_implementation = before


def recomputes(model: nn.Module) -> bool:
    """Whether `recomputing` can do anything for this model."""
    return any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())


@contextmanager
def recomputing(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Inside, each block keeps its input alone and computes its activations again in the backward."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False


@contextmanager
def frugal(model: nn.Module) -> Iterator[None]:
    """Inside, norms and gated feed-forwards keep less for their backward; what has no frugal form stays as it is.

    On a GPU, layers that read the same input compute together, and so do a block's sums and norms.
    """
    forms = _FORMS.get(model)
    if forms is None:
        forms = _FORMS[model] = {module: form for module in model.modules() if (form := _form(module))}
    mine = [module for module in forms if "forward" not in vars(module)]  # it may be inside itself
    for module in mine:
        module.forward = forms[module]
    try:
        with together.joined(model):
            yield
    finally:
        for module in mine:
            del module.forward  # the class's own is seen again


_FORMS: WeakKeyDictionary[nn.Module, dict[nn.Module, Callable]] = WeakKeyDictionary()


def _form(module: nn.Module) -> Callable | None:
    """A frugal forward for this module, if one gives what its own gives on a trial."""
    if "forward" in vars(module):
        return None  # somebody else's
    if alone := _turning(module) or _block(module):
        return alone
    for form in (*_norms(module), *_gates(module)):
        trial = _trial(next(module.parameters()))
        with torch.no_grad():
            if _near(form(trial), module(trial)):
                return form
    return None


def _trial(like: torch.Tensor) -> torch.Tensor:
    """(1, 3, width of a weight) in its dtype."""
    width = like.shape[-1]
    return torch.linspace(-2, 3, 3 * width, device=like.device).view(1, 3, width).to(like.dtype)


def _near(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether both are the same but for rounding."""
    near = 1e-5 if exact.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(found, exact, rtol=near, atol=near)


class _Norm:
    """A frugal RMS norm in place of a module's own; `make` says what its weight is multiplied as."""

    def __init__(self, module: nn.Module, eps: float, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._module, self._eps, self._make, self._own = module, eps, make, module.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self._module.weight
        if weight.requires_grad:  # trained whole: plain
            return self._own(x)
        return functions.RMSNorm.apply(x, self._make(weight), self._eps)  # type: ignore[return-value]

    def of_sum(self, x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x + y, and the norm of it."""
        weight: Any = self._module.weight
        if weight.requires_grad or self._is_watched:
            total = x if y is None else x + y
            return total, self._module(total)
        return functions.NormedSum.apply(x, y, self._make(weight), self._eps)  # type: ignore[return-value]

    @property
    def _is_watched(self) -> bool:
        """Whether somebody else stands at the module, with a hook or a forward."""
        module, forward = self._module, vars(self._module).get("forward", self)
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        return any(hooks) or not isinstance(forward, _Norm)


def _norms(module: nn.Module) -> Iterator[_Norm]:
    """Forms of an RMS norm: its weight as it is, as it is in fp32, or one more than it in fp32."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    only = [name for name, _ in module.named_parameters()] == ["weight"]
    weight: Any = getattr(module, "weight", None)
    if type(module).__name__.endswith("RMSNorm") and only and eps is not None and weight.dim() == 1:
        for make in (lambda w: w, lambda w: w.float(), lambda w: w.float() + 1):
            yield _Norm(module, eps, make)


def _block(module: nn.Module) -> Callable | None:
    """The forward of a block on a GPU whose halves are x + f(norm(x)): each sum is made with the norm behind it.

    None where a block is another.
    """
    block: Any = module
    own_too = any(True for one in (module.parameters, module.buffers) for _ in one(recurse=False))
    if {name for name, _ in module.named_children()} != set(BLOCK) or own_too or not _sums_with_norms(block.mlp):
        return None
    before, between = (_form(getattr(module, name)) for name in BLOCK[:2])
    own = module.forward
    if not (isinstance(before, _Norm) and isinstance(between, _Norm)):
        return None

    def form(hidden_states: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        if given:
            return own(hidden_states, *given, **named)
        x, normed = before.of_sum(hidden_states)
        attended, *_ = block.self_attn(hidden_states=normed, **named)
        x, normed = between.of_sum(x, attended)
        fed = block.mlp(normed)
        return x + (fed[0] if isinstance(fed, tuple) else fed)  # experts give what they thought of a token, too

    return form if _is_block(module, form) else None


def _sums_with_norms(module: nn.Module) -> bool:
    """Whether that saves anything; a CPU is not waiting for memory."""
    like = next(module.parameters(), None)
    return like is not None and like.dtype != torch.float64 and kernels.usable(like)


def _is_block(module: nn.Module, form: Callable) -> bool:
    """Whether the block's own forward is `form`, on a trial in training with something else for attention and mlp."""
    block: Any = module
    trial = _trial(block.input_layernorm.weight)
    outer, inner = module.training, [vars(one).get("forward") for one in (block.self_attn, block.mlp)]
    block.self_attn.forward = lambda hidden_states, **_: (hidden_states.sin(), None)
    block.mlp.forward = lambda x: x.cos()
    module.training = True
    try:
        with torch.no_grad():
            return _near(form(trial), type(module).forward(module, trial))
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError):  # it asks for more
        return False
    finally:
        module.training = outer
        for one, own in zip((block.self_attn, block.mlp), inner, strict=True):
            together.put_back(one, own)


def _gates(module: nn.Module) -> Iterator[Callable]:
    """Forms of down(act(gate(x)) · up(x)): two matrices, or both in one."""
    layer: Any = module
    act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    names = dict(module.named_children()).keys()
    if act is None or (isinstance(act, nn.Module) and any(True for _ in act.parameters())):
        return
    if names >= {"gate_proj", "up_proj", "down_proj"}:
        yield lambda x: layer.down_proj(functions.Gated.apply(layer.gate_proj(x), layer.up_proj(x), act))
    elif names >= {"gate_up_proj", "down_proj"}:
        yield lambda x: layer.down_proj(functions.Gated.apply(*layer.gate_up_proj(x).chunk(2, dim=-1), act))


def _turning(module: nn.Module) -> Callable | None:
    """The forward of an attention on a GPU, its own but for how it turns q and k by their positions: in one kernel.

    None where the model turns them otherwise, such as in pairs.
    """
    forward: Any = type(module).forward
    plain, like = getattr(forward, "__globals__", {}).get(TURNS), next(module.parameters(), None)
    if plain is None or TURNS not in forward.__code__.co_names or like is None or not kernels.usable(like):
        return None
    turned = partial(functions.turned, plain)
    if not _alike(turned, plain, like.device):
        return None
    mine = FunctionType(
        forward.__code__, forward.__globals__ | {TURNS: turned}, None, forward.__defaults__, forward.__closure__
    )
    mine.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(mine, module)


def _alike(turned: Callable, plain: Callable, device: torch.device) -> bool:
    """Whether both turn the same q and k by the same angles to the same."""
    q, k, angles = torch.linspace(-2, 3, 7 * 80, device=device).view(7, 5, 16).split((4, 2, 1))
    given = q[None], k[None], angles.cos(), angles.sin()
    try:
        with torch.no_grad():
            return all(torch.allclose(*pair, atol=1e-5) for pair in zip(turned(*given), plain(*given), strict=True))
    except (TypeError, ValueError, RuntimeError):  # it is not called so
        return False


def packed_losses(model: nn.Module, batch: Packed) -> torch.Tensor:
    """(supervised tokens,): the cross-entropy of each, in order; call inside `packed_attention`."""
    wanted = batch.labels[0] != IGNORED
    labels = batch.labels[0][wanted]
    call = {"input_ids": batch.ids, "position_ids": batch.positions, "use_cache": False}
    if not plain_head(model):  # scaled or capped logits: let the model make them, at these positions only
        kept = wanted.nonzero()[:, 0]
        logits = model(**call, logits_to_keep=kept, sequence_lengths=batch.lengths).logits
        return F.cross_entropy(logits[0].float(), labels, reduction="none")
    hidden = model.base_model(**call, sequence_lengths=batch.lengths)[0]  # type: ignore[operator]  # (1, T, d)
    head = model.get_output_embeddings()  # type: ignore[operator]
    return functions.CrossEntropy.apply(hidden[0][wanted], head.weight, labels)  # type: ignore[return-value]


def padded_losses(model: nn.Module, batch: Packed) -> torch.Tensor:
    """The same losses of the same sequences padded on the right, for models and methods that cannot be packed."""
    call = _padded(batch.ids[0].split(batch.lengths))
    call |= {"position_ids": _positions(call["input_ids"]), "use_cache": False}
    each = batch.labels[0].split(batch.lengths)
    labels = nn.utils.rnn.pad_sequence(list(each), batch_first=True, padding_value=IGNORED)
    wanted = labels != IGNORED  # (rows, longest)
    if not plain_head(model):
        return F.cross_entropy(model(**call).logits[wanted].float(), labels[wanted], reduction="none")
    head = model.get_output_embeddings()  # type: ignore[operator]
    with _open(head):  # what stands before the model, such as virtual tokens, is passed as always
        hidden = model(**call).logits  # (rows, longest, d)
    hidden = hidden[wanted].to(head.weight.dtype)
    return functions.CrossEntropy.apply(hidden, head.weight, labels[wanted])  # type: ignore[return-value]


@contextmanager
def _open(layer: Any) -> Iterator[None]:
    """Inside, the layer gives what it gets."""
    layer.forward = lambda x: x
    try:
        yield
    finally:
        del layer.forward


def class_logits(model: nn.Module, batch: Sequence[Tokens]) -> torch.Tensor:
    """What a sequence classification model makes of each row: (rows, classes)."""
    config: Any = model.config
    device = next(model.parameters()).device
    rows = [torch.tensor(tokens.ids, device=device) for tokens in batch]
    call = _padded(rows, config.get_text_config().pad_token_id or 0)
    if config.model_type not in ENCODERS:  # an encoder counts positions itself, some of them from its padding token
        call |= {"position_ids": _positions(call["input_ids"]), "use_cache": False}
    return model(**call).logits


def label_losses(logits: torch.Tensor, batch: Sequence[Tokens]) -> torch.Tensor:
    """(rows,): the cross-entropy of each row's label under `class_logits`."""
    labels = torch.tensor([tokens.label for tokens in batch], device=logits.device)
    return F.cross_entropy(logits.float(), labels, reduction="none")


def _padded(rows: Sequence[torch.Tensor], padding: int = 0) -> dict[str, Any]:
    """The model's inputs for rows of token ids, padded on the right: ids and mask (rows, longest)."""
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def _positions(ids: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, ... in every row; said explicitly, because a prefix in front of the rows shifts them."""
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def _alters(name: str) -> bool:
    """Whether a config calls a cap or a factor of its logits so; attention's scores are another matter."""
    return "logit" in name and ("cap" in name or "scal" in name) and not name.startswith("attn")


def plain_head(model: nn.Module) -> bool:
    """Whether the logits are just hidden @ headᵀ, nothing added, scaled, capped or hooked, and the head not trained."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    config: Any = model.config
    text = config.get_text_config()
    altered = any(value for name, value in vars(text).items() if _alters(name))
    if altered or not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    trained = head.weight.requires_grad and torch.is_grad_enabled()
    return not (trained or "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequence_lengths: Lengths,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed sequence; query (1, heads, T, head_dim) -> (1, T, heads, head_dim)."""
    assert query.shape[2] == sum(sequence_lengths), "the forward was called without its sequence lengths"
    plain = sliding_window is None or sequence_lengths.longest <= sliding_window
    plain = plain and not dropout and query.shape[-1] == value.shape[-1]
    if plain and query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and _takes("scale"):
        return _variable_length(query, key, value, sequence_lengths, scaling), None
    if not sequence_lengths.known:
        raise RuntimeError("its attention goes by the lengths of the sequences")
    if plain and query.device.type == "cpu":
        apart = sequence_lengths.arrangement(query.device, attention.long(query.shape[1] * query.shape[3]))
        return attention.CausalAttention.apply(query, key, value, apart, scaling), None  # type: ignore
    arrangement = sequence_lengths.arrangement(query.device)
    grouped = query.shape[1] != key.shape[1]  # fewer key and value heads than query heads
    outputs = []
    wide = [arrangement.lay(upcast.widened(tensor[0].transpose(0, 1))) for tensor in (query, key, value)]
    for q, k, v in zip(*map(arrangement.grouped, wide), strict=True):
        length = q.shape[2]
        window = None if sliding_window is None or length <= sliding_window else _window(length, sliding_window, q)
        attended = F.scaled_dot_product_attention(
            q, k, v, window, dropout, is_causal=window is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(attended)
    return arrangement.taken_up(outputs).to(query.dtype)[None], None


def _attend_stepwise(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' own, but one new token's queries that share a key head stand as rows under it.

    query (rows, heads, 1, head_dim) -> (rows, 1, heads, head_dim). torch's kernel takes a quarter of the time so, in
    bf16 on a CPU, for the same result.
    """
    rows, heads, length, _ = query.shape
    if length != 1 or attention_mask is not None or query.device.type != "cpu" or any(map(more.get, _BIASES)):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **more)
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[-1])
    attended = F.scaled_dot_product_attention(grouped, key, value, scale=scaling)
    return attended.reshape(rows, 1, heads, -1), None


_BIASES = ("softcap", "position_bias", "cache")  # what else an attention may be told


def _variable_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Lengths, scaling: float | None
) -> torch.Tensor:
    """Sequences end to end on a CUDA GPU, one call for all of them: our kernel for short ones, else torch's own."""
    from torch.nn.attention.varlen import varlen_attn

    # (T, heads, head_dim); squeezed, because the gradient of tensor[0] is a copy among zeros
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    ends, keys, most = lengths.ends(query.device), lengths.keys(query.device), lengths.longest
    if flash.takes(q, most):
        scale, laid = q.shape[-1] ** -0.5 if scaling is None else scaling, keys.tensors() if keys else ()
        return flash.Attention.apply(q, k, v, ends, most, scale, *laid)[None]  # type: ignore[index]
    key_ends = ends if keys is None else keys.ends
    if keys is not None:  # the last of these are the queries' own tokens, and it is to them that causality goes
        k, v = (functions.Laid.apply(tensor, keys.order, keys.starts, keys.rows) for tensor in (k, v))
    q, k, v = (tensor.contiguous() for tensor in (q, k, v))
    grouped: Any = {"enable_gqa": True} if _takes("enable_gqa") else {}  # older torch need not be told
    attended = varlen_attn(q, k, v, ends, key_ends, most, most, scale=scaling, window_size=(-1, 0), **grouped)  # type: ignore[arg-type]
    assert isinstance(attended, torch.Tensor)
    return attended[None]


@functools.cache
def _takes(option: str) -> bool:
    """Whether torch's attention for variable lengths has this option; 2.10 has neither scale nor window."""
    from torch.nn.attention.varlen import varlen_attn

    return option in inspect.signature(varlen_attn).parameters


def _window(length: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Causal mask (length, length) that reaches `window` tokens back, the token itself included."""
    distance = torch.arange(length, device=like.device)[:, None] - torch.arange(length, device=like.device)
    return (distance >= 0) & (distance < window)


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)
AttentionInterface.register(STEPWISE, _attend_stepwise)
AttentionMaskInterface.register(STEPWISE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
