"""The methods that the paper compares LoRA with (section 5.1), on the same slots and for the same `train`.

    full      every parameter, on copies of the base's
    top       every parameter of the last `width` blocks
    bitfit    a bias added wherever the model has one; to every matrix of a block when it has none at all
    adapter_h two bottlenecks a block, behind the attention and behind the MLP (Houlsby et al., 2019)
    adapter_p one, behind the MLP (Pfeiffer et al., 2021)
    adapter_l one behind the MLP with a LayerNorm before it (Lin et al., 2020)
    prefix    keys and values of `width` virtual tokens in every block (Li & Liang, 2021)
    prompt    embeddings of `width` virtual tokens in front of the text (the paper's PreEmbed)

A bottleneck adds W_up σ(W_down o) to the output o of a layer that writes into the residual stream.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from lora_studio.core import upcast
from lora_studio.core.layout import blocks, dimensions, heads, is_linear, matrices
from lora_studio.core.lora import LoRA, Parts, copied, low_rank
from lora_studio.core.lora import plan as plan_lora
from lora_studio.core.slot import Before, LowRank, Part
from lora_studio.core.spec import BASELINES, BaselineSpec, LoraSpec, Method
from lora_studio.errors import StudioError
from lora_studio.fields import check

BEHIND = {  # kind -> (the roles whose output it changes, activation, a LayerNorm before it)
    "adapter_h": (("attn.o", "mlp.down"), F.silu, False),
    "adapter_p": (("mlp.down",), F.relu, False),
    "adapter_l": (("mlp.down",), F.relu, True),
}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One thing that a method trains."""

    name: str  # dotted name of the layer
    role: str
    layer: int  # number of its block; -1 outside the blocks
    shape: tuple[int, ...]
    parameters: int
    keeps_input: bool  # as Part's
    keeps: int


def add(lora: LoRA, name: str, method: Method, seed: int = 0) -> None:
    """Attach a fresh adapter of any method; LoRA, BitFit and bottlenecks change nothing yet."""
    if isinstance(method, LoraSpec):
        lora.add(name, method, seed)
        return
    parts = build(lora.model, method)
    generator = torch.Generator().manual_seed(seed)
    for ones in parts.values():
        for part in ones:
            if isinstance(part, (Bottleneck, Prefix, Prompt)):
                part.reset(lora.model, generator)
    lora.attach(name, method, parts)


def plan(model: Any, method: Method) -> list[Piece]:
    """What a method would train, exactly and in forward order; works on the meta device too.

    Raises E_CONFIG, E_METHOD, and for LoRA the E_ codes of `core.lora.plan`.
    """
    if isinstance(method, LoraSpec):
        targets = plan_lora(model, method)
        parts = low_rank(model, method, targets) | copied(model, method.modules_to_save)
    else:
        parts = build(model, method)
    pieces, counted = [], set[nn.Parameter]()
    prefix = blocks(model)[0] + "."
    for path, ones in parts.items():
        inside = path.removeprefix(prefix).split(".")[0] if path.startswith(prefix) else ""
        for part in ones:
            own = [tensor for tensor in part.parameters() if tensor.requires_grad and tensor not in counted]
            counted.update(own)
            shape = part.shape if isinstance(part, LowRank) else tuple(own[0].shape) if own else ()
            role = part.role if isinstance(part, LowRank) else path.removeprefix(f"{prefix}{inside}.") or _name(method)
            count = sum(tensor.numel() for tensor in own)
            kept = {"keeps_input": part.keeps_input, "keeps": part.keeps}
            pieces.append(Piece(name=path, role=role, layer=int(inside or -1), shape=shape, parameters=count, **kept))
    return pieces


def _name(method: Method) -> str:
    """What stands for a role where a method acts on the model as a whole."""
    return method.kind if isinstance(method, BaselineSpec) else method.variant


def build(model: Any, spec: BaselineSpec) -> Parts:
    """The parts of a method, not yet drawn. Raises E_METHOD."""
    check(spec)
    head = copied(model, spec.modules_to_save)
    if spec.kind == "full":
        return copied(model, [name for name, _ in model.named_children()])
    if spec.kind == "top":
        return copied(model, _top(model, spec.size)) | head
    if spec.kind == "bitfit":
        return _biases(model, set(head)) | head
    if spec.kind in BEHIND:
        return _bottlenecks(model, spec) | head
    return {"": [_before(model, spec)]}


class Bias(Part):
    """A vector added to a layer's output."""

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size, device=device))

    def delta(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return self.bias.to(output.dtype)

    def changed(self, layer: nn.Module) -> bool:
        return bool(self.bias.any())


class Bottleneck(Part):
    """W_up σ(W_down o + b_down) + b_up, from and to width d through `width`; W_up starts at zero."""

    def __init__(self, hidden: int, spec: BaselineSpec, device: torch.device) -> None:
        super().__init__()
        _, self.activation, normed = BEHIND[spec.kind]
        self.keeps = hidden + 2 * spec.size  # what it is added to, and both sides of the activation
        self.down = nn.Linear(hidden, spec.size, device=device)
        self.up = nn.Linear(spec.size, hidden, device=device)
        self.norm = nn.LayerNorm(hidden, device=device) if normed else None

    def reset(self, model: Any, generator: torch.Generator) -> None:
        """W_down normal with standard deviation 0.02, everything else such that nothing is added."""
        with torch.no_grad():
            self.down.weight.copy_(torch.empty(self.down.weight.shape).normal_(0, 0.02, generator=generator))
            for tensor in (self.down.bias, self.up.weight, self.up.bias):
                tensor.zero_()

    def delta(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        o = upcast.widened(output)
        if self.norm is not None:
            o = F.layer_norm(o, o.shape[-1:], self.norm.weight.to(o.dtype), self.norm.bias.to(o.dtype))
        hidden = self.activation(F.linear(o, self.down.weight.to(o.dtype), self.down.bias.to(o.dtype)))
        return F.linear(hidden, self.up.weight.to(o.dtype), self.up.bias.to(o.dtype)).to(output.dtype)

    def changed(self, layer: nn.Module) -> bool:
        return bool(self.up.weight.any() or self.up.bias.any())


class Prompt(Before):
    """Embeddings of virtual tokens (length, hidden); their keys and values are what the model makes of them."""

    def __init__(self, length: int, hidden: int, device: torch.device) -> None:
        super().__init__()
        self.length = length
        self.tokens = nn.Parameter(torch.zeros(length, hidden, device=device))

    def reset(self, model: Any, generator: torch.Generator) -> None:
        """The embeddings of tokens drawn at random (Lester et al., 2021)."""
        table = model.get_input_embeddings().weight
        drawn = torch.randint(len(table), (self.length,), generator=generator)
        with torch.no_grad():
            self.tokens.copy_(table[drawn.to(table.device)])

    def keys_values(self, model: Any, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        tokens = self.tokens.to(model.get_input_embeddings().weight.dtype)
        return _keys_values(model, inputs_embeds=tokens.expand(batch, -1, -1))

    def changed(self, layer: nn.Module) -> bool:
        return True


class Prefix(Before):
    """Keys and values of virtual tokens in every block: (blocks, 2, kv_heads, length, head_dim)."""

    def __init__(self, length: int, shape: tuple[int, int, int], device: torch.device) -> None:
        super().__init__()
        depth, kv_heads, head_dim = shape
        self.length = length
        self.states = nn.Parameter(torch.zeros(depth, 2, kv_heads, length, head_dim, device=device))

    def reset(self, model: Any, generator: torch.Generator) -> None:
        """What the model makes of tokens drawn at random, which learns faster than noise (Li & Liang, section 7.4)."""
        drawn = torch.randint(model.get_input_embeddings().num_embeddings, (1, self.length), generator=generator)
        with torch.no_grad():
            pairs = _keys_values(model, input_ids=drawn.to(self.states.device))
            states = torch.stack([torch.cat(pair) for pair in pairs])
            if states.shape != self.states.shape:
                message = f"{model.config.model_type} keeps its keys in a shape of its own."
                raise StudioError("E_METHOD", message, "Choose prefix embeddings, or another method.")
            self.states.copy_(states)

    def keys_values(self, model: Any, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        states = self.states.to(model.get_input_embeddings().weight.dtype)
        return [tuple(one.expand(batch, -1, -1, -1) for one in pair) for pair in states]  # type: ignore[misc]

    def changed(self, layer: nn.Module) -> bool:
        return True


def _keys_values(model: Any, **tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every block for one row of tokens, as a cache holds them."""
    cache: Any = DynamicCache()
    model.base_model(**tokens, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _top(model: Any, count: int) -> list[str]:
    prefix, layers = blocks(model)
    if count > len(layers):
        message = f"The model has {len(layers)} blocks, not {count}."
        raise StudioError("E_METHOD", message, f"Give a width of {len(layers)} or less.")
    return [f"{prefix}.{number}" for number in range(len(layers) - count, len(layers))]


def _biases(model: Any, head: set[str]) -> Parts:
    owners = {
        path: len(module.bias)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter) and path not in head and _adds_bias(module)
    }
    if not owners:
        linear = {target.name for target in matrices(model) if target.role != "embed"}
        owners = {path: dimensions(model.get_submodule(path))[0] for path in linear}
    device = next(model.parameters()).device
    return {path: [Bias(size, device)] for path, size in owners.items()}


def _adds_bias(module: Any) -> bool:
    """Linear layers and norms end by adding their bias; other owners of one (routers) may do anything with it."""
    return is_linear(module) or getattr(module, "weight", module.bias).dim() == 1


def _bottlenecks(model: Any, spec: BaselineSpec) -> Parts:
    roles = BEHIND[spec.kind][0]
    targets = [target for target in matrices(model) if target.role in roles]
    if len(targets) != len(roles) * len(blocks(model)[1]):  # unknown architectures, and mixtures of experts
        message = f"{BASELINES[spec.kind][0]} does not know where the blocks of {model.config.model_type} end."
        raise StudioError("E_METHOD", message, "Choose LoRA, BitFit or full fine-tuning.")
    device = next(model.parameters()).device
    return {target.name: [Bottleneck(target.shape[0], spec, device)] for target in targets}


def _before(model: Any, spec: BaselineSpec) -> Part:
    text = model.config.get_text_config()
    label = BASELINES[spec.kind][0]
    if heads(model) or model.get_output_embeddings() is None:
        raise StudioError("E_METHOD", f"{label} needs a model that writes text.", "Choose another method.")
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    if set(kinds) != {"full_attention"} or (getattr(text, "sliding_window", None) and not hasattr(text, "layer_types")):
        message = f"{label} cannot stay in view in {text.model_type}, whose attention slides."
        raise StudioError("E_METHOD", message, "Choose another method.")
    most = getattr(text, "max_position_embeddings", None)
    if most and spec.size >= most:
        message = f"{spec.size} virtual tokens leave no room in the {most} tokens that this model reads."
        raise StudioError("E_METHOD", message, "Give a smaller width.")
    device = next(model.parameters()).device
    if spec.kind == "prompt":
        return Prompt(spec.size, text.hidden_size, device)
    keys = [target.shape[0] for target in matrices(model) if target.role == "attn.k"]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if len(set(keys)) != 1 or keys[0] % head_dim:
        message = f"{label} does not know the keys of {text.model_type}."
        raise StudioError("E_METHOD", message, "Choose prefix embeddings, or another method.")
    return Prefix(spec.size, (len(keys), keys[0] // head_dim, head_dim), device)
