"""How much two texts resemble each other, from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable

from tropd.errors import require
from tropd.objective.chunks import Similarity


def similarity_of(kind: Similarity) -> Callable[[str, str], float]:
    """edit: 1 - (insertions, deletions and substitutions of characters) / (length of the longer text).
    rouge1: the F-measure of the words that both have."""
    asked = f'method.similarity = "{kind}"'
    if kind == "edit":
        require("rapidfuzz", "omni", asked)
        from rapidfuzz.distance import Levenshtein  # pyright: ignore[reportMissingImports]

        return Levenshtein.normalized_similarity
    require("rouge_score", "rouge", asked)
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]

    scorer = RougeScorer(["rouge1"])
    return lambda a, b: float(scorer.score(a, b)["rouge1"].fmeasure)
