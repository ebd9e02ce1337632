"""The ideas by which methods, extras and policies are told apart: a reader who knows none of their names finds them."""

from __future__ import annotations

from typing import Literal

Idea = Literal["which tokens", "whose distribution", "who writes", "how far", "which trajectories", "what teaches"]

IDEAS: dict[Idea, str] = {
    "which tokens": "Which tokens of a response are trained, with how much weight, and what happens to the rest.",
    "whose distribution": "What the student is compared with at a token: a distribution, the part of the vocabulary "
    "that counts, and the divergence or the reward.",
    "who writes": "Who writes the texts that are trained on: the student, the teacher, both, or the data set.",
    "how far": "How much of each response is written before it is trained on.",
    "which trajectories": "Which whole responses are trained, and with how much weight: graded, compared within their "
    "group, or sorted by what the teacher thinks of them.",
    "what teaches": "What the teacher is told that the student is not, and how it changes: mostly a student that "
    "teaches itself.",
}
"""Each with the question that it answers, in the order in which they are shown."""
