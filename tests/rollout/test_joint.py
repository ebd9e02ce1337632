"""Student and teacher write together: exactly what the formula says, whatever else is in the batch."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.rollout.plain import SAMPLINGS, plain_logits, plain_probs, some_requests
from tests.tiny import VOCAB, tiny_model
from tropd.errors import ConfigError, DataError, TeacherError
from tropd.methods.decoding import Decoding
from tropd.methods.joint import Blend, Mix, Overwrite, geometric, largest_beta
from tropd.rollout import voices
from tropd.rollout.joint import JointEngine
from tropd.rollout.transformers import TransformersEngine
from tropd.teachers.local import without_adapter
from tropd.types import Author, Completion, Finish, Request, Sampling

STUDENT = tiny_model("qwen3")
TEACHER = tiny_model("llama", seed=1, vocab=VOCAB + 7)
NEUTRAL = Sampling()
DECODINGS: list[Decoding] = [Blend(epsilon=0.5), Mix(alpha=0.3), Overwrite(top_k=20)]


@dataclass(frozen=True, kw_only=True)
class Measured(Decoding):
    """Ends a text at the third token whose measure lies above a limit, and keeps what came before."""

    limit: float = 2.0

    def measure(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor | None:
        return (student_BV - teacher_BV).abs().mean(-1)

    def ends(self, trace: Sequence[float]) -> int | None:
        high = [i for i, number in enumerate(trace) if number > self.limit]
        return max(high[2], 1) if len(high) > 2 else None


def pair(max_batch: int = 64, student=STUDENT, teacher=TEACHER, sampling: Sampling = NEUTRAL, **how) -> JointEngine:
    own, theirs = (TransformersEngine(model, max_batch=max_batch, vocab_size=VOCAB) for model in (student, teacher))
    return JointEngine(own, theirs, sampling, **how)


def told_of(requests: Sequence[Request]) -> list[tuple[int, ...]]:
    return [(1, 2, 3, *request.token_ids[::-1]) for request in requests]


def write(requests: list[Request], decoding: Decoding, engine: JointEngine | None = None) -> list[Completion]:
    return (engine or pair()).write(requests, told_of(requests), decoding)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_decoding_that_changes_nothing_writes_what_the_student_writes_to_the_bit(family: str) -> None:
    model = tiny_model(family)
    requests = [replace(r, sampling=SAMPLINGS[i % len(SAMPLINGS)]) for i, r in enumerate(some_requests())]
    for max_batch, decoding in ((64, Decoding()), (5, Decoding()), (64, Overwrite(top_k=VOCAB)), (64, Mix(alpha=0.0))):
        alone = TransformersEngine(model, max_batch=max_batch, vocab_size=VOCAB).generate(requests)
        together = write(requests, decoding, pair(max_batch, model))
        assert [replace(c, authors=()) for c in together] == alone
        assert {author for c in together for author in c.authors} == {Author.STUDENT}


@pytest.mark.parametrize("decoding", [*DECODINGS, Measured()], ids=lambda d: type(d).__name__)
def test_a_text_does_not_depend_on_max_batch_or_order_or_neighbours(decoding: Decoding) -> None:
    requests = some_requests(18)
    alone = [write([request], decoding)[0] for request in requests]
    assert len({c.token_ids for c in alone}) > 12
    for max_batch in (2, 5, 64):
        together = write(requests, decoding, pair(max_batch))
        for one, other in zip(together, alone, strict=True):
            assert (one.token_ids, one.authors, one.finish) == (other.token_ids, other.authors, other.finish)
            assert one.behavior_logprobs == pytest.approx(other.behavior_logprobs, abs=1e-3)
            assert one.trace == pytest.approx(other.trace, abs=1e-3)
    order = random.Random(1).sample(range(len(requests)), k=10)
    shuffled = write([requests[i] for i in order], decoding, pair(7))
    assert [c.token_ids for c in shuffled] == [alone[i].token_ids for i in order]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("decoding", DECODINGS[:2], ids=lambda d: type(d).__name__)
def test_log_probabilities_are_those_of_the_shaped_blend_and_of_the_student_alone(
    decoding: Decoding, sampling: Sampling
) -> None:
    requests = some_requests(6, sampling=sampling)
    for request, told, text in zip(requests, told_of(requests), write(requests, decoding), strict=True):
        own_TV, their_TV = (
            plain_logits(model, replace(request, token_ids=ids), text).log_softmax(-1)
            for model, ids in ((STUDENT, request.token_ids), (TEACHER, told))
        )
        blend_TV = plain_probs(decoding.blend(own_TV, their_TV), sampling)
        ids_T1 = torch.tensor(text.token_ids)[:, None]
        behavior = blend_TV.gather(1, ids_T1)[:, 0].log().tolist()
        assert text.behavior_logprobs == pytest.approx(behavior, abs=5e-3)
        assert text.model_logprobs == pytest.approx(own_TV.gather(1, ids_T1)[:, 0].tolist(), abs=5e-3)


def enumerated(decoding: Decoding, student, teacher, steps: int, vocab: int) -> dict[tuple, float]:
    """The probability of each text of so many tokens with its authors, from the formula."""
    found: dict[tuple, float] = {((), ()): 1.0}
    for _ in range(steps):
        longer: dict[tuple, float] = defaultdict(float)
        for (ids, authors), mass in found.items():
            with torch.no_grad():
                p, q = (
                    model(torch.tensor([(*prompt, *ids)])).logits[0, -1:, :vocab].double().log_softmax(-1)
                    for model, prompt in ((student, (1, 2)), (teacher, (3,)))
                )
            drawn = decoding.blend(p, q)[0].exp()
            over = decoding.overwritten(p.expand(vocab, -1), q.expand(vocab, -1), torch.arange(vocab))
            for token in range(vocab):
                if over is not None and over[token]:
                    for theirs, share in enumerate(q[0].exp()):
                        longer[(*ids, theirs), (*authors, Author.TEACHER)] += mass * float(drawn[token] * share)
                else:
                    longer[(*ids, token), (*authors, Author.STUDENT)] += mass * float(drawn[token])
        found = dict(longer)
    return found


@pytest.mark.parametrize("decoding", [Blend(epsilon=0.2), Mix(alpha=0.4), Overwrite(top_k=2)], ids=str)
def test_texts_and_authors_are_as_likely_as_the_formula_says(decoding: Decoding) -> None:
    vocab, steps, number = 4, 3, 8_000
    student, teacher = (tiny_model("qwen3", seed=seed, vocab=vocab, sharp=8.0) for seed in (0, 1))
    expected = enumerated(decoding, student, teacher, steps, vocab)
    assert sum(expected.values()) == pytest.approx(1.0)
    requests = [Request(token_ids=(1, 2), max_new_tokens=steps, seed=seed) for seed in range(number)]
    own, theirs = (TransformersEngine(model, max_batch=number) for model in (student, teacher))
    texts = JointEngine(own, theirs).write(requests, [(3,)] * number, decoding)
    seen = Counter((text.token_ids, text.authors) for text in texts)
    assert set(seen) <= {key for key, mass in expected.items() if mass > 0}
    spread = {key: math.sqrt(mass * (1 - mass) / number) for key, mass in expected.items() if mass > 0}
    gaps = [abs(seen[key] / number - expected[key]) / (spread[key] + 1e-4) for key in spread]
    assert max(gaps) < 4.5 and sum(g * g for g in gaps) / len(gaps) < 1.6
    for text in texts[:200]:  # of the student's tokens, the behavior log-probability is that of the blend
        for t, author in enumerate(text.authors):
            if author == Author.TEACHER:
                assert text.behavior_logprobs[t] == text.model_logprobs[t] == 0.0


def test_the_teachers_tokens_are_drawn_with_its_own_sampling() -> None:
    greedy = pair(sampling=Sampling(temperature=0.0))
    requests = some_requests(6)
    for request, told, text in zip(
        requests, told_of(requests), write(requests, Overwrite(top_k=3), greedy), strict=True
    ):
        likeliest = plain_logits(TEACHER, replace(request, token_ids=told), text).argmax(-1).tolist()
        places = [t for t, author in enumerate(text.authors) if author == Author.TEACHER]
        assert places and all(text.token_ids[t] == likeliest[t] for t in places)


def test_a_text_that_is_cut_keeps_the_tokens_before_and_its_whole_trace() -> None:
    whole = write(some_requests(), replace(Measured(), limit=math.inf))
    texts = write(some_requests(), Measured())
    cut = [(text, full) for text, full in zip(texts, whole, strict=True) if len(text.token_ids) < len(full.token_ids)]
    assert len(cut) > 5
    for text, full in cut:
        length = len(text.token_ids)
        assert text.token_ids == full.token_ids[:length] and text.finish == Finish.LENGTH
        assert length < len(text.trace) <= len(full.trace)
        assert text.trace == pytest.approx(full.trace[: len(text.trace)], abs=1e-3)
        assert len(text.authors) == len(text.behavior_logprobs) == len(text.model_logprobs) == length
    assert all(len(text.trace) == len(text.token_ids) for text in whole)


def test_a_cut_that_keeps_nothing_or_more_than_there_is_is_refused() -> None:
    class Wrong(Measured):
        def ends(self, trace: Sequence[float]) -> int | None:
            return 0

    with pytest.raises(ConfigError, match=r"Wrong.ends keeps 0 tokens of a text of 1. Keep 1 at least"):
        write(some_requests(6), Wrong())


def test_a_stop_token_of_the_teacher_ends_the_text() -> None:
    texts = write([replace(r, max_new_tokens=60) for r in some_requests()], Overwrite(top_k=1))
    last = [text.authors[-1] for text in texts if text.finish == Finish.STOP]
    assert Author.TEACHER in last


def test_long_prompts_of_the_teacher_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(some_requests(), DECODINGS[0])
    monkeypatch.setattr(voices, "PREFILL_TOKENS", 60)
    parts = write(some_requests(), DECODINGS[0])
    assert [c.token_ids for c in parts] == [c.token_ids for c in whole]


def test_models_without_a_cache_write_the_same_tokens() -> None:
    requests = [replace(r, max_new_tokens=6) for r in some_requests(6)]
    engine = pair()
    engine.teacher.rereads = "no cache"
    assert [c.token_ids for c in write(requests, DECODINGS[0], engine)] == [
        c.token_ids for c in write(requests, DECODINGS[0])
    ]


def test_the_student_without_its_adapter_is_a_teacher() -> None:
    model = get_peft_model(tiny_model("qwen3"), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    base = TransformersEngine(model, vocab_size=VOCAB, within=partial(without_adapter, model))
    own = TransformersEngine(model, vocab_size=VOCAB)
    requests = [replace(request, max_new_tokens=30) for request in some_requests(12)]
    texts = write(requests, DECODINGS[0], JointEngine(own, base))
    copies = [TransformersEngine(tiny_model("qwen3"), vocab_size=VOCAB), TransformersEngine(model, vocab_size=VOCAB)]
    apart = write(requests, DECODINGS[0], JointEngine(copies[1], copies[0]))
    assert [c.token_ids for c in texts] == [c.token_ids for c in apart]
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # The live student, told as much as itself, agrees with itself: the blend is the student.
    twice = JointEngine(own, TransformersEngine(model, vocab_size=VOCAB))
    same = twice.write(requests, [r.token_ids for r in requests], DECODINGS[0])
    assert [c.token_ids for c in same] == [c.token_ids for c in own.generate(requests)]


@pytest.mark.parametrize("decoding", DECODINGS, ids=lambda d: type(d).__name__)
def test_half_precision_writes(decoding: Decoding) -> None:
    models = [tiny_model(seed=seed).bfloat16() for seed in (0, 1)]
    for text in write(some_requests(12), decoding, pair(5, *models)):
        assert all(math.isfinite(x) for x in text.behavior_logprobs + text.model_logprobs)
        assert all(0 <= token < VOCAB for token in text.token_ids)


def test_a_teacher_whose_logits_are_not_finite_is_named() -> None:
    broken = tiny_model(seed=1)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(TeacherError, match="the teacher's logits after token 0 of request 0 are not finite"):
        write(some_requests(6)[:1], DECODINGS[2], pair(teacher=broken))


def test_a_prompt_that_is_too_long_for_the_teacher_is_refused_in_its_name() -> None:
    (request,) = some_requests(6)[:1]
    with pytest.raises(DataError, match="the teacher cannot write with the student: request 0 asks for 20 new tokens"):
        pair().write([request], [(1,) * 250], DECODINGS[0])


def test_steps_of_fixed_shape_write_the_same_tokens() -> None:
    own, theirs = (TransformersEngine(model, vocab_size=VOCAB, fixed=True) for model in (STUDENT, TEACHER))
    texts = write(some_requests(), DECODINGS[0], JointEngine(own, theirs))
    assert [c.token_ids for c in texts] == [c.token_ids for c in write(some_requests(), DECODINGS[0])]


def test_probabilities_of_zero_stay_zero_on_either_side() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).log()
    q = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.1, 0.0], [0.0, 0.5, 0.5]]).log()
    beta = largest_beta(p, q, 10.0)
    assert beta.tolist() == [1.0, 1.0, 0.0]  # disjoint supports have no mixture
    assert geometric(p, q, beta).exp() == pytest.approx(
        torch.tensor([[0.4, 0.6, 0.0], [0.9, 0.1, 0.0], [1.0, 0.0, 0.0]]), abs=1e-6
    )
    # Any mixture loses the student's 0.25 that the teacher never writes: -log 0.75 nats at least.
    assert largest_beta(p[1:2], q[1:2], 0.28).tolist() == [0.0] and float(largest_beta(p[1:2], q[1:2], 0.3)) > 0
    assert Mix(alpha=0.5).blend(p, q).exp() == pytest.approx((p.exp() + q.exp()) / 2, abs=1e-6)
    over = Overwrite(top_k=1).overwritten(p, q, torch.tensor([2, 2, 0]))
    assert over is not None and over.tolist() == [False, True, True]
