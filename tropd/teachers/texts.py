"""The teacher's texts, kept on disk: each text is written only once, even if the process is killed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.errors import TeacherError
from tropd.rollout.engine import Engine
from tropd.types import Completion, Finish, Request


class CachedTexts(Engine):
    """An engine that asks another one only for texts that it has not written before.

    The key is the teacher, the prompt and everything that shapes the draw.  SQLite commits whole batches, so a process
    killed while writing leaves the file as it was before.
    """

    def __init__(self, engine: Engine, path: Path, teacher: str) -> None:
        self.engine, self.teacher, self.path = engine, teacher, path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One thread at a time, which need not be this one: batches may be written ahead.
            self.db = sqlite3.connect(path, check_same_thread=False)
            self.db.execute("CREATE TABLE IF NOT EXISTS texts (key TEXT PRIMARY KEY, completion TEXT NOT NULL)")
            self.db.commit()
        except (sqlite3.Error, OSError) as error:
            raise self._refuse("opened", error) from error

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        keys = [self._key(request) for request in requests]
        known = self._read(set(keys))
        if known:
            TAKEN.add(FastPath.KEPT_TEXTS)
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        if missing:
            written = self.engine.generate(list(missing.values()))
            assert len(written) == len(missing), "an engine answers every request"
            known |= dict(zip(missing, written, strict=True))
            self._write({key: known[key] for key in missing})
        return [known[key] for key in keys]

    def close(self) -> None:
        self.db.close()
        self.engine.close()

    def _key(self, request: Request) -> str:
        # A request names its teacher among several; texts are kept by what the teacher is.
        shape = json.dumps({**asdict(request), "teacher": self.teacher}, sort_keys=True)
        return hashlib.sha256(shape.encode()).hexdigest()

    def _read(self, keys: set[str]) -> dict[str, Completion]:
        texts: dict[str, Completion] = {}
        try:
            for key in sorted(keys):
                row = self.db.execute("SELECT completion FROM texts WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    texts[key] = _decode(row[0])
        except (sqlite3.Error, OSError, ValueError, KeyError, TypeError) as error:
            raise self._refuse("read", error) from error
        return texts

    def _write(self, texts: dict[str, Completion]) -> None:
        rows = [(key, json.dumps(asdict(text))) for key, text in texts.items()]
        try:
            with self.db:  # one transaction
                self.db.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            raise self._refuse(f"given {len(rows)} more", error) from error

    def _refuse(self, attempt: str, error: Exception) -> TeacherError:
        return TeacherError(
            f"the cache of the teacher's texts, {self.path}, cannot be {attempt}: {error}. Free the disk, delete the "
            "file if it is damaged (its texts are written again), or set text_cache = false in the section of the "
            "teacher, of each where there are several."
        )


def _decode(text: str) -> Completion:
    values = json.loads(text)
    lists = {name: tuple(x) for name, x in values.items() if isinstance(x, list)}
    return Completion(**{**values, **lists, "finish": Finish(values["finish"])})
