"""What happened in a step, from its files: a kept batch (everything) or saved rollouts (parquet, less).

The tokens of the step are flat rows; N as everywhere.  For a kept batch, `inspect` plans the objective again on the
stored evidence and shows the result of each term.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropd.base.reading import check_file, refusing
from tropd.checkpoints import checkpoint as checkpoints
from tropd.config.run import Run
from tropd.data.chat import token_id
from tropd.errors import CheckpointError, ConfigError, EvidenceError, TrainingDiverged, require
from tropd.methods import NamedMethod
from tropd.model.loading import load_tokenizer
from tropd.monitoring.records import find_step
from tropd.objective.context import Context
from tropd.objective.evidence import StudentView, Tokens
from tropd.objective.heard import as_heard
from tropd.objective.memory import Memory
from tropd.objective.objective import Objective
from tropd.training.batches import ScoredBatch
from tropd.training.kept_batch import load_batch
from tropd.types import READER, Author, StepRecord

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The response tokens of one step."""

    source: Path
    ids: list[str]
    """Ids of the rollouts."""
    token_ids: list[tuple[int, ...]]
    """Whole sequences, prompts included."""
    sequences_N: list[int]
    places_N: list[int]
    """The index of each row's token in its sequence."""
    authors_N: list[Author]
    student_N: Tensor
    """NaN where unknown."""
    teacher_N: Tensor
    weights: dict[str, Tensor] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    """Evidence that is not finite, and errors of planning it again."""
    losses: dict[str, float | str] = field(default_factory=dict)
    """Each term's loss on the stored evidence, or why it is unknown."""

    @property
    def ratio_N(self) -> Tensor:
        return self.teacher_N - self.student_N

    def worst(self, number: int) -> list[int]:
        """Trained rows, undefined and infinite log-ratios first, then the largest; none without teacher scores."""
        if bool(self.teacher_N.isnan().all()):
            return []
        size_N = torch.nan_to_num(self.ratio_N.abs(), nan=torch.inf)
        unknown_N = self.student_N.isnan()
        rows = [
            n
            for n, author in enumerate(self.authors_N)
            if author is Author.STUDENT or (author is Author.TEACHER and not unknown_N[n])
        ]
        return sorted(rows, key=lambda n: -float(size_N[n]))[:number]

    def name(self, n: int) -> str:
        """The name of a token: its sequence and its place in the response, as in error messages."""
        start = self.places_N[self.sequences_N.index(self.sequences_N[n])]
        return f"sequence {self.sequences_N[n]} ({self.ids[self.sequences_N[n]]}), position {self.places_N[n] - start}"

    def context(self, n: int, decode: Decode, width: int = 16) -> tuple[str, str]:
        """The text before a token, and the token itself."""
        ids, place = self.token_ids[self.sequences_N[n]], self.places_N[n]
        return decode(ids[max(0, place - width) : place]), decode(ids[place : place + 1])


def read_step(directory: Path, step: int, run: Run) -> Kept:
    """Read the kept batch of a step, or else its saved rollouts."""
    if (directory / "batches" / f"step_{step:06d}").is_dir():
        return _of_batch(directory / "batches" / f"step_{step:06d}", load_batch(directory, step), run, step)
    saved = directory / "rollouts" / f"step_{step:06d}.parquet"
    if os.path.lexists(saved):
        return _of_parquet(saved)
    there = {
        what: ", ".join(str(int(p.stem[5:])) for p in sorted((directory / folder).glob("step_*"))) or "none"
        for what, folder in (("kept batches", "batches"), ("saved rollouts", "rollouts"))
    }
    raise ConfigError(
        f"{directory} kept nothing of step {step}. Steps with "
        + "; with ".join(f"{what}: {steps}" for what, steps in there.items())
        + ". rollout.save_every decides which steps are saved."
    )


def read_record(directory: Path, step: int) -> StepRecord | None:
    path = directory / "records.jsonl"
    return find_step(path, step) if path.exists() else None


def remembered(directory: Path, step: int) -> list[str]:
    """What the run remembered by the newest checkpoint up to this step's end, in lines."""
    steps = [number for number in checkpoints.steps_kept(directory) if number <= step + 1]
    if not steps:
        return []
    memory = Memory()
    saved = checkpoints.load(checkpoints.place_of(directory, steps[-1]), tensors=False)
    memory.load_state_dict(saved.state.get("memory", {}))
    return [f"remembered after {steps[-1]} steps: {name} = {_in_short(x)}" for name, x in memory.items()]


def _in_short(x: Tensor) -> str:
    if x.dtype == torch.uint8:
        return f"a text of {len(x)} bytes"
    return f"{x.item():g}" if x.dim() == 0 else f"{tuple(x.shape)} from {x.min():g} to {x.max():g}"


def _of_batch(source: Path, batch: ScoredBatch, run: Run, step: int) -> Kept:
    tokens = batch.tokens
    places_N = [len(r.prompt.token_ids) + t for r in batch.rollouts for t in range(len(r.response_ids))]
    unknown_N = torch.full((len(tokens),), torch.nan)
    student_N, teacher_N = tokens.peek("student_logprobs_N"), tokens.peek("teacher_logprobs_N")
    student_N = (unknown_N if student_N is None else student_N).double().clone()
    if not batch.measured:  # then it is the sampler's word, and nothing was sampled where the teacher wrote
        student_N[tokens.authors_N != Author.STUDENT] = torch.nan
    kept = Kept(
        source=source,
        ids=[r.id for r in batch.rollouts],
        token_ids=[r.token_ids for r in batch.rollouts],
        sequences_N=tokens.sequences_N.tolist(),
        places_N=places_N,
        authors_N=[Author(a) for a in as_heard(tokens, [READER]).authors_N.tolist()],
        student_N=student_N,
        teacher_N=(unknown_N if teacher_N is None else teacher_N).double(),
    )
    weights, losses, said = _plan_again(tokens, run, step)
    return dataclasses.replace(kept, weights=weights, losses=losses, findings=[*_not_finite(kept, tokens), *said])


def _not_finite(kept: Kept, tokens: Tokens) -> list[str]:
    """Evidence that is not a finite number, by name and place."""
    found = []
    for f in dataclasses.fields(Tokens):
        x: Any = tokens.peek(f.name)
        if not isinstance(x, Tensor) or not x.is_floating_point() or bool(x.isfinite().all()):
            continue
        bad = (~x.isfinite()).nonzero()
        first = bad[0].tolist()
        value, row = float(x[tuple(first)]), first[0]
        where = kept.name(row) if "_N" in f.name else f"sequence {row}"
        column = f", column {first[1]}" if len(first) > 1 else ""
        places = f"{len(bad)} of {x.numel()} places"
        found.append(f"`{f.name}` is not finite in {places}; first: {value} at {where}{column}.")
    return found


def _plan_again(tokens: Tokens, run: Run, step: int) -> tuple[dict[str, Tensor], dict[str, float | str], list[str]]:
    if isinstance(run.method, NamedMethod):
        return {}, {}, [f"method {run.method.name!r} is not imported here. Read it, then add --trust-code."]
    context = Context(progress=step / run.steps)
    try:
        objective = run.method.objective.with_ids(lambda text: token_id(text, load_tokenizer(run.student, "student")))
        plan = objective.plan(tokens, context)
    except (ConfigError, EvidenceError) as error:
        return {}, {}, [f"planning method {run.method.name!r} again on this evidence is refused: {error}"]
    own = tokens.peek("student_logprobs_N")
    losses: dict[str, float | str] = {}
    for term in objective.terms:
        if own is None:
            losses[term.name] = "needs the student's forward pass"
            continue
        try:
            output = Objective(term)(tokens, StudentView(logprobs_N=own), plan)
            losses[term.name] = output.terms[term.name].loss
        except EvidenceError:  # a kept batch holds no distribution of the student
            losses[term.name] = "needs the student's forward pass"
        except TrainingDiverged as error:
            losses[term.name] = str(error)
    said = [f"planning method {run.method.name!r} again on this evidence works: every weight and reward is finite."]
    if run.optimizer.num_updates > 1:
        said.append(f"the run took {run.optimizer.num_updates} updates; here the batch is planned as one.")
    return plan.weights, losses, said


def _of_parquet(path: Path) -> Kept:
    require("pyarrow", "data", "reading saved rollouts")
    import pyarrow.parquet as pq

    check_file(path, CheckpointError)
    with refusing(lambda why: f"{path} cannot be read as saved rollouts: {why}.", CheckpointError):
        return _of_rows(path, pq.read_table(path).to_pylist())


def _of_rows(path: Path, rows: list[dict[str, Any]]) -> Kept:
    authors = [[Author[a.upper()] for a in row["authors"]] for row in rows]
    places = [[t for t, a in enumerate(of) if a is not Author.CONTEXT] for of in authors]

    def flat(column: str) -> Tensor:
        values = [row[column][t] if column in row else None for row, at in zip(rows, places, strict=True) for t in at]
        return torch.tensor([float("nan") if x is None else x for x in values], dtype=torch.float64)

    def author(row: dict[str, Any], t: int) -> Author:
        """What nobody could say anything of is nobody's, as in training."""
        teaches = not known or any(row[column][t] for column in known)
        return Author[row["authors"][t].upper()] if teaches else Author.ENVIRONMENT

    names = [name.removeprefix("weight_") for name in rows[0] if name.startswith("weight_")] if rows else []
    known = (
        ["teacher_logprobs", *(f"weight_{name}" for name in names)] if names and "teacher_logprobs" in rows[0] else []
    )
    return Kept(
        source=path,
        ids=[row["id"] for row in rows],
        token_ids=[tuple(row["token_ids"]) for row in rows],
        sequences_N=[s for s, at in enumerate(places) for _ in at],
        places_N=[t for at in places for t in at],
        authors_N=[author(row, t) for row, at in zip(rows, places, strict=True) for t in at],
        student_N=flat("behavior_logprobs"),
        teacher_N=flat("teacher_logprobs"),
        weights={name: flat(f"weight_{name}") for name in names},
        findings=["saved rollouts hold no evidence beyond these columns; only kept batches can be planned again."],
    )
