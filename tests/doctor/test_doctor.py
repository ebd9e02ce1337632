"""Each way in which a run goes wrong is found before it does, named, and told apart from the others."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from tests.doctor import cases
from tests.small_runs import run_of, save_model, write_models, write_rows, write_run
from tests.tiny import byte_tokenizer, tiny_model
from tropd.config.run import Run
from tropd.doctor import Check, examine, quick_checks
from tropd.doctor.cost import need_of
from tropd.doctor.subject import read_subject
from tropd.errors import ConfigError
from tropd.run.start import assemble


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("world"))
    save_model(folder / "student", seed=0, sharp=12.0)
    cases.perturb(folder / "student", folder / "teacher", noise=0.05)
    return folder


def named(checks: list[Check], name: str) -> list[Check]:
    found = [check for check in checks if check.name == name]
    assert found, f"no check {name!r} among {[check.name for check in checks]}"
    return found


def one(checks: list[Check], name: str) -> Check:
    return named(checks, name)[0]


def levels(checks: list[Check]) -> dict[str, list[str]]:
    return {level: [c.name for c in checks if c.level == level] for level in ("warning", "error")}


def read(run: Run) -> list[Check]:
    """What is found without any weights."""
    return examine(run, num_prompts=0)


def test_a_healthy_run_gets_no_error_and_nothing_is_written(world: Path, tmp_path: Path) -> None:
    before = sorted(world.rglob("*"))
    checks = examine(run_of(world), num_prompts=6, max_new_tokens=10)
    assert levels(checks)["error"] == []
    assert sorted(world.rglob("*")) == before and list(tmp_path.iterdir()) == []
    assert one(checks, "sampler").level == "ok" and one(checks, "one step").level == "ok"
    assert one(checks, "agreement").level == "ok"


def test_a_teacher_with_other_tokens_is_named_and_the_rest_is_looked_at_all_the_same(
    world: Path, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["hello"])
    other = byte_tokenizer()
    other.add_tokens(["goodbye"])
    student = save_model(tmp_path / "student", tokenizer=tokenizer, vocab=263)
    teacher = save_model(tmp_path / "teacher", tokenizer=other, vocab=263)
    run = run_of(world, student={"path": str(student)}, teacher={"path": str(teacher)})
    checks = read(run)
    assert one(checks, "tokenizers").level == "error"
    assert "'hello' is 262 for the student" in one(checks, "tokenizers").found
    assert one(checks, "grader").level == "ok" and one(checks, "lengths").level == "ok"


def test_padded_rows_are_cut_and_missing_rows_are_warned_of(world: Path, tmp_path: Path) -> None:
    padded = save_model(tmp_path / "padded", vocab=272)
    checks = read(run_of(world, teacher={"path": str(padded)}))
    assert one(checks, "vocabulary").level == "ok"
    assert "the teacher has 272 rows; both are cut to the 262" in one(checks, "vocabulary").found
    short = save_model(tmp_path / "short", vocab=250)
    checks = read(run_of(world, teacher={"path": str(short)}))
    assert one(checks, "vocabulary").level == "warning"


def test_other_stop_tokens_are_named(world: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = None
    teacher = save_model(tmp_path / "teacher", tokenizer=tokenizer)
    found = one(read(run_of(world, teacher={"path": str(teacher)})), "stop tokens")
    assert found.level == "warning" and "The teacher never ends with '<|eos|>' (257)" in found.found


def test_the_same_set_of_stop_tokens_with_another_eos_is_still_warned_of(world: Path, tmp_path: Path) -> None:
    """A base student whose template knows the instruct teacher's end of turn: lengths explode all the same."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|end|>"
    model = tiny_model()
    model.generation_config.eos_token_id = [258, 257]
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    found = one(read(run_of(world, teacher={"path": str(tmp_path / "teacher")})), "stop tokens")
    assert found.level == "warning" and "Their eos tokens are '<|eos|>' (257) and '<|end|>' (258)" in found.found


def test_a_stop_token_that_the_teacher_never_writes_is_measured(world: Path, tmp_path: Path) -> None:
    student = cases.save_leaning(tmp_path / "student", {"<|eos|>": 5.0})
    stubborn = cases.save_leaning(tmp_path / "stubborn", {"<|eos|>": -20.0, "<|end|>": 5.0})
    agreeing = cases.save_leaning(tmp_path / "agreeing", {"<|eos|>": 4.0})
    found = {}
    for teacher in (stubborn, agreeing):
        run = run_of(world, student={"path": str(student)}, teacher={"path": str(teacher)})
        found[teacher.name] = one(examine(run, num_prompts=6, max_new_tokens=12), "ends")
    assert found["stubborn"].level == "error" and "of the token that ended them is -2" in found["stubborn"].found
    assert found["agreeing"].level == "ok"


def test_a_teacher_that_knows_nothing_is_an_error(world: Path, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher", sharp=0.0)
    checks = examine(run_of(world, teacher={"path": str(teacher)}), max_new_tokens=8)
    assert one(checks, "teacher").level == "error"
    assert f"{-math.log(262):.2f}" in one(checks, "teacher").found


def test_a_student_that_is_its_teacher_learns_nothing_and_is_told_so(world: Path, tmp_path: Path) -> None:
    run = run_of(world, teacher={"path": str(world / "student")})
    checks = examine(run, max_new_tokens=8)
    assert one(checks, "agreement").level == "error"
    assert "already is its teacher" in one(checks, "agreement").found
    notes = assemble(run, tmp_path / "texts").notes
    assert any("same weights" in note for note in notes)


def test_a_new_adapter_can_learn_from_texts_beside_its_own_base(world: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}+1=", "answer": str(a + 1), "worked": f"1,2,{a + 1}"} for a in range(4)]
    data = {"path": str(write_rows(tmp_path / "worked.jsonl", rows)), "response_column": "worked"}
    student = {"path": str(world / "student"), "lora": {"rank": 2}}
    method = {"name": "tropd", "top_k": 8, "prefix": {"shape": "constant", "start": 1.0}}
    run = run_of(world, student=student, teacher={"path": "base"}, data=data, method=method)
    checks = examine(run, max_new_tokens=8)
    assert one(checks, "agreement").level == "ok" and "texts of the data set" in one(checks, "agreement").found
    assert one(checks, "one step").level == "ok" and "guidance" in one(checks, "one step").found
    fading = {**method, "prefix": {"shape": "cosine", "start": 1.0, "end": 0.0}}
    run = run_of(world, student=student, teacher={"path": "base"}, data=data, method=fading)
    found = one(examine(run, max_new_tokens=8), "one step")
    assert found.level == "ok" and "a new adapter and its base agree" in found.found


def test_a_new_adapter_cannot_learn_from_its_own_base(world: Path, tmp_path: Path) -> None:
    student = {"path": str(world / "student"), "lora": {"rank": 2, "dropout": 0.1}}
    checks = examine(run_of(world, student=student, teacher={"path": "base"}), max_new_tokens=8)
    assert one(checks, "agreement").level == "error" and "set teacher.path" in one(checks, "agreement").advice
    assert one(checks, "dropout").level == "warning"


def test_models_that_want_different_things_are_warned_of(world: Path, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher", seed=5, sharp=16.0)
    checks = examine(run_of(world, teacher={"path": str(teacher)}), max_new_tokens=8)
    assert one(checks, "agreement").level == "warning"


def test_chat_templates_are_compared_by_what_they_write(world: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = "{# another comment #}" + tokenizer.chat_template
    save_model(tmp_path / "same", tokenizer=tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|{{ m['role'] }}|>", "<|{{ m['role'] }}|>\n")
    save_model(tmp_path / "other", tokenizer=tokenizer)
    same, other = (
        one(
            read(run_of(world, teacher={"path": str(tmp_path / name)})),
            "chat template",
        )
        for name in ("same", "other")
    )
    assert same.level == "ok"
    assert other.level == "warning" and "from character 8 on" in other.found


def test_a_missing_column_is_one_finding_among_others(world: Path, tmp_path: Path) -> None:
    data = {"path": str(world / "data.jsonl"), "prompt_column": "question"}
    checks = read(run_of(world, data=data))
    assert one(checks, "data").level == "error" and "'question'" in one(checks, "data").found
    assert one(checks, "tokenizers").level == "ok" and levels(checks)["error"] == ["data"]


def test_prompts_that_leave_no_room_are_counted(world: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "x" * length, "answer": "y"} for length in (1, 2, 245, 250)]
    data = {"path": str(write_rows(tmp_path / "long.jsonl", rows))}
    some = one(read(run_of(world, data=data)), "lengths")
    assert some.level == "warning" and some.found.startswith("2 of 4 prompts")
    rollout = {"max_new_tokens": 256}
    none = one(read(run_of(world, data=data, rollout=rollout)), "lengths")
    assert none.level == "error" and "no room for a prompt" in none.found


def test_a_grader_that_does_not_accept_the_answers_is_an_error_and_ones_own_a_warning(
    world: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": str(n), "answer": "the sea"} for n in range(3)]
    data = {"path": str(write_rows(tmp_path / "words.jsonl", rows))}
    found = {
        grader: one(read(run_of(world, data=data, grader=grader)), "grader")
        for grader in ("numeric", "exact", "tests.doctor.cases:grumpy", "tests.doctor.cases:broken")
    }
    assert [check.level for check in found.values()] == ["error", "ok", "warning", "error"]
    assert "RuntimeError: no internet" in found["tests.doctor.cases:broken"].found


def test_held_out_prompts_that_are_trained_on_are_counted(world: Path, tmp_path: Path) -> None:
    evaluation = {"data": {"path": str(world / "data.jsonl"), "limit": 4}}
    checks = named(read(run_of(world, evaluation=evaluation)), "held-out data")
    assert [check.found.split(":")[0] for check in checks if check.level == "warning"] == [
        "4 of 4 held-out prompts are also trained on"
    ]


def test_settings_that_are_known_to_go_wrong_are_warned_of(world: Path, tmp_path: Path) -> None:
    run = run_of(
        world,
        method={"name": "tropd", "top_k": 400},
        rollout={"max_new_tokens": 12, "sampling": {"temperature": 0.5}},
        student={"path": str(world / "student"), "dtype": "float16"},
    )
    found = levels(read(run))
    assert found == {"warning": ["top_k", "precision", "guidance", "method"], "error": []}


def test_a_method_that_reads_rewards_needs_a_grader(world: Path, tmp_path: Path) -> None:
    from tropd.methods import METHODS
    from tropd.objective.evidence import Needs

    rewarded = [name for name, cls in METHODS.items() if Needs.REWARD in cls().needs]
    run = dataclasses.replace(run_of(world), grader=None)
    for name in rewarded:
        assert one(read(dataclasses.replace(run, method=METHODS[name]())), "method").level == "error"  # type: ignore[arg-type]
    assert one(read(run), "method").level == "ok"


def test_memory_is_counted_on_models_without_storage(world: Path, tmp_path: Path) -> None:
    whole, checks = read_subject(run_of(world))
    lora = {"path": str(world / "student"), "dtype": "bfloat16", "lora": {"rank": 2}}
    small, _ = read_subject(run_of(world, student=lora))
    assert whole is not None and small is not None and levels(checks)["error"] == []
    number = sum(p.numel() for p in tiny_model(tied=True).parameters())
    need = need_of(whole)
    assert (need.student, need.teacher, need.gradients, need.moments, need.masters) == (
        4 * number,
        4 * number,
        4 * number,
        8 * number,
        0,
    )
    adapter = need_of(small)
    assert 2 * number < adapter.student < 4 * number and adapter.masters == 2 * adapter.gradients < need.gradients


def test_quick_checks_leave_the_prompts_where_they_are(world: Path, tmp_path: Path) -> None:
    parts = assemble(run_of(world), tmp_path / "texts")
    parts.stream.next(3)
    before, random = parts.stream.state_dict(), torch.get_rng_state()
    assert quick_checks(parts) == []
    assert parts.stream.state_dict() == before and torch.equal(torch.get_rng_state(), random)


def test_a_run_whose_grader_rejects_every_answer_does_not_start(world: Path, tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "answer": "the sea"} for n in range(3)]
    data = {"path": str(write_rows(tmp_path / "words.jsonl", rows))}
    with pytest.raises(ConfigError, match="grader: grader 'numeric' finds no number"):
        assemble(run_of(world, data=data, grader="numeric"), tmp_path / "texts")


def test_the_command_counts_levels_into_its_exit_code(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tropd.cli.main import main

    good = str(write_run(world, tmp_path / "good", "quick"))
    short = str(write_run(world, tmp_path / "short", "quick", method={"name": "tropd", "top_k": 8}))
    bad = tmp_path / "bad.toml"
    bad.write_text("stepz = 3\n")
    codes = [
        main(["doctor", *arguments, "--sample-prompts", "0"])
        for arguments in ([good, "--strict"], [short], [short, "--strict"], [good, "--strict", "--method.top-k", "999"])
    ]
    assert codes == [0, 0, 1, 1]
    capsys.readouterr()
    assert main(["doctor", str(bad), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["exit_code"] == 2 and "unknown key 'stepz'" in said["checks"][0]["found"]
