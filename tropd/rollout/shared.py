"""Rollouts from servers for several processes: rank 0 gives the weights, every rank requests and checks its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tropd.distributed.ranks import Ranks
from tropd.rollout import canary
from tropd.rollout.delivery import Delivery


class SharedDelivery(Delivery):
    """A Delivery on every rank; all ranks call `give` together."""

    def __init__(self, world: Ranks, *where: Any, **how: Any) -> None:
        self.world = world
        super().__init__(*where, **how)
        if not world.leads:
            self.export = _exported

    def give(self, version: int) -> None:
        if self.sleeps:
            self._make_room()
            self.world.wait()  # every rank has
        if self.world.leads:
            super().give(version)
        self.world.wait()  # the servers have them
        if not self.world.leads:
            super().give(version)

    def rest(self) -> None:
        if self.sleeps:
            self.world.wait()  # every rank has its texts
            if self.world.leads:
                self._sleep()
            self._resting = True
            self.world.wait()  # there is room

    def close(self) -> None:
        if self.world.leads:
            super().close()

    def _meet(self) -> tuple[str, ...]:
        return super()._meet() if self.world.leads else ()

    def _push(self, expected: canary.Expected) -> None:
        if self.world.leads or self.given:  # given: a server has lost them, whichever rank notices
            super()._push(expected)
        else:
            self._verify(expected)


def _exported(model: Any, tokenizer: Any, folder: Path) -> Path:
    return folder
