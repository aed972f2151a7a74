"""The packed path computes the plain path's loss and gradients, and makes less on the way."""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from lora_studio.core import attention, functions, kernels, lean, upcast
from lora_studio.core.baselines import add
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import BaselineSpec, LoraSpec
from tests.tiny import CAUSAL, CLASSIFIERS, EXPERTS, PLAIN_TOO, causal, classifier, touched

# whose blocks are x + f(norm(x)), twice
SUMMED = {
    *("arcee", "ernie4_5", "gemma", "granite", "helium", "llama", "ministral", "mistral"),
    *("qwen2", "qwen3", "seed_oss", "smollm3"),
}
PLAIN_NORMS = {
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "opt",
    "phi",
    "nemotron",
    "starcoder2",
}  # families without an RMS norm or a gated feed-forward
PLAIN = {"gemma2", "stablelm"}  # one caps its attention scores, one has attention code of its own
LENGTHS = (9, 5, 9, 12)  # longer than mistral's window of 5 in tests/tiny.py


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def batch(seed: int = 0) -> lean.Packed:
    draws = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 97, (length,), generator=draws).tolist() for length in LENGTHS]
    return lean.pack([lean.Tokens(row, [place > 2 for place in range(len(row))]) for row in rows])


class Logits(TorchDispatchMode):
    """Inside, `rows` is the most rows of logits that were made at once."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dim() and made.shape[-1] == 97:
            self.rows = max(self.rows, made.numel() // 97)
        return made


def naive_losses(model: Any, rows: lean.Packed) -> torch.Tensor:
    """What both ways must give: rows padded on the right, all logits, torch's cross-entropy where it is supervised."""
    each = zip(rows.ids[0].split(rows.lengths), rows.labels[0].split(rows.lengths), strict=True)
    pairs = [(ids, labels) for ids, labels in each]
    ids, labels = (torch.nn.utils.rnn.pad_sequence(list(one), batch_first=True) for one in zip(*pairs, strict=True))
    seen = torch.arange(ids.shape[1]) < torch.tensor(rows.lengths)[:, None]
    logits = model(input_ids=ids, attention_mask=seen.long(), use_cache=False).logits.float()
    return F.cross_entropy(logits[seen], labels[seen], ignore_index=lean.IGNORED, reduction="none")[
        labels[seen] != lean.IGNORED
    ]


def with_adapter(family: str, dtype: torch.dtype = torch.float32) -> LoRA:
    lora = LoRA(causal(family).to(dtype))
    lora.add("x", LoraSpec(rank=3, targets=("all-linear",)))
    draws = torch.Generator().manual_seed(1)
    for tensor in lora.parameters("x"):
        tensor.data.normal_(0, 0.2, generator=draws)
    return lora


def test_the_architectures_that_pack_are_these() -> None:
    assert {family for family in CAUSAL if not lean.packable(causal(family))} == PLAIN


def test_what_carries_from_token_to_token_besides_attention_is_not_packed() -> None:
    """A convolution would reach from one row into the next."""
    config = transformers.Lfm2Config(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    model = transformers.Lfm2ForCausalLM(config).eval()
    assert not lean.packable(model)
    for tensor in model.parameters():
        tensor.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = lean.padded_losses(model, batch()).sum()
        model.config.layer_types = ["full_attention"] * 2
        assert not lean.packable(model)  # by its modules alone
        with lean.packed_attention(model):
            assert not torch.isclose(lean.packed_losses(model, batch()).sum(), together, rtol=1e-5)


@pytest.mark.parametrize("family", sorted({**CAUSAL, **PLAIN_TOO}))
def test_packed_and_padded_give_the_loss_and_the_gradients_of_the_plain_way(family: str) -> None:
    lora, results = with_adapter(family), []
    forwards = touched(lora.model.train())
    ways = [naive_losses, lean.padded_losses, *([lean.packed_losses] if lean.packable(lora.model) else [])]
    for way in ways:
        packed = way is lean.packed_losses
        with lora.use("x"), lean.packed_attention(lora.model) if packed else contextlib.nullcontext():
            loss = way(lora.model, batch()).sum()
            loss.backward()
        results.append((loss.detach(), [tensor.grad.clone() for tensor in lora.parameters("x")]))
        for tensor in lora.parameters("x"):
            tensor.grad = None
    (plain, gradients), *lean_ones = results
    for lean_loss, lean_gradients in lean_ones:
        torch.testing.assert_close(lean_loss, plain, rtol=1e-5, atol=0)
        for ours, theirs in zip(lean_gradients, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    assert touched(lora.model) == forwards


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_train_without_all_logits_and_with_the_same_gradients(kind: str) -> None:
    lora, found = LoRA(causal("llama")), []
    add(lora, "x", BaselineSpec(kind=kind, width=3))
    for way in (naive_losses, lean.padded_losses):
        with lora.use("x"), Logits() as logits:
            losses = way(lora.model, batch())
            losses.sum().backward()
        (states,) = lora.parameters("x")
        found.append((losses.detach(), states.grad.clone(), logits.rows))
        states.grad = None
    (plain, gradient, all_rows), (ours, our_gradient, rows) = found
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(our_gradient, gradient)
    assert all_rows == len(LENGTHS) * max(LENGTHS) > rows


def test_packed_sequences_do_not_see_each_other() -> None:
    model = causal("llama")
    alone = [lean.pack([tokens]) for tokens in _rows()]
    with torch.no_grad(), lean.packed_attention(model):
        together = lean.packed_losses(model, lean.pack(_rows())).sum()
        apart = sum(lean.packed_losses(model, one).sum() for one in alone)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)


def with_prefix(shared: int, supervised: int = 10) -> list[lean.Tokens]:
    """Rows of the usual lengths, and one of them alone longer, that begin with the same `shared` tokens."""
    draws = torch.Generator().manual_seed(3)
    prefix = torch.randint(2, 97, (shared,), generator=draws).tolist()
    rows = [[*prefix, 2 + number, *range(9, 9 + length)] for number, length in enumerate(LENGTHS)]
    return [lean.Tokens(row, [place >= supervised for place in range(len(row))]) for row in rows]


@pytest.mark.parametrize("long", [64, 18, 14])  # all rows short, the first of a group short, the first long
@pytest.mark.parametrize("family", sorted(set(CAUSAL) - PLAIN))
def test_a_shared_prefix_is_laid_once_and_changes_neither_loss_nor_gradients(
    family: str, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "long", lambda q: long)
    monkeypatch.setattr(attention, "BLOCK", 3)
    lora, groups, results = with_adapter(family), [with_prefix(7), with_prefix(4)[:3], with_prefix(3)[:1]], []
    rows = [tokens for group in groups for tokens in group]
    lora.model.train()
    laid = lean.pack_groups(groups, share=True)
    assert laid.ids.shape[1] == sum(laid.spans) == sum(len(one.ids) for one in rows) - 3 * 7 - 2 * 4
    for packed in (lean.pack(rows), laid):
        with lora.use("x"), lean.packed_attention(lora.model):
            losses = lean.packed_losses(lora.model, packed)
            (losses * torch.linspace(0.5, 1.5, len(losses))).sum().backward()
        results.append((losses.detach(), [tensor.grad.clone() for tensor in lora.parameters("x")]))
        for tensor in lora.parameters("x"):
            tensor.grad = None
    (plain, gradients), (ours, made) = results
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    for one, other in zip(made, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([([5, 6, 7, 8], 3), ([5, 6, 7, 9], 3)], 2),  # what predicts a supervised token stays each row's own
        ([([5, 6, 7, 8], 4), ([5, 6, 7, 8], 4)], 3),  # equal rows with nothing to learn: a token is left
        ([([5, 6, 7, 8], 0), ([5, 6, 7, 8], 0)], 0),  # documents, supervised throughout
        ([([5, 6, 7], 3), ([5], 1), ([5, 6, 8], 3)], 0),  # a row of one token
        ([([5, 6, 7, 8], 3)], 0),  # alone
        ([([4, 6, 7, 8], 3), ([5, 6, 7, 8], 3)], 0),
        ([([5, 6, 7, 8, 9], 4), ([5, 6, 3, 8, 9], 4), ([5, 6, 7, 8, 1], 4)], 2),
    ],
)
def test_the_shared_prefix_ends_before_anything_is_learnt(rows: list[tuple[list[int], int]], shared: int) -> None:
    batch = [lean.Tokens(ids, [place >= first for place in range(len(ids))]) for ids, first in rows]
    assert lean.shared_prefix(batch) == shared
    laid, plain = lean.pack_groups([batch], share=True), lean.pack(batch)
    wanted = [labels[labels != lean.IGNORED].tolist() for labels in (laid.labels, plain.labels)]
    assert wanted[0] == wanted[1]
    assert laid.lengths.longest == plain.lengths.longest == max(len(ids) for ids, _ in rows)


def _rows(lengths: Sequence[int] = LENGTHS) -> list[lean.Tokens]:
    return [lean.Tokens(list(range(2, 2 + length)), [True] * length) for length in lengths]


def test_the_attention_is_the_models_own_again_afterwards() -> None:
    model = causal("llama")
    before = model.config._attn_implementation
    with pytest.raises(KeyError), lean.packed_attention(model):
        raise KeyError
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("rows", [1, 2, 5, lean.FEW, lean.FEW + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_a_few_rows_as_columns_are_the_same_product(rows: int, bias: bool) -> None:
    layer = torch.nn.Linear(24, 40, bias=bias)
    coarse, x = torch.nn.Linear(24, 40, dtype=torch.bfloat16), torch.randn(rows, 1, 24)
    whole = torch.nn.ModuleList([layer, coarse])
    plain = layer(x)
    with lean.few_at_once(whole):
        assert type(layer) is not torch.nn.Linear and type(coarse) is torch.nn.Linear
        torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)
        assert layer(x).is_contiguous()
        with lean.few_at_once(whole):  # it may be inside itself
            pass
        assert type(layer) is not torch.nn.Linear
    assert type(layer) is torch.nn.Linear


@pytest.mark.parametrize("count", [1, 5, functions.CHUNK["cpu"] + 1])
def test_products_with_the_head_have_as_many_rows_as_sum_alike(count: int) -> None:
    """A loss must not go by how many positions share its pass, and a product of few rows is summed in another order."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.overloadpacket.__name__ != "sum", "of so many rows as there are"
            if func.overloadpacket.__name__ == "mm":
                sizes.update((len(args[0]), args[1].shape[1]))
            return func(*args, **(kwargs or {}))

    sizes: set[int] = set()
    hidden = torch.randn(count, 24, requires_grad=True)
    with Products():
        losses = functions.CrossEntropy.apply(hidden, torch.randn(97, 24), torch.zeros(count, dtype=torch.long))
    losses.sum().backward()  # type: ignore[union-attr]
    rows = sizes - {24, 97}
    assert rows and not any(one % functions.ROWS["cpu"] for one in rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunked_cross_entropy_is_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count = 2 * functions.CHUNK["cpu"] + 3  # a last chunk that is not full
    head, labels = torch.randn(97, 16, dtype=dtype), torch.randint(0, 97, (count,))
    hidden = torch.randn(count, 16, dtype=dtype, requires_grad=True)
    logits = (upcast.widened(hidden) @ upcast.widened(head).T).float()
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    weights = torch.rand(count)  # each position's loss may count differently from outside
    (wanted,) = torch.autograd.grad((plain * weights).sum(), hidden)
    ours = functions.CrossEntropy.apply(hidden, head, labels)
    (made,) = torch.autograd.grad((ours * weights).sum(), hidden)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    torch.testing.assert_close(
        made, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
    )


def test_few_rows_of_logits_in_bfloat16_are_in_fp32_together(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, made = [], functions._buffer
    monkeypatch.setattr(upcast, "needed", lambda _: False)
    monkeypatch.setattr(
        functions, "_buffer", lambda count, *more, **named: (rows.append(count), made(count, *more, **named))[1]
    )
    count = functions.CHUNK["cpu"] + 5
    hidden, head = torch.randn(count, 24).bfloat16().requires_grad_(), torch.randn(97, 24).bfloat16()
    labels, found = torch.randint(0, 97, (count,)), []
    for piece in (count, functions.IN_FP32["cpu"], 1):
        monkeypatch.setitem(functions.IN_FP32, "cpu", piece)
        losses: Any = functions.CrossEntropy.apply(hidden, head, labels)
        found.append((losses, *torch.autograd.grad(losses.sum(), hidden)))
    assert rows == [functions.CHUNK["cpu"], 16, 1]
    for losses, gradient in found[1:]:
        assert torch.equal(losses, found[0][0]) and torch.equal(gradient, found[0][1])


def test_no_logits_of_the_whole_batch_are_kept_for_the_backward() -> None:
    lora = with_adapter("llama")
    sizes: list[int] = []
    pack = lambda tensor: (sizes.append(tensor.numel()), tensor)[1]  # noqa: E731
    with saved_tensors_hooks(pack, same), lora.use("x"), lean.packed_attention(lora.model):
        lean.packed_losses(lora.model, batch()).sum()
    supervised = sum(length - 3 for length in LENGTHS)
    head = lora.model.get_output_embeddings().weight.numel()
    assert max(size for size in sizes if size != head) < supervised * 97


def test_nothing_is_saved_below_the_lowest_adapted_layer() -> None:
    def saved(layer: int) -> int:
        lora = LoRA(causal("llama"))
        lora.add("x", LoraSpec(rank=3, targets=("attn.q",), layers=(layer,)))
        total: list[int] = []
        pack = lambda tensor: (total.append(tensor.numel()), tensor)[1]  # noqa: E731
        with saved_tensors_hooks(pack, same), lora.use("x"), lean.packed_attention(lora.model):
            lean.packed_losses(lora.model, batch()).sum()
        return sum(total)

    assert saved(1) < 0.7 * saved(0)


@pytest.mark.parametrize("family", sorted({**CAUSAL, **PLAIN_TOO}))
def test_a_models_own_turning_is_replaced_where_a_kernel_gives_the_same_and_asked_nothing_else(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with torch's formula in place of the kernel: whatever signature a model's function has."""

    def formula(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    calls: list[int] = []
    count = lambda x, *angles: (calls.append(1), formula(x, *angles))[1]  # noqa: E731
    model, ids = causal(family), batch().ids
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        monkeypatch.setattr(kernels, "usable", lambda x: True)
        monkeypatch.setattr(kernels, "turned", count)
        for module in model.modules():
            if form := lean._turning(module):
                monkeypatch.setitem(vars(module), "forward", form)
        calls.clear()
        torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=1e-5, atol=1e-5)
    assert calls or family not in ("llama", "qwen2", "qwen3", "gemma", "mistral", "phi3", "olmo2")


@pytest.mark.parametrize(("width", "tokens"), [(64, 16_384), (4096, 2304), (16_384, 1024)])
def test_a_recorded_pass_on_a_gpu_is_smaller_for_a_wider_model(width: int, tokens: int) -> None:
    model = causal("llama")
    model.config.hidden_size = width
    assert lean.room(model, "cuda", recorded=True, upcasts=False) == tokens
    assert lean.room(model, "cuda", recorded=False, upcasts=False) == 16_384


def test_packing_pads_nothing_and_counts_what_is_predicted() -> None:
    packed = batch()
    assert packed.ids.shape == (1, sum(LENGTHS)) and packed.lengths == LENGTHS
    assert packed.positions[0].tolist() == [place for length in LENGTHS for place in range(length)]
    assert int((packed.labels != lean.IGNORED).sum()) == sum(length - 3 for length in LENGTHS)
    first = lean.Tokens([5, 6], [True, True])
    assert first.count == 1  # the first token has nothing before it that could predict it


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "phi3"])  # gpt2's and gemma's heads are their embeddings
def test_a_trained_head_gets_its_gradient_on_the_packed_path_too(family: str) -> None:
    model = causal(family).train()
    found = []
    for packed in (False, True):
        model.zero_grad()
        if packed:
            with lean.packed_attention(model):
                loss = lean.packed_losses(model, batch()).sum()
        else:
            loss = naive_losses(model, batch()).sum()
        loss.backward()
        gradients = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}
        found.append((loss.detach(), gradients))
    (plain, theirs), (packed_loss, ours) = found
    torch.testing.assert_close(packed_loss, plain, rtol=1e-5, atol=0)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    assert model.get_output_embeddings().weight.grad.abs().min() > 0  # every row, seen as a token or not
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4 * float(theirs[name].abs().max()))


def test_a_head_with_a_hook_is_not_walked_around() -> None:
    model = causal("llama").requires_grad_(False)
    head = model.get_output_embeddings()
    for hook in (
        lambda: head.register_forward_hook(lambda *call: call[2] * 2),
        lambda: head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,)),
    ):
        handle = hook()
        with lean.packed_attention(model):
            packed = lean.packed_losses(model, batch()).sum()
        for way in (naive_losses, lean.padded_losses):
            torch.testing.assert_close(packed, way(model, batch()).sum(), rtol=1e-5, atol=0)
        handle.remove()


@pytest.mark.parametrize(
    ("name", "plain"),
    [(name, False) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_scale")]
    + [("attn_logit_softcapping", True), ("logits_to_keep", True)],
)
def test_a_head_whose_logits_are_capped_or_scaled_is_left_to_the_model(name: str, plain: bool) -> None:
    model = causal("llama").requires_grad_(False)
    setattr(model.config, name, 30.0)
    assert lean.plain_head(model) == plain


LABELLED = [lean.Tokens(list(range(3, 3 + length)), (), label) for length, label in ((9, 0), (4, 2), (7, 1), (4, 2))]


def reading(family: str) -> torch.nn.Module:
    """A classifier whose answer depends on what it reads; as drawn, tiny ones hardly look at it."""
    model = classifier(family).double()  # its padding token is 1
    for tensor in model.parameters():
        tensor.data *= 10 if tensor.dim() > 1 else 1
    return model


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_loss_of_labels_is_transformers_own(family: str) -> None:
    model = reading(family)
    theirs = 0.0
    with torch.no_grad():
        ours = lean.label_losses(lean.class_logits(model, LABELLED), LABELLED).sum()
        for tokens in LABELLED:  # one by one, so that nothing is padded
            ids, label = torch.tensor([tokens.ids]), torch.tensor([tokens.label])
            theirs += float(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=label).loss)
    assert float(ours) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_padding_changes_no_row(family: str) -> None:
    model = reading(family)
    with torch.no_grad():
        together = lean.class_logits(model, LABELLED)
        alone = torch.cat([lean.class_logits(model, [tokens]) for tokens in LABELLED])
        longer = lean.class_logits(model, [*LABELLED, lean.Tokens(list(range(3, 33)), (), 0)])[:-1]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(longer, alone, rtol=1e-5, atol=0)
    assert (together[0] - together[2]).abs().max() > 1e-2  # and rows do differ


# ---- what is kept for the backward -----------------------------------------------------------------------------------


def kept_bytes(lora: LoRA, rows: list[lean.Tokens], *, frugal: bool) -> int:
    """Bytes of the different tensors that a packed forward keeps for its backward, parameters aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in lora.model.parameters()}
    own |= {tensor.untyped_storage().data_ptr() for tensor in lora.parameters("x")}
    seen: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    packed = lean.pack(rows)
    way = lean.frugal(lora.model) if frugal else contextlib.nullcontext()
    with lora.use("x"), way, lean.packed_attention(lora.model), saved_tensors_hooks(keep, same):
        lean.packed_losses(lora.model.train(), packed).sum().backward()
    return sum(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [("attn.q", "attn.v"), ("all-linear",)])
@pytest.mark.parametrize(("block", "by_kernel"), [(64, 64), (22, 40), (16, 0)])
def test_a_token_keeps_what_the_formula_says(
    dtype: torch.dtype, targets: tuple[str, ...], block: int, by_kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """by_kernel: of 64 tokens, those in sequences shorter than a block, whose attention is torch's."""
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "ENOUGH", 0)
    h, kv, inner, layers, r = 256, 128, 512, 3, 4
    sizes = {"hidden_size": h, "intermediate_size": inner, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **sizes)
    lora = LoRA(transformers.LlamaForCausalLM(config).to(dtype))
    lora.add("x", LoraSpec(rank=r, targets=targets))
    spans = (range(2, 22), range(3, 27), range(4, 24))  # two are of one length, and laid together
    rows = [lean.Tokens(list(span), [True] * len(span)) for span in spans]
    found = kept_bytes(lora, rows, frugal=True) / 64
    # x twice, norm(x) for q and v, q, k, v, gate, up, attention's output if torch's kernel made it; with every matrix
    # adapted that in any case, norm(x) of the feed-forward and what goes into its last matrix
    everywhere = targets == ("all-linear",)
    elements = layers * (4 * h + 2 * kv + 2 * inner + (h + inner if everywhere else 0))
    again = block == 22 and everywhere  # laid, beside what the last matrix of attention keeps
    elements += layers * h * (1 if everywhere else by_kernel / 64) + (layers * h * by_kernel / 64 if again else 0)
    elements += h + 2 * (h // 4)  # once: the gradient that the head has made, and the positions' sines and cosines
    assert found == pytest.approx(dtype.itemsize * elements, rel=0.01)
    assert found < 0.9 * kept_bytes(lora, rows, frugal=False) / 64


def test_what_lies_below_the_lowest_adapted_layer_keeps_nothing() -> None:
    kept = []
    for layers in ((), (2, 3), (3,)):
        lora = LoRA(causal("llama", num_hidden_layers=4, hidden_size=128, intermediate_size=256))
        lora.add("x", LoraSpec(rank=2, layers=layers))
        kept.append(kept_bytes(lora, _rows(), frugal=True))
    head = kept[2] - (kept[1] - kept[2])
    assert kept[1] - head == pytest.approx((kept[0] - head) / 2, rel=0.03)


def test_no_token_of_padding_is_computed() -> None:
    lora, seen = with_adapter("llama"), []
    lora.model.model.layers[0].mlp.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[:-1]))
    with lora.use("x"), lean.packed_attention(lora.model):
        lean.packed_losses(lora.model, batch())
    assert seen == [(1, sum(LENGTHS))]


# ---- frugal functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted({**CAUSAL, **PLAIN_TOO}))
def test_the_frugal_way_gives_the_same_losses_and_gradients(family: str, dtype: torch.dtype) -> None:
    lora, results = with_adapter(family, dtype), []
    forwards = touched(lora.model.train())
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for way in (contextlib.nullcontext(), lean.frugal(lora.model)):
        with lora.use("x"), way:
            losses = lean.padded_losses(lora.model, batch())
            losses.mean().backward()
        results.append((losses.detach(), torch.cat([tensor.grad.flatten() for tensor in lora.parameters("x")])))
        for tensor in lora.parameters("x"):
            tensor.grad = None
    (plain, gradient), (frugal, frugal_gradient) = results
    torch.testing.assert_close(frugal, plain, **near)
    difference = (frugal_gradient - gradient).norm() / gradient.norm()
    assert difference < (1e-4 if dtype == torch.float32 else 5e-2)
    assert touched(lora.model) == forwards


def test_the_families_whose_norms_and_gates_are_frugal_are_these() -> None:
    plain = set()
    for family in {**CAUSAL, **PLAIN_TOO}:
        model = causal(family)
        with lean.frugal(model):
            frugal = {type(module).__name__ for module in touched(model)}
        plain |= {family} if not frugal else set()
        norms = {type(module).__name__ for module in model.modules() if type(module).__name__.endswith("RMSNorm")}
        assert norms <= frugal, family
    assert plain == PLAIN_NORMS


def test_a_norm_that_only_looks_like_one_stays_as_it_is() -> None:
    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    model = torch.nn.Sequential(OddRMSNorm()).requires_grad_(False)
    with lean.frugal(model):
        assert "forward" not in vars(model[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted({**CAUSAL, **PLAIN_TOO}))
def test_blocks_whose_sums_are_made_with_the_norms_give_the_same(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU has them; here a CPU is told to."""
    found, calls, own = [], [], functions.NormedSum.apply
    monkeypatch.setattr(functions.NormedSum, "apply", lambda *given: (calls.append(given[1]), own(*given))[1])
    for sums in (False, True):
        monkeypatch.setattr(lean, "_sums_with_norms", lambda module, sums=sums: sums)
        lora = with_adapter(family, dtype)
        forwards = touched(lora.model.train())
        with lora.use("x"), lean.frugal(lora.model):
            calls.clear()  # of trials
            losses = lean.padded_losses(lora.model, batch())
            losses.mean().backward()
        assert touched(lora.model) == forwards and (not calls or sums)
        found.append((losses.detach(), torch.cat([tensor.grad.flatten() for tensor in lora.parameters("x")])))
    blocks = lora.model.config.num_hidden_layers
    assert len(calls) == (2 * blocks if family in SUMMED else 0)
    assert [one is None for one in calls] == [True, False] * (len(calls) // 2)
    near = 1e-5 if dtype == torch.float32 else 3e-2
    for mine, theirs in zip(*found, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < near


def test_a_block_that_only_looks_like_one_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "_sums_with_norms", lambda module: True)
    model = causal("llama")
    plain = type(model.model.layers[0])

    class Twice(plain):
        def forward(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
            return 2 * super().forward(hidden_states, **named)

    class Dropped(plain):
        def forward(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(hidden_states, **named), 0.5, self.training)

    class Wants(plain):
        def forward(self, hidden_states: torch.Tensor, more: object, **named: Any) -> torch.Tensor:
            return super().forward(hidden_states, **named)

    class Weighs(plain):
        """At first the factor is 1."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.factor = torch.nn.Parameter(torch.ones(1))

        def forward(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
            return self.factor * super().forward(hidden_states, **named)

    model.model.layers[0] = Weighs(model.config, 0).eval()
    with lean.frugal(model):
        assert "forward" not in vars(model.model.layers[0]) and "forward" in vars(model.model.layers[1])
    model.model.layers[0] = plain(model.config, 0).eval()
    for kind in (Twice, Dropped, Wants):
        model.model.layers[0].__class__ = kind
        lean._FORMS.pop(model, None)
        with lean.frugal(model):
            assert "forward" not in vars(model.model.layers[0]) and "forward" in vars(model.model.layers[1])
        assert not model.model.layers[0].training


def test_what_hooks_a_norm_of_a_block_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "_sums_with_norms", lambda module: True)
    model, seen = causal("llama").requires_grad_(False), []
    with torch.no_grad(), lean.frugal(model):
        plain = lean.padded_losses(model, batch())
        norm = model.model.layers[1].post_attention_layernorm
        norm.register_forward_hook(lambda *_: seen.append(1))
        assert torch.allclose(lean.padded_losses(model, batch()), plain) and seen
        norm.forward = lambda x: (seen.append(2), type(norm).forward(norm, x))[1]
        assert torch.allclose(lean.padded_losses(model, batch()), plain) and 2 in seen


@pytest.mark.parametrize("family", EXPERTS)
def test_blocks_with_experts_make_their_sums_with_the_norms_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "_sums_with_norms", lambda module: True)
    model = causal(family).requires_grad_(False)
    with torch.no_grad():
        plain = lean.padded_losses(model, batch())
        with lean.frugal(model):
            torch.testing.assert_close(lean.padded_losses(model, batch()), plain, rtol=1e-5, atol=1e-6)


def test_gradients_that_meet_in_a_sum_are_added_on_the_way() -> None:
    draws = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 8, generator=draws, dtype=torch.double).requires_grad_() for _ in "xy")
    weight = torch.randn(8, generator=draws, dtype=torch.double)
    total, normed = functions.NormedSum.apply(x.float(), y.float(), weight.float(), 1e-5)  # type: ignore[misc]
    exact = x + y, (x + y) * torch.rsqrt((x + y).square().mean(-1, keepdim=True) + 1e-5) * weight
    outer = [torch.randn(2, 3, 8, generator=draws, dtype=torch.double) for _ in "xy"]
    torch.testing.assert_close((total.double(), normed.double()), exact, rtol=1e-5, atol=1e-5)
    mine, theirs = (torch.autograd.grad(pair, (x, y), outer) for pair in ((total.double(), normed.double()), exact))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    alone, _ = functions.NormedSum.apply(x.float(), None, weight.float(), 1e-5)  # type: ignore[misc]
    assert torch.equal(alone, x.float())


def test_a_norm_that_is_trained_gets_its_gradient() -> None:
    model = causal("llama")
    with lean.frugal(model):
        lean.padded_losses(model, batch()).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in model.parameters())


@pytest.mark.parametrize("lengths", [(7,), (5, 3, 5, 5), (2, 4)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("shared", [0, 2])  # tokens that every sequence begins with, and that lie with the first
@pytest.mark.parametrize("long", [100, 4])  # from how many tokens on a sequence is computed in blocks
def test_attention_by_sequence_is_attention_with_a_block_mask(
    lengths: tuple[int, ...], heads: tuple[int, int], shared: int, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", 3)
    torch.manual_seed(0)
    ahead = [None, *[slice(0, shared) if shared else None] * (len(lengths) - 1)]
    total = sum(lengths)
    q, k, v = (torch.randn(1, number, total, 8, requires_grad=True) for number in (heads[0], heads[1], heads[1]))
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = (number[:, None] == number) | (torch.arange(total) < shared)
    mask = seen & torch.ones(total, total, dtype=torch.bool).tril()
    plain = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    ours = attention.CausalAttention.apply(q, k, v, lean.Lengths(lengths, ahead=ahead).arrangement(q.device, long), 0.3)
    outer = torch.randn_like(plain)
    torch.testing.assert_close(ours, plain)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (q, k, v), outer), torch.autograd.grad(plain, (q, k, v), outer), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_attention_of_a_long_sequence_in_bfloat16_is_that_in_fp32_rounded() -> None:
    torch.manual_seed(0)
    exact = [torch.randn(1, number, 200, 16).bfloat16().float().requires_grad_() for number in (4, 2, 2)]
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    places, outer = (
        lean.Lengths((200,)).arrangement(torch.device("cpu"), 64),
        torch.randn(1, 200, 4, 16).bfloat16(),
    )
    found = []
    for tensors in (exact, narrow):
        output = attention.CausalAttention.apply(*tensors, places, None)
        assert output.dtype == tensors[0].dtype
        found.append((output, *torch.autograd.grad(output, tensors, outer.to(output.dtype))))
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() < 0.01 * mine.norm()


@pytest.mark.parametrize("long", [100, 4])
def test_gradients_of_a_group_are_the_same_bits_whatever_lies_before_it(long: int) -> None:
    """In `together` the lengths come in another order, and a prefix adds up what its copies have."""
    torch.manual_seed(0)
    before, mine = (6, 7), (9, 5, 4, 5, 7)
    start = sum(before)
    ahead = [slice(start, start + 2) if number else None for number in range(len(mine))]
    alone = [None, *[slice(0, 2)] * (len(mine) - 1)]
    tensors = [torch.randn(1, heads, start + sum(mine), 8) for heads in (4, 2, 2)]
    outer, found = torch.randn(1, start + sum(mine), 4, 8), []
    for first, lengths in (
        (0, lean.Lengths((*before, *mine), ahead=[None, None, *ahead])),
        (start, lean.Lengths(mine, ahead=alone)),
    ):
        leaves = [tensor[:, :, first:].clone().requires_grad_() for tensor in tensors]
        ours = attention.CausalAttention.apply(*leaves, lengths.arrangement(torch.device("cpu"), long), None)
        found.append([one[:, :, -sum(mine) :] for one in torch.autograd.grad(ours, leaves, outer[:, first:])])
    for together, by_itself in zip(*found, strict=True):
        assert torch.equal(together, by_itself)


def test_heads_of_another_size_for_values_take_the_plain_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 8, size, requires_grad=True) for size in (6, 6, 10))
    ours, _ = lean._attend(torch.nn.Identity(), q, k, v, None, sequence_lengths=lean.Lengths((8,)))
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(ours, plain)
    ours.sum().backward()
    assert v.grad is not None


def test_attention_that_goes_by_the_lengths_says_that_it_cannot_be_recorded() -> None:
    q = torch.randn(1, 4, 8, 8)
    lengths = lean.Lengths((8,), ends=torch.tensor([0, 3, 8]), longest=8)
    with pytest.raises(RuntimeError, match="lengths"):
        lean._attend(torch.nn.Identity(), q, q, q, None, sequence_lengths=lengths, dropout=0.1)
