"""Probes of a teacher that only writes: how many chunks were audited, how many were not, and what they said."""

from __future__ import annotations

from tropd.distributed.ranks import Ranks
from tropd.objective.chunks import Audit
from tropd.objective.evidence import Tokens


def probes_of_chunks(tokens: Tokens, audit: Audit, world: Ranks) -> dict[str, float]:
    """chunks/audited and chunks/missing count chunks of all ranks; chunks/support is the mean support of those that
    were audited, from 0 to 1.  Every rank must call this."""
    chunk_N, support_N = tokens.teacher_chunks_N, tokens.teacher_support_N
    seen = {
        (int(s), int(n)): float(k)
        for s, n, k in zip(tokens.sequences_N.tolist(), chunk_N.tolist(), support_N.tolist(), strict=True)
        if n
    }
    own = [k for (_, n), k in seen.items() if n > 0], sum(n < 0 for _, n in seen)
    each = world.gather_json(own)
    audited = [k / audit.continuations for support, _ in each for k in support]
    probes = {"chunks/audited": float(len(audited)), "chunks/missing": float(sum(missing for _, missing in each))}
    return {**probes, "chunks/support": sum(audited) / len(audited)} if audited else probes
