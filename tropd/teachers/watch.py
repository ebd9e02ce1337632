"""Checks during a run that a teacher's servers still answer as they did at its start.

After every batch each server that took part scores texts again that it wrote at the start, as if they were rollouts.
One of the batch's rollouts is scored again too, cut short and in another place of the request.  A server that failed
and came back, or is new, is examined as at the start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from tropd.errors import ServerGarbled, ServerUnavailable
from tropd.servers.answers import Scored
from tropd.teachers.audit import Known, audit, examine, refuse
from tropd.teachers.gaps import gap_of, part
from tropd.teachers.questions import Questions
from tropd.types import Rollout, key_of

log = logging.getLogger("tropd.servers")
_PATIENCE = 20.0
"""Seconds to wait for one of several servers; after that the others continue."""
Ask = Callable[[Sequence[str], Sequence[tuple[int, ...]], int, int, bool], list[Scored]]
"""(servers, texts, first token to score, top-k, whether texts come before the canary) -> scores."""


class Watch:
    """Examines servers at the start and after every batch, and refuses them if they fail."""

    def __init__(self, questions: Questions, ask: Ask, reference: Known | None = None) -> None:
        self.questions, self.ask, self.reference = questions, ask, reference
        self.settings = questions.settings
        """The settings for requests to one server."""
        if len(questions.urls) > 1:
            patience = min(_PATIENCE, self.settings.deadline_seconds)
            self.settings = replace(self.settings, deadline_seconds=patience)
        findings, self.known = audit(questions, reference)
        self.notes = refuse(findings)
        self._num_batches = 0

    def check(
        self, urls: Iterable[str], returned: set[str], batch: Sequence[tuple[Rollout, Scored]], top_k: int
    ) -> None:
        """Check `urls`, which took part in a batch.  `returned` are those that had failed before; it is emptied."""
        for url in urls:
            try:
                self._check(url, url in returned or url not in self.known)
            except ServerUnavailable as error:
                if len(self.questions.urls) < 2:
                    raise
                self.known.pop(url, None)
                log.warning("%s It is examined when it answers again.", error)
            returned.discard(url)
        if batch:
            self._check_one(batch, top_k)

    def _check(self, url: str, anew: bool) -> None:
        known = self.known.get(url)
        if known is not None and known.texts:
            found = self.ask([url], known.texts, known.first, max(self.questions.top_k, 1), False)
            self._compare(f"{url}: texts that it wrote and scored before", known.rows, found, ("then", "now"))
        if anew:
            questions = replace(self.questions, urls=(url,), settings=self.settings)
            findings, fresh = examine(questions, self.reference)
            for note in refuse(findings):
                log.warning("%s", note)
            self.known.setdefault(url, fresh)

    def _check_one(self, batch: Sequence[tuple[Rollout, Scored]], top_k: int) -> None:
        self._num_batches += 1
        rollout, scored = batch[key_of(0, "again", self._num_batches) % len(batch)]
        stop = 1 + key_of(0, "again", rollout.id, self._num_batches) % len(scored.logprobs)
        first = len(rollout.prompt.token_ids)
        found = self.ask((), [rollout.token_ids[: first + stop]], first, top_k, True)
        said = f"the first {stop} of {len(scored.logprobs)} tokens of rollout {rollout.id}, asked about again"
        self._compare(said, [part(scored, 0, stop)], found, ("first", "again"))

    def _compare(self, said: str, expected: list[Scored], found: list[Scored], names: tuple[str, str]) -> None:
        gap = gap_of(expected, found, self.questions.settings.nats_for(), names)
        if gap.objection:
            raise ServerGarbled(
                f"{said}, have other log-probabilities now: {gap.objection}\nLook for a server that was started again "
                "with other weights or settings, for its prefix cache, and for answers that are mixed up."
            )
