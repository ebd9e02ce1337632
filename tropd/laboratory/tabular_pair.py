"""Two tables that write together, as models of a run do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tropd.laboratory.tabular import TabularLM
from tropd.methods.decoding import Decoding
from tropd.rollout.joint import Together
from tropd.rollout.rows import Batch
from tropd.rollout.voices import Voice
from tropd.types import Completion, Request


class TabularPair:
    def __init__(self, student: TabularLM, teacher: TabularLM) -> None:
        self.student, self.teacher = student, teacher

    @torch.no_grad()
    def write(
        self, requests: Sequence[Request], told: Sequence[tuple[int, ...]], decoding: Decoding
    ) -> list[Completion]:
        engines: list[Any] = [_Read(table, len(requests)) for table in (self.student, self.teacher)]
        voices = [Voice(engine, rereads=True) for engine in engines]
        return Batch(voices, requests, told=told, write=Together(decoding)).run()


class _Read:
    """A table as the loop over rows reads it."""

    within = nullcontext

    def __init__(self, table: TabularLM, max_batch: int) -> None:
        self.table, self.max_batch, self.version = table, max_batch, table.version
        self.model = nn.ParameterList([table.logits])

    def whole_logits(self, input_ids_BT: Tensor) -> Tensor:
        """A table sees the prompt, which is one token, and the last token."""
        last_B = input_ids_BT[:, -1] if input_ids_BT.shape[1] > 1 else torch.tensor(self.table.start)
        return self.table.logits[input_ids_BT[:, 0], last_B]
