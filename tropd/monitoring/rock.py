"""Types of tokens whose divergence stays high: "Rock Tokens" (arXiv:2605.09253).

    R(v) = mean KL at v * frequency of v

KL at a token is estimated by log pi_S - log pi_T of the token that the student wrote.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tropd.base.reading import check_file, refusing
from tropd.errors import CheckpointError, ConfigError, require
from tropd.monitoring.probe import Numbers, Probe, Sight
from tropd.objective.evidence import Needs
from tropd.objective.heard import as_heard
from tropd.types import Author

COMMON = 5
"""How many of the most frequent types the paper's code leaves out."""


@dataclass(frozen=True, kw_only=True)
class Type:
    """A type of tokens in the student's texts."""

    token_id: int
    count: int
    total: float
    """The sum of its KL."""

    @property
    def mean(self) -> float:
        return self.total / self.count


@dataclass(frozen=True, kw_only=True)
class Types:
    """All types of some texts, the highest R first."""

    types: Sequence[Type]
    num_tokens: int
    infinite: int
    """Tokens that the teacher finds impossible, which are not counted."""

    def common(self) -> set[int]:
        """The most frequent ones."""
        return {t.token_id for t in sorted(self.types, key=lambda t: (-t.count, t.token_id))[:COMMON]}

    def rock(self, number: int) -> list[int]:
        """The ids of the highest R without the most frequent ones; a type whose KL is not above 0 is none."""
        common = self.common()
        return [t.token_id for t in self.types if t.total > 0 and t.token_id not in common][:number]


def types_of(paths: Iterable[Path]) -> Types:
    """From saved rollouts."""
    require("pyarrow", "data", "reading saved rollouts")
    import pyarrow.parquet as pq

    counts: Counter[int] = Counter()
    totals: dict[int, float] = {}
    infinite = 0
    wanted = ("token_ids", "authors", "student_logprobs", "teacher_logprobs")
    for path in paths:
        check_file(path, CheckpointError)
        with refusing(lambda why, path=path: f"{path} cannot be read as saved rollouts: {why}.", CheckpointError):
            table = pq.read_table(path)
            if lacking := [name for name in wanted if name not in table.column_names]:
                raise ConfigError(f"{path} has no {lacking[0]}, so nothing is known of the divergence at its tokens.")
            rows = table.select(list(wanted)).to_pylist()
        for row in rows:
            for token_id, author, student, teacher in zip(*(row[name] for name in wanted), strict=True):
                if author != "student" or student is None or teacher is None:
                    continue
                if not math.isfinite(student - teacher):
                    infinite += 1
                    continue
                counts[token_id] += 1
                totals[token_id] = totals.get(token_id, 0.0) + student - teacher
    types = [Type(token_id=v, count=counts[v], total=totals[v]) for v in counts]
    return Types(
        types=sorted(types, key=lambda t: (-t.total, t.token_id)), num_tokens=counts.total(), infinite=infinite
    )


class Rock(Probe):
    """Of the types of tokens `ids`, such as `tropd inspect RUN --rock` finds:

    rock/kl         the mean KL where the student wrote one of them
    rock/others     the mean KL elsewhere
    rock/frequency  the share of the student's tokens that are one of them
    """

    name = "rock"
    needs = Needs.SAMPLED

    def __init__(self, ids: Sequence[int]) -> None:
        if not isinstance(ids, Sequence) or not ids or any(type(i) is not int or i < 0 for i in ids):
            raise ConfigError(f"probe 'rock' has ids = {ids!r}. Give a list of token ids, each at least 0.")
        self.ids = torch.tensor(sorted(set(ids)))

    def look(self, sight: Sight) -> Numbers:
        tokens = sight.tokens
        own_N = as_heard(tokens, [tokens.reader]).authors_N == Author.STUDENT
        kl_N = (sight.view.logprobs_N - tokens.teacher_logprobs_N)[own_N].cpu().double()
        rock_N = torch.isin(tokens.token_ids_N[own_N].cpu(), self.ids)
        known_N = ~kl_N.isinf()
        on_N, off_N = rock_N & known_N, ~rock_N & known_N
        return {
            "kl": (float(kl_N[on_N].sum()), int(on_N.sum())),
            "others": (float(kl_N[off_N].sum()), int(off_N.sum())),
            "frequency": (int(rock_N.sum()), len(rock_N)),
        }
