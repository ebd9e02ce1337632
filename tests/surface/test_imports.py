"""The house has floors: a room imports from rooms below it, and no two files wait for each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = (
    *("errors", "base", "version", "types", "objective", "briefings", "methods", "config", "data", "bridge", "model"),
    *("servers", "distributed", "checkpoints", "rollout", "teachers", "evaluation", "monitoring", "report", "training"),
    *("doctor", "planning", "run", "testbeds", "laboratory", "testing", "cli", "__main__"),
)
"""From the ground up."""
MOST_AT_THE_ROOT = 7


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted((ROOT / "tropd").rglob("*.py"))}
INSIDE = [name for name in MODULES if name != "tropd"]
"""All but the list of public names, which points everywhere."""


def imports(module: str, source: str | None = None) -> Iterator[str]:
    """Everything of tropd that a module reads: at its top, within functions and for type checkers alone."""
    tree = ast.parse(MODULES[module].read_text() if source is None else source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "tropd")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tropd":
            whole = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if name in MODULES else str(node.module) for name in whole)


def floor(module: str) -> int:
    return ROOMS.index(module.split(".")[1]) if "." in module else len(ROOMS)


def circle_from(start: str, arrows: dict[str, set[str]]) -> list[str]:
    """A way from a module back to itself, if there is one."""
    ways, seen = [[start]], set()
    while ways:
        way = ways.pop()
        for target in arrows[way[-1]]:
            if target == start:
                return [*way, start]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return []


def test_every_room_has_its_floor() -> None:
    assert {module.split(".")[1] for module in INSIDE} == set(ROOMS)


def test_imports_run_downwards_only() -> None:
    upward = [f"{m} imports {t}" for m in INSIDE for t in sorted(set(imports(m))) if floor(t) > floor(m)]
    assert not upward, "\n".join(upward)


def test_no_two_files_wait_for_each_other() -> None:
    arrows = {m: {t for t in imports(m) if t in MODULES and t != m} for m in MODULES}
    circles = [circle for m in INSIDE if (circle := circle_from(m, arrows))]
    assert not circles, "\n".join(" -> ".join(circle) for circle in circles)


def test_few_modules_lie_at_the_root() -> None:
    loose = [m for m, path in MODULES.items() if m.count(".") == 1 and path.name != "__init__.py"]
    assert len(loose) <= MOST_AT_THE_ROOT, loose


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import tropd.a\nfrom tropd import types\ndef f():\n    from tropd.errors import TropdError\n"
    assert list(imports("tropd.types", source)) == ["tropd.a", "tropd.types", "tropd.errors"]
    assert circle_from("a", {"a": {"b"}, "b": {"a"}}) and not circle_from("a", {"a": {"b"}, "b": set()})
