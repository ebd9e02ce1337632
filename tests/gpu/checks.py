"""What must hold on a GPU, as plain functions: pytest runs them (`test_checks.py`), and `make gpu-check` without it.

Those that need no GPU run on a CPU too, the kernels under Triton's interpreter, so that nothing here can rot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.model.kernel_cases import DTYPES, allowed, errors, numbers, tile
from tests.rollout.families import FAMILIES
from tests.rollout.plain import SAMPLINGS, some_requests
from tests.tiny import random_model, tiny_model
from tropd.model.fused import kernels_for, soften_rows_
from tropd.model.head import Head
from tropd.model.lean import exponentials_
from tropd.model.one_pass import can_fuse, read_rows
from tropd.model.products import add_product_, sums_wide
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Completion

Case = tuple[str, Callable[[], None]]


def cases(device: str) -> Iterator[Case]:
    """Names and checks of all groups."""
    for group in GROUPS.values():
        yield from group(device)


def of_kernels(device: str) -> Iterator[Case]:
    cuda = device == "cuda"
    large = [(4, 4097), (3, 151_936), (2, 262_144), (70_001, 5)] if cuda else []
    for dtype in DTYPES:
        for rows, size in [(1, 1), (3, 7), (5, 133), *large]:
            yield f"kernels are float64 rounded, {dtype}, {rows} x {size}", partial(kernels, dtype, rows, size, device)
    for tile_vocab in (None, 16):
        yield f"the head is that of a CPU, vocabulary tile {tile_vocab}", partial(head, tile_vocab, device)
    for dtype in ("bfloat16", "float16"):
        for softcap in (None, 30.0):
            yield f"sure rows are read exactly, {dtype}, soft cap {softcap}", partial(sure_rows, dtype, softcap, device)
    if cuda:
        yield "kernels reach beyond 32 bits", beyond_32_bits
        for dtype in ("bfloat16", "float16"):
            yield f"a float32 sum of products loses nothing, {dtype}", partial(float32_sum, dtype)


def of_generation(device: str) -> Iterator[Case]:
    for family in FAMILIES if device == "cuda" else ("qwen3", "gpt2", "gemma2 beyond its window"):
        yield f"recorded steps write the plain loop's tokens, {family}", partial(recorded, family, False, device)
    yield "recorded steps of a model's own forward do so", partial(recorded, "qwen3", True, device)
    yield "weights that are trained in place are used", partial(trained_in_place, device)
    yield "an adapter that is switched off is not used", partial(adapter, device)


GROUPS: dict[str, Callable[[str], Iterator[Case]]] = {"kernels": of_kernels, "generation": of_generation}
"""Apart, since an error on a GPU spoils everything that its process does afterwards."""


def kernels(dtype: str, rows: int, size: int, device: str) -> None:
    z_CV = tile(rows, size, DTYPES[dtype], device)
    assert kernels_for(z_CV) is not None, "the kernels do not serve this tile"
    for name, error in errors(z_CV).items():
        assert error <= 2 * allowed(name, dtype), f"{name} is off by {error:.1e}"


def beyond_32_bits() -> None:
    rows, size = 9000, 262_144
    z_CV = torch.zeros(rows, size, dtype=torch.bfloat16, device="cuda")
    assert rows * size > 2**31
    log_sum_C = soften_rows_(z_CV)
    torch.testing.assert_close(log_sum_C.cpu(), torch.full((rows,), math.log(size)))
    assert bool((z_CV[-1] == 1 / size).all())
    exponentials_(z_CV, torch.zeros(rows, device="cuda"))
    assert bool((z_CV[-1] == 1).all())


def head(tile_vocab: int | None, device: str) -> None:
    plain, there = numbers(torch.float32, None), numbers(torch.float32, tile_vocab, device)
    for name, x in plain.items():
        torch.testing.assert_close(torch.tensor(there[name]), torch.tensor(x), rtol=1e-4, atol=1e-3, msg=name)


def float32_sum(dtype: str) -> None:
    a, b = (torch.randn(64, 64, device="cuda").to(DTYPES[dtype]) for _ in range(2))
    assert sums_wide(a.device, a.dtype), "this PyTorch does not add half-precision products to a float32 sum"
    sum_AB = torch.zeros(64, 64, device="cuda")
    add_product_(sum_AB, a, b)
    torch.testing.assert_close(sum_AB.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def sure_rows(dtype: str, softcap: float | None, device: str) -> None:
    """Log-probabilities where one token stands out: exact up to 2e-5, and never above 0."""
    g = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(1000, 64, generator=g) / 8
    ids_N = torch.randint(1000, (64,), generator=g)
    hidden_NH = 20 * weight_VH[ids_N] / weight_VH[ids_N].norm(dim=1, keepdim=True).square()
    module = nn.Linear(64, 1000, bias=False).to(device, DTYPES[dtype])
    module.weight.copy_(weight_VH)
    hidden_NH = hidden_NH.to(device, DTYPES[dtype])
    the_head = Head(module=module, vocab_size=1000, softcap=softcap)
    exact_NV = hidden_NH.double() @ module.weight.double().t()
    if softcap is not None:
        exact_NV = softcap * torch.tanh(exact_NV / softcap)
    others_N = torch.randint(1000, (64,), generator=g)
    for written_N in (ids_N, others_N):  # the sure token, and one beside it
        wanted_N1 = written_N[:, None].to(device)
        read = read_rows if can_fuse(the_head) else Head.read
        found_N1 = read(the_head, hidden_NH, wanted_N1, 32)["at"]
        exact_N1 = exact_NV.log_softmax(-1).gather(1, wanted_N1)
        assert float(found_N1.max()) <= 0.0, f"a log-probability is {float(found_N1.max()):.1e}"
        error = float((found_N1.double() - exact_N1).abs().mean())
        assert error <= 2e-5, f"the mean error is {error:.1e}"


def _written(engine: TransformersEngine) -> list[Completion]:
    requests = [replace(r, stop_ids=(0, 60), sampling=SAMPLINGS[i % 7]) for i, r in enumerate(some_requests(18))]
    return engine.generate(requests)


def _engines(model: Any) -> tuple[TransformersEngine, TransformersEngine]:
    """One with steps of fixed shape, recorded where there is CUDA, and one whose steps follow the rows."""
    fixed, plain = (TransformersEngine(model, vocab_size=256, max_batch=5, fixed=choice) for choice in (True, False))
    return fixed, plain


def _assert_same(one: list[Completion], other: list[Completion], device: str) -> None:
    """The same tokens.  On a GPU products of other shapes round otherwise, which may move a token now and then; what
    was written before that has the same log-probabilities."""
    same = sum(a.token_ids == b.token_ids for a, b in zip(one, other, strict=True))
    assert same >= (len(one) if device == "cpu" else 0.8 * len(one)), f"{same} of {len(one)} texts are the same"
    for a, b in zip(one, other, strict=True):
        for x, y, p, q in zip(a.token_ids, b.token_ids, a.model_logprobs, b.model_logprobs, strict=False):
            if x != y:
                break
            assert abs(p - q) < 1e-2, f"a log-probability is {p:.4f} or {q:.4f}"


def _assert_recorded(engine: TransformersEngine, device: str) -> None:
    assert engine.stepper.slots is not None, "steps had no fixed shape"
    assert not engine.stepper.graphs.refused, "a step could not be recorded"
    assert device != "cuda" or engine.stepper.graphs.recorded, "nothing was recorded"


def recorded(family: str, own: bool, device: str) -> None:
    fixed, plain = _engines(random_model(FAMILIES[family]).to(device))
    fixed.stepper.misread = plain.stepper.misread = own
    for _ in range(2):  # the second time with what was recorded the first
        _assert_same(_written(fixed), _written(plain), device)
    _assert_recorded(fixed, device)


def trained_in_place(device: str) -> None:
    model = tiny_model("qwen3").to(device)
    fixed, plain = _engines(model)
    before = _written(fixed)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1.0)
        model.model.layers[0].self_attn.q_norm.weight.mul_(1.5)
    after = _written(fixed)
    assert after != before, "the weights of before were used"
    _assert_same(after, _written(plain), device)
    _assert_recorded(fixed, device)


def adapter(device: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    chosen = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model: Any = get_peft_model(tiny_model("qwen3", sharp=6.0), chosen).to(device).eval()
    fixed, plain = _engines(model)
    adapted = _written(fixed)
    _assert_same(adapted, _written(plain), device)
    with model.disable_adapter():
        bare = _written(fixed)
        assert bare != adapted, "the adapter was used"
        _assert_same(bare, _written(plain), device)
    _assert_recorded(fixed, device)
