"""The doctor looks across a bridge between tokenizers, on the user's own prompts."""

from pathlib import Path

import pytest

from tests.bridge.test_bridged import bridged, world_of
from tests.small_runs import write_rows
from tropd.doctor import examine


@pytest.mark.parametrize("kind", ["unigram", "characters"])
def test_what_crosses_a_bridge_is_shown(tmp_path: Path, kind: str) -> None:
    world = world_of(tmp_path, kind)
    write_rows(world / "data.jsonl", [{"prompt": f"{'fox dog '[: 4 + n]}=", "answer": "1"} for n in range(4)])
    checks = examine(bridged(world), num_prompts=2, max_new_tokens=4)
    assert not [check for check in checks if check.level == "error"]
    said = " ".join(str(check) for check in checks if check.name == "bridge")
    assert "'<|end|>' (258) is '<|end|>' (2)" in said and "nothing for '<|pad|>' (256)" in said
    assert "the end of a turn is '<|end|>' (2)" in said and "100% of them are taught" in said
    (told,) = [check for check in checks if check.name == "briefing"]
    assert "the same in its own tokens" in str(told)


def test_text_that_a_teacher_cannot_write_is_shown(tmp_path: Path) -> None:
    world = world_of(tmp_path, "characters")
    write_rows(world / "data.jsonl", [{"prompt": "fox ⅷ fox", "answer": "1"}])
    said = [str(check) for check in examine(bridged(world), num_prompts=0) if check.name == "bridge"]
    assert any("'fox ⅷ fox' becomes 'fox <unk>" in text for text in said)


def test_what_a_reader_gets_across_its_bridge_is_shown(tmp_path: Path) -> None:
    world = world_of(tmp_path, "characters")
    readers = {"second": {"path": str(world / "other"), "bridge": {"longest": 2}}, "told": {"path": "teacher"}}
    checks = examine(bridged(world, readers=readers), num_prompts=0)
    (special, chunks) = [str(check) for check in checks if check.name == "readers.second.bridge"]
    assert "readers.second.bridge.special" in special and "stand against one" in chunks
    briefed = [str(check) for check in checks if check.name == "briefing"]
    assert len(briefed) == 3 and all("the same in its own tokens" in text for text in briefed)


def test_the_doctor_refuses_a_method_whose_evidence_does_not_cross(tmp_path: Path) -> None:
    run = bridged(world_of(tmp_path, "characters"), method={"name": "tropd", "guidance": False})
    assert any(check.level == "error" and "needs TOPK" in str(check) for check in examine(run, num_prompts=0))


def test_a_sample_of_which_a_teacher_reads_nothing_is_no_crash(tmp_path: Path) -> None:
    run = bridged(world_of(tmp_path, "characters"), rollout={"max_new_tokens": 1, "num_rollouts": 1})
    checks = {check.name: check for check in examine(run, num_prompts=1, max_new_tokens=1)}
    assert "says nothing of what the student wrote" in str(checks["teacher"]) and "agreement" not in checks
