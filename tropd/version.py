"""The version of tropd, which versions of other packages it was run with, and which are here.

pyproject.toml says it once, and the installed metadata repeats it: what each requirement allows, narrowed by the extra
`tested` where a release within those bounds may change what tropd touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tropd.errors import ConfigError

__version__ = version("tropd")
_TESTED = {"extra": "tested"}
_TOOLS = ("all", "compat", "dev", "test")
"""Extras of those who work on tropd, and the one that names other extras."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that tropd uses."""

    name: str
    installed: str | None
    tested: str
    """The versions that tropd was run with, as pip writes them."""

    @property
    def outside(self) -> bool:
        """Installed in a version that tropd was not run with."""
        if self.installed is None:
            return False
        return not SpecifierSet(self.tested).contains(Version(self.installed), prereleases=True)

    @property
    def objection(self) -> str:
        return f"{self.name} {self.installed} is outside the range that tropd was run with ({self.tested})"


def packages() -> list[Package]:
    """Every package that tropd imports, the optional ones included; in the order of pyproject.toml."""
    extras = [extra for extra in metadata("tropd").get_all("Provides-Extra") or () if extra not in _TOOLS]
    allowed: dict[str, SpecifierSet] = {}
    tested: dict[str, SpecifierSet] = {}
    for line in requires("tropd") or ():
        wanted = Requirement(line)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
            allowed.setdefault(wanted.name, wanted.specifier)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}) and wanted.marker.evaluate(_TESTED):
            tested[wanted.name] = wanted.specifier
    return [
        Package(name=name, installed=installed(name), tested=_shown(tested.get(name, bounds)))
        for name, bounds in allowed.items()
    ]


def _shown(bounds: SpecifierSet) -> str:
    return ",".join(sorted(map(str, bounds), reverse=True))


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def outside() -> list[Package]:
    return [package for package in packages() if package.outside]


def cannot_import(error: ImportError, name: str, extra: str, asked: str) -> ConfigError:
    """An optional package that is missing, or that is here and does not fit what else is here."""
    here = installed(name)
    if here is None:
        return ConfigError(f"{asked} needs {name}: pip install 'tropd[{extra}]'.")
    tested = next((package.tested for package in packages() if package.name == name), "")
    return ConfigError(
        f"{asked} needs {name}, and {name} {here} cannot be imported here: {str(error).splitlines()[0].rstrip('.')}. "
        f"tropd was run with {name} {tested}: pip install 'tropd[{extra}]'."
    )
