"""The fast paths: code that runs only from some size on, or only where something was kept, and which of it has run.

Each must give what the plain path gives.  A test whose sizes switch a fast path off does not test it, so every
fast path notes here that it ran, and tests assert that the runs they compare took the paths that they are about.
"""

from __future__ import annotations

from enum import StrEnum


class FastPath(StrEnum):
    DECODER = "decoder"
    """A step of generation without the model's own forward pass."""
    PACKED_MATRICES = "packed matrices"
    """Weights that oneDNN has laid out for a few rows."""
    SHARED_PROMPTS = "shared prompts"
    """Equal prompts are read once."""
    REFILLED_BATCH = "refilled batch"
    """Rows enter while others are being written."""
    SEVERAL_PREFILLS = "several prefills"
    """Prompts too many for one forward pass."""
    GROWN_CACHE = "grown cache"
    """Keys and values move into larger buffers."""
    FIXED_SHAPES = "fixed shapes"
    """Steps of generation that have one of a few shapes."""
    RECORDED_STEPS = "recorded steps"
    """Such steps recorded, as CUDA graphs, and replayed."""
    DRAWS_IN_PARTS = "draws in parts"
    """Tokens of some rows at a time, so that their probabilities stay in cache."""
    SPANS = "spans"
    """Sequences in one row without padding."""
    LIVE_ROWS = "live rows"
    """Only the tokens that some term may weigh are projected onto the vocabulary."""
    FUSED_HEAD = "fused head"
    """Loss and gradient from one visit of the vocabulary."""
    FUSED_READ = "fused read"
    """Log-probabilities from one visit of the vocabulary."""
    SOME_TOP_K = "some top-k"
    """The teacher's likeliest tokens at the rows that read them."""
    LEAN_HEAD = "lean head"
    """Loss and gradient with the vocabulary in tiles."""
    LEAN_READ = "lean read"
    """Log-probabilities with the vocabulary in tiles."""
    DENSE_HEAD = "dense head"
    """Loss and gradient of whole distributions, tile by tile."""
    SEVERAL_TILES = "several tiles"
    """More tokens than a tile of the head holds."""
    SOFTMAX_IN_PARTS = "softmax in parts"
    """Some rows of a tile at a time, so that they stay in cache."""
    SUPPORTS_IN_PARTS = "supports in parts"
    """Gradients at whole supports, some rows at a time."""
    ROUNDED_IN_PLACE = "rounded in place"
    """A half-precision gradient in the memory of its float32 sum."""
    COLUMNS = "columns"
    """The likeliest tokens among those columns of the vocabulary that have the largest maxima."""
    PEAKS = "peaks"
    """The logits that decide a row of a half-precision tile, again in float32."""
    KERNELS = "kernels"
    """Triton's, on a GPU or in its interpreter."""
    KEPT_TEXTS = "kept texts"
    """The teacher's texts from the disk."""
    KEPT_SCORES = "kept scores"
    """The teacher's scores from the disk."""
    WRITING_AHEAD = "writing ahead"
    """The next batch is written while this one is trained."""


TAKEN: set[FastPath] = set()
"""Those that have run in this process."""
