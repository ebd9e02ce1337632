"""What a model says after tokens that were not written, each in the place of one that was.

    text        a b c d                 candidates x, y in the place of c
    one row     a b c d x y             at the positions 0 1 2 3 2 2
    x attends to a b x, y to a b y      a tree of depth one, in a mask of four axes

Families whose layers attend as such a mask says read all candidates in one pass with the text (`tropd.model.hf`); a
probe compares it with plain texts.  Other families read a text for each candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.errors import TrainingDiverged
from tropd.model import hf
from tropd.model.forward import Forward, similar_lengths
from tropd.model.head import causal_lm_of, differ
from tropd.objective.support import NOTHING
from tropd.types import Author, Prompt, Rollout

_FEWEST = 512
"""A row holds as many candidates as its text has tokens, but at least so many: its mask grows with the square."""


@dataclass(frozen=True, eq=False)
class Branches:
    """Candidates beside one text."""

    text: tuple[int, ...]
    index: int
    """The rollout's."""
    rows_M: Tensor
    """Which of its response tokens each candidate replaces."""
    columns_M: Tensor
    """Which of the candidates it is."""
    places_M: Tensor
    """Where in the text it would stand."""
    ids_M: Tensor


Pass = tuple[bool, list[Branches]]
"""Whether one pass reads the branches as a tree, and which."""


def passes_of(
    rollouts: Sequence[Rollout], candidates_TJ: Sequence[Tensor], forward: Forward, trees: bool
) -> list[Pass]:
    """The forward passes that read all candidates (-1 is none)."""
    branches = []
    for index, (rollout, ids_TJ) in enumerate(zip(rollouts, candidates_TJ, strict=True)):
        ids_TJ = ids_TJ.cpu()
        rows, columns = (ids_TJ >= 0).nonzero(as_tuple=True)
        most = max(len(rollout.token_ids), _FEWEST) if trees else 1
        for rows_M, columns_M in zip(rows.split(most), columns.split(most), strict=True):
            if len(rows_M):
                places_M = rows_M + len(rollout.prompt.token_ids)
                text = rollout.token_ids if trees else rollout.token_ids[: int(places_M[0])]
                branches.append(Branches(text, index, rows_M, columns_M, places_M, ids_TJ[rows_M, columns_M]))
    lengths = [len(part.text) + len(part.ids_M) for part in branches]
    batches = similar_lengths(lengths, forward.tiling.tokens_per_batch)
    return [(trees, [branches[i] for i in batch]) for batch in batches]


@torch.no_grad()
def look_ahead(forward: Forward, passes: Sequence[Pass], candidates_TJ: Sequence[Tensor]) -> list[Tensor]:
    """Per rollout [T, J]: the log-probability of the likeliest next token after each candidate, else NOTHING."""
    like = forward.head.weight_VH
    dtype = torch.promote_types(like.dtype, torch.float32)
    found = [torch.full(ids_TJ.shape, NOTHING, dtype=dtype, device=like.device) for ids_TJ in candidates_TJ]
    for trees, part in passes:
        with forward.resting():
            states = _of_tree(forward, part) if trees else _of_texts(forward, part)
            nobody = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
            read = forward.head.read(states, nobody, forward.tiling.tile_tokens, top_k=1)
        if not bool(read["log_z"].isfinite().all()):
            name = type(forward.model).__name__
            raise TrainingDiverged(f"{name} gives logits that are not finite after a candidate. Check its weights.")
        sure = read["topk"][:, 0].to(dtype).split([len(branches.ids_M) for branches in part])
        for branches, sure_M in zip(part, sure, strict=True):
            found[branches.index][branches.rows_M, branches.columns_M] = sure_M
    return found


def takes_branches(forward: Forward) -> bool:
    """Whether this model reads branches in one pass, as if each stood in a text of its own."""
    base = causal_lm_of(forward.model)
    if not hf.windows_of(base):
        return False
    size = forward.vocab_size
    rollouts = [_text(tuple(i % size for i in range(start, start + length)), 2) for start, length in ((1, 7), (3, 4))]
    ids = [torch.tensor([[1, 2], [3, 4]]) % size] * len(rollouts)
    try:
        tree, plain = (
            torch.cat(look_ahead(forward, passes_of(rollouts, ids, forward, trees), ids)) for trees in (True, False)
        )
        if not differ(tree, plain):
            return True
        problem: Exception | str = "it reads branches otherwise"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a release that takes masks otherwise may raise
        problem = error
    hf.step_aside(f"{type(base).__name__} reads a text for each candidate", problem)
    return False


def _of_tree(forward: Forward, part: Sequence[Branches]) -> Tensor:
    """The states at all candidates, from one pass over texts with their branches."""
    width = max(len(x.text) for x in part)
    whole = width + max(len(x.ids_M) for x in part)
    ids_BQ, places_BQ = torch.zeros(len(part), whole, dtype=torch.long), torch.arange(whole).repeat(len(part), 1)
    kind_BQ = torch.full((len(part), whole), -1)  # 0: of the text, 1: a candidate, -1: filling
    for b, x in enumerate(part):
        ids_BQ[b, : len(x.text)], kind_BQ[b, : len(x.text)] = torch.tensor(x.text), 0
        there = slice(width, width + len(x.ids_M))
        ids_BQ[b, there], places_BQ[b, there], kind_BQ[b, there] = x.ids_M, x.places_M, 1
    device, dtype = forward.head.weight_VH.device, forward.head.weight_VH.dtype
    places_BQ, kind_BQ = places_BQ.to(device), kind_BQ.to(device)
    windows = hf.windows_of(causal_lm_of(forward.model))
    masks = {kind: _added(places_BQ, kind_BQ, window, dtype) for kind, window in windows.items()}
    output = forward.run_backbone(
        input_ids=ids_BQ.to(device),
        attention_mask=masks.get("", masks),
        position_ids=torch.where(kind_BQ < 0, 0, places_BQ),
        use_cache=False,
    )
    return output[0][kind_BQ == 1]


def _added(places_BQ: Tensor, kind_BQ: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """The additive mask [B, 1, Q, K]: everyone looks at the text before it and at itself."""
    queries_BQ1, keys_B1K = places_BQ[:, :, None], places_BQ[:, None, :]
    looks_BQK = (keys_B1K < queries_BQ1) & (kind_BQ[:, None, :] == 0) & (kind_BQ[:, :, None] >= 0)
    if window is not None:
        looks_BQK &= keys_B1K > queries_BQ1 - window
    looks_BQK |= torch.eye(places_BQ.shape[1], dtype=torch.bool, device=places_BQ.device)
    added_BQK = torch.zeros(looks_BQK.shape, dtype=dtype, device=places_BQ.device)
    return added_BQK.masked_fill_(~looks_BQK, torch.finfo(dtype).min)[:, None]


def _of_texts(forward: Forward, part: Sequence[Branches]) -> Tensor:
    """The same states, from a text for each candidate."""
    texts = [(*x.text, *x.ids_M.tolist()) for x in part]
    ends = torch.tensor([len(text) - 1 for text in texts])
    ids_BT = torch.zeros(len(texts), int(ends.max()) + 1, dtype=torch.long)
    for ids_T, text in zip(ids_BT, texts, strict=True):
        ids_T[: len(text)] = torch.tensor(text)
    states_BTH = forward.run_backbone(input_ids=ids_BT.to(forward.head.weight_VH.device), use_cache=False)[0]
    return states_BTH[torch.arange(len(texts)), ends]


def _text(token_ids: tuple[int, ...], num_response: int) -> Rollout:
    """A text whose last tokens are a response."""
    prompt = token_ids[: len(token_ids) - num_response]
    authors = (Author.CONTEXT,) * len(prompt) + (Author.STUDENT,) * num_response
    silent = (0.0,) * len(token_ids)
    prompt = Prompt(id="text", token_ids=prompt)
    return Rollout(id="text", prompt=prompt, token_ids=token_ids, authors=authors, behavior_logprobs=silent)
