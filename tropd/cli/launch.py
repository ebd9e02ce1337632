"""tropd launch RUN.toml --processes 8 --cluster ray: a run on a cluster, or the lines that start it elsewhere."""

from __future__ import annotations

from pathlib import Path

from tropd.cli.arguments import TRUST, Arguments, read_run, with_its_code
from tropd.errors import ConfigError

_HELP = """\
tropd launch RUN.toml [--any.flag value]    trains; tropd launch FOLDER goes on with a run
--processes N      how many train together (1)
--nodes M          on how many machines, for --print (1)
--cluster ray      place them, and the servers that the run file names, on a Ray cluster
--address HOST:PORT  of the cluster; by default RAY_ADDRESS, else a cluster of this machine, for as long as the run
--trust-code       let --print import the method of your own that the run file names
--print            the same for torchrun and SLURM, and the commands of the servers; nothing is started
"""


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd launch", add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--cluster", choices=["ray"])
    parser.add_argument("--address")
    parser.add_argument("--print", action="store_true")
    parser.add_argument(TRUST, action="store_true")
    asked, rest = parser.parse_known_args(argv)
    if rest in (["-h"], ["--help"]):
        print(_HELP, end="")
        return 0
    if not asked.print and not asked.cluster:
        raise ConfigError("tropd launch needs --cluster ray, or --print for the lines of torchrun and SLURM.")
    from tropd.distributed.launch_lines import Launch, lines

    if folder := rest and (Path(rest[0]) / "run.toml").exists():
        run, command = read_run([str(Path(rest[0]) / "run.toml"), *rest[1:]], "tropd launch"), ("resume", *rest)
    else:
        run, command = read_run(rest, "tropd launch"), ("train", *rest)
    if folder and len(rest) > 1:
        raise ConfigError(f"{rest[0]} is a run that has begun, and {rest[1]} would change it. Leave it out.")
    run, _ = with_its_code(run, asked.trust_code or not asked.print)  # what starts a run imports what it names
    launch = Launch(run=run, command=command, processes=asked.processes, nodes=asked.nodes)
    if asked.print:
        print(lines(launch), end="")
        return 0
    from tropd.distributed.ray_cluster import run_on_ray

    return run_on_ray(launch, asked.address)
