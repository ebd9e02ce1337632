"""Parts of one's own go through the whole life of a run by their names."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tropd
from tests import run_case
from tests.base.test_names import PACKAGE, offer_gentle, use_offers
from tests.own_package.gentle.engine import FewAtATime
from tests.own_package.gentle.grader import holds, shortness
from tests.own_package.gentle.method import Gentle
from tests.own_package.gentle.policy import Opened
from tests.small_runs import run_of, write_run
from tests.tiny import VOCAB, tiny_model
from tropd import Run
from tropd.base.names import Own
from tropd.cli.main import main
from tropd.config.policies import NamedPolicy
from tropd.config.stages import RolloutConfig
from tropd.errors import ConfigError
from tropd.methods.policies import Mixture, OnPolicy, TeacherPrefix
from tropd.monitoring.display import Silent
from tropd.monitoring.records import read_records
from tropd.objective.schedules import Schedule
from tropd.testing import check_engine, some_rollouts

STEPS = 4


def named(models: Path) -> dict[str, Any]:
    """The own package in a run file."""
    return {
        "steps": STEPS,
        "method": {"name": f"{PACKAGE}/gentle/method.py:Gentle", "bound": 3.0},
        "teacher": {"path": f"{PACKAGE}/gentle/teacher.py:Unsure", "knobs": {"path": str(models / "teacher")}},
        "grader": f"{PACKAGE}/gentle/grader.py:Holds",
        "rollout": {"engine": {"name": "few", "rows": 3}, "policy": {"name": "opened", "token": 70}},
        "probes": ["geometry", {"name": "sure", "above": 0.1, "every": 2}],
    }


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The own package, which offers an engine, a policy and a probe."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        offer_gentle(folder, patch)
        yield folder


@pytest.fixture(scope="module")
def by_name(models: Path, tmp_path_factory: pytest.TempPathFactory, installed: Path) -> Path:
    directory = tmp_path_factory.mktemp("named") / "run"
    path = write_run(models, directory, **named(models))
    ended = run_case.train(path, directory, prepare=partial(use_offers, installed))
    assert ended.code == 0 and "texts are written 3 at a time" in ended.said, ended.said
    return directory


def test_a_run_of_ones_own_parts_that_is_killed_goes_on_exactly(
    models: Path, tmp_path: Path, by_name: Path, installed: Path
) -> None:
    directory, prepare = tmp_path / "run", partial(use_offers, installed)
    path = write_run(models, directory, **named(models))
    running = run_case.start(run_case.Order(train=path, directory=directory, prepare=prepare))
    assert running.kill_when(lambda: run_case.num_recorded(directory) >= 3)
    ended = run_case.resume(directory, prepare=prepare)
    assert ended.code == 0, ended.said
    assert run_case.trace(directory) == run_case.trace(by_name)
    header = read_records(directory / "records.jsonl").header
    assert (header["method"], header["teacher"]) == ("method.py:Gentle", "teacher.py:Unsure")
    assert (header["engine"], header["policy"]) == ("few", "opened")


def test_an_own_engine_writes_an_own_policy_begins_and_an_own_probe_is_recorded(by_name: Path) -> None:
    written = Run.load(by_name / "run.toml")
    assert written.rollout.engine == Own(name="few", knobs={"rows": 3})
    assert written.rollout.policy == NamedPolicy(name="opened", knobs={"token": 70})
    records = read_records(by_name / "records.jsonl")
    assert [step.tokens["teacher"] for step in records.steps] == [3] * STEPS, "every second of six responses"
    steps = [step.probes for step in records.steps]
    assert ["sure/share" in probes for probes in steps] == [True, False, True, False]
    assert all(0 <= probes["geometry/unchanged_bf16"] <= 1 for probes in steps)


def test_commands_that_only_look_import_nothing_unless_asked(
    by_name: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*command: str | Path) -> tuple[int, str]:
        code = main([str(part) for part in command])
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).replace("│", " ").split())

    assert run("report", by_name, "-o", tmp_path / "report.html")[0] == 0
    assert "method.py:Gentle" in (tmp_path / "report.html").read_text()
    assert run("export", by_name, "-o", tmp_path / "model")[0] == 0
    assert "distilled with Gentle" in (tmp_path / "model" / "README.md").read_text()
    code, said = run("inspect", by_name, "--step", "2")
    assert code == 0 and "rollouts" in said
    code, said = run("evaluate", by_name, "-o", tmp_path / "scores")
    assert code == 2 and "Read it, then add --trust-code" in said
    assert run("evaluate", by_name, "--trust-code", "-o", tmp_path / "scores")[0] == 0
    assert run("evaluate", by_name, "--grader", "exact", "-o", tmp_path / "exact")[0] == 0
    file = by_name.with_suffix(".toml")
    (tmp_path / "rollouts.jsonl").write_text("")
    for command in (("doctor", file), ("plan", file), ("score", file, tmp_path / "rollouts.jsonl", "-o", "x.jsonl")):
        code, said = run(*command)
        assert code == 2 and all(key in said for key in ("method.name", "teacher.path", "rollout.policy")), command
        assert ("rollout.engine 'few' is not imported" in said) is (command[0] == "doctor"), command
        assert "Read it, then add --trust-code" in said, command
    code, said = run(
        "doctor", file, "--trust-code", "--sample-prompts", "2", "--sample-tokens", "8", "--output", tmp_path / "new"
    )
    assert "the teacher is your own" in said and "0 errors" in said, said
    assert run("plan", file, "--trust-code")[0] == 0


def test_a_comparison_takes_ones_own_method_and_knows_it_again(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = {"engine": f"{PACKAGE}/gentle/engine.py:FewAtATime", "policy": f"{PACKAGE}/gentle/policy.py:Opened"}
    probes = [f"{PACKAGE}/gentle/probe.py:Sure"]
    changes = {"rollout": rollout, "probes": probes, "method": {"name": "opd"}, "grader": "exact"}
    bed = write_run(models, tmp_path / "bed", steps=2, **changes)
    (tmp_path / "own.py").write_text((PACKAGE / "gentle/method.py").read_text().replace("from .bounds", "from bounds"))
    (tmp_path / "bounds.py").write_text("WIDEST = 4.0\n")
    lab = tmp_path / "lab.toml"
    lab.write_text(
        f"output = '{tmp_path}/lab'\ntestbeds = ['{bed}']\nseeds = [0]\nlearning_rates = [0.001]\n"
        "[methods.OPD]\nname = 'opd'\n[methods.mine]\nname = 'own.py:Gentle'\nbound = 2.0\n"
    )
    for _ in range(2):
        assert main(["compare", str(lab), "--workers", "1", "--no-figures"]) == 0
    assert "2 outcomes are there already; 0 trials to go" in capsys.readouterr().out
    lab.write_text(lab.read_text().replace("bound", "bund"))
    assert main(["compare", str(lab), "--no-figures"]) == 2
    assert "unknown key 'methods.mine.bund'; did you mean 'bound'" in capsys.readouterr().err


def test_objects_that_a_file_can_name_need_not_be_given_again(models: Path, tmp_path: Path, by_name: Path) -> None:
    directory = tmp_path / "run"
    run = Run.load(write_run(models, directory, **named(models)))
    tropd.train(replace(run, steps=2), method=Gentle(bound=3.0), grader=shortness, display=Silent())
    written = Run.load(directory / "run.toml")
    assert written.given == () and written.method.name == f"{PACKAGE}/gentle/method.py:Gentle"
    assert written.grader == f"{PACKAGE}/gentle/grader.py:shortness"
    tropd.resume(directory, steps=3, display=Silent())


def test_what_is_in_the_file_is_not_given_again(by_name: Path) -> None:
    with pytest.raises(ConfigError, match="has its grader in run.toml, and goes on with that: give none"):
        tropd.resume(by_name, steps=9, grader=holds, display=Silent())


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"path": f"{PACKAGE}/gentle/teacher.py:Unsure", "knobs": {"pth": "x"}}, r"no knob 'pth' .did you mean 'path'"),
        ({"path": f"{PACKAGE}/gentle/teacher.py:Unsure"}, "needs path, which has no default"),
        ({"path": f"{PACKAGE}/gentle/grader.py:Holds"}, "is a Holds. Give a class that inherits from tropd.Teacher"),
        ({"path": "somewhere", "knobs": {"a": 1}}, "teacher.path is somewhere, which takes no knobs"),
        ({"path": "a.py:B", "servers": ["http://x"]}, "a teacher of your own: they would never be asked"),
    ],
)
def test_a_teacher_that_cannot_be_made_is_told(
    models: Path, tmp_path: Path, teacher: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        path = write_run(models, tmp_path / "run", **{**named(models), "teacher": teacher})
        tropd.train(Run.load(path), display=Silent())


def test_one_of_several_teachers_is_ones_own(models: Path, tmp_path: Path) -> None:
    own = {"path": f"{PACKAGE}/gentle/teacher.py:Unsure", "knobs": {"path": str(models / "teacher")}}
    path = write_run(
        models,
        tmp_path / "run",
        **{
            **named(models),
            "steps": 1,
            "teacher": {"path": "base"},
            "teachers": {"even": own, "odd": {"path": str(models / "teacher")}},
            "data": {"teacher_column": "kind"},
        },
    )
    directory = tropd.train(Run.load(path, ["--teachers.even.knobs.share", "0.2"]), display=Silent())
    assert Run.load(directory / "run.toml").teachers["even"].knobs["share"] == 0.2
    probes = read_records(directory / "records.jsonl").steps[0].probes
    assert {"teachers/even/ratio/mean", "teachers/odd/ratio/mean"} <= set(probes)


def test_rollouts_are_scored_by_ones_own_teacher(by_name: Path, tmp_path: Path) -> None:
    rollouts = some_rollouts(99, lengths=[(3, 6), (1, 9)])
    lines = [json.dumps(asdict(rollout), default=lambda x: getattr(x, "value", str(x))) for rollout in rollouts]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    command = ["score", str(by_name.with_suffix(".toml")), str(tmp_path / "rollouts.jsonl"), "-o", str(tmp_path / "s")]
    assert main([*command, "--trust-code", "--grader", f"{PACKAGE}/gentle/grader.py:shortness"]) == 0
    scored = [json.loads(line) for line in (tmp_path / "s").read_text().splitlines()]
    assert [len(line["teacher_logprobs"]) for line in scored] == [6, 9] and all(line["reward"] for line in scored)


def test_a_method_that_needs_texts_says_so_of_a_teacher_that_writes_none(models: Path, tmp_path: Path) -> None:
    path = write_run(
        models, tmp_path / "run", **{**named(models), "method": {"name": "seqkd"}, "rollout": {}, "probes": []}
    )
    with pytest.raises(ConfigError, match="needs the teacher's texts, but a Unsure writes none"):
        tropd.train(Run.load(path), display=Silent())


GENTLE = f"{PACKAGE}/gentle"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollout": {"engine": "fwe"}}, "there is no engine 'fwe' .did you mean .few...; there are few, and your own"),
        ({"rollout": {"engine": f"{GENTLE}/probe.py:Sure"}}, "is a Sure. Give a class that inherits from tropd.Engine"),
        ({"rollout": {"engine": {"name": "few", "row": 1}}}, "engine 'few' has no knob 'row' .did you mean 'rows'"),
        ({"rollout": {"engine": "no.such:Engine"}}, "engine 'no.such:Engine': no.such cannot be imported"),
        ({"rollout": {"engine": 3}}, "rollout.engine is 3, neither a name nor a table with a name and knobs"),
        ({"rollout": {"engine": "few", "servers": ["http://x"]}}, "rollout.engine is few, which writes the rollouts"),
        ({"rollout": {"policy": "mixtur"}}, "there is no policy 'mixtur' .did you mean 'mixture'"),
        ({"rollout": {"policy": {"name": "mixture", "share": 0.5}}}, "unknown key 'rollout.policy.share'"),
        ({"rollout": {"policy": {"name": "opened", "tokn": 1}}}, "unknown key 'rollout.policy.tokn'; did you mean"),
        ({"rollout": {"policy": f"{GENTLE}/engine.py:FewAtATime"}}, "no dataclass that inherits from tropd.RolloutPol"),
        (
            {"rollout": {"policy": "teacher_text"}},
            "policy .teacher_text. needs the teacher.s texts, but a Unsure",
        ),
        ({"probes": ["geometri"]}, "there is no probe 'geometri' .did you mean 'geometry'"),
        ({"probes": "geometry"}, "probes is 'geometry', but it is a list of names"),
        ({"probes": [{"name": "sure", "every": 0}]}, "probe 'sure' has every = 0. Give a whole number of steps"),
        ({"probes": [{"name": "sure", "abov": 0}]}, "probe 'sure' has no knob 'abov' .did you mean 'above'"),
        ({"probes": ["sure", "sure"]}, "is called 'sure', as other numbers are"),
        ({"probes": [f"{GENTLE}/engine.py:FewAtATime"]}, "Give a class that inherits from tropd.Probe"),
    ],
)
def test_a_part_that_cannot_be_made_is_told(models: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    values = {**named(models), "rollout": {}, "probes": [], **changes}
    with pytest.raises(ConfigError, match=says):
        tropd.train(run_of(models, kind="tropd", **{"output": str(tmp_path / "run"), **values}), display=Silent())
    assert not (tmp_path / "run").exists()


def test_flags_and_objects_name_an_engine_and_a_policy(models: Path, tmp_path: Path) -> None:
    path = write_run(models, tmp_path / "run", "quick", rollout={"policy": {"name": "mixture", "student_share": 0.25}})
    run = Run.load(path, ["--rollout.policy.coin", "rollout", "--rollout.engine=few", "--rollout.engine.rows", "1"])
    assert run.policy == Mixture(student_share=0.25, coin="rollout")
    assert run.rollout.engine == Own(name="few", knobs={"rows": 1})
    run = Run.load(path, ["--rollout.policy", "teacher_prefix", "--rollout.policy.length.start", "0.5"])
    assert run.policy == TeacherPrefix(length=Schedule(shape="cosine", start=0.5, end=0.0))
    with pytest.raises(ConfigError, match="rollout.policy 'opened' is not imported here. Read it, then add --trust-co"):
        _ = Run.load(path, ["--rollout.policy", "opened"]).policy
    for policy in (Opened(token=9), TeacherPrefix(share=0.5)):
        run = replace(run, rollout=RolloutConfig(policy=policy))
        again = Run.from_dict(tomllib.loads(run.dump())).imported()
        assert again.policy == policy and again.fingerprint() == run.fingerprint()


def test_a_policy_of_the_run_replaces_the_methods(models: Path) -> None:
    plain = run_of(models, kind="quick")
    run = run_of(models, kind="quick", rollout={"policy": "on_policy"})
    assert plain.policy == plain.method.rollout != run.policy == OnPolicy()
    assert plain.fingerprint() != run.fingerprint()
    assert plain.fingerprint() == run_of(models, kind="quick", probes=["geometry"]).fingerprint()


def test_the_engine_of_the_own_package_keeps_its_promises() -> None:
    engine = FewAtATime(rows=2)
    engine.prepare(tiny_model(sharp=4.0), None, VOCAB)
    check_engine(engine, vocab_size=VOCAB)


def test_an_engine_that_only_packs_otherwise_and_probes_change_nothing(models: Path, tmp_path: Path) -> None:
    plain = tropd.train(run_of(models, kind="quick", output=str(tmp_path / "plain")), display=Silent())
    changes = {
        "rollout": {"engine": {"name": "few", "rows": 64}},
        "probes": ["geometry", "sure"],
        "output": str(tmp_path / "own"),
    }
    own = tropd.train(run_of(models, kind="quick", **changes), display=Silent())
    assert run_case.digest(plain / "model/model.safetensors") == run_case.digest(own / "model/model.safetensors")
