"""How a run starts, resumes and ends: folder, parts, signals, records, and the loop between them."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tropd.base.names import shown
from tropd.checkpoints import checkpoint as checkpoints
from tropd.checkpoints.run_folder import NOTHING_BEGUN, RUN, begun, check_inputs, locked, rewritten
from tropd.config.run import Run
from tropd.config.settings import Part
from tropd.config.tables import to_dict
from tropd.data.graders import Grader
from tropd.data.stream import PromptStream
from tropd.distributed.launch import together
from tropd.distributed.ranks import ALONE, Ranks
from tropd.doctor import quick_checks
from tropd.errors import CheckpointError, ConfigError, Interrupted, require
from tropd.methods import Method
from tropd.monitoring.callbacks import Callback, checked
from tropd.monitoring.display import Display, Silent, evaluation_text, make_display
from tropd.monitoring.ranks import NoRecords
from tropd.monitoring.records import RecordWriter
from tropd.monitoring.trackers import make_trackers
from tropd.run.loop import Training
from tropd.run.signals import stop_on_signals
from tropd.run.state import State
from tropd.training.assembly import Parts, load_parts, shards_student
from tropd.training.given import NOTHING_GIVEN, Given, take, take_again
from tropd.types import StepRecord
from tropd.version import __version__


def train(
    run: Run,
    *,
    student: Any = None,
    teacher: Any = None,
    method: Method | str | None = None,
    grader: Grader | str | None = None,
    prompts: Any = None,
    held_out: Any = None,
    overwrite: bool = False,
    display: Display | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train from the start in a new folder, and return the folder.  Works with all processes of torchrun.

    Objects can replace what the run names: `student` is a model of transformers or (model, tokenizer), and is trained
    in place; `teacher` is the same or a Teacher; `grader` is a callable; `prompts` and `held_out` are a
    datasets.Dataset, a list of dicts or a path.

    A start that fails leaves no folder.  `overwrite` replaces the run in the folder once the new run has begun.  After
    a signal the step finishes, a checkpoint is saved, and Interrupted is raised.
    """
    if not isinstance(run, Run):
        raise ConfigError(f"a {type(run).__name__} was given to train. Give a Run: Run(...), or Run.load('run.toml').")
    callbacks = checked(callbacks)
    run, given = take(run, _objects(student, teacher, method, grader, prompts, held_out))
    run.check_complete()
    directory = Path(run.output)
    with together(run, directory) as world, ExitStack() as stack:
        place = stack.enter_context(begun(run, directory, overwrite=overwrite)) if world.leads else NOTHING_BEGUN
        world.wait()  # the folder is this run's
        parts = assemble(run, directory, world, given)
        world.wait()  # every process has passed its checks
        stack.enter_context(_closing(parts))
        place.settle()
        state = _go(parts, directory, None, display, (_AtFirstStep(place.forget), *callbacks))
    return _over(state, directory, run.steps)


def resume(
    directory: Path | str,
    *,
    student: Any = None,
    teacher: Any = None,
    method: Method | None = None,
    grader: Grader | None = None,
    prompts: Any = None,
    held_out: Any = None,
    step: int | None = None,
    steps: int | None = None,
    display: Display | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Continue from the newest checkpoint, or from the checkpoint of `step`; then later steps are dropped and repeated.

    `steps` is the new length of the whole run: a larger number makes a finished run longer.  Give the same objects
    that `train` got.
    """
    directory = Path(directory)
    callbacks = checked(callbacks)
    if not (directory / RUN).exists():
        raise ConfigError(f"{directory} holds no run.toml, so there is nothing to resume. Name the folder of a run.")
    objects = _objects(student, teacher, method, grader, prompts, held_out)
    run, given = take_again(Run.load(directory / RUN), directory, objects)
    longer = run if steps is None else dataclasses.replace(run, steps=steps)
    check_inputs(run, directory)
    with together(run, directory) as world, locked(directory) if world.leads else nullcontext():
        saved = _checkpoint_of(run, directory, step, world)
        if saved is not None and (saved.step > longer.steps or saved.step == steps):
            raise ConfigError(
                f"{longer.steps} steps are asked for, but {directory} has {saved.step} behind it. Give more."
            )
        parts = assemble(longer, directory, world, given)
        with _closing(parts), rewritten(longer, directory) if longer != run and world.leads else nullcontext():
            state = _go(parts, directory, saved, display, callbacks)
    return _over(state, directory, longer.steps)


def assemble(run: Run, directory: Path, world: Ranks = ALONE, given: Given = NOTHING_GIVEN) -> Parts:
    """Load and check all parts: anything wrong is an error here, anything merely unusual is a note."""
    parts = load_parts(run, directory, world, given)
    parts.notes = (*parts.notes, *quick_checks(parts))
    # After the checks, which read whole weights.
    if world.size > 1 and run.parallel.teacher == "sharded" and parts.teacher.shard(world):
        parts.learner.margin = None  # the ranks ask it together, so one of them cannot ask again
    return parts


def _objects(student: Any, teacher: Any, method: Any, grader: Any, prompts: Any, held_out: Any) -> dict[Part, Any]:
    return {
        "student": student,
        "teacher": teacher,
        "method": method,
        "grader": grader,
        "prompts": prompts,
        "held_out": held_out,
    }


class _AtFirstStep(Callback):
    def __init__(self, forget: Callable[[], None]) -> None:
        self.forget = forget

    def on_step(self, record: StepRecord) -> None:
        if record.step == 0:
            self.forget()


def _checkpoint_of(run: Run, directory: Path, step: int | None, world: Ranks) -> checkpoints.Checkpoint | None:
    """The newest checkpoint, or that of `step`; an error if another run made it."""
    newest = checkpoints.find(directory, step) if world.leads else None
    path = world.first(str(newest or ""))
    if not path:
        return None
    saved = checkpoints.load(Path(path), tensors=not shards_student(run, world.size))
    # A run that was made longer since has another number of steps, and is the same run.
    then = dataclasses.replace(run, steps=saved.state.get("steps", run.steps))
    if saved.state["fingerprint"] != then.fingerprint():
        raise CheckpointError(
            f"{saved.path} was made by another run than {directory / RUN} describes. To go on with it, put back the "
            f"configuration in {saved.path / RUN}; to change a run, start a new one."
        )
    return saved


@contextmanager
def _closing(parts: Parts) -> Iterator[None]:
    """Engines and teachers are closed, however the run ends and even where closing one fails; a teacher that was given
    stays its owner's."""
    held = (parts.engine, *dict.fromkeys(parts.readers.values()), parts.writer)
    own = [part for part in held if part not in (None, parts.given.teacher)]
    with ExitStack() as stack:
        for part in own:
            stack.callback(part.close)
        yield


def _go(
    parts: Parts,
    directory: Path,
    saved: checkpoints.Checkpoint | None,
    display: Display | None,
    callbacks: Sequence[Callback],
) -> State:
    """Run from the checkpoint, or from the start, to the end."""
    run, world = parts.run, parts.world
    if run.rollout.save_every:
        require("pyarrow", "data", "saving rollouts (rollout.save_every)")
    display = display or (make_display(run.steps) if world.leads else Silent())
    training = Training(parts, directory, callbacks, display)
    state = training.state
    if saved is not None:
        training.restore(saved)
        if (before := saved.state.get("steps", run.steps)) != run.steps:
            state.notes.append(f"{run.steps} steps instead of {before}: schedules are those of a run of {run.steps}.")
    if state.step >= run.steps and (directory / "model").exists():
        raise ConfigError(
            f"{directory} is finished: {state.step} of {run.steps} steps. To make it longer: tropd resume {directory} "
            f"--steps {2 * run.steps}"
        )
    with display, stop_on_signals(state, display, world):
        display.start(_facts(parts, directory))
        for note in parts.notes:
            display.note(note)
        if saved is None:
            training.evaluate_first()
            if state.before:
                display.note(f"before training: {evaluation_text(state.before)}")
        if world.leads and (dropped := checkpoints.drop_after(directory, state.step)):
            display.note(f"back to step {state.step}: dropped the checkpoints of {', '.join(map(str, dropped))}")
        with ExitStack() as stack:  # closes everything, even where closing fails
            training.records = stack.enter_context(_recording(training, saved))
            state.notes += _lacking(training.records)
            for note in state.notes:
                display.note(note)
            names, values = run.trackers if world.leads else (), to_dict(run)
            training.trackers = make_trackers(
                names, directory.name, values, directory=directory.parent, step=state.step
            )
            for tracker in training.trackers:
                stack.callback(tracker.close)
            training.steps()
        if state.step == run.steps and world.leads:
            display.note(f"the student is in {training.finish()}")
        elif state.step < run.steps:
            state.signal = world.most(state.signal)
            display.note(f"stopped after step {state.step} of {run.steps}. Go on with: tropd resume {directory}")
        training.end()
    return state


def _over(state: State, directory: Path, steps: int) -> Path:
    """The folder of the run; raises Interrupted if a signal stopped it, after everything is saved."""
    if state.signal and state.step < steps:
        raise Interrupted(directory, state.step, signal.Signals(state.signal))
    return directory


@contextmanager
def _recording(training: Training, saved: checkpoints.Checkpoint | None) -> Iterator[RecordWriter | NoRecords]:
    directory = training.directory
    with checkpoints.writing(directory):
        records = _open_records(training, saved) if training.world.leads else NoRecords()
    try:
        yield records
    finally:
        with checkpoints.writing(directory):
            records.close()


def _open_records(training: Training, saved: checkpoints.Checkpoint | None) -> RecordWriter:
    path = training.directory / "records.jsonl"
    if saved is not None:
        return RecordWriter.resume(path, training.state.num_recorded)
    path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    return RecordWriter(path, {**_facts(training.parts, training.directory), "before": training.state.before})


def _lacking(records: RecordWriter | NoRecords) -> list[str]:
    """A note if lines are missing from the records."""
    if not records.missing:
        return []
    return [
        f"{len(records.missing)} of the steps before this one are missing from the records, {records.missing[0]} the "
        "first of them: the file was changed from outside, and reports will lack these steps."
    ]


def _facts(parts: Parts, directory: Path) -> dict[str, str]:
    run = parts.run
    facts = {
        "run": str(directory),
        "fingerprint": run.fingerprint(),
        "method": shown(run.method.name),
        **{key.removeprefix("rollout."): shown(part.name) for key, part in run.rollout.named.items()},
        "student": run.student.path + (f" + LoRA {run.student.lora.rank}" if run.student.lora else ""),
        "teacher": run.teachers_said,
        **({"readers": run.readers_said} if run.said_readers else {}),
        "data": run.data.path + (f" ({len(parts.stream)} prompts)" if isinstance(parts.stream, PromptStream) else ""),
        "batch": f"{run.rollout.num_prompts} prompts x {run.rollout.num_rollouts} rollouts",
        "device": f"{parts.learner.device}, {torch.get_num_threads()} threads",
        "versions": f"tropd {__version__}, torch {torch.__version__}",
    }
    if parts.world.size > 1:
        student = "sharded" if parts.learner.shards is not None else "replicated"
        facts["processes"] = f"{parts.world.size}, student {student}, teacher {run.parallel.teacher}"
    return facts
