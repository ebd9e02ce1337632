"""Every fast path, the smallest size at which it runs, and the end-to-end tests that reach it.

Cases of `tests.small_runs` are stopped and continued in tests/run/test_resume.py, which asserts that each takes the
paths that it names, and so are runs with servers in tests/servers/test_ahead.py.  What these do not reach is compared
here: Triton's interpreter and large batches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import run_case
from tests.model.cases import rollouts_of
from tests.one_step import parts_of
from tests.rollout.plain import some_prompts
from tests.rollout.recorded import record
from tests.servers.mini import MiniServer
from tests.servers.test_ahead import SERVED
from tests.small_runs import TAKES, write_models, write_run
from tests.tiny import VOCAB, tiny_model
from tropd.base.fast_paths import TAKEN, FastPath
from tropd.base.fast_paths import FastPath as P
from tropd.config.run import Run
from tropd.model.forward import Forward
from tropd.model.head import Head
from tropd.model.likeliest import largest
from tropd.model.one_pass import fused_loss, read_rows
from tropd.monitoring.display import Silent
from tropd.rollout.sampling import draw
from tropd.rollout.scripted import ScriptedEngine
from tropd.rollout.transformers import TransformersEngine
from tropd.run import start
from tropd.teachers.cached import Cached
from tropd.teachers.local import LocalTeacher
from tropd.teachers.teacher import ScoreRequest
from tropd.teachers.texts import CachedTexts
from tropd.training.source import Source
from tropd.types import Request, Sampling

INTERPRETED = {P.KERNELS, P.FUSED_HEAD, P.FUSED_READ, P.DECODER}
TOGETHER = {P.DECODER, P.DRAWS_IN_PARTS, P.PACKED_MATRICES, P.SHARED_PROMPTS, P.REFILLED_BATCH, P.GROWN_CACHE}
LONG_PROMPTS = {P.DECODER, P.SEVERAL_PREFILLS}
FIXED = {P.FIXED_SHAPES, P.RECORDED_STEPS, P.REFILLED_BATCH, P.GROWN_CACHE}


def test_every_fast_path_is_reached_by_a_test_that_compares_whole_runs_or_batches() -> None:
    reached = set().union(*TAKES.values(), SERVED, INTERPRETED, TOGETHER, LONG_PROMPTS, FIXED)
    assert reached == set(FastPath) == {P.KERNELS, *SMALLEST}


@contextmanager
def taking() -> Iterator[set[FastPath]]:
    """The paths that the block takes, in a set that is filled when it ends."""
    before, found = set(TAKEN), set()
    TAKEN.clear()
    yield found
    found |= TAKEN
    TAKEN.update(before)


def go_back(path: Path, directory: Path) -> list[str]:
    """Train, go back to step 1 and train again: the same to the bit.  The fast paths of the second time."""
    torch.set_num_threads(1)
    start.train(Run.load(path), display=Silent())
    alone = run_case.trace(directory)
    with taking() as took:
        start.resume(directory, step=1, display=Silent())
    assert run_case.trace(directory) == alone
    return sorted(took)


def test_a_run_on_interpreted_kernels_goes_on_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    rollout = {"num_prompts": 1, "num_rollouts": 1, "max_new_tokens": 16}
    changes: dict[str, Any] = {"steps": 2, "checkpoint": {"every": 1}, "rollout": rollout, "evaluation": {"every": 9}}
    path = write_run(write_models(tmp_path / "models"), tmp_path / "run", "entropy", **changes)
    code = "import json, sys; from pathlib import Path; from tests.integration.test_fast_paths import go_back\n"
    code += "print(json.dumps(go_back(*map(Path, sys.argv[1:]))))"
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "run")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when Triton is imported
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) >= INTERPRETED


def test_what_is_written_in_a_large_batch_is_what_is_written_alone() -> None:
    model = tiny_model(vocab=2**16, sharp=4.0, layers=1)
    prompts = some_prompts((5, 9, 9, 3) * 5, vocab=2**16)
    requests = [Request(token_ids=p, max_new_tokens=28 + 2 * i, seed=i) for i, p in enumerate(prompts)]
    requests += [replace(requests[-1], seed=100 + i) for i in range(4)]
    with taking() as took:
        together = TransformersEngine(model, max_batch=18).generate(requests)
    assert took >= TOGETHER
    for index in (0, 7, 17, 19, 23):
        (alone,) = TransformersEngine(model).generate([requests[index]])
        assert alone.token_ids == together[index].token_ids


def test_what_is_written_after_many_long_prompts_is_what_is_written_alone() -> None:
    model = tiny_model(width=8, layers=1)
    requests = [
        Request(token_ids=p, max_new_tokens=28, seed=i) for i, p in enumerate(some_prompts((228,) * 71 + (40,)))
    ]
    with taking() as took:
        together = TransformersEngine(model, max_batch=80).generate(requests)
    assert took >= LONG_PROMPTS
    for index in (0, 70, 71):
        (alone,) = TransformersEngine(model).generate([requests[index]])
        assert alone.token_ids == together[index].token_ids


def test_what_recorded_steps_of_fixed_shape_write_is_what_is_written_alone() -> None:
    model = tiny_model()
    prompts = some_prompts((5, 9, 9, 3))
    requests = [Request(token_ids=p, max_new_tokens=28 + 40 * i, seed=i) for i, p in enumerate(prompts)]
    engine = TransformersEngine(model, max_batch=3, fixed=True)
    engine.stepper.graphs.recorder = record
    with taking() as took:
        together = engine.generate(requests)
    assert took >= FIXED
    for request, completion in zip(requests, together, strict=True):
        (alone,) = TransformersEngine(model).generate([request])
        assert alone.token_ids == completion.token_ids


def generate(
    num_new: int = 2,
    num: int = 1,
    prompt: tuple[int, ...] = (1, 2, 3),
    max_batch: int = 64,
    fixed: bool | None = None,
    **shape: Any,
):
    requests = [Request(token_ids=prompt, max_new_tokens=num_new + i % 2, seed=i) for i in range(num)]
    engine = TransformersEngine(tiny_model(**shape), max_batch=max_batch, fixed=fixed)
    engine.stepper.graphs.recorder = record if fixed else None
    engine.generate(requests)


def generate_with_weights(num_weights: int) -> None:
    """A model with so many weights in its matrices."""
    rest = sum(m.weight.numel() for m in tiny_model(vocab=4).modules() if type(m) is torch.nn.Linear) - 4 * 32
    generate(16, vocab=-(-(num_weights - rest) // 32))


def read_long_prompts(num: int) -> None:
    prompts = some_prompts((250,) * num)
    requests = [Request(token_ids=p, max_new_tokens=1, seed=0) for p in prompts]
    TransformersEngine(tiny_model(width=8, layers=1), max_batch=80).generate(requests)


def lay_out_two(shorter: int) -> None:
    """Two texts, the longer one of 16 tokens."""
    Forward(tiny_model()).hidden(rollouts_of([(4, 12), (4, shorter - 4)]))


def lose(
    num_tokens: int, tile_vocab: int | None = None, vocab: int = VOCAB, dtype: torch.dtype = torch.float32
) -> None:
    """Loss and gradient at as many tokens, each with a support of two, in tiles of at most 512 tokens."""
    head = Head.of(tiny_model(vocab=vocab).to(dtype))
    hidden_NH = torch.zeros(num_tokens, 32, requires_grad=True, dtype=dtype)
    ids_NM = torch.zeros(num_tokens, 2, dtype=torch.long)
    fused_loss(head, hidden_NH, ids_NM, lambda rows, logprobs_CM: logprobs_CM.sum(), 512, tile_vocab).backward()


def read(num_tokens: int = 1, tile_vocab: int | None = None, unread: int = 0) -> None:
    """Log-probabilities and the likeliest tokens at all but `unread` of as many tokens."""
    head, ids_N1 = Head.of(tiny_model()), torch.zeros(num_tokens, 1, dtype=torch.long)

    def chosen(rows: slice, logprobs_C: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(logprobs_C)) >= unread

    read_rows(head, torch.zeros(num_tokens, 32), ids_N1, 512, top_k=2, tile_vocab=tile_vocab, top_rows=chosen)


def train_step(folder: Path, method: str, **changes: Any) -> None:
    """One step, as `tropd train` takes it."""
    from tests.one_step import step_of

    step_of(parts_of(write_models(folder), {"name": method}, **changes))


def ask_for_texts(folder: Path, times: int) -> None:
    texts = CachedTexts(ScriptedEngine(lambda request: [5, 6]), folder / f"{times}.sqlite", "teacher")
    for _ in range(times):
        texts.generate([Request(token_ids=(1, 2), max_new_tokens=2, seed=0)])


def ask_for_scores(folder: Path, times: int) -> None:
    scores = Cached(LocalTeacher(tiny_model()), folder / f"{times}.sqlite", "teacher")
    for _ in range(times):
        scores.score(ScoreRequest(rollouts_of()))


def write_ahead(folder: Path, staleness: int) -> None:
    with MiniServer(write_models(folder) / "student") as server:
        rollout = {"servers": [server.url], "staleness": staleness}
        parts = parts_of(folder, {"name": "opd"}, output=str(folder / "run"), rollout=rollout)
        source = Source(parts)
        source.begin(1)
        source.wait()


ANY = -1
SMALLEST: dict[FastPath, tuple[str, int, int, Callable[..., Any]]] = {
    P.DECODER: ("new tokens of a request", 15, 16, generate),
    P.PACKED_MATRICES: ("weights in all matrices", 2**20 - 32, 2**20, generate_with_weights),
    P.SHARED_PROMPTS: ("requests with the same prompt", 1, 2, lambda n: generate(num=n)),
    P.REFILLED_BATCH: ("requests for two rows", 2, 3, lambda n: generate(num=n, max_batch=2)),
    P.SEVERAL_PREFILLS: ("prompts of 250 tokens", 65, 66, read_long_prompts),
    P.GROWN_CACHE: ("new tokens after a short prompt", 65, 66, generate),
    P.FIXED_SHAPES: ("new tokens of a request, on CUDA", 15, 16, lambda n: generate(n, fixed=True)),
    P.RECORDED_STEPS: ("new tokens of a request, on CUDA", 15, 16, lambda n: generate(n, fixed=True)),
    P.DRAWS_IN_PARTS: (
        "rows of a batch with 2^16 tokens in the vocabulary",
        16,
        17,
        lambda n: draw(torch.zeros(n, 2**16), [0.5] * n, Sampling()),
    ),
    P.SPANS: ("tokens of a text beside one of 16: fewer", 14, 13, lay_out_two),
    P.LIVE_ROWS: ("a token that no term weighs", ANY, 1, lambda folder: train_step(folder, "entropy_opd")),
    P.FUSED_HEAD: ("tokens", ANY, 1, lose),
    P.FUSED_READ: ("tokens", ANY, 1, read),
    P.SOME_TOP_K: ("tokens whose top-k nobody reads", 0, 1, lambda n: read(2, unread=n)),
    P.LEAN_HEAD: ("tokens, where tile_vocab is set", ANY, 1, lambda n: lose(n, 16)),
    P.LEAN_READ: ("tokens, where tile_vocab is set", ANY, 1, lambda n: read(n, 16)),
    P.DENSE_HEAD: ("a method that reads whole distributions", ANY, 1, lambda folder: train_step(folder, "minillm")),
    P.SEVERAL_TILES: ("tokens, in tiles of 512", 512, 513, read),
    P.SOFTMAX_IN_PARTS: ("tokens with 2^15 in the vocabulary", 8, 9, lambda n: lose(n, vocab=2**15)),
    P.SUPPORTS_IN_PARTS: ("tokens with a support, in one tile", 256, 257, lose),
    P.ROUNDED_IN_PLACE: ("tokens in half precision", ANY, 1, lambda n: lose(n, dtype=torch.bfloat16)),
    P.COLUMNS: ("tokens in the vocabulary, for the likeliest one", 191, 192, lambda n: largest(torch.zeros(1, n), 1)),
    P.PEAKS: ("tokens in half precision", ANY, 1, lambda n: lose(n, dtype=torch.bfloat16)),
    P.KEPT_TEXTS: ("times that a text is asked for", 1, 2, ask_for_texts),
    P.KEPT_SCORES: ("times that a score is asked for", 1, 2, ask_for_scores),
    P.WRITING_AHEAD: ("rollout.staleness", 0, 1, write_ahead),
}
"""Of what, the size at which the path does not run yet (ANY: it always does), and the size at which it runs."""


@pytest.mark.parametrize("path", SMALLEST)
def test_a_fast_path_runs_from_its_smallest_size_on(path: FastPath, tmp_path: Path) -> None:
    _, below, smallest, run = SMALLEST[path]

    def takes(size: int) -> bool:
        with taking() as took:
            if run in (ask_for_texts, ask_for_scores, write_ahead):
                (tmp_path / str(size)).mkdir()
                run(tmp_path / str(size), size)
            else:
                run(tmp_path if path in (P.LIVE_ROWS, P.DENSE_HEAD) else size)
        return path in took

    assert takes(smallest)
    assert below == ANY or not takes(below)
