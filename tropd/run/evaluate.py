"""The evaluations of a run: of the student as it came, and after some of the steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tropd.checkpoints.checkpoint import writing
from tropd.evaluation.shared import evaluate_together
from tropd.monitoring.scores import write_scores
from tropd.rollout.draw_check import Overheard
from tropd.rollout.engine import Engine
from tropd.run.state import State
from tropd.training.assembly import Parts
from tropd.training.iteration import clock
from tropd.types import StepRecord


def evaluate_student(parts: Parts, directory: Path, version: int) -> tuple[dict[str, float], float]:
    """Numbers and seconds; no numbers where nothing is held out."""
    if not parts.held_out:
        return {}, 0.0
    seconds: dict[str, float] = {}
    engine: Engine = Overheard(parts.engine) if parts.run.rollout.servers else parts.engine
    with clock(seconds, "evaluate"):
        result = evaluate_together(
            parts.world,
            engine,
            parts.held_out,
            parts.eval_grader,
            parts.tokenizer,
            parts.run.evaluation,
            stop_ids=parts.stop_ids,
            version=version,
        )
        if isinstance(engine, Overheard):
            engine.check(parts.learner.forward, parts.run.tokens_per_micro_batch)
    if parts.world.leads:
        with writing(directory):
            write_scores(directory / "evaluations", version, result.items)
    return result.summary(), seconds["evaluate"]


def add_evaluation(parts: Parts, directory: Path, state: State, record: StepRecord) -> StepRecord:
    """Evaluate the student as it is, and remember whether it is the best."""
    numbers, seconds = evaluate_student(parts, directory, state.step)
    state.latest = numbers
    score = numbers.get(f"avg@{parts.run.evaluation.num_samples}")
    if score is not None and score > state.best.get("score", float("-inf")):
        state.best = {"step": state.step, "score": score}
    return dataclasses.replace(record, evaluation=numbers, seconds={**record.seconds, "evaluate": seconds})
