"""The commands do what they say on real runs, and refuse in one paragraph with exit code 2, leaving nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.small_runs import save_model, write_models, write_run
from tropd.checkpoints import checkpoint as checkpoints
from tropd.cli.main import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("world"))
    save_model(folder / "teacher", seed=1, sharp=12.0)
    return folder


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    """A finished run of two steps with both checkpoints."""
    evaluation = {"data": {"path": str(world / "data.jsonl")}, "num_samples": 2, "max_new_tokens": 6, "every": 1}
    assert main(["train", str(write_run(world, world / "run", "quick", evaluation=evaluation))]) == 0
    return world / "run"


@pytest.fixture(scope="module")
def adapter(world: Path) -> Path:
    """A finished run of one step that trained an adapter."""
    student = {"path": str(world / "student"), "lora": {"rank": 2}}
    path = write_run(world, world / "adapter", "quick", student=student)
    assert main(["train", str(path), "--steps", "1", "--optimizer.learning-rate", "0.1"]) == 0
    return world / "adapter"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a refusal says: one paragraph, exit code 2."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    return " ".join(said.split())


def test_a_trained_run_can_be_resumed_only_before_its_end(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is finished: 2 of 2 steps" in refused(capsys, "resume", str(trained))
    again = tmp_path / "run"
    shutil.copytree(trained, again)
    assert main(["resume", str(again), "--step", "1"]) == 0
    assert torch.equal(
        load_file(again / "model" / "model.safetensors")["model.norm.weight"],
        load_file(trained / "model" / "model.safetensors")["model.norm.weight"],
    )


def test_an_exported_checkpoint_holds_its_weights_and_its_own_evaluation(trained: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        assert main(["export", str(trained), "--step", str(step), "-o", str(tmp_path / str(step))]) == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(step))
        saved = checkpoints.load(checkpoints.find(trained, step) or Path()).weights
        assert all(torch.equal(x, saved[name]) for name, x in model.named_parameters())
        assert f"trained for {step} of 2 steps" in (tmp_path / str(step) / "README.md").read_text()
    final = load_file(trained / "model" / "model.safetensors")
    exported = load_file(tmp_path / "2" / "model.safetensors")
    assert final.keys() == exported.keys() and all(torch.equal(final[name], exported[name]) for name in final)


def test_nothing_is_exported_over_what_is_there(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for command in (("export", str(trained)), ("merge", str(trained / "model"))):
        assert "exists already" in refused(capsys, *command, "-o", str(tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert "There are: 1, 2." in refused(capsys, "export", str(trained), "--step", "7", "-o", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_merged_adapter_is_one_plain_model_that_says_the_same(adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    assert main(["merge", str(adapter / "model"), "-o", str(tmp_path / "merged")]) == 0
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "student")
    ids_BT = torch.arange(12)[None]
    with torch.no_grad():
        before = base(ids_BT).logits
        wanted = PeftModel.from_pretrained(base, str(adapter / "model")).eval()(ids_BT).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids_BT).logits
    torch.testing.assert_close(merged, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wanted, before, atol=1e-3), "the adapter learned something"


def summary(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["results"]


def greedy_texts(folder: Path) -> list[str]:
    return [json.loads(line)["greedy"]["text"] for line in (folder / "items.jsonl").read_text().splitlines()[1:]]


def test_an_interrupted_evaluation_ends_with_the_same_numbers(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", str(trained / "model"), "--data", str(trained.parent / "data.jsonl"), "--grader", "exact"]
    asked += ["--num-samples", "3", "--max-new-tokens", "5"]
    assert main([*asked, "-o", str(tmp_path / "whole")]) == 0
    described = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("avg@3", "length"))]
    lines = (tmp_path / "whole" / "items.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "items.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert main([*asked, "-o", str(tmp_path / "cut")]) == 0
    assert described == [line for line in capsys.readouterr().out.splitlines() if line.startswith(("avg@3", "length"))]
    assert summary(tmp_path / "cut") == summary(tmp_path / "whole")
    assert (tmp_path / "cut" / "items.jsonl").read_bytes() == b"".join(lines)
    assert "3, now 2" in refused(capsys, *asked, "--num-samples", "2", "-o", str(tmp_path / "whole"))


def test_a_runs_own_evaluation_is_repeated_from_its_folder(trained: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in (trained / "records.jsonl").read_text().splitlines()]
    for step in (1, 2):
        assert main(["evaluate", str(trained), "--step", str(step), "-o", str(tmp_path / str(step))]) == 0
        assert summary(tmp_path / str(step)) == records[step]["evaluation"]
    assert main(["evaluate", str(trained), "-o", str(tmp_path / "final")]) == 0
    assert summary(tmp_path / "final") == summary(tmp_path / "2")


def test_an_adapter_is_evaluated_with_its_base(adapter: Path, tmp_path: Path) -> None:
    asked = ["--data", str(adapter.parent / "data.jsonl"), "--max-new-tokens", "4", "--num-samples", "1"]
    assert main(["evaluate", str(adapter / "model"), *asked, "-o", str(tmp_path / "adapter")]) == 0
    assert main(["merge", str(adapter / "model"), "-o", str(tmp_path / "merged")]) == 0
    assert main(["evaluate", str(tmp_path / "merged"), *asked, "-o", str(tmp_path / "plain")]) == 0
    assert greedy_texts(tmp_path / "adapter") == greedy_texts(tmp_path / "plain")


def test_scored_rollouts_have_the_log_probabilities_of_both_models(trained: Path, tmp_path: Path) -> None:
    row = {"id": "r", "prompt": {"id": "p", "token_ids": [5, 9]}, "token_ids": [5, 9, 7, 3]}
    row |= {"authors": [0, 0, 1, 1], "behavior_logprobs": [0.0] * 4}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    run = str(trained.parent / "run.toml")
    asked = ["score", run, str(tmp_path / "rollouts.jsonl"), "-o", str(tmp_path / "scored.jsonl")]
    assert main([*asked, "--grader", "None"]) == 0
    line = json.loads((tmp_path / "scored.jsonl").read_text())
    for whose in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(trained.parent / whose)
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([[5, 9, 7]])).logits[0].log_softmax(-1)
        wanted = [float(logprobs_TV[1, 7]), float(logprobs_TV[2, 3])]
        assert line[f"{whose}_logprobs"] == pytest.approx(wanted, abs=1e-4)


def test_users_errors_are_one_paragraph_and_start_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(write_run(world, tmp_path / "run", "quick"))
    for said, argv in {
        "needs the file of a run first": ["train"],
        "there is no file": ["train", str(tmp_path / "nothing.toml")],
        "has no column 'question'": ["train", run, "--data.prompt-column", "question"],
        "finds no letter A-J": ["train", run, "--grader", "multiple_choice"],
        "flags above are not understood": ["train", run, "--stepz", "3"],
        "give OWNER/NAME": ["train", run, "--push-to-hub", "mymodel"],
        "holds no run.toml": ["resume", str(tmp_path / "none")],
        "is no run's folder": ["evaluate", str(world / "student"), "--step", "3", "--data", str(world / "data.jsonl")],
        f"neither a run nor a model in {tmp_path}/runs: no such": ["evaluate", str(tmp_path / "runs")],
        "no such folder (did you mean 'student'?)": ["evaluate", str(world / "studnet")],
        "run.toml is a file. Give the folder": ["evaluate", run],
        "a model of the hub brings no held-out data": ["evaluate", "nobody/nothing"],
        "there is nothing to evaluate on": ["evaluate", str(world / "student")],
        "a step to show is missing. Give --step N": ["inspect", str(tmp_path)],
        "no adapter_config.json": ["merge", str(world / "student"), "-o", str(tmp_path / "merged")],
        "line 1 of": ["score", run, str(world / "data.jsonl"), "-o", str(tmp_path / "scored.jsonl")],
    }.items():
        assert said in refused(capsys, *argv), argv
    assert not list(tmp_path.glob("run/*.toml")) and not list(tmp_path.glob("run/records*"))
    assert not any((tmp_path / name).exists() for name in ("merged", "scored.jsonl", "evaluations"))


def test_every_command_helps(capsys: pytest.CaptureFixture[str]) -> None:
    for command, word in {
        "train": "--push-to-hub",
        "resume": "--step",
        "evaluate": "--num-samples",
        "export": "--output",
        "merge": "--output",
        "inspect": "--worst",
        "doctor": "--strict",
        "score": "--output",
    }.items():
        assert main([command, "--help"]) == 0
        assert word in capsys.readouterr().out, command


def test_a_process_of_its_own_refuses_without_a_traceback(world: Path, tmp_path: Path) -> None:
    run = write_run(world, tmp_path / "run", "quick", teacher={"path": str(world / "missing")})
    done = subprocess.run(
        [sys.executable, "-m", "tropd", "train", str(run)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "teacher.path is" in done.stderr and "there is no such folder" in done.stderr
