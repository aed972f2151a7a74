"""Which matrix of a model plays which role, and where q, k and v lie inside a fused matrix.

A role is attn.q, attn.k, attn.v, attn.o, mlp.gate, mlp.up or mlp.down. The table below names, per
architecture, the linear layers of one block; a fused layer has several roles, each with the output rows
that belong to it. An architecture that is not in the table still works: its linear layers carry their own
path inside the block as role. Nothing outside the list of blocks (embeddings, heads, poolers) is a target.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Rows = Callable[[Any, int], torch.Tensor]  # (config, out) -> row numbers of one role


def _part(index: int, parts: int) -> Rows:
    """Equal contiguous parts: [q | k | v] or [gate | up]."""
    return lambda config, out: torch.arange(out).view(parts, -1)[index]


def _grouped(index: int) -> Rows:
    """[q: heads · head_dim | k: kv_heads · head_dim | v: the same] (phi3)."""

    def rows(config: Any, out: int) -> torch.Tensor:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = out // (heads + 2 * kv_heads)
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        return torch.arange(out).split(sizes)[index]

    return rows


def _per_head(index: int) -> Rows:
    """Interleaved: every head holds its own q, k, v (gpt_neox)."""
    return lambda config, out: torch.arange(out).view(config.num_attention_heads, 3, -1)[:, index].flatten()


Block = dict[str, tuple[tuple[str, Rows | None], ...]]  # path inside the block -> its roles


def _whole(**paths: str) -> Block:
    """Layers that play one role each; keyword mlp_up stands for the role mlp.up."""
    return {path: ((role.replace("_", "."), None),) for role, path in paths.items()}


_LLAMA = _whole(
    attn_q="self_attn.q_proj",
    attn_k="self_attn.k_proj",
    attn_v="self_attn.v_proj",
    attn_o="self_attn.o_proj",
    mlp_gate="mlp.gate_proj",
    mlp_up="mlp.up_proj",
    mlp_down="mlp.down_proj",
)
_BERT = _whole(
    attn_q="attention.self.query",
    attn_k="attention.self.key",
    attn_v="attention.self.value",
    attn_o="attention.output.dense",
    mlp_up="intermediate.dense",
    mlp_down="output.dense",
)

BERT_FAMILY = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
ENCODERS = (*BERT_FAMILY, "deberta-v2", "distilbert")  # they have roles, but they do not write text

LAYOUTS: dict[str, Block] = {
    "gpt2": {
        "attn.c_attn": (("attn.q", _part(0, 3)), ("attn.k", _part(1, 3)), ("attn.v", _part(2, 3))),
        **_whole(attn_o="attn.c_proj", mlp_up="mlp.c_fc", mlp_down="mlp.c_proj"),
    },
    "gpt_neox": {
        "attention.query_key_value": (("attn.q", _per_head(0)), ("attn.k", _per_head(1)), ("attn.v", _per_head(2))),
        **_whole(attn_o="attention.dense", mlp_up="mlp.dense_h_to_4h", mlp_down="mlp.dense_4h_to_h"),
    },
    "phi3": {
        "self_attn.qkv_proj": (("attn.q", _grouped(0)), ("attn.k", _grouped(1)), ("attn.v", _grouped(2))),
        "mlp.gate_up_proj": (("mlp.gate", _part(0, 2)), ("mlp.up", _part(1, 2))),
        **_whole(attn_o="self_attn.o_proj", mlp_down="mlp.down_proj"),
    },
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "smollm3",
            "granite",
            "olmo2",
            "stablelm",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(BERT_FAMILY, _BERT),
    "deberta-v2": _whole(
        attn_q="attention.self.query_proj",
        attn_k="attention.self.key_proj",
        attn_v="attention.self.value_proj",
        attn_o="attention.output.dense",
        mlp_up="intermediate.dense",
        mlp_down="output.dense",
    ),
    "distilbert": _whole(
        attn_q="attention.q_lin",
        attn_k="attention.k_lin",
        attn_v="attention.v_lin",
        attn_o="attention.out_lin",
        mlp_up="ffn.lin1",
        mlp_down="ffn.lin2",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """One adaptable matrix: a whole linear layer, or the rows of one role inside a fused one."""

    name: str  # dotted name of the layer in the model
    role: str
    layer: int
    shape: tuple[int, int]  # (out, in) of the adapted rows
    rows: torch.Tensor | None = field(default=None, compare=False, repr=False)  # None: all rows

    def parameters(self, rank: int) -> int:
        """Trainable parameters of A and B: rank · (in + out)."""
        return rank * sum(self.shape)


def is_linear(module: nn.Module) -> bool:
    """Layers that an adapter can sit on: y = x Wᵀ + b, or transformers' Conv1D with W stored transposed."""
    return isinstance(module, (nn.Linear, Conv1D))


def dimensions(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    assert isinstance(module, nn.Linear), type(module)
    return module.out_features, module.in_features


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's transformer blocks: the outermost ModuleList with one entry per layer."""
    config: Any = model.config
    depth = config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise AssertionError(f"no list of {depth} blocks in {type(model).__name__}")


def matrices(model: nn.Module) -> list[Target]:
    """Every adaptable matrix of the model in forward order, fused layers split by role."""
    config = model.config.get_text_config()  # type: ignore[union-attr]
    table = LAYOUTS.get(config.model_type, {})
    prefix, layers = blocks(model)
    found = []
    for layer, block in enumerate(layers):
        for path, module in block.named_modules():
            if not is_linear(module):
                continue
            out, width = dimensions(module)
            for role, rows_of in table.get(path, ((path, None),)):
                rows = None if rows_of is None else rows_of(config, out)
                shape = (out if rows is None else len(rows), width)
                found.append(Target(name=f"{prefix}.{layer}.{path}", role=role, layer=layer, shape=shape, rows=rows))
    return found
