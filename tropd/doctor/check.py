"""One result of the doctor: its level, what was found, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    name: str
    level: Level
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.found} {self.advice}".rstrip()


def ok(name: str, found: str) -> Check:
    return Check(name=name, level="ok", found=found)


def warning(name: str, found: str, advice: str) -> Check:
    return Check(name=name, level="warning", found=found, advice=advice)


def error(name: str, found: str, advice: str = "") -> Check:
    return Check(name=name, level="error", found=found, advice=advice)
