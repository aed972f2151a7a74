"""The figures of the paper (arXiv 2106.09685v2) that the tables print beside ours.

Scores are in points of 100, as the paper prints them. None: the paper has no such row.
"""

# Table 2, RoBERTa-base, (SST-2 accuracy, CoLA Matthews); adapters H and P stand with RoBERTa-large only (0.8 M, †).
GLUE: dict[str, tuple[float, float] | None] = {
    "full": (94.8, 63.6),
    "top": None,
    "bitfit": (93.7, 62.0),
    "adapter_h": (96.3, 66.3),
    "adapter_p": (96.6, 67.8),
    "lora": (95.1, 63.4),
    "dora": None,  # a later method (arXiv 2402.09353)
}
GLUE_LARGE_LORA = (96.2, 68.2)  # RoBERTa-large, 0.8 M, †: what adapters H and P are to be compared with

# Table 3, GPT-2 medium: (BLEU, ROUGE-L), ROUGE-L where it is at hand. Adapter H stands with 11 M only.
E2E: dict[str, tuple[float, float | None] | None] = {
    "base": None,
    "full": (68.2, 71.0),
    "top": (68.1, None),
    "bitfit": None,
    "adapter_h": (67.3, None),
    "adapter_l": (66.3, None),
    "prefix": (69.7, None),  # "PreLayer"
    "prompt": None,
    "lora": (70.4, 71.8),
}

# Table 5, GPT-3, 18 M parameters: (WikiSQL, MNLI-m) by adapted matrices.
MATRICES: dict[str, tuple[float, float]] = {
    "q": (70.4, 91.0),
    "k": (70.0, 90.8),
    "v": (73.0, 91.0),
    "o": (73.2, 91.3),
    "qk": (71.4, 91.3),
    "qv": (73.7, 91.3),
    "qkvo": (73.7, 91.7),
}

# Table 6, GPT-3, q and v: (WikiSQL, MNLI-m) by rank.
RANKS: dict[int, tuple[float, float]] = {
    1: (73.4, 91.3),
    2: (73.3, 91.4),
    4: (73.7, 91.3),
    8: (73.8, 91.6),
    64: (73.5, 91.4),
}

# Table 7, GPT-3, W_q of layer 48, by rank: ‖Uᵀ W V‖ along ΔW, W and random directions, ‖ΔW‖ and the factor.
AMPLIFICATION: dict[int, tuple[float, float, float, float, float]] = {
    4: (0.32, 21.67, 0.02, 6.91, 21.5),
    64: (1.90, 37.71, 0.33, 3.57, 1.9),
}

# Table 1, GPT-2 medium on a GPU, (batch, sequence) -> time against merged LoRA (= full fine-tuning).
LATENCY: dict[tuple[int, int], dict[str, float]] = {
    (32, 512): {"adapter_l": 1.022, "adapter_h": 1.030},
    (16, 256): {"adapter_l": 1.050, "adapter_h": 1.084},
    (1, 128): {"adapter_l": 1.207, "adapter_h": 1.303},
}

# Section 4.2, GPT-3 175B in fp16, rank 4 on q and v.
CHECKPOINT_TIMES_SMALLER = 10_000  # 350 GB -> 35 MB
TRAINING_MEMORY_TIMES_SMALLER = 1.2e12 / 350e9  # 1.2 TB -> 350 GB
HUNDRED_TASKS_TIMES_SMALLER = 35e12 / 354e9  # 35 TB -> 354 GB
