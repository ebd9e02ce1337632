"""Names of code of your own: "package.module:Name", "file.py:name" or "folder/file.py:name".

located(name, folders)   the same name, so that it is found again from anywhere: a file of yours by its whole path
find(name, what)         the object behind it
name_of(object)          the name by which another process finds it, if there is one
Own(name, knobs)         one as a run file has it; `make` makes the object, and no code runs before

The folder of the run file and the current folder are searched before installed packages.  sys.path stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TypeVar

from tropd.base.reading import first_line, nearest, shortened
from tropd.errors import ConfigError, TropdError

T = TypeVar("T")

_NAME = re.compile(r"(?P<place>.+\.py|[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<attribute>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")
_READ: set[str] = set()
"""Modules that are single files, by names made of their paths and contents."""
_HOMES: dict[str, Path] = {}
"""Modules that were found in a folder of the user, by that folder: another folder may have a module of that name."""


def is_name(text: str) -> bool:
    return len(text) <= 4096 and _NAME.fullmatch(text) is not None and not Path(text).exists()


def shown(name: str) -> str:
    """For people to read: a file without its folder."""
    return name.rsplit("/", 1)[-1] if is_name(name) else name


def located(name: str, folders: Sequence[Path] = ()) -> str:
    """The name as it is found from anywhere: a file in one of the folders, or in the current one, by its whole path.  A
    name that is found in none of them stays as it is: it may be an installed package's."""
    if not is_name(name):
        return name
    place, _, attribute = name.rpartition(":")
    is_file = place.endswith(".py")
    stem = place.removesuffix(".py") if is_file else place.replace(".", "/")
    for folder in (*folders, Path.cwd()):
        for path in (f"{stem}.py",) if is_file else (f"{stem}.py", f"{stem}/__init__.py"):
            whole = folder / Path(path).expanduser()
            if whole.is_file():
                return f"{whole.resolve()}:{attribute}"
    return name


def find(name: str, what: str, error: type[TropdError] = ConfigError) -> Any:
    """The object behind a name, or what an installed package offers by it.  `what` is method, teacher, policy, ..."""
    said = f"{what} '{shortened(name)}'"
    if not is_name(name) and name in (others := offered(several(what))):
        name = others[name].value
    if not is_name(name):
        raise error(f"{said} is no name. Give one of your own as 'package.module:name' or 'file.py:name'.")
    place, _, attribute = located(name).rpartition(":")
    module = _read_file(Path(place), said, error) if place.endswith(".py") else _import(place, said, error)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            there = [key for key, x in vars(value).items() if callable(x) and not key.startswith("_")]
            listed = ", ".join(there[:20]) or "none"
            raise error(f"{said}: {place} has no '{part}'{nearest(part, there)}; it has {listed}.")
        value = getattr(value, part)
    return value


def made(value: Any, knobs: Mapping[str, Any], said: str, error: type[TropdError] = ConfigError) -> Any:
    """What a class or a function makes of the knobs of its table; an object takes none."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        if knobs:
            raise error(f"{said} is an object, which takes no knobs, but {', '.join(knobs)} was given. Leave it out.")
        return value
    try:
        known = inspect.signature(value).parameters
    except (TypeError, ValueError):  # of a class written in C
        known = {}
    open_ended = not known or any(p.kind is p.VAR_KEYWORD for p in known.values())
    for knob in knobs:
        if knob not in known and not open_ended:
            raise error(f"{said} has no knob '{knob}'{nearest(knob, known)}; it has {', '.join(known) or 'none'}.")
    lacking = [
        p.name for p in known.values() if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if missing := [knob for knob in lacking if knob not in knobs]:
        raise error(f"{said} needs {', '.join(missing)}, which has no default. Give it in its table.")
    try:
        return value(**knobs)
    except TropdError:
        raise
    except Exception as problem:
        raise error(f"{said} cannot be made of {dict(knobs)}: {reason(problem)}.") from problem


def name_of(value: Any) -> str | None:
    """The name of a class or a function; None for one that no other process could find."""
    module_name, path = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
    module = sys.modules.get(module_name)
    if module is None or module_name == "__main__" or not path:
        return None
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is not value:
        return None
    file = getattr(module, "__file__", None)
    if file is None or module_name.split(".")[0] == "tropd" or _is_installed(Path(file)):
        return f"{module_name}:{path}"
    return f"{Path(file).resolve()}:{path}"


def source_of(name: str) -> Path | None:
    """The file that holds what a name stands for, without importing it; None where that cannot be told."""
    place = located(name).rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    file = getattr(sys.modules.get(place), "__file__", None)
    return None if file is None else Path(file)


def offered(kind: str) -> dict[str, EntryPoint]:
    """What installed packages offer: the entry points of the group tropd.methods, tropd.teachers and so on."""
    return {point.name: point for point in entry_points(group=f"tropd.{kind}")}


def several(what: str) -> str:
    return f"{what.removesuffix('y')}ies" if what.endswith("y") else f"{what}s"


@dataclass(frozen=True, kw_only=True)
class Own:
    """A part as a run file has it: the name of a class, and its knobs."""

    name: str
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, value: Any, what: str, where: str, known: Iterable[str] = ()) -> Self:
        """From a name, or a table with a name and knobs.  `known` are the names of tropd's own.  Imports nothing."""
        table = {"name": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping) or not isinstance(name := table.get("name"), str):
            raise ConfigError(
                f"{where} is {shortened(repr(value))}, neither a name nor a table with a name and knobs, such as "
                "{ name = 'file.py:Class' }."
            )
        there = [*known, *offered(several(what))]
        if name not in there and not is_name(name):
            have = f"there are {', '.join(there)}, and your own" if there else "give your own"
            raise ConfigError(
                f"there is no {what} '{shortened(name)}'{nearest(name, there)}; {have} as 'package.module:Class' or "
                "'file.py:Class'."
            )
        return cls(name=name, knobs={knob: x for knob, x in table.items() if knob != "name"})

    def located(self, folders: Sequence[Path]) -> Self:
        return replace(self, name=located(self.name, folders))

    def make(self, kind: type[T], what: str) -> T:
        """The object, of this kind: this runs the code that the name stands for."""
        said = f"{what} '{shown(self.name)}'"
        value = made(find(self.name, what), self.knobs, said)
        if not isinstance(value, kind):
            raise ConfigError(f"{said} is a {type(value).__name__}. Give a class that inherits from {as_base(kind)}.")
        return value


def as_base(kind: type) -> str:
    """A base class by the name that users import."""
    return f"tropd.{kind.__name__}"


def _is_installed(file: Path) -> bool:
    paths = sysconfig.get_paths()
    return any(file.resolve().is_relative_to(Path(paths[kind]).resolve()) for kind in ("stdlib", "purelib", "platlib"))


def _read_file(path: Path, said: str, error: type[TropdError]) -> ModuleType:
    """A file as a module: of its package where it lies in one, else under a name that no other file has."""
    path = path.expanduser().absolute()
    if not path.is_file():
        there = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise error(f"{said}: there is no file {path}{nearest(path.name, there)}.")
    for name, module in list(sys.modules.items()):
        if name not in _READ and name != "__main__" and getattr(module, "__dict__", {}).get("__file__") == str(path):
            return module  # somebody has imported it already
    parts = [] if path.name == "__init__.py" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    if folder != path.parent:
        return _import(".".join(parts), said, error, folder, path)
    source = path.read_bytes()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode() + source).hexdigest()[:12]}"
    if name in _READ:
        return sys.modules[name]
    _READ.add(name)
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(path)
    try:
        with _refusing(said, str(path), error), _searched(folder):
            exec(compile(source, str(path), "exec"), vars(module))
    except BaseException:
        _READ.discard(name)
        del sys.modules[name]
        raise
    return module


def _import(
    name: str, said: str, error: type[TropdError], folder: Path | None = None, path: Path | None = None
) -> ModuleType:
    with _refusing(said, name, error), _searched(folder):
        module = importlib.import_module(name)
    own = getattr(module, "__file__", None)
    if path is not None and (own is None or Path(own).resolve() != path.resolve()):
        raise error(f"{said}: {path} cannot be imported, for a module {name} is in use already: {own}. Rename one.")
    return module


@contextmanager
def _searched(folder: Path | None) -> Iterator[None]:
    """Imports look into a folder first.  Modules of that name from another folder of the user make way for its own."""
    importlib.invalidate_caches()
    if folder is None:
        yield
        return
    for top, home in list(_HOMES.items()):
        if home != folder and ((folder / f"{top}.py").is_file() or (folder / top).is_dir()):
            for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
                del sys.modules[name]
            del _HOMES[top]
    before, loaded = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - loaded:
            file = getattr(sys.modules[name], "__file__", None)
            if "." not in name and file and Path(file).parent in (folder, folder / name):
                _HOMES[name] = folder


@contextmanager
def _refusing(said: str, place: str, error: type[TropdError]) -> Iterator[None]:
    """Whatever the user's code raises while it is imported becomes one sentence."""
    try:
        yield
    except TropdError:
        raise
    except (Exception, SystemExit) as problem:
        raise error(f"{said}: {place} cannot be imported ({reason(problem)}).") from problem


def reason(problem: BaseException) -> str:
    """What was raised, and in which line of whose file."""
    line = first_line(problem)
    ours = ("<frozen", __file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(problem.__traceback__) if not f.filename.startswith(ours)]
    return f"{line}, {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else line
