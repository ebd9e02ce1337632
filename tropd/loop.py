"""The training loop.

    prompts --> roll out --> grade --> score --> plan --> forward, backward, optimise --> sync --> record
       ^           |                     |                        |                                  |
     cursor     student,             teacher                  micro-batches                   records.jsonl,
                teacher texts                                                             checkpoint, evaluation

Every stage takes and returns one type of `tropd.types` or `tropd.batches`.  A step is a function of the weights, the
prompt cursor and the seed: nothing else is remembered, so a resumed run repeats the undisturbed one bit for bit.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tropd
from tropd import config_file
from tropd.assembly import Parts
from tropd.config import Run
from tropd.data.stream import PromptStream
from tropd.errors import CheckpointError, ConfigError, TrainingDiverged
from tropd.evaluation.runner import evaluate
from tropd.iteration import clock, iterate
from tropd.probes.alarms import Alarm, Alarms
from tropd.replay import save_batch
from tropd.report.display import Display, make_display
from tropd.report.records import RecordWriter, require
from tropd.report.scores import write_scores
from tropd.report.trackers import Tracker, make_trackers, numbers_of
from tropd.startup import assemble
from tropd.student import checkpoint as checkpoints
from tropd.student.export import export
from tropd.types import StepRecord


def train(run: Run, *, display: Display | None = None) -> Path:
    """Train from the start, in a new folder, and return it."""
    directory = Path(run.output)
    if (directory / "run.toml").exists():
        raise ConfigError(f"{directory} holds a run already. Go on with `tropd resume {directory}`, or set output.")
    begun = directory / "run.toml.tmp"
    with checkpoints.writing(directory):  # before models are read, so that a full disk is told at once
        directory.mkdir(parents=True, exist_ok=True)
        begun.write_text(config_file.dump(run))
    try:
        parts = assemble(run, directory)
    except BaseException:
        begun.unlink(missing_ok=True)
        raise
    with checkpoints.writing(directory):
        begun.replace(directory / "run.toml")
    with checkpoints.alone(directory):
        return _run(parts, directory, None, display)


def resume(directory: Path, *, step: int | None = None, display: Display | None = None) -> Path:
    """Go on from the newest checkpoint, or from that of `step`; then what came after it is dropped and made again."""
    if not (directory / "run.toml").exists():
        raise ConfigError(f"{directory} holds no run.toml, so there is nothing to resume. Name the folder of a run.")
    with checkpoints.alone(directory):
        return _resume(directory, step, display)


def _resume(directory: Path, step: int | None, display: Display | None) -> Path:
    found = checkpoints.find(directory, step)
    saved = checkpoints.load(found) if found else None
    run = config_file.load(directory / "run.toml")
    if saved is not None and saved.state["fingerprint"] != config_file.fingerprint(run):
        raise CheckpointError(
            f"{saved.path} was made by another run than {directory / 'run.toml'} describes. To go on with it, put "
            f"back the configuration in {saved.path / 'run.toml'}; to change a run, start a new one."
        )
    return _run(assemble(run, directory), directory, saved, display)


@dataclass
class State:
    """What changes while a run goes on, beside the weights."""

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """The best evaluated step and its score."""
    before: dict[str, float] = field(default_factory=dict)
    """Evaluation of the student as it came."""
    latest: dict[str, float] = field(default_factory=dict)
    stop: bool = False


def _run(parts: Parts, directory: Path, saved: checkpoints.Checkpoint | None, display: Display | None) -> Path:
    run, state, alarms = parts.run, State(), Alarms(parts.run.alarms)
    if run.rollout.save_every:
        require("pyarrow", "data", "saving rollouts (rollout.save_every)")
    if saved is not None:
        _restore(parts, state, alarms, saved)
    if state.step >= run.steps and (directory / "model").exists():
        raise ConfigError(f"{directory} is finished: {state.step} of {run.steps} steps.")
    with display or make_display(run.steps) as shown, _stop_on_signals(state, shown):
        shown.start(_facts(parts, directory))
        for note in parts.notes:
            shown.note(note)
        if saved is None:
            state.before = state.latest = _evaluate(parts, directory, 0)[0]
        if dropped := checkpoints.drop_after(directory, state.step):
            shown.note(f"back to step {state.step}: dropped the checkpoints of {', '.join(map(str, dropped))}")
        with ExitStack() as stack:  # closes everything, even where closing fails
            for end in (parts.engine, *([parts.writer] if parts.writer else [])):
                stack.callback(end.close)
            records = stack.enter_context(_recording(directory, state, saved, parts))
            trackers = make_trackers(
                run.trackers, directory.name, config_file.to_dict(run), directory=directory.parent, step=state.step
            )
            for tracker in trackers:
                stack.callback(tracker.close)
            _steps(parts, directory, state, alarms, records, trackers, shown)
        if state.step == run.steps:
            folder = export(
                parts.model, parts.tokenizer, run, directory / "model", step=state.step, results=state.latest
            )
            shown.note(f"the student is in {folder}")
        else:
            shown.note(f"stopped after step {state.step} of {run.steps}. Go on with: tropd resume {directory}")
    return directory


def _steps(
    parts: Parts,
    directory: Path,
    state: State,
    alarms: Alarms,
    records: RecordWriter,
    trackers: list[Tracker],
    shown: Display,
) -> None:
    run = parts.run
    while state.step < run.steps and not state.stop:
        record, batch, raised = iterate(parts, directory, state.step, alarms)
        state.step += 1
        if state.step % run.evaluation.every == 0 or state.step == run.steps:
            record = _evaluated(parts, directory, state, record)
        with checkpoints.writing(directory):
            records.write(record)
        for tracker in trackers:
            tracker.log(record.step, numbers_of(record))
        shown.update(record)
        _stop_if_asked(raised, directory, record.step, batch)
        due = state.step % run.checkpoint.every == 0 or state.best.get("step") == state.step
        if due or state.step == run.steps or state.stop:
            _save(parts, directory, state, alarms)


def _evaluated(parts: Parts, directory: Path, state: State, record: StepRecord) -> StepRecord:
    numbers, seconds = _evaluate(parts, directory, state.step)
    if not numbers:
        return record
    state.latest = numbers
    score = numbers.get(f"avg@{parts.run.evaluation.num_samples}")
    if score is not None and score > state.best.get("score", float("-inf")):
        state.best = {"step": state.step, "score": score}
    return dataclasses.replace(record, evaluation=numbers, seconds={**record.seconds, "evaluate": seconds})


def _evaluate(parts: Parts, directory: Path, version: int) -> tuple[dict[str, float], float]:
    if not parts.held_out:
        return {}, 0.0
    seconds: dict[str, float] = {}
    with clock(seconds, "evaluate"):
        result = evaluate(
            parts.engine,
            parts.held_out,
            parts.eval_grader,
            parts.tokenizer,
            parts.run.evaluation,
            stop_ids=parts.stop_ids,
            version=version,
        )
    with checkpoints.writing(directory):
        write_scores(directory / "evaluations", version, result.items)
    return result.summary(), seconds["evaluate"]


def _stop_if_asked(raised: list[Alarm], directory: Path, step: int, batch: Any) -> None:
    stopping = next((alarm for alarm in raised if alarm.action == "stop"), None)
    if stopping is None:
        return
    kept = save_batch(directory, step, batch)
    raise TrainingDiverged(
        f"{stopping.message} The batch is in {kept}: look at it with `tropd inspect {directory} --step {step}`. "
        f'To go on regardless set alarms.{stopping.name} = "warn".'
    )


def _save(parts: Parts, directory: Path, state: State, alarms: Alarms) -> None:
    checkpoints.save(
        directory,
        state.step,
        weights=checkpoints.trained_tensors(parts.model),
        optimizer=parts.learner.optimizer.state_tensors(),
        run=config_file.dump(parts.run),
        state={
            "fingerprint": config_file.fingerprint(parts.run),
            "optimizer_steps": parts.learner.optimizer.num_steps,
            "stream": parts.stream.state_dict(),
            "alarms": alarms.state_dict(),
            "origins": parts.origins,
            "best": state.best,
            "before": state.before,
            "latest": state.latest,
            "versions": {"tropd": tropd.__version__, "torch": torch.__version__},
        },
    )
    best = state.best.get("step")
    checkpoints.prune(directory, parts.run.checkpoint.keep, int(best) if best is not None else None)


def _restore(parts: Parts, state: State, alarms: Alarms, saved: checkpoints.Checkpoint) -> None:
    held = saved.state
    for whose, weights in parts.origins.items():
        if held["origins"][whose] != weights:
            path = getattr(parts.run, whose).path
            raise CheckpointError(
                f"{saved.path} was trained with other weights of the {whose}, or in another precision, than {path} "
                "gives now. Put the old ones back, or start a new run."
            )
    checkpoints.load_trained(parts.model, saved.weights, saved.path)
    parts.learner.optimizer.load_state_tensors(saved.optimizer, held["optimizer_steps"])
    parts.stream.load_state_dict(held["stream"])
    alarms.load_state_dict(held["alarms"])
    parts.engine.sync(None, saved.step)
    state.step, state.best = saved.step, held["best"]
    state.before, state.latest = held["before"], held["latest"]


@contextmanager
def _recording(
    directory: Path, state: State, saved: checkpoints.Checkpoint | None, parts: Parts
) -> Iterator[RecordWriter]:
    with checkpoints.writing(directory):
        records = _open_records(directory, state, saved, parts)
    try:
        yield records
    finally:
        with checkpoints.writing(directory):
            records.close()


def _open_records(directory: Path, state: State, saved: checkpoints.Checkpoint | None, parts: Parts) -> RecordWriter:
    path = directory / "records.jsonl"
    if saved is not None:
        return RecordWriter.resume(path, state.step)
    path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    return RecordWriter(path, {**_facts(parts, directory), "before": state.before})


def _facts(parts: Parts, directory: Path) -> dict[str, str]:
    run = parts.run
    return {
        "run": str(directory),
        "fingerprint": config_file.fingerprint(run),
        "method": run.method.name,
        "student": run.student.path + (f" + LoRA {run.student.lora.rank}" if run.student.lora else ""),
        "teacher": run.teacher.path,
        "data": run.data.path + (f" ({len(parts.stream)} prompts)" if isinstance(parts.stream, PromptStream) else ""),
        "batch": f"{run.rollout.num_prompts} prompts x {run.rollout.num_rollouts} rollouts",
        "device": f"{parts.learner.device}, {torch.get_num_threads()} threads",
        "versions": f"tropd {tropd.__version__}, torch {torch.__version__}",
    }


@contextmanager
def _stop_on_signals(state: State, shown: Display) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets the step finish and saves; a second SIGINT stops at once."""

    def ask(number: int, frame: Any) -> None:
        state.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(RuntimeError):  # the signal came while a line was being written, and that one cannot be broken
            shown.note("stopping after this step; interrupt again to stop at once")

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs the thread stops it
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
