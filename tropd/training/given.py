"""Python objects in place of names in a run file: models, a teacher, a method, a grader, prompts.

run.toml marks these as given, so that `resume` can ask for them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd.base.names import name_of
from tropd.config.models import GIVEN
from tropd.config.run import Run
from tropd.config.settings import Part
from tropd.config.stages import DataConfig
from tropd.data.graders import Grader, check_grader
from tropd.data.rows import Table, table_of
from tropd.errors import ConfigError
from tropd.model.loading import as_pair, source_of
from tropd.teachers.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Given:
    """The objects that a run uses instead of reading files.  Models come with their tokenizers."""

    student: tuple[Any, Any] | None = None
    teacher: Teacher | tuple[Any, Any] | None = None
    grader: Grader | None = None
    prompts: Table | None = None
    held_out: Table | None = None


NOTHING_GIVEN = Given()


def take(run: Run, objects: Mapping[Part, Any]) -> tuple[Run, Given]:
    """The run as its file will describe it, and the objects."""
    objects = {part: value for part, value in objects.items() if value is not None}
    changes: dict[str, Any] = {}
    given: dict[Part, Any] = {}
    if "student" in objects:
        given["student"], changes["student"] = _student(run, objects["student"])
    if "teacher" in objects:
        given["teacher"], changes["teacher"] = _teacher(run, objects["teacher"])
    _check_apart(given)
    if "method" in objects:
        changes["method"] = objects["method"]
    if "grader" in objects:
        grader, changes["grader"] = _grader(objects["grader"])
        if changes["grader"].endswith(GIVEN):
            given["grader"] = grader
    for part, section in (("prompts", run.data), ("held_out", run.evaluation.data or run.data)):
        if part in objects:
            table, data = _prompts(section, objects[part], part)
            changes |= {"data": data} if part == "prompts" else {"evaluation": _with_data(run, data)}
            given |= {} if table is None else {part: table}
    run = dataclasses.replace(run, **changes)
    run = run.imported()
    parts: list[Any] = [*given, *(["method"] if run.method.name.endswith(GIVEN) else [])]
    return dataclasses.replace(run, given=tuple(parts)), Given(**given)


def take_again(run: Run, directory: Path, objects: Mapping[Part, Any]) -> tuple[Run, Given]:
    """The same for a resumed run, which must get the objects of its start."""
    there = [part for part, value in objects.items() if value is not None]
    if missing := [part for part in run.given if part not in there]:
        again = ", ".join(f"{part}=..." for part in missing)
        raise ConfigError(
            f"{directory} was given its {' and '.join(missing)} in Python, which no file holds. Go on with "
            f"tropd.resume({str(directory)!r}, {again})."
        )
    if extra := [part for part in there if part not in run.given]:
        raise ConfigError(f"{directory} has its {' and '.join(extra)} in run.toml, and goes on with that: give none.")
    new, given = take(run, objects)
    if "grader" in run.given and not isinstance(objects["grader"], str):
        given = dataclasses.replace(given, grader=objects["grader"])  # whatever its name is by now
    if named := [part for part in run.given if part != "method" and getattr(given, part) is None]:
        raise ConfigError(
            f"{directory} was given its {' and '.join(named)} as an object in Python. Give such an object again, not a "
            "name or a path."
        )
    new = dataclasses.replace(run, method=new.method, rollout=new.rollout)
    if new.fingerprint() != run.fingerprint():
        raise ConfigError(f"{directory} was begun with another method than {new.method}. Give that with its knobs.")
    return new, given


def _student(run: Run, value: Any) -> tuple[tuple[Any, Any], Any]:
    model, tokenizer = as_pair(value, "student")
    if hasattr(model, "peft_config"):
        raise ConfigError("student: the model has an adapter already. Give its base, and a [student.lora] section.")
    frozen = sum(not parameter.requires_grad for parameter in model.parameters())
    if frozen and run.student.lora is None:
        raise ConfigError(
            f"student: {frozen} of the model's tensors are frozen, but all of them would be trained. Say so with "
            "model.requires_grad_(True), or train an adapter with a [student.lora] section."
        )
    path = source_of(model) or run.student.path
    own = source_of(tokenizer)
    config = dataclasses.replace(run.student, path=path or GIVEN, tokenizer=own if own != path else None)
    return (model, tokenizer), config


def _check_apart(given: Mapping[Part, Any]) -> None:
    """The teacher stays as it is while the student is trained, so they share no weights."""
    pairs = [given.get("student"), given.get("teacher")]
    models = [pair[0] for pair in pairs if isinstance(pair, tuple)]
    if len(models) == 2 and not {*map(id, models[0].parameters())}.isdisjoint(map(id, models[1].parameters())):
        raise ConfigError(
            "student and teacher are one model, or share weights. Give another model, or copy.deepcopy(model), as one."
        )


def _teacher(run: Run, value: Any) -> tuple[Any, Any]:
    if run.teachers:
        raise ConfigError(f"a teacher was given, but the run has {', '.join(run.teachers)}. Leave [teachers] out.")
    if isinstance(value, type) and issubclass(value, Teacher):
        name = value.__name__
        raise ConfigError(f"teacher: the class {name} was given. Give an object of it: {name}(...).")
    if not isinstance(value, Teacher):
        value = as_pair(value, "teacher")
    return value, dataclasses.replace(run.teacher, path=GIVEN)


def _grader(value: Any) -> tuple[Any, str]:
    if isinstance(value, str):
        return None, value
    name = getattr(value, "__qualname__", type(value).__qualname__).rpartition(".")[2]
    return check_grader(value, name), name_of(value) or f"{name} {GIVEN}"


def _prompts(section: DataConfig, value: Any, part: str) -> tuple[Table | None, DataConfig]:
    if isinstance(value, DataConfig):
        return None, value
    if isinstance(value, str | Path):
        return None, dataclasses.replace(section, path=str(value))
    return table_of(value, part), dataclasses.replace(section, path=GIVEN)


def _with_data(run: Run, data: DataConfig) -> Any:
    return dataclasses.replace(run.evaluation, data=data)
