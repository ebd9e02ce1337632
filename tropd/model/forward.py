"""From rollouts to log-probabilities; the only place where anything is shifted by one.

The state at token t-1 predicts token t: `hidden` returns, for each response token, the state that predicts it, so
everything after it describes the token itself.  Rows are the response tokens, one rollout after another.
`tropd.model.head` turns the states into log-probabilities, tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tropd.errors import ConfigError, DataError, TrainingDiverged, VocabularyError
from tropd.model.head import Head, at_rest, causal_lm_of, differ, tiles
from tropd.model.hf import recomputes
from tropd.model.one_pass import TopRows, can_fuse, read_rows, wanted
from tropd.model.spans import attends_by_span, spans, worth_it
from tropd.model.tiling import Tiling
from tropd.objective.evidence import Needs, StudentView, Tokens, at_least_float32
from tropd.objective.support import expected_gap
from tropd.types import Rollout

Arrangement = Literal["padded", "packed"]
PROBE = (5, 8)
"""Lengths of the two sequences that test whether packing works."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Sequences as one rectangle, and the place in it that predicts each response token."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor | None
    """None: 0, 1, ... in each row, the default of a model."""
    predicted_at_N: Tensor
    """Index into the flattened rectangle, one per response token: the token's place minus one."""


def lay_out(
    sequences: Sequence[Sequence[int]], num_prompts: Sequence[int], arrangement: Arrangement = "padded", pad_id: int = 0
) -> Layout:
    """Padded: one row each, filled on the right, where causal attention cannot see it.  Packed: one row, positions
    restart with each sequence, which tells attention where the sequences end."""
    width = max(map(len, sequences)) if arrangement == "padded" else sum(map(len, sequences))
    num_rows = len(sequences) if arrangement == "padded" else 1
    input_ids = torch.full((num_rows * width,), pad_id, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    predicted_at, start = [torch.zeros(0, dtype=torch.long)], 0
    for sequence, num_prompt in zip(sequences, num_prompts, strict=True):
        end = start + len(sequence)
        input_ids[start:end] = torch.tensor(sequence, dtype=torch.long)
        position_ids[start:end] = torch.arange(end - start)
        predicted_at.append(torch.arange(start + num_prompt, end) - 1)
        start += width if arrangement == "padded" else end - start
    return Layout(
        input_ids_BT=input_ids.view(num_rows, width),
        position_ids_BT=position_ids.view(num_rows, width) if arrangement == "packed" else None,
        predicted_at_N=torch.cat(predicted_at),
    )


def similar_lengths(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Cut indices into batches of similar length whose padded rectangles hold at most `tokens_per_batch` tokens.

    A longer sequence is alone in its batch.  Within a batch the indices ascend.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [sorted(batch) for batch in batches]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What a model computes for some response tokens, without gradient."""

    logprobs_N: Tensor
    topk_ids_NK: Tensor | None = None
    """Likeliest first; equally likely tokens by id."""
    topk_logprobs_NK: Tensor | None = None
    entropy_N: Tensor | None = None
    at_logprobs_NJ: Tensor | None = None
    """Log-probabilities at the given `at_ids_NJ`."""
    full_logprobs_NV: Tensor | None = None
    hidden_NH: Tensor | None = None
    """The states that predict the tokens."""


class Forward:
    """Rollouts in, log-probabilities out, for any Hugging Face causal language model.

    `within` is a context that the model is measured in (an adapter switched off, for instance).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        vocab_size: int | None = None,
        tiling: Tiling | None = None,
        layout: Arrangement | Literal["best"] = "best",
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if layout not in ("padded", "packed", "best"):
            raise ConfigError(f"layout = {layout!r} was asked for; there are 'padded', 'packed' and 'best'.")
        self.model, self.tiling, self.within = model, tiling or Tiling(), within
        self.layout: Arrangement = "packed" if layout == "packed" else "padded"
        with self._at_rest():
            self.head = Head.of(model, vocab_size)
            self.backbone: nn.Module = causal_lm_of(model).get_decoder()
            self.states: Callable[..., Any] = self.backbone
            if layout == "packed" and not self._packs():
                raise ConfigError(
                    f"layout = 'packed' was asked for, but in {type(model).__name__} packed sequences change each "
                    "other's hidden states. Use layout = 'padded'."
                )
            self.by_span = layout == "best" and attends_by_span(self.backbone, lambda: self._packs(PROBE))
        config = causal_lm_of(model).config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        return self.head.vocab_size

    def hidden(self, rollouts: Sequence[Rollout]) -> Tensor:
        """[N, H]: for each response token, by any author, the state that predicts it."""
        self._check_rollouts(rollouts)
        if not rollouts:
            return self.head.weight_VH.new_zeros((0, self.head.weight_VH.shape[-1]))
        sequences, num_prompts = [r.token_ids for r in rollouts], [len(r.prompt.token_ids) for r in rollouts]
        lengths = [len(sequence) for sequence in sequences]
        if self.by_span and not recomputes(self.backbone) and worth_it(lengths):
            return self._hidden(lay_out(sequences, num_prompts, "packed"), lengths)
        return self._hidden(lay_out(sequences, num_prompts, self.layout))

    def view(self, rollouts: Sequence[Rollout], tokens: Tokens, needs: Needs | Mapping[str, Needs]) -> StudentView:
        """The student's view of these tokens, with gradient, in the current mode of the model (dropout).  `needs` are
        those of the teacher, or of each reader by its name."""
        hidden_NH = self.hidden(rollouts)
        ids_N = self._response_ids(rollouts)
        assert torch.equal(tokens.token_ids_N.to(ids_N.device), ids_N), "tokens are not the responses of these rollouts"
        ids_NM, view_of = wanted(tokens, needs)
        full = Needs.FULL in (needs if isinstance(needs, Needs) else reduce(or_, needs.values()))
        read = self.head.read(hidden_NH, self._wanted([ids_NM.to(ids_N.device)]), self.tiling.tile_tokens, full=full)
        return view_of(read["at"]).with_(full_logprobs_NV=read.get("full"))

    @torch.no_grad()
    def measure(
        self,
        rollouts: Sequence[Rollout],
        needs: Needs,
        *,
        top_k: int = 0,
        at_ids_NJ: Tensor | None = None,
        top_rows: TopRows | None = None,
    ) -> Measured:
        """What the model computes for these tokens, without gradient or dropout: entropy and the whole distribution if
        `needs` has them, the `top_k` likeliest tokens (at most the vocabulary), and given tokens."""
        columns = [self._response_ids(rollouts).unsqueeze(1), *([] if at_ids_NJ is None else [at_ids_NJ])]
        top_k, tile_tokens = min(top_k, self.vocab_size), self.tiling.tile_tokens
        entropy, full = bool(needs & (Needs.TEACHER_ENTROPY | Needs.STUDENT_ENTROPY)), Needs.FULL in needs
        with self._at_rest():
            hidden_NH, ids_NM = self.hidden(rollouts), self._wanted(columns)
            if full or not can_fuse(self.head):
                read = self.head.read(hidden_NH, ids_NM, tile_tokens, full=full, top_k=top_k, entropy=entropy)
            else:
                read = read_rows(
                    self.head,
                    hidden_NH,
                    ids_NM,
                    tile_tokens,
                    top_k=top_k,
                    entropy=entropy,
                    tile_vocab=self.tiling.tile_vocab,
                    top_rows=top_rows,
                )
        if not bool(read["log_z"].isfinite().all()):
            names = ", ".join(rollout.id for rollout in rollouts[:4])
            raise TrainingDiverged(
                f"{type(self.model).__name__} gives logits that are not finite (among rollouts {names}). "
                "Check its weights and its precision (float16 overflows where bfloat16 does not)."
            )
        return Measured(
            logprobs_N=read["at"][:, 0],
            topk_ids_NK=read.get("topk_ids"),
            topk_logprobs_NK=read.get("topk"),
            entropy_N=read.get("entropy"),
            at_logprobs_NJ=None if at_ids_NJ is None else read["at"][:, 1:],
            full_logprobs_NV=read.get("full"),
            hidden_NH=hidden_NH if Needs.HIDDEN in needs else None,
        )

    @torch.no_grad()
    def full_logprobs(self, hidden_CH: Tensor, written_C: Tensor) -> Tensor:
        """[C, V]: whole distributions from hidden states, such as those of `measure`, before these tokens."""
        with self._at_rest():
            return self.head.wide_logits(hidden_CH, written_C.to(hidden_CH.device)).log_softmax(-1)

    @torch.no_grad()
    def reverse_kl(self, rollouts: Sequence[Rollout], teacher: Forward, as_read: Sequence[Rollout] = ()) -> Tensor:
        """[N]: sum_v pi_S(v) (log pi_S(v) - log pi_T(v)) over the whole vocabulary; self is the student.

        `as_read` are the rollouts as the teacher reads them, where another prompt stands before the same responses.
        """
        as_read = as_read or rollouts
        assert [r.response_ids for r in as_read] == [r.response_ids for r in rollouts], "the same answers are read"
        if self.vocab_size != teacher.vocab_size:
            raise VocabularyError(
                f"a divergence between vocabularies of {self.vocab_size} and {teacher.vocab_size} tokens was asked "
                "for. Build both with the same vocab_size (see tropd.teachers.local.shared_vocab_size)."
            )
        with self._at_rest():
            student_NH = self.hidden(rollouts)
        with teacher._at_rest():
            teacher_NH = teacher.hidden(as_read)
        ids_N, found = self._response_ids(rollouts), [student_NH.new_zeros(0, dtype=at_least_float32(student_NH).dtype)]
        for tile in tiles(student_NH.shape[0], self.tiling.tile_tokens):
            student_NV = self.full_logprobs(student_NH[tile], ids_N[tile])
            teacher_NV = teacher.full_logprobs(teacher_NH[tile], ids_N[tile])
            found.append(expected_gap(student_NV.exp(), student_NV, teacher_NV.to(student_NV.device)))
        return torch.cat(found)

    def _hidden(self, layout: Layout, lengths: Sequence[int] | None = None) -> Tensor:
        """`lengths`: attend within spans of these lengths."""
        device = self.head.weight_VH.device
        inputs: dict[str, Any] = {"input_ids": layout.input_ids_BT.to(device), "use_cache": False}
        if layout.position_ids_BT is not None:
            inputs["position_ids"] = layout.position_ids_BT.to(device)
        with nullcontext() if lengths is None else spans(self.backbone, lengths):
            hidden_BTH = self.states(**inputs)[0]
        return hidden_BTH.flatten(0, 1)[layout.predicted_at_N.to(hidden_BTH.device)]

    def _response_ids(self, rollouts: Sequence[Rollout]) -> Tensor:
        ids = [token for rollout in rollouts for token in rollout.response_ids]
        return torch.tensor(ids, dtype=torch.long, device=self.head.weight_VH.device)

    def _wanted(self, columns: list[Tensor]) -> Tensor:
        """The tokens to read in each row; an error if one is outside the vocabulary."""
        ids_NM = torch.cat([column.to(columns[0].device) for column in columns], dim=1)
        if ids_NM.numel() and not 0 <= int(ids_NM.min()) <= int(ids_NM.max()) < self.vocab_size:
            raise VocabularyError(
                f"log-probabilities of token ids from {int(ids_NM.min())} to {int(ids_NM.max())} were asked for, but "
                f"the vocabulary has {self.vocab_size}. Student and teacher must share it (shared_vocab_size)."
            )
        return ids_NM

    def _check_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Refuse rollouts for which a forward pass would raise an index error or compute nonsense."""
        num_rows = self.head.weight_VH.shape[0]
        for rollout in rollouts:
            if self.context is not None and len(rollout.token_ids) > self.context:
                raise DataError(
                    f"rollout {rollout.id} has {len(rollout.token_ids)} tokens ({len(rollout.prompt.token_ids)} of "
                    f"prompt), but {type(self.model).__name__} reads at most {self.context}. Shorten prompts or "
                    "max_new_tokens."
                )
            if rollout.response_ids and not rollout.prompt.token_ids:
                raise DataError(
                    f"rollout {rollout.id} has no prompt, so nothing predicts its first token. Begin it "
                    "with a beginning-of-text token."
                )
            if odd := [token for token in rollout.token_ids if not 0 <= token < num_rows]:
                raise DataError(
                    f"rollout {rollout.id} holds token id {odd[0]}, but "
                    f"{type(self.model).__name__} knows {num_rows}. Was it written with another tokenizer?"
                )

    @torch.no_grad()
    def _packs(self, lengths: Sequence[int] | None = None) -> bool:
        """Whether packed sequences are independent: not in recurrent models or in some attention kernels."""
        ids = [i % self.vocab_size for i in range(sum(PROBE))]
        sequences, num_prompts = [ids[: PROBE[0]], ids[PROBE[0] :]], [1, 1]
        packed = self._hidden(lay_out(sequences, num_prompts, "packed"), lengths)
        return not differ(packed, self._hidden(lay_out(sequences, num_prompts)))

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        with at_rest(self.model), self.within():
            yield
