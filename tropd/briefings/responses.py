"""Briefings that speak of responses: the grader's words on the one that is read, and the others to the same prompt."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Literal

from tropd.briefings.asked import (
    PROMPT,
    Asked,
    Briefing,
    Facts,
    Messages,
    Response,
    check_counts,
    check_switch,
    check_template,
)
from tropd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WithFeedback(Briefing):
    """What the grader said of the very response that is read; nothing where it said nothing."""

    kind: Literal["feedback"] = "feedback"
    template: str = (
        "{prompt}\n\nAn earlier attempt to answer this was checked. The check says:\n\n{feedback}\n\n"
        "Take this into account, and now give a correct answer to the original question."
    )
    """The last turn of the user: {prompt} is what was asked, {feedback} what the grader said, {response} the response;
    a brace is {{ or }}.  The default has the sense of SDPO's."""
    answer: bool = False
    """Also tell the expected answer, where the data set has one."""
    needs: ClassVar[Facts] = Facts.RESPONSE | Facts.WORDS
    needs_template: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_switch(self, "answer")
        check_template(self, "template", (PROMPT, "feedback"), ("response",))

    def messages(self, asked: Asked) -> Messages | None:
        response = asked.response
        if response is None or not (response.words or "").strip():
            return None
        expected = f" The expected answer is {asked.answer}." if self.answer and asked.answer is not None else ""
        return asked.last_turn(self.template, feedback=f"{response.words}{expected}", response=response.text)


@dataclass(frozen=True, kw_only=True)
class WithPeers(Briefing):
    """Other responses to the same prompt, some that succeeded and some that failed; never the response itself.

    The nearest ones after the response are taken, round the group, so that they do not depend on micro-batches.
    """

    kind: Literal["peers"] = "peers"
    successes: int = 2
    """How many that succeeded.  (Multi-Rollout OPD: 2) At least 0."""
    failures: int = 1
    """How many that failed.  (Multi-Rollout OPD: 1) At least 0."""
    threshold: float = 1.0
    """The least reward of a success.  (Multi-Rollout OPD: 1)"""
    template: str = "{prompt}\n\n{peers}\n\nCorrectly solve the original question, in your own words."
    """The last turn of the user: {prompt} is what was asked, {peers} the other responses; a brace is {{ or }}."""
    success: str = "Here is a solution that was checked and is correct:\n\n{response}"
    """How one is introduced that succeeded."""
    failure: str = "Here is an attempt that was checked and is wrong. Do not repeat its mistake:\n\n{response}"
    """How one is introduced that failed."""
    needs: ClassVar[Facts] = Facts.RESPONSE | Facts.REWARD | Facts.GROUP
    needs_template: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "successes", "failures")
        if not self.successes + self.failures:
            raise ConfigError("briefing.successes and briefing.failures are 0, so no peer is told. Ask for one.")
        if (
            isinstance(self.threshold, bool)
            or not isinstance(self.threshold, int | float)
            or not isfinite(self.threshold)
        ):
            raise ConfigError(f"briefing.threshold is {self.threshold!r}, which is no number. Give a reward.")
        check_template(self, "template", (PROMPT, "peers"))
        for name in ("success", "failure"):
            check_template(self, name, ("response",))

    def messages(self, asked: Asked) -> Messages | None:
        own = "" if asked.response is None else asked.response.text.strip()
        others: dict[str, Response] = {}
        for peer in asked.peers:
            if (text := peer.text.strip()) not in ("", own):
                others.setdefault(text, peer)
        right = [text for text, peer in others.items() if (peer.reward or 0.0) >= self.threshold][: self.successes]
        wrong = [text for text, peer in others.items() if (peer.reward or 0.0) < self.threshold][: self.failures]
        if not right and not wrong:
            return None
        told = [self.success.format(response=text) for text in right]
        told += [self.failure.format(response=text) for text in wrong]
        return asked.last_turn(self.template, peers="\n\n".join(told))
