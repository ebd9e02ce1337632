from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.report.examples import step_record
from tropd.errors import ConfigError
from tropd.monitoring.trackers import make_trackers, numbers_of

TRACKIO_RUN = """
import json
from tropd.monitoring.trackers import make_trackers
for step, loss in ((0, 0.5), (1, 0.25)):
    (tracker,) = make_trackers(["trackio"], "a-run", {"method": "tropd"}, step=step)
    tracker.log(step, {"loss": loss, "probes/trust/share": 0.9})
    tracker.close()
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([SQLiteStorage.get_runs("tropd"), SQLiteStorage.get_logs("tropd", "a-run")]))
"""


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory), purge_orphaned_data=True).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    (tracker,) = make_trackers(["tensorboard"], "a-run", {"method": "tropd"}, directory=tmp_path)
    for step in range(3):
        tracker.log(step, numbers_of(step_record(step, loss=0.5 * step)))
    tracker.close()
    directory = tmp_path / "tensorboard" / "a-run"
    assert scalars(directory, "loss") == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert scalars(directory, "terms/trusted/tokens") == [(0, 90.0), (1, 90.0), (2, 90.0)]


def test_tensorboard_drops_the_steps_that_a_resume_does_again(tmp_path: Path) -> None:
    for first, losses in ((0, (1.0, 2.0, 3.0)), (1, (4.0,))):
        (tracker,) = make_trackers(["tensorboard"], "a-run", {}, directory=tmp_path, step=first)
        for step, loss in enumerate(losses, start=first):
            tracker.log(step, {"loss": loss})
        tracker.close()
    assert scalars(tmp_path / "tensorboard" / "a-run", "loss") == [(0, 1.0), (1, 4.0)]


def test_trackio_works_offline_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO_RUN],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs, logged = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert runs == ["a-run"]
    assert [(line["step"], line["loss"], line["probes/trust/share"]) for line in logged] == [
        (0, 0.5, 0.9),
        (1, 0.25, 0.9),
    ]


def test_every_number_of_a_step_has_a_flat_name() -> None:
    numbers = numbers_of(step_record(4, evaluation={"gsm8k": 0.5}, alarms=("one", "two")))
    assert numbers == {
        "progress": 0.4,
        "policy_version": 4,
        "loss": 0.5,
        "terms/trusted/loss": 0.4,
        "terms/trusted/tokens": 90.0,
        "terms/trusted/weight": 88.5,
        "probes/trust/share": 0.9,
        "probes/reward/mean": 0.25,
        "gradient_norm": 12.5,
        "learning_rate": 1e-5,
        "tokens/student": 90,
        "tokens/teacher": 10,
        "seconds/rollout": 2.0,
        "seconds/score": 1.0,
        "seconds/train": 1.0,
        "evaluation/gsm8k": 0.5,
        "num_alarms": 2,
    }


def test_a_misspelt_tracker_is_refused_before_another_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'tensorbord' was asked for.*Did you mean 'tensorboard'"):
        make_trackers(["tensorboard", "tensorbord"], "a-run", {}, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_tracker_that_is_not_installed_is_refused_with_the_line_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'tropd\[wandb\]'"):
        make_trackers(["wandb"], "a-run", {}, directory=tmp_path)


def test_no_tracker_is_no_tracker() -> None:
    assert make_trackers([], "a-run", {}) == []
