import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import byte_tokenizer, tiny_model
from tropd.errors import ConfigError, DataError, EngineError
from tropd.evaluation.runner import EvalConfig, EvalResult, evaluate
from tropd.rollout.scripted import ScriptedEngine
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Completion, Finish, Prompt, Request, Sampling

TOKENIZER = byte_tokenizer()
STOP = TOKENIZER.eos_token_id


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def contains(prompts: Any, completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    return [float(right in text) for right, text in zip(answer, completions, strict=True)]


PROMPTS = tuple(Prompt(id=f"p{i}", token_ids=tuple(encode(f"Q{i}?")), answer=str(i)) for i in range(6))


def clever(request: Request) -> list[int]:
    """Right on even prompts, wrong on odd ones; the greedy answer is always right."""
    i = int(TOKENIZER.decode(list(request.token_ids))[1])
    right = i % 2 == 0 or request.sampling.temperature == 0.0
    return encode(f"it is {i if right else 'unknown'}")


def by_seed(request: Request) -> list[int]:
    """Depends on the seed alone, as a sampler does: right three times in four."""
    i = TOKENIZER.decode(list(request.token_ids))[1]
    rng = random.Random(request.seed)
    return encode((i if rng.random() < 0.75 else "x") + "!" * rng.randrange(4))


def run(engine: Any, config: EvalConfig, prompts: Sequence[Prompt] = PROMPTS, **options: Any) -> EvalResult:
    options = {"stop_ids": (STOP,), **options}
    return evaluate(engine, prompts, contains, TOKENIZER, config, **options)


def test_scores_lengths_and_settings_by_hand() -> None:
    result = run(ScriptedEngine(clever), EvalConfig(num_samples=4, pass_k=(1, 2), max_new_tokens=10))
    assert result.mean == 0.5 and result.pass_at == {1: 0.5, 2: 0.5} and result.greedy == 1.0
    assert result.greedy_interval == (1.0, 1.0)
    # "it is 0" and the stop token are 8 tokens; "it is unknown" is cut at 10
    assert result.mean_length == (8 + 10) / 2 and result.truncated == 0.5
    low, high = result.interval or (0.0, 0.0)
    assert 0.0 <= low < 0.5 < high <= 1.0
    settings = "T=1, top_p=1, 10 tokens, 6 prompts"
    assert result.describe().splitlines() == [
        f"avg@4 0.500 [{low:.2f}, {high:.2f}] ({settings})",
        f"pass@1 0.500 (4 samples, {settings})",
        f"pass@2 0.500 (4 samples, {settings})",
        "greedy 1.000 [1.00, 1.00] (T=0, 10 tokens, 6 prompts)",
        f"length 9.0 tokens, 50.0% truncated ({settings})",
    ]
    summary = result.summary()
    assert summary["avg@4"] == 0.5 and summary["avg@4/low"] == low and summary["greedy"] == 1.0
    assert summary["num_prompts"] == 6 and summary["finish/truncated"] == 0.5 and summary["pass@2"] == 0.5


def test_unusual_sampling_is_said_beside_the_number() -> None:
    sampling = Sampling(temperature=0.6, top_p=0.95, top_k=20, min_p=0.05)
    result = run(ScriptedEngine(clever), EvalConfig(sampling=sampling, greedy=False))
    assert "(T=0.6, top_p=0.95, top_k=20, min_p=0.05, 256 tokens, 6 prompts)" in result.describe()
    assert result.greedy is None and "greedy" not in result.summary()


def test_pass_at_k_takes_a_graded_score_as_correct_from_the_threshold_on() -> None:
    def half(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:
        return [0.5 for _ in completions]

    for correct_from, expected in ((1.0, 0.0), (0.5, 1.0)):
        config = EvalConfig(correct_from=correct_from)
        assert evaluate(ScriptedEngine(clever), PROMPTS, half, TOKENIZER, config).pass_at == {1: expected}


def test_without_a_grader_there_are_lengths_and_no_score() -> None:
    result = evaluate(ScriptedEngine(clever), PROMPTS, None, TOKENIZER, EvalConfig(), stop_ids=(STOP,))
    assert result.mean is None and result.greedy is None and result.pass_at == {}
    assert set(result.summary()) == {"length/mean", "finish/truncated", "num_prompts"}
    assert result.describe().startswith("length 11.0 tokens")


def test_a_prompts_draws_depend_on_nothing_but_seed_prompt_and_sample() -> None:
    config = EvalConfig(num_samples=3, prompts_per_call=64)
    whole = run(ScriptedEngine(by_seed), config)
    piecewise = run(ScriptedEngine(by_seed), replace(config, prompts_per_call=1), PROMPTS[::-1])
    alone = run(ScriptedEngine(by_seed), config, PROMPTS[3:4])
    assert {item.id: item for item in whole.items} == {item.id: item for item in piecewise.items}
    assert alone.items == whole.items[3:4]
    assert run(ScriptedEngine(by_seed), replace(config, seed=1)).items != whole.items
    engine = ScriptedEngine(by_seed)
    run(engine, config)
    assert len({request.seed for request in engine.requests}) == len(engine.requests) == 6 * 4


def test_no_global_random_state_is_moved() -> None:
    import numpy as np

    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    run(ScriptedEngine(by_seed), EvalConfig())
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index]


def test_a_real_model_in_process_gives_the_same_numbers_twice_and_greedy_is_its_likeliest_text() -> None:
    model = tiny_model(vocab=len(TOKENIZER))
    config = EvalConfig(num_samples=2, max_new_tokens=8)
    first = run(TransformersEngine(model), config, PROMPTS[:3])
    again = run(TransformersEngine(model, max_batch=1), config, PROMPTS[:3])
    assert first == again
    context = torch.tensor([PROMPTS[0].token_ids])
    likeliest = model.generate(
        context,
        attention_mask=torch.ones_like(context),
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=STOP,
        pad_token_id=0,
    )[0, context.shape[1] :]
    assert first.items[0].greedy is not None
    assert first.items[0].greedy.text == TOKENIZER.decode(likeliest, skip_special_tokens=True)
    assert {answer.text for item in first.items for answer in item.samples} != {""}


def test_one_json_line_per_prompt(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "evaluation.jsonl"
    run(ScriptedEngine(clever), EvalConfig(num_samples=2), progress_path=path)
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["kind"] == "tropd evaluation" and header["settings"]["num_samples"] == 2
    assert [row["id"] for row in rows] == [prompt.id for prompt in PROMPTS]
    assert rows[1]["texts"] == ["it is unknown"] * 2 and rows[1]["scores"] == [0.0, 0.0]
    assert rows[1]["greedy"] == {"text": "it is 1", "score": 1.0, "num_tokens": 8, "finish": "stop"}


class Tired(ScriptedEngine):
    """Fails from its n-th call on."""

    def __init__(self, num_calls: int) -> None:
        super().__init__(by_seed)
        self.num_calls = num_calls

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.num_calls -= 1
        if self.num_calls < 0:
            raise EngineError("out of memory")
        return super().generate(requests)


@pytest.mark.parametrize("torn", [b"", b'{"id": "p2", "texts": ["half an \xc3'])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path: Path, torn: bytes) -> None:
    path, config = tmp_path / "evaluation.jsonl", EvalConfig(prompts_per_call=1)
    expected = run(ScriptedEngine(by_seed), config)
    with pytest.raises(EngineError):
        run(Tired(2), config, progress_path=path)
    path.write_bytes(path.read_bytes() + torn)
    engine = ScriptedEngine(by_seed)
    assert run(engine, config, progress_path=path) == expected
    assert {request.token_ids for request in engine.requests} == {prompt.token_ids for prompt in PROMPTS[2:]}
    assert len(path.read_text().splitlines()) == 1 + len(PROMPTS)
    again = ScriptedEngine(by_seed)
    assert run(again, config, progress_path=path) == expected and again.requests == []


def test_what_only_reads_the_answers_may_change_between_runs(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    run(ScriptedEngine(by_seed), EvalConfig(limit=2), progress_path=path)
    engine = ScriptedEngine(by_seed)
    result = run(engine, EvalConfig(limit=3, pass_k=(1, 4)), progress_path=path)
    assert len(engine.requests) == 5 and len(result.items) == 3 and set(result.pass_at) == {1, 4}


def test_other_weights_or_another_prompt_are_generated_anew(tmp_path: Path) -> None:
    path, config = tmp_path / "evaluation.jsonl", EvalConfig(greedy=False)
    run(ScriptedEngine(by_seed), config, progress_path=path, version=1)
    for version, prompts, expected in (
        (2, PROMPTS, 24),
        (1, PROMPTS, 0),
        (2, PROMPTS, 0),
        (1, (replace(PROMPTS[0], answer="7"), *PROMPTS[1:]), 4),
        (1, (replace(PROMPTS[0], columns={"hint": 1}), *PROMPTS[1:]), 4),
        (1, (replace(PROMPTS[0], token_ids=tuple(encode("R0?"))), *PROMPTS[1:]), 4),
    ):
        engine = ScriptedEngine(by_seed)
        run(engine, config, prompts, progress_path=path, version=version)
        assert len(engine.requests) == expected


@pytest.mark.parametrize(
    "change, said",
    [
        ({"max_new_tokens": 128}, "max_new_tokens was 256, now 128"),
        ({"seed": 5}, "seed was 0, now 5"),
        ({"sampling": Sampling(top_p=0.9)}, r"sampling.top_p was 1.0, now 0.9"),
    ],
)
def test_a_file_of_another_configuration_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "evaluation.jsonl"
    run(ScriptedEngine(by_seed), EvalConfig(), progress_path=path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=said):
        run(ScriptedEngine(by_seed), EvalConfig(**change), progress_path=path)
    with pytest.raises(ConfigError, match="stop_ids was"):
        run(ScriptedEngine(by_seed), EvalConfig(), progress_path=path, stop_ids=())
    with pytest.raises(ConfigError, match="grader was"):
        evaluate(ScriptedEngine(by_seed), PROMPTS, None, TOKENIZER, EvalConfig(), stop_ids=(STOP,), progress_path=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["my notes, without a line end", '{"a": 1}\n', '[1]\n{"id": "p0"}\n'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match="not such a file"):
        run(ScriptedEngine(by_seed), EvalConfig(), progress_path=path)
    assert path.read_text() == content


def test_a_foreign_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    run(ScriptedEngine(by_seed), EvalConfig(), progress_path=path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "garbage", *lines[2:]]) + "\n")
    with pytest.raises(DataError, match="line 3 of"):
        run(ScriptedEngine(by_seed), EvalConfig(), progress_path=path)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"num_samples": 2, "pass_k": (1, 4)}, "pass@4 was asked of 2 samples.*num_samples to at least 4"),
        ({"sampling": Sampling(temperature=0.0)}, "4 samples were asked at temperature 0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"limit": 0}, "limit = 0"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EvalConfig(**options)


class Broken(ScriptedEngine):
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        completions = super().generate(requests)
        return completions[:-1] if len(completions) > 1 else [replace(completions[0], finish=Finish.ABORT)]


def test_nothing_is_scored_that_is_not_a_whole_answer() -> None:
    with pytest.raises(EngineError, match="30 completions were asked, 29 came"):
        run(Broken(by_seed), EvalConfig())
    with pytest.raises(EngineError, match="the answer to prompt 'p0' was aborted"):
        run(Broken(by_seed), EvalConfig(num_samples=1, greedy=False, limit=1))
    with pytest.raises(DataError, match="two prompts have the id 'p0'"):
        run(ScriptedEngine(by_seed), EvalConfig(), (PROMPTS[0], PROMPTS[0]))
    with pytest.raises(DataError, match="without prompts"):
        run(ScriptedEngine(by_seed), EvalConfig(), ())
    with pytest.raises(DataError, match="scored an answer to 'p0' nan"):
        evaluate(
            ScriptedEngine(by_seed),
            PROMPTS,
            lambda prompts, completions, **columns: [float("nan")] * len(prompts),
            TOKENIZER,
            EvalConfig(),
        )
    with pytest.raises(ConfigError, match="names the grader 'math'"):
        evaluate(ScriptedEngine(by_seed), PROMPTS, None, TOKENIZER, EvalConfig(grader="math"))
