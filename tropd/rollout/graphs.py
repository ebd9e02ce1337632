"""Steps of fixed shape, recorded as CUDA graphs and replayed, without the cost of launching each operation.

A graph holds addresses, not values, so it sees weights that are trained in place.  It is recorded again if an address,
a type, an adapter or the cache's shape has changed.  A model that cannot be recorded runs its plain steps.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model import hf
from tropd.model.head import differ
from tropd.rollout.slots import SlotCache

Step = Callable[[Tensor, Any], Tensor]
"""The logits [R, V] after the last tokens [R, 1], whose keys and values enter the cache."""

_ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "merged_adapters")
"""Attributes of a PEFT layer that its forward depends on."""


@dataclass(frozen=True, eq=False)
class Recording:
    replay: Callable[[], Any]
    logits_RV: Tensor
    """Tensors that every replay overwrites."""


Recorder = Callable[[Callable[[], Tensor]], Recording]


class CudaRecorder:
    """Recordings that share memory for intermediate results: read one replay before the next begins."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Recording:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # libraries allocate what they need at their first call
        torch.cuda.current_stream().wait_stream(stream)
        # The outer context: a recording that fails does not give the stream back.  thread_local: another thread may
        # use CUDA meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
        ):
            logits_RV = run()
        return Recording(graph.replay, logits_RV)


class Graphs:
    """The recorded steps of one model."""

    def __init__(self) -> None:
        self.recorded: dict[Hashable, Recording] = {}
        self.recorder: Recorder | None = None
        self.refused = False
        """After a failed recording, the model is not tried again."""
        self._model: Hashable = None
        self._generation = -1

    def begin(self, model: nn.Module) -> bool:
        """Before a call of generate, drop recordings of another model; whether there were any."""
        described = _described(model)
        changed, self._model = described != self._model, described
        if changed:
            self.recorded.clear()
        return changed

    def forget(self) -> None:
        """Free the memory of all recordings."""
        self.recorded.clear()
        if isinstance(self.recorder, CudaRecorder):
            self.recorder = None

    def __call__(self, step: Step, last_ids_R1: Tensor, cache: Any) -> Tensor:
        """The step's logits, from a replay if the step can be recorded."""
        if not isinstance(cache, SlotCache) or self.refused:
            return step(last_ids_R1, cache)
        if self.recorder is None and cache.device.type == "cuda":
            self.recorder = CudaRecorder()
        if self.recorder is None:
            return step(last_ids_R1, cache)
        if self._generation != cache.generation:
            self.recorded.clear()
            self._generation = cache.generation
        recording = self.recorded.get((step, cache.shape))
        if recording is None:
            return self._record(self.recorder, step, last_ids_R1, cache)
        TAKEN.add(FastPath.RECORDED_STEPS)
        recording.replay()
        return recording.logits_RV

    def _record(self, recorder: Recorder, step: Step, last_ids_R1: Tensor, cache: SlotCache) -> Tensor:
        """Run the step plainly, record it, and compare.  A step may run again: it writes the same columns."""
        plain_RV = step(last_ids_R1, cache)
        live, problem = slice(len(cache.starts)), None
        try:
            recording = recorder(lambda: step(last_ids_R1, cache))
            recording.replay()
            if differ(recording.logits_RV[live], plain_RV[live]):
                problem = "a replay gives other logits"
            self.recorded[step, cache.shape] = recording
        except Exception as error:  # whatever a model does that cannot be recorded
            problem = error
        if problem and bool(plain_RV[live].isfinite().all()):  # else the caller is about to refuse the logits
            self.refused = True
            self.forget()
            hf.step_aside("A step of generation is not recorded as a CUDA graph and launched anew each time", problem)
        return plain_RV


def _described(model: nn.Module) -> Hashable:
    """Everything that must stay the same for a recorded step."""
    tensors = [*model.parameters(), *model.buffers()]
    adapters = [
        repr(vars(module)[name]) for module in model.modules() for name in _ADAPTER_STATE if name in vars(module)
    ]
    return tuple((t.data_ptr(), t.dtype, tuple(t.shape)) for t in tensors), tuple(adapters)
