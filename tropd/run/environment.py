"""What the numbers of a run depend on beside the run itself, so that a run which goes on elsewhere says so."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tropd.model.origins import content_of, name_of
from tropd.version import __version__

if TYPE_CHECKING:
    from tropd.training.assembly import Parts


def environment_of(parts: Parts) -> dict[str, str]:
    """Another value of any of these may give other numbers, if only in their last bits."""
    device = parts.learner.device
    on_cpu = f"a CPU with {torch.backends.cpu.get_cpu_capability()}"
    found = {
        "tropd": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": str(torch.get_num_threads()),
        "processes": str(parts.world.size),
        "device": on_cpu if device.type == "cpu" else device.type,
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    graders = {"grader": _grader_of(parts.run.grader), "evaluation.grader": _grader_of(parts.run.evaluation.grader)}
    return found | {name: said for name, said in graders.items() if said is not None}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is said of a run that goes on with something else."""
    other = [
        f"{name} {now.get(name, 'none')} instead of {before.get(name, 'none')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if not other:
        return []
    return [f"the run goes on with {', '.join(other)}: from here on it may differ from one that was left alone."]


def _grader_of(name: str | None) -> str | None:
    """A grader of the user's own, by the content of its module."""
    module, colon, _ = (name or "").partition(":")
    source = getattr(sys.modules.get(module), "__file__", None)
    if not colon or source is None:
        return None
    return f"{name} ({name_of(content_of({module: Path(source)}))[:8]})"
