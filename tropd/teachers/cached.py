"""A teacher's scores, kept on disk: the same tokens are scored only once, even if the process is killed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.errors import TeacherError
from tropd.objective.evidence import Needs
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.types import Rollout, TeacherScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEPT = Needs.SAMPLED | Needs.TOPK | Needs.TEACHER_ENTROPY
_SLICE = 64
"""Rollouts that are scored before a write to disk: as many as a crash can cost."""
_FIELDS = ("logprobs_T", "topk_ids_TK", "topk_logprobs_TK", "entropy_T")


class Cached(Teacher):
    """Asks its teacher only for missing scores.  Worth it if texts come again: data sets, replay, resumed steps.

    Whole distributions and hidden states are too large to keep, so it does not offer them.
    """

    def __init__(self, teacher: Teacher, path: Path, identity: str) -> None:
        """`identity` names the teacher's weights: other weights, other scores."""
        self.teacher, self.path, self.identity = teacher, path, identity
        self.name, self.capabilities = teacher.name, teacher.capabilities & _KEPT
        self.context, self.noise, self.elsewhere = teacher.context, teacher.noise, teacher.elsewhere
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One thread at a time, which need not be this one: batches may be written ahead.
            self.db = sqlite3.connect(path, check_same_thread=False)
            self.db.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score BLOB NOT NULL)")
            self.db.commit()
        except (sqlite3.Error, OSError) as error:
            raise self._refuse("opened", error) from error

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        """Scores every row, whatever `top_k_rows` wants now."""
        request.check(self)
        keys = [self._key(rollout, request.needs, request.top_k) for rollout in request.rollouts]
        known = self._read(set(keys))
        if known:
            TAKEN.add(FastPath.KEPT_SCORES)
        missing = list({key: place for place, key in enumerate(keys) if key not in known}.items())
        whole = replace(request, top_k_rows=None)
        for start in range(0, len(missing), _SLICE):
            part = missing[start : start + _SLICE]
            scores = self.teacher.score(whole.take([place for _, place in part]))
            fresh = dict(zip([key for key, _ in part], scores, strict=True))
            self._write(fresh)
            known |= fresh
        return [known[key] for key in keys]

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device) -> None:
        self.teacher.prepare(tokenizer, vocab_size, device)

    def whole(self) -> AbstractContextManager[None]:
        return self.teacher.whole()

    def close(self) -> None:
        self.db.close()
        self.teacher.close()

    def _key(self, rollout: Rollout, needs: Needs, top_k: int) -> str:
        wanted = [top_k if Needs.TOPK in needs else 0, (needs & _KEPT).value]
        shape = json.dumps([self.identity, rollout.token_ids, len(rollout.prompt.token_ids), wanted])
        return hashlib.sha256(shape.encode()).hexdigest()

    def _read(self, keys: set[str]) -> dict[str, TeacherScores]:
        scores: dict[str, TeacherScores] = {}
        try:
            for key in sorted(keys):
                row = self.db.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    held = load(row[0])
                    name = next(n for n in held if n.startswith("teacher:")).removeprefix("teacher:")
                    kept: dict[str, Any] = {f: held[f] for f in _FIELDS if f in held}
                    scores[key] = TeacherScores(**kept, teacher=name)
        except (sqlite3.Error, OSError, SafetensorError, ValueError, TypeError, StopIteration) as error:
            raise self._refuse("read", error) from error
        return scores

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

    def _refuse(self, attempt: str, error: Exception) -> TeacherError:
        return TeacherError(
            f"the cache of the teacher's scores, {self.path}, cannot be {attempt}: {error}. Free the disk, delete the "
            "file if it is damaged (its scores are made again), or set score_cache = false in that teacher's section."
        )
