"""What went wrong elsewhere and has no proof next to the piece it concerns; `docs/defects.md` lists all of it."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.cases import plain
from tests.one_step import judge, parts_of, step_of, write
from tests.small_runs import TROPD, run_of, write_models
from tests.tiny import VOCAB, tiny_model
from tropd.config.run import Run
from tropd.errors import ConfigError, EvidenceError, TeacherError
from tropd.methods import METHODS, ManyFaces
from tropd.monitoring.records import read_records
from tropd.objective.evidence import Needs, Tokens
from tropd.rollout.scripted import ScriptedEngine
from tropd.run.start import train
from tropd.teachers.local import LocalTeacher
from tropd.teachers.teacher import ScoreRequest
from tropd.teachers.texts import CachedTexts
from tropd.training.asked import check_evidence
from tropd.training.batches import add_scores
from tropd.types import Author, Request

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "defects.md"
ROWS = {*range(1, 33), 34, *range(36, 40), 42, 44, 45, 46, 49, 52}


def rows_of_the_page() -> dict[int, list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {int(row[0]): row[1:] for row in cells}


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_defect_has_an_address_and_a_proof_that_exists() -> None:
    rows = rows_of_the_page()
    assert set(rows) == ROWS
    for number, (wrong, does, shown) in rows.items():
        assert re.search(r"https://github\.com/\S+/\d+", wrong), number
        assert len(does) > 20, number
        cited = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", shown)
        assert cited or "nothing yet" in shown.lower(), number
        for file, name in cited:
            assert name.startswith("test_") and name in names_in(ROOT / file), f"row {number}: {file}::{name}"


def test_what_is_known_before_the_gradient_pass_carries_no_gradient(tmp_path: Path) -> None:
    for method in (TROPD, {"name": "tip"}, {"name": "many_faces"}):
        parts = parts_of(write_models(tmp_path / method["name"]), method)
        batch = judge(parts, write(parts))
        found = [
            getattr(batch.tokens, f.name) for f in dataclasses.fields(Tokens) if batch.tokens.peek(f.name) is not None
        ]
        tensors = [x for x in found if isinstance(x, Tensor)]
        assert len(tensors) > 8 and not any(x.requires_grad for x in tensors)
        step_of(parts)
        assert all(p.grad is None and not p.requires_grad for p in parts.teacher.forward.model.parameters())


def test_what_a_teacher_cannot_give_is_refused_before_the_first_step_and_never_approximated(tmp_path: Path) -> None:
    class SampledOnly(LocalTeacher):
        capabilities = Needs.SAMPLED

    teacher = SampledOnly(tiny_model(seed=1), vocab_size=VOCAB)
    with pytest.raises(EvidenceError, match=r"'many_faces' needs STUDENT_TOPK from the teacher, which offers SAMPLED"):
        check_evidence(ManyFaces().objective, teacher, "many_faces", grader=False)
    check_evidence(METHODS["opd"]().objective, teacher, "opd", grader=False)


def test_scores_of_other_tokens_than_the_rollouts_are_refused(tmp_path: Path) -> None:
    parts = parts_of(write_models(tmp_path))
    rollouts = write(parts)
    batch = judge(parts, rollouts)
    scores = parts.teacher.score(ScoreRequest(rollouts))
    short = dataclasses.replace(scores[0], logprobs_T=scores[0].logprobs_T[1:])
    with pytest.raises(TeacherError, match=r"has \d+ response tokens, but teacher 'default' scored \d+"):
        add_scores(batch.tokens, rollouts, [short, *scores[1:]])
    with pytest.raises(TeacherError, match="given 6 rollouts and scored 5"):
        add_scores(batch.tokens, rollouts, scores[1:])


def test_tokens_that_no_text_gives_back_are_scored_as_they_were_written(tmp_path: Path) -> None:
    parts = parts_of(write_models(tmp_path), {"name": "opd"})
    rollouts = write(parts)
    again = [parts.tokenizer.encode(parts.tokenizer.decode(r.response_ids)) for r in rollouts]
    assert any(tuple(ids) != r.response_ids for ids, r in zip(again, rollouts, strict=True))
    with torch.no_grad():
        full_NV = plain(parts.teacher.forward.model, rollouts)
    batch = judge(parts, rollouts)
    by_hand_N = full_NV.gather(1, batch.tokens.token_ids_N[:, None])[:, 0]
    torch.testing.assert_close(batch.tokens.teacher_logprobs_N, by_hand_N, rtol=1e-4, atol=1e-5)


def test_placeholder_logprobs_of_what_the_student_did_not_write_reach_nothing(tmp_path: Path) -> None:
    folder = write_models(tmp_path)
    parts = parts_of(folder)
    rollouts = write(parts)
    assert any(Author.TEACHER in r.authors for r in rollouts)
    absurd = [
        dataclasses.replace(
            r,
            behavior_logprobs=tuple(
                x if a == Author.STUDENT else -50.0 for x, a in zip(r.behavior_logprobs, r.authors, strict=True)
            ),
        )
        for r in rollouts
    ]
    one, other = step_of(parts, rollouts), step_of(parts_of(folder), absurd)
    assert one.sums.loss == other.sums.loss
    assert all(torch.equal(g, other.gradients[name]) for name, g in one.gradients.items())


def test_a_column_that_no_teacher_would_read_is_no_knob(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[student]\npath = "x"\n[data]\npath = "y"\nprivileged_column = "answer"\n')
    with pytest.raises(ConfigError, match=r"privileged_column"):
        Run.load(tmp_path / "run.toml")


def test_the_temperature_of_rollouts_is_not_that_of_the_teacher(tmp_path: Path) -> None:
    folder = write_models(tmp_path)
    parts = parts_of(folder, {"name": "opd"}, rollout={"sampling": {"temperature": 0.5}})
    rollouts = write(parts)
    assert all(r.behavior_logprobs != r.model_logprobs for r in rollouts)
    warm = judge(parts, rollouts).tokens
    neutral = judge(parts_of(folder, {"name": "opd"}), rollouts).tokens
    assert torch.equal(warm.teacher_logprobs_N, neutral.teacher_logprobs_N)
    said = parts_of(folder, rollout={"sampling": {"temperature": 0.5}}).notes
    assert any("TrOPD's trust is a statement about tokens drawn from the student itself" in note for note in said)


def short_teacher() -> Any:
    """Reads 20 tokens, where the student reads 256."""
    model = tiny_model(seed=1, tied=True)
    model.config.max_position_embeddings = 20
    return model


def test_prompts_leave_room_in_the_context_of_the_teacher_too(tmp_path: Path) -> None:
    folder = write_models(tmp_path, teacher=short_teacher())
    parts = parts_of(folder, rollout={"max_new_tokens": 10})
    assert any("too long" in note for note in parts.notes)
    rollouts = write(parts)
    assert max(len(r.token_ids) for r in rollouts) <= 20
    assert len(judge(parts, rollouts).tokens) == sum(len(r.response_ids) for r in rollouts)
    with pytest.raises(ConfigError, match="max_new_tokens = 20 leaves no room for a prompt in a context of 20"):
        parts_of(folder, rollout={"max_new_tokens": 20})


def test_a_teachers_text_is_written_once_and_kept_on_disk(tmp_path: Path) -> None:
    requests = [Request(token_ids=(1, 2), max_new_tokens=4, seed=seed, stop_ids=(9,)) for seed in (1, 2, 1)]
    first = ScriptedEngine(lambda request: [3, request.seed], logprob=-0.125)
    cached = CachedTexts(first, tmp_path / "texts.sqlite", "a teacher")
    written = cached.generate(requests)
    assert [c.token_ids for c in written] == [(3, 1, 9), (3, 2, 9), (3, 1, 9)]
    assert len(first.requests) == 2
    cached.close()
    closed = ScriptedEngine(lambda request: [])
    closed.close()  # refuses whatever it is asked
    assert CachedTexts(closed, tmp_path / "texts.sqlite", "a teacher").generate(requests) == written
    other = ScriptedEngine(lambda request: [4])
    assert CachedTexts(other, tmp_path / "texts.sqlite", "another").generate(requests[:1])[0].token_ids == (4, 9)


def test_a_teacher_with_padded_rows_trains_a_student_without(tmp_path: Path) -> None:
    folder = write_models(tmp_path, teacher=tiny_model(seed=1, tied=True, vocab=VOCAB + 58))
    parts = parts_of(folder, TROPD | {"top_k": 64})
    batch = judge(parts, write(parts))
    assert int(batch.tokens.teacher_topk_ids_NK.max()) < VOCAB
    for score in parts.teacher.score(ScoreRequest(batch.rollouts, Needs.FULL)):
        assert score.full_logprobs_TV is not None and score.full_logprobs_TV.shape[1] == VOCAB
        torch.testing.assert_close(score.full_logprobs_TV.exp().sum(-1), torch.ones(len(score.logprobs_T)))
    records = read_records(train(run_of(folder, steps=1)) / "records.jsonl").steps
    assert records[0].gradient_norm > 0
