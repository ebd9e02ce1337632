"""What readers that are made of others, and directions that are added to layers, may not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tropd.base.names import shown
from tropd.base.reading import nearest
from tropd.config.models import ReaderConfig, TeacherConfig
from tropd.config.settings import Settings
from tropd.errors import ConfigError
from tropd.methods.base import NamedMethod
from tropd.types import READER


def check_mixtures(run: Settings) -> None:
    """Refuse a reader that can be made of nothing, before anything is loaded."""
    readers = run.all_readers
    prescribed = run.method.readers.get(READER)
    if prescribed is not None and (prescribed.mean, prescribed.steered) != (None, None):
        raise ConfigError(
            f'method {run.method.name!r} makes the reader "teacher" of others, but that one has a model. Let its terms '
            "read a reader of another name."
        )
    for name, reader in readers.items():
        try:
            mixture = reader.made_of
        except ConfigError as refusal:
            raise ConfigError(f"reader {name!r}: {refusal}") from None
        if mixture is None:
            continue
        if replace(reader, mean=None, steered=None) != ReaderConfig():
            raise ConfigError(
                f"reader {name!r} is made of {_list(mixture.readers)}, so it has no model, no briefing and no other "
                "setting of its own. Leave them out, or give them to a reader that it is made of."
            )
        for part in mixture.readers:
            _check_part(run, name, part, readers)
    for name in readers:
        if circle := _circle(name, readers):
            way = " of ".join(map(repr, circle))
            raise ConfigError(f"reader {way}: it is made of itself. Take one of them out of `mean` or `steered`.")
    _check_directions(run)


def unread(run: Settings) -> list[str]:
    """The readers with a section that neither a piece of the method nor another reader reads.  Refused where the name
    is a slip: nearly that of one that is read, which the method prescribes and which has no section."""
    parts = {part for x in run.all_readers.values() if x.made_of for part in x.made_of.readers}
    read = dict.fromkeys([*run.method.objective.readers, *parts])
    idle = [name for name in run.readers if name not in read]
    for name in idle:
        if near := nearest(name, [x for x in read if x in run.all_readers and x not in run.readers]):
            raise ConfigError(
                f"there is a section [readers.{name}], but method {shown(run.method.name)!r} reads no such reader"
                f"{near}; it reads {', '.join(read)}. Correct the name, or take the section out."
            )
    return idle


def unread_said(run: Settings) -> list[str]:
    """A note on them, if there are any."""
    if not (idle := unread(run)):
        return []
    measured = f"only `tropd evaluate --briefed --reader {idle[0]}` would"
    return [f"method {shown(run.method.name)!r} reads nothing of {', '.join(map(repr, idle))}: {measured}."]


def _check_part(run: Settings, name: str, part: str, readers: Mapping[str, ReaderConfig]) -> None:
    if part != READER and part not in readers:
        if isinstance(run.method, NamedMethod):  # not imported yet: it may bring that reader
            return
        there = [READER, *(x for x in readers if x != name)]
        raise ConfigError(
            f"reader {name!r} is made of reader {part!r}{nearest(part, there)}, and the run has only "
            f"{', '.join(there)}. Add a section [readers.{part}]."
        )
    if part == READER and run.teachers:
        raise ConfigError(
            f'reader {name!r} is made of "teacher", but each prompt has its own of the teachers '
            f"{', '.join(run.teachers)}. Make it of readers with a model: [readers.NAME] with a path."
        )
    shared = part == READER or readers[part].path == READER
    model = run.all_teachers.get("default", TeacherConfig()) if shared else readers[part]
    if model.bridge is not None:
        raise ConfigError(
            f"reader {name!r} is made of reader {part!r}, which has a tokenizer of its own, and only the "
            "log-probabilities of written tokens cross a bridge. Make it of readers that share the student's tokenizer."
        )
    if model.servers:
        raise ConfigError(
            f"reader {name!r} is made of reader {part!r}, which is on a server, and servers give no hidden states. "
            "Leave its servers out: the model is then in this process."
        )


def _circle(start: str, readers: Mapping[str, ReaderConfig]) -> list[str]:
    """A way from a reader back to itself, if there is one."""
    ways, seen = [[start]], set[str]()
    while ways:
        way = ways.pop()
        mixture = readers[way[-1]].made_of if way[-1] in readers else None
        for part in mixture.readers if mixture else ():
            if part == start:
                return [*way, start]
            if part not in seen:
                seen.add(part)
                ways.append([*way, part])
    return []


def _check_directions(run: Settings) -> None:
    for whose, x in {**{f"teacher {n!r}": x for n, x in run.all_teachers.items()}, **_readers(run)}.items():
        if x.direction is None:
            continue
        shares = whose.startswith("reader") and x.path == READER
        model = run.all_teachers.get("default") if shares else x
        if model is None or model.servers or model.is_own or (shares and model.bridge):
            raise ConfigError(
                f"{whose} has a direction, which is added to a layer of a model in this process, but its model is on a "
                "server, code of your own, behind a bridge, or one of several teachers. Set its path to a model, "
                "without servers."
            )
        if run.parallel.teacher == "sharded":
            raise ConfigError(
                f'{whose} has a direction, but parallel.teacher is "sharded". Set parallel.teacher = "replicated".'
            )


def _readers(run: Settings) -> dict[str, TeacherConfig]:
    return {f"reader {name!r}": x for name, x in run.all_readers.items()}


def _list(names: tuple[str, ...]) -> str:
    return " and ".join(map(repr, names))
