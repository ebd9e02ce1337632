"""A method of one's own in a run: plain data until it is imported, and the same run before and after."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.base.test_names import PACKAGE, offer_gentle
from tropd import Method, Run
from tropd.cli.main import main
from tropd.config.methods import complete
from tropd.errors import ConfigError
from tropd.methods import OPD, NamedMethod, TrOPD

NAME = f"{PACKAGE}/gentle/method.py:Gentle"
BASE = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"path": "p"}}


def run_with(tmp_path: Path, method: str, flags: tuple[str, ...] = ()) -> Run:
    path = tmp_path / "run.toml"
    path.write_text('student.path = "s"\nteacher.path = "t"\ndata.path = "p"\n' + method)
    return Run.load(path, flags)


@dataclass(frozen=True, kw_only=True)
class Mine(OPD):
    """OPD with something more."""

    widths: tuple[int, ...] = (1, 2)


def test_a_run_that_is_read_imports_nothing_and_keeps_the_name_and_the_knobs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')\n")
    run = run_with(tmp_path, '[method]\nname = "mine.py:Mine"\nbound = 3.0\nmore.deep = [1, 2]\n')
    assert run.method == NamedMethod(name=f"{tmp_path}/mine.py:Mine", knobs={"bound": 3.0, "more": {"deep": [1, 2]}})
    (tmp_path / "again.toml").write_text(run.dump())
    again = Run.load(tmp_path / "again.toml")
    assert again == run and again.fingerprint() == run.fingerprint()
    with pytest.raises(ConfigError, match=r"'/.*/mine.py:Mine' is not imported here. Read it, then add --trust-code"):
        _ = run.method.objective


def test_flags_change_the_knobs_without_an_import(tmp_path: Path) -> None:
    flags = ("--method", f"{PACKAGE}/gentle/method.py:Gentle", "--method.bound", "0.5", "--steps", "3")
    run = run_with(tmp_path, 'method = "opd"\n', flags)
    assert (run.method, run.steps) == (NamedMethod(name=NAME, knobs={"bound": 0.5}), 3)
    assert run.imported().method.bound == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [NAME, "gentle.method:Gentle", "gentle"])
def test_an_imported_method_is_the_same_run_as_its_table(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_gentle(tmp_path, monkeypatch)
    run = Run.from_dict({**BASE, "method": {"name": name}}).imported()
    assert run.method.objective.terms[0].name == "gentle" and run.method.name == name
    assert "bound = 4.0" in run.dump()
    again = Run.from_dict({**BASE, "method": {"name": name, "bound": 4.0}})
    assert again.fingerprint() == run.fingerprint() and again.dump() == run.dump()
    assert complete(run.method) == again.method and again.imported() == run


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"name": NAME, "bund": 3}, "unknown key 'method.bund'; did you mean 'bound'"),
        ({"name": NAME, "bound": -1}, "method.bound = -1.0 was asked for, but it must be above 0"),
        ({"name": NAME, "bound": "x"}, "'method.bound': Input should be a valid number"),
        ({"name": f"{PACKAGE}/gentle/grader.py:Holds"}, "is no class that inherits from tropd.Method"),
        ({"name": "no.such:Method"}, "no.such cannot be imported"),
        ("gentel", "there is no method 'gentel'. Did you mean 'gentle'"),
    ],
)
def test_a_method_that_cannot_be_made_is_told(
    method: object, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_gentle(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=says):
        Run.from_dict({**BASE, "method": method}).imported()


def test_a_class_that_is_no_dataclass_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from tropd import Method\nclass Mine(Method):\n    knob: int = 3\n")
    with pytest.raises(ConfigError, match=r"is no dataclass. Write @dataclass\(frozen=True, kw_only=True\) above it"):
        Run.from_dict({**BASE, "method": f"{tmp_path}/mine.py:Mine"}).imported()


def test_an_object_is_kept_by_the_name_of_its_class(tmp_path: Path) -> None:
    run = Run(student="s", teacher="t", data="p", method=Mine(discount=0.5, widths=(3,)))
    assert run.method.name == f"{Path(__file__)}:Mine"
    (tmp_path / "run.toml").write_text(run.dump())
    assert Run.load(tmp_path / "run.toml").imported() == run


def test_an_object_that_no_file_can_hold_says_so(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Local(OPD):
        pass

    run = Run(student="s", teacher="t", data="p", method=Local(discount=0.5))
    assert run.method.name == "Local (given in Python)"
    (tmp_path / "run.toml").write_text(run.dump())
    again = Run.load(tmp_path / "run.toml")
    assert again.fingerprint() == run.fingerprint()
    with pytest.raises(ConfigError, match=r"method Local \(given in Python\) is in no file: give it again"):
        again.imported()


def test_texts_stand_for_sections(tmp_path: Path) -> None:
    run = Run(student="s", teacher="t", data="p", method="opd", teachers={})
    assert (run.student.path, run.teacher.path, run.data.path, run.method) == ("s", "t", "p", OPD())
    assert Run(student="s", teacher="t", data="p").method == TrOPD()
    with pytest.raises(ConfigError, match="there is no method 'odp'. Did you mean 'opd'"):
        Run(student="s", teacher="t", data="p", method="odp")


def test_what_a_file_lacks_is_told(tmp_path: Path) -> None:
    for lacking, says in (("student", "student.path"), ("data", "data.path")):
        with pytest.raises(ConfigError, match=f"my run: '{says}' is missing"):
            Run.from_dict({name: x for name, x in BASE.items() if name != lacking}, "my run")
    with pytest.raises(ConfigError, match='my run: teacher.path is "base"'):
        Run.from_dict({"student": {"path": "s"}, "data": {"path": "p"}}, "my run")


def test_methods_and_explain_show_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer_gentle(tmp_path, monkeypatch)
    monkeypatch.chdir(PACKAGE)
    assert main(["methods", "--method", "gentle/method.py:Gentle", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in shown[-2:]] == ["gentle", "gentle/method.py:Gentle"]
    assert main(["explain", "gentle/method.py:Gentle"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "The largest reward, and the smallest with a minus." in said and "OPD with |log pi_T" in said
    assert main(["methods"]) == 0
    assert "bounded on both sides" in " ".join(capsys.readouterr().out.split())


def test_an_installed_method_that_is_broken_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad-1.0.dist-info").mkdir()
    (tmp_path / "bad-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (tmp_path / "bad-1.0.dist-info/entry_points.txt").write_text("[tropd.methods]\nbad = no_such_module:Bad\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["methods"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tropd_aopd" in said and "no_such_module cannot be imported" in said
    assert "no_such_module" not in sys.modules


def test_every_method_of_tropd_is_a_public_name() -> None:
    import tropd

    for cls in tropd.METHODS.values():
        assert getattr(tropd, cls.__name__) is cls and issubclass(cls, Method)


def test_flags_alone_name_a_teacher_with_its_knobs(tmp_path: Path) -> None:
    flags = ("--teacher.knobs.share", "0.2", "--teacher.path", "mine.py:Unsure", "--teacher.knobs.names", '["a=b"]')
    assert run_with(tmp_path, "", flags).teacher.knobs == {"share": 0.2, "names": ["a=b"]}
    flags = ("--teachers.one.path=mine.py:Unsure", "--teachers.one.knobs.share=0.2", "--data.teacher_column=who")
    (tmp_path / "bare.toml").write_text('student.path = "s"\ndata.path = "p"\n')
    assert Run.load(tmp_path / "bare.toml", flags).teachers["one"].knobs == {"share": 0.2}
    with pytest.raises(ConfigError, match="teacher.knobs has share, but teacher.path is t, which takes no knobs"):
        run_with(tmp_path, "", ("--teacher.knobs.share", "0.2"))
