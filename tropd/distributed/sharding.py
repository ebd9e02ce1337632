"""A model sharded over the ranks with FSDP2; the student exists twice.

    whole   the plain model in its own precision: writes rollouts, is measured, is exported.  Empty while training
    cut     the same model, 1/size of each float32 parameter on each rank: is trained, is saved

Before the rollouts of a step the whole is filled from the cut, with one gather of all parameters.  In training the
layers are gathered one by one.  Embedding, last norm and head are gathered once per micro-batch, from its forward to
the end of its backward, so that the head's weight can be read directly, tile by tile.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from tropd.distributed.ranks import Ranks
from tropd.errors import ConfigError
from tropd.model import hf
from tropd.model.forward import Forward
from tropd.model.head import causal_lm_of

_METHOD = "tropd_states"


class Shards:
    """The sharded student: `whole` is filled at the start."""

    def __init__(self, whole: nn.Module, world: Ranks) -> None:
        self.whole, self.filled = whole, True
        self.cut = _twin_of(whole)
        sources = dict(whole.named_parameters())
        dtype = next(whole.parameters()).dtype
        policy = MixedPrecisionPolicy()
        if dtype in (torch.bfloat16, torch.float16):  # the cut parameters are the float32 masters
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        _cut(self.cut, mesh_of(whole, world), policy, sources)
        for module in self.cut.modules():
            if isinstance(module, FSDPModule):
                # FSDP averages gradients over ranks.  The plan has divided every loss by the count of the whole batch
                # already, so gradients add: this is the one place where the averaging is undone.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no sum with a factor

    def forward(self, plain: Forward) -> Forward:
        """The forward pass for training: like that of the whole, through the cut."""
        return _through(self.cut, plain)

    @torch.no_grad()
    def fill(self) -> None:
        """Gather every parameter into the whole, all ranks together."""
        if self.filled:
            return
        wholes = dict(self.whole.named_parameters())
        for name, parameter in self.cut.named_parameters():
            sent: Any = parameter.detach().to(wholes[name].dtype)
            wholes[name].data = sent.full_tensor()
        self.filled = True

    def empty(self) -> None:
        """Free the memory of the whole, which is stale from the first gradient on."""
        for parameter in self.whole.parameters():
            parameter.data = parameter.data.new_empty(0)
        self.filled = False

    def idle(self) -> None:
        """Forward and backward without data: every rank takes part in each gather and each sum of gradients."""
        self.cut.train()
        inside: Any = self.cut
        token = torch.zeros((1, 1), dtype=torch.int64, device=next(self.cut.parameters()).device)
        hidden_BTH = getattr(inside, _METHOD)(input_ids=token, use_cache=False)[0]
        head = inside.get_output_embeddings()
        nothing = hidden_BTH[:0].sum() + sum(p[:0].sum() for p in head.parameters())
        nothing.backward()

    def weights(self) -> dict[str, Tensor]:
        """The weights of a checkpoint: in the precision of the whole, with persistent buffers."""
        dtypes = {name: p.dtype for name, p in self.whole.named_parameters()}
        persistent = set(self.whole.state_dict())
        kept = {name: p.detach().to(dtypes[name]) for name, p in self.cut.named_parameters()}
        return kept | {name: b for name, b in self.whole.named_buffers() if name in persistent}

    def masters(self) -> dict[str, Tensor]:
        """The float32 parameters if the whole is in half precision, with the names of an unsharded optimiser."""
        dtypes = {name: p.dtype for name, p in self.whole.named_parameters()}
        return {f"master.{n}": p.detach() for n, p in self.cut.named_parameters() if p.dtype != dtypes[n]}


class ShardedTeacher:
    """A frozen teacher, sharded in place: layers are gathered one by one, the rest stays gathered after first use."""

    def __init__(self, model: nn.Module, world: Ranks) -> None:
        self.model, self.world, self.begun = model, world, False
        _cut(model, mesh_of(model, world), MixedPrecisionPolicy(), None)

    def forward(self, plain: Forward) -> Forward:
        return _through(self.model, plain)

    def more_passes(self, number: int) -> int:
        """How many passes this rank must add to its own, because all ranks take part in every gather.

        Also lets FSDP forget the passes before: it keeps them for a backward that a teacher never sees.
        """
        root: Any = self.model
        if self.begun:
            root.reset_iter_state()
        self.begun = True
        return self.world.most(number) - number

    def put_away(self) -> None:
        """Free what stays gathered, so that the parameters are this rank's parts again; the next pass gathers anew."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The whole teacher on every rank, so that ranks may call it different numbers of times to write texts."""
        parts = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        root, layers = parts[0], parts[1:]
        for part in parts:
            part.unshard()
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(True, recurse=False)
                layer.reshard()
            root.reset_iter_state()


def check_torch() -> None:
    """Refuse a torch without the recent parts of FSDP2 that sharding uses."""
    parts = ("set_force_sum_reduction_for_comms", "reset_iter_state")
    if missing := [name for name in parts if not hasattr(FSDPModule, name)]:
        raise ConfigError(
            f"a sharded model was asked for, but FSDP2 of torch {torch.__version__} has no {missing[0]}: install torch "
            '2.13 or newer, or set parallel.student and parallel.teacher to "replicated".'
        )


def laid_out(source: Any, like: Any) -> Tensor:
    """A tensor, whole or in parts, as another one lies over the ranks; all ranks call together."""
    if not isinstance(like, DTensor):
        return source.full_tensor()
    if isinstance(source, DTensor):
        assert source.placements == like.placements, "student and teacher are cut alike"
        return source
    return distribute_tensor(source, like.device_mesh, like.placements, src_data_rank=None)


def mesh_of(model: nn.Module, world: Ranks) -> DeviceMesh:
    return init_device_mesh(next(model.parameters()).device.type, (world.size,))


def _through(model: nn.Module, plain: Forward) -> Forward:
    """A forward pass whose hidden states come from the cut model, and whose head reads that model's weight."""
    inside = causal_lm_of(model)
    other = copy.copy(plain)
    other.model, other.backbone, other.run_backbone = model, inside.get_decoder(), getattr(inside, _METHOD)
    other.head = replace(plain.head, module=inside.get_output_embeddings())
    return other


def _twin_of(model: nn.Module) -> Any:
    """A copy without weights; tied parameters stay tied."""
    bare = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta", dtype=torch.float32), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, bare)


def _cut(model: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy, sources: dict[str, nn.Parameter] | None) -> None:
    """Shard layer by layer, so that only one whole layer exists beside the source; then the rest."""
    blocks = hf.block_names(model)
    layers = {name: m for name, m in model.named_modules() if type(m).__name__ in blocks}
    if not layers:
        raise ConfigError(
            f"a sharded model was asked for, but {type(model).__name__} does not say what its layers are "
            '(_no_split_modules). Set parallel.student and parallel.teacher to "replicated".'
        )
    for name, module in [*layers.items(), ("", model)]:
        if sources is not None:
            _copy_weights(module, name, sources)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model)
    setattr(model, _METHOD, MethodType(_states, model))
    register_fsdp_forward_method(model, _METHOD)


def _states(model: Any, **inputs: Any) -> tuple[Any, ...]:
    """The model without its head, as a method of the root: FSDP gathers only when the root is called."""
    output = model.get_decoder()(**inputs)
    return output[0], getattr(output, "hidden_states", None)


def _copy_weights(module: nn.Module, prefix: str, sources: dict[str, nn.Parameter]) -> None:
    """Fill the empty parameters of a module in float32; tied parameters share one tensor."""
    made: dict[int, nn.Parameter] = {}
    for place, owner in module.named_modules(prefix=prefix):
        for name, bare in owner._parameters.items():
            if bare is None or not bare.is_meta:
                continue
            if id(bare) not in made:
                source = sources[f"{place}.{name}" if place else name].detach()
                made[id(bare)] = nn.Parameter(source.float().clone(), requires_grad=bare.requires_grad)
            owner._parameters[name] = made[id(bare)]
