"""The ranges of versions that tropd was run with are said once, and what is outside of them is named."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tropd import version as versions
from tropd.cli.main import main
from tropd.config.models import LoraConfig
from tropd.doctor.examination import check_versions
from tropd.errors import ConfigError
from tropd.model.loading import add_adapter
from tropd.version import Package, packages

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
WANTED = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines]
OTHERS = [wanted for wanted in WANTED if wanted.name != "tropd"]


def pinned(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_every_requirement_is_bounded_on_both_sides() -> None:
    for wanted in OTHERS:
        operators = {bound.operator for bound in wanted.specifier}
        assert operators in ({">=", "<"}, {"=="}), str(wanted)


def test_the_installed_metadata_says_what_pyproject_says() -> None:
    tested = {wanted.name: wanted.specifier for wanted in map(Requirement, EXTRAS["tested"])}
    said = {package.name: package.tested for package in packages()}
    for wanted in map(Requirement, PROJECT["dependencies"]):
        bounds = tested.get(wanted.name, wanted.specifier)
        assert set(said[wanted.name].split(",")) == set(map(str, bounds)), "run `make install`: pyproject.toml changed"


def test_the_constraints_are_names_and_versions_within_the_bounds() -> None:
    for file in ("constraints.txt", "oldest.txt"):
        text = (ROOT / file).read_text()
        assert all(re.fullmatch(r"(#.*|[\w.-]+==[\w.]+)?", line) for line in text.splitlines()), file
        versions_there = pinned(file)
        for wanted in OTHERS:
            if (version := versions_there.get(wanted.name)) is not None:
                assert wanted.specifier.contains(version), f"{file}: {wanted} is {version}"


def test_the_oldest_set_is_the_lower_end_of_every_range() -> None:
    oldest = pinned("oldest.txt")
    lower = {
        wanted.name: next(Version(bound.version) for bound in wanted.specifier if bound.operator == ">=")
        for extra in ("dependencies", *EXTRAS)
        if extra not in ("test", "dev")
        for wanted in map(Requirement, PROJECT["dependencies"] if extra == "dependencies" else EXTRAS[extra])
        if wanted.name != "tropd"
    }
    assert {name: Version(oldest[name]) for name in lower} == lower


@pytest.mark.parametrize(
    ("installed", "outside"),
    [("5.24.3", False), ("5.25.0", True), ("4.57.1", True), ("5.24.0+cpu", False), (None, False)],
)
def test_a_version_is_outside_below_and_above(installed: str | None, outside: bool) -> None:
    assert Package(name="transformers", installed=installed, tested=">=5.0,<5.25").outside is outside


def test_env_and_doctor_name_what_is_outside(monkeypatch, capsys) -> None:
    real = versions.installed
    assert list(check_versions()) == []
    monkeypatch.setattr(versions, "installed", lambda name: "5.99.0" if name == "transformers" else real(name))
    (check,) = check_versions()
    assert check.level == "warning" and re.search(r"transformers 5\.99\.0 is outside the range .*5\.25", check.found)
    assert main(["env"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "outside" in line)
    assert line.startswith("transformers")


def test_an_adapter_library_that_does_not_fit_is_told_from_one_that_is_missing(monkeypatch) -> None:
    broken = ModuleType("peft")
    broken.__getattr__ = lambda name: (_ for _ in ()).throw(ImportError("cannot import name 'HybridCache'"))
    monkeypatch.setitem(sys.modules, "peft", broken)
    monkeypatch.setattr(versions, "installed", lambda name: "0.17.1")
    with pytest.raises(
        ConfigError, match=r"peft 0\.17\.1 cannot be imported here: cannot import name .HybridCache.*>="
    ):
        add_adapter(None, LoraConfig(), 0)
    monkeypatch.setattr(versions, "installed", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs peft: pip install 'tropd\[lora\]'"):
        add_adapter(None, LoraConfig(), 0)
