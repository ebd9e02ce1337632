"""Rollouts that are kept: rollouts/step_000120.parquet, one row per rollout, token by token.

In the file, entry t of each per-token column describes token_ids[t]; null where nothing is known, as on the prompt.
Every token is there as text too, so the file can be read without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from tropd.distributed.ranks import ALONE, Ranks
from tropd.errors import require
from tropd.monitoring.ranks import gathered
from tropd.monitoring.records import temporary
from tropd.objective.support import NOTHING
from tropd.types import Author, Rollout

Decode = Callable[[Sequence[int]], str]
NUM_ALTERNATIVES = 5
"""How many of the teacher's likeliest tokens are kept beside each token."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 8
"""Tokens that one character may be spread over."""


def write_rollouts(
    directory: Path,
    step: int,
    rollouts: Sequence[Rollout],
    *,
    decode: Decode,
    student_logprobs_N: Tensor | None = None,
    teacher_logprobs_N: Tensor | None = None,
    teacher_topk_ids_NK: Tensor | None = None,
    teacher_topk_logprobs_NK: Tensor | None = None,
    weights: Mapping[str, Tensor] | None = None,
    every: int = 1,
    world: Ranks = ALONE,
) -> Path | None:
    """Saves the rollouts of every `every`-th step (0: never), and returns where.

    The rows N of a batch run over the responses, one rollout after another.  Rank 0 writes those of all ranks.
    """
    if every <= 0 or step % every:
        return None
    require("pyarrow", "data", "saving rollouts")
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = _columns(rollouts, decode)
    known_N = {"student_logprobs": student_logprobs_N, "teacher_logprobs": teacher_logprobs_N}
    known_N |= {f"weight_{term}": weight_N for term, weight_N in (weights or {}).items()}
    for name, x_N in known_N.items():
        if x_N is not None:
            columns[name] = pa.array(_per_rollout(x_N, rollouts), pa.list_(pa.float32()))
    if teacher_topk_ids_NK is not None and teacher_topk_logprobs_NK is not None:
        columns |= _alternatives(teacher_topk_ids_NK, teacher_topk_logprobs_NK, rollouts, decode)
    path = directory / f"step_{step:06d}.parquet"
    table = gathered(pa.table(columns), world)
    if not world.leads:
        return path
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, temporary(path), compression="zstd")
    temporary(path).replace(path)
    return path


def _columns(rollouts: Sequence[Rollout], decode: Decode) -> dict[str, Any]:
    """The columns that come from the rollouts alone."""
    import pyarrow as pa

    floats, strings = pa.list_(pa.float32()), pa.list_(pa.string())
    return {
        "id": pa.array([r.id for r in rollouts], pa.string()),
        "prompt_id": pa.array([r.prompt.id for r in rollouts], pa.string()),
        "prompt": pa.array([decode(r.prompt.token_ids) for r in rollouts], pa.string()),
        "response": pa.array([decode(r.response_ids) for r in rollouts], pa.string()),
        "reward": pa.array([r.reward for r in rollouts], pa.float64()),
        "finish": pa.array([r.finish.value for r in rollouts], pa.string()),
        "policy_version": pa.array([r.policy_version for r in rollouts], pa.list_(pa.int64())),
        "token_ids": pa.array([r.token_ids for r in rollouts], pa.list_(pa.int32())),
        "token_texts": pa.array([_texts(r, decode) for r in rollouts], strings),
        "authors": pa.array([[a.name.lower() for a in r.authors] for r in rollouts], strings),
        "behavior_logprobs": pa.array([_sampled(r) for r in rollouts], floats),
    }


def _sampled(rollout: Rollout) -> list[float | None]:
    pairs = zip(rollout.authors, rollout.behavior_logprobs, strict=True)
    return [logprob if author is Author.STUDENT else None for author, logprob in pairs]


def _texts(rollout: Rollout, decode: Decode) -> list[str]:
    return [*pieces(rollout.prompt.token_ids, decode), *pieces(rollout.response_ids, decode)]


def _per_rollout(x_N: Tensor, rollouts: Sequence[Rollout]) -> list[list[float | None]]:
    """NaN says that nothing is known."""
    values = x_N.detach().float().cpu().tolist()
    return _padded([None if x != x else x for x in values], rollouts)


def _padded(rows: Sequence[Any], rollouts: Sequence[Rollout]) -> list[list[Any]]:
    lengths = [len(r.response_ids) for r in rollouts]
    assert len(rows) == sum(lengths), f"{len(rows)} numbers for {sum(lengths)} response tokens"
    padded, begin = [], 0
    for r, length in zip(rollouts, lengths, strict=True):
        padded.append([*[None] * len(r.prompt.token_ids), *rows[begin : begin + length]])
        begin += length
    return padded


def _alternatives(ids_NK: Tensor, logprobs_NK: Tensor, rollouts: Sequence[Rollout], decode: Decode) -> dict[str, Any]:
    """The teacher's likeliest tokens, where they were asked for."""
    import pyarrow as pa

    @cache
    def text_of(token_id: int) -> str:
        return text_alone(token_id, decode)

    ids = ids_NK[:, :NUM_ALTERNATIVES].cpu().tolist()
    logprobs = logprobs_NK[:, :NUM_ALTERNATIVES].detach().float().cpu().tolist()
    asked = [bool(row) and row[0] > NOTHING for row in logprobs]
    columns = {
        "ids": ([row if was else None for row, was in zip(ids, asked, strict=True)], pa.int32()),
        "logprobs": ([row if was else None for row, was in zip(logprobs, asked, strict=True)], pa.float32()),
        "texts": ([[text_of(i) for i in r] if was else None for r, was in zip(ids, asked, strict=True)], pa.string()),
    }
    return {
        f"teacher_top_{name}": pa.array(_padded(rows, rollouts), pa.list_(pa.list_(kind)))
        for name, (rows, kind) in columns.items()
    }


def pieces(token_ids: Sequence[int], decode: Decode) -> list[str]:
    """Each token's part of the decoded text.  A character that several tokens make belongs to the last of them."""
    texts: list[str] = []
    begin, reached = 0, 0  # the text of token_ids[begin:reached] is out already; it is decoded again only as context
    for end in range(1, len(token_ids) + 1):
        told, text = decode(token_ids[begin:reached]), decode(token_ids[begin:end])
        if text.endswith(_UNFINISHED) and end - reached < _LONGEST and end < len(token_ids):
            texts.append("")
            continue
        texts.append(text[len(told) :])
        begin, reached = reached, end
    return texts


def text_alone(token_id: int, decode: Decode) -> str:
    """What the token adds to a text; a decoder may drop the space before a first token, so the second one counts."""
    once, twice = decode([token_id]), decode([token_id, token_id])
    return twice[len(once) :] if twice.startswith(once) else once
