"""Every method says what it is and where that comes from."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from tropd.errors import ConfigError
from tropd.methods import METHODS, find_method
from tropd.methods.extras import EXTRAS
from tropd.methods.ideas import IDEAS
from tropd.methods.knobs import field_docstrings

FORMULA = re.compile(r"log pi_|KL\(|sum_| = ")
SOURCE = re.compile(r"\b(paper|code|inferred|open|TRL|verl|NeMo-RL|prime-rl|reproduction|benchmark)\b")
OUR_OWN = {
    "OPD.estimator",
    "FullFKL.path",
    "MiniLLM.single_step",
    "REOPOLD.floor",
    "ManyFaces.support",
    "OPDPlus.divergence",
    "TrOPDPlusAOPD.tropd",
}
"""Choices among definitions that this library offers: no source has such a knob."""


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_the_docstring_holds_an_equation_and_the_paper_an_address(cls):
    assert FORMULA.search(inspect.cleandoc(cls.__doc__))
    assert re.fullmatch(r"\d{4}\.\d{5}|https://\S+", cls.paper)
    assert cls.summary and "\n" not in cls.summary and not cls.summary.endswith(".")


@pytest.mark.parametrize("cls", [*METHODS.values(), *EXTRAS.values()], ids=[*METHODS, *(f"+{x}" for x in EXTRAS)])
def test_every_method_and_extra_says_which_idea_it_belongs_to(cls):
    assert vars(cls).get("idea") in IDEAS, f"give {cls.__name__} an idea of tropd/methods/ideas.py, as it has a summary"
    assert cls.summary


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_every_knob_says_what_it_does_and_where_its_default_comes_from(cls):
    said = field_docstrings(cls)
    for knob in dataclasses.fields(cls):
        if knob.name in ("name", "plus"):
            continue
        assert said.get(knob.name, "").endswith("."), f"{cls.__name__}.{knob.name} has no docstring"
        if f"{cls.__name__}.{knob.name}" not in OUR_OWN:
            assert SOURCE.search(said[knob.name]), f"{cls.__name__}.{knob.name}: no source in {said[knob.name]!r}"


def test_the_knobs_without_a_source_exist():
    named = {f"{cls.__name__}.{f.name}" for cls in METHODS.values() for f in dataclasses.fields(cls)}
    assert named >= OUR_OWN


def test_every_file_of_a_method_is_in_the_list():
    in_files = {f.stem for f in Path(inspect.getfile(METHODS["opd"])).parent.glob("*.py")}
    other = {
        "__init__",
        "adaptive_horizon",
        "additions",
        "agreement_stop",
        "base",
        "controls",
        "decoding",
        "describe",
        "drafts",
        "explain",
        "extras",
        "guidance",
        "horizon",
        "packed",
        "phased",
        "ideas",
        "knobs",
        "joint",
        "policies",
        "replay",
        "stacked",
    }
    assert {inspect.getmodule(cls).__name__.split(".")[-1] for cls in METHODS.values()} == in_files - other


def test_the_list_and_the_names_agree():
    assert {name: cls().name for name, cls in METHODS.items()} == {name: name for name in METHODS}


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_a_method_fits_on_a_screen_or_two(cls):
    assert len(Path(inspect.getfile(cls)).read_text().splitlines()) <= 140


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_a_method_cannot_be_changed_after_it_is_made(cls):
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().name = "other"


def test_a_near_miss_is_named():
    with pytest.raises(ConfigError, match="Did you mean 'tropd'"):
        find_method("trpod")
