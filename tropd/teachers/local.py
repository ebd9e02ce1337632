"""A teacher in this process: another model, or the base under the student's own adapter.

`score` gives everything but the reverse KL, which takes both models at once: `student.reverse_kl(rollouts,
teacher.forward)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, arange, cat, float32, float64, nn

from tropd.errors import ConfigError, EvidenceError, TeacherError, TrainingDiverged, VocabularyError
from tropd.model.forward import Forward, Measured, similar_lengths
from tropd.model.head import causal_lm_of
from tropd.objective.evidence import OF_TEACHER, Needs
from tropd.teachers.teacher import TopKRows
from tropd.types import Rollout, TeacherScores

if TYPE_CHECKING:
    from tropd.distributed.ranks import Ranks
    from tropd.distributed.sharding import ShardedTeacher

_CAPABILITIES = OF_TEACHER & ~Needs.REFERENCE


def _no_more(number: int) -> int:
    return 0


class LocalTeacher:
    """A model of its own.  It is frozen: evaluation mode, no gradients."""

    capabilities = _CAPABILITIES
    shards: ShardedTeacher | None = None

    def shard(self, world: Ranks) -> None:
        """Let each rank hold a part of it."""
        from tropd.distributed.sharding import ShardedTeacher

        self.shards = ShardedTeacher(self.forward.model, world)
        self.forward = self.shards.forward(self.forward)

    @property
    def more_passes(self) -> Callable[[int], int]:
        """How many passes to add to a number of them, so that every rank runs as many."""
        return _no_more if self.shards is None else self.shards.more_passes

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str = "default",
        vocab_size: int | None = None,
        tile_tokens: int = 512,
        tile_vocab: int | None = None,
        tokens_per_batch: int = 8192,
    ) -> None:
        self.name, self.tokens_per_batch = name, tokens_per_batch
        self.forward = Forward(
            model.eval().requires_grad_(False), vocab_size=vocab_size, tile_tokens=tile_tokens, tile_vocab=tile_vocab
        )

    @property
    def context(self) -> int | None:
        return self.forward.context

    @property
    def noise(self) -> float:
        return _noise(self.forward)

    def score(
        self,
        rollouts: Sequence[Rollout],
        needs: Needs,
        *,
        top_k: int = 0,
        student_topk_ids_TJ: Sequence[Tensor] | None = None,
        top_k_rows: TopKRows | None = None,
    ) -> list[TeacherScores]:
        """One TeacherScores per rollout, in order; a `top_k` beyond the vocabulary gives the whole vocabulary."""
        return _score(self, rollouts, needs, top_k, student_topk_ids_TJ, top_k_rows)


class BaseAsTeacher:
    """The student without its adapter, a teacher that takes no memory.  Adapter and modes are as before afterwards."""

    capabilities = _CAPABILITIES
    more_passes = staticmethod(_no_more)

    def __init__(
        self,
        student: nn.Module,
        *,
        name: str = "default",
        vocab_size: int | None = None,
        tile_tokens: int = 512,
        tile_vocab: int | None = None,
        tokens_per_batch: int = 8192,
    ) -> None:
        _check_adapter(student)
        self.name, self.tokens_per_batch = name, tokens_per_batch
        self.forward = Forward(
            student,
            vocab_size=vocab_size,
            tile_tokens=tile_tokens,
            tile_vocab=tile_vocab,
            within=lambda: without_adapter(student),
        )

    @property
    def context(self) -> int | None:
        return self.forward.context

    @property
    def noise(self) -> float:
        return _noise(self.forward)

    def score(
        self,
        rollouts: Sequence[Rollout],
        needs: Needs,
        *,
        top_k: int = 0,
        student_topk_ids_TJ: Sequence[Tensor] | None = None,
        top_k_rows: TopKRows | None = None,
    ) -> list[TeacherScores]:
        """One TeacherScores per rollout, in order; a `top_k` beyond the vocabulary gives the whole vocabulary."""
        return _score(self, rollouts, needs, top_k, student_topk_ids_TJ, top_k_rows)


def _noise(forward: Forward) -> float:
    """Rounding between batches of other shapes; half precision has much of it."""
    return {float32: 1e-3, float64: 1e-6}.get(next(forward.model.parameters()).dtype, 0.1)


def same_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Refuse two tokenizers unless each token that the student can write has the same id for the teacher.

    Rows that pad a model's vocabulary are no tokens.  Tokens of the teacher alone are fine beyond the student's ids.
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
            f"differ: {'; '.join(wrong[:4])}. Use a teacher with the student's tokenizer; if only added tokens differ, "
            "add them to both or use one that both have (pad_token = eos_token)."
        )


def shared_vocab_size(
    student_model: nn.Module, student_tokenizer: Any, teacher_model: nn.Module, teacher_tokenizer: Any
) -> int:
    """How many ids both models and both tokenizers know, after `same_vocabulary`: cut both heads to it."""
    same_vocabulary(student_tokenizer, teacher_tokenizer)
    models = [causal_lm_of(model) for model in (student_model, teacher_model)]
    rows = [model.get_output_embeddings().weight.shape[0] for model in models]
    ids = [_num_ids(tokenizer.get_vocab()) for tokenizer in (student_tokenizer, teacher_tokenizer)]
    return min(rows + ids)


def _num_ids(vocabulary: dict[str, int]) -> int:
    return max(vocabulary.values()) + 1


def _score(
    teacher: LocalTeacher | BaseAsTeacher,
    rollouts: Sequence[Rollout],
    needs: Needs,
    top_k: int,
    student_topk_ids_TJ: Sequence[Tensor] | None,
    top_k_rows: TopKRows | None,
) -> list[TeacherScores]:
    """Batches of similar length, then back to the order of the rollouts."""
    at_ids = student_topk_ids_TJ if Needs.STUDENT_TOPK in needs else None
    _check_request(teacher, rollouts, needs, top_k, at_ids)
    scores: dict[int, TeacherScores] = {}
    rows_of = list(arange(sum(lengths := [len(r.response_ids) for r in rollouts])).split(lengths))
    batches = similar_lengths([len(rollout.token_ids) for rollout in rollouts], teacher.tokens_per_batch)
    for _ in range(teacher.more_passes(len(batches))):
        teacher.forward.measure([rollouts[batches[0][0]]], Needs.SAMPLED)
    for batch in batches:
        members = [rollouts[index] for index in batch]
        rows_N = cat([rows_of[index] for index in batch])
        try:
            measured = teacher.forward.measure(
                members,
                needs,
                top_k=top_k if Needs.TOPK in needs else 0,
                at_ids_NJ=None if at_ids is None else cat([at_ids[index] for index in batch]),
                top_rows=None if top_k_rows is None else _within(top_k_rows, rows_N),
            )
        except TrainingDiverged as error:
            raise TeacherError(f"teacher {teacher.name}: {error}") from error
        scores.update(zip(batch, _split(measured, members, teacher.name), strict=True))
    return [scores[index] for index in range(len(rollouts))]


def _within(top_k_rows: TopKRows, rows_N: Tensor) -> Callable[[slice, Tensor], Tensor]:
    """The same question about the rows of one batch."""
    return lambda tile, logprobs_C: top_k_rows(rows_N[tile], logprobs_C)


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
        )


def _rows(column: Tensor | None, rows: slice) -> Tensor | None:
    return None if column is None else column[rows]


def _check_request(
    teacher: LocalTeacher | BaseAsTeacher,
    rollouts: Sequence[Rollout],
    needs: Needs,
    top_k: int,
    at_ids: Sequence[Tensor] | None,
) -> None:
    beyond = needs & OF_TEACHER & ~teacher.capabilities
    if beyond:
        raise EvidenceError(
            f"{beyond} was asked of teacher {teacher.name}, but a local teacher gives {teacher.capabilities}. A "
            "reference is a second teacher."
        )
    if Needs.TOPK in needs and top_k < 1:
        raise EvidenceError(f"Needs.TOPK was asked of teacher {teacher.name} with top_k = {top_k}; give top_k >= 1.")
    if Needs.STUDENT_TOPK in needs:
        if at_ids is None:
            raise EvidenceError(
                f"Needs.STUDENT_TOPK was asked of teacher {teacher.name} without ids; "
                "give student_topk_ids_TJ, a [T, J] tensor per rollout."
            )
        lengths = [len(ids) for ids in at_ids]
        assert lengths == [len(rollout.response_ids) for rollout in rollouts], "student_topk_ids_TJ: a row per token"


def _check_adapter(student: nn.Module) -> None:
    """Refuse a model whose base cannot be had back by switching its adapter off."""
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
    """PEFT marks parameters trainable when it switches an adapter on again, so what was frozen is restored too."""
    trainable = {parameter: parameter.requires_grad for parameter in student.parameters()}
    try:
        with student.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
