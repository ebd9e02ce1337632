"""Servers that lie plausibly: each answers whole, in the right shape, about the right tokens, and says what is not so.

A lie about rows is told by the server itself, so it is consistent; a lie about answers is told on the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.servers.mini import MiniServer
from tests.tiny import VOCAB, tiny_model

Rows = Callable[["Liar", list[int], Tensor], Tensor]
"""(server, token ids, true rows [T, V]) -> the rows that it tells; row t describes token t."""
Answer = Callable[[dict[str, Any]], None]
"""Changes one text of an answer."""


class Liar(MiniServer):
    """Lies about texts that it scores once it has scored `begins` requests; with `everywhere`, about its draws too.
    It tells the truth of the text that it `spares`, such as the one that is known to come with every request."""

    def __init__(
        self,
        folder: Path,
        *,
        rows: Rows | None = None,
        answers: Answer | None = None,
        begins: int = 0,
        everywhere: bool = False,
        spares: Sequence[int] = (),
        **options: Any,
    ) -> None:
        super().__init__(folder, **options)
        self.rows, self.answers, self.begins, self.everywhere = rows, answers, begins, everywhere
        self.scored, self.spared = 0, list(spares)
        self.before: list[tuple[list[int], Tensor]] = []

    @property
    def lies(self) -> bool:
        return self.scored > self.begins

    def true(self, ids: list[int]) -> Tensor:
        return MiniServer.logprobs(self, ids)

    def logprobs(self, ids: list[int]) -> Tensor:
        true_TV = self.true(ids)
        lies = self.rows is not None and self.lies and ids != self.spared
        told_TV = self.rows(self, ids, true_TV) if lies and self.rows is not None else true_TV
        self.before.append((ids, true_TV))
        return told_TV

    def drawn_from(self, ids: list[int]) -> Tensor:
        return self.rows(self, ids, self.true(ids)) if self.everywhere and self.rows is not None else self.true(ids)

    def _score(self, ids: list[int], rid: str, top_k: int) -> dict[str, Any]:
        self.scored += 1
        return super()._score(ids, rid, top_k)

    def completions(self, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        scores = body.get("prompt_logprobs") is not None
        self.scored += scores
        found = super().completions(body, request_id)
        if scores and self.answers is not None and self.lies:
            for choice in found["choices"]:
                if choice["prompt_token_ids"] != self.spared:
                    self.answers(choice)
        return found


def scaled(temperature: float) -> Rows:
    return lambda server, ids, rows_TV: (rows_TV / temperature).log_softmax(-1)


def times(factor: float) -> Rows:
    """Another logarithm: no distribution any more."""
    return lambda server, ids, rows_TV: rows_TV * factor


def with_token_before(server: Liar, ids: list[int], rows_TV: Tensor) -> Tensor:
    """A token at the beginning that the echo does not show."""
    return server.true([VOCAB - 4, *ids])[1:]


def without_beginning(server: Liar, ids: list[int], rows_TV: Tensor) -> Tensor:
    """A window of attention that is too short."""
    if len(ids) < 6:
        return rows_TV
    with torch.no_grad():
        windows = torch.tensor([ids[t - 4 : t] for t in range(4, len(ids))])
        return torch.cat([rows_TV[:4], server.model(windows).logits[:, -1].float().log_softmax(-1)])


def of_another_text(server: Liar, ids: list[int], rows_TV: Tensor) -> Tensor:
    """Of the last text that was as long."""
    return next((other_TV for other, other_TV in reversed(server.before) if len(other) == len(ids)), rows_TV.roll(3, 0))


def stale(server: Liar, ids: list[int], rows_TV: Tensor) -> Tensor:
    """Of the last text that began like this one."""
    same = (x_TV for other, x_TV in reversed(server.before) if other[:4] == ids[:4] and other != ids)
    cached = next(same, rows_TV)
    size = min(len(cached), len(ids))
    return torch.cat([cached[:size], rows_TV[size:]])


def of_model(seed: int) -> Rows:
    other = tiny_model(seed=seed, sharp=16.0)

    def rows(server: Liar, ids: list[int], rows_TV: Tensor) -> Tensor:
        with torch.no_grad():
            logits_TV = other(torch.tensor([ids])).logits[0].float()
        return torch.cat([rows_TV[:1], logits_TV.log_softmax(-1)[:-1]])

    return rows


def noisy(size: float) -> Rows:
    """The same noise in every row, as from weights that were read wrongly."""
    noise_V = size * torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    return lambda server, ids, rows_TV: (rows_TV + noise_V).log_softmax(-1)


def unsteady(server: Liar, ids: list[int], rows_TV: Tensor) -> Tensor:
    return (rows_TV + 0.5 * torch.randn_like(rows_TV)).log_softmax(-1)


def padded(share: float) -> Rows:
    """Mass on rows that stand for no token."""

    def rows(server: Liar, ids: list[int], rows_TV: Tensor) -> Tensor:
        padding = torch.full((len(rows_TV), 4), math.log(share / 4))
        return torch.cat([rows_TV + math.log1p(-share), padding], 1)

    return rows


def last_twice(server: Liar, ids: list[int], rows_TV: Tensor) -> Tensor:
    return torch.cat([rows_TV[:-1], rows_TV[-2:-1]])


ROWS: dict[str, Rows] = {
    "rows shifted by one": lambda server, ids, rows_TV: rows_TV.roll(1, 0),
    "rows shifted back": lambda server, ids, rows_TV: torch.cat([rows_TV[1:], rows_TV[-1:]]),
    "rows backwards": lambda server, ids, rows_TV: rows_TV.flip(0),
    "temperature 0.7": scaled(0.7),
    "temperature 2": scaled(2.0),
    "log2": times(1 / math.log(2)),
    "log10": times(1 / math.log(10)),
    "a token at the beginning": with_token_before,
    "a window of four tokens": without_beginning,
    "rows of another rollout": of_another_text,
    "stale prefix cache": stale,
    "weights of another model": of_model(9),
    "noise on the weights": noisy(0.4),
    "noise of every answer": unsteady,
    "mass on padded rows": padded(0.3),
    "last row twice": last_twice,
    "uniform rows": lambda server, ids, rows_TV: torch.zeros_like(rows_TV).log_softmax(-1),
    "the same row everywhere": lambda server, ids, rows_TV: rows_TV[-1:].expand_as(rows_TV),
    "clipped at -4": lambda server, ids, rows_TV: rows_TV.clamp_min(-4.0).log_softmax(-1),
    "rounded to whole nats": lambda server, ids, rows_TV: rows_TV.round().log_softmax(-1),
    "likely and unlikely exchanged": lambda server, ids, rows_TV: (-rows_TV).log_softmax(-1),
    "means over the text": lambda server, ids, rows_TV: (
        rows_TV.mean(0, keepdim=True).expand_as(rows_TV).log_softmax(-1)
    ),
}


def by_row(change: Callable[[dict[str, Any], str], dict[str, Any] | None]) -> Answer:
    """Of each position the entries by token, and the written token -> other entries, or None where they are changed."""

    def answer(choice: dict[str, Any]) -> None:
        ids, rows = choice["prompt_token_ids"], choice["prompt_logprobs"]
        for place in range(1, len(rows)):
            changed = change(rows[place], str(ids[place]))
            rows[place] = rows[place] if changed is None else changed

    return answer


def _top(row: dict[str, Any], written: str) -> list[str]:
    """The likeliest tokens, without the one that was written."""
    return sorted((token for token in row if token != written), key=lambda token: row[token]["rank"])


def of_logprobs(change: Callable[[float], float]) -> Answer:
    return by_row(lambda row, _: {i: {**entry, "logprob": change(entry["logprob"])} for i, entry in row.items()})


def fill_written(row: dict[str, Any], written: str) -> None:
    if row[written]["rank"] > 4:
        row[written]["logprob"] = -9999.0


def fill_tail(row: dict[str, Any], written: str) -> None:
    row[_top(row, written)[-1]]["logprob"] = -9999.0


def truncate(row: dict[str, Any], written: str) -> dict[str, Any]:
    return {token: entry for token, entry in row.items() if entry["rank"] <= 2 or token == written}


def renormalise(row: dict[str, Any], written: str) -> None:
    mass = math.log(math.fsum(math.exp(row[token]["logprob"]) for token in _top(row, written)))
    for token in _top(row, written):
        row[token]["logprob"] -= mass


def renormalise_with_tail(row: dict[str, Any], written: str) -> None:
    """To nine tenths, so that the written token fits beside them."""
    tops = _top(row, written)
    mass = math.log(math.fsum(math.exp(row[token]["logprob"]) for token in tops) / 0.9)
    for token in tops:
        row[token]["logprob"] -= mass


def sort_ids(row: dict[str, Any], written: str) -> dict[str, Any]:
    tops = _top(row, written)
    return {written: row[written]} | {new: row[old] for new, old in zip(sorted(tops, key=int), tops, strict=True)}


def next_ids(row: dict[str, Any], written: str) -> dict[str, Any]:
    tops = _top(row, written)
    others = [str((int(token) + 1) % VOCAB) for token in tops]
    free = [token for token in others if token != written]
    return {written: row[written]} | {new: row[old] for new, old in zip(free, tops, strict=False)}


def swap_columns(row: dict[str, Any], written: str) -> dict[str, Any]:
    first, last = _top(row, written)[0], _top(row, written)[-1]
    return row | {first: row[last], last: row[first]}


def likeliest_for_written(row: dict[str, Any], written: str) -> None:
    row[written]["logprob"] = row[_top(row, written)[-1]]["logprob"]


def written_at_half(row: dict[str, Any], written: str) -> None:
    """The written token at another temperature than the top-k."""
    if row[written]["rank"] > 4:
        row[written]["logprob"] *= 1.5


def echo_others(choice: dict[str, Any]) -> None:
    choice["prompt_token_ids"] = choice["prompt_token_ids"][::-1]


def lose_a_row(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"].pop(1)


def empty_a_row(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"][-1] = None


def add_up(choice: dict[str, Any]) -> None:
    """Log-probabilities of the text up to each token."""
    total = 0.0
    for place in range(1, len(choice["prompt_token_ids"])):
        entry = choice["prompt_logprobs"][place][str(choice["prompt_token_ids"][place])]
        total = entry["logprob"] = entry["logprob"] + total


ANSWERS: dict[str, Answer] = {
    "-9999 for rare tokens": by_row(fill_written),
    "-9999 in the top-k": by_row(fill_tail),
    "a shorter top-k": by_row(truncate),
    "a top-k that sums to 1": by_row(renormalise),
    "a top-k that sums to 0.9": by_row(renormalise_with_tail),
    "probabilities": of_logprobs(math.exp),
    "minus probabilities": of_logprobs(lambda x: -math.exp(x)),
    "negative log-probabilities": of_logprobs(lambda x: -x),
    "NaN": of_logprobs(lambda x: math.nan),
    "logits": of_logprobs(lambda x: x + 3.0),
    "log-probabilities halved": of_logprobs(lambda x: x / 2),
    "log-probabilities doubled": of_logprobs(lambda x: x * 2),
    "ids sorted": by_row(sort_ids),
    "ids off by one": by_row(next_ids),
    "columns swapped": by_row(swap_columns),
    "a likely token's for the written": by_row(likeliest_for_written),
    "the written token at another temperature": by_row(written_at_half),
    "echo of other ids": echo_others,
    "a row missing": lose_a_row,
    "a row empty": empty_a_row,
    "sums instead of terms": add_up,
}
LIES: dict[str, dict[str, Any]] = {name: {"rows": lie} for name, lie in ROWS.items()}
LIES |= {name: {"answers": lie} for name, lie in ANSWERS.items()}
