"""An endless, resumable order of prompts.

    PromptStream       prompts in memory, in a new order each visit
    LazyPromptStream   rows rendered when they are needed, in the data set's order

`next(n)` gives n pairs (prompt, visit); visit counts the epochs, so f"{visit}/{prompt.id}/{sample}" names a rollout
once in a run.  Every epoch holds every prompt once, and a batch may cross from one epoch into the next.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tropd.config.stages import DataConfig
from tropd.data.briefer import Briefer
from tropd.data.prompts import PromptReader, RowReport
from tropd.data.rows import Table
from tropd.errors import DataError
from tropd.types import Prompt, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptStream:
    """Epoch e is the prompts sorted by hash(seed, e, id): no state but a position, and no global generator."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError("a stream of prompts was asked for, but there are none. Give at least one prompt.")
        self._prompts = {prompt.id: prompt for prompt in prompts}
        if len(self._prompts) < len(prompts):
            again, times = Counter(prompt.id for prompt in prompts).most_common(1)[0]
            raise DataError(f"{times} prompts have the id '{again}', so their rollouts would too. Make the ids unique.")
        self.seed = seed
        self.fingerprint = _fingerprint([name_of(self._prompts[id]) for id in sorted(self._prompts)])
        self._start_epoch(0)

    def __len__(self) -> int:
        """Prompts in an epoch."""
        return len(self._prompts)

    def find(self, name: str) -> Prompt | None:
        """The prompt with an id."""
        return self._prompts.get(name)

    def next(self, num_prompts: int) -> list[tuple[Prompt, int]]:
        """The next prompts, each with its visit (the epoch, from 0)."""
        _check_count(num_prompts)
        drawn: list[tuple[Prompt, int]] = []
        while len(drawn) < num_prompts:
            if self._position == len(self._order):
                self._start_epoch(self._visit + 1)
            end = self._position + num_prompts - len(drawn)
            drawn += [(self._prompts[name], self._visit) for name in self._order[self._position : end]]
            self._position = min(end, len(self._order))
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "visit": self._visit,
            "position": self._position,
            "num_prompts": len(self._prompts),
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; a state of other prompts or another seed is refused."""
        current = self.state_dict()
        _check_keys(state, current)
        for key in ("num_prompts", "fingerprint", "seed"):
            if state[key] != current[key]:
                raise DataError(
                    f"the saved stream has {key} {state[key]}, this one has {current[key]}: continuing would show "
                    "other prompts, or tell readers something else. Resume with the data set, the sources of "
                    "briefings and the seed of the saved run, or start a new run."
                )
        if not 0 <= state["position"] <= len(self._prompts) or state["visit"] < 0:
            raise DataError(f"the saved stream is at {state['position']} of visit {state['visit']}, which is nowhere.")
        self._start_epoch(state["visit"])
        self._position = state["position"]

    def _start_epoch(self, visit: int) -> None:
        self._visit, self._position = visit, 0
        self._order = sorted(self._prompts, key=lambda name: (key_of(self.seed, "prompt", visit, name), name))


class LazyPromptStream:
    """Renders rows when they are needed.  Restoring renders the current epoch's rows again, up to the cursor."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        table: Table | None = None,
        briefer: Briefer | None = None,
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._first_report: RowReport | None = None
        self._reader = PromptReader(config, tokenizer, table, briefer)
        self._start_epoch(0)

    @property
    def report(self) -> RowReport:
        """The report on the rows of the first epoch, as far as it has been read."""
        return self._first_report or self._reader.report

    def next(self, num_prompts: int) -> list[tuple[Prompt, int]]:
        """The next prompts, each with its visit (the epoch, from 0)."""
        _check_count(num_prompts)
        return [self._draw() for _ in range(num_prompts)]

    def state_dict(self) -> dict[str, Any]:
        report = None if self._first_report is None else asdict(self._first_report)
        return {
            "visit": self._visit,
            "position": self._position,
            "fingerprint": self._fingerprint,
            "report": report,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; rows that changed before the cursor are refused."""
        _check_keys(state, self.state_dict())
        self._start_epoch(state["visit"])
        self._first_report = None if state["report"] is None else _report_of(state["report"])
        while self._position < state["position"] and (prompt := next(self._prompts, None)) is not None:
            self._pass(prompt)
        if self._position != state["position"] or self._fingerprint != state["fingerprint"]:
            raise DataError(
                f"the saved stream had read {state['position']} prompts that are not the first ones of "
                f"{self._reader.table.source}. Resume with the data set of the saved run, or start a new run."
            )

    def _draw(self) -> tuple[Prompt, int]:
        prompt = next(self._prompts, None)
        if prompt is None or self._config.on_bad_row == "refuse":
            self._reader.check()
        if prompt is None:
            self._first_report = self.report
            self._start_epoch(self._visit + 1)
            return self._draw()
        self._pass(prompt)
        return prompt, self._visit

    def _pass(self, prompt: Prompt) -> None:
        self._position += 1
        self._fingerprint = _fingerprint([self._fingerprint, name_of(prompt)])

    def _start_epoch(self, visit: int) -> None:
        self._visit, self._position, self._fingerprint = visit, 0, ""
        self._reader = PromptReader(self._config, self._tokenizer, self._reader.table, self._reader.briefer)
        self._prompts: Iterator[Prompt] = iter(self._reader)


def name_of(prompt: Prompt) -> str:
    """A hash of all that a run reads of a prompt: an id may stay the same when its row changes."""
    read = (prompt.token_ids, prompt.answer, prompt.teacher, prompt.response_ids)
    columns = json.dumps(dict(prompt.columns), sort_keys=True, default=lambda value: type(value).__name__)
    told = [repr(sorted(prompt.told.items()))] if prompt.told else []
    return _fingerprint([prompt.id, repr(read), columns, *told])


def _fingerprint(parts: Sequence[str]) -> str:
    text = "\0".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _report_of(state: Mapping[str, Any]) -> RowReport:
    examples = {reason: tuple(rows) for reason, rows in state["examples"].items()}
    return RowReport(**{**state, "examples": examples, "warnings": tuple(state["warnings"])})


def _check_count(num_prompts: int) -> None:
    if num_prompts < 1:
        raise DataError(f"{num_prompts} prompts were asked for. Ask for at least one.")


def _check_keys(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if missing := sorted(set(own) - set(state)):
        raise DataError(f"the saved state of the prompts lacks {', '.join(missing)}. It was made by another stream.")
