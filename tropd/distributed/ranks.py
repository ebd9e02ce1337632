"""The processes of a run and what they exchange.  `tropd.distributed.launch` connects them.

Every process (rank) reads the same run and the same prompts, and takes its share of each batch.  Ranks exchange what
concerns the whole batch: denominators, batch-wide selections, sums.  Tensors on a GPU travel by NCCL, the rest by gloo.
A single process is a world too, in which nothing travels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_BUCKET = 1 << 24
"""Elements that are added at once: large enough for the network, small compared with a model."""


class Ranks:
    """The world of a plan (`tropd.objective.terms.World`) and everything else that processes share."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files and speaks to the user."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> list[T]:
        """This rank's part of a list that all ranks have."""
        return list(things[self.rank :: self.size])

    def own_name(self, file: str) -> str:
        """The name of a file that each rank keeps separately."""
        return file if self.leads else f"rank_{self.rank}_{file}"

    def own_folder(self, directory: Path) -> Path:
        """The folder for a rank's part of a batch: the run's folder, or one inside it with the same layout."""
        if self.leads:
            return directory
        own = directory / f"rank_{self.rank}"
        own.mkdir(exist_ok=True)
        shutil.copy(directory / "run.toml", own)
        return own

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, concatenated along the first axis in rank order; lengths may differ."""
        return x if self.size == 1 else torch.cat(self._parts(x))

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """The bytes of each rank, in rank order."""
        if self.size == 1:
            return [content]
        sent = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)
        return [part.numpy().tobytes() for part in self._parts(sent)]

    def gather_json(self, value: Any) -> list[Any]:
        """The values of each rank, in rank order, after a round trip through JSON."""
        if self.size == 1:
            return [value]
        return [json.loads(content) for content in self.gather_bytes(json.dumps(value).encode())]

    def first(self, value: T) -> T:
        """The value of rank 0."""
        return self.gather_json(value)[0]

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return max(self.gather_json(number))

    def any(self, said: bool) -> bool:
        return any(self.gather_json(said))

    def wait(self) -> None:
        """Wait until every rank is here."""
        self.most(0)

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks.  All are of one type and on one device."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([x.reshape(-1) for x in bucket])
            dist.all_reduce(flat)
            for x, total in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                x.copy_(total.view_as(x))

    def _parts(self, x: Tensor) -> list[Tensor]:
        sent = x.to(torch.uint8) if x.dtype == torch.bool else x.contiguous()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(sent)]))
        longest = max(int(n) for n in lengths)
        padded = sent.new_zeros((longest, *sent.shape[1:]))
        padded[: len(sent)] = sent
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        if padded.numel():
            dist.all_gather(parts, padded)
        return [part[: int(n)].to(x.dtype) for part, n in zip(parts, lengths, strict=True)]


ALONE = Ranks()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for x in tensors:
        bucket.append(x)
        if sum(y.numel() for y in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
