"""What every test starts from: one thread, no network, a tokenizer made on the spot."""

from __future__ import annotations

import os

# Read by the libraries when they are imported, so they are set before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()
