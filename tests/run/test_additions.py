"""Extras and policies beside a method, from the run file through the whole life of a run."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.small_runs import values_of
from tropd import Run
from tropd.cli.main import main
from tropd.config.methods import complete
from tropd.errors import ConfigError
from tropd.methods import OPD
from tropd.methods.controls import RandomMask, ShuffledWeights
from tropd.methods.extras import Choose
from tropd.monitoring.callbacks import Callback
from tropd.monitoring.records import read_records
from tropd.objective.places import PositionBelow
from tropd.objective.terms import Selector
from tropd.run.start import resume, train
from tropd.types import StepRecord

MINE = '''
from dataclasses import dataclass
from tropd.base.ranges import Count
from tropd.methods.extras import Choose
from tropd.objective.places import PositionBelow

@dataclass(frozen=True, kw_only=True)
class Beginning(Choose):
    """The first tokens."""

    count: Count = 3
    """How many. At least 1."""

    @property
    def selector(self):
        return PositionBelow(self.count)
'''
BASE = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"path": "p"}}
TROPD = {"name": "tropd", "top_k": 8, "beta": 0.1}
COMBINATIONS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "a random mask": ({**TROPD, "plus": [{"name": "random_mask", "share": 0.5}]}, []),
    "AOPD": ({"name": "tropd_aopd", "tropd": {"top_k": 8}}, []),
    "ESR": (TROPD, [{"name": "horizon", "tokens": 6}]),
    "TRB": (TROPD, [{"name": "blended"}]),
    "four at once": ({**TROPD, "plus": ["fire", "gndpo"]}, [{"name": "blended"}, {"name": "horizon", "tokens": 6}]),
    "FiRe and GNDPO": ({**TROPD, "plus": ["fire", "gndpo"]}, []),
    "a mixture of writers": ({"name": "opd"}, [{"name": "mixture", "student_share": 0.5}]),
}
"""By what stands beside the method: [method] and [[rollout.plus]] of the run file."""


@dataclass(frozen=True, kw_only=True)
class Given(Choose):
    """Made in Python."""

    @property
    def selector(self) -> Selector:
        return PositionBelow(2)


def run_file(models: Path, directory: Path, method: Any, **changes: Any) -> Path:
    """A run file as a user writes it."""
    values = values_of(models, "quick", output=str(directory), **changes)
    values["method"] = method
    path = directory.with_name(directory.name + ".toml")
    path.write_text(tomli_w.dumps(values))
    return path


class StopAfterOne(Callback):
    def on_step(self, record: StepRecord) -> bool:
        return True


def weights_in(directory: Path) -> bytes:
    return (directory / "model" / "model.safetensors").read_bytes()


def trained_tokens(directory: Path) -> list[int]:
    records = read_records(directory / "records.jsonl").steps
    return [sum(term.tokens for term in record.terms.values()) for record in records]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_what_papers_call_orthogonal_trains_from_a_run_file_and_resumes_to_the_bit(
    name: str, models: Path, tmp_path: Path
) -> None:
    method, plus = COMBINATIONS[name]
    rollout = {"rollout": {"plus": plus}} if plus else {}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(Run.load(run_file(models, whole, method, **rollout)))
    assert len(trained_tokens(whole)) == 2 and all(trained_tokens(whole))
    train(Run.load(run_file(models, stopped, method, **rollout)), callbacks=[StopAfterOne()])
    assert len(trained_tokens(stopped)) == 1
    resume(stopped)
    assert weights_in(stopped) == weights_in(whole)


def test_an_extra_of_ones_own_goes_through_the_life_of_a_run(models: Path, tmp_path: Path) -> None:
    """Trained, written down with every knob, resumed, exported and planned by its name."""
    (tmp_path / "mine.py").write_text(MINE)
    method = {"name": "opd", "plus": [{"name": "mine.py:Beginning", "count": 2}, "shuffled_weights"]}
    path = run_file(models, tmp_path / "run", method, steps=3)
    run = Run.load(path)
    again = Run.from_dict(tomllib.loads(run.dump()), "again")
    assert again == run and again.fingerprint() == run.fingerprint()
    imported = run.imported()
    assert Run.from_dict(tomllib.loads(imported.dump()), "again").fingerprint() == imported.fingerprint()
    assert main(["train", str(path), "--steps", "2"]) == 0
    written = tomllib.loads((tmp_path / "run" / "run.toml").read_text())["method"]["plus"]
    assert written[0] == {"name": f"{tmp_path}/mine.py:Beginning", "count": 2}
    assert written[1] == {"name": "shuffled_weights"}
    assert max(trained_tokens(tmp_path / "run")) <= 2 * 4
    assert main(["resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    assert len(trained_tokens(tmp_path / "run")) == 3
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    assert main(["plan", str(tmp_path / "run" / "run.toml"), "--trust-code"]) == 0


def test_an_extra_makes_another_run_and_its_order_counts() -> None:
    def of(*plus: Any) -> Run:
        return Run.from_dict({**BASE, "method": {"name": "opd", "plus": [*plus]}})

    half, all_of_it = {"name": "random_mask", "share": 0.5}, {"name": "random_mask", "share": 1.0}
    runs = [of(), of(half), of(all_of_it), of(half, "shuffled_weights"), of("shuffled_weights", half)]
    assert len({run.fingerprint() for run in runs}) == len(runs)
    assert runs[3].method.plus == (RandomMask(share=0.5), ShuffledWeights())


def test_an_extra_that_was_made_in_python_is_kept_by_the_name_of_its_class() -> None:
    run = Run(student="s", teacher="t", data="p", method=OPD(plus=(Given(), RandomMask(share=0.5))))
    again = Run.from_dict(tomllib.loads(run.dump()), "again").imported()
    assert again.method.objective == run.method.objective
    assert complete(run.method) == complete(again.method)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"name": "opd", "plus": ["random_maks"]}, r"there is no extra 'random_maks' .did you mean 'random_mask'"),
        ({"name": "opd", "plus": "random_mask"}, "method.plus is 'random_mask'. Give a list of names or tables"),
        ({"name": "opd", "plus": [3]}, "method.plus is 3, neither a name nor a table"),
        ({"name": "opd", "plus": ["random_mask"]}, "'method.plus.share' is missing"),
        ({"name": "opd", "plus": [{"name": "random_mask", "share": 2}]}, r"method.plus.share = 2"),
        ({"name": "opd", "plus": [{"name": "random_mask", "shar": 0.5}]}, "method.plus.shar'; did you mean 'share'"),
        ({"name": "opd", "plus": [{"name": "first_window", "length": 0}]}, "method.plus.length = 0"),
    ],
)
def test_an_extra_that_cannot_be_made_is_told(method: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Run.from_dict({**BASE, "method": method}, "run.toml")


def test_a_class_that_is_no_extra_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from tropd.methods.extras import Choose\nclass No: pass\nclass Bare(Choose): pass\n"
    )
    for name in ("No", "Missing"):
        plus = [f"{tmp_path}/mine.py:{name}"]
        run = Run.from_dict({**BASE, "method": {"name": "opd", "plus": plus}})
        with pytest.raises(ConfigError, match="is no dataclass that inherits from tropd.Extra|has no 'Missing'"):
            run.imported()


@pytest.mark.parametrize(
    ("plus", "says"),
    [
        (["mixtur"], "there is no policy 'mixtur' .did you mean 'mixture'"),
        ("mixture", "rollout.plus is 'mixture'. Give a list of policies"),
        (["mixture", "teacher_text"], "Mixture and TeacherText both say how rollouts begin. Keep one"),
    ],
)
def test_policies_that_cannot_stand_beside_each_other_are_told(plus: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Run.from_dict({**BASE, "rollout": {"plus": plus}}, "run.toml").policy  # noqa: B018
