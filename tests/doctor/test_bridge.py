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


def test_a_bridge_without_a_tokenizer_on_its_other_side_is_refused(tmp_path: Path) -> None:
    run = bridged(world_of(tmp_path, "characters"), teacher={"path": "base"}, student={"lora": {"rank": 2}})
    (found,) = [check for check in examine(run, num_prompts=0) if check.name == "bridge"]
    assert found.level == "error" and "reads the student's tokens" in str(found)
