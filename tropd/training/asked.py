"""Whether those who read the responses can say what a method reads of them."""

from __future__ import annotations

from collections.abc import Mapping

from tropd.base.reading import nearest
from tropd.errors import EvidenceError
from tropd.objective.evidence import OF_TEACHER, Needs
from tropd.objective.objective import Objective
from tropd.teachers.teacher import Teacher
from tropd.types import READER

_CHAT = "a teacher that only writes: teacher.servers and a section [teacher.chat]."
_HERE = "a teacher in this process with the student's tokenizer, which can answer everything."


def by_name(teacher: Teacher | Mapping[str, Teacher]) -> Mapping[str, Teacher]:
    """Readers by name; a single teacher is the reader "teacher"."""
    return {READER: teacher} if isinstance(teacher, Teacher) else teacher


def check_evidence(objective: Objective, teacher: Teacher | Mapping[str, Teacher], name: str, grader: bool) -> None:
    """Refuse before step 0 a method that would fail later for lack of evidence."""
    readers = by_name(teacher)
    for reader in objective.readers:
        if reader not in readers:
            raise EvidenceError(
                f"method {name!r} reads what reader {reader!r} says{nearest(reader, readers)}, and the run has only "
                f"{', '.join(readers)}. Add a section [readers.{reader}]."
            )
        lacking = objective.needs_of(reader) & OF_TEACHER & ~readers[reader].capabilities
        if lacking:
            terms = [t.name for t in objective.terms if t.asks.get(reader, Needs.NOTHING) & lacking]
            whose = "" if reader == READER else f"reader {reader!r}: "
            raise EvidenceError(
                f"{whose}term {', '.join(map(repr, terms))} of method {name!r} needs {_names(lacking)} from "
                f"{_offers(readers[reader], lacking)}. Use another method (`tropd methods`), or "
                + (_CHAT if Needs.CHUNKS in lacking else _HERE)
            )
    if Needs.REWARD in objective.needs and not grader:
        raise EvidenceError(
            f"method {name!r} reads a grader's reward, and the run has no grader. Set one, such as grader = 'exact'."
        )


def _offers(teacher: Teacher, lacking: Needs) -> str:
    """What the teacher offers, or those of several teachers that offer too little."""
    each = {name: single.capabilities for name, single in teacher.teachers.items()}
    short = [f"{name!r} offers {_names(offered)}" for name, offered in each.items() if lacking & ~offered]
    if len(each) < 2 or not short:
        return f"the teacher, which offers {_names(teacher.capabilities)}"
    return "every teacher, but " + " and ".join(short)


def _names(needs: Needs) -> str:
    return " and ".join(str(n.name) for n in needs) or "nothing"
