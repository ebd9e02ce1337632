"""How much a forward pass holds at once: memory and speed, never the result."""

from __future__ import annotations

from dataclasses import dataclass

from tropd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """What a model reads at once, and what of its head is there at once."""

    tokens_per_batch: int = 8192
    """Prompt and response tokens of the rollouts that are read together, padding included."""
    tile_tokens: int = 512
    """Response tokens whose logits are there at once."""
    tile_vocab: int | None = None
    """How many of the vocabulary's logits are there at once (`tropd.model.lean`); None: all."""

    def __post_init__(self) -> None:
        if self.tile_tokens < 1:
            raise ConfigError(f"tile_tokens = {self.tile_tokens} was asked for; a tile holds at least 1 token.")
