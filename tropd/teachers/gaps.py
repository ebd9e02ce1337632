"""How much two answers about the same tokens differ, and when that is too much.

mean    nats per token, of the written tokens or of the likeliest ones, whichever are further apart
far     how many tokens are off by ten times what the mean may be
place   where several texts are compared token by token: the place at which they are furthest apart on average
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tropd.servers.answers import Scored

_FEW = 16
"""Fewer tokens count as this many, because a single token in half precision may be off by more."""
_FAR, _FAR_SHARE = 10.0, 0.01
_PLACE, _FEWEST_TEXTS = 5.0, 4


@dataclass(frozen=True, kw_only=True)
class Gap:
    mean: float
    most: float
    objection: str
    """Empty if the gap is small enough; else both answers side by side."""


def gap_of(expected: Sequence[Scored], found: Sequence[Scored], nats: float, names: tuple[str, str]) -> Gap:
    """`names` are the sources of the answers; `nats` is the largest allowed mean."""
    rows = [_rows(a, b) for a, b in zip(expected, found, strict=True)]
    written = [own for text in rows for own, _ in text]
    likely = [x for text in rows for _, xs in text for x in xs]
    each = [max(own, *xs) if xs else own for text in rows for own, xs in text]
    mean, most = max(_mean(written), _mean(likely)), max(each, default=0.0)
    far = sum(x > _FAR * nats for x in each)
    place = _worst_place([[own for own, _ in text] for text in rows])
    reasons = [
        (not mean <= nats, f"{mean:.3g} nats per token, at most {nats:g} are allowed"),
        (far > max(1, _FAR_SHARE * len(each)), f"{far} of {len(each)} tokens are more than {_FAR * nats:g} nats off"),
        (place[1] > _PLACE * nats, f"{place[1]:.3g} nats at token {place[0]} of {len(rows)} texts"),
    ]
    too_far = [said for is_so, said in reasons if is_so]
    if not too_far:
        return Gap(mean=mean, most=most, objection="")
    text, token = max(
        ((n, t) for n, row in enumerate(rows) for t in range(len(row))), key=lambda at: _whole(rows[at[0]][at[1]])
    )
    both = (part(scores[text], token, token + 4) for scores in (expected, found))
    sides = "".join(f"\n  {name} {shown(row)}" for name, row in zip(names, both, strict=True))
    return Gap(mean=mean, most=most, objection=f"{'; '.join(too_far)}. From token {token} on:{sides}")


def shown(scored: Scored) -> str:
    """The first few numbers, and the likeliest tokens of the first row."""
    logprobs = ", ".join(f"{x:.4f}" for x in scored.logprobs[:4])
    top = zip(scored.topk_ids_TK[:1], scored.topk_logprobs_TK[:1], strict=True)
    likely = ["; ".join(f"{i}: {x:.4f}" for i, x in list(zip(*row, strict=True))[:3]) for row in top]
    return f"{logprobs}, ..." + (f" (likeliest {likely[0]})" if likely and likely[0] else "")


def part(scored: Scored, start: int, stop: int) -> Scored:
    return Scored(
        logprobs=scored.logprobs[start:stop],
        topk_ids_TK=scored.topk_ids_TK[start:stop],
        topk_logprobs_TK=scored.topk_logprobs_TK[start:stop],
    )


def _rows(a: Scored, b: Scored) -> list[tuple[float, list[float]]]:
    """Per token: the gap of the written token, and the gaps of the likeliest tokens of either side."""
    assert len(a.logprobs) == len(b.logprobs), "answers about the same tokens are compared"
    tops = zip(a.topk_ids_TK, a.topk_logprobs_TK, b.topk_ids_TK, b.topk_logprobs_TK, strict=True)
    return [(abs(x - y), _likely(*top)) for x, y, top in zip(a.logprobs, b.logprobs, tops, strict=True)]


def _whole(gap: tuple[float, list[float]]) -> float:
    return gap[0] + sum(gap[1]) / max(len(gap[1]), 1)


def _likely(
    a_ids: Sequence[int], a_logprobs: Sequence[float], b_ids: Sequence[int], b_logprobs: Sequence[float]
) -> list[float]:
    """Gaps of the likeliest tokens.  A token that only one side lists is at most as likely as the other side's last."""
    a, b = dict(zip(a_ids, a_logprobs, strict=True)), dict(zip(b_ids, b_logprobs, strict=True))
    if not a or not b:
        return []
    ends = a_logprobs[-1], b_logprobs[-1]
    both = [abs(x - b[i]) if i in b else max(0.0, x - ends[1]) for i, x in a.items()]
    return both + [max(0.0, x - ends[0]) for i, x in b.items() if i not in a]


def _mean(gaps: Sequence[float]) -> float:
    return sum(gaps) / max(len(gaps), _FEW)


def _worst_place(texts: list[list[float]]) -> tuple[int, float]:
    """(place from the start, mean gap of the texts there); none if texts are few or differ in length."""
    if len(texts) < _FEWEST_TEXTS or len({len(text) for text in texts}) > 1:
        return 0, 0.0
    means = [sum(column) / len(texts) for column in zip(*texts, strict=True)]
    return max(enumerate(means), key=lambda pair: pair[1], default=(0, 0.0))
