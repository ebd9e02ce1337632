"""tropd evaluate MODEL_OR_RUN: draw answers, grade them, say how sure the score is.

Each graded prompt is one line of items.jsonl, so an evaluation that was interrupted goes on where it stopped and ends
with the same numbers.  summary.json holds the numbers with everything they depend on.

With --briefed the model answers twice: as the student reads a prompt, and with what the run's teacher is told of it.
With --decay the run's teacher goes on where the student's answers are cut.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import AvoidSubcommands

from tropd.base.reading import nearest
from tropd.base.terminal import tell
from tropd.checkpoints.trained import Trained, is_run, load_student, student_of
from tropd.cli.arguments import TRUST, Arguments
from tropd.config.flags import read_flags
from tropd.config.run import Run
from tropd.config.stages import DataConfig, EvalConfig
from tropd.config.tables import to_dict
from tropd.errors import ConfigError, DataError
from tropd.evaluation.briefed import check_reader, measure_gap
from tropd.evaluation.decay import check_decay, measure_decay
from tropd.evaluation.models import check_trust, data_of, judged, settings_of
from tropd.model.loading import looks_local
from tropd.types import READER


@dataclass(frozen=True, kw_only=True)
class Evaluation(EvalConfig):
    """What is asked of the model: every knob is a flag."""

    data: DataConfig


def main(argv: list[str]) -> int:
    parser = Arguments(
        prog="tropd evaluate",
        description="Draw answers, grade them, and say how sure the score is.",
        epilog="Every knob of the evaluation is a flag: --grader exact --num-samples 8 --max-new-tokens 512 "
        "--sampling.temperature 0.7 --data.prompt-column question --limit 100. A run's own section is the default.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        help="a Hugging Face folder or id, an exported adapter, or a run's folder; with --briefed and --decay "
        "also a run file",
    )
    parser.add_argument("--briefed", action="store_true", help="answer also with the briefing of the run's teacher")
    parser.add_argument("--reader", help="with --briefed: the reader of the run whose briefing is meant")
    parser.add_argument(
        "--decay", type=int, nargs="+", metavar="L", help="let the run's teacher go on after L tokens of the student"
    )
    parser.add_argument("--data", help="a data file, folder or hub id; by default the run's held-out data")
    parser.add_argument("--step", type=int, help="a run's checkpoint; by default its finished model")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument(TRUST, action="store_true", help="import the grader of your own that the run file names")
    parser.add_argument("-o", "--output", type=Path, help="where items.jsonl and summary.json go")
    asked, flags = parser.parse_known_args(argv)
    source = Path(asked.model).expanduser()
    run = _run_of(source, asked)
    config = _configure(run, asked.data, flags)
    if not any(flag.partition("=")[0] == "--grader" for flag in flags):
        check_trust(run, config.grader, asked.trust_code)
    if asked.briefed and run is not None:
        check_reader(run, asked.reader or READER, asked.trust_code)
    if asked.decay and run is not None:
        check_decay(run, asked.decay, config.max_new_tokens)
    _evaluate(asked, config, run)
    return 0


def _run_of(source: Path, asked: Any) -> Run | None:
    """The run of a folder or a file; None for a model of no run."""
    if asked.reader is not None and not asked.briefed:
        raise ConfigError("--reader says whose briefing is meant, and without --briefed none is. Add --briefed.")
    if asked.briefed and asked.decay:
        raise ConfigError("--briefed and --decay are two measurements. Ask for one of them at a time.")
    if (asked.briefed or asked.decay) and source.is_file() and source.suffix == ".toml":
        if asked.step is not None:
            raise ConfigError(
                f"--step {asked.step} was asked for, but {asked.model} is a run file. Give the run's folder."
            )
        return Run.load(source)
    _check_there(source, asked)
    if is_run(source):
        return Run.load(source / "run.toml")
    if asked.briefed:
        raise ConfigError(
            f"--briefed asks what the teacher of a run is told, but {asked.model} is a model. Give a run file, or the "
            "folder of a run."
        )
    if asked.decay:
        raise ConfigError(
            f"--decay lets the teacher of a run go on, but {asked.model} is a model. Give a run file, or the folder of "
            "a run."
        )
    return None


def _check_there(source: Path, asked: Any) -> None:
    """A folder that is missing is said first: of its run nothing else can be missing."""
    if source.is_dir():
        return
    if source.exists():
        raise ConfigError(f"{asked.model} is a file. Give the folder of a run or a model.")
    if looks_local(asked.model):
        there = [folder.name for folder in source.parent.glob("*/")] if source.parent.is_dir() else []
        raise ConfigError(
            f"there is neither a run nor a model in {asked.model}: no such folder{nearest(source.name, there)}."
        )
    if asked.data is None:
        raise ConfigError(
            f"{asked.model} is no folder here, and a model of the hub brings no held-out data: give --data PATH too."
        )


def _configure(run: Run | None, data: str | None, flags: list[str]) -> Evaluation:
    settings = settings_of(run)
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(EvalConfig)}
    default = Evaluation(**values, data=data_of(run, data)[0])
    return read_flags(AvoidSubcommands[Evaluation], flags, "tropd evaluate", default=default)


def _evaluate(asked: Any, config: Evaluation, run: Run | None) -> None:
    from tropd.data.graders import resolve_grader

    grader = resolve_grader(config.grader) if config.grader else None
    if (asked.briefed or asked.decay) and grader is None:
        said = "--briefed" if asked.briefed else "--decay"
        raise ConfigError(f"{said} compares accuracies, and there is no grader. Give --grader.")
    if run is not None and Path(asked.model).expanduser().is_file():
        trained = student_of(run, asked.device, asked.dtype)
    else:
        trained = load_student(asked.model, asked.step, asked.device, asked.dtype)

    def place(version: str) -> Path:
        folder = asked.output or _default_folder(asked, config, version)
        if (folder / "summary.json").exists() and not (folder / "items.jsonl").exists():
            raise ConfigError(f"{folder} holds a summary.json that is no evaluation's. Name another folder with -o.")
        return folder

    if asked.briefed and run is not None and grader is not None:
        reader = asked.reader or READER
        result, version = measure_gap(trained, run, config.data, config, grader, place, reader=reader, tell=tell)
    elif asked.decay and run is not None and grader is not None:
        result, version = measure_decay(trained, run, config.data, config, grader, asked.decay, place, tell=tell)
    else:
        result, version = judged(trained, config.data, config, grader, place, tell=tell)
    folder = place(version)
    tell(result.describe())
    if grader is None:
        print("no grader: only lengths were measured. Give --grader for scores.")
    _write_summary(folder / "summary.json", asked.model, trained, config, version, result.summary())
    tell(f"answers: {folder / 'items.jsonl'}   numbers: {folder / 'summary.json'}")


def _default_folder(asked: Any, config: Evaluation, version: str) -> Path:
    """Weights and settings name the folder, so that the same question finds its own answers again."""
    said = json.dumps([to_dict(config), version, *([asked.reader] if asked.briefed else [])], sort_keys=True)
    kind = "-briefed" if asked.briefed else "-decay" if asked.decay else ""
    name = f"{Path(config.data.path).stem}{kind}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    path = Path(asked.model).expanduser()
    return (
        path / "evaluations" / name
        if is_run(path)
        else Path("evaluations") / f"{path.stem if path.is_file() else path.name}-{name}"
    )


def _write_summary(
    path: Path, model: str, trained: Trained, config: Evaluation, version: str, numbers: dict[str, float]
) -> None:
    said = {
        "model": model,
        "step": trained.step,
        "weights": version,
        "evaluation": to_dict(config),
        "results": numbers,
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(said, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"the summary cannot be written to {path}: {error}. Name another folder with -o.") from error
