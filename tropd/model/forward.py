"""From rollouts to log-probabilities; the only place where anything is shifted by one.

The state at token t-1 predicts token t: `hidden` returns, for each response token, the state that predicts it, so
everything after it describes the token itself.  Rows are the response tokens, one rollout after another.
`tropd.model.head` turns the states into log-probabilities, tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tropd.errors import ConfigError, TrainingDiverged, VocabularyError
from tropd.model.head import Head, at_rest, causal_lm_of, differ, tiles
from tropd.model.hf import recomputes
from tropd.model.layout import Arrangement, Layout, check_rollouts, lay_out
from tropd.model.one_pass import TopRows, can_fuse, read_rows, wanted
from tropd.model.spans import attends_by_span, spans, worth_it
from tropd.model.tiling import Tiling
from tropd.objective.evidence import Needs, StudentView, Tokens, at_least_float32
from tropd.objective.hidden import STATES, Layers, layer_numbers
from tropd.objective.support import expected_gap
from tropd.types import Rollout

PROBE = (5, 8)
"""Lengths of the two sequences that test whether packing works."""


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
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """States of several layers, by name."""


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
        with self.resting():
            self.head = Head.of(model, vocab_size)
            self.backbone: nn.Module = causal_lm_of(model).get_decoder()
            self.run_backbone: Callable[..., Any] = self.backbone
            if layout == "packed" and not self._packs():
                raise ConfigError(
                    f"layout = 'packed' was asked for, but in {type(model).__name__} packed sequences change each "
                    "other's hidden states. Use layout = 'padded'."
                )
            self.by_span = layout == "best" and attends_by_span(self.backbone, lambda: self._packs(PROBE))
        config = causal_lm_of(model).config.get_text_config()
        self.num_layers: int = config.num_hidden_layers
        self.context: int | None = getattr(config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        return self.head.vocab_size

    def hidden(self, rollouts: Sequence[Rollout]) -> Tensor:
        """[N, H]: for each response token, by any author, the state that predicts it."""
        return self.layers(rollouts)[-1]

    def states(self, rollouts: Sequence[Rollout], columns: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """`hidden`, and the states after several layers [N, L, H] by the names of `tropd.objective.hidden`."""
        every = self.layers(rollouts, deep=bool(columns))
        chosen = {name: layer_numbers(cast(Layers, name.removeprefix(STATES)), len(every)) for name in columns}
        return every[-1], {name: torch.stack([every[i] for i in numbers], 1) for name, numbers in chosen.items()}

    def layers(self, rollouts: Sequence[Rollout], deep: bool = False) -> list[Tensor]:
        """[N, H] after each layer, or after the last alone, where the norm that the head reads is included."""
        check_rollouts(rollouts, self.head.weight_VH.shape[0], self.context, type(self.model).__name__)
        if not rollouts:
            nothing = self.head.weight_VH.new_zeros((0, self.head.weight_VH.shape[-1]))
            return [nothing] * (self.num_layers if deep else 1)
        sequences, num_prompts = [r.token_ids for r in rollouts], [len(r.prompt.token_ids) for r in rollouts]
        lengths = [len(sequence) for sequence in sequences]
        if self.by_span and not recomputes(self.backbone) and worth_it(lengths):
            return self._layers(lay_out(sequences, num_prompts, "packed"), lengths, deep)
        return self._layers(lay_out(sequences, num_prompts, self.layout), deep=deep)

    def view(
        self,
        rollouts: Sequence[Rollout],
        tokens: Tokens,
        needs: Needs | Mapping[str, Needs],
        columns: Sequence[str] = (),
    ) -> StudentView:
        """The student's view of these tokens, with gradient, in the current mode of the model (dropout).  `needs` are
        those of the teacher, or of each reader by its name; `columns` name states of several layers."""
        hidden_NH, states = self.states(rollouts, columns)
        ids_N = self._response_ids(rollouts)
        assert torch.equal(tokens.token_ids_N.to(ids_N.device), ids_N), "tokens are not the responses of these rollouts"
        ids_NM, view_of = wanted(tokens, needs)
        full = Needs.FULL in (needs if isinstance(needs, Needs) else reduce(or_, needs.values()))
        read = self.head.read(hidden_NH, self._wanted([ids_NM.to(ids_N.device)]), self.tiling.tile_tokens, full=full)
        return view_of(read["at"]).with_(full_logprobs_NV=read.get("full"), hidden_NH=hidden_NH, columns=states)

    @torch.no_grad()
    def measure(
        self,
        rollouts: Sequence[Rollout],
        needs: Needs,
        *,
        top_k: int = 0,
        at_ids_NJ: Tensor | None = None,
        top_rows: TopRows | None = None,
        columns: Sequence[str] = (),
    ) -> Measured:
        """What the model computes for these tokens, without gradient or dropout: entropy and the whole distribution if
        `needs` has them, the `top_k` likeliest tokens (at most the vocabulary), and given tokens."""
        wanted_ids = [self._response_ids(rollouts).unsqueeze(1), *([] if at_ids_NJ is None else [at_ids_NJ])]
        top_k, tile_tokens = min(top_k, self.vocab_size), self.tiling.tile_tokens
        entropy, full = bool(needs & (Needs.TEACHER_ENTROPY | Needs.STUDENT_ENTROPY)), Needs.FULL in needs
        with self.resting():
            hidden_NH, states = self.states(rollouts, columns)
            ids_NM = self._wanted(wanted_ids)
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
            columns=states,
        )

    @torch.no_grad()
    def full_logprobs(self, hidden_CH: Tensor, written_C: Tensor) -> Tensor:
        """[C, V]: whole distributions from hidden states, such as those of `measure`, before these tokens."""
        with self.resting():
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
        with self.resting():
            student_NH = self.hidden(rollouts)
        with teacher.resting():
            teacher_NH = teacher.hidden(as_read)
        ids_N, found = self._response_ids(rollouts), [student_NH.new_zeros(0, dtype=at_least_float32(student_NH).dtype)]
        for tile in tiles(student_NH.shape[0], self.tiling.tile_tokens):
            student_NV = self.full_logprobs(student_NH[tile], ids_N[tile])
            teacher_NV = teacher.full_logprobs(teacher_NH[tile], ids_N[tile])
            found.append(expected_gap(student_NV.exp(), student_NV, teacher_NV.to(student_NV.device)))
        return torch.cat(found)

    def _layers(self, layout: Layout, lengths: Sequence[int] | None = None, deep: bool = False) -> list[Tensor]:
        """`lengths`: attend within spans of these lengths."""
        device = self.head.weight_VH.device
        inputs: dict[str, Any] = {"input_ids": layout.input_ids_BT.to(device), "use_cache": False}
        if layout.position_ids_BT is not None:
            inputs["position_ids"] = layout.position_ids_BT.to(device)
        if deep:
            inputs["output_hidden_states"] = True
        with nullcontext() if lengths is None else spans(self.backbone, lengths):
            output = self.run_backbone(**inputs)
        inner = _inner(output, self.num_layers) if deep else ()
        index_N = layout.predicted_at_N.to(output[0].device)
        return [states_BTH.flatten(0, 1)[index_N] for states_BTH in (*inner, output[0])]

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

    @torch.no_grad()
    def _packs(self, lengths: Sequence[int] | None = None) -> bool:
        """Whether packed sequences are independent: not in recurrent models or in some attention kernels."""
        ids = [i % self.vocab_size for i in range(sum(PROBE))]
        sequences, num_prompts = [ids[: PROBE[0]], ids[PROBE[0] :]], [1, 1]
        packed = self._layers(lay_out(sequences, num_prompts, "packed"), lengths)[0]
        return not differ(packed, self._layers(lay_out(sequences, num_prompts))[0])

    @contextmanager
    def resting(self) -> Iterator[None]:
        """As the model is measured: without dropout, and `within` its context."""
        with at_rest(self.model), self.within():
            yield


def _inner(output: Any, num_layers: int) -> Sequence[Tensor]:
    """What the layers but the last give, out of embeddings, layers and the norm after them."""
    every = getattr(output, "hidden_states", None) or output[1]
    if len(every) != num_layers + 1:
        raise ConfigError(
            f"states of several layers were asked for, but the model gives {len(every)} for {num_layers} layers. Match "
            "the last layer only (layers = 'last')."
        )
    return every[1:-1]
