"""A batch on disk, for `tropd inspect`: the batch of the step at which a run stopped.

batches/step_000012/   rollouts.jsonl    prompts, tokens, authors, log-probabilities, reward
                       tokens.safetensors  every field of Tokens
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tropd.base.reading import check_file, parse_json, read_lines
from tropd.checkpoints.checkpoint import atomic_folder
from tropd.errors import CheckpointError, ConfigError
from tropd.objective.evidence import Tokens
from tropd.training.batches import ScoredBatch
from tropd.types import Author, Finish, Message, Prompt, Rollout


def save_batch(directory: Path, step: int, batch: ScoredBatch) -> Path:
    """Keep a scored batch under the run's folder."""
    final = directory / "batches" / f"step_{step:06d}"
    tensors: dict[str, Tensor] = {}
    for f in dataclasses.fields(Tokens):
        value = batch.tokens.peek(f.name)
        if isinstance(value, Tensor):
            tensors[f.name] = value.detach().cpu().clone().contiguous()  # safetensors refuses views of one storage
    facts = {"measured": str(batch.measured), "vocab_size": str(batch.tokens.peek("vocab_size") or "")}
    with atomic_folder(final) as folder:
        save_file(tensors, folder / "tokens.safetensors", metadata=facts)
        lines = [json.dumps(dataclasses.asdict(r), default=str) for r in batch.rollouts]
        (folder / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    return final


def load_batch(directory: Path, step: int) -> ScoredBatch:
    folder = directory / "batches" / f"step_{step:06d}"
    if not folder.is_dir():
        kept = sorted(int(p.name[5:]) for p in (directory / "batches").glob("step_*"))
        there = ", ".join(map(str, kept)) or "none"
        raise ConfigError(f"no batch of step {step} was kept in {directory}. Kept: {there}.")
    check_file(folder / "tokens.safetensors", CheckpointError)
    lines = read_lines(folder / "rollouts.jsonl", CheckpointError)
    try:
        with safe_open(folder / "tokens.safetensors", "pt") as file:
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)
            facts = file.metadata()
        if facts["vocab_size"]:
            tensors["vocab_size"] = int(facts["vocab_size"])
        rollouts = [_rollout(parse_json(line, f"line {n}", CheckpointError)) for n, line in lines]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, CheckpointError) as error:
        raise CheckpointError(f"the batch in {folder} is damaged: {error}. Run the step again to keep it.") from error
    if len(rollouts) != len(tensors["groups_S"]):
        raise CheckpointError(
            f"the batch in {folder} is damaged: it has {len(rollouts)} rollouts and the evidence of "
            f"{len(tensors['groups_S'])}. Run the step again to keep it."
        )
    return ScoredBatch(rollouts=tuple(rollouts), tokens=Tokens(**tensors), measured=facts["measured"] == "True")


def _rollout(values: dict[str, Any]) -> Rollout:
    prompt = values["prompt"]
    lists = ("token_ids", "behavior_logprobs", "model_logprobs", "policy_version")
    return Rollout(
        **{
            **values,
            **{name: tuple(values[name]) for name in lists},
            "authors": tuple(Author(a) for a in values["authors"]),
            "finish": Finish(values["finish"]),
            "prompt": Prompt(
                **{
                    **prompt,
                    "token_ids": tuple(prompt["token_ids"]),
                    "told": {name: tuple(ids) for name, ids in prompt["told"].items()},
                    "response_ids": tuple(prompt["response_ids"]),
                    "messages": tuple(Message(**m) for m in prompt["messages"]),
                }
            ),
        }
    )
