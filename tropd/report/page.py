"""One HTML file from runs: the data, the texts, and the scripts that draw them.  It opens without a network.

What a run says is text and never markup: templates escape it, and JSON in the page cannot end its own element.  The
page's policy allows exactly the scripts that are in it, by their hashes, and no connection.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from tropd.errors import require
from tropd.report.contents import SECTIONS, charts_of
from tropd.report.groups import groups_of, judge_groups
from tropd.report.history import History
from tropd.report.tiles import table, tiles
from tropd.report.transcripts import Shelf
from tropd.report.verdict import judge
from tropd.version import __version__

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("page.js", "charts.js", "figures.js", "shelf.js", "tokens.js", "live.js")
PARTS = ("facts", "verdict", "charts", "configuration", "records")
MOST_ALIKE = 60
"""Runs whose differing settings are shown side by side."""


def render(runs: Sequence[History], shelf: Shelf, *, live: bool = False) -> str:
    """The whole page."""
    scripts = [(ASSETS / name).read_text() for name in SCRIPTS if live or name != "live.js"]
    script = "\n".join(scripts)
    state = state_of(runs, shelf)
    values = {
        "title": title_of(runs),
        "policy": policy(live),
        "style": (ASSETS / "page.css").read_text(),
        "script": script,
        "parts": state["parts"],
        "data": embed(state["data"]),
        "transcripts": packed(embed_json(shelf.as_data())),
        "plotly": _plotly()[0],
        "runs": runs,
        "sections": SECTIONS,
        "live": live,
        "version": __version__,
    }
    return environment().get_template("page.html.jinja").render(**values)


def state_of(runs: Sequence[History], shelf: Shelf) -> dict[str, Any]:
    """What changes while runs go on: parts as HTML, and the charts' data."""
    charts = charts_of(runs)
    values = {
        "runs": runs,
        "verdict": judge(runs[0]) if len(runs) == 1 else judge_groups(runs),
        "tiles": tiles(runs[0]) if len(runs) == 1 else [],
        "table": table(runs) if len(runs) > 1 else [],
        "sections": {name: (lead, [c for c in charts if c["section"] == name]) for name, lead in SECTIONS.items()},
        "configuration": configuration(runs),
        "problems": [(run.name, problem) for run in runs for problem in run.problems],
        "shelf": shelf,
        "alarms": [alarm for run in runs for alarm in alarms_of(run)],
    }
    parts = {name: environment().get_template(f"{name}.html.jinja").render(**values) for name in PARTS}
    groups = groups_of(runs)
    of_run = {number: i for i, group in enumerate(groups) for number in group.members}
    names = [{"name": run.name, "group": of_run[number]} for number, run in enumerate(runs)]
    data = {"runs": names, "charts": charts, "grouped": len(groups) < len(runs)}
    return {"parts": parts, "data": data}


def alarms_of(run: History) -> list[dict[str, Any]]:
    """One line per kind of alarm, with its first message in full."""
    alarms: dict[str, dict[str, Any]] = {}
    for step, name, message in run.alarms:
        entry = alarms.setdefault(name, {"run": run.name, "name": name, "message": message, "first": step, "count": 0})
        entry["count"] += 1
        entry["last"] = step
    return list(alarms.values())


def configuration(runs: Sequence[History]) -> dict[str, Any]:
    """What differs between the runs, and what is the same in all."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    differing = [key for key in keys if len({run.config.get(key) for run in runs}) > 1]
    shown = runs[:MOST_ALIKE]
    return {
        "names": [run.name for run in shown],
        "left_out": len(runs) - len(shown),
        "differing": [(key, [run.config.get(key) for run in shown]) for key in differing],
        "same": [(key, runs[0].config[key]) for key in keys if key not in set(differing)],
    }


def title_of(runs: Sequence[History]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def policy(live: bool) -> str:
    """Only these scripts run, nothing is fetched; a live page may ask the server that it came from."""
    names = [name for name in SCRIPTS if live or name != "live.js"]
    script = "\n".join((ASSETS / name).read_text() for name in names)
    asking = "'self'" if live else "'none'"
    hashes = f"'sha256-{_hash(script)}' 'sha256-{_plotly()[1]}'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {asking}; base-uri 'none'; form-action 'none'"
    )


@cache
def environment() -> Any:
    require("jinja2", "report", "a report")
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    made.filters["short"] = short
    made.filters["clock"] = lambda _: datetime.now().strftime("%Y-%m-%d %H:%M")
    return made


@cache
def _plotly() -> tuple[str, str]:
    """The library, packed, and the hash of what is unpacked."""
    require("plotly", "report", "a report")
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    return packed(source), _hash(source)


def short(path: str) -> str:
    """The end of a long path; a hub id stays as it is."""
    parts = Path(path).parts
    return "/".join(parts[-2:]) if Path(path).is_absolute() or len(parts) > 3 else path


def packed(text: str) -> str:
    """gzip in base64: a third of the size, and nothing in it can end an element."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def embed_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def embed(value: Any) -> str:
    """JSON that is also safe inside a script element, whatever the texts in it say."""
    text = embed_json(value)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
