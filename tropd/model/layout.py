"""Sequences of different lengths as one rectangle of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tropd.errors import DataError
from tropd.types import Rollout

Arrangement = Literal["padded", "packed"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Sequences as one rectangle, and the place in it that predicts each response token."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor | None
    """None: 0, 1, ... in each row, the default of a model."""
    predicted_at_N: Tensor
    """Index into the flattened rectangle, one per response token: the token's place minus one."""


def lay_out(
    sequences: Sequence[Sequence[int]], num_prompts: Sequence[int], arrangement: Arrangement = "padded", pad_id: int = 0
) -> Layout:
    """Padded: one row each, filled on the right, where causal attention cannot see it.  Packed: one row, positions
    restart with each sequence, which tells attention where the sequences end."""
    width = max(map(len, sequences)) if arrangement == "padded" else sum(map(len, sequences))
    num_rows = len(sequences) if arrangement == "padded" else 1
    input_ids = torch.full((num_rows * width,), pad_id, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    predicted_at, start = [torch.zeros(0, dtype=torch.long)], 0
    for sequence, num_prompt in zip(sequences, num_prompts, strict=True):
        end = start + len(sequence)
        input_ids[start:end] = torch.tensor(sequence, dtype=torch.long)
        position_ids[start:end] = torch.arange(end - start)
        predicted_at.append(torch.arange(start + num_prompt, end) - 1)
        start += width if arrangement == "padded" else end - start
    return Layout(
        input_ids_BT=input_ids.view(num_rows, width),
        position_ids_BT=position_ids.view(num_rows, width) if arrangement == "packed" else None,
        predicted_at_N=torch.cat(predicted_at),
    )


def check_rollouts(rollouts: Sequence[Rollout], num_rows: int, context: int | None, model: str) -> None:
    """Refuse rollouts for which a forward pass would raise an index error or compute nonsense."""
    for rollout in rollouts:
        if context is not None and len(rollout.token_ids) > context:
            raise DataError(
                f"rollout {rollout.id} has {len(rollout.token_ids)} tokens ({len(rollout.prompt.token_ids)} of "
                f"prompt), but {model} reads at most {context}. Shorten prompts or "
                "max_new_tokens."
            )
        if rollout.response_ids and not rollout.prompt.token_ids:
            raise DataError(
                f"rollout {rollout.id} has no prompt, so nothing predicts its first token. Begin it "
                "with a beginning-of-text token."
            )
        if odd := [token for token in rollout.token_ids if not 0 <= token < num_rows]:
            raise DataError(
                f"rollout {rollout.id} holds token id {odd[0]}, but "
                f"{model} knows {num_rows}. Was it written with another tokenizer?"
            )
