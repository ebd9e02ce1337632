"""AdamW with float32 masters, clipping, and a learning rate that is a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tropd.errors import CheckpointError

if TYPE_CHECKING:
    from tropd.config.stages import OptimizerConfig

KINDS = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """Updates a model's trainable parameters.

    Half-precision parameters get a float32 copy that is updated in their place: bfloat16 has 8 bits, so an update below
    1/256 of a weight would be rounded away and the run would learn nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        total_steps: int,
        add_over_ranks: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        """`add_over_ranks` adds up the gradients of ranks that each hold the whole model."""
        self.add_over_ranks = add_over_ranks
        self.watch: Callable[[dict[str, Tensor]], AbstractContextManager[None]] = lambda masters: nullcontext()
        """Entered around each update, with the masters and their gradients."""
        self.config, self.total_steps, self.num_steps = config, total_steps, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: p.detach().float().clone() if p.dtype in (torch.bfloat16, torch.float16) else p
            for name, p in self.parameters.items()
        }
        self.adamw = torch.optim.AdamW(
            list(self.masters.values()),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )

    def step(self) -> tuple[float, float]:
        """One update with the current gradients: (gradient norm before clipping, learning rate)."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if master is not parameter:
                master.grad = parameter.grad.float()
        if self.add_over_ranks is not None:
            self.add_over_ranks([master.grad for master in self.masters.values() if master.grad is not None])
        rate = learning_rate(self.config, self.num_steps, self.total_steps)
        with self.watch(self.masters):
            norm = _number(nn.utils.clip_grad_norm_(list(self.masters.values()), self.config.max_gradient_norm))
            if math.isfinite(norm):  # a broken gradient is reported by the loop; the weights stay as they were
                for group in self.adamw.param_groups:
                    group["lr"] = rate
                self.adamw.step()
                self._copy_back()
        self.num_steps += 1
        for parameter in [*self.parameters.values(), *self.masters.values()]:
            parameter.grad = None
        return norm, rate

    @torch.no_grad()
    def _copy_back(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resume needs, by name."""
        tensors = {}
        for name, master in self.masters.items():
            state = self.adamw.state.get(master, {})
            tensors |= {f"{kind}.{name}": state[kind] for kind in KINDS if kind in state}
            if master is not self.parameters[name]:
                tensors[f"master.{name}"] = master
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor], num_steps: int) -> None:
        wanted = {f"master.{name}" for name, master in self.masters.items() if master is not self.parameters[name]}
        if tensors.keys() != wanted:  # before the first update there are no moments
            wanted |= {f"{kind}.{name}" for kind in KINDS for name in self.masters}
        if odd := sorted(tensors.keys() ^ wanted):
            raise CheckpointError(
                f"the saved optimiser holds {len(tensors)} tensors, this one has {len(wanted)}; they differ in "
                f"{odd[0]!r}{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}. It belongs to another model, to "
                "another precision, or to another version of tropd."
            )
        self.num_steps = num_steps
        for name, master in self.masters.items():
            if f"master.{name}" in tensors:
                with torch.no_grad():
                    master.copy_(tensors[f"master.{name}"])
            if f"step.{name}" in tensors:
                moments = {kind: tensors[f"{kind}.{name}"].to(master.device) for kind in KINDS[1:]}
                # How often the moments moved, which a skipped update leaves behind num_steps; torch keeps it on the CPU
                self.adamw.state[master] = {"step": tensors[f"step.{name}"].clone(), **moments}


def _number(norm: Any) -> float:
    """The norm over all parameters; with sharding each rank contributes a part."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant, or down to 0 at the end."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    u = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * (1 - u if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * u)))


def local(x: Tensor) -> Tensor:
    """Of a sharded tensor, this process's part."""
    to_local = getattr(x, "to_local", None)
    return x if to_local is None else to_local()
