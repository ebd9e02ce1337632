"""What the teacher's own weights make of a text, where they are at hand: what its servers are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tropd.config import TeacherConfig
from tropd.errors import ConfigError
from tropd.servers.vllm import Scored
from tropd.student.models import free_memory, load_model
from tropd.teachers.audit import Known

QUICK_BYTES = 8e9
"""Weights that a run reads at its start for this alone."""


def reference_of(
    config: TeacherConfig, text: Sequence[int], top_k: int, most_bytes: float = QUICK_BYTES
) -> Known | None:
    """A forward pass in this process.  None where the weights are in no local folder, are too many, or do not fit into
    memory as float32."""
    files = list(Path(config.path).glob("*.safetensors")) if Path(config.path).is_dir() else []
    size, free = sum(file.stat().st_size for file in files), free_memory(torch.device("cpu"))
    if not files or size > most_bytes or (free is not None and 4 * size > free) or len(text) < 2:
        return None
    try:
        model = load_model(config, "teacher", torch.device("cpu"))
    except ConfigError:  # an architecture that only the server knows
        return None
    ids = torch.tensor([list(text)])
    with torch.no_grad():
        logprobs_TV = model(ids).logits[0, :-1].float().log_softmax(-1)
    top = logprobs_TV.topk(min(max(top_k, 1), logprobs_TV.shape[1]))
    rows = Scored(
        logprobs=logprobs_TV.gather(1, ids[0, 1:, None])[:, 0].tolist(),
        topk_ids_TK=top.indices.tolist(),
        topk_logprobs_TK=top.values.tolist(),
    )
    return Known(texts=[tuple(text)], first=1, rows=[rows])
