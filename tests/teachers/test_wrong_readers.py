"""Readers that can be made of nothing are refused, with one sentence each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.teachers.test_combined import METHOD, MIXED, STEERED, mixed
from tests.told import COLUMN, write_world
from tropd.errors import ConfigError, EvidenceError
from tropd.training.assembly import load_parts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "mixtures.py").write_text(METHOD)
    return folder


SERVED = {"path": "start", "servers": ["http://127.0.0.1:1"]}


@pytest.mark.parametrize(
    ("readers", "said"),
    [
        (
            {"mixed": {"mean": ["tould"]}},
            r"'mixed' is made of reader 'tould' \(did you mean 'told'\?\), and the run",
        ),
        ({"mixed": {"mean": []}}, "reader 'mixed': the mean of the readers .* Name one or more"),
        ({"mixed": {"mean": ["told"], "steered": STEERED}}, "'mixed': a reader is made by `mean` or by `steered`"),
        ({"mixed": {"mean": ["told"], "path": "start"}}, "'mixed' is made of 'told', so it has no model"),
        ({"mixed": {"mean": ["told"], "briefing": COLUMN}}, "so it has no model, no briefing"),
        ({"mixed": {"mean": ["mixed"]}}, "reader 'mixed' of 'mixed': it is made of itself"),
        (
            {"mixed": {"mean": ["b"]}, "b": {"mean": ["told", "mixed"]}},
            "'mixed' of 'b' of 'mixed': it is made of",
        ),
        ({"start": SERVED | {"path": "elsewhere"}}, "made of reader 'start', which is on a server"),
        ({"steered": {"steered": STEERED | {"plus": []}}}, "Name one reader or more in `plus` and in `minus`"),
        ({"steered": {"steered": {"plus": ["told"]}}}, "'readers.steered.steered.minus' is missing"),
        ({"steered": {"steered": STEERED | {"strenght": 1}}}, "strength"),
    ],
)
def test_a_reader_that_can_be_made_of_nothing_is_refused_before_anything_is_loaded(
    world: Path, readers: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        mixed(world, readers=MIXED | readers)


def test_a_reader_made_of_several_teachers_is_refused(world: Path) -> None:
    teachers = {"a": {"path": str(world / "teacher")}, "b": {"path": str(world / "copy")}}
    data = {"path": str(world / "told.jsonl"), "teacher_column": "kind"}
    with pytest.raises(ConfigError, match='made of "teacher", but each prompt has its own of the teachers a, b'):
        mixed(world, teacher={}, teachers=teachers, data=data)


def test_a_part_that_gives_no_hidden_states_is_refused(world: Path, tmp_path: Path) -> None:
    (world / "silent.py").write_text(
        "import torch\nfrom tropd import Teacher\nfrom tropd.types import TeacherScores\n\n\nclass Silent(Teacher):\n"
        "    def score(self, request):\n"
        "        return [TeacherScores(logprobs_T=torch.zeros(len(r.response_ids))) for r in request.rollouts]\n"
    )
    run = mixed(world, teacher={"path": f"{world / 'silent.py'}:Silent"}, readers={"mixed": {"mean": ["teacher"]}})
    with pytest.raises(ConfigError, match="made of reader 'teacher', which gives no hidden states here"):
        load_parts(run, tmp_path)


def test_what_a_combined_reader_cannot_say_is_refused_before_the_run(world: Path, tmp_path: Path) -> None:
    (world / "hidden.py").write_text(
        METHOD.replace("JensenShannon(reader=self.by)", "HiddenMatch(reader=self.by)").replace(
            "from tropd.objective.selectors",
            "from tropd.objective.evidence import Needs\nfrom tropd.objective.terms import TokenLoss\n\n\n"
            "@dataclass(frozen=True)\nclass HiddenMatch(TokenLoss):\n    own_needs = Needs.HIDDEN\n\n\n"
            "from tropd.objective.selectors",
        )
    )
    with pytest.raises(EvidenceError, match=r"reader 'mixed': term 'whole' .* needs HIDDEN"):
        load_parts(mixed(world, method={"name": "hidden.py:Whole", "by": "mixed"}), tmp_path)
