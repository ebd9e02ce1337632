"""An evaluation that several processes share: each answers a part of the prompts, and all get the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tropd.config.stages import EvalConfig
from tropd.data.graders import Grader
from tropd.distributed.ranks import Ranks
from tropd.evaluation.progress import item_of, row_of
from tropd.evaluation.results import EvalResult, summarize
from tropd.evaluation.runner import evaluate
from tropd.rollout.engine import Engine
from tropd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate_together(
    world: Ranks,
    engine: Engine,
    prompts: Sequence[Prompt],
    grader: Grader | None,
    tokenizer: PreTrainedTokenizerBase,
    config: EvalConfig,
    *,
    stop_ids: tuple[int, ...] = (),
    version: int | str = 0,
) -> EvalResult:
    """What `evaluate` gives for all prompts; a draw belongs to its prompt, so it does not matter who makes it."""

    def answers(share: Sequence[Prompt]) -> EvalResult:
        return evaluate(engine, share, grader, tokenizer, config, stop_ids=stop_ids, version=version)

    chosen = prompts[: config.limit]
    if world.size == 1:
        return answers(chosen)
    share = world.share(chosen)
    items = answers(share).items if share else ()
    rows = [row for part in world.gather_json([row_of(item, "") for item in items]) for row in part]
    by_id = {row["id"]: item_of(row) for row in rows}
    return summarize([by_id[prompt.id] for prompt in chosen], config)
