"""Half precision where a token is sure: log-probabilities as exact as if all logits were, and never above 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.model.test_fused import gradients
from tropd.model.dense import dense_loss
from tropd.model.head import Head
from tropd.model.likeliest import column_maxima, largest, likeliest
from tropd.model.one_pass import fused_loss, read_rows
from tropd.model.peaks import NUM_PEAKS

V, H, N = 3000, 256, 48
HALVES = [torch.bfloat16, torch.float16]
ROWS = {
    "sure": (20.0,),
    "very sure": (40.0,),
    "two share": (20.0, 19.6),
    "five share": (20.0, 19.8, 19.6, 19.4, 19.2),
    "none": (),
}
"""Logits of a row's likeliest tokens; the others are around 0."""


def problem(kind: str, dtype: torch.dtype, bias: bool = False, softcap: float | None = None) -> tuple[Head, Tensor]:
    """A head, and hidden states that give the logits of a kind of row."""
    g = torch.Generator().manual_seed(len(kind))
    module = nn.Linear(H, V + 3, bias=bias, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(V + 3, H, generator=g) / H**0.5)
        if bias:
            module.bias.copy_(torch.randn(V + 3, generator=g))
    head = Head(module=module, vocab_size=V, factor=1.5, divisor=1.2, softcap=softcap)
    hidden_NH = torch.randn(N, H, generator=g)
    likely = torch.tensor(ROWS[kind]) / 1.25
    if len(likely):
        for n in range(N):
            rows_EH = module.weight[torch.randperm(V, generator=g)[: len(likely)]].detach().float()
            missing_E = likely + 0.1 * torch.randn(len(likely), generator=g) - rows_EH @ hidden_NH[n]
            hidden_NH[n] += rows_EH.t() @ torch.linalg.solve(rows_EH @ rows_EH.t(), missing_E)
    return head, hidden_NH.to(dtype)


def exact(head: Head, hidden_NH: Tensor) -> Tensor:
    """Log-probabilities in float64, from the same rounded weights and states."""
    bias = None if head.bias_V is None else head.bias_V.double()
    logits_NV = torch.nn.functional.linear(hidden_NH.double(), head.weight_VH.double(), bias)[:, :V]
    return head.transform(logits_NV).log_softmax(-1)


def written(exact_NV: Tensor) -> Tensor:
    """Half of the rows have their likeliest token, the others one that was drawn without it."""
    likeliest_N = exact_NV.argmax(-1)
    others_NV = exact_NV.exp().scatter(1, likeliest_N[:, None], 0.0)
    drawn_N = torch.multinomial(others_NV, 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    return torch.where(torch.arange(len(exact_NV)) % 2 == 0, likeliest_N, drawn_N)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("shape", ["plain", "bias", "softcap"])
@torch.no_grad()
def test_log_probabilities_are_exact_and_never_above_0(dtype: torch.dtype, kind: str, shape: str) -> None:
    head, hidden_NH = problem(kind, dtype, shape == "bias", 30.0 if shape == "softcap" else None)
    exact_NV = exact(head, hidden_NH)
    ids_N1 = written(exact_NV)[:, None]
    found = {"whole": head.read(hidden_NH, ids_N1, 7, full=True, entropy=True, top_k=4)}
    if shape != "softcap":
        found["fast"] = read_rows(head, hidden_NH, ids_N1, 7, entropy=True, top_k=4)
        found["lean"] = read_rows(head, hidden_NH, ids_N1, 7, entropy=True, top_k=4, tile_vocab=700)
    entropy_N = torch.special.entr(exact_NV.exp()).sum(1)
    best = exact_NV.topk(4)
    for read in found.values():
        error_N1 = read["at"].double() - exact_NV.gather(1, ids_N1)
        assert float(error_N1.abs().mean()) < (1e-3 if kind == "none" else 2e-5)
        assert float(read["at"].max()) <= 0.0 and float(read["topk"].max()) <= 0.0
        assert float((read["entropy"].double() - entropy_N).abs().mean()) < 2e-3 and float(read["entropy"].min()) >= 0
        likely_N4 = best.values > -2.0  # below, rounding decides which are among the four
        assert float((read["topk"].double() - best.values)[likely_N4].abs().amax()) < 1e-3 if likely_N4.any() else True
        assert bool((read["topk_ids"] == best.indices)[likely_N4].all())
    assert float((found["whole"]["full"].exp().sum(1) - 1.0).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("way", ["fast", "lean", "whole"])
def test_a_teacher_that_is_the_student_reads_what_the_student_reads_to_the_last_bit(dtype, kind, way) -> None:
    head, hidden_NH = problem(kind, dtype)
    tile_vocab, ids_N = 700 if way == "lean" else None, written(exact(head, hidden_NH))
    by_teacher = read_rows(head, hidden_NH, ids_N[:, None], 7, top_k=6, tile_vocab=tile_vocab)
    ids_NM = torch.cat([ids_N[:, None], by_teacher["topk_ids"]], 1)
    at_NM = torch.cat([by_teacher["at"], by_teacher["topk"]], 1)
    if way == "whole":
        with torch.no_grad():
            at_NM = head.wide_logits(hidden_NH, ids_N).log_softmax(-1)
    seen = []

    def judge(rows: slice, logprobs: Tensor) -> Tensor:
        seen.append(logprobs.detach().clone())
        return logprobs.sum()

    if way == "whole":
        dense_loss(head, hidden_NH.requires_grad_(), ids_N, judge, 7)
    else:
        fused_loss(head, hidden_NH.requires_grad_(), ids_NM, judge, 7, tile_vocab)
    assert torch.equal(torch.cat(seen), at_NM)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("way", ["fast", "lean", "whole"])
def test_gradients_of_confident_rows_are_those_of_float64(dtype: torch.dtype, kind: str, way: str) -> None:
    """Where a token is sure, its gradient is nearly nothing; of a rounded tile it would be 4e-3 of a row of W."""
    head, hidden_NH = problem(kind, dtype, bias=True)
    hidden_NH.requires_grad_()
    ids_NM = torch.cat([written(exact(head, hidden_NH.detach()))[:, None], torch.randint(V, (N, 2))], 1)
    slopes_M = torch.tensor([1.0, 0.01, -0.02])

    def judge(rows: slice, logprobs_CM: Tensor) -> Tensor:
        return (slopes_M * logprobs_CM).sum()

    def judge_whole(rows: slice, full_CV: Tensor) -> Tensor:
        return judge(rows, full_CV.gather(1, ids_NM[rows]))

    if way == "whole":
        loss = dense_loss(head, hidden_NH, ids_NM[:, 0], judge_whole, 7)
    else:
        loss = fused_loss(head, hidden_NH, ids_NM, judge, 7, 700 if way == "lean" else None)
    found = gradients(loss, head, hidden_NH)
    module = nn.Linear(H, V + 3, dtype=torch.float64)
    module.load_state_dict({name: x.double() for name, x in head.module.state_dict().items()})
    wide = Head(module=module, vocab_size=V, factor=head.factor, divisor=head.divisor)
    wide_NH = hidden_NH.detach().double().requires_grad_()
    full_NV = wide.logits(wide_NH).log_softmax(-1)
    expected = gradients((slopes_M * full_NV.gather(1, ids_NM)).sum(), wide, wide_NH)
    for x, y in zip(found, expected, strict=True):
        assert float((x.double() - y).norm() / y.norm()) < 1e-2


def test_the_largest_and_the_likeliest_are_those_of_a_full_sort() -> None:
    g = torch.Generator().manual_seed(0)
    for size in (5, 100, 4096, 9001):
        for coarse in (False, True):  # coarse logits: many are equal, and order is by id
            logits_NV = torch.randn(9, size, generator=g) * 3
            logits_NV = logits_NV.round() if coarse else logits_NV
            ordered = logits_NV.sort(dim=-1, descending=True, stable=True)
            top_k = min(6, size)
            ids_NK, logits_NK = likeliest(logits_NV, top_k)
            assert torch.equal(ids_NK, ordered.indices[:, :top_k])
            assert torch.equal(logits_NK, ordered.values[:, :top_k])
            rows = torch.tensor([7, 2])
            assert torch.equal(likeliest(logits_NV, top_k, rows_N=rows)[0], ids_NK[rows])
            number = min(NUM_PEAKS, size)
            found_NE = logits_NV.gather(1, largest(logits_NV, number)).sort(dim=-1, descending=True).values
            assert torch.equal(found_NE, ordered.values[:, :number])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [-50.0, -3.0, 0.0, 3.0])
def test_column_maxima_of_halves_are_those_of_wider_logits(dtype: torch.dtype, shift: float) -> None:
    logits_NV = (torch.randn(4, 64 * 50 + 7, generator=torch.Generator().manual_seed(0)) * 2 + shift).to(dtype)
    logits_NV[1, ::3], logits_NV[2] = -torch.inf, -torch.inf
    logits_NV[3, ::2], logits_NV[3, 1::2] = 0.0, -0.0
    assert torch.equal(column_maxima(logits_NV).float(), column_maxima(logits_NV.float()))
