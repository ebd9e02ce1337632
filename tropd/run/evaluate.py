"""The evaluations of a run: of the student before training, and after some of the steps."""

from __future__ import annotations

from pathlib import Path

from tropd.checkpoints.checkpoint import writing
from tropd.evaluation.shared import evaluate_together
from tropd.monitoring.scores import write_scores
from tropd.rollout.draw_check import Overheard
from tropd.rollout.engine import Engine
from tropd.training.assembly import Parts
from tropd.training.iteration import clock


def evaluate_student(parts: Parts, directory: Path, version: int) -> tuple[dict[str, float], float]:
    """The numbers of an evaluation and its seconds; no numbers if no prompts are held out."""
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
