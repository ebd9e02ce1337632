"""How much a forward pass holds at once: memory and speed, never the result."""

from __future__ import annotations

from dataclasses import dataclass

from tropd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How many tokens a model reads at once, and how much of its logits exists at once."""

    tokens_per_batch: int = 8192
    """Prompt and response tokens of the rollouts that are read together, padding included."""
    tile_tokens: int = 512
    """Response tokens whose logits exist at once."""
    tile_vocab: int | None = None
    """How many logits of the vocabulary exist at once (`tropd.model.lean`); None: all."""

    def __post_init__(self) -> None:
        if self.tile_tokens < 1:
            raise ConfigError(f"tile_tokens = {self.tile_tokens} was asked for; a tile holds at least 1 token.")
