"""Folders of runs, written by what writes them in a real run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.report.examples import rollout, step_record
from tests.tiny import byte_tokenizer
from tropd.config.models import StudentConfig, TeacherConfig
from tropd.config.run import Run
from tropd.config.stages import DataConfig, EvalConfig
from tropd.evaluation.results import EvalAnswer, EvalItem, summarize
from tropd.monitoring.records import RecordWriter
from tropd.monitoring.rollouts import write_rollouts
from tropd.monitoring.scores import write_scores
from tropd.objective.support import NOTHING
from tropd.types import Finish, TermStats

WORDS = " the cat sat"


def items_of(scores: Sequence[Sequence[float]]) -> list[EvalItem]:
    """One prompt per row of scores."""

    def answer(score: float) -> EvalAnswer:
        return EvalAnswer(text="", num_tokens=3, finish=Finish.STOP, score=score)

    return [EvalItem(id=str(i), samples=tuple(map(answer, row)), greedy=answer(row[0])) for i, row in enumerate(scores)]


def evaluation_of(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    return summarize(items_of(scores), EvalConfig(num_samples=len(scores[0]))).summary()


def probes_at(step: int, steps: int) -> dict[str, float]:
    share = (step + 1) / steps
    return {
        "trust/share": 0.5 + 0.4 * share,
        "trust/tv": 0.5 - 0.4 * share,
        "reward/mean": share,
        "entropy/student": 2.0 - share,
        "entropy/teacher": 1.0,
        "overlap/top_k": 0.6 + 0.3 * share,
        "length/mean": 12.0 + step % 3,
        "length/max": 16.0,
        "finish/truncated": 0.1,
        "ratio/below_-5": 0.02,
        **{f"ratio/p{q:02}": math.log(q / 50) for q in (1, 5, 50, 95, 99)},
        **{f"position/{b}/tv": 0.1 * b / 8 for b in range(8)},
    }


def write_folder(
    directory: Path,
    *,
    steps: int = 6,
    planned: int | None = None,
    before: Sequence[Sequence[float]] | None = None,
    after: Sequence[Sequence[float]] | None = None,
    kept: bool = True,
    saved: Sequence[int] = (),
    texts: Sequence[str] = (WORDS,),
    alarms: dict[int, str] | None = None,
    seed: int = 0,
    **run: Any,
) -> Path:
    """A run whose first and last evaluations had these scores; `kept`: score by score, not in sum alone."""
    made = Run(
        student=StudentConfig(path="student"),
        teacher=TeacherConfig(path="teacher"),
        data=DataConfig(path="data.jsonl"),
        steps=planned or max(steps, 1),
        seed=seed,
        output=str(directory),
        **run,
    )
    directory.mkdir(parents=True)
    (directory / "run.toml").write_text(made.dump())
    facts = {"method": made.method.name, "student": "student", "teacher": "teacher"}
    with RecordWriter(
        directory / "records.jsonl", {**facts, "before": evaluation_of(before) if before else {}}
    ) as file:
        for step in range(steps):
            last = step == steps - 1
            terms = {
                "trusted": TermStats(loss=-0.1, tokens=60.0, weight=60.0),
                "outlier": TermStats(loss=0.4, tokens=40.0, weight=40.0),
            }
            changes: dict[str, Any] = {"terms": terms, "probes": probes_at(step, steps)}
            if last and after:
                changes["evaluation"] = evaluation_of(after)
            if alarms and step in alarms:
                changes["alarms"] = (alarms[step],)
            file.write(step_record(step, **changes))
    if kept:
        for step, scores in ((0, before), (steps, after)):
            if scores:
                write_scores(directory / "evaluations", step, items_of(scores))
    for step in saved:
        write_transcripts(directory, step, texts)
    return directory


def write_transcripts(directory: Path, step: int, texts: Sequence[str]) -> None:
    """The teacher writes each first token; every third of the rest is an outlier, with what the teacher preferred."""
    tokenizer = byte_tokenizer()
    question = tuple(tokenizer.encode("Q?"))
    rollouts = [rollout(f"{step}-{i}", question, tuple(tokenizer.encode(text))) for i, text in enumerate(texts)]
    lengths = [len(r.response_ids) for r in rollouts]
    places_N = torch.cat([torch.arange(n) for n in lengths])
    outlier_N = (places_N % 3 == 1).float()
    guided_N = (places_N == 0).float()
    student_N = -0.1 - 0.01 * places_N
    ids_NK = torch.tensor([tokenizer.encode("xyz")] * len(places_N))
    logprobs_NK = torch.tensor([[-0.5, -1.5, -3.0]]).repeat(len(places_N), 1)
    logprobs_NK[outlier_N == 0] = NOTHING
    write_rollouts(
        directory / "rollouts",
        step,
        rollouts,
        decode=lambda token_ids: str(tokenizer.decode(list(token_ids))),
        student_logprobs_N=student_N,
        teacher_logprobs_N=student_N - outlier_N * (4.0 + places_N),
        teacher_topk_ids_NK=ids_NK,
        teacher_topk_logprobs_NK=logprobs_NK,
        weights={"trusted": 1.0 - outlier_N - guided_N, "outlier": outlier_N, "guidance": guided_N},
    )
