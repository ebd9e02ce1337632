"""A release of transformers whose insides are not those that tropd knows costs speed, never the run."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

import tropd
from tests.model.cases import rollouts_of
from tests.rollout.plain import some_requests
from tests.small_runs import run_of, write_models
from tests.tiny import tiny_config, tiny_model
from tropd.model import hf
from tropd.model.forward import Forward
from tropd.monitoring.records import read_records
from tropd.rollout.cache import RowLayer
from tropd.rollout.decoding import obstacle
from tropd.rollout.transformers import TransformersEngine
from tropd.run.start import train

ROOT = Path(tropd.__file__).parent
OPEN = ("Auto", "PreTrainedTokenizer", "GenerationConfig")
"""What the rest of tropd imports from transformers: automatic classes, tokenizers, configurations."""
REQUESTS = [replace(r, stop_ids=(0, 60), max_new_tokens=20) for r in some_requests(8)]


def written(model: Any) -> list[tuple[int, ...]]:
    return [c.token_ids for c in TransformersEngine(model, max_batch=3).generate(REQUESTS)]


def test_only_one_module_knows_the_insides_of_transformers() -> None:
    others = []
    for path in sorted(ROOT.rglob("*.py")):
        if path == ROOT / "model" / "hf.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
                names = [alias.name for alias in node.names if not alias.name.startswith(OPEN)]
                others += [f"{path.name}: {node.module} {name}" for name in names]
            if isinstance(node, ast.Import):
                others += [f"{path.name}: {a.name}" for a in node.names if a.name.startswith("transformers.")]
    assert others == []


@pytest.mark.parametrize("table", ["PARTS", "LAYER_PARTS"])
def test_a_part_that_is_not_where_it_was_leaves_the_models_own_forward_and_a_note(table: str, monkeypatch) -> None:
    model, parts = tiny_model("llama"), getattr(hf, table)
    expected = written(model)
    for part in parts:
        monkeypatch.setattr(hf, table, {**parts, part: "moved.elsewhere"})
        assert "has no moved" in obstacle(model, model)
        assert "has no moved" in TransformersEngine(model).notes[0]
    assert written(model) == expected


def test_a_part_that_takes_other_arguments_leaves_the_models_own_forward(monkeypatch) -> None:
    model = tiny_model("llama")
    expected = written(model)
    rotary = model.model.rotary_emb
    plain = type(rotary).forward
    monkeypatch.setattr(rotary, "forward", lambda x, *, position_ids: plain(rotary, x, position_ids))
    with pytest.warns(UserWarning, match=r"its own forward writes .*same numbers, slower \(TypeError"):
        assert written(model) == expected


class Renamed(Qwen3ForCausalLM):
    """As if the cache had another name again."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, store=None, **others):  # type: ignore[override]
        return super().forward(input_ids, attention_mask, position_ids, store, **others)


def test_a_cache_under_an_unknown_name_leaves_texts_that_are_read_whole() -> None:
    plain, model = tiny_model("qwen3"), Renamed(tiny_config("qwen3")).eval()
    model.load_state_dict(plain.state_dict())
    engine = TransformersEngine(model, max_batch=3)
    assert "none of its arguments is cache or past_key_values" in engine.notes[0]
    assert [c.token_ids for c in engine.generate(REQUESTS)] == written(plain)


@pytest.mark.parametrize("method", ["update", "write", "get_mask_sizes"])
def test_a_cache_that_is_used_in_another_way_leaves_texts_that_are_read_whole(method: str, monkeypatch) -> None:
    model = tiny_model("gpt2")
    expected = TransformersEngine(model, max_batch=3).generate(REQUESTS)

    def changed(*given: Any, **others: Any) -> None:
        raise TypeError("an argument is missing")

    monkeypatch.setattr(RowLayer, method, changed)
    engine = TransformersEngine(model, max_batch=3)
    with pytest.warns(UserWarning, match="GPT2LMHeadModel reads each text whole .*an argument is missing"):
        completions = engine.generate(REQUESTS)
    assert "an argument is missing" in engine.notes[0]
    assert engine.generate(REQUESTS) == completions
    for found, wanted in zip(completions, expected, strict=True):
        assert (found.token_ids, found.finish) == (wanted.token_ids, wanted.finish)
        torch.testing.assert_close(
            torch.tensor(found.model_logprobs), torch.tensor(wanted.model_logprobs), atol=1e-4, rtol=0
        )


def test_a_cache_that_worked_and_then_fails_is_an_error(monkeypatch) -> None:
    engine = TransformersEngine(tiny_model("gpt2"))
    engine.generate(REQUESTS)

    def broken(*given: Any, **others: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(RowLayer, "update", broken)
    with pytest.raises(RuntimeError, match="out of order"):
        engine.generate(REQUESTS)


def test_attention_that_is_handed_other_arguments_leaves_a_padded_rectangle(monkeypatch) -> None:
    model, rollouts = tiny_model("llama"), rollouts_of([(2, 3), (4, 17), (1, 30)])
    expected = Forward(model).hidden(rollouts)
    monkeypatch.setattr("tropd.model.spans.scaled_dot_product_attention", None)
    with pytest.warns(UserWarning, match="Sequences are padded .*same numbers, slower"):
        forward = Forward(model)
    assert not forward.by_span
    torch.testing.assert_close(forward.hidden(rollouts), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*its own forward writes")
def test_a_run_without_any_known_inside_is_the_run_with_them(tmp_path: Path, monkeypatch, capsys) -> None:
    losses = {}
    rollout = {"max_new_tokens": 20}
    for name in ("known", "unknown"):
        (tmp_path / name).mkdir()
        run = run_of(write_models(tmp_path / name), steps=2, rollout=rollout)
        if name == "unknown":
            monkeypatch.setattr(hf, "CACHE_ARGUMENTS", ("store",))
            monkeypatch.setattr(hf, "PARTS", {**hf.PARTS, "embed": "model.moved"})
            monkeypatch.setattr(hf, "PLAIN_ATTENTION", "another")
        losses[name] = [record.loss for record in read_records(train(run) / "records.jsonl").steps]
    assert losses["unknown"] == pytest.approx(losses["known"], rel=1e-4)
    assert capsys.readouterr().out.count("reads each text whole for every token") == 1


TRAINS = """
import torch, transformers, transformers.cache_utils
torch.set_num_threads(1)
del transformers.cache_utils.DynamicLayer
transformers.AttentionInterface = type("AttentionInterface", (), {})
import sys
from pathlib import Path
from tests.small_runs import run_of, write_models
from tropd.run.start import train
folder = Path(sys.argv[1])
folder.mkdir()
print(train(run_of(write_models(folder), steps=1)))
"""


def test_a_release_without_the_classes_that_are_imported_trains(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAINS, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "transformers.cache_utils has no DynamicLayer" in done.stderr + done.stdout
    assert (tmp_path / "run" / "run" / "model" / "model.safetensors").exists()
