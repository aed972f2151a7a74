"""Tiny random models of every supported architecture, and one complete model folder on disk."""

import string
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
GROUPED = {**SIZES, "num_key_value_heads": 2}  # fewer key and value heads than query heads

CAUSAL = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0}),
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 5}),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8}),
    "phi3": ("Phi3", GROUPED),
    "gpt_neox": ("GPTNeoX", SIZES),
    "stablelm": ("StableLm", {**GROUPED, "attention_dropout": 0.0}),  # has sdpa code of its own, so it cannot be packed
}
ENCODERS = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "deberta-v2": "DebertaV2"}


def causal(family: str, seed: int = 0, vocabulary: int = 97, **sizes_too: int) -> torch.nn.Module:
    """A two-layer causal model with random weights, in evaluation mode."""
    name, sizes = CAUSAL[family]
    ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{name}Config")(vocab_size=vocabulary, **ends, **sizes, **sizes_too)
    torch.manual_seed(seed)
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, kind)(config).eval()


def encoder(family: str) -> torch.nn.Module:
    """A two-layer encoder with random weights."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48} if family == "distilbert" else SIZES
    config = getattr(transformers, f"{ENCODERS[family]}Config")(vocab_size=97, **sizes)
    return getattr(transformers, f"{ENCODERS[family]}Model")(config).eval()


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level, one token per byte, with five special tokens and a chat template."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *bytes_])}
    assert set(string.printable[:94]) <= set(bytes_)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast


def tiny_model(folder: Path, family: str = "llama", **sizes: int) -> Path:
    """Write a model folder as transformers does."""
    words = tokenizer()
    causal(family, vocabulary=len(words), **sizes).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
