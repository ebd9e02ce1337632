"""Scores of a text from the teacher's weights in a local folder, for comparison with its servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tropd.config.models import TeacherConfig
from tropd.errors import ConfigError
from tropd.model.loading import free_memory, load_model
from tropd.servers.answers import Scored
from tropd.teachers.audit import Known

_NUM_TEXTS, _NUM_TOKENS = 4, 24
QUICK_BYTES = 8e9
"""Largest weights that a run reads at its start for this comparison."""


def reference_of(
    config: TeacherConfig, text: Sequence[int], top_k: int, most_bytes: float = QUICK_BYTES
) -> Known | None:
    """Scores of pieces of the text, from a forward pass in this process.  None if the weights are in no local folder,
    are too large, or do not fit into memory as float32."""
    files = list(Path(config.path).glob("*.safetensors")) if Path(config.path).is_dir() else []
    size, free = sum(file.stat().st_size for file in files), free_memory(torch.device("cpu"))
    if not files or size > most_bytes or (free is not None and 4 * size > free) or len(text) < 2:
        return None
    try:
        model = load_model(config, "teacher", torch.device("cpu"))
    except ConfigError:  # an architecture that only the server knows
        return None
    size = min(_NUM_TOKENS, len(text))
    texts = [tuple(text[start : start + size]) for start in _starts(len(text) - size)]
    ids_ST = torch.tensor(texts)
    with torch.no_grad():
        logprobs_STV = model(ids_ST).logits[:, :-1].float().log_softmax(-1)
    own_ST = logprobs_STV.gather(2, ids_ST[:, 1:, None])[..., 0]
    top = logprobs_STV.topk(min(max(top_k, 1), logprobs_STV.shape[-1]))
    rows = [
        Scored(logprobs=own_T.tolist(), topk_ids_TK=ids_TK.tolist(), topk_logprobs_TK=top_TK.tolist())
        for own_T, ids_TK, top_TK in zip(own_ST, top.indices, top.values, strict=True)
    ]
    return Known(texts=texts, first=1, rows=rows)


def _starts(last: int) -> list[int]:
    """Where to cut texts from a longer one."""
    return [last * n // (_NUM_TEXTS - 1) for n in range(_NUM_TEXTS)]
