"""The command line says no in one paragraph, and imports what it needs when it needs it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings

import pytest
import torch
import transformers

import tropd
from tropd.cli.main import COMMANDS, main
from tropd.errors import EvidenceError, MethodWarning, TeacherRefused, TropdError, VocabularyError
from tropd.methods import METHODS


def commands_of(**functions):
    return {name: (function, "a line") for name, function in functions.items()}


def raising(error):
    def command(argv):
        raise error

    return command


def test_without_a_command_the_commands_are_listed(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        shown = " ".join(capsys.readouterr().out.split())  # a narrow terminal folds lines
        assert all(name in shown and line.split(",")[0] in shown for name, (_, line) in COMMANDS.items())


def test_an_unknown_command_is_refused_with_the_nearest_one(capsys):
    assert main(["explian", "tropd"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: there is no command 'explian'. Did you mean 'explain'?")


def test_every_command_that_is_named_by_its_module_is_there():
    for command, _ in COMMANDS.values():
        if isinstance(command, str):
            assert importlib.util.find_spec(command) is not None, command


def test_an_unknown_method_is_one_paragraph_without_a_traceback(capsys):
    assert main(["explain", "trpod"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: there is no method 'trpod'. Did you mean 'tropd'?")
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TropdError("plain."), "error: plain.\n"),
        (VocabularyError("7 and\n 9."), "error: 7 and 9.\n"),
        (TeacherRefused("[red] busy"), "error: [red] busy\n"),
        (EvidenceError("x" * 400), None),
    ],
)
def test_an_error_is_its_message_on_one_line_and_exits_with_2(error, said, capsys):
    assert main(["act"], commands_of(act=raising(error))) == 2
    err = capsys.readouterr().err
    assert err == said or (said is None and err.endswith("x" * 400 + "\n"))


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        main(["act"], commands_of(act=raising(ZeroDivisionError())))


def test_an_interruption_exits_with_130(capsys):
    assert main(["act"], commands_of(act=raising(KeyboardInterrupt()))) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_wrong_flag_exits_with_2(capsys):
    assert main(["methods", "--jsno"]) == 2
    assert "--json" in capsys.readouterr().err


def test_a_method_warning_is_one_line_said_once_and_others_are_left_alone(capsys):
    def act(argv):
        warnings.warn("gamma is\n  large", MethodWarning, stacklevel=1)
        warnings.warn("gamma is large", MethodWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        return 0

    with pytest.warns(UserWarning, match="something else") as left:
        assert main(["act"], commands_of(act=act)) == 0
    assert capsys.readouterr().err == "warning: gamma is large\n"
    assert [str(w.message) for w in left] == ["something else"]


def test_the_exit_code_is_that_of_the_command():
    assert main(["act", "a", "b"], commands_of(act=len)) == 2


def test_methods_and_explain_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out) if m["kind"] == "method"] == list(METHODS)
    assert main(["explain", "tropd", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "TrOPD"


def test_the_version_is_that_of_the_package(capsys):
    assert main(["version"]) == main(["--version"]) == 0
    assert capsys.readouterr().out == f"{tropd.__version__}\n" * 2


def test_the_environment_names_versions_and_devices(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tropd"] == tropd.__version__
    assert found.keys() >= {"python", "platform", "cpu", "cores", "threads", "cuda", "devices", "packages"}
    here = {package["name"]: package["installed"] for package in found["packages"]}
    assert here["torch"] == torch.__version__ and here["transformers"] == transformers.__version__
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("transformers", transformers.__version__, "cores"))


def test_public_names_are_there_and_unknown_ones_are_refused():
    for name in tropd.__all__:
        assert getattr(tropd, name) is not None
    assert dir(tropd) == tropd.__all__
    with pytest.raises(AttributeError, match="it has ADWIN, AOPD, .*METHODS"):
        _ = tropd.Trainer


def imported_by(statement: str) -> set[str]:
    heavy = ["torch", "transformers", "datasets", "tyro", "rich", "pydantic", "matplotlib", "peft"]
    code = f"import sys; {statement}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_objective_imports_torch_alone():
    assert imported_by("import tropd.objective") == {"torch"}


def test_the_list_of_commands_needs_no_torch():
    assert imported_by("import tropd.cli.main") == {"tyro", "rich"}
    assert imported_by("import tropd") == set()
