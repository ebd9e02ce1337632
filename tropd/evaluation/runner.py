"""Evaluation: sample answers, grade them, and give each score its interval.

Every draw has its own seed, made of (config.seed, prompt, sample): no other random state is read or moved, and the same
model gives the same numbers.  With a `progress_path`, each prompt is one JSON line, written as soon as it is graded, so
an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from tropd.config.stages import EvalConfig
from tropd.data.graders import Grader, grade_texts
from tropd.errors import ConfigError, DataError, EngineError
from tropd.evaluation.progress import ProgressFile, key_of_prompt
from tropd.evaluation.results import GREEDY, EvalAnswer, EvalItem, EvalResult, summarize
from tropd.rollout.engine import Engine
from tropd.types import Completion, Finish, Prompt, Request, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EvalAnswer", "EvalConfig", "EvalItem", "EvalResult", "evaluate", "summarize"]


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    grader: Grader | None,
    tokenizer: PreTrainedTokenizerBase,
    config: EvalConfig,
    *,
    stop_ids: tuple[int, ...] = (),
    progress_path: Path | None = None,
    version: int | str = 0,
) -> EvalResult:
    """Draw, grade and count the answers to every prompt; without a grader, only their lengths.

    `version` names the weights: answers in the file are taken over where version, prompt and settings are the same.
    """
    chosen = _check(prompts[: config.limit], grader, config)
    keys = {prompt.id: key_of_prompt(prompt, version) for prompt in chosen}
    progress = None
    items: dict[str, EvalItem] = {}
    if progress_path is not None:
        progress = ProgressFile(progress_path, _settings(config, grader, stop_ids))
        items = progress.read(keys)
    waiting = [prompt for prompt in chosen if prompt.id not in items]
    for start in range(0, len(waiting), config.prompts_per_call):
        part = waiting[start : start + config.prompts_per_call]
        new = _answer(engine, part, grader, tokenizer, config, stop_ids)
        if progress is not None:
            progress.append(new, keys)
        items |= {item.id: item for item in new}
    return summarize([items[prompt.id] for prompt in chosen], config)


def _check(prompts: Sequence[Prompt], grader: Grader | None, config: EvalConfig) -> Sequence[Prompt]:
    if not prompts:
        raise DataError("an evaluation was asked without prompts. Give at least one.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(
                f"two prompts have the id {prompt.id!r}; it names their draws. Give every prompt its own id."
            )
        seen.add(prompt.id)
    if config.grader is not None and grader is None:
        raise ConfigError(
            f"the evaluation names the grader {config.grader!r}, but none was handed over. "
            "Pass `resolve_grader(config.grader)`, or leave `grader` out of the configuration for lengths only."
        )
    return prompts


def _settings(config: EvalConfig, grader: Grader | None, stop_ids: tuple[int, ...]) -> dict[str, object]:
    """What an answer and its score depend on, beside the weights and the prompt."""
    name = config.grader
    if name is None and grader is not None:
        name = str(getattr(grader, "__qualname__", type(grader).__qualname__))
    sampling = {f"sampling.{f.name}": getattr(config.sampling, f.name) for f in fields(config.sampling)}
    return {
        "num_samples": config.num_samples,
        "greedy": config.greedy,
        **sampling,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "grader": name,
        "stop_ids": list(stop_ids),
    }


def _answer(
    engine: Engine,
    prompts: Sequence[Prompt],
    grader: Grader | None,
    tokenizer: PreTrainedTokenizerBase,
    config: EvalConfig,
    stop_ids: tuple[int, ...],
) -> list[EvalItem]:
    draws: list[int | str] = [*range(config.num_samples), *(["greedy"] if config.greedy else [])]
    prompt_draws = [(prompt, draw) for prompt in prompts for draw in draws]
    requests = [
        Request(
            token_ids=prompt.token_ids,
            max_new_tokens=config.max_new_tokens,
            seed=key_of(config.seed, "evaluation", prompt.id, draw),
            sampling=GREEDY if draw == "greedy" else config.sampling,
            stop_ids=stop_ids,
        )
        for prompt, draw in prompt_draws
    ]
    completions = engine.generate(requests)
    _check_completions(completions, [prompt for prompt, _ in prompt_draws])
    texts = [str(tokenizer.decode(list(done.token_ids), skip_special_tokens=True)) for done in completions]
    scores: Sequence[float | None] = [None] * len(texts)
    if grader is not None:
        scores = grade_texts(grader, [prompt for prompt, _ in prompt_draws], texts, tokenizer)
    answers = [
        EvalAnswer(text=text, num_tokens=len(done.token_ids), finish=done.finish, score=score)
        for text, done, score in zip(texts, completions, scores, strict=True)
    ]
    items = []
    for i, prompt in enumerate(prompts):
        mine = answers[i * len(draws) : (i + 1) * len(draws)]
        greedy = mine[-1] if config.greedy else None
        items.append(EvalItem(id=prompt.id, samples=tuple(mine[: config.num_samples]), greedy=greedy))
    return items


def _check_completions(completions: Sequence[Completion], prompts: Sequence[Prompt]) -> None:
    if len(completions) != len(prompts):
        raise EngineError(f"{len(prompts)} completions were asked, {len(completions)} came. The engine is at fault.")
    for completion, prompt in zip(completions, prompts, strict=True):
        if completion.finish == Finish.ABORT:
            raise EngineError(
                f"the answer to prompt {prompt.id!r} was aborted, and half an answer has no score. "
                "See the engine's log, then evaluate again: what a progress file holds is not drawn twice."
            )
