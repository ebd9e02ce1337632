from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import byte_tokenizer
from tropd.config.stages import DataConfig
from tropd.data.stream import LazyPromptStream, PromptStream
from tropd.errors import DataError
from tropd.types import Prompt

PROMPTS = [Prompt(id=f"p{number}", token_ids=(number,)) for number in range(7)]


def names(drawn: list[tuple[Prompt, int]]) -> list[str]:
    return [f"{visit}/{prompt.id}" for prompt, visit in drawn]


def lazy(folder: Path, num_rows: int = 7, **knobs: Any) -> LazyPromptStream:
    """`num_rows` prompts, with an empty row and a duplicate among them."""
    rows = [{"prompt": f"p{number}"} for number in range(num_rows)]
    rows[2:2] = [{"prompt": ""}, {"prompt": "p0"}]
    path = folder / f"{num_rows}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return LazyPromptStream(DataConfig(path=str(path), streaming=True, **knobs), byte_tokenizer())


@pytest.mark.parametrize("num_prompts", [1, 3, 7, 10])
def test_every_epoch_holds_every_prompt_once_whatever_is_asked_at_a_time(num_prompts: int) -> None:
    stream = PromptStream(PROMPTS, seed=0)
    drawn: list[str] = []
    while len(drawn) < 30:
        drawn += names(stream.next(num_prompts))
    assert drawn[:21] == names(PromptStream(PROMPTS, seed=0).next(21)), "the size of a batch does not change the order"
    for epoch in range(3):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == [f"{epoch}/p{number}" for number in range(7)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    epochs = [tuple(prompt.id for prompt, _ in PromptStream(PROMPTS, seed=seed).next(21)) for seed in (0, 1)]
    orders = {order[start : start + 7] for order in epochs for start in (0, 7, 14)}
    assert len(orders) == 6


def test_every_place_is_equally_likely() -> None:
    """Over 4000 epochs, each of 7 prompts is at each of 7 places 571 times, give or take five deviations of 22."""
    stream, counts = PromptStream(PROMPTS, seed=0), torch.zeros(7, 7)
    for _ in range(4000):
        for place, (prompt, _) in enumerate(stream.next(7)):
            counts[prompt.token_ids[0], place] += 1
    assert (counts - 4000 / 7).abs().max() < 5 * 22.2


def test_the_order_neither_reads_nor_moves_the_global_generators() -> None:
    torch.manual_seed(1)
    random.seed(1)
    expected = (torch.rand(()).item(), random.random())
    torch.manual_seed(1)
    random.seed(1)
    first = names(PromptStream(PROMPTS, seed=0).next(20))
    assert (torch.rand(()).item(), random.random()) == expected
    assert names(PromptStream(PROMPTS, seed=0).next(20)) == first


def test_the_order_does_not_depend_on_the_data_sets() -> None:
    assert names(PromptStream(PROMPTS[::-1], seed=0).next(20)) == names(PromptStream(PROMPTS, seed=0).next(20))


@pytest.mark.parametrize("num_prompts", [1, 2, 3])
def test_a_stream_restored_at_any_step_of_three_epochs_goes_on_as_if_nothing_had_happened(num_prompts: int) -> None:
    stream, states, drawn = PromptStream(PROMPTS, seed=3), [], []
    for _ in range(24 // num_prompts):
        states.append(json.loads(json.dumps(stream.state_dict())))
        drawn.append(names(stream.next(num_prompts)))
    for step, state in enumerate(states):
        restored = PromptStream(PROMPTS, seed=3)
        restored.next(5)
        restored.load_state_dict(state)
        assert restored.state_dict() == state
        assert [names(restored.next(num_prompts)) for _ in drawn[step:]] == drawn[step:]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (PromptStream(PROMPTS[:-1], seed=0), "num_prompts 6"),
        (PromptStream([*PROMPTS[:-1], Prompt(id="new", token_ids=(1,))], seed=0), "fingerprint"),
        (PromptStream([*PROMPTS[:-1], replace(PROMPTS[-1], token_ids=(1,))], seed=0), "fingerprint"),
        (PromptStream([*PROMPTS[:-1], replace(PROMPTS[-1], teacher="other")], seed=0), "fingerprint"),
        (PromptStream([*PROMPTS[:-1], replace(PROMPTS[-1], answer="other")], seed=0), "fingerprint"),
        (PromptStream([*PROMPTS[:-1], replace(PROMPTS[-1], columns={"entry": 1})], seed=0), "fingerprint"),
        (PromptStream([*PROMPTS[:-1], replace(PROMPTS[-1], told={"teacher": (1,)})], seed=0), "sources of briefings"),
        (PromptStream(PROMPTS, seed=1), "seed 1"),
    ],
)
def test_a_state_of_another_stream_is_refused(other: PromptStream, says: str) -> None:
    with pytest.raises(DataError, match=says):
        PromptStream(PROMPTS, seed=0).load_state_dict(other.state_dict())


def test_a_state_that_is_none_is_refused() -> None:
    stream = PromptStream(PROMPTS, seed=0)
    with pytest.raises(DataError, match="lacks fingerprint"):
        stream.load_state_dict({"visit": 0})
    with pytest.raises(DataError, match="nowhere"):
        stream.load_state_dict({**stream.state_dict(), "position": 8})


def test_a_stream_needs_prompts_with_ids_of_their_own() -> None:
    with pytest.raises(DataError, match="there are none"):
        PromptStream([], seed=0)
    with pytest.raises(DataError, match="2 prompts have the id 'p3'"):
        PromptStream([*PROMPTS, PROMPTS[3]], seed=0)
    with pytest.raises(DataError, match="at least one"):
        PromptStream(PROMPTS, seed=0).next(0)


def test_a_lazy_stream_gives_the_rows_in_order_and_counts_the_others_once(tmp_path: Path) -> None:
    stream = lazy(tmp_path)
    texts = [(prompt.messages[0].content, visit) for prompt, visit in stream.next(16)]
    assert texts == [(f"p{number % 7}", number // 7) for number in range(16)]
    assert stream.report.skipped == {"empty": 1, "duplicate": 1} and stream.report.num_prompts == 7


def test_a_lazy_stream_renders_only_what_is_asked_for(tmp_path: Path) -> None:
    stream = lazy(tmp_path)
    stream.next(2)
    assert stream.report.num_rows == 2


def test_a_lazy_stream_restored_at_any_step_goes_on_with_its_report(tmp_path: Path) -> None:
    stream, states, drawn = lazy(tmp_path), [], []
    for _ in range(21):
        states.append(json.loads(json.dumps(stream.state_dict())))
        drawn += names(stream.next(1))
    for step, state in enumerate(states):
        restored = lazy(tmp_path)
        restored.load_state_dict(state)
        assert restored.report.num_prompts == min(step, 7), "of the first epoch, whichever this one is"
        assert names(restored.next(21 - step)) == drawn[step:]
        assert restored.report == stream.report


@pytest.mark.parametrize("knobs", [{}, {"limit": 4}])
def test_a_lazy_stream_refuses_a_state_of_other_rows(tmp_path: Path, knobs: dict[str, Any]) -> None:
    stream, other = lazy(tmp_path), lazy(tmp_path, **knobs)
    stream.next(6)
    (tmp_path / "7.jsonl").write_text("\n".join(json.dumps({"prompt": f"q{number}"}) for number in range(9)))
    with pytest.raises(DataError, match="had read 6 prompts that are not the first ones"):
        other.load_state_dict(stream.state_dict())


def test_a_lazy_stream_refuses_bad_rows_when_it_meets_them(tmp_path: Path) -> None:
    stream = lazy(tmp_path, on_bad_row="refuse")
    assert len(stream.next(2)) == 2
    with pytest.raises(DataError, match="1 empty: row 3"):
        stream.next(1)
