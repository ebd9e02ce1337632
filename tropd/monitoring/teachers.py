"""Probes of each of several teachers: a mean over all would hide one that answers badly."""

from __future__ import annotations

from collections.abc import Mapping

OF_A_TEACHER = (
    "trust/tv",
    "ratio/mean",
    "ratio/below_-5",
    "ratio/infinite",
    "overlap/top_k",
    "mass/student_in_teacher_top_k",
    "entropy/teacher",
    "teacher/mean_logprob",
    "teacher/min_logprob",
    "teacher/max_logprob",
    "length/mean",
)
"""The probes that are recorded for each of several teachers, as teachers/NAME/PROBE."""


def probes_of(teacher: str, probes: Mapping[str, float]) -> dict[str, float]:
    """The probes of one of several teachers, under the names that are recorded."""
    return {f"teachers/{teacher}/{name}": probes[name] for name in OF_A_TEACHER if name in probes}


def by_teacher(probes: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The probes of each of several teachers, from the names that `probes_of` gave them; empty for one teacher."""
    probes_of: dict[str, dict[str, float]] = {}
    for key, value in probes.items():
        if key.startswith("teachers/"):
            name = next(name for name in OF_A_TEACHER if key.endswith(f"/{name}"))
            probes_of.setdefault(key.removeprefix("teachers/").removesuffix(f"/{name}"), {})[name] = value
    return probes_of
