"""Tokens that a method names by their text: one id each, in every part of an objective; and what is left out."""

from __future__ import annotations

import pytest
import torch

from tests.objective.cases import K, close, make_case
from tests.tiny import byte_tokenizer
from tropd.data.chat import token_id
from tropd.errors import ConfigError, EvidenceError
from tropd.methods import LSM, OPD, Rock
from tropd.methods.rock import WithoutRock
from tropd.objective import Context, NegativeLogLikelihood, Objective, PolicyGradient, Term
from tropd.objective.places import FirstOf, Near, TokenIn
from tropd.objective.rewards import LogRatio, chain
from tropd.objective.selectors import STUDENT, FromProgress
from tropd.types import Author

IDS = {"<think>": 3, "eos": 5}


@pytest.mark.parametrize("kind", [TokenIn, FirstOf])
def test_a_text_is_its_id_wherever_the_selector_stands(kind):
    def objective(*named):
        where = STUDENT & ~FromProgress(kind(*named), Near(kind(*named), 1), 0.5)
        return Objective(Term("t", where, PolicyGradient(chain(LogRatio()))), Term("u", where, NegativeLogLikelihood()))

    case = make_case()
    assert objective((1,), ("<think>", "eos")).with_ids(IDS.__getitem__) == objective((1, 3, 5))
    for progress in (0.0, 1.0):
        one = objective((1,), ("<think>", "eos")).with_ids(IDS.__getitem__)
        close(case.gradient(one, progress), case.gradient(objective((1, 3, 5)), progress), 0.0)


def test_an_objective_that_names_nothing_stays_what_it_is():
    for method in (LSM(top_k=K), OPD(), Rock(ids=(1,))):
        assert method.objective.with_ids(IDS.__getitem__) == method.objective


def test_a_text_that_no_tokenizer_was_asked_for_is_an_error_and_never_ignored():
    for method in (LSM(top_k=K, special_tokens=("<think>",)), Rock(tokens=("<think>",))):
        with pytest.raises(EvidenceError, match=r"named by their texts '<think>'.*Give ids, or call `with_ids`"):
            method.objective.plan(make_case().tokens)


@pytest.mark.parametrize(("text", "means"), [("<|end|>", "<|end|>"), ("7", "7"), (" ", "Ġ"), ("eos_token", "<|eos|>")])
def test_the_id_of_a_text_is_that_of_its_one_token(text, means):
    tokenizer = byte_tokenizer()
    assert token_id(text, tokenizer) == tokenizer.get_vocab()[means]


@pytest.mark.parametrize(
    ("text", "says"), [("<think>", "is 7 tokens: '<', 't'"), ("", "is 0 tokens"), ("é", "is 2 tokens")]
)
def test_a_text_that_is_not_one_token_is_refused_by_name(text, says):
    with pytest.raises(ConfigError, match=f"named by its text '{text}', but to the student's tokenizer it {says}"):
        token_id(text, byte_tokenizer())


def test_a_text_that_the_tokenizer_does_not_know_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert token_id("yes", words) == 1
    with pytest.raises(ConfigError, match="'no', but to the student's tokenizer it is unknown"):
        token_id("no", words)


def test_ids_and_texts_of_lsm_mask_the_same_first_occurrences():
    case = make_case()
    plain = LSM(top_k=K, special_ids=(3, 5)).objective
    named = LSM(top_k=K, special_ids=(3,), special_tokens=("eos",)).objective.with_ids(IDS.__getitem__)
    close(case.gradient(named), case.gradient(plain), 0.0)


@pytest.mark.parametrize("window", [0, 1, 3, 50])
def test_near_is_found_by_counting_and_never_crosses_responses(window):
    case = make_case()
    tokens = case.tokens
    rows = list(zip(tokens.sequences_N.tolist(), tokens.positions_N.tolist(), strict=True))
    rock = {(s, p) for n, (s, p) in enumerate(rows) if int(tokens.token_ids_N[n]) in (3, 5)}
    rock = {x for n, x in enumerate(rows) if x in rock and int(tokens.authors_N[n]) != Author.ENVIRONMENT}
    expected = [float(any((s, p + d) in rock for d in range(-window, window + 1))) for s, p in rows]
    assert Near(TokenIn((3, 5)), window)(tokens, Context()).tolist() == expected
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    assert Near(TokenIn((3, 5)), window)(tokens.rows(order), Context()).tolist() == [expected[n] for n in order]


def test_rock_is_opd_without_its_tokens():
    case = make_case()
    plain = case.gradient(OPD().objective)
    close(case.gradient(Rock().objective), plain, 0.0)
    near_N = Near(TokenIn((3, 5)), 1)(case.tokens, Context())
    close(case.gradient(Rock(ids=(3, 5), window=1).objective), (1.0 - near_N)[:, None] * plain, 1e-15)
    everything = Rock(ids=tuple(range(11))).objective
    assert not case.gradient(everything).any()


def test_as_an_extra_it_leaves_the_list_out_of_any_method():
    case = make_case()
    extra = OPD(plus=(WithoutRock(ids=(3,), tokens=("eos",), window=1),)).objective.with_ids(IDS.__getitem__)
    close(case.gradient(extra), case.gradient(Rock(ids=(3, 5), window=1).objective), 0.0)
