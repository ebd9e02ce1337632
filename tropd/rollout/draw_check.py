"""Whether a server draws as requested: its texts against the trainer's own distributions.

A server with the right weights and the right log-probabilities may still draw at another temperature, take the
likeliest tokens or ignore seeds.  So the trainer scores some of the server's texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tropd.errors import EngineError
from tropd.model.forward import Forward, similar_lengths
from tropd.model.head import tiles
from tropd.objective.evidence import Needs
from tropd.rollout import draws
from tropd.rollout.engine import Engine
from tropd.rollout.jobs import ServedStudent, draw_after
from tropd.servers.pool import Pool
from tropd.types import Author, Completion, Prompt, Request, Rollout, Sampling, key_of

_NUM_DRAWS, _NUM_DRAWN_AGAIN = 24, 8
"""Single tokens that a server draws to show how it draws."""
MOST_TOKENS = 2048
"""Tokens that are scored per step or evaluation, in whole texts chosen at random."""
_TILE = 128
"""Tokens whose distributions exist at the same time, in several copies."""


@dataclass
class Drawn:
    """Tokens that were drawn, and the evidence for another way to draw them."""

    evidence: draws.Evidence = field(default_factory=dict)
    tokens: int = 0
    surprise: float = 0.0
    """Sum of -log p."""
    entropy: float = 0.0
    """Sum of the expected -log p."""


def read(forward: Forward, rollouts: Sequence[Rollout], sampling: Sampling, tokens_per_batch: int) -> Drawn:
    """Score the student's tokens in some of these rollouts, with its own forward pass."""
    drawn, chosen, number = Drawn(), [], 0
    for rollout in sorted(rollouts, key=lambda r: key_of(0, "draws", r.id)):
        if Author.STUDENT in rollout.authors and number < MOST_TOKENS:
            chosen.append(rollout)
            number += rollout.authors.count(Author.STUDENT)
    for group in similar_lengths([len(r.token_ids) for r in chosen], tokens_per_batch):
        _read(forward, [chosen[i] for i in group], sampling, drawn)
    return drawn


def _read(forward: Forward, rollouts: list[Rollout], sampling: Sampling, found: Drawn) -> None:
    hidden_NH = forward.measure(rollouts, Needs.HIDDEN).hidden_NH
    assert hidden_NH is not None, "hidden states were asked for"
    authors = [author for r in rollouts for author in r.authors[len(r.prompt.token_ids) :]]
    ids_N = torch.tensor([i for r in rollouts for i in r.response_ids], device=hidden_NH.device)
    own_N = torch.tensor(authors, device=hidden_NH.device) == Author.STUDENT
    hidden_NH, ids_N = hidden_NH[own_N], ids_N[own_N]
    for tile in tiles(len(ids_N), min(forward.tiling.tile_tokens, _TILE)):
        logprobs_CV = forward.full_logprobs(hidden_NH[tile], ids_N[tile])
        found.evidence = draws.total([found.evidence, draws.evidence(logprobs_CV, ids_N[tile], sampling)])
        found.tokens += len(logprobs_CV)
        found.surprise -= float(logprobs_CV.gather(1, ids_N[tile, None]).double().sum())
        found.entropy -= float((logprobs_CV.exp() * logprobs_CV.clamp_min(-1e4)).double().sum())


def alike(rollouts: Iterable[Rollout]) -> float:
    """Nats of evidence that the student's texts after one beginning are too much alike."""
    groups: dict[tuple[int, ...], list[tuple[tuple[int, ...], tuple[float, ...]]]] = {}
    for rollout in rollouts:
        if Author.STUDENT in rollout.authors:
            start = rollout.authors.index(Author.STUDENT)
            own = rollout.token_ids[start:], rollout.behavior_logprobs[start:]
            groups.setdefault(rollout.token_ids[:start], []).append(own)
    each = (draws.coincidence(*zip(*group, strict=True)) for group in groups.values() if len(group) > 1)
    return max(each, default=0.0)


def show_draws(
    pools: Mapping[str, Pool],
    text: Sequence[int],
    after_V: Tensor,
    gathered: dict[str, draws.Gathered],
    student: ServedStudent,
) -> None:
    """Have every server draw single tokens after a text, and refuse servers that draw wrongly."""
    for url, pool in pools.items():
        first = draw_after(pool, text, range(1, _NUM_DRAWS + 1), student)
        again = draw_after(pool, text, range(1, _NUM_DRAWN_AGAIN + 1), student)
        check_single(url, after_V, first, again, gathered.setdefault(url, draws.Gathered()))


def check_single(
    url: str, after_V: Tensor, first: Sequence[int], again: Sequence[int], gathered: draws.Gathered
) -> None:
    """Refuse a server by the single tokens that it drew after one text, each with another seed.  `again` repeats the
    first seeds; `gathered` is earlier evidence."""
    drawn_N = torch.tensor(first)
    found = draws.evidence(after_V.float().expand(len(first), -1), drawn_N)
    gathered.add({f"draws/student/{name}": nats for name, nats in found.items()})
    message = (
        f"{url} was asked for {len(first)} tokens after a known text, each with its own seed, and drew {first[:8]}..."
    )
    odds = -(len(first) - 1) * float(after_V[first[0]])
    if (objection := gathered.objection("student", draws.ENOUGH)) is not None:
        raise EngineError(f"{message} By these, and those before, {objection}")
    if len(set(first)) == 1 and odds > draws.ENOUGH:
        raise EngineError(f"{message} All are the same, against odds of {odds:.0f} nats. {draws.CURE}")
    others = sum(a != b for a, b in zip(first, again, strict=False))
    if 2 * others > len(again):
        raise EngineError(
            f"{message} With the first {len(again)} seeds it then drew {list(again)}: it ignores seeds, so a run could "
            f"not be repeated. {draws.CURE}"
        )


class Overheard(Engine):
    """An engine whose texts the trainer scores."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.heard: list[tuple[Request, Completion]] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        texts = self.engine.generate(requests)
        self.heard += zip(requests, texts, strict=True)
        return texts

    def sync(self, version: int) -> None:
        self.engine.sync(version)

    def close(self) -> None:
        self.engine.close()

    def check(self, forward: Forward, tokens_per_batch: int) -> None:
        """Refuse texts that were drawn in another way than requested."""
        for sampling in {request.sampling for request, _ in self.heard}:
            pairs = [pair for pair in self.heard if pair[0].sampling == sampling]
            rollouts = [_rollout(f"{n}", *pair) for n, pair in enumerate(pairs)]
            found = read(forward, rollouts, sampling, tokens_per_batch)
            if (how := draws.explained(found.evidence)) is not None:
                raise EngineError(
                    f"the answers of this evaluation were to be drawn with {sampling}, but {found.tokens} tokens of "
                    f"them look drawn {how} ({found.evidence[how]:.0f} nats of evidence), so its score is another "
                    f"student's. {draws.CURE}"
                )


def _rollout(name: str, request: Request, text: Completion) -> Rollout:
    given, new = len(request.token_ids), len(text.token_ids)
    return Rollout(
        id=name,
        prompt=Prompt(id=name, token_ids=request.token_ids),
        token_ids=request.token_ids + text.token_ids,
        authors=(Author.CONTEXT,) * given + (Author.STUDENT,) * new,
        behavior_logprobs=(0.0,) * (given + new),
    )
