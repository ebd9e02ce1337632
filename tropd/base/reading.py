"""Reads files that other programs wrote, within limits.

    opened(path)             a regular file, never a pipe, a device or a folder, which could be waited for without end
    read_text(path)          UTF-8, of a size that such a file can have
    read_lines(path)         (number, line), one at a time
    parse_json, parse_toml   no key twice, no NaN, no lone surrogate, no nesting without end
    refusing(say)            what another library raises over a file, in one sentence

What is wrong is said in one sentence with the file's name, as the error class that the caller asks for.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tropd.errors import ConfigError, TropdError

MOST_BYTES = 2**26
"""Of a file that is read whole, such as a run file or the state of a checkpoint."""
DEEPEST = 100
"""Lists and objects in each other."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_LONG_KEY = re.compile(r"(?:^|[\[{,])[ \t]*(?:[\w\"'-]+[ \t]*\.[ \t]*){100}", re.MULTILINE)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Refusal = type[TropdError]


def printable(text: str, *, lines: bool = False) -> str:
    """The text with its control characters escaped, and, without `lines`, its line breaks too."""
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def shortened(path: Path | str) -> str:
    """A path as errors name it, however long it is."""
    text = printable(str(path))
    return text if len(text) <= 300 else f"{text[:60]}...{text[-60:]} ({len(text)} characters)"


def nearest(word: str, choices: Iterable[str]) -> str:
    """' (did you mean ...?)' or nothing."""
    match = get_close_matches(word, list(choices), n=1)
    return f" (did you mean '{match[0]}'?)" if match else ""


def check_path(path: Path | str, name: str, error: Refusal = ConfigError) -> None:
    """Refuse a path that no file system can hold."""
    text = str(path)
    if "\0" in text:
        raise error(f"{name} is {shortened(text)}, and no path holds a null character. Take it out.")
    longest = max((len(os.fsencode(part)) for part in Path(text).parts), default=0)
    if longest > 255 or len(os.fsencode(text)) > 4000:
        raise error(f"{name} is {shortened(text)}, which is too long for the name of a file. Give a shorter path.")


def opened(path: Path, error: Refusal = ConfigError) -> BinaryIO:
    """The open file; pipes, devices and folders are refused."""
    check_path(path, "the path", error)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer must not wait
    except OSError as problem:
        raise error(f"{shortened(path)} cannot be read: {problem.strerror}.") from None
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise error(f"{shortened(path)} cannot be read: it is {_KINDS.get(kind, 'no file')}. Give a file.")
    return os.fdopen(handle, "rb")


def check_file(path: Path, error: Refusal = ConfigError) -> None:
    """Refuse a path that another library would wait for, or read without end."""
    opened(path, error).close()


def read_bytes(path: Path, error: Refusal = ConfigError, limit: int | None = MOST_BYTES) -> bytes:
    with opened(path, error) as file:
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise error(f"{shortened(path)} has more than {limit} bytes, so it is not what it should be.")
    return content


def read_text(path: Path, error: Refusal = ConfigError, limit: int = MOST_BYTES) -> str:
    return _decode(read_bytes(path, error, limit), shortened(path), error)


def read_lines(path: Path, error: Refusal = ConfigError) -> Iterator[tuple[int, bytes]]:
    """Every line with its number, from 1, read one at a time."""
    with opened(path, error) as file:
        number = 0
        while line := file.readline(MOST_BYTES):
            number += 1
            if len(line) == MOST_BYTES:
                raise error(f"{shortened(path)}, line {number} has more than {MOST_BYTES} bytes.")
            yield number, line


@contextmanager
def refusing(say: Callable[[str], str], error: Refusal = ConfigError) -> Iterator[None]:
    """Turn any exception of another library into one error: `say` makes its message from the reason."""
    try:
        yield
    except TropdError:
        raise
    except Exception as problem:  # a broken file may make a library fail in any way
        raise error(say(first_line(problem))) from problem


def first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    text = printable(lines[0]).rstrip(". ") if lines else ""
    return (text if isinstance(problem, OSError | ValueError) and text else f"{type(problem).__name__}: {text}")[:400]


def read_json(path: Path, error: Refusal = ConfigError, *, unique: bool = True) -> Any:
    return parse_json(read_bytes(path, error), shortened(path), error, unique=unique)


def parse_json(raw: bytes, where: str, error: Refusal = ConfigError, *, unique: bool = True) -> Any:
    """The value of a JSON text; `where` names the text in errors, and `unique` refuses a key that comes twice."""
    text = _decode(raw, where, error)
    try:
        value = json.loads(text, parse_constant=_no_number, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        _refuse_depth(where, error)
    except ValueError as problem:
        raise error(f"{where} is not JSON: {problem}.") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value, where, error)
    if _SURROGATE.search(text):
        _decode(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"), where, error)
    return value


def read_toml(path: Path, error: Refusal = ConfigError) -> dict[str, Any]:
    return parse_toml(read_text(path, error, limit=2**20), shortened(path), error)


def parse_toml(text: str, where: str, error: Refusal = ConfigError) -> dict[str, Any]:
    if _LONG_KEY.search(text):
        raise error(f"{where} has a key of more than {DEEPEST} parts.")
    try:
        values = tomllib.loads(text)
    except RecursionError:
        _refuse_depth(where, error)
    except ValueError as problem:
        raise error(f"{where} is not TOML: {problem}.") from None
    _check_depth(values, where, error)
    return values


def _decode(raw: bytes, where: str, error: Refusal) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        what = "a lone surrogate" if raw[problem.start : problem.start + 1] == b"\xed" else "bytes that are none"
        raise error(f"{where} is not UTF-8 text: it holds {what} at byte {problem.start}. Save it as UTF-8.") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says {printable(max(names, key=names.count))!r} twice")
    return values


def _check_depth(value: Any, where: str, error: Refusal) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        inside = (inner for x in level for inner in (x.values() if isinstance(x, dict) else x))
        level = [inner for inner in inside if isinstance(inner, dict | list)]
        if not level:
            return
    _refuse_depth(where, error)


def _refuse_depth(where: str, error: Refusal) -> NoReturn:
    raise error(f"{where} nests lists or objects more than {DEEPEST} deep.") from None
