"""Fixtures: tiny random models with a tokenizer of their own, nothing from a network."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer random llama, its tokenizer and a chat template."""
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")
