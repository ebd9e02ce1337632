"""What a part finds out, row by row, on disk at once."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, REACHED, MISSED, NOT_RUN, TOLD = "passed", "FAILED", "reached", "MISSED", "not run", ""


@dataclass(frozen=True, kw_only=True)
class Row:
    what: str
    bar: str = ""
    value: str = ""
    verdict: str = TOLD
    note: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Everything that was measured, for whoever reads the JSON."""


class Table:
    """The rows of one part."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def tell(self, what: str, value: str = "", *, note: str = "", **numbers: Any) -> None:
        self.add(Row(what=what, value=value, note=note, numbers=numbers))

    def check(self, what: str, right: bool, value: str = "", *, note: str = "", **numbers: Any) -> None:
        self.add(
            Row(what=what, value=value, verdict=PASSED if right else FAILED, note=note, numbers=numbers),
        )

    def bar(self, what: str, bar: str, value: str, reached: bool | None, *, note: str = "", **numbers: Any) -> None:
        """`reached` None: measured at sizes that the bar does not speak of."""
        verdict = TOLD if reached is None else REACHED if reached else MISSED
        self.add(Row(what=what, bar=bar, value=value, verdict=verdict, note=note, numbers=numbers))

    @contextmanager
    def guard(self, what: str, bar: str = "", *, fails: bool = False) -> Iterator[None]:
        """An error in the block ends the block alone, and a row says why; it is a failed check where `fails`.

        Warnings are kept as rows: they say which fast path was left.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                yield
            except Exception as error:
                traceback.print_exc()
                lines = str(error).strip().splitlines() or ["no message"]
                verdict = FAILED if fails else NOT_RUN
                note = f"{type(error).__name__}: {lines[0][:300]}"
                self.add(Row(what=what, bar=bar, verdict=verdict, note=note))
        for text in sorted({str(w.message) for w in caught if "tropd" in w.filename or "slower" in str(w.message)}):
            self.tell(f"{what}: warning", note=text[:300])

    def add(self, row: Row) -> None:
        """A row of the same name as the last takes its place: a count that grows."""
        if self.rows and self.rows[-1].what == row.what:
            self.rows.pop()
        self.rows.append(row)
        print(row.verdict or "-", row.what, row.value, row.note, sep=" | ", flush=True)
        whole = self.path.with_suffix(".tmp")
        whole.write_text(json.dumps([asdict(row) for row in self.rows], default=str))
        whole.replace(self.path)
