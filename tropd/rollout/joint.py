"""Student and teacher write one text together, in this process.

    student's logits --+--> blend --> draw --> overwritten by the teacher? --> the token, for both
    teacher's logits --+--> measure --> trace --> does the text end here?

Both models read the text that has been written, each behind its own prompt and with its own key-value cache.  The
student's draws are those of its engine, so a decoding that changes nothing gives the same tokens to the last bit; the
teacher's draws are another stream of the same request, so they do not depend on batch-mates either.

Axes: B live rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tropd.errors import ConfigError, TeacherError, TropdError
from tropd.methods.decoding import Decoding
from tropd.rollout.rows import Batch, Row, drawn, not_finite
from tropd.rollout.sampling import OVERWRITING, draw, draw_uniform_rows
from tropd.rollout.transformers import TransformersEngine, written
from tropd.rollout.voices import Voice
from tropd.types import Author, Completion, Request, Sampling


class JointEngine:
    """Two engines of this process as one.  `copies`: whether both may work with copies of their weights, which a
    teacher cannot whose weights take the place of the student's."""

    def __init__(
        self,
        student: TransformersEngine,
        teacher: TransformersEngine,
        teacher_sampling: Sampling | None = None,
        *,
        copies: bool = True,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.teacher_sampling, self.copies = teacher_sampling, copies

    def write(
        self, requests: Sequence[Request], told: Sequence[tuple[int, ...]], decoding: Decoding
    ) -> list[Completion]:
        """One completion per request; `told` is what the teacher reads in the place of each request's prompt."""
        for i, (request, ids) in enumerate(zip(requests, told, strict=True)):
            self.student.check(request, i)
            try:
                self.teacher.check(replace(request, token_ids=ids), i)
            except TropdError as refusal:
                raise type(refusal)(f"the teacher cannot write with the student: {refusal}") from None
        engines, together = [self.student, self.teacher], Together(decoding, self.teacher_sampling)

        def write(rereads: bool) -> list[Completion]:
            voices = [Voice(engine, rereads=rereads) for engine in engines]
            return Batch(voices, requests, told=told, write=together).run()

        return written(engines, [request.max_new_tokens for request in requests], write, copies=self.copies)


class Together:
    """Adds a token to each row, as a decoding has it."""

    def __init__(self, decoding: Decoding, teacher_sampling: Sampling | None = None) -> None:
        self.decoding, self.teacher_sampling = decoding, teacher_sampling or Sampling()

    def __call__(self, rows: list[Row], logits: Sequence[Tensor]) -> None:
        own_BV, their_BV = logits
        student_BV, teacher_BV = (x.float().log_softmax(-1) for x in logits)
        _check_teacher(rows, teacher_BV)
        blend_BV = self.decoding.blend(student_BV, teacher_BV)
        # The student's own distribution is drawn from as its engine draws, to the last bit.
        ids, behavior, model = drawn(rows, own_BV if blend_BV is student_BV else blend_BV)
        ids_B = torch.tensor(ids, dtype=torch.long, device=own_BV.device)
        if blend_BV is not student_BV:
            model = student_BV.gather(1, ids_B[:, None])[:, 0].tolist()
        authors = [Author.STUDENT] * len(rows)
        over_B = self.decoding.overwritten(student_BV, teacher_BV, ids_B)
        if over_B is not None and (places := over_B.nonzero().flatten().tolist()):
            for i, token_id in zip(places, self._by_teacher([rows[i] for i in places], their_BV[over_B]), strict=True):
                ids[i], behavior[i], model[i], authors[i] = token_id, 0.0, 0.0, Author.TEACHER
        measured_B = self.decoding.measure(student_BV, teacher_BV)
        for row, token_id, behavior_logprob, model_logprob, author in zip(
            rows, ids, behavior, model, authors, strict=True
        ):
            if math.isnan(model_logprob):
                raise not_finite(row, model_logprob)
            if not math.isfinite(behavior_logprob):
                raise ConfigError(
                    f"{type(self.decoding).__name__}.blend gave log-probabilities after token {len(row.token_ids)} of "
                    f"request {row.index} of which no token can be drawn. Give -inf to some tokens at most, and no NaN."
                )
            row.add(int(token_id), behavior_logprob, model_logprob)
            row.authors.append(author)
        if measured_B is not None:
            for row, number in zip(rows, measured_B.tolist(), strict=True):
                row.trace.append(number)
                self._end(row)

    def _by_teacher(self, rows: list[Row], logits_BV: Tensor) -> list[float]:
        """The teacher's own tokens."""
        seeds, positions = [row.request.seed for row in rows], [len(row.token_ids) for row in rows]
        uniforms = [number for (number,) in draw_uniform_rows(seeds, positions, 1, OVERWRITING)]
        return draw(logits_BV, uniforms, self.teacher_sampling)[0].tolist()

    def _end(self, row: Row) -> None:
        if row.finish is not None or (length := self.decoding.ends(row.trace)) is None:
            return
        if not 1 <= length <= len(row.token_ids):
            raise ConfigError(
                f"{type(self.decoding).__name__}.ends keeps {length} tokens of a text of {len(row.token_ids)}. Keep 1 "
                "at least and all of them at most."
            )
        row.cut(length)


def _check_teacher(rows: list[Row], teacher_BV: Tensor) -> None:
    """A logit that is NaN or infinite makes every log-probability of its row NaN."""
    if wrong := teacher_BV[:, 0].isnan().nonzero().flatten().tolist():
        row = rows[wrong[0]]
        raise TeacherError(
            f"the teacher's logits after token {len(row.token_ids)} of request {row.index} are not finite, so no token "
            "can be drawn with it. Load it in bfloat16 or float32."
        )
