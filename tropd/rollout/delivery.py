"""Delivers the student's weights to the servers that write its rollouts.

    give      export --> every server: reload, reset the prefix cache --> canary == the trainer's own numbers
    check     canary again: no server restarted in between
    rest      every server sleeps, if the run wants that, and has no weights until the next `give`

A LoRA student sends its adapter alone, under a new name each time; its base sleeps in the server's CPU memory.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tropd.base.background import in_background
from tropd.checkpoints.export import export_adapter, export_untied
from tropd.errors import CheckpointError, EngineError, EngineOutOfSync, ServerRefused, TropdError
from tropd.rollout import canary, draws
from tropd.rollout.draw_check import show_draws
from tropd.rollout.jobs import ServedStudent, score_canary
from tropd.servers.dialects import dialect_of
from tropd.servers.pool import Pool

log = logging.getLogger("tropd.rollout")
NOT_FOUND = 404
_NATS = {torch.float32: 2e-3, torch.float64: 2e-3}
_NATS_OF_HALF_PRECISION = 0.1


class Delivery:
    """Gives servers the weights of `model` and tracks their version.  Trainer and servers share `folder`; `text` is the
    canary."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        name: str,
        text: tuple[int, ...],
        *,
        model: Any,
        tokenizer: Any,
        folder: Path,
        vocab_size: int,
        sync_nats: float | None = None,
        kept: bool = True,
        sleeps: bool = False,
        wary: bool = False,
        version: int = 0,
        export: Callable[[Any, Any, Path], Path] | None = None,
        whose: tuple[str, str] = ("student", "rollout.sync_nats"),
    ) -> None:
        """`pools` has one server each, which serves the student, or its base, under `name`.  `kept`: the folder stays
        when this is closed.  `wary`: servers show how they draw at every update, not only at the first.  `whose`:
        whose weights errors speak of, and the setting that holds `sync_nats`."""
        self.whose, self.knob = whose
        self.pools, self.name, self.text = pools, name, text
        self.model, self.tokenizer, self.folder, self.kept = model, tokenizer, folder, kept
        self.vocab_size, self.version = vocab_size, version
        dtype = next(model.parameters()).dtype
        self.sync_nats = sync_nats if sync_nats is not None else _NATS.get(dtype, _NATS_OF_HALF_PRECISION)
        self.adapter = bool(getattr(model, "peft_config", None))
        self.export = export or (export_adapter if self.adapter else export_untied)
        weights = dialect_of(next(iter(pools.values())).settings).weights
        assert weights is not None, "servers that take no weights are refused before"
        self.weights, self.sleeps = weights, sleeps
        self._resting = False
        self._expected: canary.Expected | None = None  # until the servers have been given weights
        self._found: dict[str, canary.Found] = {}
        self._loaded: set[str] = set()  # names of adapters
        self._strange, self.wary = True, wary  # they have not shown yet how they draw
        self._drawn: dict[str, draws.Gathered] = {}
        self.notes = self._meet()

    @property
    def student(self) -> ServedStudent:
        """The student as the servers hold it now."""
        return ServedStudent(model=self.asked, version=self.version, vocab_size=self.vocab_size)

    @property
    def asked(self) -> str:
        """The model name for requests: the adapter of a version, if there is one."""
        return f"tropd-{self.version}" if self.adapter else self.name

    @property
    def given(self) -> bool:
        """Whether the servers have the weights of `version`."""
        return self._expected is not None and not self._resting

    def give(self, version: int) -> None:
        """Give every server the weights of `model` as they are now, and make sure that it computes with them."""
        before, old = (self._expected, dict(self._found)), self.asked
        self._expected, self.version = None, version
        self._strange = self._strange or self.wary
        expected = canary.expect(self.model, self.text, self.vocab_size)
        self._write_down()
        if self.sleeps:
            self._make_room()
        self._push(expected)
        for url, found in self._found.items():
            if before[0] is not None and url in before[1]:
                canary.compare_moves(url, (before[0], before[1][url]), (expected, found))
        self._expected, self._resting = expected, False
        if self.adapter and old in self._loaded and old != self.asked:
            self._unload(old)

    def repeat(self) -> None:
        """Give every server the weights of `version` again, because one of them has lost them."""
        assert self._expected is not None, "weights are given again after they were given"
        self._strange = True
        self._push(self._expected)

    def check(self, anew: bool = False) -> None:
        """Make sure that every server still computes with the weights that it got; `anew`: one of them was away, so its
        draws are checked again."""
        assert self._expected is not None, "weights are compared after they were given"
        self._strange = self._strange or anew
        self._verify(self._expected)

    def rest(self) -> None:
        """Put every server to sleep, if the run wants that."""
        if self.sleeps:
            self._sleep()

    def close(self) -> None:
        if not self.kept:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _meet(self) -> tuple[str, ...]:
        """Test that servers can sleep, if the run wants that; else wake those that were left asleep.  Returns notes."""
        if not self.sleeps:
            for url, pool in self.pools.items():
                if self.weights.wake_if_asleep(pool):
                    log.warning("%s was asleep and has been woken up.", url)
            return ()
        try:
            notes = [self.weights.objection(pool) for pool in self.pools.values()]
            self._sleep()
        except ServerRefused as error:
            raise EngineError(
                f"{error} rollout.servers_sleep asks for servers that do: {self.weights.sleep_advice}, or leave it out."
            ) from error
        return tuple(note for note in notes if note)

    def _sleep(self) -> None:
        for pool in self.pools.values():
            self.weights.sleep(pool, self.adapter)
        self._resting = True

    def _write_down(self) -> None:
        try:
            self.export(self.model, self.tokenizer, self.folder)
        except (CheckpointError, OSError) as error:
            raise EngineError(
                f"the weights for the servers could not be written to {self.folder}: {error.__cause__ or error}. Free "
                "its disk, or name another place in rollout.weights_folder."
            ) from error

    def _make_room(self) -> None:
        """Free torch's cached GPU memory for a server on the same GPU."""
        if next(self.model.parameters()).is_cuda:
            torch.cuda.empty_cache()

    def _push(self, expected: canary.Expected) -> None:
        """Send to all servers at the same time: each takes as long to load as alone."""
        underway = [in_background(partial(self._push_to, url, pool)) for url, pool in self.pools.items()]
        wait(underway)  # whatever becomes of one: the others read the folder
        failed = [error for one in underway if (error := one.exception()) is not None]
        if len(failed) > 1 and all(isinstance(error, TropdError) for error in failed):
            kind = type(failed[0]) if len({type(error) for error in failed}) == 1 else EngineError
            raise kind(f"{len(failed)} of {len(underway)} servers failed. " + " ".join(map(str, failed))) from failed[0]
        for error in failed:
            raise error
        self._verify(expected)

    def _push_to(self, url: str, pool: Pool) -> None:
        try:
            with self.weights.waking(pool, self.adapter) if self.sleeps else nullcontext():
                self._load(pool)
            if not self.adapter:
                self.weights.forget(pool)
        except ServerRefused as error:
            raise EngineError(f"{error} {self._cure(url, error)}") from error

    def _load(self, pool: Pool) -> None:
        if not self.adapter:
            self.weights.give(pool, self.folder)
            return
        self.weights.give_adapter(pool, self.asked, self.folder)
        self._loaded.add(self.asked)

    def _unload(self, name: str) -> None:
        self._loaded.discard(name)
        for url, pool in self.pools.items():
            try:
                self.weights.drop_adapter(pool, name)
            except ServerRefused as error:  # a server that restarted does not have it
                log.info("%s: %s", url, error)

    def _verify(self, expected: canary.Expected) -> None:
        for url, pool in self.pools.items():
            found = score_canary(pool, self.text, self.student)
            try:
                canary.compare(url, expected, found, self.sync_nats, self.whose, self.knob)
            except EngineOutOfSync as error:
                raise EngineOutOfSync(f"{error}{self._advice()}") from error
            self._found[url] = found
        if self._strange:
            show_draws(self.pools, self.text, expected.after_V, self._drawn, self.student)
            self._strange = False

    def _cure(self, url: str, error: ServerRefused) -> str:
        if error.status == NOT_FOUND:
            return self.weights.advice(self.adapter)
        return f"{url} has to see {self.folder} and serve a model of the same shape (its log says more)."

    def _advice(self) -> str:
        removed = "" if self.kept else ", until this run ends (rollout.weights_folder)"
        if self.adapter:
            return (
                "Does the server hold the student's own base model, in the same precision? The adapter: "
                f"{self.folder}{removed}."
            )
        return (
            f"Is its --dtype the {self.whose}'s? The weights that it was given are in {self.folder}{removed}: start it "
            f"with --model on that folder, or raise {self.knob} if its precision is lower."
        )


def weights_folder(place: str | None, directory: Path) -> Path:
    """The folder for weights of the run in `directory`.  Runs with the same setting get separate folders."""
    if place is None:
        return directory / "rollout_weights"
    whose = directory.resolve()
    number = hashlib.sha256(str(whose).encode()).hexdigest()[:8]
    return Path(place).expanduser() / f"tropd-{whose.name}-{number}"
