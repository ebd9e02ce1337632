"""A teacher's text is asked for once, and a damaged cache is never read as if it were whole."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tropd.errors import TeacherError
from tropd.rollout.scripted import ScriptedEngine
from tropd.teachers.texts import CachedTexts
from tropd.types import Request, Sampling

REQUEST = Request(token_ids=(1, 2), max_new_tokens=50, seed=3, stop_ids=(9,))
OTHERS = [
    replace(REQUEST, token_ids=(1, 2, 3)),
    replace(REQUEST, max_new_tokens=8),
    replace(REQUEST, seed=4),
    replace(REQUEST, stop_ids=(9, 10)),
    replace(REQUEST, sampling=Sampling(temperature=0.5)),
    replace(REQUEST, sampling=Sampling(top_p=0.5)),
]


def counting() -> ScriptedEngine:
    """Writes the request's own numbers, so that no two requests have the same text."""
    return ScriptedEngine(lambda r: [*r.token_ids, r.seed, len(r.stop_ids), int(100 * r.sampling.temperature)] * 5)


def test_a_text_is_asked_once_whoever_asks_again(tmp_path: Path) -> None:
    engine, path = counting(), tmp_path / "texts.sqlite"
    first = CachedTexts(engine, path, "teacher")
    written = first.generate([REQUEST, OTHERS[0], REQUEST])
    assert written[0] == written[2] != written[1] and len(engine.requests) == 2
    first.close()
    again = counting()
    assert CachedTexts(again, path, "teacher").generate([OTHERS[0], REQUEST]) == [written[1], written[0]]
    assert again.requests == []


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_shapes_a_text_is_part_of_its_key(other: Request, tmp_path: Path) -> None:
    engine = counting()
    texts = CachedTexts(engine, tmp_path / "texts.sqlite", "teacher")
    asked = texts.generate([REQUEST]) + texts.generate([other])
    assert engine.requests == [REQUEST, other] and asked == counting().generate([REQUEST, other])


def test_another_teacher_or_another_file_shares_nothing(tmp_path: Path) -> None:
    first, second, third = counting(), counting(), counting()
    CachedTexts(first, tmp_path / "a.sqlite", "teacher").generate([REQUEST])
    CachedTexts(second, tmp_path / "a.sqlite", "another").generate([REQUEST])
    CachedTexts(third, tmp_path / "b.sqlite", "teacher").generate([REQUEST])
    assert first.requests == second.requests == third.requests == [REQUEST]


def many(path: Path) -> list[Request]:
    """A cache of several pages, closed."""
    requests = [replace(REQUEST, seed=seed) for seed in range(200)]
    texts = CachedTexts(counting(), path, "teacher")
    texts.generate(requests)
    texts.close()
    return requests


def overwrite(path: Path, start: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(os.urandom(path.stat().st_size - start))


def foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE texts (name TEXT)")
        db.commit()


def spoil_rows(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("""UPDATE texts SET completion = '{"token_ids": [1]}'""")
        db.commit()


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "not a database": lambda path: path.write_bytes(b"garbage " * 1000),
    "garbage behind the header": partial(overwrite, start=100),
    "garbage behind the first page": partial(overwrite, start=4096),
    "cut in half": halve,
    "another program's table": foreign,
    "rows that are no texts": spoil_rows,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_refused_with_its_name(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.sqlite"
    requests = many(path)
    DAMAGES[damage](path)
    with pytest.raises(TeacherError) as caught:
        CachedTexts(counting(), path, "teacher").generate(requests)
    assert str(path) in str(caught.value) and "delete the file" in str(caught.value)
    assert "text_cache = false in the section of the teacher, of each where" in str(caught.value)
