"""Every kind of server says itself what it can and cannot do, and nobody else asks which kind it is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest

from tropd.config.models import ServerConfig
from tropd.errors import ServerRefused
from tropd.objective.evidence import Needs
from tropd.servers.dialect import Dialect
from tropd.servers.dialects import DIALECTS, dialect_of
from tropd.servers.pool import Job
from tropd.types import Message, Request

REQUEST = Request(token_ids=(1, 2), max_new_tokens=3, seed=4)
TROPD = Path(__file__).parents[2] / "tropd"


def test_every_kind_of_a_run_file_has_its_dialect() -> None:
    kinds = get_type_hints(ServerConfig)["kind"].__args__
    assert set(kinds) == set(DIALECTS)
    assert all(dialect_of(replace(ServerConfig(), kind=kind)).kind == kind for kind in kinds)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
def test_what_a_dialect_cannot_do_has_its_sentence(dialect: Dialect) -> None:
    assert bool(dialect.no_scores) == (dialect.capabilities == Needs.NOTHING)
    assert bool(dialect.no_weights) == (dialect.weights is None)
    for refusal, ask in (
        (dialect.no_scores, lambda: dialect.score_job("name", "model", [[1, 2, 3]], [1], 2)),
        (dialect.no_texts, lambda: dialect.text_job("name", "model", REQUEST)),
        (dialect.no_texts, lambda: dialect.own_text_job("name", "model", REQUEST, 2)),
    ):
        if refusal:
            assert re.fullmatch(r".+\.", refusal)
            with pytest.raises(ServerRefused, match=re.escape(refusal)):
                ask()
        else:
            assert ask().num_tokens >= 4 and ask().body is not None
    assert dialect.chat_job("name", "model", [Message(role="user", content="hello")], REQUEST).path.startswith("/v1/")


def test_a_job_goes_on_with_what_was_read() -> None:
    job = Job(name="n", path="/p", read=lambda answer, request_id: (answer, request_id))
    assert job.then(len).then(str).read(b"x", "id") == "2"


def test_nobody_but_the_list_of_dialects_looks_at_the_kind() -> None:
    looks = re.compile(r"(settings|server)\.kind (==|!=|in|not)|\[(settings|config\.server)\.kind\]")
    found = [path.name for path in TROPD.rglob("*.py") if looks.search(path.read_text())]
    assert found == ["dialects.py"]
