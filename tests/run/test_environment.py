"""Code of one's own that a resumed run meets changed is named, whoever it belongs to."""

from __future__ import annotations

from pathlib import Path

from tests.own_package import gentle
from tests.teachers.test_combined import METHOD, mixed
from tests.told import write_world
from tropd.run.environment import changes, environment_of
from tropd.training.assembly import load_parts

BRIEFING = """
from dataclasses import dataclass

import tropd


@dataclass(frozen=True, kw_only=True)
class Shout(tropd.Briefing):
    def messages(self, asked):
        return asked.last_turn("{prompt}!")
"""


def test_changed_code_of_briefings_and_of_readers_is_named(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    (world / "mixtures.py").write_text(METHOD)
    of_teacher, of_reader, teacher = (tmp_path / f"{name}.py" for name in ("loud", "louder", "unsure"))
    of_teacher.write_text(BRIEFING)
    of_reader.write_text(BRIEFING)
    teacher.write_text((Path(*gentle.__path__) / "teacher.py").read_text())
    own = {"path": f"{teacher}:Unsure", "knobs": {"path": str(world / "teacher")}}
    readers = {"told": {"path": "teacher", "briefing": {"kind": f"{of_reader}:Shout"}}, "own": own}
    said = {"path": str(world / "teacher"), "briefing": {"kind": f"{of_teacher}:Shout"}}
    parts = load_parts(mixed(world, "told", readers=readers, teacher=said), tmp_path)
    before = environment_of(parts)
    assert changes(before, environment_of(parts)) == []
    for file, name in (
        (of_teacher, "briefing of teacher default loud.py:Shout"),
        (of_reader, "briefing of reader told louder.py:Shout"),
        (teacher, "reader own unsure.py:Unsure"),
    ):
        kept = file.read_text()
        file.write_text(kept + "\n# another\n")
        (note,) = changes(before, environment_of(parts))
        assert f"the run goes on with {name} (" in note and "it may differ" in note
        file.write_text(kept)
