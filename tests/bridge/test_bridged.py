"""A teacher with another tokenizer, from the run file to the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bridge.kinds import tokenizer_of
from tests.small_runs import run_of, save_model
from tests.tiny import tiny_model
from tests.told import COLUMN, told, write_world
from tropd.errors import EvidenceError, TropdError, VocabularyError
from tropd.objective.heard import as_heard
from tropd.run.start import assemble as load_parts
from tropd.run.start import resume, train
from tropd.teachers.teacher import ScoreRequest
from tropd.training.scoring import score
from tropd.training.source import Source
from tropd.types import READER, Author, Finish, Rollout


def scored(parts):
    rollouts = Source(parts).take(0).rollouts
    as_read = {READER: parts.briefer.as_read(READER, rollouts)}
    objective, learner = parts.run.method.objective, parts.learner
    return rollouts, score(rollouts, objective, parts.teacher, learner, seed=0, recall=True, as_read=as_read)


def world_of(folder: Path, kind: str) -> Path:
    write_world(folder)
    tokenizer = tokenizer_of(kind)
    save_model(folder / "other", tiny_model(vocab=len(tokenizer), seed=3), tokenizer)
    return folder


def bridged(world: Path, **changes):
    teacher = {"path": str(world / "other"), "bridge": {}, **changes.pop("teacher", {})}
    return run_of(world, changes.pop("method", {"name": "opd"}), kind="quick", teacher=teacher, **changes)


def test_one_tokenizer_on_both_sides_gives_the_log_probabilities_of_the_plain_path(tmp_path: Path) -> None:
    write_world(tmp_path)
    plain = load_parts(run_of(tmp_path, {"name": "opd"}, kind="quick"), tmp_path)
    path = {"path": str(tmp_path / "teacher"), "bridge": {"most_nats": float("inf")}}
    parts = load_parts(bridged(tmp_path, teacher=path), tmp_path)
    rollouts = [_saying(r, parts, "The fox, jumps 12+30!"[n:]) for n, r in enumerate(Source(parts).take(0).rollouts)]
    told = [x for x in parts.briefer.as_read(READER, rollouts) if x is not None]
    expected, found = plain.teacher.score(ScoreRequest(rollouts)), parts.teacher.score(ScoreRequest(told))
    for a, b in zip(expected, found, strict=True):
        assert b.read_T is not None and bool(b.read_T.all())
        torch.testing.assert_close(b.logprobs_T, a.logprobs_T, rtol=0, atol=2e-5)


def _saying(rollout: Rollout, parts: Any, text: str) -> Rollout:
    ids = (*parts.tokenizer.encode(text, add_special_tokens=False), parts.teacher.bridge.end)
    prompt = rollout.prompt.token_ids
    return replace(
        rollout,
        token_ids=prompt + ids,
        authors=(Author.CONTEXT,) * len(prompt) + (Author.STUDENT,) * len(ids),
        behavior_logprobs=(0.0,) * len(prompt) + (-1.5,) * len(ids),
        model_logprobs=(),
        finish=Finish.STOP,
    )


@pytest.mark.parametrize("kind", ["smaller byte-level", "unigram", "wordpiece", "characters"])
def test_a_teacher_with_any_tokenizer_trains_and_resumes_to_the_bit(tmp_path: Path, kind: str) -> None:
    world = world_of(tmp_path, kind)
    whole = train(bridged(world, output=str(tmp_path / "whole"), checkpoint={"every": 1}))
    part = bridged(world, output=str(tmp_path / "part"), checkpoint={"every": 1}, steps=1)
    resume(train(part), steps=2)
    a, b = ((folder / "model" / "model.safetensors").read_bytes() for folder in (whole, tmp_path / "part"))
    assert a == b


def test_what_no_chunk_brings_back_counts_nowhere(tmp_path: Path) -> None:
    world = world_of(tmp_path, "characters")
    _, batch = scored(load_parts(bridged(world), tmp_path))
    tokens = batch.tokens
    assert 0 < int(tokens.read_N.sum()) < len(tokens)
    heard = as_heard(tokens, [READER])
    assert bool((heard.authors_N[~tokens.read_N] == Author.ENVIRONMENT).all())
    assert heard.num_actions_S.tolist() == [
        int(tokens.read_N[tokens.sequences_N == s].sum()) for s in range(len(tokens.keys_S))
    ]


def test_the_end_of_a_turn_is_one_event(tmp_path: Path) -> None:
    """Both end a turn with <|end|>, at other ids: the last token is read as that."""
    world = world_of(tmp_path, "characters")
    parts: Any = load_parts(bridged(world), tmp_path)
    bridge = parts.teacher.bridge
    text = parts.tokenizer.encode("dog", add_special_tokens=False)
    found = bridge.translate([*text, parts.tokenizer.convert_tokens_to_ids("<|end|>")], [], True)
    assert found.token_ids[-1] == bridge.end == bridge.teacher.convert_tokens_to_ids("<|end|>")
    assert found.read[-1].student == (3, 4) and found.read[-1].is_single


def test_a_bridge_stands_briefings_and_several_teachers(tmp_path: Path) -> None:
    world = world_of(tmp_path, "unigram")
    run = told(world, COLUMN, teacher="other", teacher_section={"bridge": {}})
    parts: Any = load_parts(run, tmp_path)
    prompt, _ = parts.stream.next(1)[0]
    said = parts.teacher.tokenizer.decode(list(prompt.told[READER]))
    assert "after" in said and "assistant" in said
    train(run)


def test_what_a_bridge_cannot_do_is_told(tmp_path: Path) -> None:
    world = world_of(tmp_path, "characters")
    with pytest.raises(VocabularyError, match=r"section \[teacher.bridge\]"):
        load_parts(bridged(world, teacher={"bridge": None, "path": str(world / "other")}), tmp_path)
    with pytest.raises(EvidenceError, match="TOPK"):
        load_parts(bridged(world, method={"name": "tropd", "guidance": False}), tmp_path)
    with pytest.raises(VocabularyError, match="is no special token of the teacher"):
        load_parts(bridged(world, teacher={"bridge": {"special": {"<|end|>": "<|none|>"}}}), tmp_path)
    tokenizer = tokenizer_of("characters")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    save_model(world / "bare", tiny_model(vocab=len(tokenizer), seed=3), tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(TropdError, match="without a chat template"):
        load_parts(bridged(world, teacher={"path": str(world / "bare")}), tmp_path)


def test_tropd_with_clipped_outliers_trains_across_a_bridge(tmp_path: Path) -> None:
    world = world_of(tmp_path, "smaller byte-level")
    for outlier in ("clip", "mask"):
        method = {"name": "tropd", "outlier": outlier, "beta": 1.0, "prefix": {"start": 0.5}}
        train(bridged(world, method=method, output=str(tmp_path / outlier)))


def test_a_name_of_a_special_token_in_a_text_is_text(tmp_path: Path) -> None:
    """The student writes "<|end|>" letter by letter: the teacher reads letters, not the end of a turn."""
    parts = load_parts(bridged(world_of(tmp_path, "smaller byte-level")), tmp_path)
    bridge = parts.teacher.bridge
    own = [*parts.tokenizer.convert_tokens_to_ids(["<", "|", "e", "n", "d", "|", ">"])]
    found = bridge.translate(own, parts.stream.next(1)[0][0].told[READER], False)
    assert bridge.end not in found.token_ids
    assert bridge.teacher.decode(found.token_ids) == "<|end|>"


def test_another_stop_token_than_the_end_of_a_turn_keeps_its_name(tmp_path: Path) -> None:
    parts = load_parts(bridged(world_of(tmp_path, "characters")), tmp_path)
    bridge, own = parts.teacher.bridge, parts.tokenizer
    ended = [bridge.translate([own.convert_tokens_to_ids(x)], [], True).token_ids for x in ("<|eos|>", "<|end|>")]
    assert [bridge.teacher.convert_ids_to_tokens(list(ids)) for ids in ended] == [["<|eos|>"], ["<|end|>"]]


def test_a_piece_that_teacher_and_student_wrote_together_is_not_read(tmp_path: Path) -> None:
    parts = load_parts(bridged(world_of(tmp_path, "smaller byte-level")), tmp_path)
    (rollout, *_) = Source(parts).take(0).rollouts
    saying = _saying(rollout, parts, "The quick")
    start = len(saying.prompt.token_ids)
    authors = list(saying.authors)
    authors[start] = Author.TEACHER  # "The" is one token of the teacher
    (told,) = parts.briefer.as_read(READER, [replace(saying, authors=tuple(authors))])
    (score,) = parts.teacher.score(ScoreRequest([told]))
    whole = parts.teacher.score(ScoreRequest(parts.briefer.as_read(READER, [saying])))[0]
    assert bool(whole.read_T[:3].all()) and not bool(score.read_T[0])
