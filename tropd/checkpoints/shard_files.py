"""The tensors of a sharded checkpoint: each rank writes its part, and any number of ranks can read it.

Uses torch.distributed.checkpoint with safetensors files, without pickle.  A file names its tensors and their offsets in
the whole.  A checkpoint of one process reads the same way, since its tensors begin at 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tropd.errors import CheckpointError


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write, with all ranks together; returns when the files of all ranks exist."""
    with _told(folder, "written"):
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def known(folder: Path) -> dict[str, TensorStorageMetadata]:
    """The tensors in the files: names with types and whole shapes."""
    with _told(folder, "read"):
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: x for name, x in found.items() if isinstance(x, TensorStorageMetadata)}


def read(folder: Path) -> dict[str, Tensor]:
    """Read everything, whole, on the CPU, in this process alone."""
    tensors = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in known(folder).items()}
    with _told(folder, "read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the missing process group, which is intended
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill these tensors, sharded or whole, each rank its own part; all ranks together."""
    with _told(folder, "read"):
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))


@contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, OSError, SafetensorError) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        first = next((str(failure[0]) for failure in failures), str(error))
        raise CheckpointError(f"{folder} cannot be {what}: {first}. What was saved before is untouched.") from error
