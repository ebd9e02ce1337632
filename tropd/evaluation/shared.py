"""An evaluation that several processes share: each answers a part of the prompts, all know the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tropd.config.stages import EvalConfig
from tropd.distributed.ranks import Ranks
from tropd.evaluation.progress import item_of, row_of
from tropd.evaluation.results import EvalResult, summarize
from tropd.evaluation.runner import evaluate
from tropd.types import Prompt


def evaluate_together(
    world: Ranks, engine: Any, prompts: Sequence[Prompt], grader: Any, tokenizer: Any, config: EvalConfig, **how: Any
) -> EvalResult:
    """What `evaluate` gives for all prompts; a draw belongs to its prompt, so it does not matter who makes it."""
    chosen = prompts[: config.limit]
    own = world.share(chosen) if world.size > 1 else chosen
    if world.size == 1:
        return evaluate(engine, own, grader, tokenizer, config, **how)
    items = evaluate(engine, own, grader, tokenizer, config, **how).items if own else ()
    rows = [row for part in world.gather_json([row_of(item, "") for item in items]) for row in part]
    found = {row["id"]: item_of(row) for row in rows}
    return summarize([found[prompt.id] for prompt in chosen], config)
