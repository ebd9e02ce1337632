"""A comparison: every method at every learning rate on every testbed with every seed.

testbeds = ["nano-hard"]
learning_rates = [3e-4, 1e-3]
seeds = [0, 1, 2, 3, 4]

[methods.OPD]
name = "opd"

[methods."TrOPD, beta 1"]
name = "tropd"
beta = 1.0

[runs."TrOPD, beta 1"]              # only if its run differs from the others' in more than the method
teacher = { path = "start", briefing = { kind = "column", column = "solution" } }
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

from tropd.base.ranges import Count, Positive, PositiveShare, Ranged, Whole
from tropd.base.reading import nearest, read_toml
from tropd.config.methods import MethodTable, located_method, read_method
from tropd.config.run import Run
from tropd.config.tables import read
from tropd.errors import ConfigError
from tropd.testbeds import TESTBEDS, Testbed

EMBEDDED = "embedded/"


@dataclass(frozen=True, kw_only=True)
class Lab(Ranged):
    """A comparison, as in its TOML file."""

    section = ""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    output: str
    """The comparison's folder: results.jsonl, tables.md and the figures."""
    methods: dict[str, MethodTable]
    """The methods to compare, by their names in the tables."""
    run: dict[str, Any] = field(default_factory=dict)
    """Sections of a run file that every run has beside what the testbed says: { teacher = { path = "start" } }."""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sections of the runs of one method, by its name in the tables: they stand in place of those in `run`."""
    testbeds: tuple[str, ...]
    """Names from tropd.testbeds, "embedded/NAME" for models that come with the package (the same for every seed), or
    run files (.toml) with your own models."""
    learning_rates: tuple[PositiveShare, ...] = ()
    """Every method is tried at each rate; if empty, the testbed's. Each in (0, 1]."""
    seeds: tuple[Whole, ...] = (0, 1, 2, 3, 4)
    """Each makes another teacher and student, the same for every method. Each at least 0."""
    budgets: dict[Literal["tokens", "seconds"], Positive] = field(default_factory=dict)
    """Give every method as many steps as so many tokens trained allow, or so many CPU seconds; with both, every trial
    is run for each. Each above 0."""
    controls: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By a method's name, the methods that it has to beat: the same budget without its idea."""
    baseline: str = ""
    """The method that the others are compared with; by default the first."""
    steps: Count | None = None
    """By default the testbed's. At least 1."""
    num_prompts: Count | None = None
    """Per step; by default the testbed's. At least 1."""
    num_rollouts: Count = 1
    """At least 1."""
    warmup_steps: Whole = 10
    """At least 0."""
    num_evaluations: Count = 2
    """Spread evenly over the run, in addition to the one before it. At least 1."""
    num_samples: Count = 2
    """Answers to each held-out prompt in an evaluation, at temperature 1. At least 1."""
    save_rollouts: Whole = 0
    """Keep the rollouts of every n-th step for `tropd report`; 0 keeps none. At least 0."""
    pairs: str = "runs/pairs"
    """The folder for the models that testbeds make; comparisons may share it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        empty = [name for name in ("methods", "testbeds", "seeds") if not getattr(self, name)]
        if empty:
            raise ConfigError(f"a comparison was asked for without any {empty[0]}. Give at least one.")
        for name in ("testbeds", "seeds", "learning_rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} = {list(values)} says something twice. Give each once.")
        if self.baseline and self.baseline not in self.methods:
            raise ConfigError(f"baseline {self.baseline!r} is none of the methods: {', '.join(self.methods)}.")
        named = [name for arm, others in self.controls.items() for name in (arm, *others)]
        if unknown := [name for name in named if name not in self.methods]:
            raise ConfigError(f"controls name {unknown[0]!r}, none of the methods{nearest(unknown[0], self.methods)}.")
        if unknown := [name for name in self.runs if name not in self.methods]:
            raise ConfigError(f"runs.{unknown[0]} is for none of the methods: {', '.join(self.methods)}.")
        for testbed in self.testbeds:
            _check_testbed(testbed)

    @property
    def compared_with(self) -> str:
        return self.baseline or next(iter(self.methods))


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One training run of a comparison."""

    testbed: str
    method: str
    learning_rate: float
    seed: int
    budget: Literal["", "tokens", "seconds"] = ""
    steps: int | None = None
    """As many as the budget allows; None: as many as the comparison or the testbed says."""

    @property
    def key(self) -> str:
        of = f" | {self.budget}" if self.budget else ""
        return f"{self.testbed} | {self.method} | {self.learning_rate:g} | {self.seed}{of}"

    @property
    def folder(self) -> str:
        """A name that is valid on any file system."""
        return file_name(self.key)


def file_name(text: str) -> str:
    """The name without characters that a file system may refuse."""
    return re.sub(r"[^\w.=+-]+", "_", text)


def trials(lab: Lab) -> Iterator[Trial]:
    """The trials in the order of their start: whole seeds first, so that an interrupted comparison is a smaller one."""
    for testbed in lab.testbeds:
        for seed in lab.seeds:
            for rate, budget in product(rates_of(lab, testbed), lab.budgets or ("",)):
                for method in lab.methods:
                    yield Trial(testbed=testbed, method=method, learning_rate=rate, seed=seed, budget=budget)


def rates_of(lab: Lab, testbed: str) -> tuple[float, ...]:
    if lab.learning_rates:
        return lab.learning_rates
    if testbed.endswith(".toml"):
        return (Run.load(Path(testbed)).optimizer.learning_rate,)
    return (bed_of(testbed).learning_rate,)


def steps_of(lab: Lab, testbed: str) -> int:
    """How many steps a run has where no budget says it."""
    if lab.steps is not None:
        return lab.steps
    return Run.load(Path(testbed)).steps if testbed.endswith(".toml") else bed_of(testbed).steps


def bed_of(testbed: str) -> Testbed:
    """The testbed of a name that is no run file."""
    return TESTBEDS[testbed.removeprefix(EMBEDDED)]


def load_lab(path: Path) -> Lab:
    """Read a comparison; errors name the path of the wrong key."""
    if not os.path.lexists(path):
        raise ConfigError(f"there is no file {path}. Name the TOML file of a comparison.")
    values = read_toml(path)
    values.setdefault("output", f"runs/{path.stem}")
    lab = read(Lab, values, str(path))
    methods = {name: read_method(m, str(path), f"methods.{name}") for name, m in lab.methods.items()}
    return replace(lab, methods={name: located_method(method, [path.parent]) for name, method in methods.items()})


def _check_testbed(name: str) -> None:
    if name.endswith(".toml"):
        if not Path(name).exists():
            raise ConfigError(f"testbed {name!r} is a run file that does not exist.")
        run = Run.load(Path(name))
        if run.evaluation.data is None or not (run.evaluation.grader or run.grader):
            raise ConfigError(
                f"testbed {name!r} says nothing to compare by: give the run file held-out prompts, [evaluation.data], "
                "and a grader."
            )
    elif name.removeprefix(EMBEDDED) not in TESTBEDS:
        raise ConfigError(
            f"there is no testbed {name!r}{nearest(name, TESTBEDS)}. Known: {', '.join(TESTBEDS)}; or name a run file "
            "that ends in .toml."
        )
