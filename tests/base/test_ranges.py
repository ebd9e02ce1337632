"""Numbers out of range are refused by whatever makes them: a run file, a flag, Python."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from tyro.conf import AvoidSubcommands

import tropd
from tropd.base.ranges import Range, kinds_of
from tropd.cli.evaluate import Evaluation
from tropd.config.flags import read_flags
from tropd.config.run import Run
from tropd.config.tables import parts
from tropd.data.graders import Numeric
from tropd.distributed.launch_lines import Launch
from tropd.errors import ConfigError
from tropd.laboratory.exact import Setting
from tropd.laboratory.lab import Lab
from tropd.methods import METHODS, Method, TrOPD
from tropd.methods.knobs import field_docstrings
from tropd.methods.policies import RolloutPolicy
from tropd.objective.terms import Piece
from tropd.types import Sampling

BASE = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"path": "p"}}


def _below(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _below(child)


def _all_that_is_filled_in() -> list[type]:
    """Sections, methods, pieces of the algebra: everything whose numbers a user chooses."""
    for module in pkgutil.walk_packages(tropd.__path__, "tropd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    roots = (Run, Lab, Setting, Evaluation, Launch, Numeric, Sampling)
    found = {part for root in roots for part in parts(root)}
    found |= {c for base in (Piece, Method, RolloutPolicy) for c in _below(base)}
    return sorted((c for c in found if dataclasses.is_dataclass(c) and c.__module__.startswith("tropd.")), key=str)


def _number_fields() -> list[tuple[type, str, Range | None]]:
    rows = []
    for cls in _all_that_is_filled_in():
        hints = get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            kinds = [wanted for kind, wanted in kinds_of(hints[field.name]) if kind in (int, float)]
            rows += [(cls, field.name, wanted) for wanted in kinds[:1]]
    return rows


def test_every_number_that_a_user_chooses_has_a_range() -> None:
    rows = _number_fields()
    assert len(rows) > 100
    assert [f"{cls.__name__}.{name}" for cls, name, wanted in rows if wanted is None] == []


def test_every_class_with_ranges_checks_them_when_it_is_made() -> None:
    silent, rows = [], _number_fields()
    for cls, name, wanted in rows:
        numbers = {number for other, number, _ in rows if other is cls}
        for bad in (
            math.nan,
            "8",
            True,
            *((-(10**9),) if wanted not in (None, Range(), Range(unbounded=True)) else ()),
        ):
            missing = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]
            required = {field: 1 if field in numbers else None for field in missing}
            hint = str(get_type_hints(cls)[name])
            value = (bad, bad) if "tuple" in hint else bad
            if wanted == Range(at_most=0, unbounded=True) and bad == -(10**9):
                value = 10**9
            try:
                cls(**{**required, name: value})
            except ConfigError as error:
                if name not in str(error):
                    silent.append(f"{cls.__name__}.{name} = {value!r} is refused with: {error}")
            else:
                silent.append(f"{cls.__name__}.{name} = {value!r} passes")
    assert silent == []


def test_every_section_and_method_states_its_ranges_in_its_docstrings() -> None:
    missing = []
    for cls, name, wanted in _number_fields():
        if issubclass(cls, Piece) or cls in (Numeric,) or issubclass(cls, RolloutPolicy):
            continue
        home = next(c for c in cls.__mro__ if name in inspect.get_annotations(c))
        said = field_docstrings(home).get(name, "").lower()
        if str(wanted).lower() not in said:
            missing.append(f"{home.__name__}.{name} does not say: {wanted}")
    assert missing == []


CASES: dict[str, dict[str, Any]] = {
    "optimizer.max_gradient_norm = -1": {"optimizer": {"max_gradient_norm": -1.0}},
    "optimizer.max_gradient_norm = 0": {"optimizer": {"max_gradient_norm": 0.0}},
    "optimizer.max_gradient_norm = nan": {"optimizer": {"max_gradient_norm": math.nan}},
    "optimizer.epsilon = 0": {"optimizer": {"epsilon": 0.0}},
    "optimizer.epsilon = inf": {"optimizer": {"epsilon": math.inf}},
    "optimizer.betas = 1": {"optimizer": {"betas": [0.9, 1.0]}},
    "optimizer.betas = -0.1": {"optimizer": {"betas": [-0.1, 0.9]}},
    "optimizer.weight_decay = -0.1": {"optimizer": {"weight_decay": -0.1}},
    "optimizer.weight_decay = nan": {"optimizer": {"weight_decay": math.nan}},
    "optimizer.weight_decay = 20": {"optimizer": {"weight_decay": 20.0, "learning_rate": 0.1}},
    "optimizer.learning_rate = 5": {"optimizer": {"learning_rate": 5.0}},
    "optimizer.warmup_steps = -1": {"optimizer": {"warmup_steps": -1}},
    "optimizer.warmup_steps = 201": {"optimizer": {"warmup_steps": 201}},
    "method.beta = -0.5": {"method": {"beta": -0.5}},
    "method.prefix_share = 1.5": {"method": {"prefix_share": 1.5}},
    "method.prefix_keep = -1": {"method": {"prefix_keep": -1}},
    "longest prefix goes from 7": {"method": {"prefix": {"start": 7.0}}},
    "method.prefix.until = 0": {"method": {"prefix": {"until": 0.0}}},
    "method.temperature = nan": {"method": {"name": "gkd", "temperature": math.nan}},
    "rollout.save_every = -1": {"rollout": {"save_every": -1}},
    "rollout.num_prompts = 0": {"rollout": {"num_prompts": 0}},
    "rollout.num_prompts = 1000000000": {"rollout": {"num_prompts": 10**9}},
    "rollout.sampling.temperature = -1": {"rollout": {"sampling": {"temperature": -1.0}}},
    "rollout.sampling.top_p = 0": {"rollout": {"sampling": {"top_p": 0.0}}},
    "rollout.server.deadline_seconds = inf": {"rollout": {"server": {"deadline_seconds": math.inf}}},
    "evaluation.every = 0": {"evaluation": {"every": 0}},
    "evaluation.pass_k = 0": {"evaluation": {"pass_k": [0]}},
    "evaluation.correct_from = nan": {"evaluation": {"correct_from": math.nan}},
    "checkpoint.every = 0": {"checkpoint": {"every": 0}},
    "alarms.mismatch_nats = nan": {"alarms": {"mismatch_nats": math.nan}},
    "student.lora.rank = 0": {"student": {"path": "s", "lora": {"rank": 0}}},
    "student.lora.dropout = 1": {"student": {"path": "s", "lora": {"dropout": 1.0}}},
    "parallel.timeout_minutes = inf": {"parallel": {"timeout_minutes": math.inf}},
    "data.limit = 0": {"data": {"path": "p", "limit": 0}},
    "tokens_per_micro_batch = 0": {"tokens_per_micro_batch": 0},
    "tile_vocab = -4": {"tile_vocab": -4},
    "seed = -1": {"seed": -1},
    "steps = 1267650600228229401496703205376": {"steps": 2**100},
    "output is empty": {"output": " "},
}


@pytest.mark.parametrize("said", CASES)
def test_a_run_file_with_a_number_out_of_range_is_refused_with_the_whole_path(said: str) -> None:
    start, _, number = said.partition(" = ")
    with pytest.raises(ConfigError) as refused:
        Run.from_dict({**BASE, **CASES[said]}, "run.toml")
    assert start in str(refused.value) and number.split(".")[0] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_flag_with_a_number_out_of_range_is_refused_with_the_whole_path(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.from_dict(BASE, "run.toml")
    for flag, value, said in (
        (
            "--optimizer.max-gradient-norm",
            "-1",
            "optimizer.max_gradient_norm = -1.0 was asked for, but",
        ),
        ("--method.prefix.until", "7", "method.prefix.until = 7.0 was asked for, but it must be in (0, 1]"),
        ("--evaluation.sampling.temperature", "nan", "evaluation.sampling.temperature = nan was asked for"),
        ("--steps", "0", "steps = 0 was asked for, but it must be at least 1."),
    ):
        with pytest.raises(ConfigError) as refused:
            read_flags(AvoidSubcommands[Run], [flag, value], "tropd train RUN.toml", default=run)
        assert str(refused.value).startswith(said)
    assert capsys.readouterr() == ("", "")


def test_what_is_no_number_is_refused_in_python_too() -> None:
    for bad in (True, 2.0, "8", None):
        with pytest.raises(ConfigError, match="method.top_k = .* must be a whole number, at least 1"):
            TrOPD(top_k=bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"\(401 characters\) was asked for"):
        TrOPD(beta=10**400)


def test_infinity_is_a_value_where_the_docstring_says_what_it_does() -> None:
    run = Run.from_dict({**BASE, "optimizer": {"max_gradient_norm": math.inf}}, "run.toml")
    assert run.optimizer.max_gradient_norm == math.inf


def test_the_defaults_of_every_method_and_section_are_in_their_ranges() -> None:
    for name in METHODS:
        Run.from_dict({**BASE, "method": {"name": name}}, "run.toml")


def test_a_range_says_itself_in_plain_words() -> None:
    said = {
        "at least 1": Range(at_least=1),
        "above 0": Range(above=0),
        "in (0, 1]": Range(above=0, at_most=1),
        "in [0, 0.5)": Range(at_least=0, below=0.5),
        "at most 0": Range(at_most=0),
        "any finite number": Range(),
    }
    assert {text: str(wanted) for text, wanted in said.items()} == {text: text for text in said}


def test_a_comparison_with_a_number_out_of_range_is_refused(tmp_path: Path) -> None:
    from tropd.laboratory.lab import load_lab

    lab = tmp_path / "lab.toml"
    lab.write_text('output = "x"\ntestbeds = ["embedded/nano"]\nlearning_rates = [nan]\n[methods.a]\nname = "opd"\n')
    with pytest.raises(ConfigError, match="learning_rates = nan was asked for"):
        load_lab(lab)


@pytest.mark.parametrize(
    "numbers", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 1.5}]
)
def test_a_sampling_that_describes_no_distribution_cannot_be_made(numbers: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"sampling.{next(iter(numbers))} = "):
        Sampling(**numbers)  # type: ignore[arg-type]


def test_an_adapter_wider_than_the_student_is_refused_before_it_is_made() -> None:
    from tests.tiny import tiny_model
    from tropd.config.models import LoraConfig
    from tropd.model.loading import add_adapter

    with pytest.raises(
        ConfigError, match="rank = 1000000000 was asked for, but the student's widest matrix has rank 64"
    ):
        add_adapter(tiny_model(width=64), LoraConfig(rank=10**9), seed=0)
