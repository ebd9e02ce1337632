"""An engine that writes given answers, for examples, tests and dry runs of a whole pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tropd.errors import EngineError
from tropd.rollout.engine import Engine
from tropd.types import Completion, Finish, Request


class ScriptedEngine(Engine):
    """Answers each request with `answers(request)`, followed by the request's first stop id if there is room."""

    def __init__(self, answers: Callable[[Request], Sequence[int]], *, logprob: float = 0.0, version: int = 0) -> None:
        self.answers = answers
        self.logprob = logprob
        """The reported log-probability of every written token; 0 is certainty."""
        self.version = version
        self.requests: list[Request] = []
        """All requests, in order."""
        self.closed = False

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        if self.closed:
            raise EngineError(f"{len(requests)} completions were asked of a closed engine. Make a new engine.")
        self.requests.extend(requests)
        return [self._complete(request) for request in requests]

    def sync(self, version: int) -> None:
        """Only note the version: a script has no weights."""
        self.version = version

    def close(self) -> None:
        self.closed = True

    def _complete(self, request: Request) -> Completion:
        written, finish = _cut(tuple(self.answers(request)), request)
        logprobs = (self.logprob,) * len(written)
        return Completion(
            token_ids=written,
            behavior_logprobs=logprobs,
            model_logprobs=logprobs,
            finish=finish,
            policy_version=(self.version, self.version),
        )


def _cut(script: tuple[int, ...], request: Request) -> tuple[tuple[int, ...], Finish]:
    """The part of the script that a sampler would keep, and why it ends there."""
    stops = [t for t, token in enumerate(script) if token in request.stop_ids]
    text = script[: stops[0] + 1] if stops else script + request.stop_ids[:1]
    kept = text[: request.max_new_tokens]
    return kept, Finish.STOP if len(kept) == len(text) else Finish.LENGTH
