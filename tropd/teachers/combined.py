"""Readers that have no model but are made of others: a mean, or one steered by two others.

Whole distributions are made a tile at a time, from the hidden states that the parts have given, each on its own prompt.
Everything else that is read of such a reader comes from the same tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tropd.briefings.mixtures import Mixture
from tropd.errors import ConfigError
from tropd.model.forward import Forward
from tropd.model.head import tiles
from tropd.model.likeliest import likeliest
from tropd.objective.evidence import OF_MODEL, Needs, Tokens
from tropd.teachers.teacher import Teacher

Whole = Callable[[Tokens], Tensor]
"""Some tokens -> a reader's whole distributions there [C, V], from the hidden states among its evidence."""


def whole_of(name: str, forward: Forward) -> Whole:
    """The whole distributions of one model."""
    return lambda tokens: forward.full_logprobs(tokens.of(name).teacher_hidden_NH, tokens.token_ids_N)


def wholes_of(readers: Mapping[str, Teacher]) -> dict[str, Whole]:
    """Those of all readers in this process."""
    found = {name: whole_of(name, x.forward) for name, x in readers.items() if x.forward is not None}
    return found | {name: x.whole_at for name, x in readers.items() if isinstance(x, Combined)}


class Combined(Teacher):
    """A reader made of others, which are asked for their hidden states in its place."""

    capabilities = OF_MODEL & ~Needs.HIDDEN & ~Needs.REVERSE_KL & ~Needs.LOOKAHEAD

    def __init__(self, name: str, mixture: Mixture, readers: Mapping[str, Teacher], tile_tokens: int) -> None:
        self.name, self.mixture, self.tile_tokens = name, mixture, tile_tokens
        parts = {part: readers[part] for part in mixture.readers}
        if without := [part for part, x in parts.items() if x.forward is None and not isinstance(x, Combined)]:
            raise ConfigError(
                f"reader {name!r} is made of reader {without[0]!r}, which gives no hidden states here: it is several "
                "teachers, on a server or code of your own. Make it of models in this process."
            )
        self.noise = max(x.noise for x in parts.values())
        own = {part: x.forward for part, x in parts.items() if x.forward is not None}
        made = {part: x.whole_at for part, x in parts.items() if isinstance(x, Combined)}
        self.wholes: dict[str, Whole] = {part: whole_of(part, forward) for part, forward in own.items()} | made

    def whole_at(self, tokens: Tokens) -> Tensor:
        """Its whole distributions at these tokens [C, V]."""
        return self.mixture({part: whole(tokens) for part, whole in self.wholes.items()})

    @torch.no_grad()
    def evidence(self, tokens: Tokens, needs: Needs, top_k: int) -> dict[str, Tensor]:
        """What it says of these tokens, by the names of the teacher's evidence."""
        found = [self._at_tile(tokens.rows(rows), needs, top_k) for rows in tiles(len(tokens), self.tile_tokens)]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _at_tile(self, tokens: Tokens, needs: Needs, top_k: int) -> dict[str, Tensor]:
        full_CV = self.whole_at(tokens)
        said = {"teacher_logprobs_N": full_CV.gather(1, tokens.token_ids_N[:, None])[:, 0]}
        if Needs.TOPK in needs:
            ids_CK, logprobs_CK = likeliest(full_CV, min(top_k, full_CV.shape[-1]))
            said |= {"teacher_topk_ids_NK": ids_CK, "teacher_topk_logprobs_NK": logprobs_CK}
        if Needs.STUDENT_TOPK in needs:
            said["teacher_at_student_topk_NJ"] = full_CV.gather(1, tokens.student_topk_ids_NJ)
        if Needs.TEACHER_ENTROPY in needs:
            said["teacher_entropy_N"] = torch.special.entr(full_CV.exp()).sum(-1)
        if Needs.FULL in needs:
            said["teacher_full_logprobs_NV"] = full_CV
        return said
