"""tropd export RUN [--step N] -o FOLDER: a checkpoint as a folder that transformers (or PEFT) reads."""

from __future__ import annotations

from pathlib import Path

from tropd.base.terminal import tell
from tropd.checkpoints.trained import load_checkpoint
from tropd.cli.arguments import Arguments, new_folder


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd export", description="Write a checkpoint as a Hugging Face folder.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, help="which checkpoint; by default the newest")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder that does not exist yet")
    asked = parser.parse_args(argv)
    new_folder(asked.output)
    from tropd.checkpoints.export import export

    trained = load_checkpoint(asked.run, asked.step, "cpu")
    assert trained.run is not None and trained.step is not None
    results = _results(asked.run, trained.step)
    export(trained.model, trained.tokenizer, trained.run, asked.output, step=trained.step, results=results)
    tell(f"the student after {trained.step} steps is in {asked.output}")
    return 0


def _results(directory: Path, step: int) -> dict[str, float]:
    """The evaluation of exactly these weights, if there was one: a card must not show another step's numbers."""
    from tropd.monitoring.records import find_step

    if not (directory / "records.jsonl").exists():
        return {}
    record = find_step(directory / "records.jsonl", step - 1)
    return (record and record.evaluation) or {}
