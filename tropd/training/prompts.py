"""The prompts of a run: those that it trains on, and those that it is evaluated on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tropd.config.run import Run
from tropd.config.stages import DataConfig
from tropd.data.briefer import Briefer
from tropd.data.prompts import load_prompts
from tropd.data.rows import Table
from tropd.data.stream import LazyPromptStream, PromptStream
from tropd.errors import ConfigError
from tropd.teachers.routed import share_prompts
from tropd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _limit_prompts(data: DataConfig, context: int | None, max_new_tokens: int, section: str) -> DataConfig:
    """A prompt must leave room for the response in the model's context."""
    if context is None:
        return data
    room = context - max_new_tokens
    if room < 1:
        raise ConfigError(
            f"{section}.max_new_tokens = {max_new_tokens} leaves no room for a prompt in a context of {context} "
            "tokens, the shortest of the models that read it. Lower it."
        )
    return dataclasses.replace(data, max_prompt_tokens=min(room, data.max_prompt_tokens or room))


def open_stream(
    run: Run, tokenizer: PreTrainedTokenizerBase, context: int | None, table: Table | None, briefer: Briefer
) -> tuple[PromptStream | LazyPromptStream, list[str]]:
    data = _limit_prompts(run.data, context, run.rollout.max_new_tokens, "rollout")
    if data.streaming:
        return LazyPromptStream(data, tokenizer, table, briefer), []
    loaded = load_prompts(data, tokenizer, table, briefer)
    notes, number = [f"{data.path}: {loaded.report}"], share_prompts(run, loaded.prompts)
    if run.teachers:
        notes.append("prompts for " + ", ".join(f"teacher {name!r}: {n}" for name, n in number.items()))
    if run.policy.oldest and len(loaded.prompts) <= run.rollout.num_prompts:
        notes.append(
            f"nothing is used again (replay): each step answers all {len(loaded.prompts)} prompts anew. Give more "
            "prompts, or lower rollout.num_prompts."
        )
    notes += briefer.check_lengths(loaded.prompts, run.policy.needs_teacher_text or run.policy.writes_jointly)
    return PromptStream(loaded.prompts, run.seed), notes


def read_held_out(
    run: Run, tokenizer: PreTrainedTokenizerBase, context: int | None, table: Table | None
) -> tuple[tuple[Prompt, ...], list[str]]:
    if run.evaluation.data is None:
        return (), []
    data = _limit_prompts(run.evaluation.data, context, run.evaluation.max_new_tokens, "evaluation")
    loaded = load_prompts(data, tokenizer, table)
    return loaded.prompts, [f"{run.evaluation.data.path}: {loaded.report}"]
