"""On-policy distillation of language models that refuses to fail silently.

Public names are loaded when they are first asked for: `import tropd` costs nothing, and `import tropd.objective` needs
torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tropd.config.run import Run
    from tropd.methods import METHODS, TrOPD
    from tropd.objective import Objective, Term, distillation_loss
    from tropd.run.start import train
    from tropd.version import __version__

_HOME = {
    "METHODS": "tropd.methods",
    "Objective": "tropd.objective",
    "Run": "tropd.config.run",
    "Term": "tropd.objective",
    "TrOPD": "tropd.methods",
    "distillation_loss": "tropd.objective",
    "__version__": "tropd.version",
    "train": "tropd.run.start",
}

__all__ = ["METHODS", "Objective", "Run", "Term", "TrOPD", "__version__", "distillation_loss", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tropd' has no attribute {name!r}; it has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return __all__
