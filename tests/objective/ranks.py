"""Several ranks in one process: each a thread with some sequences of a batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tropd.objective import Tokens


class Ranks:
    """World of real threads: each rank meets the others in `gather`, as with a collective."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size)
        self.slots: list[Any] = [None] * size

    def member(self, number: int) -> Any:
        world = self

        class Member:
            rank, size = number, world.size

            def gather(self, x: torch.Tensor) -> torch.Tensor:
                world.slots[number] = x
                world.barrier.wait(timeout=20)
                out = torch.cat(list(world.slots))
                world.barrier.wait(timeout=20)
                return out

        return Member()


def local(tokens: Tokens, rows: torch.Tensor) -> Tokens:
    """Some rows with their sequences renumbered from 0, as a rank's own loader would."""
    part = tokens.rows(rows)
    names, index = torch.unique(part.sequences_N, return_inverse=True)
    per_sequence = {f: getattr(part, f)[names] for f in ("keys_S", "num_actions_S", "rewards_S", "groups_S")}
    return part.with_(sequences_N=index, **per_sequence)


def on_ranks(tokens: Tokens, split: Sequence[Sequence[int]], work: Callable[[Tokens, Any], Any]) -> list[Any]:
    """What each rank makes of its own sequences, of which `split` gives the numbers: (rows, result) of each."""
    world = Ranks(len(split))
    rows = [torch.isin(tokens.sequences_N, torch.tensor(numbers)).nonzero().flatten() for numbers in split]
    found: list[Any] = [None] * len(split)

    def run(rank: int) -> None:
        found[rank] = rows[rank], work(local(tokens, rows[rank]), world.member(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(split))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each is not None for each in found), "a rank has failed"
    return found
