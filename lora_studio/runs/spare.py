"""A worker before it has a run: it imports and warms up what every training needs, then waits at a socket.

Nothing here touches a GPU or knows a dataset or a model of the user's. The process that keeps it hands over run
folders with their open locks and a log to print to; when that process ends, there is nothing more to wait for.
"""

import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

MOST_DESCRIPTORS = 250


def wait(descriptor: int) -> tuple[list[Path], list[BinaryIO]]:
    """The runs to train and their locks, once they come; from then on everything is printed to their log.

    Nothing when the other side has closed.
    """
    said, descriptors = b"", []
    with socket.socket(fileno=descriptor) as ours:
        while not said.endswith(b"\n"):
            part, came, *_ = socket.recv_fds(ours, 65536, MOST_DESCRIPTORS)
            said, descriptors = said + part, [*descriptors, *came]
            if not part:
                return [], []
    printed, *locks = descriptors
    for stream in (1, 2):
        os.dup2(printed, stream)
    os.close(printed)
    return [Path(path) for path in json.loads(said)], [os.fdopen(lock, "wb") for lock in locks]


def warm_up() -> None:
    """Load a tiny model and take a step with it, so that the first real one finds everything imported and in place."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import lora_studio.adapters
    import lora_studio.runs.attempt
    import lora_studio.train  # noqa: F401
    from lora_studio.core.baselines import add
    from lora_studio.core.lean import Tokens
    from lora_studio.core.lora import LoRA
    from lora_studio.core.spec import LoraSpec
    from lora_studio.measure import losses
    from lora_studio.models import ModelLibrary, training_precision

    letters = Tokenizer(BPE(vocab={chr(97 + number): number for number in range(16)}, merges=[]))
    sizes: Any = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="a", pad_token="b").save_pretrained(folder)
        library = ModelLibrary(Path(folder))
        library.tokenizer(folder)("abc", return_offsets_mapping=True)
        lora = LoRA(library.load(folder, precision=training_precision("cpu", 0), on="cpu"))
    add(lora, "warm", LoraSpec())
    row = Tokens(tuple(range(16)), (True,) * 16)
    with lora.use("warm"):
        losses(lora, [row, row]).sum().backward()
    torch.optim.AdamW(lora.parameters("warm"), fused=True).step()
