"""The demonstration distils for real, says what happened from its numbers, and leaves other folders alone."""

from __future__ import annotations

import re

from tropd.cli.main import main
from tropd.laboratory.demo import lab_of, live, look, spark


def test_the_demonstration_runs_and_tells(tmp_path, capsys):
    output = tmp_path / "demo"
    flags = ["demo", "--seeds", "1", "--steps", "2", "--workers", "1", "--output", str(output)]
    assert main(flags) == 0
    said = capsys.readouterr().out
    for method in ("OPD", "TrOPD", "TrOPD (paper)"):
        assert re.search(rf"^{re.escape(method)}: accuracy 0\.20 → 0\.\d\d \[0\.\d\d, 0\.\d\d\]", said, re.MULTILINE)
    assert "does not show" in said
    assert (output / "report.html").stat().st_size > 100_000 and "report.html" in said
    rows = look(lab_of(output, 1, 2))
    assert [len(row.steps) for row in rows] == [2, 2, 2] and all(row.latest is not None for row in rows)
    assert len(live(lab_of(output, 1, 2)).renderables) == 2


def test_another_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "something else" in capsys.readouterr().err
    (tmp_path / "results.jsonl").write_text("of years of work")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_line_of_blocks_is_logarithmic_and_bounded():
    assert spark([1e-9, 1.0, 1e9]) == "▁▅█"
