"""What a run's numbers depend on besides its run file, so that a run that is resumed elsewhere says so."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from tropd.base.names import is_name, shown, source_of
from tropd.model.origins import content_of, name_of
from tropd.version import __version__

if TYPE_CHECKING:
    from tropd.training.assembly import Parts


def environment_of(parts: Parts) -> dict[str, str]:
    """Everything that may change the numbers of a run, if only in their last bits."""
    device = parts.learner.device
    on_cpu = f"a CPU with {torch.backends.cpu.get_cpu_capability()}"
    environment = {
        "tropd": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": str(torch.get_num_threads()),
        "processes": str(parts.world.size),
        "device": on_cpu if device.type == "cpu" else device.type,
    }
    if device.type == "cuda":
        environment["device"] = torch.cuda.get_device_name(device)
    named: dict[str, str | None] = {
        "grader": parts.run.grader,
        "evaluation.grader": parts.run.evaluation.grader,
        "method": parts.run.method.name,
        **parts.run.own_parts,
    }
    for kind, models in (("teacher", parts.run.all_teachers), ("reader", parts.run.all_readers)):
        for name, model in models.items():
            named[f"{kind} {name}"] = model.path
            named[f"briefing of {kind} {name}"] = getattr(model.briefing, "kind", None)
    return environment | {what: said for what, name in named.items() if (said := _source_of(name)) is not None}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Notes on what has changed since the run was last at work."""
    other = [
        f"{name} {now.get(name, 'none')} instead of {before.get(name, 'none')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if not other:
        return []
    return [f"the run goes on with {', '.join(other)}: from here on it may differ from an undisturbed run."]


def _source_of(name: str | None) -> str | None:
    """The user's own code, named by a hash of its file."""
    source = source_of(name) if name is not None and is_name(name) else None
    if name is None or source is None:
        return None
    return f"{shown(name)} ({name_of(content_of({source.name: source}))[:8]})"
