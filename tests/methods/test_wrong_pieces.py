"""An objective of one's own that is put together wrongly is refused where it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tropd import Method, Objective, Term
from tropd.errors import ConfigError
from tropd.objective import PolicyGradient
from tropd.objective.rewards import Clip, LogRatio, chain
from tropd.objective.selectors import STUDENT

WRONG: Any = 3
CLASSES: Any = {cls.__name__: cls for cls in (PolicyGradient, LogRatio, Clip)}
"""Where an object is asked for."""


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Objective(), "an objective is made of None. Give it terms"),
        (lambda: Objective(WRONG), "an objective is made of 3. Give it terms"),
        (
            lambda: Objective(Term("a", WRONG, PolicyGradient())),
            "term 'a': where is a int. Give",
        ),
        (lambda: Term("a", STUDENT, WRONG), "term 'a': loss is a int. Give an object of a TokenLoss"),
        (lambda: Term("a", STUDENT, CLASSES["PolicyGradient"]), "loss is the class PolicyGradient. Give"),
        (lambda: PolicyGradient(WRONG), "the reward of a policy gradient is a int. Give an object of a Reward"),
        (lambda: PolicyGradient(CLASSES["LogRatio"]), "the reward of a policy gradient is the class LogRatio"),
        (lambda: chain(LogRatio(), CLASSES["Clip"]), "a link of a chain of rewards is the class Clip"),
        (lambda: None, "method Mine: its objective is None. Give an Objective"),
    ],
)
def test_a_method_with_a_wrong_piece_is_told_which(make: Callable[[], Any], says: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        @property
        def objective(self) -> Objective:
            return make()

    with pytest.raises(ConfigError, match=says):
        Mine()
