"""What tropd knows of the insides of `transformers`, each with the versions that it was run with.

Where an inside is not as expected, whoever asked takes the plain path and says so.
"""

from __future__ import annotations

import inspect
from typing import Any

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What a model's forward calls its key-value cache: the first since 5.24, the second before."""


def cache_argument(model: Any) -> str | None:
    """The name under which this model's forward takes a key-value cache; None where it takes none."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in takes), None)
