"""tropd inspect RUN --step N: what a step looked like, term by term and at its worst tokens.

tropd inspect RUN --rock N: the types of tokens whose divergence is highest over the saved rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tropd.base.reading import printable
from tropd.checkpoints.trained import is_run
from tropd.cli.arguments import TRUST, Arguments, without_code
from tropd.cli.console import make_console
from tropd.errors import ConfigError
from tropd.types import StepRecord

if TYPE_CHECKING:
    from tropd.config.run import Run
    from tropd.doctor.inspection import Kept

Decode = Callable[[Sequence[int]], str]


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd inspect", description="Show a step: its terms, its worst tokens, broken evidence.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, help="a step whose batch or rollouts were kept")
    parser.add_argument(
        "--rock",
        type=int,
        help="show so many types of tokens by mean KL times frequency, from --step on (half the run)",
    )
    parser.add_argument("--worst", type=int, default=10, help="how many tokens to show (10)")
    parser.add_argument(TRUST, action="store_true", help="run the code that comes with the student's tokenizer")
    asked = parser.parse_args(argv)
    if asked.rock is not None and asked.rock < 1:
        raise ConfigError(f"--rock is {asked.rock}: give a number of types of tokens, 1 or more.")
    if asked.worst < 0:
        raise ConfigError(f"--worst is {asked.worst}: give a number of tokens, or 0 for none.")
    if not is_run(asked.run):
        raise ConfigError(f"{asked.run} is no run's folder: it holds no run.toml.")

    from tropd.config.run import Run
    from tropd.doctor.inspection import read_record, read_step, remembered

    run, _ = without_code(Run.load(asked.run / "run.toml"), asked.trust_code)
    console = make_console()
    if asked.rock is not None:
        _show_rock(asked.run, asked.rock, asked.step, _decoder(run, console), console)
        return 0
    if asked.step is None:
        raise ConfigError("a step to show is missing. Give --step N, or --rock N for types of tokens.")
    kept, record = read_step(asked.run, asked.step, run), read_record(asked.run, asked.step)
    said = [
        f"step {asked.step} of {asked.run}: {len(kept.ids)} rollouts, {len(kept.places_N)} response tokens",
        f"read from {kept.source}",
        *(f"note: {note}" for note in (record.notes if record else ())),
        *(f"alarm: {alarm}" for alarm in (record.alarms if record else ())),
        *(() if record else ("- records.jsonl holds no record of this step that can be read.",)),
        *remembered(asked.run, asked.step),
        *(f"- {finding}" for finding in kept.findings),
    ]
    console.print(Text("\n".join(said)))
    console.print(_terms(kept, record))
    console.print(_tokens(kept, asked.worst, _decoder(run, console)))
    return 0


def _decoder(run: Run, console: Console) -> Decode:
    from tropd.model.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(run.student, "student")
    except ConfigError as error:  # the numbers are worth showing without their text
        console.print(Text(f"tokens are shown as ids: {error}"))
        return lambda ids: " ".join(map(str, ids))
    return lambda ids: str(tokenizer.decode(list(ids)))


def _show_rock(directory: Path, number: int, first: int | None, decode: Decode, console: Console) -> None:
    """Those that stand first, and what to put into a run file to leave them out."""
    from tropd.monitoring.rock import COMMON, types_of

    saved = {
        int(path.stem.removeprefix("step_")): path for path in sorted((directory / "rollouts").glob("step_*.parquet"))
    }
    first = max(saved, default=0) // 2 if first is None else first
    chosen = [path for step, path in saved.items() if step >= first]
    if not chosen:
        there = f"of steps {min(saved)} to {max(saved)}" if saved else "of no step"
        raise ConfigError(
            f"{directory} has saved rollouts {there}, and none from step {first} on. rollout.save_every decides which "
            "steps are saved."
        )
    found = types_of(chosen)
    common, whole = found.common(), sum(t.total for t in found.types)
    console.print(
        f"{found.num_tokens:,} tokens of the student in {len(chosen)} saved steps from step {first} on, "
        f"{len(found.types):,} types; KL is log pi_S - log pi_T of the written tokens"
        + (f"; {found.infinite} that the teacher finds impossible are left out" if found.infinite else "")
    )
    table = Table("id", "token", "count", "frequency", "mean KL", "R", "share of KL", title="R = mean KL * frequency")
    for t in found.types[:number]:
        share = f"{t.total / whole:.1%}" if whole > 0 else ""
        mark = " *" if t.token_id in common else ""
        cells = [
            f"{t.token_id}{mark}",
            printable(decode([t.token_id])),
            f"{t.count}",
            f"{t.count / found.num_tokens:.2%}",
        ]
        table.add_row(*map(Text, [*cells, f"{t.mean:.4g}", f"{t.total / found.num_tokens:.4g}", share]))
    console.print(table)
    console.print(
        f"* one of the {COMMON} most frequent, which the paper's code leaves out. To train without the others:"
    )
    ids = ", ".join(map(str, found.rock(number)))
    console.print(Text(f'[[method.plus]]\nname = "rock"\nids = [{ids}]'), soft_wrap=True)


def _terms(kept: Kept, record: StepRecord | None) -> Table:
    """Losses as recorded where the step was recorded, else as computed again."""
    recorded = {name: part.loss for name, part in record.terms.items()} if record else {}
    losses = {**kept.losses, **recorded}
    numbers = [abs(x) for x in losses.values() if isinstance(x, float) and math.isfinite(x)]
    table = Table("term", "loss", "loss share", "tokens", "token share", "weight", title="terms", title_justify="left")
    for name in dict.fromkeys([*kept.weights, *losses]):
        loss, weight_N = losses.get(name), kept.weights.get(name)
        said = f"{loss:.4g}" if isinstance(loss, float) else (loss or "")
        share = f"{abs(loss) / (sum(numbers) or 1.0):.1%}" if isinstance(loss, float) and math.isfinite(loss) else ""
        cells = [name, said, share]
        if weight_N is not None:
            num_tokens = int((weight_N.nan_to_num() != 0).sum())
            share = f"{num_tokens / max(len(weight_N), 1):.1%}"
            cells += [str(num_tokens), share, f"{float(weight_N.nansum()):.4g}"]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _tokens(kept: Kept, number: int, decode: Decode) -> Text:
    """A weight of 1 is that of a token in a plain mean over all tokens."""
    said = Text()
    rows = kept.worst(number)
    if rows:
        said.append(
            "where student and teacher differ most\nx = log pi_T - log pi_S; a weight of 1 is that of a plain mean\n"
        )
    for n in rows:
        before, token = kept.context(n, decode)
        student, teacher, x = (_number(float(x_N[n])) for x_N in (kept.student_N, kept.teacher_N, kept.ratio_N))
        weights = {name: float(weight_N[n]) * len(weight_N) for name, weight_N in kept.weights.items()}
        counted = ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items() if weight != 0) or "none"
        said.append(f"\nx = {x}", style="bold")
        said.append(f"  student {student}  teacher {teacher}  weight: {counted}\n")
        said.append(f"  {kept.name(n)}, by the {kept.authors_N[n].name.lower()}\n  {printable(before)}")
        said.append(f"[{printable(token)}]\n", style="reverse")
    return said


def _number(x: float) -> str:
    return "unknown" if math.isnan(x) else f"{round(x, 3) + 0.0:.3f}"  # + 0: never -0.000
