"""How a token is drawn where student and teacher write together, in this process.

A `Decoding` sees the next-token log-probabilities of both at every position of every text that is being written.  It
may change what the token is drawn from, have the teacher write over the token, or end the text.

    student_BV, teacher_BV --> blend --> draw --> overwritten? --> the token
                           --> measure --> trace --> ends?

Axes: B texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tropd.base.ranges import Ranged


class Decoding(Ranged):
    """By default the student writes alone.  Rows are independent: what it says of one depends on that one only."""

    def blend(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        """The log-probabilities [B, V] that the student's token is drawn from; the run's sampling comes after it.  The
        token is the student's, and its behavior log-probability is that of what it was drawn from."""
        return student_BV

    @property
    def blends(self) -> bool:
        """Whether the student's tokens may be drawn from something else than the student."""
        return type(self).blend is not Decoding.blend

    def overwritten(self, student_BV: Tensor, teacher_BV: Tensor, ids_B: Tensor) -> Tensor | None:
        """Where the teacher writes its own token instead, a bool for each text; None: nowhere.  The token is the
        teacher's, drawn from `teacher_BV` with the teacher's sampling."""
        return None

    def measure(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor | None:
        """A number for each text that is kept in its trace: one for each token, of the position that drew it."""
        return None

    def ends(self, trace: Sequence[float]) -> int | None:
        """After each token, from the text's trace so far: None to go on, or how many of its tokens are kept, 1 at
        least, if it ends here."""
        return None
