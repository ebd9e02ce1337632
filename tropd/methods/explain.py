"""What `tropd explain` and `tropd methods` show, and the page docs/methods.md.

python -m tropd.methods.explain > docs/methods.md            the page
python -m tropd.methods.explain --table                      the table in README.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tropd.base.names import offered, shown
from tropd.errors import TropdError
from tropd.methods import METHODS, check_name
from tropd.methods.additions import Addition, additions, additions_called, names_of_additions
from tropd.methods.describe import Description, describe, needs_text
from tropd.methods.ideas import IDEAS, Idea

TERMS = ("term", "where", "loss", "weight", "divided by")
EVIDENCE = ("evidence", "what it is", "which server can give it")
READERS = ("reader", "whose distributions", "told", "asked for")
KNOBS = ("knob", "default", "choices", "meaning and source")
METHODS_COLUMNS = ("method", "paper", "needs", "what it does")
BESIDE = (
    "A line with + is an addition to any method: an extra, in [[method.plus]] of a run file, changes the objective; a "
    "policy says who writes or how far, beside the method's own in [[rollout.plus]], in its place in [rollout.policy]."
)
OVERRIDE = "A run's [teacher] and [readers.NAME] come first."
AT_TEACHER = "From its terms, a student that equals its teacher gets"

Rows = list[tuple[str, ...]]


def explain(name: str) -> RenderableType:
    """A method, an extra or a policy in full; all of them where several have this name."""
    first, *others = [_method(d) if isinstance(d, Description) else _addition(d) for d in _called(name)]
    return Group(*first, *(part for other in others for part in (Text(), *other)))


def explain_as_data(name: str) -> dict[str, Any]:
    first, *others = map(asdict, _called(name))
    return {**first, "also": others}


def _called(name: str) -> list[Description | Addition]:
    added = list(additions_called(name))
    if added and name not in METHODS and name not in offered("methods"):
        return [*added]
    check_name(name, names_of_additions())
    return [describe(name), *added]


def _method(d: Description) -> list[RenderableType]:
    parts: list[RenderableType] = [
        Text.assemble((d.title, "bold"), "  ", (d.name, "cyan"), "  ", (d.paper, f"link {d.paper}" if d.paper else "")),
        Padding(Text(d.definition), (1, 0, 0, 2)),
        *_section("Terms", _table(TERMS, _rows(d.terms))),
        *_section("Rollouts", d.rollout),
        *_section("Evidence", _table(EVIDENCE, _rows(d.evidence)) if d.evidence else None, d.teacher),
        *(_section("Readers", _table(READERS, _rows(d.readers)), OVERRIDE) if d.readers else ()),
        *_section("Knobs", _table(KNOBS, _rows(d.knobs)) if d.knobs else "None."),
    ]
    if d.readings:
        parts += _section("What the sources leave open, and what is done here", *(f"- {r}" for r in d.readings))
    return [*parts, *_section(AT_TEACHER, d.at_teacher)]


def _addition(d: Addition) -> list[RenderableType]:
    return [
        Text.assemble((d.title, "bold"), "  ", (shown(d.name), "cyan"), "  ", f"{d.kind}, {d.section} of a run file"),
        Padding(Text(d.definition), (1, 0, 0, 2)),
        *_section("Knobs", _table(KNOBS, _rows(d.knobs)) if d.knobs else "None."),
    ]


def methods(own: Sequence[str] = ()) -> RenderableType:
    """All methods, extras and policies by their ideas, one line each: tropd's, installed packages', and `own`."""
    rows = _summaries(own)
    name_width, paper_width = (max(len(row[column]) for _, row in rows) for column in (0, 1))
    parts: list[RenderableType] = []
    for idea in (*IDEAS, None):
        here = [row for found, row in rows if found == idea]
        if here:
            table = _table(METHODS_COLUMNS, here)
            table.columns[0].min_width, table.columns[1].min_width = name_width, paper_width
            parts += _section(_heading(idea), IDEAS[idea] if idea else None, table)
    return Group(*parts, Text(f"\n{BESIDE}"))


def methods_as_data(own: Sequence[str] = ()) -> list[dict[str, Any]]:
    others = [d for name in offered("methods") if not isinstance(d := _described(name), str)]
    return [asdict(d) for d in (*map(describe, METHODS), *additions(), *others, *map(describe, own))]


def _heading(idea: Idea | None) -> str:
    return idea.capitalize() if idea else "Others"


def _summaries(own: Sequence[str]) -> list[tuple[Idea | None, tuple[str, ...]]]:
    found: list[tuple[Idea | None, tuple[str, ...]]] = []
    for name in (*METHODS, *offered("methods"), *own):
        d = describe(name) if name in own else _described(name)
        found.append((None, (name, "", "", d)) if isinstance(d, str) else (d.idea, _summary(d)))
    return found + [(d.idea, (f"+ {d.name}", d.kind, "", d.summary)) for d in additions()]


def _summary(d: Description) -> tuple[str, ...]:
    return shown(d.name), _citation(d.paper), needs_text(d), d.summary


def _described(name: str) -> Description | str:
    """A method of an installed package may be broken, which is no reason to hide the others."""
    try:
        return describe(name)
    except TropdError as refusal:
        return str(refusal)


def _citation(paper: str) -> str:
    """The arXiv id, or the host of a page."""
    if "://" not in paper:
        return paper
    return paper.rsplit("/", 1)[-1] if "arxiv.org" in paper else paper.split("/")[2]


def _section(title: str, *parts: RenderableType | None) -> list[RenderableType]:
    indented = [Padding(Text(p) if isinstance(p, str) else p, (0, 0, 0, 2)) for p in parts if p is not None]
    return [Text(f"\n{title}", style="bold"), *indented]


def _rows(records: Iterable[Any]) -> Rows:
    return [tuple(asdict(record).values()) for record in records]


def _table(columns: tuple[str, ...], rows: Rows) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    table.columns[0].style, table.columns[0].no_wrap = "cyan", True
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def methods_markdown() -> str:
    """The table of methods as Markdown."""
    rows = []
    for d in map(describe, METHODS):
        rows.append((f"`{d.name}`", _cited(d), needs_text(d), d.summary))
    return _markdown_table(METHODS_COLUMNS, rows)


def page() -> str:
    """docs/methods.md."""
    head = (
        "# Methods\n\n<!-- python -m tropd.methods.explain > docs/methods.md -->\n\n"
        "Every method with its default knobs, read off its source; `tropd explain METHOD` shows it in a terminal.\n"
        "An objective is a sum of terms; *where* selects tokens, `~` is the rest, `&` is both.\n\n"
        f"Methods are listed here by the idea that they are about. {BESIDE}\n"
    )
    described = [describe(name) for name in METHODS]
    groups = [_group(idea, described) for idea in IDEAS]
    return "\n".join([head, *groups, *map(_chapter, described), *map(_short_chapter, additions())])


def _group(idea: Idea, described: Sequence[Description]) -> str:
    rows = [(_link(d.name, d.title), _cited(d), needs_text(d), d.summary) for d in described if d.idea == idea]
    for d in additions():
        if d.idea == idea:
            rows.append((f"+ {_link(d.name, f'{d.kind} {d.name}')}", d.kind, "", d.summary))
    return f"## {_heading(idea)}\n\n{IDEAS[idea]}\n\n{_markdown_table(METHODS_COLUMNS, rows)}" if rows else ""


def _link(name: str, heading: str) -> str:
    return f"[`{name}`](#{heading.lower().replace(' ', '-')})"


def _cited(d: Description) -> str:
    return f"[{_citation(d.paper)}]({d.paper})"


def _short_chapter(d: Addition) -> str:
    coded = [(_code(name), _code(default), *rest) for name, default, *rest in _rows(d.knobs)]
    knobs = [_markdown_table(KNOBS, coded)] if coded else []
    definition = ["```text", d.definition, "```", ""]
    return "\n".join(
        [f"## {d.kind.capitalize()} `{d.name}`", "", f"`{d.section}` of a run file.", "", *definition, *knobs]
    )


def _chapter(d: Description) -> str:
    lines = [f"## {d.title}", "", f"`{d.name}`, {d.paper}", "", "```text", d.definition, "```", ""]
    lines += [_markdown_table(TERMS, [tuple(map(_code, row[:3])) + row[3:] for row in _rows(d.terms)])]
    lines += [f"**Rollouts.** {d.rollout}", ""]
    if d.evidence:
        lines += [_markdown_table(EVIDENCE, _rows(d.evidence))]
    lines += [d.teacher, ""]
    if d.readers:
        lines += [_markdown_table(READERS, _rows(d.readers)), OVERRIDE, ""]
    if d.knobs:
        coded = [(_code(name), _code(default), *rest) for name, default, *rest in _rows(d.knobs)]
        lines += [_markdown_table(KNOBS, coded)]
    if d.readings:
        lines += ["What the sources leave open, and what is done here:", "", *(f"- {r}" for r in d.readings), ""]
    return "\n".join([*lines, f"{AT_TEACHER} {d.at_teacher}", ""])


def _code(text: str) -> str:
    return f"`{text}`"


def _markdown_table(columns: tuple[str, ...], rows: Rows) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join("| " + " | ".join(_cell(text) for text in row) + " |\n" for row in lines)


def _cell(text: str) -> str:
    """A bar would end the cell, and a lone < would begin a tag."""
    return text.replace("|", "\\|") if text.startswith("`") else text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.write(methods_markdown() if "--table" in sys.argv[1:] else page())
