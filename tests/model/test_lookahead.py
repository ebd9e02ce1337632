"""What a model says after candidates, read as branches beside the text, is what it says of plain texts."""

from __future__ import annotations

import pytest
import torch

from tests.model.cases import rollouts_of
from tests.tiny import VOCAB, tiny_model
from tropd.model import hf
from tropd.model.forward import Forward
from tropd.model.lookahead import look_ahead, passes_of, takes_branches
from tropd.model.tiling import Tiling
from tropd.objective.support import NOTHING

FAMILIES = ("qwen3", "llama", "gpt2", "gemma2", "mistral", "gpt_neox", "cohere")


def candidates_of(rollouts, width: int = 3) -> list[torch.Tensor]:
    """Some of every place, none at others."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-VOCAB // 2, VOCAB, (len(r.response_ids), width), generator=generator) for r in rollouts]


@torch.no_grad()
def by_hand(model, rollout, ids_TJ: torch.Tensor) -> torch.Tensor:
    """One text for each candidate, one after another."""
    found = torch.full(ids_TJ.shape, NOTHING)
    for t, j in (ids_TJ >= 0).nonzero().tolist():
        text = [*rollout.token_ids[: len(rollout.prompt.token_ids) + t], int(ids_TJ[t, j])]
        found[t, j] = model(torch.tensor([text])).logits[0, -1].log_softmax(-1).max()
    return found


def options(family: str) -> dict:
    return {"sliding_window": 4} if family in ("mistral", "gemma2") else {}


@pytest.mark.parametrize("tokens_per_batch", [16, 4096])
@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_branches_and_plain_texts_say_what_one_text_after_another_says(family, trees, tokens_per_batch):
    model = tiny_model(family, sharp=4.0, **options(family)).double()
    forward = Forward(model, tiling=Tiling(tokens_per_batch=tokens_per_batch))
    rollouts = rollouts_of()
    ids = candidates_of(rollouts)
    passes = passes_of(rollouts, ids, forward, trees)
    assert (len(passes) == 1) == (tokens_per_batch > 1000)
    for found, rollout, ids_TJ in zip(look_ahead(forward, passes, ids), rollouts, ids, strict=True):
        torch.testing.assert_close(found, by_hand(model, rollout, ids_TJ).double(), rtol=0, atol=1e-5)
        assert torch.equal(found > NOTHING, ids_TJ >= 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_attend_as_a_mask_says_read_branches(family):
    assert takes_branches(Forward(tiny_model(family, **options(family))))


def test_a_family_that_may_not_reads_a_text_for_each_candidate(monkeypatch):
    monkeypatch.setattr(hf, "MASK_DRIVEN", ())
    assert not takes_branches(Forward(tiny_model()))


def test_many_candidates_are_several_rows_of_one_text(monkeypatch):
    monkeypatch.setattr("tropd.model.lookahead._FEWEST", 2)
    forward = Forward(tiny_model())
    rollouts = rollouts_of([(3, 9)])
    ids = [torch.arange(9 * 6).view(9, 6)]
    passes = passes_of(rollouts, ids, forward, True)
    assert [len(x.ids_M) for _, part in passes for x in part] == [12, 12, 12, 12, 6]
    whole = by_hand(forward.model, rollouts[0], ids[0])
    torch.testing.assert_close(look_ahead(forward, passes, ids)[0], whole, rtol=0, atol=1e-4)


def test_no_candidates_take_no_pass_and_a_text_may_fill_the_context():
    model = tiny_model("gpt2")
    forward = Forward(model)
    rollouts = rollouts_of([(2, 254)])
    none = [torch.full((254, 2), -1)]
    assert passes_of(rollouts, none, forward, True) == []
    assert look_ahead(forward, [], none)[0].eq(NOTHING).all()
    last = none[0].clone()
    last[-1, 0] = 7
    for trees in (True, False):
        passes = passes_of(rollouts, [last], forward, trees)
        assert float(look_ahead(forward, passes, [last])[0][-1, 0]) > NOTHING
