"""What changes between stop and resume is refused where it makes another run, and told where it may."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import run_case
from tests.run_case import Order
from tests.small_runs import merged, write_models, write_run
from tropd.checkpoints.checkpoint import find, load, seal
from tropd.cli.main import main
from tropd.config.models import ModelConfig
from tropd.config.run import Run
from tropd.errors import CheckpointError
from tropd.model.origins import content_of, origin_of
from tropd.monitoring.display import Silent
from tropd.monitoring.records import read_records
from tropd.run import start
from tropd.run.environment import changes

SMALL: dict[str, Any] = {"steps": 4, "checkpoint": {"every": 1, "keep": 9}, "evaluation": {"every": 2}}


def stopped(folder: Path, case: str = "tropd", **changes: Any) -> tuple[Path, Path]:
    """A run that stopped after two steps, and the models that it reads."""
    models, directory = write_models(folder / "models"), folder / "run"
    path = write_run(models, directory, case, **merged(SMALL, changes))
    ended = run_case.train(path, directory, stop_after=2)
    assert ended.code == 0, ended.said
    return models, directory


def change_one_weight(folder: Path) -> None:
    """One that a sample of 64 values of each tensor does not see, and neither the size of the file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in sorted(tensors) if tensors[n].numel() > 256)
    flat = tensors[name].reshape(-1)
    flat[1 + len(flat) // 64] += 1.0  # between the second and the third of the sampled ones
    size = path.stat().st_size
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == size


def change_rope(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 20000.0
    path.write_text(json.dumps(config))


def change_ends(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 60}))


def change_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


@pytest.mark.parametrize(
    ("whose", "change", "file"),
    [
        ("teacher", change_one_weight, "model.safetensors"),
        ("teacher", change_rope, "config.json"),
        ("student", change_rope, "config.json"),
        ("student", change_ends, "generation_config.json"),
        ("student", change_template, "chat_template.jinja"),
    ],
)
def test_a_run_does_not_go_on_with_other_files_of_a_model(
    whose: str, change: Callable[[Path], None], file: str, tmp_path: Path
) -> None:
    models, directory = stopped(tmp_path)
    change(models / whose)
    with pytest.raises(CheckpointError, match=rf"of the {whose}, {file} changed\. Put the old content back"):
        start.resume(directory)


def test_one_weight_under_an_adapter_counts_and_one_of_a_student_that_is_trained_whole_does_not(tmp_path: Path) -> None:
    models, directory = stopped(tmp_path / "lora", "lora")
    change_one_weight(models / "student")
    with pytest.raises(CheckpointError, match=r"of the student, model\.safetensors changed"):
        start.resume(directory)
    models, directory = stopped(tmp_path / "whole", "entropy")
    change_one_weight(models / "student")
    start.resume(directory, display=Silent())


def test_a_run_does_not_go_on_with_other_held_out_prompts(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "9+9=", "answer": "18"}\n')
    _, directory = stopped(tmp_path, evaluation={"data": {"path": str(held_out)}})
    held_out.write_text('{"prompt": "9+9=", "answer": "19"}\n')
    with pytest.raises(CheckpointError, match="of the held-out prompts, prompts changed"):
        start.resume(directory)


def test_files_are_read_once_for_as_long_as_their_size_and_times_stay(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TROPD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = content_of({"weights": path})
    cache = tmp_path / "cache" / "hashes.json"
    known = json.loads(cache.read_text())
    cache.write_text(json.dumps({place: [*state[:-1], "remembered"] for place, state in known.items()}))
    assert content_of({"weights": path}) == {"weights": "remembered"}
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert content_of({"weights": path}) == first
    path.write_bytes(b"two")
    assert content_of({"weights": path}) != first
    for damage in ("{", "[]", '{"x": 3}'):
        cache.write_text(damage)
        content_of({"weights": path})
    monkeypatch.setenv("TROPD_CACHE", str(path))
    assert content_of({"weights": path})["weights"] != "remembered"


def test_an_origin_names_every_shard_and_no_other_file(tmp_path: Path) -> None:
    from tests.tiny import byte_tokenizer, tiny_model

    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "notes.json").write_text("{}")
    shards = {path.name for path in tmp_path.glob("*.safetensors")}
    config = ModelConfig(path=str(tmp_path))
    assert len(shards) > 1
    origin = origin_of(config, model)
    assert origin.keys() == shards | origin_of(config).keys() | {"model.safetensors.index.json", "precision"}
    assert origin_of(config).keys() == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def two_threads() -> None:
    torch.set_num_threads(2)


def test_another_number_of_threads_is_told_and_recorded_once(tmp_path: Path) -> None:
    _, directory = stopped(tmp_path)
    ended = run_case.resume(directory, prepare=two_threads, stop_after=3)
    assert ended.code == 0 and "the run goes on with threads 2 instead of 1: from here on it may differ" in ended.said
    ended = run_case.start(Order(directory=directory, prepare=two_threads)).wait()
    assert ended.code == 0 and "instead of" not in ended.said
    notes = [record.notes for record in read_records(directory / "records.jsonl").steps]
    assert [len(each) for each in notes] == [0, 0, 1, 0] and "threads 2 instead of 1" in notes[2][0]


def test_other_versions_are_told(tmp_path: Path) -> None:
    _, directory = stopped(tmp_path)
    checkpoint = find(directory)
    assert checkpoint is not None
    state = load(checkpoint).state
    for name in ("tropd", "torch", "transformers"):
        assert state["environment"][name]
    old = {**state["environment"], "tropd": "0.0.9", "torch": "2.6.0"}
    (checkpoint / "state.json").unlink()
    own = {name: x for name, x in state.items() if name not in ("kind", "schema", "step", "files", "sha256")}
    seal(checkpoint, 2, {**own, "environment": old})
    ended = run_case.resume(directory)
    assert ended.code == 0, ended.said
    assert "tropd 0.1.0 instead of 0.0.9, torch " in ended.said and "instead of 2.6.0" in ended.said
    assert any("instead of 2.6.0" in note for note in read_records(directory / "records.jsonl").steps[2].notes)


def test_what_stays_as_it_was_is_not_told() -> None:
    assert changes({"torch": "2"}, {"torch": "2"}) == []
    assert "grader mine:f (12) instead of none" in changes({}, {"grader": "mine:f (12)"})[0]


def test_lines_that_are_missing_from_the_records_are_told_and_recorded(tmp_path: Path) -> None:
    _, directory = stopped(tmp_path)
    records = directory / "records.jsonl"
    header, _, second = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(header + second)
    ended = run_case.resume(directory)
    assert ended.code == 0 and "1 of the steps before this one are missing from the records, 0 the first" in ended.said
    found = read_records(records)
    assert [record.step for record in found.steps] == [1, 2, 3]
    assert "missing from the records" in found.steps[1].notes[0]
    assert Run.load(directory / "run.toml").steps == 4


def test_an_evaluation_does_not_take_answers_of_a_model_that_differs_in_one_weight(tmp_path: Path) -> None:
    models, answers = write_models(tmp_path / "models"), tmp_path / "answers"
    ask = ["evaluate", str(models / "student"), "--data", str(models / "data.jsonl"), "--grader", "exact"]
    ask += ["--output", str(answers), "--num-samples", "1", "--max-new-tokens", "2"]
    found = []
    for change in (lambda folder: None, change_one_weight, lambda folder: None):
        change(models / "student")
        assert main(ask) == 0
        found.append(len((answers / "items.jsonl").read_text().splitlines()))
    assert found[0] < found[1] == found[2]
