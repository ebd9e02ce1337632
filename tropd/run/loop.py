"""The training loop.

    prompts --> roll out --> grade --> score --> plan --> forward, backward, optimise --> sync --> record
       ^           |                     |                        |                                  |
     cursor     student,             teacher                  micro-batches                   records.jsonl,
                teacher texts                                                             checkpoint, evaluation

Every stage takes and returns one type of `tropd.types` or `tropd.training.batches`.  A step is a function of the
weights, the prompt cursor and the seed: nothing else is remembered, so a resumed run repeats the undisturbed one bit
for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tropd.checkpoints import checkpoint as checkpoints
from tropd.checkpoints.export import export
from tropd.checkpoints.run_folder import alone, begun, check_inputs
from tropd.config import file as config_file
from tropd.config.run import Run
from tropd.data.stream import PromptStream
from tropd.distributed.launch import together
from tropd.distributed.ranks import Ranks
from tropd.errors import CheckpointError, ConfigError, DataError, EngineError, TeacherError, TrainingDiverged, require
from tropd.monitoring.alarms import Alarm, Alarms
from tropd.monitoring.display import Display, Silent, evaluation_text, make_display
from tropd.monitoring.ranks import NoRecords
from tropd.monitoring.records import RecordWriter
from tropd.monitoring.trackers import Tracker, make_trackers, numbers_of
from tropd.run.evaluate import add_evaluation, evaluate_student
from tropd.run.signals import stop_on_signals
from tropd.run.start import assemble
from tropd.run.state import State, restore, save
from tropd.training.assembly import Parts, shards_student
from tropd.training.iteration import hand_over, iterate
from tropd.training.kept_batch import save_batch
from tropd.training.source import Source
from tropd.types import StepRecord
from tropd.version import __version__


def train(run: Run, *, display: Display | None = None) -> Path:
    """Train from the start, in a new folder, and return it.  Under torchrun, with all of its processes."""
    directory = Path(run.output)
    with together(run, directory) as world:
        return _train(run, directory, display, world)


def _train(run: Run, directory: Path, display: Display | None, world: Ranks) -> Path:
    with ExitStack() as stack:
        settle = stack.enter_context(begun(run, directory)) if world.leads else None
        world.wait()  # the folder is this run's
        parts = assemble(run, directory, world)
        world.wait()  # nobody has been refused
        stack.enter_context(_closing(parts))
        if settle is not None:
            settle()
        return _run(parts, directory, None, display)


def resume(directory: Path, *, step: int | None = None, display: Display | None = None) -> Path:
    """Go on from the newest checkpoint, or from that of `step`; then what came after it is dropped and made again."""
    if not (directory / "run.toml").exists():
        raise ConfigError(f"{directory} holds no run.toml, so there is nothing to resume. Name the folder of a run.")
    run = config_file.load(directory / "run.toml")
    check_inputs(run, directory)
    with together(run, directory) as world, alone(directory) if world.leads else nullcontext():
        return _resume(run, directory, step, display, world)


def _resume(run: Run, directory: Path, step: int | None, display: Display | None, world: Ranks) -> Path:
    newest = checkpoints.find(directory, step) if world.leads else None
    found = world.first(str(newest or ""))
    saved = checkpoints.load(Path(found), tensors=not shards_student(run, world)) if found else None
    if saved is not None and saved.state["fingerprint"] != config_file.fingerprint(run):
        raise CheckpointError(
            f"{saved.path} was made by another run than {directory / 'run.toml'} describes. To go on with it, put "
            f"back the configuration in {saved.path / 'run.toml'}; to change a run, start a new one."
        )
    parts = assemble(run, directory, world)
    with _closing(parts):
        return _run(parts, directory, saved, display)


@contextmanager
def _closing(parts: Parts) -> Iterator[None]:
    """Engines are closed, however the run ends and even where closing one fails."""
    with ExitStack() as stack:
        for end in (parts.engine, *([parts.writer] if parts.writer else [])):
            stack.callback(end.close)
        yield


def _run(parts: Parts, directory: Path, saved: checkpoints.Checkpoint | None, display: Display | None) -> Path:
    run, state, alarms = parts.run, State(Source(parts)), Alarms(parts.run.alarms)
    if run.rollout.save_every:
        require("pyarrow", "data", "saving rollouts (rollout.save_every)")
    if saved is not None:
        restore(parts, state, alarms, saved)
    if state.step >= run.steps and (directory / "model").exists():
        raise ConfigError(f"{directory} is finished: {state.step} of {run.steps} steps.")
    world = parts.world
    told = display or (make_display(run.steps) if world.leads else Silent())
    with told as shown, stop_on_signals(state, shown, world):
        shown.start(_facts(parts, directory))
        for note in parts.notes:
            shown.note(note)
        if saved is None:
            if world.size > 1:
                parts.engine.sync(0)  # all ranks give servers their weights together
            state.before = state.latest = evaluate_student(parts, directory, 0)[0]
            if state.before:
                shown.note(f"before training: {evaluation_text(state.before)}")
        if world.leads and (dropped := checkpoints.drop_after(directory, state.step)):
            shown.note(f"back to step {state.step}: dropped the checkpoints of {', '.join(map(str, dropped))}")
        with ExitStack() as stack:  # closes everything, even where closing fails
            records = stack.enter_context(_recording(directory, state, saved, parts))
            state.notes += _lacking(records)
            for note in state.notes:
                shown.note(note)
            facts = config_file.to_dict(run)
            asked = run.trackers if world.leads else ()
            trackers = make_trackers(asked, directory.name, facts, directory=directory.parent, step=state.step)
            for tracker in trackers:
                stack.callback(tracker.close)
            _steps(parts, directory, state, alarms, records, trackers, shown)
        if state.step == run.steps and world.leads:
            folder = export(
                parts.model, parts.tokenizer, run, directory / "model", step=state.step, results=state.latest
            )
            shown.note(f"the student is in {folder}")
        elif state.step < run.steps:
            shown.note(f"stopped after step {state.step} of {run.steps}. Go on with: tropd resume {directory}")
    return directory


def _steps(
    parts: Parts,
    directory: Path,
    state: State,
    alarms: Alarms,
    records: RecordWriter | NoRecords,
    trackers: list[Tracker],
    shown: Display,
) -> None:
    if state.owed is not None:
        record = _evaluated(parts, directory, state, alarms, state.owed)
        state.owed = None
        _tell(record, directory, records, trackers, shown)
        save(parts, directory, state, alarms)
    run, state.stop = parts.run, parts.world.any(state.asked)
    while state.step < run.steps and not state.stop:
        done = parts.learner.optimizer.num_steps
        try:
            record, batch, raised = iterate(parts, state.source, directory, state.step, alarms)
        except (TeacherError, EngineError, DataError) as error:
            if parts.learner.optimizer.num_steps > done or parts.world.size > 1 or state.step == 0:
                raise  # other weights than those of the step before, or other processes that have not failed
            raise _keep_steps(parts, directory, state, alarms, error) from error
        record, failure = hand_over(parts, state.source, dataclasses.replace(record, notes=tuple(state.notes)))
        state.notes = []
        state.step += 1
        if failure is not None and parts.world.size > 1:
            raise failure  # other processes have not failed
        if parts.held_out and (state.step % run.evaluation.every == 0 or state.step == run.steps):
            stops = any(alarm.action == "stop" for alarm in raised)
            record = _evaluated(parts, directory, state, alarms, record, failure, stops)
        _tell(record, directory, records, trackers, shown)
        _stop_if_asked(raised, directory, record.step, batch, parts.world)
        if failure is not None:
            raise _keep_steps(parts, directory, state, alarms, failure, undone=False) from failure
        state.stop = parts.world.any(state.asked)
        due = state.step % run.checkpoint.every == 0 or state.best.get("step") == state.step
        if due or state.step == run.steps or state.stop:
            save(parts, directory, state, alarms)


def _keep_steps(
    parts: Parts, directory: Path, state: State, alarms: Alarms, error: Any, *, undone: bool = True
) -> Exception:
    """Save what was trained before somebody else failed, and say so."""
    if not checkpoints.place_of(directory, state.step).exists():
        save(parts, directory, state, alarms, undone=undone)
    return type(error)(f"{error} The {state.step} steps before are kept. Go on with: tropd resume {directory}")


def _evaluated(
    parts: Parts,
    directory: Path,
    state: State,
    alarms: Alarms,
    record: StepRecord,
    failure: EngineError | None = None,
    stops: bool = False,
) -> StepRecord:
    """The record with its evaluation.  Where the engine fails, or has failed, whoever goes on from here owes both."""
    try:
        if failure is not None:
            raise failure
        return add_evaluation(parts, directory, state, record)
    except EngineError as error:
        if parts.world.size > 1 or stops:
            raise
        state.owed = record
        raise _keep_steps(parts, directory, state, alarms, error, undone=False) from error


def _tell(
    record: StepRecord, directory: Path, records: RecordWriter | NoRecords, trackers: list[Tracker], shown: Display
) -> None:
    with checkpoints.writing(directory):
        records.write(record)
    for tracker in trackers:
        tracker.log(record.step, numbers_of(record))
    shown.update(record)


def _stop_if_asked(raised: list[Alarm], directory: Path, step: int, batch: Any, world: Ranks) -> None:
    stopping = next((alarm for alarm in raised if alarm.action == "stop"), None)
    if stopping is None:
        return
    directory = world.own_folder(directory)
    kept = save_batch(directory, step, batch)
    raise TrainingDiverged(
        f"{stopping.message} The batch is in {kept}: look at it with `tropd inspect {directory} --step {step}`. "
        f'To go on regardless set alarms.{stopping.name} = "warn".'
    )


@contextmanager
def _recording(
    directory: Path, state: State, saved: checkpoints.Checkpoint | None, parts: Parts
) -> Iterator[RecordWriter | NoRecords]:
    with checkpoints.writing(directory):
        records = _open_records(directory, state, saved, parts) if parts.world.leads else NoRecords()
    try:
        yield records
    finally:
        with checkpoints.writing(directory):
            records.close()


def _open_records(directory: Path, state: State, saved: checkpoints.Checkpoint | None, parts: Parts) -> RecordWriter:
    path = directory / "records.jsonl"
    if saved is not None:
        return RecordWriter.resume(path, state.num_recorded)
    path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    return RecordWriter(path, {**_facts(parts, directory), "before": state.before})


def _lacking(records: RecordWriter | NoRecords) -> list[str]:
    """What somebody has taken out of the records while the run stood still."""
    missing = records.missing
    if not missing:
        return []
    return [
        f"{len(missing)} of the steps before this one are missing from the records, {missing[0]} the first of them: "
        "somebody has changed the file, and reports will lack them."
    ]


def _facts(parts: Parts, directory: Path) -> dict[str, str]:
    run = parts.run
    return {
        "run": str(directory),
        "fingerprint": config_file.fingerprint(run),
        "method": run.method.name,
        "student": run.student.path + (f" + LoRA {run.student.lora.rank}" if run.student.lora else ""),
        "teacher": run.teachers_said,
        "data": run.data.path + (f" ({len(parts.stream)} prompts)" if isinstance(parts.stream, PromptStream) else ""),
        "batch": f"{run.rollout.num_prompts} prompts x {run.rollout.num_rollouts} rollouts",
        "device": f"{parts.learner.device}, {torch.get_num_threads()} threads",
        **({"processes": _processes(parts)} if parts.world.size > 1 else {}),
        "versions": f"tropd {__version__}, torch {torch.__version__}",
    }


def _processes(parts: Parts) -> str:
    student = "sharded" if parts.learner.shards is not None else "replicated"
    return f"{parts.world.size}, student {student}, teacher {parts.run.parallel.teacher}"
