"""A teacher in this process: another model, or the base under the student's own adapter.

`score` gives everything but the reverse KL, which takes both models at once: `student.reverse_kl(rollouts,
teacher.forward)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, arange, cat, float32, float64, nn

from tropd.errors import ConfigError, TeacherError, TrainingDiverged, VocabularyError
from tropd.model.forward import Forward, Measured, similar_lengths
from tropd.model.head import causal_lm_of
from tropd.model.lookahead import look_ahead, passes_of, takes_branches
from tropd.model.one_pass import TopRows
from tropd.model.tiling import Tiling
from tropd.objective.evidence import OF_MODEL, Needs
from tropd.objective.hidden import STATES
from tropd.teachers.teacher import ScoreRequest, Teacher, TopKRows
from tropd.types import Rollout, TeacherScores

if TYPE_CHECKING:
    from tropd.distributed.ranks import Ranks
    from tropd.distributed.sharding import ShardedTeacher

_NOISE = {float32: 1e-3, float64: 1e-6}
"""Nats: rounding between batches of other shapes."""
_NOISE_OF_HALF_PRECISION = 0.1


class LocalTeacher(Teacher):
    """A model in this process.  It is frozen (evaluation mode, no gradients), unless it is the student's model: then
    `within` is the context for scoring, such as the adapter switched off, and the model is restored afterwards."""

    capabilities = OF_MODEL
    forward: Forward

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str = "default",
        vocab_size: int | None = None,
        tiling: Tiling | None = None,
        within: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.name = name
        self.owns_model = within is None
        """Whether the weights are its own, not the student's."""
        if within is None:
            model.eval().requires_grad_(False)
        self.forward = Forward(model, vocab_size=vocab_size, tiling=tiling, within=within or nullcontext)
        self.context = self.forward.context
        self.noise = _NOISE.get(next(model.parameters()).dtype, _NOISE_OF_HALF_PRECISION)
        self.shards: ShardedTeacher | None = None
        self.branches: bool | None = None
        """Whether it reads branches of a text in one pass; None before anybody asked."""

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        """Scores batches of similar length, and returns to the order of the rollouts."""
        request.check(self)
        scores: dict[int, TeacherScores] = {}
        lengths = [len(rollout.token_ids) for rollout in request.rollouts]
        batches = similar_lengths(lengths, self.forward.tiling.tokens_per_batch)
        for _ in range(self.more_passes(len(batches))):
            self.forward.measure([request.rollouts[batches[0][0]]], Needs.SAMPLED)
        for batch in batches:
            part = request.take(batch)
            ids_TJ = part.student_topk_ids_TJ if Needs.STUDENT_TOPK in part.needs else None
            try:
                measured = self.forward.measure(
                    part.rollouts,
                    part.needs,
                    top_k=part.top_k if Needs.TOPK in part.needs else 0,
                    at_ids_NJ=None if ids_TJ is None else cat(list(ids_TJ)),
                    top_rows=_by_tile(part),
                    columns=[name for name in part.columns if name.startswith(STATES)],
                )
            except TrainingDiverged as error:
                raise TeacherError(f"teacher {self.name}: {error}") from error
            scores.update(zip(batch, _split(measured, part.rollouts, self.name), strict=True))
        found = [scores[index] for index in range(len(request.rollouts))]
        return self._beyond(request, found) if Needs.LOOKAHEAD in request.needs else found

    def _beyond(self, request: ScoreRequest, scores: list[TeacherScores]) -> list[TeacherScores]:
        """The scores with what lies beyond the request's candidates."""
        assert request.candidates_TJ is not None
        if self.branches is None:
            self.branches = takes_branches(self.forward)
        passes = passes_of(request.rollouts, request.candidates_TJ, self.forward, self.branches)
        for _ in range(self.more_passes(len(passes))):
            self.forward.measure([request.rollouts[0]], Needs.SAMPLED)
        try:
            found = look_ahead(self.forward, passes, request.candidates_TJ)
        except TrainingDiverged as error:
            raise TeacherError(f"teacher {self.name}: {error}") from error
        return [replace(score, lookahead_TJ=beyond) for score, beyond in zip(scores, found, strict=True)]

    def steered(self, by: Callable[[], AbstractContextManager[Any]]) -> LocalTeacher:
        """The same weights, read inside one more context, such as a direction added to a layer."""
        teacher, forward = copy(self), copy(self.forward)
        teacher.forward, within = forward, forward.within

        @contextmanager
        def both() -> Iterator[None]:
            with within(), by():
                yield

        forward.within = both
        return teacher

    def shard(self, world: Ranks) -> bool:
        if not self.owns_model:
            return False
        from tropd.distributed.sharding import ShardedTeacher

        self.shards = ShardedTeacher(self.forward.model, world)
        self.forward = self.shards.forward(self.forward)
        return True

    def more_passes(self, number: int) -> int:
        return 0 if self.shards is None else self.shards.more_passes(number)

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext() if self.shards is None else self.shards.gathered()


def base_as_teacher(
    student: nn.Module, *, name: str = "default", vocab_size: int | None = None, tiling: Tiling | None = None
) -> LocalTeacher:
    """The student without its adapter, a teacher that takes no memory.  Adapter and modes are restored afterwards."""
    _check_adapter(student)
    return LocalTeacher(
        student, name=name, vocab_size=vocab_size, tiling=tiling, within=lambda: without_adapter(student)
    )


def same_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Refuse two tokenizers unless each token that the student can write has the same id for the teacher.

    Rows that pad a model's vocabulary are no tokens.  The teacher may have more tokens beyond the student's ids.
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    by_id = {index: token for token, index in teacher.items()}
    wrong = [
        f"{token!r} is {index} for the student, but the teacher has "
        + (f"it at {teacher[token]}" if token in teacher else f"{by_id[index]!r} there" if index in by_id else "none")
        for token, index in sorted(student.items(), key=lambda item: item[1])
        if teacher.get(token) != index
    ]
    known, size = set(student.values()), _num_ids(student)
    wrong += [
        f"{token!r} is {index} for the teacher, but the student has none"
        for token, index in sorted(teacher.items(), key=lambda item: item[1])
        if index < size and index not in known
    ]
    if wrong:
        raise VocabularyError(
            f"a teacher that reads the student's tokens was asked for, but {len(wrong)} of {len(student)} tokens "
            f"differ: {'; '.join(wrong[:4])}. If the teacher has a tokenizer of its own, add a section "
            "[teacher.bridge]; if only added tokens differ, add them to both or use one that both have (pad_token = "
            "eos_token)."
        )


def shared_vocab_size(
    student_model: nn.Module, student_tokenizer: Any, teacher_model: nn.Module, teacher_tokenizer: Any
) -> int:
    """How many ids both models and both tokenizers share, after `same_vocabulary`: cut both heads to it."""
    same_vocabulary(student_tokenizer, teacher_tokenizer)
    models = [causal_lm_of(model) for model in (student_model, teacher_model)]
    rows = [model.get_output_embeddings().weight.shape[0] for model in models]
    ids = [_num_ids(tokenizer.get_vocab()) for tokenizer in (student_tokenizer, teacher_tokenizer)]
    return min(rows + ids)


def _num_ids(vocabulary: dict[str, int]) -> int:
    return max(vocabulary.values()) + 1


def _by_tile(request: ScoreRequest) -> TopRows | None:
    """The rows that need the top-k, asked tile by tile."""
    wanted: TopKRows | None = request.top_k_rows
    if wanted is None:
        return None
    rows_N = arange(sum(len(rollout.response_ids) for rollout in request.rollouts))
    return lambda tile, logprobs_C: wanted(rows_N[tile], logprobs_C)


def _split(measured: Measured, rollouts: Sequence[Rollout], name: str) -> Iterator[TeacherScores]:
    """Flat rows to one record per rollout."""
    start = 0
    for rollout in rollouts:
        rows = slice(start, start + len(rollout.response_ids))
        start = rows.stop
        yield TeacherScores(
            logprobs_T=measured.logprobs_N[rows],
            topk_ids_TK=_rows(measured.topk_ids_NK, rows),
            topk_logprobs_TK=_rows(measured.topk_logprobs_NK, rows),
            entropy_T=_rows(measured.entropy_N, rows),
            at_student_topk_TJ=_rows(measured.at_logprobs_NJ, rows),
            full_logprobs_TV=_rows(measured.full_logprobs_NV, rows),
            hidden_TH=_rows(measured.hidden_NH, rows),
            teacher=name,
            columns={name: x[rows].cpu() for name, x in measured.columns.items()},  # too much for the device
        )


def _rows(column: Tensor | None, rows: slice) -> Tensor | None:
    return None if column is None else column[rows]


def _check_adapter(student: nn.Module) -> None:
    """Refuse a model whose base does not come back when its adapter is switched off."""
    configs: dict[str, Any] | None = getattr(student, "peft_config", None)  # type: ignore[assignment]
    if configs is None or not hasattr(student, "disable_adapter"):
        raise ConfigError(
            f"the base under an adapter was asked for as teacher, but {type(student).__name__} has no adapter. Train "
            "with LoRA, or give a copy of the model to LocalTeacher."
        )
    for adapter, config in configs.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise ConfigError(
                f"the base under an adapter was asked for as teacher, but adapter {adapter!r} trains the base's own "
                f"biases (bias = {bias!r}). Use bias = 'none', or give a copy of the base to LocalTeacher."
            )


@contextmanager
def without_adapter(student: Any) -> Iterator[None]:
    """Inside the block the adapter is off.  PEFT marks parameters trainable afterwards, so this freezes them again."""
    trainable = {parameter: parameter.requires_grad for parameter in student.parameters()}
    try:
        with student.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
