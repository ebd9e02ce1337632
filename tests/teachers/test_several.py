"""A run file with several teachers: each prompt has its own, from prefixes to alarms, and none by mistake."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.one_step import parts_of, step_of, write
from tests.servers.mini import MiniServer
from tests.small_runs import TROPD, run_of, save_model, write_models
from tests.tiny import byte_tokenizer, tiny_model
from tropd.config.run import Run
from tropd.doctor import examine
from tropd.errors import ConfigError, DataError, EvidenceError, TeacherError, TropdError, VocabularyError
from tropd.planning.devices import DEVICES
from tropd.planning.forecast import make_forecast
from tropd.report.contents import charts_of
from tropd.report.history import read_history
from tropd.rollout.transformers import TransformersEngine
from tropd.run.start import resume, train
from tropd.teachers.local import LocalTeacher
from tropd.teachers.teacher import ScoreRequest
from tropd.types import Author, Request, key_of

QUICK = {"deadline_seconds": 1.5, "answer_seconds": 5.0}
SERVED = {"score_cache": True, "server": QUICK}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums for one teacher, products for another."""
    folder = write_models(tmp_path_factory.mktemp("world"))
    save_model(folder / "other", tiny_model("qwen3", seed=2, tied=True, sharp=4.0))
    rows = [
        {"id": f"{a}{sign}{b}", "prompt": f"{a}{sign}{b}=", "answer": "0", "kind": kind}
        for a in range(4)
        for b in range(2)
        for sign, kind in (("+", "sums"), ("*", "products/all"))
    ]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def several(world: Path, teachers: Mapping[str, Mapping[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    teachers = teachers or {"sums": {}, "products/all": {"path": str(world / "other")}}
    named = {name: {"path": str(world / "teacher"), **own} for name, own in teachers.items()}
    column = {"teacher_column": "kind", **changes.pop("data", {})}
    return {"teacher": {"path": "base"}, "teachers": named, "data": column, **changes}


def names(world: Path) -> dict[str, Path]:
    return {"sums": world / "teacher", "products/all": world / "other"}


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("method", [TROPD, {"name": "gkd"}, {"name": "entropy_opd"}], ids=lambda method: method["name"])
def test_two_teachers_with_the_same_weights_are_one(world: Path, method: dict[str, Any]) -> None:
    named = {"id_column": "id"}  # names decide the order of prompts and every draw
    one = step_of(parts_of(world, method, data=named))
    both = step_of(parts_of(world, method, **several(world, {"sums": {}, "products/all": {}}, data=named)))
    assert [r.token_ids for r in one.rollouts] == [r.token_ids for r in both.rollouts]
    assert both.sums.loss == pytest.approx(one.sums.loss, rel=1e-5)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(both.gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_each_prompt_is_judged_by_its_own_teacher_and_continues_its_prefix(world: Path) -> None:
    parts = parts_of(world, **several(world, rollout={"num_prompts": 8}))
    found = step_of(parts)
    rows = found.batch.tokens.teacher_logprobs_N.split([len(r.response_ids) for r in found.rollouts])
    alone = {name: _teacher(path, parts.vocab_size) for name, path in names(world).items()}
    for rollout, logprobs_T in zip(found.rollouts, rows, strict=True):
        (score,) = alone[rollout.prompt.teacher].score(ScoreRequest([rollout]))
        torch.testing.assert_close(logprobs_T, score.logprobs_T, rtol=1e-4, atol=1e-5)
        other = next(teacher for name, teacher in alone.items() if name != rollout.prompt.teacher)
        (wrong,) = other.score(ScoreRequest([rollout]))
        assert (logprobs_T - wrong.logprobs_T).abs().max() > 0.1, "the other one would have said something else"
        model = alone[rollout.prompt.teacher].forward.model
        written = sum(author == Author.TEACHER for author in rollout.authors)
        request = Request(
            token_ids=rollout.prompt.token_ids,
            max_new_tokens=parts.run.rollout.max_new_tokens,
            seed=key_of(5, "teacher", rollout.prompt.id, 0),
            stop_ids=parts.stop_ids,
        )
        (text,) = TransformersEngine(model, vocab_size=parts.vocab_size).generate([request])
        assert written > 0 and rollout.response_ids[:written] == text.token_ids[:written]


def _teacher(path: Path, vocab_size: int) -> LocalTeacher:
    from transformers import AutoModelForCausalLM

    return LocalTeacher(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), vocab_size=vocab_size)


def test_a_run_goes_on_as_if_nothing_had_happened_and_tells_of_each_teacher(world: Path, tmp_path: Path) -> None:
    whole = train(run_of(world, output=str(tmp_path / "whole"), **several(world, steps=4)))
    half = train(run_of(world, output=str(tmp_path / "half"), **several(world, steps=4)))
    last = sorted((half / "checkpoints").iterdir())[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    resume(half)
    for a, b in zip(records(whole), records(half), strict=True):
        assert a["loss"] == b["loss"] and a["gradient_norm"] == b["gradient_norm"]
        total = a["probes"]["length/mean"]
        told = {n: a["probes"].get(f"teachers/{n}/length/mean") for n in names(world)}
        known = [x for x in told.values() if x is not None]
        assert known and min(known) <= total <= max(known)
    (chart,) = [chart for chart in charts_of([read_history(whole)]) if chart["id"] == "teachers"]
    assert {line["label"] for line in chart["lines"]} == set(names(world))
    facts = json.loads((whole / "records.jsonl").read_text().splitlines()[0])
    assert "sums: " in json.dumps(facts) and "products/all: " in json.dumps(facts)


def test_one_of_them_on_a_server_is_both_in_this_process(world: Path, tmp_path: Path) -> None:
    local = train(run_of(world, output=str(tmp_path / "local"), **several(world, steps=2)))
    with MiniServer(world / "other") as server:
        mixed = {"sums": {}, "products/all": {"path": str(world / "other"), "servers": [server.url], **SERVED}}
        far = train(run_of(world, output=str(tmp_path / "far"), **several(world, mixed, steps=2)))
        asked = [byte_tokenizer().decode(text) for r in server.requests for text in _texts(r.get("prompt"))]
    for a, b in zip(records(local), records(far), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["tokens"] == b["tokens"]
    kept = pq.read_table(next((far / "rollouts").glob("*.parquet"))).to_pylist()
    assert kept and (far / "teacher_canary.products%2Fall.json").exists()
    users = [text for text in asked if text.startswith("<|user|>")]
    assert users and all("*" in text for text in users), "no sum ever left this process"


def _texts(prompt: Any) -> list[list[int]]:
    if not isinstance(prompt, list):
        return []
    return prompt if isinstance(prompt[0], list) else [prompt]


def test_the_base_may_be_one_of_them(world: Path) -> None:
    teachers = {"sums": {"path": "base"}, "products/all": {"path": str(world / "other")}}
    lora = {"lora": {"rank": 4, "alpha": 8}}
    found = step_of(parts_of(world, {"name": "opd"}, **several(world, teachers, student=lora)))
    for rollout, x_T in zip(found.rollouts, _ratios(found), strict=True):
        own = rollout.prompt.teacher == "sums"
        assert (x_T.abs().max() < 1e-5) == own, "a new adapter changes nothing, so its base agrees with it"


def _ratios(found: Any) -> list[torch.Tensor]:
    return list(found.batch.tokens.log_ratio_N.split([len(r.response_ids) for r in found.rollouts]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"teacher_column": None}}, "nothing says which of them a prompt is for"),
        ({"teachers": {}}, r"only \[teacher\]. Give each a section"),
        ({"teacher": {"path": "somewhere"}}, r"\[teacher\] beside them, which no prompt would reach"),
        ({"parallel": {"teacher": "sharded"}}, "several teachers, which are asked different numbers"),
        ({"teachers": {"sums": {"path": "base"}}}, "teacher 'sums': teacher.path is \"base\""),
        ({"teachers": {"": {"path": "x"}}}, r'section \[teachers.""\], whose name is empty'),
        (
            {"teachers": {"a" * 101: {"path": "x"}}},
            "'aaaaaaaaaaaaaaaaaaaaaaaa'... has 101 characters, 101 in the names",
        ),
        ({"teachers": {"\u6570" * 23: {"path": "x"}}}, "has 23 characters, 207 in the names of files"),
        ({"teachers": {"sums": {"pth": "x"}}}, r"unknown key 'teachers.sums.pth'; did you mean 'path'"),
    ],
)
def test_what_cannot_be_several_teachers_is_refused(world: Path, changes: dict[str, Any], said: str) -> None:
    values = several(world)
    values |= {name: {**values.get(name, {}), **x} if name == "data" else x for name, x in changes.items()}
    values["data"] = {name: x for name, x in values["data"].items() if x is not None}
    with pytest.raises(ConfigError, match=said):
        run_of(world, **values)


def test_the_one_that_lacks_evidence_is_named(world: Path, tmp_path: Path) -> None:
    with MiniServer(world / "other") as server:
        mixed = {"sums": {}, "products/all": {"path": str(world / "other"), "servers": [server.url], "server": QUICK}}
        run = run_of(world, {"name": "gkd"}, output=str(tmp_path / "run"), **several(world, mixed))
        said = "needs FULL from every teacher, but 'products/all' offers SAMPLED and TOPK. Use another"
        with pytest.raises(EvidenceError, match=said):
            train(run)
        findings = {check.name: str(check) for check in examine(run, num_prompts=2, max_new_tokens=8)}
    assert said in findings["method"]


def test_a_teacher_whose_numbers_cannot_be_written_is_refused_in_words(world: Path, tmp_path: Path) -> None:
    with MiniServer(world / "other") as server:
        mixed = {"sums": {}, "products/all": {"path": str(world / "other"), "servers": [server.url], **SERVED}}
        run = run_of(world, output=str(tmp_path / "run"), **several(world, mixed))
        train(run)
        (canary := tmp_path / "run" / "teacher_canary.products%2Fall.json").unlink()
        canary.mkdir()
        with pytest.raises(TeacherError, match=r"teacher 'products/all': what .* cannot be kept in .*products%2Fall"):
            resume(tmp_path / "run", step=1)


def test_a_damaged_cache_of_scores_is_refused_with_a_cure_for_that_teacher(world: Path, tmp_path: Path) -> None:
    with MiniServer(world / "other") as server:
        mixed = {"sums": {}, "products/all": {"path": str(world / "other"), "servers": [server.url], **SERVED}}
        run = run_of(world, output=str(tmp_path / "run"), **several(world, mixed))
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "teacher_scores.products%2Fall.sqlite").write_bytes(b"garbage " * 1000)
        with pytest.raises(TeacherError, match=r"teacher 'products/all': .*score_cache = false in that teacher's sec"):
            train(run)


def test_prompts_without_a_teacher_and_strange_teachers_are_refused_by_name(world: Path, tmp_path: Path) -> None:
    alone = several(world, {"sums": {}})
    with pytest.raises(DataError, match=r"8 of 16 prompts are for teachers .*'products/all' \(8\)\. It has 'sums'"):
        train(run_of(world, output=str(tmp_path / "a"), **alone))
    assert [c.level for c in examine(run_of(world, **alone), num_prompts=0) if c.name == "teachers"] == ["error"]
    with pytest.raises(TropdError, match="8 of 16 prompts"):  # found among the first ones that are read
        train(run_of(world, output=str(tmp_path / "b"), **several(world, {"sums": {}}, data={"streaming": True})))
    strange = tmp_path / "strange"
    save_model(strange, tiny_model("qwen3", seed=2))
    tokens = json.loads((strange / "tokenizer.json").read_text())
    tokens["model"]["vocab"] = {t: (i + 1) % 200 if i < 200 else i for t, i in tokens["model"]["vocab"].items()}
    (strange / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(VocabularyError, match="teacher 'products/all': a teacher that reads the student's tokens"):
        run = run_of(world, **several(world, {"sums": {}, "products/all": {"path": str(strange)}}))
        train(run)


def test_a_teacher_that_knows_nothing_is_found_among_good_ones(world: Path, tmp_path: Path) -> None:
    empty = tiny_model("qwen3", seed=3)
    with torch.no_grad():
        for parameter in empty.get_output_embeddings().parameters():
            parameter.zero_()
    save_model(tmp_path / "empty", empty)
    values = several(world, {"sums": {}, "products/all": {"path": str(tmp_path / "empty")}}, method={"name": "opd"})
    run: Run = run_of(world, output=str(tmp_path / "run"), **values)
    with pytest.raises(TropdError, match="step 0: teacher 'products/all': the teacher knows nothing"):
        train(run)
    fresh = run_of(world, output=str(tmp_path / "fresh"), **values)
    levels = {check.name: check.level for check in examine(fresh, num_prompts=2, max_new_tokens=8)}
    assert levels["sums: teacher"] == "ok" and levels["products/all: teacher"] == "error"
    assert levels["sums: tokenizers"] == levels["products/all: tokenizers"] == "ok"


def test_a_plan_says_that_it_reckons_with_one(world: Path) -> None:
    with pytest.raises(ConfigError, match="estimated for one teacher, but the run has sums, products/all"):
        make_forecast(run_of(world, **several(world)), DEVICES["h100"])


def test_the_shortest_context_of_all_limits_prompts_and_is_named(world: Path, tmp_path: Path) -> None:
    short = tiny_model("qwen3", seed=2)
    short.config.max_position_embeddings = 16
    save_model(tmp_path / "short", short)
    teachers = {"sums": {}, "products/all": {"path": str(tmp_path / "short")}}
    run = run_of(world, **several(world, teachers, rollout={"max_new_tokens": 10}))
    (found,) = [check for check in examine(run, num_prompts=0) if check.name == "lengths"]
    assert found.level == "error" and "in the context of the teacher 'products/all', 16 tokens" in found.found
    with pytest.raises(DataError, match="tokens, and at most 6 fit"):
        train(run)


def test_a_stream_that_shows_no_prompt_of_a_teacher_is_said_to_have_shown_none(world: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"id": n, "prompt": f"{n}=", "kind": "sums"}) for n in range(70)]
    (tmp_path / "sorted.jsonl").write_text("\n".join([*rows, json.dumps({"id": "x", "prompt": "x", "kind": "late"})]))
    data = {"path": str(tmp_path / "sorted.jsonl"), "streaming": True}
    run = run_of(world, **several(world, {"sums": {}, "late": {}}, data=data))
    (found,) = [check for check in examine(run, num_prompts=0) if check.name == "teachers"]
    assert found.level == "warning" and "none of the first 64 prompts is for 'late'" in found.found


def test_a_stranger_late_in_a_stream_costs_no_step(world: Path, tmp_path: Path) -> None:
    kinds = ["sums"] * 71 + ["Sums"] + ["sums"] * 18
    rows = [{"id": n, "prompt": f"{n}=", "answer": "1", "kind": kind} for n, kind in enumerate(kinds)]
    file, output = tmp_path / "late.jsonl", tmp_path / "run"
    file.write_text("\n".join(map(json.dumps, rows)))
    data = {"path": str(file), "streaming": True, "id_column": "id"}
    rollout = {"num_prompts": 8, "num_rollouts": 1, "max_new_tokens": 2, "save_every": 0}
    values = several(world, {"sums": {}}, data=data, steps=11, checkpoint={"every": 50}, rollout=rollout)
    run = run_of(world, {"name": "opd"}, output=str(output), **values)
    with pytest.raises(DataError, match="the teachers 'Sums', but .* The 8 steps before are kept"):
        train(run)
    file.write_text(file.read_text().replace("Sums", "sums"))
    resume(output)
    assert len(records(output)) == 11


def test_reverse_kl_is_to_each_ones_own_teacher(world: Path) -> None:
    parts = parts_of(world, **several(world, rollout={"num_prompts": 6}))
    rollouts = write(parts)
    rows = parts.learner.reverse_kl(rollouts, parts.teacher, rollouts).split([len(r.response_ids) for r in rollouts])
    alone = {name: _teacher(path, parts.vocab_size) for name, path in names(world).items()}
    for rollout, kl_T in zip(rollouts, rows, strict=True):
        expected_T = parts.learner.reverse_kl([rollout], alone[rollout.prompt.teacher], [rollout])
        torch.testing.assert_close(kl_T, expected_T, rtol=1e-4, atol=1e-5)
