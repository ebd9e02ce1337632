"""tropd plan RUN.toml --cluster 8xh100: what a run will need there, without reading any weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from tropd.base.reading import printable
from tropd.cli.arguments import TRUST, Arguments, read_run, with_its_code
from tropd.cli.console import make_console

if TYPE_CHECKING:
    from tropd.doctor.cost import Need
    from tropd.planning import Forecast

PHASES = {
    "prefix": "the teacher writes new texts",
    "write": "the student writes",
    "score": "the teacher scores",
    "readers": "other readers score",
    "measure": "the student scores itself",
    "train": "training",
    "sync": "weights to the servers",
}
Row = tuple[str, str, str]
WORTH = 0.05
"""Share of a step below which a saving is none."""


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--cluster", default="here")
    parser.add_argument("--dollars-per-hour", type=float)
    parser.add_argument(TRUST, action="store_true")
    asked, rest = parser.parse_known_args(argv)
    if rest in (["-h"], ["--help"]):
        print(
            "tropd plan RUN.toml [--cluster 8xh100] [--dollars-per-hour X] [--any.key value]\n\n"
            "--cluster 8xh100      devices that train, and write and score unless the run names servers for that;\n"
            "                      each server is one more of them. `here` (the default) measures this machine\n"
            "--dollars-per-hour X  of one device, for the cost of the run\n"
            f"{TRUST}          run the code that the run file names: models' (trust_remote_code) and your own\n\n"
            "Any other flag changes the run: `tropd train RUN.toml --help` lists them."
        )
        return 0
    run, notes = with_its_code(read_run(rest, "tropd plan"), asked.trust_code)
    for note in notes:
        make_console().print(printable(note), markup=False, soft_wrap=True)
    from tropd.planning import make_forecast, read_cluster

    forecast = make_forecast(run, *read_cluster(asked.cluster))
    _show(forecast, asked.dollars_per_hour)
    return 0 if forecast.fits else 1


def _show(forecast: Forecast, dollars: float | None) -> None:
    console = make_console()
    table = Table(title=_title(forecast), title_justify="left", show_header=False)
    sections = {"memory": _memory(forecast), "time of a step": _times(forecast), "in a step": _amounts(forecast)}
    sections["the whole run"] = _run(forecast, dollars)
    for section, rows in sections.items():
        for number, row in enumerate(rows):
            table.add_row("" if number else section, *row)
        table.add_section()
    console.print(table)
    for line in _remarks(forecast):
        console.print(line, soft_wrap=True, markup=False)
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in forecast.device.reached.items())
    fading = " Times are averages over the run, whose prefixes change." if forecast.texts.prefix else ""
    console.print(
        f"Every answer is taken to be as long as allowed, and devices to reach these shares of their peak: {shares}."
        f"{fading} Good to about a factor of two (docs/performance.md); start-up, evaluation, checkpoints and Python "
        "are not in it.",
        soft_wrap=True,
    )


def _memory(forecast: Forecast) -> list[Row]:
    from tropd.doctor.cost import gib

    whole, rows = _parts(forecast.need), []
    for name, num_bytes in _parts(forecast.each).items():
        rows.append((name, gib(num_bytes), f"of {gib(whole[name])}, sharded" if num_bytes < whole[name] else ""))
    rows.append(("a trainer at the peak", gib(int(forecast.peak)), f"there are {gib(int(forecast.device.memory))}"))
    return [
        *rows,
        *((f"on a {name} server", gib(int(size)), "weights alone") for name, size in forecast.served.items()),
    ]


def _times(forecast: Forecast) -> list[Row]:
    rows = [(PHASES[phase], spell(seconds), _where(forecast, phase)) for phase, seconds in forecast.seconds.items()]
    return [*rows, ("the whole step", spell(forecast.step_seconds), _sum_of(forecast))]


def _amounts(forecast: Forecast) -> list[Row]:
    from tropd.doctor.cost import gib

    rows = [("tokens by the student", f"{forecast.texts.written:,.0f}", "at most")]
    if forecast.teachers:
        rows.append(("answers of the teacher's servers", gib(int(forecast.score_bytes)), "over the network"))
    if (calls := forecast.calls) is not None:
        said = f"{calls.read:,.0f} tokens read, {calls.written:,.0f} written, their time is not counted"
        rows.append(("calls of the teacher's endpoint", f"{calls.number:,.0f}", said))
    if forecast.num_devices > 1:
        rows.append(("weights and gradients", gib(int(forecast.phases["train"].received)), "to each trainer"))
    return rows


def _run(forecast: Forecast, dollars: float | None) -> list[Row]:
    rows = [(f"{forecast.run.steps} steps", spell(forecast.run_seconds), "")]
    if (calls := forecast.calls) is not None:
        whole = f"{calls.tokens * forecast.run.steps:,.0f} tokens, as the student counts them"
        rows.append(("calls of the teacher's endpoint", f"{calls.number * forecast.run.steps:,.0f}", whole))
    if dollars is not None:
        cost = forecast.run_seconds / 3600 * forecast.all_devices * dollars
        rows.append(("cost", f"${cost:,.2f}", f"{forecast.all_devices} devices"))
    return rows


def _title(forecast: Forecast) -> str:
    servers = [(forecast.writers, "rollout"), (forecast.teachers, "teacher")]
    named = [f"{count} {kind} server{'s' if count > 1 else ''}" for count, kind in servers if count]
    return " + ".join([f"{forecast.num_devices} x {forecast.device.name}", *named])


def _where(forecast: Forecast, phase: str) -> str:
    if phase == "sync":
        return f"written once, read {forecast.writers} times, at {forecast.device.disk / 1e9:g} GB/s"
    kind, count = ("rollout", forecast.writers) if phase == "write" else ("teacher", forecast.teachers)
    away = count if phase in ("write", "prefix", "score") else 0
    if not away:
        return "" if forecast.num_devices == 1 else f"on {forecast.num_devices} trainers"
    ahead = ", for the next step" if forecast.run.rollout.staleness else ""
    return f"on {count} {kind} server{'s' if count > 1 else ''}{ahead}"


def _sum_of(forecast: Forecast) -> str:
    if not forecast.run.rollout.staleness:
        return "one after another" if forecast.writers or forecast.teachers else ""
    servers, own, between = forecast.split(forecast.writers, forecast.teachers)
    sides = f"servers {spell(servers)}, trainers {spell(own)}"
    return f"the longer of {sides}; and {spell(between)}"


def _remarks(forecast: Forecast) -> Iterator[str]:
    """What to do about it."""
    from tropd.doctor.cost import CURE, following_said, gib
    from tropd.planning.calls import budget_said

    yield from forecast.cautions
    yield from following_said(forecast.run, forecast.need)
    if forecast.calls is not None:
        yield from budget_said(forecast.run, forecast.calls)
    for name, size in forecast.served.items():
        if size > forecast.device.memory:
            yield (
                f"The weights of a {name} server do not fit on one {forecast.device.name}: it needs several "
                "(--tensor-parallel-size), which are not counted here."
            )
    if not forecast.fits:
        short = f"{gib(int(forecast.peak))} of {gib(int(forecast.device.memory))}"
        sharded = ", sharded too" if forecast.each != forecast.need and forecast.num_devices > 1 else ""
        yield f"{forecast.device.name} is too small for this{sharded}: each needs {short}. {CURE}"
    elif forecast.need.peak > forecast.device.memory:
        yield f"It fits on several only: torchrun --nproc-per-node {forecast.num_devices} (docs/parallel.md)."
    now, each = forecast.asked_at_once
    if forecast.writers and now < each:
        yield (
            f"A rollout server writes {now} of its {each} rollouts at a time: rollout.server.max_requests and "
            "max_tokens_in_flight bound that, and its memory may hold more."
        )
    yield from _about_writing(forecast)


def _about_writing(forecast: Forecast) -> Iterator[str]:
    """What rollout servers are worth, or would be."""
    writes = "write" in forecast.phases
    if forecast.writers and not writes:
        yield "The student writes nothing in a step: rollout servers are given weights, and write in evaluations alone."
    if forecast.run.rollout.servers_sleep:
        yield (
            "The servers have the trainers' GPUs and sleep while those train: nothing overlaps, and they cost nothing."
        )
        return
    if forecast.writers and (writes or forecast.saved):
        yield _about_ahead(forecast)
    if writes:
        yield from _about_servers(forecast)


def _about_ahead(forecast: Forecast) -> str:
    """What staleness does, or would do."""
    saved, ahead = forecast.saved, forecast.run.rollout.staleness
    synchronous = forecast.step_seconds + (saved if ahead else 0.0)
    share = f"{spell(saved)} of {spell(synchronous)} ({saved / synchronous:.0%})"
    if ahead:
        return f"Writing ahead (rollout.staleness = 1) saves {share} a step."
    if saved < WORTH * synchronous:
        return f"Writing ahead (rollout.staleness = 1) would save only {share} a step: leave it at 0."
    return f"Writing ahead (rollout.staleness = 1) would save {share} a step; batches are then one step old."


def _about_servers(forecast: Forecast) -> Iterator[str]:
    """How many servers would keep the trainer busy, if that is worth anything."""
    busy = forecast.busy
    if busy is None:
        most = forecast.texts.rollouts
        servers, own, _ = forecast.split(most, most if forecast.teachers else 0)
        yield (
            "No number of servers keeps the trainer busy: an answer is written token by token, so the next batch takes "
            f"at least {spell(servers)}, and training on one {spell(own)}. Larger batches (rollout.num_prompts) or "
            "shorter answers would."
        )
        return
    writers, teachers = busy
    asked = f"{writers} rollout server{'s' if writers > 1 else ''}"
    asked += f" and {teachers} teacher server{'s' if teachers > 1 else ''}" if teachers else ""
    step, sync = forecast.step_with(writers, teachers, 1), forecast.seconds_with(writers, teachers)["sync"]
    if step >= forecast.step_seconds:
        return
    given = ""
    if sync > WORTH * step:
        given = f", {spell(sync)} of it for weights on their way (rollout.weights_folder in memory makes that shorter)"
    yield f"{asked}, writing ahead, would keep the trainer busy: a step of {spell(step)}{given}."


def spell(seconds: float) -> str:
    """In the unit that a person would use."""
    for unit, size in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _parts(need: Need) -> dict[str, int]:
    parts = {"student": need.student, "teacher": need.teacher, "gradients": need.gradients}
    parts |= {"AdamW": need.moments + need.masters, "logits": need.logits, "activations": need.activations}
    return {name: size for name, size in (parts | {"keys and values": need.keys_and_values}).items() if size}
