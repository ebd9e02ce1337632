"""Methods that choose tokens, supports and bonuses: a run file is enough, and a run that goes on ends the same."""

from __future__ import annotations

import math
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import run_case
from tests.one_step import judge, write
from tests.small_runs import write_run
from tests.tiny import byte_tokenizer
from tropd.config.run import Run
from tropd.doctor import examine
from tropd.doctor.inspection import read_step
from tropd.errors import ConfigError
from tropd.methods import Rock
from tropd.monitoring.records import read_records
from tropd.objective.context import Context
from tropd.run.start import resume, train
from tropd.training.assembly import load_parts
from tropd.training.kept_batch import save_batch

OFTEN = list(string.ascii_letters + string.digits)
"""Tokens of which a random student writes some."""

CASES: dict[str, dict[str, Any]] = {
    "ta_opd": {"name": "ta_opd", "fraction": 0.2},
    "rock": {"name": "rock", "ids": [7], "tokens": ["eos_token", "<|end|>", "="], "window": 1},
    "near_future": {"name": "near_future", "separation": 2, "window": 3, "quiet": 0.5},
    "draft_opd": {"name": "draft_opd", "block": 4},
    "lgr": {"name": "lgr", "top_k": 4},
    "rethinking": {"name": "rethinking", "support": "union", "weight": "teacher"},
    "many_faces": {"name": "many_faces", "support": "difference", "divergence": "jensen_shannon", "outside": "bucket"},
    "distillm": {"name": "distillm"},
    "minillm": {"name": "minillm", "text_share": 0.5, "reward_clip": 2.0},
    "lsm": {"name": "lsm", "top_k": 8, "special_tokens": ["<|user|>", "1"]},
}
"""Each with knobs under which random models of few tokens learn something."""


@pytest.mark.parametrize("name", CASES)
def test_two_steps_from_a_file_and_the_second_again_from_its_checkpoint_to_the_bit(
    models: Path, tmp_path: Path, name: str
) -> None:
    directory, again = tmp_path / "run", tmp_path / "again"
    path = write_run(models, directory, "quick", method=CASES[name])
    train(Run.load(path))
    records = read_records(directory / "records.jsonl").steps
    assert len(records) == 2
    assert all(math.isfinite(record.loss) and record.gradient_norm > 0 for record in records)
    shutil.copytree(directory, again)
    resume(again, step=1)
    assert run_case.trace(again) == run_case.trace(directory)


def test_texts_of_tokens_act_as_their_ids_in_training_and_stay_texts_in_the_file(models: Path, tmp_path: Path) -> None:
    ids = [byte_tokenizer().get_vocab()[text] for text in OFTEN]
    losses = {}
    for name, knobs in (("texts", {"tokens": OFTEN}), ("ids", {"ids": ids}), ("none", {})):
        directory = tmp_path / name
        train(Run.load(write_run(models, directory, "quick", method={"name": "rock", **knobs})))
        losses[name] = [record.loss for record in read_records(directory / "records.jsonl").steps]
    assert losses["texts"] == losses["ids"] != losses["none"]
    assert Run.load(tmp_path / "texts" / "run.toml").method == Rock(tokens=tuple(OFTEN))


def test_a_text_that_is_no_token_is_refused_by_training_and_by_the_doctor(models: Path, tmp_path: Path) -> None:
    run = Run.load(write_run(models, tmp_path / "run", "quick", method={"name": "rock", "tokens": ["<think>"]}))
    says = "named by its text '<think>', but to the student's tokenizer it is 7 tokens"
    with pytest.raises(ConfigError, match=says):
        train(run)
    assert not (tmp_path / "run").exists()
    assert [check.name for check in examine(run, num_prompts=0) if says in check.found] == ["named tokens"]


def test_an_id_that_the_models_do_not_have_and_an_empty_list_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names token id 99999, but the models share ids 0 to 261"):
        train(Run.load(write_run(models, tmp_path / "run", "quick", method={"name": "rock", "ids": [99999]})))
    with pytest.raises(ConfigError, match="the extra rock has no list of tokens"):
        write_run(models, tmp_path / "run", "quick", method={"name": "opd", "plus": ["rock"]})


def test_what_a_kept_batch_shows_knows_the_ids_of_texts(models: Path, tmp_path: Path) -> None:
    run = Run.load(write_run(models, tmp_path / "run", "quick", method={"name": "rock", "tokens": OFTEN}))
    parts = load_parts(run, tmp_path)
    batch = judge(parts, write(parts))
    save_batch(tmp_path, 1, batch)
    weights = read_step(tmp_path, 1, run).weights["reverse_kl"]
    assert torch.equal(weights, parts.objective.plan(batch.tokens, Context(progress=0.5)).weights["reverse_kl"])
