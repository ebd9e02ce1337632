"""What briefings say of responses: the grader's words, and the other responses to the same prompt."""

from __future__ import annotations

from typing import Any

import pytest

from tropd.briefings.asked import Asked, Response
from tropd.briefings.briefing import WithFeedback, WithPeers, read_briefing
from tropd.errors import ConfigError
from tropd.types import Message

TURNS = (Message(role="system", content="s"), Message(role="user", content="q {x}"))
SHORT = WithPeers(template="{prompt}|{peers}", success="+{response}", failure="-{response}")


def asked(own: str, *peers: tuple[str, float | None], words: str | None = None, answer: str | None = None) -> Asked:
    responses = tuple(Response(text=text, reward=reward) for text, reward in peers)
    return Asked(messages=TURNS, response=Response(text=own, words=words), peers=responses, answer=answer)


def said(briefing: Any, of: Asked) -> str | None:
    messages = briefing.messages(of)
    assert messages is None or messages[:-1] == TURNS[:-1]
    return None if messages is None else messages[-1].content


def test_peers_are_two_successes_and_a_failure_in_the_order_round_the_group() -> None:
    of = asked("me", ("a", 0.0), ("b", 1.0), ("c", 0.5), ("d", 2.0), ("e", 1.0))
    assert said(SHORT, of) == "q {x}|+b\n\n+d\n\n-a"
    default = said(WithPeers(), of)
    assert default and default.startswith("q {x}\n\n") and "Correctly solve the original question" in default
    assert [default.index(text) for text in ("\nb\n", "\nd\n", "\na\n")] == sorted(
        default.index(text) for text in ("\nb\n", "\nd\n", "\na\n")
    )


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_peers_never_contain_the_response_itself(reward: float) -> None:
    assert said(SHORT, asked("me", ("me", reward), (" me\n", reward), ("", reward))) is None
    assert said(SHORT, asked("me", ("me", 1.0), ("you", reward))) == f"q {{x}}|{'-+'[int(reward)]}you"


def test_equal_peers_count_once() -> None:
    assert said(SHORT, asked("me", ("b", 1.0), ("b ", 1.0), ("c", 1.0))) == "q {x}|+b\n\n+c"


@pytest.mark.parametrize(
    ("kinds", "right", "wrong"),
    [({"failures": 0}, "q {x}|+b", None), ({"successes": 0}, None, "q {x}|-b"), ({}, "q {x}|+b", "q {x}|-b")],
)
def test_each_kind_of_peers_can_be_asked_for_alone(kinds: Any, right: str | None, wrong: str | None) -> None:
    briefing = WithPeers(template="{prompt}|{peers}", success="+{response}", failure="-{response}", **kinds)
    assert said(briefing, asked("me", ("b", 1.0))) == right
    assert said(briefing, asked("me", ("b", 0.0))) == wrong


def test_the_threshold_says_what_a_success_is() -> None:
    briefing = WithPeers(template="{prompt}|{peers}", success="+{response}", failure="-{response}", threshold=0.5)
    assert said(briefing, asked("me", ("a", 0.4), ("b", 0.5))) == "q {x}|+b\n\n-a"


def test_feedback_is_the_graders_words_and_nothing_without_them() -> None:
    briefing = WithFeedback(template="{prompt}|{feedback}|{response}")
    assert said(briefing, asked("me", words="off by one", answer="4")) == "q {x}|off by one|me"
    assert said(briefing, asked("me")) is None and said(briefing, asked("me", words=" ")) is None


def test_the_expected_answer_is_told_only_if_asked_for() -> None:
    of = asked("me", words="The answer is wrong.", answer="4")
    assert "4" not in str(said(WithFeedback(), of))
    assert "The answer is wrong. The expected answer is 4." in str(said(WithFeedback(answer=True), of))


@pytest.mark.parametrize(
    ("briefing", "says"),
    [
        ({"kind": "feedback", "template": "{prompt}"}, r"no \{feedback\}"),
        ({"kind": "feedback", "template": "{prompt} {feedback} {answer}"}, r"the field \{answer\}"),
        ({"kind": "peers", "successes": 0, "failures": 0}, "no peer is told"),
        ({"kind": "peers", "successes": -1}, "no number of things"),
        ({"kind": "peers", "threshold": "x"}, "no number"),
        ({"kind": "peers", "template": "{prompt} {successes}"}, r"only \{prompt\} and \{peers\}"),
        ({"kind": "peers", "success": "right"}, r"no \{response\}"),
        ({"kind": "peers", "failure": "{response.text}"}, r"only \{response\}"),
    ],
)
def test_what_a_briefing_of_responses_may_not_say(briefing: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_briefing(briefing)
