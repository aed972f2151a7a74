"""Which matrix of a model plays which role, and where q, k and v lie inside a fused matrix.

A role is attn.q, attn.k, attn.v, attn.o, mlp.gate, mlp.up, mlp.down, or embed for the input embedding. The table
LAYOUTS names, per architecture, the linear layers of one block; a fused layer has several roles, each with the
output rows that belong to it. An architecture that is not in the table still works: its linear layers carry their
own path inside the block as role.

Outside the list of blocks only the input embedding is a target, never a head, pooler or projection. Nor are experts
and their routers: an expert is a slice of a three-dimensional tensor, which no linear layer's forward passes through.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_studio.errors import StudioError, quote

# ---- rows of a fused layer ---------------------------------------------------------------------------------------

Rows = Callable[[Any, int], torch.Tensor]  # (config, out) -> row numbers of one role


def _numbers(out: int) -> torch.Tensor:
    return torch.arange(out, device="cpu")  # real numbers, even where a model is built on the meta device


def _part(index: int, parts: int = 3) -> Rows:
    """Equal contiguous parts: [q | k | v], and [gate | up] with two."""
    return lambda config, out: _numbers(out).view(parts, -1)[index]  # (parts, rows)


def _unequal(index: int) -> Rows:
    """[q: heads · head_dim | k: kv_heads · head_dim | v: the same] (phi3)."""

    def rows(config: Any, out: int) -> torch.Tensor:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = out // (heads + 2 * kv_heads)
        return _numbers(out).split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])[index]

    return rows


def _interleaved(index: int) -> Rows:
    """Group after group of [the queries that share a key and a value | that key | that value].

    With its own key and value for each head a group is q, k, v (bloom, gpt_neox); multi-query is one single group.
    """

    def rows(config: Any, out: int) -> torch.Tensor:
        heads = groups = config.num_attention_heads
        if getattr(config, "new_decoder_architecture", False):  # falcon-40b and later; it overrules multi_query
            groups = config.num_kv_heads
        elif getattr(config, "multi_query", False):  # falcon-7b, gpt_bigcode
            groups = 1
        grouped = _numbers(out).view(groups, heads // groups + 2, -1)  # (groups, queries + 2, head_dim)
        return (grouped[:, :-2], grouped[:, -2], grouped[:, -1])[index].flatten()

    return rows


def _sharded(index: int) -> Rows:
    """Four shards of [q | v | k], in this order (codegen)."""
    return lambda config, out: _numbers(out).view(4, 3, -1)[:, (0, 2, 1)[index]].flatten()  # (shards, 3, rows)


# ---- the table ---------------------------------------------------------------------------------------------------

Block = dict[str, tuple[tuple[str, Rows | None], ...]]  # path inside the block -> its roles, in forward order


def _whole(**paths: str) -> Block:
    """Layers that play one role each; keyword mlp_up stands for the role mlp.up."""
    return {path: ((role.replace("_", "."), None),) for role, path in paths.items()}


def _qkv(path: str, rows: Callable[[int], Rows]) -> Block:
    """A layer that makes q, k and v at once."""
    return {path: tuple((f"attn.{role}", rows(index)) for index, role in enumerate("qkv"))}


def _gate_up(path: str) -> Block:
    """A layer that makes [gate | up] at once; the gate is the half that the activation function is applied to."""
    return {path: (("mlp.gate", _part(0, 2)), ("mlp.up", _part(1, 2)))}


def _separate(path: str, names: str = "q_proj k_proj v_proj o_proj") -> Block:
    """The layers that make q, k, v and o, in this order, under one path."""
    return _whole(**{f"attn_{role}": f"{path}.{name}" for role, name in zip("qkvo", names.split(), strict=False)})


_LLAMA = {
    **_separate("self_attn"),
    **_whole(mlp_gate="mlp.gate_proj", mlp_up="mlp.up_proj", mlp_down="mlp.down_proj"),
}
_GLM = {**_separate("self_attn"), **_gate_up("mlp.gate_up_proj"), **_whole(mlp_down="mlp.down_proj")}
_GPT2_OTHERS = _whole(attn_o="attn.c_proj", mlp_up="mlp.c_fc", mlp_down="mlp.c_proj")
_BLOOM_MLP = _whole(mlp_up="mlp.dense_h_to_4h", mlp_down="mlp.dense_4h_to_h")
_BLOOM = {
    **_qkv("self_attention.query_key_value", _interleaved),
    **_whole(attn_o="self_attention.dense"),
    **_BLOOM_MLP,
}
_BERT_OTHERS = _whole(attn_o="attention.output.dense", mlp_up="intermediate.dense", mlp_down="output.dense")
_BERT = {**_separate("attention.self", "query key value"), **_BERT_OTHERS}
_MODERNBERT_MLP = {**_gate_up("mlp.Wi"), **_whole(mlp_down="mlp.Wo")}

BERT_FAMILY = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
ENCODERS = (*BERT_FAMILY, "deberta", "deberta-v2", "distilbert", "modernbert")  # they do not write text
LLAMA_FAMILY = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite"),
    *("olmo", "olmo2", "olmo3", "cohere", "cohere2", "exaone4", "helium", "seed_oss", "ernie4_5", "stablelm"),
    *("arcee", "nemotron"),  # these two have no gate
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"),  # attention, and such blocks as are dense
)

LAYOUTS: dict[str, Block] = {
    **dict.fromkeys(LLAMA_FAMILY, _LLAMA),
    **dict.fromkeys(("glm", "glm4"), _GLM),
    "phi3": {
        **_qkv("self_attn.qkv_proj", _unequal),
        **_whole(attn_o="self_attn.o_proj"),
        **_gate_up("mlp.gate_up_proj"),
        **_whole(mlp_down="mlp.down_proj"),
    },
    "phi": {**_separate("self_attn", "q_proj k_proj v_proj dense"), **_whole(mlp_up="mlp.fc1", mlp_down="mlp.fc2")},
    "opt": {**_separate("self_attn", "q_proj k_proj v_proj out_proj"), **_whole(mlp_up="fc1", mlp_down="fc2")},
    "starcoder2": {**_separate("self_attn"), **_whole(mlp_up="mlp.c_fc", mlp_down="mlp.c_proj")},
    "gpt2": {**_qkv("attn.c_attn", _part), **_GPT2_OTHERS},
    "gpt_bigcode": {**_qkv("attn.c_attn", _interleaved), **_GPT2_OTHERS},
    "gpt_neo": {
        **_separate("attn.attention", "q_proj k_proj v_proj out_proj"),
        **_whole(mlp_up="mlp.c_fc", mlp_down="mlp.c_proj"),
    },
    "gptj": {
        **_separate("attn", "q_proj k_proj v_proj out_proj"),
        **_whole(mlp_up="mlp.fc_in", mlp_down="mlp.fc_out"),
    },
    "codegen": {
        **_qkv("attn.qkv_proj", _sharded),
        **_whole(attn_o="attn.out_proj", mlp_up="mlp.fc_in", mlp_down="mlp.fc_out"),
    },
    "gpt_neox": {
        **_qkv("attention.query_key_value", _interleaved),
        **_whole(attn_o="attention.dense"),
        **_BLOOM_MLP,
    },
    **dict.fromkeys(("bloom", "falcon"), _BLOOM),
    "mpt": {
        **_qkv("attn.Wqkv", _part),
        **_whole(attn_o="attn.out_proj", mlp_up="ffn.up_proj", mlp_down="ffn.down_proj"),
    },
    **dict.fromkeys(BERT_FAMILY, _BERT),
    "deberta": {**_qkv("attention.self.in_proj", _interleaved), **_BERT_OTHERS},
    "deberta-v2": {**_separate("attention.self", "query_proj key_proj value_proj"), **_BERT_OTHERS},
    "distilbert": {
        **_separate("attention", "q_lin k_lin v_lin out_lin"),
        **_whole(mlp_up="ffn.lin1", mlp_down="ffn.lin2"),
    },
    "modernbert": {**_qkv("attn.Wqkv", _part), **_whole(attn_o="attn.Wo"), **_MODERNBERT_MLP},
    "modernbert-decoder": {**_separate("attn", "q_proj k_proj v_proj Wo"), **_MODERNBERT_MLP},
}


# ---- one matrix --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Target:
    """One adaptable matrix: a whole layer, or the rows of one role inside a fused one."""

    name: str  # dotted name of the layer in the model
    role: str
    layer: int  # number of the block; -1 for the embedding, which comes before them
    shape: tuple[int, int]  # (out, in) of the adapted rows
    rows: torch.Tensor | None = field(default=None, compare=False, repr=False)  # None: all rows

    def answers_to(self, wanted: str) -> bool:
        """Whether `wanted` means this matrix: its role, its dotted name, the end of that name, or all-linear."""
        if wanted == "all-linear":
            return self.role != "embed"
        return wanted in (self.role, self.name) or self.name.endswith(f".{wanted}")

    def parameters(self, rank: int) -> int:
        """Trainable parameters of A and B: rank · (in + out)."""
        return rank * sum(self.shape)


def is_linear(module: nn.Module) -> bool:
    """Layers with y = x Wᵀ + b, among them transformers' Conv1D, which stores W transposed."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_adaptable(module: nn.Module) -> bool:
    """Layers that an adapter can sit on: linear ones, and embeddings that do no more than look up and scale."""
    looks_up = isinstance(module, nn.Embedding) and (
        type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    )
    return looks_up or is_linear(module)


def dimensions(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; (dim, vocabulary) of an embedding, which is linear in a token's one-hot vector."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    assert isinstance(module, nn.Linear), type(module)
    return module.out_features, module.in_features


def embedding_scale(module: nn.Module) -> float:
    """What an embedding multiplies its rows with before it returns them: √dim in gemma 1 to 3, 1 in most.

    Models that scale what the embedding has returned, such as granite, do so to an adapter's share of it too.
    """
    scale: Any = getattr(module, "embed_scale", 1.0)
    if not isinstance(scale, torch.Tensor):
        return float(scale)
    if scale.is_meta:
        return float(getattr(module, "scalar_embed_scale", 1.0))
    return float(scale.to(module.weight.dtype))  # type: ignore[arg-type]  # rounded as the module does it


# ---- a whole model -----------------------------------------------------------------------------------------------


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's transformer blocks: the outermost ModuleList with one entry per layer."""
    config: Any = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise StudioError(
        "E_ARCH",
        f"{quote(type(model).__name__)} has no list of {depth or 'its'} blocks.",
        "Its layers cannot be told apart, so it cannot be adapted here; choose another model.",
    )


def embedding(model: nn.Module) -> Target:
    """The input embedding as a target, of shape (dim, vocabulary)."""
    layer = _embedding_layer(model)
    assert layer is not None, f"{type(model).__name__} has no input embedding that can be adapted"
    name = next(name for name, module in model.named_modules() if module is layer)
    return Target(name=name, role="embed", layer=-1, shape=dimensions(layer))


def matrices(model: nn.Module) -> list[Target]:
    """Every adaptable matrix of the model in forward order, fused layers split by role."""
    model_config: Any = model.config
    config = model_config.get_text_config()
    table = LAYOUTS.get(config.model_type, {})
    order = {path: place for place, path in enumerate(table)}
    holders = experts(model)
    prefix, layers = blocks(model)
    found = [] if _embedding_layer(model) is None else [embedding(model)]
    for layer, block in enumerate(layers):
        linears = [(path, module) for path, module in block.named_modules() if is_linear(module)]
        for path, module in sorted(linears, key=lambda linear: order.get(linear[0], len(order))):
            name = f"{prefix}.{layer}.{path}"
            if _of_experts(name, holders):
                continue
            out, width = dimensions(module)
            for role, rows_of in table.get(path, ((path, None),)):
                rows = None if rows_of is None else rows_of(config, out)
                shape = (out if rows is None else len(rows), width)
                found.append(Target(name=name, role=role, layer=layer, shape=shape, rows=rows))
    return found


def experts(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that hold the experts of mixture-of-experts layers.

    They are called experts, or own a tensor (experts, out, in) with as many as the configuration counts.
    """
    config: Any = model.config
    settings = vars(config.get_text_config()).items()
    counts = {value for key, value in settings if key.endswith("experts") and isinstance(value, int) and value > 1}
    found: list[str] = []
    for name, module in model.named_modules():
        stacked = any(tensor.dim() == 3 and len(tensor) in counts for tensor in module.parameters(recurse=False))
        if (stacked or name.rpartition(".")[2] == "experts") and not _inside(name, found):
            found.append(name)
    return tuple(found)


def heads(model: nn.Module) -> tuple[str, ...]:
    """What a classification model adds to its base, to be trained and saved whole: its children with parameters there.

    A model that writes text has none: its head is the base's own.
    """
    base: Any = getattr(model, "base_model", model)
    if base is model or model.get_output_embeddings() is not None:  # type: ignore[operator]
        return ()
    others = [(name, child) for name, child in model.named_children() if child is not base]
    return tuple(name for name, child in others if next(child.parameters(), None) is not None)


def drops(model: nn.Module) -> bool:
    """Whether the model itself drops something at random in training."""
    config = getattr(model, "config", None)
    in_attention = getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0)
    return bool(in_attention) or any(isinstance(module, nn.Dropout) and module.p for module in model.modules())


def _embedding_layer(model: Any) -> nn.Module | None:
    layer = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return layer if isinstance(layer, nn.Embedding) and is_adaptable(layer) else None


def _inside(name: str, modules: Any) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _of_experts(name: str, holders: tuple[str, ...]) -> bool:
    """Whether a layer belongs to an expert or routes to experts; a shared expert beside them is an ordinary layer."""
    if _inside(name, holders):
        return True
    for holder in holders:
        mixture = holder.rpartition(".")[0]  # the layer that owns the experts, the router and what is shared
        steps = name.removeprefix(f"{mixture}.").split(".")
        if _inside(name, (mixture,)) and ("router" in steps or "gate" in steps or steps[-1].endswith("expert_gate")):
            return True
    return False
