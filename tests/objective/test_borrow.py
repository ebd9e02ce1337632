"""What `distillation_loss` is given by other people's loops: refused by name where it cannot be right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.objective.cases import F64, close
from tropd.errors import EvidenceError
from tropd.methods import EOPD, GKD, OPD, TIP, TrOPD
from tropd.objective import Counts, distillation_loss
from tropd.types import Author

B, T, V, K = 2, 4, 9, 3


def given(**changes: Any) -> dict[str, Any]:
    """A good call for EOPD: top-k and the entropy."""
    g = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(B, T, V, generator=g, dtype=F64) for _ in range(2))
    ids = torch.randint(V, (B, T), generator=g)
    full = teacher.log_softmax(-1)
    top = full.topk(K, -1)
    values: dict[str, Any] = dict(
        token_ids=ids,
        authors=torch.tensor([[0, 1, 1, 1], [2, 1, 1, 0]]),
        logits=logits,
        teacher_logprobs=full.gather(-1, ids[..., None]).squeeze(-1),
        teacher_top_k=(top.indices, top.values),
        teacher_entropy=-(full.exp() * full).sum(-1),
    )
    return {**values, **changes}


def loss(method: Any = EOPD(top_k=K, threshold=0.5), **changes: Any) -> torch.Tensor:  # noqa: B008 (frozen)
    return distillation_loss(method, **given(**changes)).loss


def top(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids, values = given()["teacher_top_k"]
    return changes.get("ids", ids), changes.get("values", values)


def same_row(column: int) -> torch.Tensor:
    """Ids whose column names the same token as the first, in one row that is trained."""
    ids = top()[0].clone()
    ids[0, 2, column] = ids[0, 2, 0]
    return ids


def at(name: str, number: float) -> dict[str, torch.Tensor]:
    x = given()[name].clone()
    x[1, 1] = number
    return {name: x}


REFUSED = {
    "an id twice in a top-k": (dict(teacher_top_k=top(ids=same_row(2))), "more than once in 1 of 6 rows"),
    "a top-k of probability 3": (dict(teacher_top_k=top(values=torch.zeros(B, T, K))), "sum to 3 in a row"),
    "a negative entropy": (at("teacher_entropy", -0.5), r"teacher_entropy_N.*from -0\.5.*0 to ln 9"),
    "an entropy that is NaN": (at("teacher_entropy", float("nan")), "teacher_entropy_N.*NaN in 1 place"),
    "an entropy in other units": (at("teacher_entropy", 3.1), r"teacher_entropy_N.*to 3\.1.*ln 9 = 2\.197"),
    "an infinite entropy": (at("teacher_entropy", float("inf")), "teacher_entropy_N.*to inf"),
    "nobody to train": (dict(authors=torch.zeros(B, T, dtype=torch.long)), "none of the 8 tokens can be trained on"),
    "authors by other numbers": (dict(authors=torch.full((B, T), 7)), "none of the 8 tokens can be trained on"),
    "float ids": (dict(token_ids=given()["token_ids"].float()), "`token_ids` holds torch.float32"),
    "float top-k ids": (dict(teacher_top_k=top(ids=top()[0].double())), "teacher_top_k ids.*torch.float64"),
    "float authors": (dict(authors=given()["authors"].float()), "`authors` holds torch.float32"),
    "float sequences": (dict(sequences=torch.zeros(B, T)), "`sequences` holds torch.float32"),
    "negative sequences": (dict(sequences=torch.full((B, T), -1)), "`sequences` holds -1"),
    "more ids than log-probabilities": (
        dict(teacher_top_k=top(values=top()[1][..., :2])),
        "3 ids, 2 log-probabilities. Give as many",
    ),
    "another width for the student": (
        dict(logits=None, logprobs=torch.full((B, T), -1.0), top_k_logprobs=torch.full((B, T, 2), -1.0)),
        "3 ids, 3 log-probabilities, 2 `top_k_logprobs` of the student",
    ),
    "one reward too few": (dict(rewards=torch.ones(1)), r"`rewards` has shape \(1,\), but there are 2 sequences"),
    "one group too few": (dict(groups=torch.ones(1)), r"`groups` has shape \(1,\), but there are 2 sequences"),
    "a reward that is NaN": (dict(rewards=torch.tensor([0.0, torch.nan])), "rewards_S.*NaN in 1"),
    "heads of different length": (
        dict(teacher_logits=torch.zeros(B, T, V + 3)),
        "`logits` has 9 columns and `teacher_logits` has 12 columns.*vocab_size.*at most 9",
    ),
    "a cut beyond a head": (dict(teacher_logits=torch.zeros(B, T, V), vocab_size=V + 1), "vocab_size = 10 was given"),
    "a cut to nothing": (dict(vocab_size=0), "vocab_size = 0 was given"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_impossible_evidence_is_refused_by_name(what):
    changes, words = REFUSED[what]
    with pytest.raises(EvidenceError, match=words):
        loss(**changes)


def test_what_is_possible_is_not_refused():
    assert bool(loss().isfinite())
    assert bool(loss(authors=torch.tensor([[False, True, True, True]] * 2)).isfinite())
    uniform = torch.full((B, T), torch.tensor(V).log().item() + 1e-3)  # rounding
    assert bool(loss(teacher_entropy=uniform).isfinite())
    garbage = top(ids=torch.where(given()["authors"][..., None] == Author.CONTEXT, 0, top()[0]))
    assert bool(loss(teacher_top_k=garbage).isfinite()), "rows that nobody trains may hold anything"


def test_a_micro_batch_without_trained_tokens_is_allowed_where_others_have_some():
    counts = Counts(actions=6, student=5, teacher=1, sequences=2)
    assert float(loss(OPD(), authors=torch.zeros(B, T, dtype=torch.long), counts=counts)) == 0


def test_an_unsorted_top_k_is_refused_where_it_would_be_cut():
    ids, values = top()
    turned = ids.flip(-1), values.flip(-1)
    close(loss(teacher_top_k=turned), loss(), 1e-12)  # all of it is read
    with pytest.raises(EvidenceError, match="reads the first 2.*not sorted"):
        loss(EOPD(top_k=2, threshold=0.5), teacher_top_k=turned)


@pytest.mark.parametrize("whole", [True, False])
def test_tokens_beyond_the_cut_are_refused_by_name(whole):
    heads = {"teacher_logits": torch.zeros(B, T, V)} if whole else {}
    kept = {name: x for name, x in given().items() if name not in ("teacher_top_k", "teacher_entropy")}
    with pytest.raises(EvidenceError, match=r"token_ids_N.*vocabulary is 0\.\.1"):
        distillation_loss(OPD(), **kept, **heads, vocab_size=2)


@pytest.mark.parametrize("method", [GKD(), TIP(), TrOPD(top_k=K), GKD(beta=0.9)])
@pytest.mark.parametrize("longer", ["logits", "teacher_logits"])
def test_heads_of_different_length_are_cut_to_the_shared_tokens(method, longer):
    """Padding holds numbers like any other row of a head; cut away, nothing of it is left."""
    plain = {"logits": given()["logits"], "teacher_logits": torch.randn(B, T, V, dtype=F64)}
    wide = {**plain, longer: torch.cat([plain[longer], 5 * torch.ones(B, T, 3, dtype=F64)], -1)}
    kept = {name: x for name, x in given().items() if not name.startswith(("teacher", "logits"))}
    gradients = []
    for heads, size in ((plain, None), (wide, V)):
        leaf = heads["logits"].clone().requires_grad_()
        output = distillation_loss(method, **{**kept, **heads, "logits": leaf}, vocab_size=size)
        gradients.append(torch.autograd.grad(output.loss, leaf)[0])
    close(gradients[1][..., :V], gradients[0], 0.0)
    assert not gradients[1][..., V:].any()
