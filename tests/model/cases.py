"""Random rollouts, and what the whole model says of them: the definition that everything is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny import VOCAB
from tropd.objective.evidence import Tokens
from tropd.types import Author, Prompt, Rollout

LENGTHS = [(3, 5), (1, 9), (6, 0), (4, 1), (2, 12)]


def rollouts_of(lengths: list[tuple[int, int]] = LENGTHS, seed: int = 0, vocab: int = VOCAB) -> list[Rollout]:
    """Random rollouts with these (prompt, response) lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, (num_prompt, num_response) in enumerate(lengths):
        ids = tuple(torch.randint(vocab, (num_prompt + num_response,), generator=generator).tolist())
        found.append(
            Rollout(
                id=f"r{index}",
                prompt=Prompt(id=f"p{index}", token_ids=ids[:num_prompt]),
                token_ids=ids,
                authors=(Author.CONTEXT,) * num_prompt + (Author.STUDENT,) * num_response,
                behavior_logprobs=(0.0,) * len(ids),
            )
        )
    return found


def tokens_of(rollouts: list[Rollout], **evidence: Any) -> Tokens:
    ids_N = torch.tensor([token for rollout in rollouts for token in rollout.response_ids])
    zeros_S = torch.zeros(len(rollouts), dtype=torch.long)
    zeros_N = torch.zeros_like(ids_N)
    return Tokens(
        token_ids_N=ids_N,
        authors_N=zeros_N,
        sequences_N=zeros_N,
        positions_N=zeros_N,
        keys_S=zeros_S,
        num_actions_S=zeros_S,
        **evidence,
    )


def plain(model: nn.Module, rollouts: list[Rollout], vocab: int | None = None) -> Tensor:
    """[N, V] from one call of the whole model per rollout: the definition that everything is compared with."""
    rows = []
    for rollout in rollouts:
        logits_TV = model(input_ids=torch.tensor([rollout.token_ids])).logits[0, :, :vocab]
        num_prompt = len(rollout.prompt.token_ids)
        rows.append(logits_TV.log_softmax(-1)[num_prompt - 1 : -1])
    return torch.cat(rows)


def written(rollouts: list[Rollout], full_NV: Tensor) -> Tensor:
    return full_NV.gather(1, tokens_of(rollouts).token_ids_N[:, None])[:, 0]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys() and left
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, right[name], rtol=tolerance, atol=tolerance)
