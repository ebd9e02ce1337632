"""tropd plan RUN.toml --cluster 8xh100: what a run will need there, without reading any weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from tropd.cli import make_console
from tropd.commands import Arguments, read_run

if TYPE_CHECKING:
    from tropd.doctor.cost import Need
    from tropd.planning import Plan


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--cluster", default="here")
    parser.add_argument("--dollars-per-hour", type=float)
    asked, rest = parser.parse_known_args(argv)
    if rest in (["-h"], ["--help"]):
        print(
            "tropd plan RUN.toml [--cluster 8xh100] [--dollars-per-hour X] [--any.key value]\n\n"
            "--cluster 8xh100      devices that train and write; `here` (the default) measures this machine\n"
            "--dollars-per-hour X  of one device, for the cost of the run\n\n"
            "Any other flag changes the run: `tropd train RUN.toml --help` lists them."
        )
        return 0
    run = read_run(rest, "tropd plan")
    from tropd.planning import make_plan, read_cluster

    plan = make_plan(run, *read_cluster(asked.cluster))
    _show(plan, asked.dollars_per_hour)
    return 0 if plan.fits else 1


def _show(plan: Plan, dollars: float | None) -> None:
    from tropd.doctor.cost import gib

    console, need = make_console(), plan.need
    table = Table(title=f"{plan.num_devices} x {plan.device.name}", title_justify="left", show_header=False)
    each = _parts(plan.sharded)
    for name, num_bytes in _parts(need).items():
        sharded = f", {gib(each[name])} on each of {plan.num_devices}" if each[name] != num_bytes else ""
        table.add_row("memory", name, gib(num_bytes) + sharded)
    for phase, seconds in plan.seconds.items():
        table.add_row("seconds per step", phase, f"{seconds:.3g}")
    table.add_row("tokens per step", "written, at most", f"{plan.tokens['written']:,.0f}")
    table.add_row("network per step", "a teacher server's answers", gib(int(plan.score_bytes)))
    if plan.num_devices > 1:
        table.add_row("", "layers gathered, for each device", gib(int(plan.gather_bytes)))
    table.add_row("servers of this device", "teachers that keep the trainer busy", str(plan.teacher_devices))
    table.add_row("", "engines that keep the trainer busy", str(plan.writing_devices))
    table.add_row("the whole run", f"{plan.steps} steps", f"{plan.run_seconds / 3600:.3g} h")
    if dollars is not None:
        table.add_row("", "cost", f"${plan.run_seconds / 3600 * plan.num_devices * dollars:,.2f}")
    console.print(table)
    if not plan.fits:
        short = f"{gib(plan.sharded.peak)} of {gib(int(plan.device.memory))}"
        console.print(f"[bold red]{plan.device.name} is too small for this, sharded too: each needs {short}.[/]")
    elif need.peak > plan.device.memory:
        console.print(f"It fits sharded only: torchrun --nproc-per-node {plan.num_devices} (docs/parallel.md).")
    shares = ", ".join(f"{phase} {share:.0%}" for phase, share in plan.device.reached.items())
    console.print(
        f"Every answer is taken to be as long as allowed, and devices to reach these shares of their peak: {shares}. "
        "Good to about a factor of two (docs/performance.md); start-up, evaluation, checkpoints and Python are not in "
        "it.",
        soft_wrap=True,
    )


def _parts(need: Need) -> dict[str, int]:
    parts = {"student": need.student, "teacher": need.teacher, "gradients": need.gradients}
    parts |= {"AdamW": need.moments + need.masters, "logits": need.logits, "activations": need.activations}
    return parts | {"keys and values": need.keys_and_values, "at the peak": need.peak}
