"""Log-probabilities of every token, as the small server puts them into JSON."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def of_written(logprobs_TV: Tensor, ids: list[int]) -> list[float]:
    return logprobs_TV.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def likeliest(logprobs_TV: Tensor, top_k: int) -> list[Any]:
    values, indices = (x.tolist() for x in logprobs_TV.topk(top_k))
    return [list(zip(*row, [None] * top_k, strict=True)) for row in zip(values, indices, strict=True)]


def by_token(logprobs_TV: Tensor, ids: list[int], top_k: int) -> list[dict[str, Any]]:
    logprobs_TV = logprobs_TV.clamp_min(-9999.0)
    own = of_written(logprobs_TV, ids)
    ranks = (logprobs_TV >= torch.tensor(own)[:, None]).sum(-1).tolist()
    tops = likeliest(logprobs_TV, min(top_k, logprobs_TV.shape[1]))
    rows = []
    for written, logprob, rank, top in zip(ids, own, ranks, tops, strict=True):
        row = {str(written): {"logprob": logprob, "rank": rank, "decoded_token": "?"}}
        for place, (value, index, _) in enumerate(top, start=1):
            row[str(index)] = {"logprob": value, "rank": place, "decoded_token": "?"}
        rows.append(row)
    return rows
