"""A teacher's scores, kept on disk: the same tokens are scored once, whatever happens to the process afterwards."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.errors import EvidenceError, TeacherError
from tropd.objective.evidence import OF_TEACHER, Needs
from tropd.teachers.teacher import RunTeacher, TopKRows
from tropd.types import Rollout, TeacherScores

_KEPT = Needs.SAMPLED | Needs.TOPK | Needs.TEACHER_ENTROPY
_SLICE = 64
"""Rollouts that are scored before they are written: what a crash can cost."""
_FIELDS = ("logprobs_T", "topk_ids_TK", "topk_logprobs_TK", "entropy_T")


class Cached:
    """Asks its teacher only for what is not there.  Worth it where texts come again: data sets, replay, resumed steps.

    Whole distributions and hidden states are too large to keep, so it does not offer them.
    """

    def __init__(self, teacher: RunTeacher, path: Path, identity: str) -> None:
        """`identity` names the teacher's weights: other weights, other scores."""
        self.teacher, self.path, self.identity = teacher, path, identity
        self.capabilities = teacher.capabilities & _KEPT
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One thread at a time, which need not be this one: batches may be written ahead.
            self.db = sqlite3.connect(path, check_same_thread=False)
            self.db.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score BLOB NOT NULL)")
            self.db.commit()
        except (sqlite3.Error, OSError) as error:
            raise self._refuse("opened", error) from error

    @property
    def context(self) -> int | None:
        return self.teacher.context

    @property
    def noise(self) -> float:
        return self.teacher.noise

    def score(
        self,
        rollouts: Sequence[Rollout],
        needs: Needs,
        *,
        top_k: int = 0,
        student_topk_ids_TJ: Sequence[Tensor] | None = None,
        top_k_rows: TopKRows | None = None,
    ) -> list[TeacherScores]:
        """One TeacherScores per rollout, in order; of every row, whatever `top_k_rows` wants now."""
        if beyond := needs & OF_TEACHER & ~self.capabilities:
            raise EvidenceError(f"{beyond} was asked of a cached teacher, which keeps {self.capabilities}.")
        if Needs.TOPK in needs and top_k < 1:
            raise EvidenceError(f"Needs.TOPK was asked of a cached teacher with top_k = {top_k}; give top_k >= 1.")
        keys = [self._key(rollout, needs, top_k) for rollout in rollouts]
        known = self._read(set(keys))
        if known:
            TAKEN.add(FastPath.KEPT_SCORES)
        missing = list({key: rollout for key, rollout in zip(keys, rollouts, strict=True) if key not in known}.items())
        for start in range(0, len(missing), _SLICE):
            part = missing[start : start + _SLICE]
            found = self.teacher.score([rollout for _, rollout in part], needs, top_k=top_k)
            fresh = {key: score for (key, _), score in zip(part, found, strict=True)}
            self._write(fresh)
            known |= fresh
        return [known[key] for key in keys]

    def close(self) -> None:
        self.db.close()

    def _key(self, rollout: Rollout, needs: Needs, top_k: int) -> str:
        wanted = [top_k if Needs.TOPK in needs else 0, (needs & _KEPT).value]
        shape = json.dumps([self.identity, rollout.token_ids, len(rollout.prompt.token_ids), wanted])
        return hashlib.sha256(shape.encode()).hexdigest()

    def _read(self, keys: set[str]) -> dict[str, TeacherScores]:
        found: dict[str, TeacherScores] = {}
        try:
            for key in sorted(keys):
                row = self.db.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    held = load(row[0])
                    name = next(n for n in held if n.startswith("teacher:")).removeprefix("teacher:")
                    found[key] = TeacherScores(**{f: held[f] for f in _FIELDS if f in held}, teacher=name)
        except (sqlite3.Error, OSError, SafetensorError, ValueError, TypeError, StopIteration) as error:
            raise self._refuse("read", error) from error
        return found

    def _write(self, scores: dict[str, TeacherScores]) -> None:
        rows = []
        for key, score in scores.items():
            tensors = {f: getattr(score, f).contiguous().cpu() for f in _FIELDS if getattr(score, f) is not None}
            rows.append((key, save({**tensors, f"teacher:{score.teacher}": score.logprobs_T.new_zeros(0).cpu()})))
        try:
            with self.db:  # one transaction
                self.db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            raise self._refuse(f"given {len(rows)} more", error) from error

    def _refuse(self, asked: str, error: Exception) -> TeacherError:
        return TeacherError(
            f"the cache of the teacher's scores, {self.path}, cannot be {asked}: {error}. Free the disk, delete the "
            "file if it is damaged (its scores are made again), or set score_cache = false in that teacher's section."
        )
