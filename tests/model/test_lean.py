"""The lean head gives the numbers of the fused one, and nothing in it grows with the vocabulary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.test_fused import SPARSE, compare, gradients, plain, setting
from tests.objective.variants import VARIANTS
from tropd.errors import ConfigError, VocabularyError
from tropd.model.head import Head
from tropd.model.lean import exponentials_, lean_loss, lean_rows
from tropd.model.one_pass import fused_loss, read_rows, wanted
from tropd.objective import Context


def loss_of(head, hidden, tokens, objective, tile_tokens, tile_vocab):
    plan = objective.plan(tokens, Context(progress=0.6))
    ids_NM, view_of = wanted(tokens, objective.needs)

    def judge(rows, logprobs_CM):
        return objective(tokens.rows(rows), view_of(logprobs_CM), plan.rows(rows)).loss

    return fused_loss(head, hidden, ids_NM, judge, tile_tokens, tile_vocab)


def squares(rows: slice, logprobs_CM: Tensor) -> Tensor:
    """A loss with another slope at each wanted token of each row."""
    return (logprobs_CM.square() * (1 + torch.arange(logprobs_CM.shape[1]))).sum()


@pytest.mark.parametrize("name", SPARSE)
def test_every_sparse_method_has_the_plain_loss_and_gradient(name):
    head, hidden, tokens = setting(23, 11, bias=True, padded=2)
    objective = VARIANTS[name].objective
    a, b = plain(head, hidden, tokens, objective), loss_of(head, hidden, tokens, objective, 5, 4)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    compare(gradients(a, head, hidden), gradients(b, head, hidden), 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 30),
    vocab=st.integers(2, 70),
    tile_tokens=st.integers(1, 40),
    tile_vocab=st.integers(1, 80),
    bias=st.booleans(),
    padded=st.integers(0, 3),
    seed=st.integers(0, 1000),
    num_wanted=st.integers(1, 6),
)
def test_any_shape_and_tiles_give_the_fused_loss_and_gradient(
    num_tokens, vocab, tile_tokens, tile_vocab, bias, padded, seed, num_wanted
):
    head, hidden, _ = setting(num_tokens, vocab, bias=bias, seed=seed, padded=padded)
    ids_NM = torch.randint(vocab, (num_tokens, num_wanted), generator=torch.Generator().manual_seed(seed))
    a = fused_loss(head, hidden, ids_NM, squares, tile_tokens)
    b = fused_loss(head, hidden, ids_NM, squares, tile_tokens, tile_vocab)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10)
    for x, y in zip(gradients(a, head, hidden), gradients(b, head, hidden), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 12),
    vocab=st.integers(2, 70),
    tile_tokens=st.integers(1, 15),
    tile_vocab=st.integers(1, 80),
    top_k=st.integers(0, 12),
    entropy=st.booleans(),
    coarse=st.booleans(),
)
def test_any_shape_and_tiles_read_what_the_fused_head_reads(
    num_tokens, vocab, tile_tokens, tile_vocab, top_k, entropy, coarse
):
    """Coarse logits are whole numbers, so that many are equal and only the order by id is right."""
    head, hidden, tokens = setting(num_tokens, vocab, bias=True, padded=1)
    hidden = hidden.detach()
    if coarse:
        head = Head(module=head.module, vocab_size=vocab)
        with torch.no_grad():
            for x in (hidden, *head.module.parameters()):
                x.round_()
    ids_NM = tokens.token_ids_N[:, None]
    shape = {"top_k": min(top_k, vocab), "entropy": entropy}
    a = read_rows(head, hidden, ids_NM, tile_tokens, **shape)
    b = read_rows(head, hidden, ids_NM, tile_tokens, tile_vocab=tile_vocab, **shape)
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(b[name], x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tile_vocab", [3, 64])
def test_bfloat16_stays_as_close_to_the_exact_gradient_as_the_fused_head(tile_vocab):
    head, hidden, tokens = setting(200, 64, bias=False, dtype=torch.bfloat16)
    objective = VARIANTS["opd"].objective
    exact_hidden = hidden.detach().double().requires_grad_()
    module = nn.Linear(hidden.shape[1], 64, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(head.module.weight.double())
    exact = Head(module=module, vocab_size=64, factor=head.factor, divisor=head.divisor)
    a = gradients(plain(exact, exact_hidden, tokens, objective), exact, exact_hidden)
    b = gradients(loss_of(head, hidden, tokens, objective, 32, tile_vocab), head, hidden)
    for x, y in zip(a, b, strict=True):
        assert y.dtype == torch.bfloat16
        assert float((x - y.double()).norm() / x.norm()) < 1e-2


@pytest.mark.parametrize("tile_vocab", [None, 4])
@pytest.mark.parametrize("trained", ["neither", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(tile_vocab, trained):
    head, hidden, tokens = setting(9, 11, bias=True)
    objective = VARIANTS["tropd"].objective
    head.module.weight.requires_grad_(trained == "weight")
    head.module.bias.requires_grad_(trained == "bias")
    inputs = [hidden, *(p for p in head.module.parameters() if p.requires_grad)]
    a = torch.autograd.grad(plain(head, hidden, tokens, objective), inputs)
    b = torch.autograd.grad(loss_of(head, hidden, tokens, objective, 4, tile_vocab), inputs)
    compare(a, b, 1e-12)


def test_an_upstream_factor_scales_the_gradient():
    head, hidden, tokens = setting(9, 11, bias=True)
    objective = VARIANTS["opd"].objective
    once, thrice = (gradients(x * loss_of(head, hidden, tokens, objective, 4, 3), head, hidden) for x in (1.0, 3.0))
    compare([3.0 * g for g in once], thrice, 1e-12)


class Allocations(TorchDispatchMode):
    """Elements of every storage that an operation gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.sizes.add(x.untyped_storage().nbytes() // x.element_size())
        return out


def allocated(tile_vocab: int | None, *, read: bool) -> set[int]:
    """Storages beyond one tile of 4 x 32 logits, of a problem with 1000 tokens in its vocabulary."""
    head, hidden, _ = setting(10, 1000, bias=True)
    ids_NM = torch.randint(1000, (10, 3))
    with Allocations() as seen:
        if read:
            read_rows(head, hidden.detach(), ids_NM, 4, top_k=5, entropy=True, tile_vocab=tile_vocab)
        else:
            fused_loss(head, hidden, ids_NM, squares, 4, tile_vocab).backward()
    return {size for size in seen.sizes if size > 4 * 32}


def test_no_tensor_is_larger_than_a_tile_but_the_head_and_its_gradient():
    assert allocated(32, read=False) == {1000, 1000 * 6}  # the bias, the matrix
    assert allocated(32, read=True) <= {1000, 1000 * 6}
    assert 4 * 1000 in allocated(None, read=False) and 4 * 1000 in allocated(None, read=True)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "mm" in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tile_vocab, num_tiles", [(20, 1), (11, 1), (6, 2), (4, 3)])
def test_logits_are_computed_twice_but_those_of_the_last_tile(tile_vocab, num_tiles):
    head, hidden, _ = setting(1, 11, bias=False)
    with Products() as products:
        lean_loss(head, hidden, torch.zeros(1, 1, dtype=torch.int64), squares, 4, tile_vocab)
    assert products.count == 4 * num_tiles - 1


def test_ids_on_both_sides_of_a_tile_are_read_from_their_own_tile():
    """With a head that is the identity, the logit of token v is the v-th hidden state: a wrong column shows."""
    module = nn.Linear(7, 7, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.eye(7))
    hidden_NH = torch.arange(14.0, dtype=torch.float64).reshape(2, 7)
    found = lean_rows(Head(module=module, vocab_size=7), hidden_NH, torch.arange(7).expand(2, 7), 2, 3)
    torch.testing.assert_close(found["at"] + found["log_z"], hidden_NH)


def test_logits_far_beyond_exp_stay_finite():
    head, hidden, _ = setting(5, 40, bias=False)
    with torch.no_grad():
        hidden.mul_(1e4)
    loss = lean_loss(head, hidden, torch.zeros(5, 1, dtype=torch.int64), squares, 2, 7)
    assert all(bool(g.isfinite().all()) for g in (loss, *gradients(loss, head, hidden)))


def test_no_tokens_give_no_loss_and_no_gradient():
    head, hidden, _ = setting(3, 11, bias=True)
    loss = lean_loss(head, hidden[:0], torch.zeros(0, 1, dtype=torch.int64), squares, 4, 5)
    grads = torch.autograd.grad(loss, list(head.module.parameters()))
    assert float(loss.detach()) == 0.0 and all(float(g.abs().sum()) == 0.0 for g in grads)


def test_exponentials_in_place():
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        z_CV = (3 * torch.randn(19, 33)).to(dtype)
        exact_CV = z_CV.double().softmax(-1)
        exponentials_(z_CV, z_CV.double().logsumexp(-1).to(torch.promote_types(dtype, torch.float32)))
        torch.testing.assert_close(z_CV.double(), exact_CV, rtol=tolerance, atol=1e-6 if dtype != torch.float64 else 0)


def test_a_tile_of_nothing_is_refused():
    head, hidden, _ = setting(3, 11, bias=True)
    with pytest.raises(ConfigError, match="tile_vocab = 0 was asked for"):
        lean_loss(head, hidden, torch.zeros(3, 1, dtype=torch.int64), squares, 4, 0)


@pytest.mark.parametrize("wrong", [-100, -1, 11])
def test_an_id_that_no_tile_holds_is_refused(wrong):
    head, hidden, _ = setting(3, 11, bias=True, padded=2)
    ids_NM = torch.tensor([[0], [wrong], [10]])
    with pytest.raises(VocabularyError, match=f"{wrong}.*has the tokens 0 to 10"):
        lean_loss(head, hidden, ids_NM, squares, 4, 5)
    with pytest.raises(VocabularyError, match=f"{wrong}.*has the tokens 0 to 10"):
        lean_rows(head, hidden, ids_NM, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tile_of_the_vocabulary_that_is_ruled_out_changes_nothing(dtype):
    head, hidden, _ = setting(9, 20, bias=True, dtype=dtype)
    with torch.no_grad():
        head.module.bias[5:15] = -torch.inf
    ids_NM = torch.arange(18).view(9, 2) % 5
    whole, lean = (fused_loss(head, hidden, ids_NM, squares, 4, tile_vocab) for tile_vocab in (None, 5))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(lean, whole, rtol=tolerance, atol=0)
    for x, y in zip(gradients(lean, head, hidden), gradients(whole, head, hidden), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    rows = [read_rows(head, hidden.detach(), ids_NM, 4, top_k=5, entropy=True, tile_vocab=v) for v in (None, 5)]
    assert torch.equal(rows[0]["topk_ids"], rows[1]["topk_ids"])
    for name in ("at", "log_z", "topk", "entropy"):
        torch.testing.assert_close(rows[1][name], rows[0][name], rtol=tolerance, atol=tolerance)
