"""Malformed inputs end in one sentence that names what is wrong: no traceback, no hang, nothing accepted in silence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.malformed import GROUPS, all_cases, world
from tests.malformed.case import Case, run_all
from tropd.data import template

QUICK = {"run files": 7, "data": 11, "models": 17, "folders": 23}
"""Every how many inputs of a group one is tried in the quick test: primes, so that no kind is always left out."""
BOMBS = ("chat template, loops in loops", "chat template, texts that double", "chat template, a power")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.write(tmp_path_factory.mktemp("malformed"))


def wrong(cases: list[Case], folder: Path) -> list[str]:
    outcomes = run_all(cases, folder)
    return [f"{o.verdict}: {o.case.name}\n{o.said[-600:]}" for o in outcomes if o.verdict != "fine"]


def test_there_are_hundreds_of_malformed_inputs_and_each_has_its_own_name(base: Path) -> None:
    names = Counter(case.name for case in all_cases(base))
    assert len(names) > 700 and names.most_common(1)[0][1] == 1


@pytest.mark.parametrize("group", GROUPS)
def test_a_sample_of_malformed_inputs_ends_in_a_sentence_each(group: str, base: Path, tmp_path: Path) -> None:
    cases = [case for case in GROUPS[group].cases(base) if case.name not in BOMBS][:: QUICK[group]]
    assert wrong(cases, tmp_path) == []


def test_a_chat_template_that_never_ends_is_ended(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 1.0)  # commands are forked from here
    cases = [case for case in all_cases(base) if case.name == BOMBS[0]]
    assert len(cases) == 1 and wrong(cases, tmp_path) == []


@pytest.mark.slow
def test_every_malformed_input_ends_in_a_sentence(base: Path, tmp_path: Path) -> None:
    assert wrong(list(all_cases(base)), tmp_path) == []
