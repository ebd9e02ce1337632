from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.report.folders import write_folder
from tropd.methods import OPD, TrOPD
from tropd.report.groups import groups_of, judge_groups
from tropd.report.history import History, read_history
from tropd.report.runs import read_runs
from tropd.report.verdict import against, judge, judge_many

LOW, HIGH = [[0.0], [0.0], [0.0], [1.0]] * 8, [[1.0], [0.0], [1.0], [1.0]] * 8


def run(folder: Path, **how: Any) -> History:
    return read_history(write_folder(folder, **how))


@pytest.mark.parametrize(
    ("before", "after", "tone", "said"),
    [
        (LOW, HIGH, "better", "Better: avg@1 went from 0.250"),
        (HIGH, LOW, "worse", "Worse: avg@1 went from 0.750"),
        (LOW, LOW, "same", "No difference can be told"),
        (LOW[:4], HIGH[:4], "same", "No difference can be told"),
    ],
)
def test_the_verdict_follows_the_paired_interval(tmp_path: Path, before: Any, after: Any, tone: str, said: str) -> None:
    verdict = judge(run(tmp_path / "run", before=before, after=after))
    assert verdict.tone == tone and verdict.headline.startswith(said)
    assert f"On the same {len(before)} prompts" in verdict.sentences[0]
    assert ("excludes 0" in verdict.sentences[0]) == (tone in ("better", "worse"))


@pytest.mark.parametrize(
    ("after", "said"), [(HIGH, "do not touch"), ([[0.0], [1.0], [0.0], [1.0]] * 8, "The two intervals overlap")]
)
def test_without_scores_of_single_prompts_the_intervals_decide_and_it_is_said(
    tmp_path: Path, after: Any, said: str
) -> None:
    verdict = judge(run(tmp_path / "run", before=LOW, after=after, kept=False))
    assert verdict.tone == ("better" if after is HIGH else "same")
    assert "were not kept" in verdict.sentences[0] and said in verdict.sentences[1]


def test_what_is_not_known_is_not_claimed(tmp_path: Path) -> None:
    alone = judge(run(tmp_path / "a"))
    assert alone.tone == "unknown" and "nothing was evaluated" in alone.headline
    once = judge(run(tmp_path / "b", after=HIGH))
    assert once.tone == "unknown" and "no second evaluation" in once.headline
    empty = judge(run(tmp_path / "c", steps=0, planned=5))
    assert empty.headline == "No step is recorded."


def test_how_far_alarms_and_problems_are_told(tmp_path: Path) -> None:
    history = run(tmp_path / "run", steps=3, planned=9, alarms={0: "mismatch: x", 2: "mismatch: y"})
    said = " ".join(judge(history).sentences)
    assert "3 of 9 steps are recorded: the run is going on, or stopped early." in said
    assert "Alarms were raised: mismatch at 2 steps." in said
    with (tmp_path / "run" / "records.jsonl").open("a") as file:
        file.write("rubbish\nrubbish\n")
    history.refresh()
    assert "2 things in the records are broken or missing" in " ".join(judge(history).sentences)


def test_runs_are_compared_prompt_by_prompt_with_the_first(tmp_path: Path) -> None:
    write_folder(tmp_path / "opd", before=LOW, after=LOW, method=OPD())
    write_folder(tmp_path / "tropd", before=LOW, after=HIGH, method=TrOPD())
    runs = read_runs([tmp_path / "opd", tmp_path / "tropd"])
    gap = against(runs[1], runs[0])
    assert gap is not None and gap.mean == 0.5 and gap.low > 0
    verdict = judge_many(runs)
    assert verdict.tone == "better" and verdict.headline.startswith("tropd ended highest: avg@1 0.750")
    assert "Against opd, the first run named, it is +0.500" in verdict.sentences[0]


def test_runs_that_were_evaluated_differently_are_not_compared(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", before=LOW, after=LOW)
    write_folder(tmp_path / "b", before=[row * 2 for row in LOW], after=[row * 2 for row in HIGH])
    runs = read_runs([tmp_path / "a", tmp_path / "b"])
    assert against(runs[1], runs[0]) is None
    assert "cannot be compared" in judge_many(runs).headline


def test_seeds_of_one_setting_are_judged_together(tmp_path: Path) -> None:
    for name, method, after in (("opd", OPD(), LOW), ("tropd", TrOPD(), HIGH)):
        for seed in range(3):
            write_folder(tmp_path / f"{name}_{seed}", before=LOW, after=after, method=method, seed=seed)
    runs = read_runs(sorted(tmp_path.iterdir()))
    assert [(group.label, group.members) for group in groups_of(runs)] == [("opd", (0, 1, 2)), ("tropd", (3, 4, 5))]
    verdict = judge_groups(runs)
    assert verdict.headline == "tropd ended highest: mean avg@1 0.750 over 3 seeds (0.750 to 0.750)."
    assert verdict.tone == "better" and "Against opd, named first, it is +0.500" in verdict.sentences[0]
    one = judge_groups(runs[:3])
    assert one.tone == "same" and one.headline.startswith("One setting with 3 seeds: mean avg@1 0.250")
