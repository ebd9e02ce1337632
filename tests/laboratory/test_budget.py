"""Every method gets as many steps as the same budget allows, and is set against its control."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.laboratory.test_compare import bed, lab_in  # noqa: F401  (a fixture)
from tests.small_runs import run_of as small_run
from tests.small_runs import write_models
from tropd.cli.main import main
from tropd.errors import ConfigError
from tropd.laboratory.budget import MOST, Pilot, read_pilots, with_steps
from tropd.laboratory.lab import Lab, load_lab, trials
from tropd.laboratory.runner import compare
from tropd.laboratory.tables import arms_of, sheets
from tropd.laboratory.trial import Outcome
from tropd.methods import METHODS, OPD
from tropd.methods.controls import FirstWindow, RandomMask
from tropd.monitoring.records import read_records
from tropd.run.start import train

HALF = OPD(plus=(RandomMask(share=0.5),))
TRAINED = 400.0
ROOT = Path(__file__).parents[2]


def budgeted(folder: Path, bed: str, **changes) -> Lab:  # noqa: F811
    settings = {"methods": {"OPD": OPD(), "half": HALF}, "seeds": (0,), "budgets": {"tokens": TRAINED}, **changes}
    return lab_in(folder, bed, **settings)


def test_a_method_that_trains_half_of_its_tokens_gets_twice_the_steps_and_goes_on_from_its_pilots(tmp_path, bed):  # noqa: F811
    lab, said = budgeted(tmp_path / "a", bed), []
    assert compare(lab, tell=said.append, minutes=0) == []  # pilots only: no trial starts after that
    pilots = read_pilots(tmp_path / "a")
    tokens = {method: pilot.tokens for (_, method), pilot in pilots.items()}
    assert tokens["half"] == pytest.approx(tokens["OPD"] / 2, rel=0.05)
    part = compare(lab, tell=said.append, only=["half"])
    assert [outcome.method for outcome in part] == ["half"]
    whole = {outcome.method: outcome for outcome in compare(lab, tell=said.append)}
    assert whole["half"] == part[0] and read_pilots(tmp_path / "a") == pilots
    for name, outcome in whole.items():
        assert outcome.steps[-1] == round(TRAINED / tokens[name])
        assert outcome.trained == pytest.approx(TRAINED, abs=tokens["OPD"])
        assert outcome.budget == "tokens"
    assert whole["half"].steps[-1] == pytest.approx(2 * whole["OPD"].steps[-1], abs=1)
    assert sum(line.startswith("measuring a step of 2 methods") for line in said) == 1


def test_a_pilot_is_flown_again_only_for_another_method_without_outcomes(tmp_path, bed):  # noqa: F811
    compare(budgeted(tmp_path / "a", bed), tell=str, only=["OPD"])
    before = read_pilots(tmp_path / "a")
    less = OPD(plus=(RandomMask(share=0.25),))
    compare(budgeted(tmp_path / "a", bed, methods={"OPD": OPD(), "half": less}), tell=str, minutes=0)
    after = read_pilots(tmp_path / "a")
    assert {key: after[key] for key in before} == before and len(after) == 2


def test_both_budgets_are_trials_of_their_own(tmp_path, bed):  # noqa: F811
    lab = budgeted(tmp_path, bed, budgets={"tokens": TRAINED, "seconds": 3.0})
    facts = {"testbed": bed, "fingerprint": "", "tokens": 100.0, "seconds": 0.5}
    pilots = {(bed, name): Pilot(method=name, **facts) for name in ("OPD", "half")}
    found = {(trial.method, trial.budget): trial.steps for trial in with_steps(lab, pilots)}
    assert found == {(name, of): steps for name in ("OPD", "half") for of, steps in (("tokens", 4), ("seconds", 6))}
    assert len({trial.key for trial in trials(lab)}) == 4
    nothing = {key: dataclasses.replace(pilot, tokens=0.0, seconds=0.0) for key, pilot in pilots.items()}
    assert {trial.steps for trial in with_steps(lab, nothing)} == {MOST * 2}


def test_the_probe_counts_the_tokens_that_some_term_weighs(tmp_path):
    models = write_models(tmp_path)
    window = OPD(plus=(FirstWindow(length=3),))
    run = dataclasses.replace(small_run(models, kind="quick", probes=["trained"]), method=window)
    for record in read_records(train(run) / "records.jsonl").steps:
        assert record.probes["trained/share"] * record.tokens["student"] == pytest.approx(3 * 4)


def outcome(method: str, seed: int, score: float, budget: str = "tokens") -> Outcome:
    return Outcome(
        testbed="nano-hard", method=method, learning_rate=3e-4, seed=seed, status="done", fingerprint="", steps=(0, 7),
        scores=(0.1, score), greedy=(), lengths=(5.0, 5.0), gradient_norm=(1.0,) * 7, probes={}, seconds=1.0,
        tokens={"student": 50, "teacher": 0}, budget=budget, trained=25.0, training_seconds=2.0,
    )  # fmt: skip


def test_a_method_is_set_against_its_control_seed_by_seed_for_each_budget():
    lab = Lab(
        output="x",
        testbeds=("nano-hard",),
        learning_rates=(3e-4,),
        seeds=(0, 1),
        methods={"OPD": OPD(), "half": HALF, "idea": OPD()},
        budgets={"tokens": 25.0, "seconds": 2.0},
        controls={"idea": ("half", "OPD")},
    )
    scores = {"OPD": (0.3, 0.5), "half": (0.4, 0.4), "idea": (0.5, 0.6)}
    outcomes = [outcome(name, seed, score) for name, both in scores.items() for seed, score in enumerate(both)]
    outcomes += [outcome("OPD", 0, 0.9, "seconds")]
    assert [arm.method for arm in arms_of(lab, outcomes, "nano-hard", "seconds")] == ["OPD"]
    found = {sheet.title: sheet for sheet in sheets(lab, outcomes)}
    against = found["nano-hard, equal tokens: methods against their controls"]
    assert [row[:5] for row in against.rows] == [
        ("idea", "half", "0.550", "0.400", "+0.150 [+0.100, +0.200]"),
        ("idea", "OPD", "0.550", "0.400", "+0.150 [+0.100, +0.200]"),
    ]
    assert "nano-hard: accuracy after about 25 tokens trained, 2 seeds" in found
    assert "nano-hard: accuracy after about 2 CPU seconds of training, 1 seed" in found
    assert found["nano-hard, equal tokens: cost of one run"].rows[0] == ("OPD", "7", "25", "50", "0", "2.0")


def test_what_is_no_budget_or_no_control_is_told(tmp_path):
    base = {"output": "x", "testbeds": ("nano-hard",), "methods": {"OPD": OPD(), "half": HALF}}
    with pytest.raises(ConfigError, match=r"controls name 'hlf', none of the methods .did you mean 'half'"):
        Lab(**base, controls={"OPD": ("hlf",)})
    with pytest.raises(ConfigError, match="budgets = 0.0"):
        Lab(**base, budgets={"tokens": 0.0})
    lab = tmp_path / "lab.toml"
    lab.write_text('testbeds = ["nano-hard"]\nbudgets = { hours = 3 }\n[methods]\nOPD = { name = "opd" }\n')
    assert main(["compare", str(lab), "--no-figures"]) == 2
    assert main(["compare", str(lab), "--no-figures", "--methods", "odp"]) == 2


def test_the_survey_has_an_arm_for_every_method_that_needs_no_more_than_a_teacher():
    """A method that is missing there needs a line in labs/survey.toml, unless its student teaches itself,
    or it is for a teacher of another kind: one with a tokenizer of its own (labs/bridge.toml), one that only writes."""
    lab = load_lab(ROOT / "labs" / "survey.toml")
    elsewhere = {name for name, cls in METHODS.items() if cls.idea == "what teaches"}
    elsewhere |= {"sft", "tokenizer_barrier", "omniopd"}
    missing = set(METHODS) - elsewhere - {method.name for method in lab.methods.values()}
    assert not missing, f"labs/survey.toml has no arm for {', '.join(sorted(missing))}"
    assert len(lab.learning_rates) == 2 and len(lab.seeds) == 3 and set(lab.budgets) == {"tokens", "seconds"}
