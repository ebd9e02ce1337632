import pytest

from tropd.errors import EngineError
from tropd.rollout.scripted import ScriptedEngine
from tropd.types import Finish, Request


def ask(
    engine: ScriptedEngine, max_new_tokens: int = 4, stop_ids: tuple[int, ...] = (9,)
) -> tuple[tuple[int, ...], Finish]:
    request = Request(token_ids=(1,), max_new_tokens=max_new_tokens, seed=0, stop_ids=stop_ids)
    [completion] = engine.generate([request])
    assert len(completion.behavior_logprobs) == len(completion.model_logprobs) == len(completion.token_ids)
    return completion.token_ids, completion.finish


@pytest.mark.parametrize(
    "script, stop_ids, written, finish",
    [
        ([5, 6], (9,), (5, 6, 9), Finish.STOP),
        ([5, 6, 9, 7], (9,), (5, 6, 9), Finish.STOP),
        ([5, 6, 8, 7], (9, 8), (5, 6, 8), Finish.STOP),
        ([5, 6, 7, 9], (9,), (5, 6, 7, 9), Finish.STOP),
        ([5, 6, 7, 8], (9,), (5, 6, 7, 8), Finish.LENGTH),
        ([5, 6, 7, 8, 9], (9,), (5, 6, 7, 8), Finish.LENGTH),
        ([5, 6], (), (5, 6), Finish.STOP),
        ([], (9,), (9,), Finish.STOP),
    ],
)
def test_a_script_ends_as_sampling_would(
    script: list[int], stop_ids: tuple[int, ...], written: tuple[int, ...], finish: Finish
) -> None:
    assert ask(ScriptedEngine(lambda request: script), stop_ids=stop_ids) == (written, finish)


def test_order_version_and_certainty() -> None:
    engine = ScriptedEngine(lambda request: [request.seed], logprob=-0.5)
    engine.sync(7)
    requests = [Request(token_ids=(1,), max_new_tokens=1, seed=seed) for seed in (3, 1, 2)]
    completions = engine.generate(requests)
    assert [completion.token_ids for completion in completions] == [(3,), (1,), (2,)]
    assert completions[0].policy_version == (7, 7) and completions[0].behavior_logprobs == (-0.5,)
    assert engine.requests == requests
    engine.close()
    with pytest.raises(EngineError, match="closed engine"):
        engine.generate(requests)
