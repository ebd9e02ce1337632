"""The examples in the docstrings of the algebra run as they stand, and every piece has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from typing import Any

import pytest

import tropd.objective
from tropd.objective import examples
from tropd.objective.divergence import DivergenceLoss
from tropd.objective.targets import Target
from tropd.objective.terms import Measure, Piece, Reward, Selector, TokenLoss

MODULES = [importlib.import_module(f"tropd.objective.{m.name}") for m in pkgutil.iter_modules(tropd.objective.__path__)]
ABSTRACT = {Piece, Measure, Selector, Reward, TokenLoss, Target, DivergenceLoss}
OTHERS = ("Objective", "Schedule", "Term", "distillation_loss", "some_tokens")
PASTED: dict[str, Any] = {name: getattr(examples, name) for name in examples.__all__}
"""What a reader has after `from tropd.objective.examples import *`."""


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__()))


PIECES = sorted(
    (cls for cls in subclasses(Piece) - ABSTRACT if cls.__module__.startswith("tropd.objective")),
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_examples_print_what_they_show(module: Any) -> None:
    found = doctest.testmod(module, globs=PASTED)
    assert found.failed == 0


@pytest.mark.parametrize("piece", [*PIECES, *map(PASTED.get, OTHERS)], ids=lambda piece: piece.__name__)
def test_every_piece_of_the_algebra_has_an_example(piece: Any) -> None:
    assert doctest.DocTestParser().get_examples(piece.__doc__ or "")
