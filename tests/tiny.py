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
BIGCODE = {**CAUSAL["gpt2"][1], "n_inner": 48}
FALCON = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "ffn_hidden_size": 48}
FUSED_TOO = {  # more fused layers; not all of these can be packed
    "gpt_bigcode": ("GPTBigCode", {**BIGCODE, "multi_query": True}),
    "gpt_bigcode of heads": ("GPTBigCode", {**BIGCODE, "multi_query": False}),
    "codegen": ("CodeGen", {**CAUSAL["gpt2"][1], "n_inner": 48, "rotary_dim": 4, "n_ctx": 64, "n_positions": 64}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0, "attention_dropout": 0}),
    "falcon": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-7b": ("Falcon", {**FALCON, "multi_query": True}),
    "falcon-rw": ("Falcon", {**FALCON, "multi_query": False, "alibi": True, "bias": True, "parallel_attn": False}),
    "glm": ("Glm", {**GROUPED, "head_dim": 8}),
    "glm4": ("Glm4", {**GROUPED, "head_dim": 8}),
    "modernbert-decoder": ("ModernBertDecoder", SIZES),
}
PLAIN_TOO = {  # more layers of one role each
    "gemma3_text": ("Gemma3", {**GROUPED, "head_dim": 8}),
    "smollm3": ("SmolLM3", GROUPED),
    "granite": ("Granite", {**GROUPED, "embedding_multiplier": 12.0}),
    "ministral": ("Ministral", {**GROUPED, "head_dim": 8}),
    "olmo": ("Olmo", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "olmo3": ("Olmo3", GROUPED),
    "cohere": ("Cohere", GROUPED),
    "cohere2": ("Cohere2", GROUPED),
    "exaone4": ("Exaone4", GROUPED),
    "helium": ("Helium", {**GROUPED, "head_dim": 8}),
    "seed_oss": ("SeedOss", {**GROUPED, "head_dim": 8, "attention_dropout": 0, "residual_dropout": 0}),
    "ernie4_5": ("Ernie4_5", {**GROUPED, "head_dim": 8}),
    "arcee": ("Arcee", GROUPED),
    "nemotron": ("Nemotron", GROUPED),
    "starcoder2": ("Starcoder2", GROUPED),
    "phi": ("Phi", GROUPED),
    "opt": ("OPT", {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "ffn_dim": 48, "dropout": 0}),
    "gpt_neo": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gptj": ("GPTJ", {**CAUSAL["gpt2"][1], "rotary_dim": 4, "n_positions": 64}),
}
MIXED = {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS = {  # mixtures of experts
    "mixtral": ("Mixtral", MIXED),
    "qwen2_moe": ("Qwen2Moe", {**MIXED, "num_experts": 3, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", {**MIXED, "head_dim": 8, "mlp_only_layers": [1]}),
    "olmoe": ("Olmoe", {**MIXED, "num_experts": 3}),
    "gpt_oss": ("GptOss", {**MIXED, "head_dim": 8}),
}
FAMILIES = CAUSAL | FUSED_TOO | PLAIN_TOO | EXPERTS
ENCODERS = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "deberta-v2": "DebertaV2",
    "deberta": "Deberta",
    "electra": "Electra",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "modernbert": "ModernBert",
}
CLASSIFIERS = ("bert", "roberta", "deberta-v2", "distilbert", "gpt2", "llama", "electra", "deberta", "modernbert")


def touched(model: torch.nn.Module) -> set[torch.nn.Module]:
    """Modules that somebody acts on: with a hook, or with a forward that is not their class's."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {one for one in model.modules() if "forward" in vars(one) or any(getattr(one, name) for name in hooks)}


def causal(family: str, seed: int = 0, vocabulary: int = 97, **sizes_too: float) -> torch.nn.Module:
    """A two-layer causal model with random weights, in evaluation mode."""
    name, sizes = FAMILIES[family]
    ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    shape = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    config = getattr(transformers, shape)(**{"vocab_size": vocabulary, **ends, **sizes, **sizes_too})
    torch.manual_seed(seed)
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, kind)(config).eval()


def encoder(family: str, seed: int = 0, **sizes_too: object) -> torch.nn.Module:
    """A two-layer encoder with random weights, in evaluation mode."""
    name, sizes = _encoder(family)
    config = getattr(transformers, f"{name}Config")(vocab_size=97, pad_token_id=1, **sizes, **sizes_too)
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}Model")(config).eval()


def classifier(
    family: str, labels: int = 3, seed: int = 0, vocabulary: int = 97, **sizes_too: object
) -> torch.nn.Module:
    """A two-layer sequence classification model with random weights and a padding token, in evaluation mode."""
    name, sizes = _encoder(family) if family in ENCODERS else CAUSAL[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocabulary, pad_token_id=1, num_labels=labels, **sizes, **sizes_too
    )
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


def _encoder(family: str) -> tuple[str, dict]:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48} if family == "distilbert" else SIZES
    return ENCODERS[family], sizes


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


def tiny_encoder(folder: Path, family: str = "bert") -> Path:
    """The same of an encoder, without a head."""
    words = tokenizer()
    classifier(family, vocabulary=len(words)).base_model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
