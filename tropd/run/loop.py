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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tropd.checkpoints import checkpoint as checkpoints
from tropd.checkpoints.export import export
from tropd.errors import DataError, EngineError, TeacherError, TrainingDiverged
from tropd.monitoring.alarms import Alarm, Alarms
from tropd.monitoring.callbacks import Callback
from tropd.monitoring.display import Display
from tropd.monitoring.ranks import NoRecords
from tropd.monitoring.records import RecordWriter
from tropd.monitoring.trackers import Tracker, numbers_of
from tropd.run.evaluate import evaluate_student
from tropd.run.state import State, restore, save
from tropd.training.assembly import Parts
from tropd.training.batches import ScoredBatch
from tropd.training.iteration import hand_over, iterate
from tropd.training.kept_batch import save_batch
from tropd.training.source import Source
from tropd.types import StepRecord


class Training:
    """A run in progress: its parts, its state and its outputs.  Every step changes it."""

    def __init__(self, parts: Parts, directory: Path, callbacks: Sequence[Callback], display: Display) -> None:
        self.parts, self.run, self.world, self.directory = parts, parts.run, parts.world, directory
        self.state, self.alarms = State(Source(parts)), Alarms(parts.run.alarms)
        self.callbacks = callbacks if parts.world.leads else ()
        self.display = display
        self.records: RecordWriter | NoRecords = NoRecords()
        self.trackers: Sequence[Tracker] = ()

    def steps(self) -> None:
        """Run the steps, until the last one or until a signal or a callback stops the run."""
        run, state, world, source = self.run, self.state, self.world, self.state.source
        if state.owed is not None:
            self._tell(self._evaluated(state.owed))
            state.owed = None
            self.save()
        state.stop = world.any(state.asked)
        while state.step < run.steps and not state.stop:
            with self._keeping_steps():
                done = iterate(self.parts, source, self.directory, state.step, self.alarms)
            record = dataclasses.replace(done.record, notes=tuple(state.notes))
            record, failure = hand_over(self.parts, source, record)
            state.notes, state.step = [], state.step + 1
            stopping = next((alarm for alarm in done.alarms if alarm.action == "stop"), None)
            if failure is not None and world.size > 1:
                raise failure  # other processes have not failed
            if self.parts.held_out and (state.step % run.evaluation.every == 0 or state.step == run.steps):
                record = self._evaluated(record, failure, owed=stopping is None)
            self._tell(record)
            if stopping is not None:
                raise self._diverged(stopping, record.step, done.batch)
            if failure is not None:
                raise self._kept(failure) from failure
            state.stop = world.any(state.asked)
            is_best = state.best.get("step") == state.step
            if state.step % run.checkpoint.every == 0 or state.step == run.steps or is_best or state.stop:
                self.save()

    def evaluate_first(self) -> None:
        """Evaluate the student before training."""
        if self.world.size > 1:
            self.parts.engine.sync(0)  # all ranks give servers their weights together
        self.state.before = self.state.latest = evaluate_student(self.parts, self.directory, 0)[0]
        if self.state.before:
            self._call(lambda callback: callback.on_evaluation(0, dict(self.state.before)))

    def finish(self) -> Path:
        """Export the trained student."""
        folder, parts = self.directory / "model", self.parts
        results = {"step": self.state.step, "results": self.state.latest}
        return export(parts.model, parts.tokenizer, self.run, folder, **results)

    def save(self, *, undone: bool = False) -> None:
        """Save a checkpoint.  `undone`: the last step failed before any weight changed, and will be repeated."""
        save(self.parts, self.directory, self.state, self.alarms, undone=undone)
        folder = checkpoints.place_of(self.directory, self.state.step)
        self._call(lambda callback: callback.on_checkpoint(folder))

    def restore(self, saved: checkpoints.Checkpoint) -> None:
        restore(self.parts, self.state, self.alarms, saved)

    def end(self) -> None:
        self._call(lambda callback: callback.on_end(self.directory))

    def _evaluated(self, record: StepRecord, failure: EngineError | None = None, *, owed: bool = True) -> StepRecord:
        """The record with its evaluation.  If the engine fails, or has failed, the resumed run makes the evaluation and
        writes the record first, unless the run stops here anyway."""
        state = self.state
        try:
            if failure is not None:
                raise failure
            numbers, seconds = evaluate_student(self.parts, self.directory, state.step)
        except EngineError as error:
            if self.world.size > 1 or not owed:
                raise
            state.owed = record
            raise self._kept(error) from error
        state.latest = numbers
        score = numbers.get(f"avg@{self.run.evaluation.num_samples}")
        if score is not None and score > state.best.get("score", float("-inf")):
            state.best = {"step": state.step, "score": score}
        self._call(lambda callback: callback.on_evaluation(state.step, dict(numbers)))
        return dataclasses.replace(record, evaluation=numbers, seconds={**record.seconds, "evaluate": seconds})

    def _tell(self, record: StepRecord) -> None:
        with checkpoints.writing(self.directory):
            self.records.write(record)
        for tracker in self.trackers:
            tracker.log(record.step, numbers_of(record))
        self.display.update(record)
        self._call(lambda callback: callback.on_step(record))

    def _call(self, event: Callable[[Callback], bool | None]) -> None:
        if any([event(callback) is True for callback in self.callbacks]):
            self.state.asked = True

    @contextmanager
    def _keeping_steps(self) -> Iterator[None]:
        """If a teacher, an engine or the data fails, save the steps before, and say so in the error."""
        optimizer = self.parts.learner.optimizer
        done = optimizer.num_steps
        try:
            yield
        except (TeacherError, EngineError, DataError) as error:
            if optimizer.num_steps > done or self.world.size > 1 or self.state.step == 0:
                raise  # other weights than those of the step before, or other processes that have not failed
            raise self._kept(error, undone=True) from error

    def _kept(self, error: Exception, *, undone: bool = False) -> Exception:
        """The error, after saving the steps before it."""
        if not checkpoints.place_of(self.directory, self.state.step).exists():
            self.save(undone=undone)
        kept = f"The {self.state.step} steps before are kept. Go on with: tropd resume {self.directory}"
        return type(error)(f"{error} {kept}")

    def _diverged(self, alarm: Alarm, step: int, batch: ScoredBatch) -> TrainingDiverged:
        directory = self.world.own_folder(self.directory)
        folder = save_batch(directory, step, batch)
        return TrainingDiverged(
            f"{alarm.message} The batch is in {folder}: look at it with `tropd inspect {directory} --step {step}`. "
            f'To go on regardless set alarms.{alarm.name} = "warn".'
        )
