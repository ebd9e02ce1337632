"""What the sections of a run may not say together."""

from __future__ import annotations

import re
from urllib.parse import quote

from tropd.base.reading import check_path, printable
from tropd.briefings.briefing import AsStudent
from tropd.config.mixtures import check_mixtures
from tropd.config.models import ModelConfig, base_url
from tropd.config.settings import Settings
from tropd.errors import ConfigError
from tropd.objective.evidence import Needs
from tropd.types import READER


def check(run: Settings) -> None:
    updates = run.steps * run.optimizer.num_updates
    if run.optimizer.warmup_steps > updates:
        raise ConfigError(
            f"optimizer.warmup_steps = {run.optimizer.warmup_steps} was asked for, but the run has {updates} updates: "
            "its learning rate would never be reached. Give at most as many."
        )
    asking = (run.rollout, run.teacher, *run.teachers.values(), *run.readers.values())
    for asked in asking:
        variable = asked.server.api_key_env
        if variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            raise ConfigError(f"api_key_env is {printable(variable)!r}, but no variable is called that. Give its name.")
    for url in (
        u for asked in (run.rollout, run.teacher, *run.teachers.values(), *run.readers.values()) for u in asked.servers
    ):
        base_url(url)
    for name, path in _paths(run).items():
        if path is not None and not path.strip():
            raise ConfigError(f"{name} is empty. Name a file or a folder.")
        check_path(path or "", name)
    if run.optimizer.num_updates > run.rollout.num_prompts * run.rollout.num_rollouts:
        raise ConfigError(
            f"optimizer.num_updates = {run.optimizer.num_updates} shares of "
            f"{run.rollout.num_prompts * run.rollout.num_rollouts} rollouts would leave some without any."
        )
    if run.parallel.student == "sharded" and run.student.lora is not None:
        raise ConfigError(
            'parallel.student is "sharded", but the student has an adapter, which is small: only whole students '
            'are sharded. Set parallel.student = "replicated".'
        )
    if run.teachers or run.data.teacher_column is not None:
        _check_teachers(run)
    else:
        _check_teacher(run)
    check_mixtures(run)
    _check_readers(run)
    _check_bridges(run)


def check_policy(run: Settings, graded: bool) -> None:
    """Refuse before anything is loaded what a rollout policy could not do in this run; `graded`: it has a grader."""
    if run.policy.needs_grader and not graded and Needs.REWARD not in run.method.needs:  # else the method says so
        raise ConfigError(
            "the rollout policy lets a grader decide what it takes (such as phased with verified = true), but there "
            "is no grader. Set `grader`, or choose another policy."
        )
    run.policy.check(run.rollout.num_rollouts)
    if run.policy.oldest and run.data.streaming:
        raise ConfigError(
            "the rollout policy uses rollouts again (replay), whose prompts it looks up by their ids, but "
            "data.streaming is true and no prompt is kept. Set data.streaming = false, or choose another policy."
        )


def _paths(run: Settings) -> dict[str, str | None]:
    """Everything in a run that is the name of a file."""
    found = {"output": run.output, "rollout.weights_folder": run.rollout.weights_folder}
    models: dict[str, ModelConfig] = {"student": run.student, "teacher": run.teacher}
    several = {f"teachers.{name}": model for name, model in run.teachers.items()}
    several |= {f"readers.{name}": model for name, model in run.readers.items()}
    for whose, model in (models | several).items():
        found |= {f"{whose}.{name}": getattr(model, name) for name in ("path", "tokenizer", "gguf_file")}
    held_out = run.evaluation.data
    return found | {"data.path": run.data.path, "evaluation.data.path": held_out.path if held_out else None}


def _check_teacher(run: Settings) -> None:
    teacher = run.teacher
    teacher.check_follow(run.student)
    if teacher.only_writes:
        more = teacher.bridge or teacher.follows or teacher.score_cache or teacher.direction
        if more or not isinstance(teacher.briefing, AsStudent):
            raise ConfigError(
                "the teacher is a chat endpoint, which only writes: it has no tokenizer to bridge and no layers, "
                "follows nobody, scores nothing and gets the student's messages. Leave bridge, direction, follow, "
                "score_cache and briefing out of the section."
            )
    elif teacher.path in ("base", "start", "student") and teacher.servers and not teacher.follows:
        raise ConfigError(
            "teacher.servers names servers, but teacher.path does not say what they serve. Set it to the folder or "
            "hub id of that model: its tokenizer is compared, its weights are not read."
        )
    if teacher.chat is not None and not teacher.only_writes:
        raise ConfigError(
            "there is a section [teacher.chat], which is for a teacher that only writes, but nothing says where it is. "
            "Set teacher.servers, or leave the section out."
        )
    if not isinstance(teacher.briefing, AsStudent) and teacher.server.text == "chat":
        raise ConfigError(
            'teacher.server.text is "chat", whose messages are the student\'s, but the teacher is told more. Set '
            'teacher.server.text = "tokens", or leave the briefing out.'
        )
    if teacher.path == "student" and run.optimizer.num_updates > 1:
        raise ConfigError(
            f'teacher.path is "student", which changes with every update, but optimizer.num_updates is '
            f"{run.optimizer.num_updates}: what it said of a batch would be another's. Set it to 1, or teacher.path to "
            '"start".'
        )
    if teacher.is_own and teacher.servers:
        raise ConfigError(
            f"teacher.servers names servers, but teacher.path is {teacher.path}, a teacher of your own: they would "
            "never be asked. Leave teacher.servers out."
        )
    if teacher.knobs and not teacher.is_own:
        raise ConfigError(
            f"teacher.knobs has {', '.join(teacher.knobs)}, but teacher.path is {teacher.path}, which takes no knobs. "
            "They are for a teacher of your own, 'package.module:Class' or 'file.py:Class'."
        )
    if teacher.score_cache and not teacher.servers:
        raise ConfigError("teacher.score_cache keeps what servers say, but teacher.servers is empty. Leave it out.")
    if run.parallel.teacher == "sharded" and run.all_teachers["default"].is_student:
        raise ConfigError(
            f'parallel.teacher is "sharded", but teacher.path is "{teacher.path}": that teacher is the student, which '
            'every process holds. Set parallel.teacher = "replicated".'
        )
    if run.parallel.teacher == "sharded" and teacher.servers:
        raise ConfigError(
            'parallel.teacher is "sharded", but teacher.servers hold the teacher: no process here has a part of '
            "it. Leave parallel.teacher out."
        )


def _check_teachers(run: Settings) -> None:
    column = run.data.teacher_column
    if column is None:
        raise ConfigError(
            f"there are the teachers {', '.join(run.teachers)}, but nothing says which of them a prompt is for. "
            "Set data.teacher_column to the column that names it."
        )
    if not run.teachers:
        raise ConfigError(
            f"data.teacher_column is {column!r}, which asks for several teachers, but there is only [teacher]. "
            "Give each a section [teachers.NAME] with the name that the column has, or leave the column out."
        )
    for name in run.teachers:
        _check_name(name, column)
    if run.teacher != type(run.teacher)():
        raise ConfigError(
            f"there are the teachers {', '.join(run.teachers)}, and [teacher] beside them, which no prompt would "
            "reach. Move it to a section [teachers.NAME]."
        )
    if run.parallel.teacher == "sharded":
        raise ConfigError(
            'parallel.teacher is "sharded", but there are several teachers, which are asked different numbers of '
            'times by each process. Set parallel.teacher = "replicated", or serve them.'
        )
    for name in run.teachers:
        try:
            run.taught_by(name)
        except ConfigError as refusal:
            raise ConfigError(f"teacher {name!r}: {refusal}") from None


def _check_readers(run: Settings) -> None:
    if READER in run.readers:
        raise ConfigError('there is a section [readers.teacher], but the reader "teacher" has the section [teacher].')
    for name, reader in run.readers.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"reader {name[:40]!r} has no name of letters, digits and _. Give it one.")
        if reader.made_of is not None:
            continue
        if reader.path != READER:
            try:
                run.read_by(name)
            except ConfigError as refusal:
                raise ConfigError(f"reader {name!r}: {refusal}") from None
        elif reader.servers or reader.knobs or reader.score_cache or reader.follows:
            raise ConfigError(
                f'reader {name!r} has the path "teacher", the model of [teacher], so it has no servers, no knobs and '
                "no rule to follow the student of its own. Leave them out, or set its path."
            )


def _check_bridges(run: Settings) -> None:
    teachers = {f"teachers.{name}": x for name, x in run.teachers.items()} or {"teacher": run.teacher}
    for section, x in (teachers | {f"readers.{name}": x for name, x in run.readers.items()}).items():
        if x.bridge is not None and x.server.text == "chat":
            raise ConfigError(
                f'{section}.server.text is "chat", whose texts come in the student\'s tokens, but {section}.bridge is '
                f'for texts in the teacher\'s own. Set {section}.server.text = "tokens".'
            )
    sharing = [name for name, x in run.said_readers.items() if x.made_of is None and x.path == READER]
    own = [name for name in sharing if name in run.readers and run.readers[name].bridge is not None]
    if own:
        raise ConfigError(
            f"reader {own[0]!r} has a bridge, but it has the model of [teacher], and that one's tokenizer with it. "
            f"Take [readers.{own[0]}.bridge] out; the reader has the bridge of its teacher."
        )
    if sharing and any(x.bridge is not None for x in run.teachers.values()):
        raise ConfigError(
            f"reader {sharing[0]!r} reads as the teacher of each prompt, but some of these have a tokenizer of their "
            f"own, and a reader has one. Set readers.{sharing[0]}.path to a model."
        )


def _check_name(name: str, column: str) -> None:
    """It is written into records and, with the letters that files cannot have as %XX, into the names of files."""
    if not name.strip():
        raise ConfigError(
            f'there is a section [teachers."{name}"], whose name is empty. Give the teacher one that can be read, here '
            f"and in the column {column!r}."
        )
    in_files = len(quote(name, safe=""))
    if len(name) > 100 or in_files > 200:
        raise ConfigError(
            f"the teacher's name {name[:24]!r}... has {len(name)} characters, {in_files} in the names of files. Give "
            f"it at most 100, and 200 there, here and in the column {column!r}."
        )
