"""The student as the training step sees it: a Hugging Face model, its forward pass and its optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tropd.errors import EvidenceError
from tropd.model.dense import can_tile, dense_loss
from tropd.model.forward import Forward, similar_lengths
from tropd.model.one_pass import can_fuse, fused_loss, wanted
from tropd.model.optimizer import Optimizer
from tropd.model.own_top_k import OwnTopK
from tropd.model.tiling import Tiling
from tropd.monitoring.sample import sampled_rows
from tropd.objective.context import World
from tropd.objective.evidence import Needs
from tropd.objective.hidden import reads_states, states_read
from tropd.teachers.combined import Whole
from tropd.teachers.teacher import Teacher
from tropd.training.micro_batch import MicroBatch, Piece, Seen
from tropd.types import Author, Rollout

if TYPE_CHECKING:
    from tropd.distributed.sharding import Shards


class ModelLearner:
    """Implements `tropd.training.protocols.Learner`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        vocab_size: int,
        tiling: Tiling | None = None,
        readers: Mapping[str, Whole] | None = None,
        shards: Shards | None = None,
    ) -> None:
        """`readers` make whole distributions of readers in this process, by name.

        With `shards`, `model` is the whole model, which is measured; the sharded copy is trained.
        """
        self.model, self.optimizer = model, optimizer
        self.forward = Forward(model, vocab_size=vocab_size, tiling=tiling)
        self.shards = shards
        self.trained = self.forward if shards is None else shards.forward(self.forward)
        self.vocab_size: int | None = vocab_size
        self.device = next(model.parameters()).device
        exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
        drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
        self.margin: float | None = None if shards is not None or drops else 0.02 if exact else 0.25
        self.wholes = readers or {}
        self.expands = set(self.wholes) if can_tile(self.forward.head) else set()

    def learn(self, batch: MicroBatch) -> Seen:
        forward, tokens, asks = self.trained, batch.tokens, batch.objective.asks
        forward.model.train()
        if self.shards is not None:
            self.shards.empty()
        whole = [name for name, needs in asks.items() if Needs.FULL in needs]
        columns = states_read(batch.objective)
        if not can_tile(forward.head) or any(name not in self.expands for name in whole):
            loss, piece = batch.loss_of_all(forward.view(batch.part.rollouts, batch.part.tokens, asks, columns))
            loss.backward()
            return batch.seen([piece])
        hidden_NH, states = forward.states(batch.part.rollouts, columns)
        if batch.live is not None:  # nothing is projected that no term weighs
            hidden_NH, states = hidden_NH[batch.live], {name: x[batch.live] for name, x in states.items()}
        ids_NM, view_of = wanted(tokens, asks)
        pieces: list[Piece] = []
        own = own_top_k(batch)

        def keep(result: tuple[Tensor, Piece]) -> Tensor:
            pieces.append(result[1])
            return result[0]

        def loss_of_columns(rows: slice, at_CM: Tensor) -> Tensor:
            return keep(batch.loss(rows, view_of(at_CM)))

        def loss_of_whole(rows: slice, full_CV: Tensor) -> Tensor:
            if own is not None:
                own.look(rows, full_CV)
            view = view_of(full_CV.gather(1, ids_NM[rows]))
            if not whole:
                return keep(batch.loss(rows, view))
            part = tokens.rows(rows)
            theirs = {name: self.wholes[name](part) for name in whole}
            return keep(batch.loss(rows, view.with_(full_logprobs_NV=full_CV), theirs))

        tiling, head = forward.tiling, forward.head
        if all(map(reads_states, batch.objective.terms)):  # the head learns nothing, but ranks sum its gradient
            with torch.no_grad():
                at_NM = head.read(hidden_NH, ids_NM, tiling.tile_tokens)["at"]
            loss = loss_of_columns(slice(None), at_NM) + sum(p[:0].sum() for p in head.module.parameters())
        elif can_fuse(head) and not whole:
            loss = fused_loss(head, hidden_NH, ids_NM, loss_of_columns, tiling.tile_tokens, tiling.tile_vocab, own)
        else:
            loss = dense_loss(head, hidden_NH, ids_NM[:, 0], loss_of_whole, tiling.tile_tokens)
        seen = batch.seen(pieces, None if own is None else own.ids_NK)
        if Needs.STUDENT_HIDDEN in batch.objective.needs:
            more, seen = batch.add_states(seen, hidden_NH, states)
            loss = loss + more
        loss.backward()
        return seen

    def measure(
        self, rollouts: Sequence[Rollout], needs: Needs, top_k: int = 0, at_ids_NM: Tensor | None = None
    ) -> dict[str, Tensor]:
        wanted = top_k if Needs.STUDENT_TOPK in needs else 0
        needs &= Needs.STUDENT_ENTROPY
        rows = torch.arange(sum(len(r.response_ids) for r in rollouts)).split([len(r.response_ids) for r in rollouts])
        rows_of = {rollout.id: own for rollout, own in zip(rollouts, rows, strict=True)}

        def ask(part: list[Rollout]) -> dict[str, Tensor]:
            at_ids_CM = None if at_ids_NM is None else at_ids_NM[torch.cat([rows_of[r.id] for r in part])]
            measured = self.forward.measure(part, needs, top_k=wanted, at_ids_NJ=at_ids_CM)
            fields = {
                "student_logprobs_N": measured.logprobs_N,
                "student_entropy_N": measured.entropy_N,
                "student_topk_ids_NJ": measured.topk_ids_NK if wanted else None,
                "student_topk_logprobs_NJ": measured.topk_logprobs_NK if wanted else None,
                "at_NM": measured.at_logprobs_NJ,
            }
            return {name: x for name, x in fields.items() if x is not None}

        return self._in_parts(rollouts, ask, [len(r.token_ids) for r in rollouts])

    def reverse_kl(self, rollouts: Sequence[Rollout], teacher: Teacher, as_read: Sequence[Rollout]) -> Tensor:
        kl_T: dict[int, Tensor] = {}
        theirs = {rollout.id: read for rollout, read in zip(rollouts, as_read, strict=True)}
        for chosen, single in teacher.parts(rollouts):
            if (forward := single.forward) is None:
                raise EvidenceError(
                    f"the reverse KL to teacher {single.name} was asked for, but the teacher has no forward pass in "
                    "this process. Take Needs.REVERSE_KL out of its capabilities, or give it a `forward`."
                )

            def ask(part: list[Rollout], forward: Forward = forward) -> dict[str, Tensor]:
                return {"x": self.forward.reverse_kl(part, forward, [theirs[r.id] for r in part])}

            read_here = [rollouts[i] for i in chosen]
            longest = [max(len(r.token_ids), len(theirs[r.id].token_ids)) for r in read_here]
            rows_N = self._in_parts(read_here, ask, longest, single.more_passes)["x"]
            kl_T |= zip(chosen, rows_N.split([len(r.response_ids) for r in read_here]), strict=True)
        return torch.cat([kl_T[i] for i in range(len(rollouts))])

    def spare_passes(self, num_passes: int, world: World) -> int:
        if self.shards is None:
            return 0
        return max(world.gather(torch.tensor([num_passes])).tolist()) - num_passes

    def idle(self, num_passes: int) -> None:
        if self.shards is not None:
            self.shards.empty()
            for _ in range(num_passes):
                self.shards.idle()

    def update(self) -> tuple[float, float]:
        return self.optimizer.step()

    def sync(self) -> None:
        """From here on, measuring and writing use the trained weights."""
        if self.shards is not None:
            self.shards.fill()

    def _in_parts(
        self,
        rollouts: Sequence[Rollout],
        ask: Callable[[list[Rollout]], dict[str, Tensor]],
        num_tokens: Sequence[int],
        more_passes: Callable[[int], int] = lambda number: 0,
    ) -> dict[str, Tensor]:
        """Measure within the token budget, similar lengths together; rows come back in the order of the rollouts."""
        pieces: list[dict[str, Tensor]] = [{} for _ in rollouts]
        groups = similar_lengths(num_tokens, self.forward.tiling.tokens_per_batch)
        for _ in range(more_passes(len(groups))):
            ask([rollouts[groups[0][0]]])
        for group in groups:
            columns = ask([rollouts[i] for i in group])
            lengths = [len(rollouts[i].response_ids) for i in group]
            for name, x in columns.items():
                for i, rows in zip(group, x.split(lengths), strict=True):
                    pieces[i][name] = rows
        names = pieces[0].keys() if pieces else ()
        return {name: torch.cat([piece[name] for piece in pieces]) for name in names}


def own_top_k(batch: MicroBatch) -> OwnTopK | None:
    """Where probes ask for the student's likeliest tokens: in a sample of the rows of a batch with the teacher's, if
    nothing else asked for them."""
    tokens = batch.tokens
    theirs_NK = tokens.peek("teacher_topk_ids_NK")
    if theirs_NK is None or tokens.peek("student_topk_ids_NJ") is not None:
        return None
    return OwnTopK(sampled_rows(tokens) & (tokens.authors_N == Author.STUDENT), theirs_NK.shape[1])
