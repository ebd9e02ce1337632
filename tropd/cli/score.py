"""tropd score RUN.toml ROLLOUTS.jsonl -o SCORED.jsonl: what student and teacher say of texts that are there already.

A line of ROLLOUTS.jsonl is a `tropd.types.Rollout` as JSON, as in the rollouts.jsonl of a kept batch.  A line of the
result names the rollout and gives both log-probabilities of each response token (null: probability 0, or a response
that the teacher does not read), and its reward if there is one.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from tropd.base.reading import read_lines
from tropd.base.terminal import tell
from tropd.cli.arguments import TRUST, Arguments, read_run, with_its_code
from tropd.errors import ConfigError, DataError
from tropd.types import Rollout


def main(argv: list[str]) -> int:
    parser = Arguments(
        prog="tropd score",
        description="Log-probabilities of student and teacher for rollouts in a file.",
        epilog="Flags of the run, such as --teacher.path, are understood as by `tropd train`.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="the TOML file of a run")
    parser.add_argument("rollouts", type=Path, help="one rollout as JSON per line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a file that does not exist yet")
    parser.add_argument(TRUST, action="store_true", help="run the code that the run file names")
    asked, flags = parser.parse_known_args(argv)
    if asked.output.exists():
        raise ConfigError(f"{asked.output} exists already, and nothing is overwritten. Name another file.")
    run, notes = with_its_code(read_run([asked.run, *flags], "tropd score"), asked.trust_code)
    for note in notes:
        tell(note)
    run = replace(run, rollout=replace(run.rollout, engine=None), probes=())  # nothing is written or watched
    rollouts = _read(asked.rollouts)
    from tropd.data.graders import graded
    from tropd.objective.evidence import Needs
    from tropd.run.start import assemble
    from tropd.teachers.teacher import ScoreRequest
    from tropd.types import READER

    with tempfile.TemporaryDirectory() as folder:
        parts = assemble(run, Path(folder))
        early = bool(parts.briefer.needs(READER))  # the teacher is told of rewards or of the grader's words
        if parts.grader and early:
            rollouts = graded(parts.grader, rollouts, parts.tokenizer)
        as_read = parts.briefer.as_read(READER, rollouts)
        scores = iter(parts.teacher.score(ScoreRequest([read for read in as_read if read is not None])))
        own = parts.learner.measure(rollouts, Needs.NOTHING, 0)["student_logprobs_N"]
        if parts.grader and not early:
            rollouts = graded(parts.grader, rollouts, parts.tokenizer)
    lines: list[dict[str, Any]] = []
    student = own.split([len(r.response_ids) for r in rollouts])
    for rollout, read, mine in zip(rollouts, as_read, student, strict=True):
        theirs = None if read is None else _finite(next(scores).logprobs_T)
        lines.append({"id": rollout.id, "student_logprobs": _finite(mine), "teacher_logprobs": theirs})
        if parts.grader:
            lines[-1]["reward"] = rollout.reward
    temporary = asked.output.with_name(asked.output.name + ".tmp")
    try:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(asked.output)
    except OSError as error:
        raise ConfigError(f"{asked.output} cannot be written: {error}. Name another file.") from error
    tell(f"{len(lines)} rollouts scored in {asked.output}")
    return 0


def _finite(logprobs_T: Tensor) -> list[float | None]:
    """JSON has no infinity."""
    return [x if math.isfinite(x) else None for x in logprobs_T.tolist()]


def _problem(rollout: Rollout) -> str:
    """What its parts say against each other."""
    ids, prompt = rollout.token_ids, rollout.prompt.token_ids
    if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
        return "token_ids are not those of the prompt and at least one more"
    if min(ids) < 0:
        return f"it holds token id {min(ids)}"
    for name in ("authors", "behavior_logprobs"):
        if len(getattr(rollout, name)) != len(ids):
            return f"{name} has {len(getattr(rollout, name))} entries for {len(ids)} tokens"
    return ""


def _read(path: Path) -> list[Rollout]:
    adapter = TypeAdapter(Rollout)
    rollouts = []
    for number, line in read_lines(path, DataError):
        try:
            rollout = adapter.validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"line {number} of {path} is no rollout: {where}: {first['msg']}.") from None
        if problem := _problem(rollout):
            raise DataError(f"line {number} of {path} is no rollout: {problem}.")
        rollouts.append(rollout)
    if not rollouts:
        raise DataError(f"{path} holds no rollouts. Give one per line, as tropd keeps them in rollouts.jsonl.")
    return rollouts
