"""Directions that are added to a layer while a reader reads (SafeSteer, arXiv 2606.02530): h + strength * d.

The hook lives for one forward pass of that reader.  The student keeps its own, even where both share their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tropd.base.reading import check_path
from tropd.briefings.reader import Direction
from tropd.config.run import Run
from tropd.errors import ConfigError
from tropd.model import hf
from tropd.model.head import causal_lm_of
from tropd.model.origins import Origin, content_of
from tropd.types import READER


def added(direction: Direction, model: nn.Module, name: str) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which the direction is added in this model.  `name` is the reader's, for errors."""
    inside = causal_lm_of(model)
    layers, vector_H = hf.decoder_layers(inside), read_direction(direction, name)
    if direction.layer >= len(layers):
        there = f"{len(layers)} layers, 0 to {len(layers) - 1}" if layers else "no layers that tropd can find"
        raise ConfigError(
            f"direction.layer = {direction.layer} was asked for reader {name!r}, but {type(inside).__name__} has "
            f"{there}."
        )
    size = int(inside.config.get_text_config().hidden_size)
    if vector_H.shape != (size,):
        raise ConfigError(
            f"{direction.file} holds a direction of shape {tuple(vector_H.shape)} for reader {name!r}, but the hidden "
            f"states of {type(inside).__name__} have {size} numbers. Give a vector of {size}."
        )
    if direction.strength == 0:
        return nullcontext
    layer, shift_H = layers[direction.layer], direction.strength * vector_H

    @contextmanager
    def hooked() -> Iterator[None]:
        handle = layer.register_forward_hook(lambda module, inputs, output: _shifted(output, shift_H))
        try:
            yield
        finally:
            handle.remove()

    return hooked


def _shifted(output: Any, shift_H: Tensor) -> Any:
    """What a layer gave: hidden states, alone or first of several things."""
    if isinstance(output, tuple):
        return (_shifted(output[0], shift_H), *output[1:])
    return output + shift_H.to(output)


def read_direction(direction: Direction, name: str) -> Tensor:
    """The vector in the file, in float32."""
    path = Path(direction.file)
    check_path(path, "direction.file")
    if not path.is_file():
        raise ConfigError(f"there is no file {path}, which holds the direction of reader {name!r}.")
    try:
        found = _read(path)
    except ConfigError:
        raise
    except Exception as failure:  # anything can be in a file
        raise ConfigError(f"the direction of reader {name!r} cannot be read from {path}: {failure}") from None
    if not (found.is_floating_point() and bool(found.isfinite().all())):
        raise ConfigError(
            f"{path} holds {found.dtype} or numbers that are not finite. Give a vector of finite numbers."
        )
    return found.float()


def _read(path: Path) -> Tensor:
    if path.suffix == ".npy":
        import numpy

        return torch.from_numpy(numpy.load(path, allow_pickle=False))
    from safetensors.torch import load_file

    tensors = load_file(path)
    if len(tensors) != 1:
        raise ConfigError(f"{path} holds {len(tensors)} tensors, and a direction is one. Give a file with it alone.")
    return next(iter(tensors.values()))


def origins_of(run: Run) -> dict[str, Origin]:
    """The hashes of the files of directions, by who has them."""
    whose = {READER if name == "default" else f"teachers.{name}": x for name, x in run.all_teachers.items()}
    whose |= {f"readers.{name}": x for name, x in run.all_readers.items()}
    files = {name: Path(x.direction.file) for name, x in whose.items() if x.direction}
    return {f"{name}.direction": content_of({path.name: path}) for name, path in files.items()}
