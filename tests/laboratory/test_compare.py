"""A comparison is fair, goes on after a kill, and says what its outcomes say."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.small_runs import run_of as small_run
from tests.small_runs import write_models
from tropd.cli.main import main
from tropd.config.run import Run
from tropd.errors import ConfigError
from tropd.laboratory.lab import Lab, load_lab, trials
from tropd.laboratory.runner import compare, read_outcomes
from tropd.laboratory.tables import arms_of, score_sheet, sheets
from tropd.laboratory.trial import Outcome, fingerprint_of, run_of
from tropd.methods import OPD, FullFKL, SeqKD

EVALUATION = {"num_samples": 2, "max_new_tokens": 4, "every": 1}


@pytest.fixture
def bed(tmp_path):
    """A run file with two tiny models, and held-out prompts."""
    folder = write_models(tmp_path / "bed")
    run = small_run(
        folder, evaluation={**EVALUATION, "data": {"path": str(folder / "data.jsonl"), "limit": 4}}, steps=2
    )
    (folder / "run.toml").write_text(run.dump())
    return str(folder / "run.toml")


def lab_in(folder, bed, **changes) -> Lab:
    arms = {"OPD": OPD(), "Full FKL": FullFKL(top_k=4)}
    return Lab(**{"output": str(folder), "testbeds": (bed,), "methods": arms, "seeds": (0, 1), **changes})


def lasting(outcomes):
    return [dataclasses.replace(o, seconds=0.0) for o in outcomes]


def test_two_comparisons_give_the_same_table_and_a_third_runs_nothing(tmp_path, bed):
    said: list[str] = []
    first = compare(lab_in(tmp_path / "a", bed), tell=said.append)
    again = compare(lab_in(tmp_path / "b", bed), tell=said.append)
    assert len(first) == 4 and lasting(first) == lasting(again)
    assert score_sheet(lab_in(tmp_path, bed), bed, arms_of(lab_in(tmp_path, bed), first, bed)).rows == (
        score_sheet(lab_in(tmp_path, bed), bed, arms_of(lab_in(tmp_path, bed), again, bed)).rows
    )
    lines = (tmp_path / "a" / "results.jsonl").read_bytes()
    assert compare(lab_in(tmp_path / "a", bed), tell=said.append) == first
    assert (tmp_path / "a" / "results.jsonl").read_bytes() == lines
    assert "0 trials to go" in said[-1]


def test_a_method_may_be_added_and_a_setting_may_not_be_changed(tmp_path, bed):
    first = compare(lab_in(tmp_path / "a", bed, seeds=(0,)), tell=str)
    more = lab_in(tmp_path / "a", bed, seeds=(0,), methods={"OPD": OPD(), "Full FKL": FullFKL(top_k=4), "KD": SeqKD()})
    assert compare(more, tell=str)[:2] == first
    changed = lab_in(tmp_path / "a", bed, seeds=(0,), methods={"OPD": OPD(), "Full FKL": FullFKL(top_k=5)})
    with pytest.raises(ConfigError, match="Full FKL.*other settings"):
        compare(changed, tell=str)


def test_the_runs_of_one_method_may_differ_in_more_than_the_method(tmp_path, bed):
    """Tables are merged, one method's over those of all; its runs are other runs then."""
    changes = {"run": {"rollout": {"num_prompts": 1}}, "runs": {"Full FKL": {"teacher": {"path": "start"}}}}
    lab = lab_in(tmp_path / "a", bed, seeds=(0,), **changes)
    plain, told = (run_of(lab, trial, None) for trial in trials(lab))
    assert (plain.rollout.num_prompts, told.rollout.num_prompts) == (1, 1)
    assert plain.teacher.path != told.teacher.path == "start" and told.method == FullFKL(top_k=4)
    before = run_of(lab_in(tmp_path / "a", bed, seeds=(0,), run=changes["run"]), list(trials(lab))[1], None)
    assert fingerprint_of(before) != fingerprint_of(told)
    with pytest.raises(ConfigError, match=r"runs\.OPDD is for none of the methods: OPD, Full FKL"):
        lab_in(tmp_path / "a", bed, runs={"OPDD": {}})
    with pytest.raises(ConfigError, match="method 'OPD'.*unknown key 'rollouts'"):
        run_of(lab_in(tmp_path / "a", bed, run={"rollouts": {}}), next(trials(lab)), None)


def test_an_option_that_is_new_since_an_outcome_does_not_orphan_it(tmp_path, bed):
    """As an older tropd would have left it: a run.toml without the option, and a fingerprint of fewer options."""
    asked = lab_in(tmp_path / "a", bed, seeds=(0,))
    first = compare(asked, tell=str)
    for path in (tmp_path / "a" / "trials").glob("*/run.toml"):
        path.write_text("\n".join(line for line in path.read_text().split("\n") if not line.startswith("staleness")))
    results = tmp_path / "a" / "results.jsonl"
    for outcome in first:
        results.write_text(results.read_text().replace(outcome.fingerprint, "0123456789ab"))
    assert [o.scores for o in compare(asked, tell=str)] == [o.scores for o in first]
    changed = lab_in(tmp_path / "a", bed, seeds=(0,), methods={"OPD": OPD(), "Full FKL": FullFKL(top_k=5)})
    with pytest.raises(ConfigError, match="Full FKL.*other settings"):
        compare(changed, tell=str)


@pytest.mark.slow
def test_two_workers_give_the_table_of_one(tmp_path, bed):
    alone = compare(lab_in(tmp_path / "a", bed), tell=str)
    together = compare(lab_in(tmp_path / "b", bed), workers=2, tell=str)
    assert len(alone) == 4 and lasting(alone) == lasting(together)


@pytest.mark.slow
def test_a_killed_comparison_goes_on(tmp_path, bed):
    whole = compare(lab_in(tmp_path / "whole", bed), tell=str)
    lab = tmp_path / "lab.toml"
    lab.write_text(
        f'output = "{tmp_path / "cut"}"\ntestbeds = ["{bed}"]\nseeds = [0, 1]\n'
        '[methods.OPD]\nname = "opd"\n[methods."Full FKL"]\nname = "full_fkl"\ntop_k = 4\n'
    )
    command = [sys.executable, "-m", "tropd", "compare", str(lab), "--workers", "1", "--no-figures"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = tmp_path / "cut" / "results.jsonl"
    deadline = time.monotonic() + 120
    while not (results.exists() and results.read_text().count("\n")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with results.open("a") as file:
        file.write('{"testbed": "to')  # as a kill inside a write leaves it
    done = results.read_text().count("\n")
    assert 1 <= done < 4
    said: list[str] = []
    outcomes = compare(load_lab(lab), tell=said.append)
    assert lasting(outcomes) == lasting(whole)
    assert f"{done} outcomes" in said[0]


def outcome(method: str, rate: float, seed: int, score: float) -> Outcome:
    return Outcome(
        testbed="nano-hard",
        method=method,
        learning_rate=rate,
        seed=seed,
        status="done",
        fingerprint="",
        steps=(0, 40),
        scores=(0.2, score),
        greedy=(),
        lengths=(9.0, 20.0),
        gradient_norm=(1.0, 2.0),
        tokens={"student": 10, "teacher": 0},
        probes={},
        seconds=1.0,
    )


def test_a_table_takes_each_method_at_its_best_rate_and_pairs_the_seeds():
    lab = Lab(
        output="",
        testbeds=("nano-hard",),
        methods={"OPD": OPD(), "KD": SeqKD()},
        learning_rates=(1e-3, 1e-2),
        seeds=(0, 1),
    )
    scores = {("OPD", 1e-3): (0.4, 0.6), ("OPD", 1e-2): (0.1, 0.1), ("KD", 1e-3): (0.2, 0.2), ("KD", 1e-2): (0.5, 0.7)}
    outcomes = [outcome(m, r, seed, s) for (m, r), found in scores.items() for seed, s in enumerate(found)]
    sheet = sheets(lab, outcomes)[0]
    assert [row[0] for row in sheet.rows] == ["KD", "OPD"]
    first = dict(zip(sheet.columns, sheet.rows[0], strict=True))
    assert first["rate 0.001"].startswith("0.200") and first["best rate"].startswith("0.600")
    assert first["minus OPD, paired"] == "+0.100 [+0.100, +0.100]" and first["P(better than OPD)"] == "0.75"
    assert "| KD |" in sheet.markdown()


def test_seeds_come_before_methods_so_that_a_part_is_a_smaller_comparison():
    lab = Lab(output="", testbeds=("nano-hard",), methods={"OPD": OPD(), "KD": SeqKD()}, seeds=(0, 1))
    assert [(t.seed, t.method) for t in trials(lab)] == [(0, "OPD"), (0, "KD"), (1, "OPD"), (1, "KD")]
    assert len({t.folder for t in trials(lab)}) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('testbeds = ["nano-hrd"]\n[methods.A]\nname = "opd"', "did you mean 'nano-hard'"),
        ('testbeds = ["nano-hard"]\nseed = [1]\n[methods.A]\nname = "opd"', "unknown key 'seed'; did you mean 'seeds'"),
        ('testbeds = ["nano-hard"]\n[methods.A]\nname = "odp"', "there is no method 'odp'. Did you mean 'opd'"),
        ('testbeds = ["nano-hard"]\n[methods.A]\nname = "opd"\ntopk = 3', "unknown key 'methods.A.topk'"),
        ('testbeds = ["nano-hard"]\nbaseline = "B"\n[methods.A]\nname = "opd"', "none of the methods: A"),
        ('testbeds = ["nano-hard"]\nseeds = [1, 1]\n[methods.A]\nname = "opd"', "says something twice"),
        ('testbeds = ["there/is/none.toml"]\n[methods.A]\nname = "opd"', "does not exist"),
        ("testbeds = [", "is not TOML"),
    ],
)
def test_a_wrong_comparison_is_refused_in_words(text, said, tmp_path, capsys):
    (tmp_path / "lab.toml").write_text(text)
    assert main(["compare", str(tmp_path / "lab.toml")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_run_file_that_evaluates_nothing_is_refused_before_it_is_trained(tmp_path):
    folder = write_models(tmp_path)
    (folder / "run.toml").write_text(small_run(folder, steps=1).dump())
    with pytest.raises(ConfigError, match=r"\[evaluation.data\], and a grader"):
        lab_in(tmp_path / "out", str(folder / "run.toml"))


def test_learning_curves_are_drawn_of_testbeds_whose_names_are_no_file_names(tmp_path, capsys):
    lab = tmp_path / "mine.toml"
    lab.write_text(
        f'output = "{tmp_path}"\ntestbeds = ["embedded/nano-hard"]\nseeds = [0]\n[methods.OPD]\nname = "opd"\n'
    )
    found = dataclasses.replace(outcome("OPD", 3e-4, 0, 0.5), testbed="embedded/nano-hard")
    (tmp_path / "results.jsonl").write_text(json.dumps(dataclasses.asdict(found)) + "\n")
    assert main(["compare", str(lab), "--tables"]) == 0
    drawn = tmp_path / "curves-embedded_nano-hard.svg"
    assert "</svg>" in drawn.read_text() and drawn.name in "".join(capsys.readouterr().out.split())


def test_a_foreign_line_in_the_results_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps({"testbed": "x"}) + "\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_outcomes(tmp_path / "results.jsonl")


def test_tables_go_into_a_page_between_their_marks(tmp_path, capsys):
    lab, page = tmp_path / "mine.toml", tmp_path / "page.md"
    lab.write_text(f'output = "{tmp_path}"\ntestbeds = ["nano-hard"]\nseeds = [0]\n[methods.OPD]\nname = "opd"\n')
    (tmp_path / "results.jsonl").write_text(json.dumps(dataclasses.asdict(outcome("OPD", 3e-4, 0, 0.5))) + "\n")
    command = ["compare", str(lab), "--tables", "--no-figures", "--into", str(page)]
    page.write_text("before\n<!-- lab other -->\n<!-- /lab -->\n")
    assert main(command) == 2 and "<!-- lab mine -->" in capsys.readouterr().err
    page.write_text("before\n<!-- lab mine -->\nold\n<!-- /lab -->\nafter\n")
    assert main(command) == main(command) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- /lab -->\nafter\n")
    assert "old" not in text and text.count("| OPD | 0.500 |") == 1

    from tropd.laboratory import runner
    from tropd.laboratory.trial import fingerprint_of, pair_of, run_of

    def lab(name: str, arms) -> Lab:
        return Lab(output=str(tmp_path / name), testbeds=("embedded/nano-hard",), methods=arms, seeds=(0,), steps=1)

    first, second = lab("a", {"OPD": OPD()}), lab("b", {"plain": OPD(), "KD": SeqKD()})
    (made,) = compare(first, tell=str)
    said: list[str] = []
    outcomes = compare(second, tell=said.append)
    assert outcomes[0] == dataclasses.replace(made, method="plain") and "1 of them" in said[0]
    (trial,) = trials(first)
    assert made.fingerprint == fingerprint_of(run_of(first, trial, pair_of(first, trial.testbed, 0)))
    assert {t.key for t in trials(second)} == set(runner.read_outcomes(tmp_path / "b" / "results.jsonl"))


def test_a_table_inside_a_method_keeps_the_methods_own_defaults(tmp_path):
    (tmp_path / "lab.toml").write_text(
        'testbeds = ["nano-hard"]\n[methods.A]\nname = "tropd"\nprefix.start = 0.5\n'
        '[methods.B]\nname = "tropd_aopd"\ntropd.prefix.start = 0.5\n'
    )
    methods = load_lab(tmp_path / "lab.toml").methods
    for prefix in (methods["A"].prefix, methods["B"].tropd.prefix):
        assert (prefix.shape, prefix.start, prefix.end) == ("cosine", 0.5, 0.0)
    run = Run.from_dict(
        {
            "student": {"path": "s"},
            "teacher": {"path": "t"},
            "data": {"path": "d"},
            "method": {"prefix": {"start": 0.5}},
        },
        "here",
    )
    assert run.method.prefix == methods["A"].prefix
