"""The packages that a bare machine lacks, as wheels in a folder that `make gpu-wheels` fills where there is a network.

`python -m benchmarks.gpu_check.wheels` downloads them for Python 3.12 on Linux; `install` needs no network.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".wheels"
WHEELS = (
    "annotated-types",
    "datasets",
    "dill",
    "docstring-parser",
    "multiprocess",
    "pydantic",
    "pydantic-core",
    "tomli-w",
    "trl",
    "typeguard",
    "typing-extensions",
    "typing-inspection",
    "tyro",
)
MOST_MEGABYTES = 50
"""Beside the tree, of the 60 that travel."""
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


def versions() -> dict[str, str]:
    """Of the wheels: those of the tested set."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    by_name = {name.strip().lower().replace("_", "-"): number.split(";")[0].strip() for name, number in tested.items()}
    return {name: by_name[name] for name in WHEELS}


def download(folder: Path) -> float:
    """Fill the folder; gives its size in megabytes."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    wanted = [f"{name}=={number}" for name, number in versions().items()]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, "-d", str(folder), *wanted], check=True)
    return sum(path.stat().st_size for path in folder.glob("*.whl")) / 1e6


def install(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels of packages that are not here, or are older, into `site`; what stays missing."""
    lacking = {name: number for name, number in versions().items() if not _is_here(name, number)}
    chosen = {
        name: next(iter(folder.glob(f"{name.replace('-', '_')}-{number}-*.whl")), None)
        for name, number in lacking.items()
    }
    found = [path for path in chosen.values() if path is not None]
    for path in found:
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(site)
    return [name for name, path in chosen.items() if path is None]


def name_tree(site: Path) -> None:
    """Let the tree answer for its version as if it were installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = site / f"{project['name']}-{project['version']}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")


def _is_here(name: str, number: str) -> bool:
    from packaging.version import Version  # comes with transformers

    try:
        return Version(version(name)) >= Version(number)
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    size = download(FOLDER)
    print(f"{FOLDER.name}: {len(WHEELS)} wheels, {size:.1f} MB")
    sys.exit(size > MOST_MEGABYTES)
