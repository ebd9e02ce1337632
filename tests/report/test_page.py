from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from array import array
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.examples import step_record
from tests.report.folders import probes_at, write_folder
from tropd.cli.main import main
from tropd.methods import OPD
from tropd.monitoring.records import RecordWriter
from tropd.report.contents import CHARTS, charts_of
from tropd.report.history import read_history
from tropd.report.page import embed, render
from tropd.report.runs import read_runs
from tropd.report.transcripts import collect

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\"'&<!--"


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._inside: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.text += data
        else:
            self.scripts.append((self._inside, data))

    def script(self, name: str) -> str:
        return next(text for attributes, text in self.scripts if attributes.get("id") == name)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.script("data"))

    @property
    def transcripts(self) -> dict[str, Any]:
        return json.loads(gzip.decompress(base64.b64decode(self.script("transcripts"))))


def page_of(*folders: Path) -> Page:
    runs = read_runs(folders)
    return Page(render(runs, collect(runs)))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("one") / "run"
    low, high = [[0.0, 0.0]] * 9 + [[1.0, 1.0]], [[1.0, 0.0]] * 10
    return page_of(write_folder(folder, steps=8, before=low, after=high, saved=[0, 7], alarms={3: "mismatch: why"}))


def test_a_page_asks_nothing_of_any_network(one: Page) -> None:
    asking = [
        (tag, name, value)
        for tag, attributes in one.elements
        for name, value in attributes.items()
        if name in ("src", "href", "action", "data", "srcset") and not (value or "").startswith(("#", "data:,"))
    ]
    assert asking == []
    [policy] = [a["content"] for tag, a in one.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'") and "connect-src 'none'" in policy
    assert "unsafe-eval" not in policy and "script-src 'sha256-" in policy


def test_the_policy_names_exactly_the_scripts_of_the_page(one: Page) -> None:
    [policy] = [str(a["content"]) for tag, a in one.elements if a.get("http-equiv") == "Content-Security-Policy"]
    plotly = gzip.decompress(base64.b64decode(one.script("plotly"))).decode()
    sources = [text for attributes, text in one.scripts if not attributes] + [plotly]
    hashes = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert not [name for _, a in one.elements for name in a if name.startswith("on")]


def test_the_verdict_comes_first_and_everything_has_its_section(one: Page) -> None:
    assert one.text.index("Better: avg@2 went from") < one.text.index("Held-out score")
    sections = [a.get("id") for tag, a in one.elements if tag == "section"]
    assert sections == [
        "verdict",
        "learning",
        "trust",
        "support",
        "text",
        "machine",
        "alarms",
        "tokens",
        "configuration",
        "records",
    ]
    assert "mismatch" in one.text and "at step 3" in one.text
    labelled = [a["aria-labelledby"] for tag, a in one.elements if tag in ("section", "figure")]
    assert set(labelled) <= {a.get("id") for _, a in one.elements}


def test_every_chart_has_a_caption_of_sentences(one: Page) -> None:
    charts = one.data["charts"]
    assert {chart["id"] for chart in charts} >= {
        "accuracy",
        "shares",
        "trust",
        "ratio",
        "places",
        "gradient",
        "seconds",
    }
    for chart in charts:
        assert all(re.match(r"[A-Z].*\.$", caption) for caption in chart["captions"]), chart["captions"]
    figures = [a for tag, a in one.elements if tag == "figure"]
    assert [f["data-chart"] for f in figures] == [chart["id"] for chart in charts]


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "run <b>&amp;", steps=4, saved=[0], texts=[EVIL], alarms={1: f"mismatch: {EVIL}"})
    with RecordWriter.resume(folder / "records.jsonl", step=4) as writer:
        writer.write(step_record(4, probes={f"position/0/{EVIL}": 1.0}, seconds={EVIL: 1.0}, tokens={EVIL: 3}))
    header = (folder / "records.jsonl").read_text().replace('"student": "student"', f'"student": {json.dumps(EVIL)}', 1)
    (folder / "records.jsonl").write_text(header + "{" + EVIL + "\n")
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "step_1.json").write_text(EVIL)
    text = render(runs := read_runs([folder]), collect(runs))
    page = Page(text)
    assert EVIL in page.text and EVIL not in text
    assert [a for tag, a in page.elements if tag == "img"] == []
    assert [a.get("id") for a, _ in page.scripts] == ["data", "transcripts", "plotly", None]
    [transcript] = page.transcripts["transcripts"]
    assert "".join(transcript["texts"]) == EVIL
    assert EVIL in [line["label"] for chart in page.data["charts"] for line in chart["lines"]]


def test_embedded_json_is_the_same_json_and_cannot_end_its_element() -> None:
    value = {EVIL: [EVIL, "\u2029", None, 1.5]}
    text = embed(value)
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029")


def test_several_runs_are_compared_and_their_differences_marked(tmp_path: Path) -> None:
    low, high = [[0.0]] * 9 + [[1.0]], [[1.0]] * 8 + [[0.0]] * 2
    write_folder(tmp_path / "opd", before=low, after=low, method=OPD())
    write_folder(tmp_path / "tropd", before=low, after=high, saved=[2])
    page = page_of(tmp_path / "opd", tmp_path / "tropd")
    assert "tropd ended highest: avg@1 0.800" in page.text
    marked = [a for tag, a in page.elements if tag == "mark"]
    assert len(marked) > 2
    ids = [chart["id"] for chart in page.data["charts"]]
    assert {"trust-0", "entropy-0", "entropy-1", "shares"} <= set(ids) and "trust" not in ids
    assert all(len(chart["runs"]) == 2 for chart in page.data["charts"])
    rows = [
        json.loads(html.unescape(str(a["data-sort"]))) for tag, a in page.elements if tag == "tr" and "data-sort" in a
    ]
    assert [row[0] for row in rows] == ["opd", "tropd"] and rows[1][4] == 0.8


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_no_or_one_step_has_an_honest_page(tmp_path: Path, steps: int) -> None:
    page = page_of(write_folder(tmp_path / "run", steps=steps, planned=5, saved=[0] if steps else []))
    assert ("No step is recorded." if steps == 0 else "1 of 5 steps are recorded") in page.text
    assert bool(page.data["charts"]) == (steps == 1)


def test_a_folder_with_a_configuration_alone_has_a_page(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "run")
    (folder / "records.jsonl").unlink()
    page = page_of(folder)
    assert "No step is recorded." in page.text and "records.jsonl is missing or empty" in page.text


def test_numbers_that_are_not_finite_are_gaps_that_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RecordWriter(folder / "records.jsonl", {}) as writer:
        for step, norm in enumerate([1.0, float("inf"), float("nan"), 2.0]):
            writer.write(step_record(step, gradient_norm=norm, loss=float("nan")))
    chart = next(c for c in charts_of([read_history(folder)]) if c["id"] == "gradient")
    assert chart["runs"][0]["y"]["gradient_norm"] == [1.0, None, None, 2.0]
    assert "infinite at 1 step" in chart["captions"][0]
    assert "run.toml is missing" in page_of(folder).text


def test_a_long_run_is_thinned_and_says_so(tmp_path: Path) -> None:
    run = read_history(write_folder(tmp_path / "run", steps=2))
    size = 100_000
    run.steps = list(range(size))
    run.values = {f"probe/{name}": (np.arange(size) % 97 * x).tolist() for name, x in probes_at(0, 1).items()}
    run.values["probe/reward/mean"][70_001] = 5000.0
    for chart in charts_of([run]):
        [part] = chart["runs"]
        if chart["kind"] not in ("scores", "marks"):
            assert part["of"] == size and len(part["x"]) == part["shown"] <= 1600
    reward = next(chart for chart in charts_of([run]) if chart["id"] == "reward")
    assert max(reward["runs"][0]["y"]["probe/reward/mean"]) == 5000.0
    assert "most 5e+03 at step 70,001" in reward["captions"][0]


def test_a_probe_that_rests_between_steps_is_drawn_as_one_line(tmp_path: Path) -> None:
    run = read_history(write_folder(tmp_path / "run", steps=2))
    run.steps = list(range(9))
    rank = array("d", [step if step % 4 == 0 else float("nan") for step in run.steps])
    run.values.clear()
    run.values["probe/change/stable_rank"] = rank
    chart = next(c for c in charts_of([run]) if c["id"] == "rank")
    assert chart["runs"][0]["x"] == [0, 4, 8]
    assert chart["runs"][0]["y"]["probe/change/stable_rank"] == [0.0, 4.0, 8.0]


def test_teachers_that_follow_are_drawn_by_name(tmp_path: Path) -> None:
    run = read_history(write_folder(tmp_path / "run", steps=2))
    run.values["probe/follow/kl"] = array("d", [0.1, 0.2])
    run.values["probe/follow/readers.near/shock"] = array("d", [float("nan"), 0.3])
    charts = {chart["id"]: chart for chart in charts_of([run])}
    assert charts["followed"]["lines"] == [{"column": "probe/follow/kl", "label": "teacher"}]
    assert charts["shock"]["lines"] == [{"column": "probe/follow/readers.near/shock", "label": "readers.near"}]
    assert charts["shock"]["runs"][0]["x"] == [1]


def test_chart_names_are_used_once() -> None:
    assert len({chart.id for chart in CHARTS}) == len(CHARTS)


def test_the_command_writes_one_file_and_says_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "a", saved=[1])
    assert main(["report", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "nothing was evaluated" in said and "report.html" in said
    assert main(["report", str(tmp_path / "a")]) == 0  # an old report is replaced
    write_folder(tmp_path / "b")
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "both.html")]) == 0
    assert "2 runs" in Page((tmp_path / "both.html").read_text()).text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "both.html"]


def test_the_command_refuses_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "a")
    (tmp_path / "mine.html").write_text("<p>mine")
    for argv, said in (
        ([str(tmp_path / "none")], "there is no folder"),
        ([str(folder), "-o", str(tmp_path / "mine.html")], "is no report of tropd"),
        ([str(folder), "-o", str(tmp_path)], "is a folder"),
        ([str(folder), "--transcripts", "-1"], "give a number of transcripts"),
    ):
        assert main(["report", *argv]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "mine.html").read_text() == "<p>mine"
