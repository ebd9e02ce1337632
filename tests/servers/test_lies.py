"""No lie of a teacher's server is silent: it is refused when it is met, after the batch in which it began, or raises an
alarm.  What cannot be told apart from another model is caught where the weights are at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.servers.lies import LIES, ROWS, Liar, noisy, scaled
from tests.servers.mini import MiniServer
from tests.servers.proxy import Proxy, status, untouched
from tests.small_runs import run_of, save_model, write_models
from tests.tiny import VOCAB, tiny_model
from tropd.config.models import ServerConfig, TeacherConfig
from tropd.errors import TeacherError, TeacherRefused, TeacherUnavailable
from tropd.objective.evidence import Needs
from tropd.run.start import train
from tropd.teachers.audit import Known
from tropd.teachers.meeting import canary_of
from tropd.teachers.reference import reference_of
from tropd.teachers.server import ServerTeacher
from tropd.teachers.teacher import ScoreRequest
from tropd.testing import some_rollouts
from tropd.types import Rollout

BOTH = Needs.SAMPLED | Needs.TOPK
CANARY = canary_of(range(40, 60), VOCAB)
SETTINGS = ServerConfig(deadline_seconds=2.0)
SHORT: dict[str, Any] = {"max_model_len": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("lies") / "teacher", tiny_model(seed=1))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Known:
    known = reference_of(TeacherConfig(path=str(folder)), range(40, 110), 8)
    assert known is not None
    return known


def rollouts() -> list[Rollout]:
    """Four answers, and four more that begin like them."""
    first = some_rollouts(VOCAB, [(4, 16), (4, 20), (5, 12), (4, 16)])
    return first + [replace(r, id=f"{r.id}b", token_ids=r.token_ids[:6] + r.token_ids[:5:-1]) for r in first]


def teacher_at(url: str, settings: ServerConfig = SETTINGS, **options: Any) -> ServerTeacher:
    return ServerTeacher([url], settings, vocab_size=VOCAB, canary=CANARY, top_k=8, **options)


@pytest.mark.parametrize("name", LIES)
def test_a_server_that_lies_is_refused_when_it_is_met(folder: Path, name: str) -> None:
    with Liar(folder, **LIES[name], **SHORT) as server, pytest.raises(TeacherRefused, match=r"^teacher default: "):
        teacher_at(server.url)


@pytest.mark.parametrize("name", LIES)
def test_a_server_that_begins_to_lie_is_refused_before_its_scores_are_used(folder: Path, name: str) -> None:
    """It tells the truth of the text that comes with every request."""
    with Liar(folder, **LIES[name], **SHORT, begins=10**6, spares=CANARY.ids) as server:
        teacher = teacher_at(server.url)
        teacher.score(ScoreRequest(rollouts(), BOTH, top_k=8))
        server.begins = server.scored
        with pytest.raises(TeacherRefused, match=r"^teacher default: "):
            teacher.score(ScoreRequest(rollouts(), BOTH, top_k=8))


@pytest.mark.parametrize("name", ROWS)
def test_a_server_that_lies_about_its_draws_as_well_differs_from_the_weights(
    folder: Path, reference: Known, name: str
) -> None:
    """Without the weights some of these are the truth about another model."""
    with (
        Liar(folder, rows=ROWS[name], everywhere=True, **SHORT) as server,
        pytest.raises(TeacherRefused, match=r"^teacher default: "),
    ):
        teacher_at(server.url, reference=reference)


@pytest.mark.parametrize("name", ["rows shifted by one", "temperature 2", "log2", "stale prefix cache"])
def test_lies_over_another_api_are_no_more_silent(folder: Path, name: str) -> None:
    settings = replace(SETTINGS, kind="sglang")
    with Liar(folder, rows=ROWS[name], **SHORT, begins=10**6, spares=CANARY.ids) as server:
        teacher = teacher_at(server.url, settings)
        teacher.score(ScoreRequest(rollouts(), BOTH, top_k=8))
        server.begins = server.scored
        with pytest.raises(TeacherRefused, match=r"^teacher default: "):
            teacher.score(ScoreRequest(rollouts(), BOTH, top_k=8))
        with pytest.raises(TeacherRefused, match=r"^teacher default: "):
            teacher_at(server.url, settings)


@pytest.mark.parametrize("words", ["prefix cache", "own texts", "draws", "parity", "repeats"])
def test_what_is_wrong_is_said_with_both_numbers(folder: Path, reference: Known, words: str) -> None:
    lie, everywhere = {
        "prefix cache": ("the same row everywhere", False),
        "own texts": ("temperature 0.7", False),
        "draws": ("temperature 0.7", True),
        "parity": ("a token at the beginning", True),
        "repeats": ("noise of every answer", False),
    }[words]
    # Which other way of drawing explains 256 tokens best depends on the tokens.
    drawn = "look drawn (at temperature 1.5|from outside the top-k, mostly), by"
    said = drawn if words == "draws" else r"nats(.|\n)*\n  \w+ -\d(.|\n)*\n  \w+ -\d"
    caught = pytest.raises(TeacherRefused, match=rf"^teacher default: {words}: (.|\n)*{said}")
    with Liar(folder, rows=ROWS[lie], everywhere=everywhere, **SHORT) as server, caught:
        teacher_at(server.url, reference=reference)


@pytest.fixture
def exchanged(folder: Path) -> Iterator[tuple[Proxy, ServerTeacher, Liar]]:
    """An address, a teacher that has met who is there, and who will be there after a restart."""
    other = Liar(folder, rows=ROWS["a token at the beginning"], spares=CANARY.ids, **SHORT)
    with MiniServer(folder, **SHORT) as server, other, Proxy(server.url) as proxy:
        yield proxy, teacher_at(proxy.url), other


def test_a_server_that_comes_back_is_examined_before_it_is_believed(
    exchanged: tuple[Proxy, ServerTeacher, Liar],
) -> None:
    proxy, teacher, other = exchanged
    texts = rollouts()
    before = teacher.score(ScoreRequest(texts, BOTH, top_k=8))
    away, seen = status(503), proxy.posts
    proxy.fault = lambda n, request, reply: away(n, request, reply) if n < seen + 3 else reply
    again = teacher.score(ScoreRequest(texts, BOTH, top_k=8))
    assert all(torch.equal(a.logprobs_T, b.logprobs_T) for a, b in zip(before, again, strict=True))
    assert not teacher.pool.returned and teacher.pool.tally.failures
    seen, proxy.upstream = proxy.posts, other.url
    with pytest.raises(TeacherRefused, match=r"texts that it wrote and scored before, have other log-prob(.|\n)*now -"):
        teacher.score(ScoreRequest(texts, BOTH, top_k=8))
    proxy.fault = untouched


def test_an_address_that_was_not_met_is_examined_first(exchanged: tuple[Proxy, ServerTeacher, Liar]) -> None:
    proxy, teacher, other = exchanged
    assert teacher.watch is not None
    teacher.watch.known.clear()
    proxy.upstream = other.url
    with pytest.raises(TeacherRefused, match="own texts: "):
        teacher.score(ScoreRequest(rollouts(), BOTH, top_k=8))


def test_one_of_several_that_is_away_while_it_is_asked_again_is_examined_when_it_is_back(folder: Path) -> None:
    settings = replace(SETTINGS, deadline_seconds=0.3)
    with MiniServer(folder, **SHORT) as first:
        with MiniServer(folder, **SHORT) as second:
            urls = [first.url, second.url]
            teacher = ServerTeacher(urls, settings, vocab_size=VOCAB, canary=CANARY, top_k=8)
        assert teacher.watch is not None
        teacher.watch.check(urls, set(), [], 8)
        assert set(teacher.watch.known) == {first.url}, "the other one was not met, as it were"
        with pytest.raises(TeacherUnavailable):
            teacher_at(second.url, settings)


def test_one_answer_in_five_that_is_another_rollouts_is_found_within_some_batches(folder: Path) -> None:
    """Each batch asks again about one of its own rollouts: the known texts alone would not see it."""

    class Mixed(Liar):
        def logprobs(self, ids: list[int]) -> torch.Tensor:
            told_TV = super().logprobs(ids)
            known = self.watched is not None and tuple(ids) in self.watched
            return told_TV.roll(2, 0) if self.lies and not known and sum(ids) % 5 == 0 else told_TV

        watched: Any = None

    with Mixed(folder, begins=10**6, spares=CANARY.ids, **SHORT) as server:
        teacher = teacher_at(server.url)
        assert teacher.watch is not None
        server.watched = {text for known in teacher.watch.known.values() for text in known.texts} | {CANARY.ids}
        server.begins = server.scored
        with pytest.raises(TeacherRefused, match=r"asked about again, have other|position \d+"):
            for seed in range(100):
                teacher.score(ScoreRequest(some_rollouts(VOCAB, [(4, 16)] * 6, seed=100 * seed), BOTH, top_k=8))


def test_no_step_is_trained_on_lies_that_begin_during_a_run(tmp_path: Path) -> None:
    world = write_models(tmp_path, teacher=tiny_model(seed=1, tied=True))
    with Liar(world / "teacher", rows=ROWS["rows shifted back"], begins=10**6) as server:
        server.begins = 150
        with pytest.raises(TeacherError, match="teacher default: "):
            train(run_of(world, steps=20, teacher={"servers": [server.url]}))
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    assert 1 < len(lines) < 20


@pytest.mark.parametrize(("dtype", "noise", "temperature"), [("float32", 0.01, 0.99), ("auto", 0.2, 0.85)])
def test_the_smallest_lies_that_are_refused(folder: Path, dtype: str, noise: float, temperature: float) -> None:
    """An eighth of each passes: it is within the noise that the precision is allowed."""
    for lie, half in ((noisy(noise), noisy(noise / 8)), (scaled(temperature), scaled(1 - (1 - temperature) / 8))):
        with Liar(folder, rows=lie, **SHORT) as server, pytest.raises(TeacherRefused, match="own texts"):
            teacher_at(server.url, dtype=dtype)
        with Liar(folder, rows=half, **SHORT) as server:
            teacher_at(server.url, dtype=dtype)


class Half(MiniServer):
    """Its logits are rounded to bfloat16, up or down as it happens to be, when it draws and whenever it scores."""

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        return rounded(super().logprobs(ids))

    def drawn_from(self, ids: list[int]) -> torch.Tensor:
        return rounded(super().drawn_from(ids))


def rounded(logprobs_TV: torch.Tensor) -> torch.Tensor:
    logits_TV = logprobs_TV - logprobs_TV.mean(-1, keepdim=True)
    step_TV = 2.0 ** (logits_TV.abs().clamp_min(1e-3).log2().floor() - 7)
    return (logits_TV + step_TV * (torch.rand_like(step_TV) - 0.5)).bfloat16().float().log_softmax(-1)


@pytest.mark.parametrize(("kind", "dtype"), [(MiniServer, "float32"), (MiniServer, "auto"), (Half, "bfloat16")])
def test_an_honest_server_is_never_refused(folder: Path, reference: Known, kind: type[MiniServer], dtype: str) -> None:
    with kind(folder, **SHORT) as server:
        for seed in range(4):
            teacher = teacher_at(server.url, dtype=dtype, reference=reference)
            for lengths in ([(1, 1)], [(4, 16)] * 6):
                teacher.score(ScoreRequest(some_rollouts(VOCAB, lengths, seed=seed), BOTH, top_k=8))
