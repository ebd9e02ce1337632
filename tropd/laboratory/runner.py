"""All trials of a comparison, on all cores.  Finished trials are on disk; a kill costs only the trials in flight."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import IO, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from tropd.checkpoints.run_folder import locked
from tropd.config.methods import complete
from tropd.config.run import Run
from tropd.errors import ConfigError, MethodWarning
from tropd.laboratory.lab import Lab, Trial, trials
from tropd.laboratory.trial import Outcome, fingerprint_of, pair_of, run_of, run_trial
from tropd.testbeds import TESTBEDS

_OUTCOME = TypeAdapter(Outcome)
A = TypeVar("A")
R = TypeVar("R")


def compare(lab: Lab, *, workers: int = 1, tell: Callable[[str], None] = print) -> list[Outcome]:
    """Every outcome of the comparison, in order; those on disk are not repeated."""
    quiet()
    lab = dataclasses.replace(lab, methods={name: complete(m, f"methods.{name}") for name, m in lab.methods.items()})
    directory = Path(lab.output)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.jsonl").touch()
    with locked(directory, "results.jsonl"):
        known = read_outcomes(directory / "results.jsonl")
        _make_pairs(lab, known, workers, tell)
        _check(lab, known)
        shared = _take_over(lab, known)
        left = [trial for trial in trials(lab) if trial.key not in known]
        if known:
            said = f" ({len(shared)} of them the same runs in comparisons beside it)" if shared else ""
            tell(f"{len(known)} outcomes are there already{said}; {len(left)} trials to go")
        with (directory / "results.jsonl").open("a") as file:
            for outcome in shared:
                _write(file, outcome)
            for trial, outcome in _run_all(lab, left, workers):
                known[trial.key] = outcome
                _write(file, outcome)
                tell(f"{len(left) - sum(t.key not in known for t in left)}/{len(left)}  {_line(outcome)}")
    return [known[trial.key] for trial in trials(lab) if trial.key in known]


def _write(file: IO[str], outcome: Outcome) -> None:
    file.write(json.dumps(asdict(outcome)) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _take_over(lab: Lab, known: dict[str, Outcome]) -> list[Outcome]:
    """Reuse outcomes of comparisons in sibling folders with the same settings, even under another name."""
    beside = Path(lab.output).parent.glob("*/results.jsonl")
    there = {(o.testbed, o.fingerprint): o for path in sorted(beside) for o in _peek(path)}
    taken = []
    for trial in trials(lab):
        if trial.key in known or trial.testbed.endswith(".toml"):
            continue
        asked = fingerprint_of(run_of(lab, trial, pair_of(lab, trial.testbed, trial.seed)))
        if (found := there.get((trial.testbed, asked))) is not None:
            known[trial.key] = dataclasses.replace(found, method=trial.method)
            taken.append(known[trial.key])
    return taken


def _peek(path: Path) -> list[Outcome]:
    """The complete lines of a file that another process may be writing; none if it is no comparison's."""
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        return [_OUTCOME.validate_json(line) for line in lines]
    except ValidationError:
        return []


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """Outcomes by the key of their trials.  A torn last line is cut off, and its trial is run again."""
    if not path.exists():
        return {}
    found: dict[str, Outcome] = {}
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        path.write_bytes(b"".join(lines[:-1]))
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            outcome = _OUTCOME.validate_json(line)
        except ValidationError as error:
            raise ConfigError(
                f"{path}, line {number}, is no outcome of a trial: {error.errors()[0]['msg']}. Remove the line, and "
                "its trial is run again."
            ) from None
        found[_trial_of(outcome).key] = outcome
    return found


def _trial_of(outcome: Outcome) -> Trial:
    return Trial(testbed=outcome.testbed, method=outcome.method, learning_rate=outcome.learning_rate, seed=outcome.seed)


def _check(lab: Lab, known: dict[str, Outcome]) -> None:
    """Refuse outcomes on disk whose settings differ from the current ones."""
    for trial in trials(lab):
        outcome = known.get(trial.key)
        if outcome is None:
            continue
        asked = fingerprint_of(run_of(lab, trial, pair_of(lab, trial.testbed, trial.seed)))
        if asked not in (outcome.fingerprint, _written_down(lab, trial)):
            raise ConfigError(
                f"{lab.output} holds an outcome of '{trial.key}' with other settings than are asked for now. Set "
                "another output, or put the settings back. New methods, seeds and learning rates may be added freely."
            )


def _written_down(lab: Lab, trial: Trial) -> str:
    """The fingerprint of the run in the trial's folder.  Options that are newer than that run have their defaults."""
    path = Path(lab.output) / "trials" / trial.folder / "run.toml"
    try:
        return fingerprint_of(Run.load(path))
    except ConfigError:  # no such file, or an option that is gone
        return ""


def _make_pairs(lab: Lab, known: dict[str, Outcome], workers: int, tell: Callable[[str], None]) -> None:
    """Make all pairs first, so that no two trials make the same one."""
    wanted = list(dict.fromkeys((t.testbed, t.seed) for t in trials(lab) if t.testbed in TESTBEDS))
    missing = [(bed, seed) for bed, seed in wanted if not (Path(lab.pairs) / f"{bed}-{seed}" / "pair.json").exists()]
    if not missing:
        return
    tell(f"making {len(missing)} pairs of teacher and student in {lab.pairs}")
    for (bed, seed), facts in _spread(_pair_facts, [(lab, bed, seed) for bed, seed in missing], workers):
        said = ", ".join(f"{who} {facts[f'{who}_accuracy']:.3f}" for who in ("teacher", "student"))
        tell(f"{bed}, seed {seed}: {said}, {facts['seconds']:.0f} s of CPU time")


def _pair_facts(asked: tuple[Lab, str, int]) -> tuple[tuple[str, int], dict[str, float]]:
    lab, bed, seed = asked
    pair = pair_of(lab, bed, seed)
    assert pair is not None
    return (bed, seed), pair.facts


def _run_all(lab: Lab, left: list[Trial], workers: int) -> Iterator[tuple[Trial, Outcome]]:
    for trial, outcome in _spread(_run_one, [(lab, trial) for trial in left], workers):
        if outcome is not None:
            yield trial, outcome


def _run_one(asked: tuple[Lab, Trial]) -> tuple[Trial, Outcome | None]:
    return asked[1], run_trial(*asked)


def _spread(work: Callable[[A], R], asked: list[A], workers: int) -> Iterator[R]:
    """Outcomes as trials finish.  After a failure no further trials start."""
    if workers == 1 or len(asked) < 2:
        yield from map(work, asked)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_core)
    try:
        futures: list[Future[R]] = [pool.submit(work, a) for a in asked]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _one_core() -> None:
    """Restrict a worker to one core, leave Ctrl-C to the process that started it, and avoid repeated messages."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore", MethodWarning)
    quiet()


def quiet() -> None:
    """Hide transformers' progress bars: thousands of models are read and written here."""
    from tropd.model import hf

    hf.quiet()


def _line(outcome: Outcome) -> str:
    end = f"{outcome.scores[0]:.3f} -> {outcome.score:.3f}" if outcome.status == "done" else "diverged"
    rate = f"rate {outcome.learning_rate:g}"
    return f"{outcome.testbed}, {outcome.method}, {rate}, seed {outcome.seed}: {end} ({outcome.seconds:.0f} s)"
