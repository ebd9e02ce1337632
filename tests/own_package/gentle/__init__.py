"""A package of somebody's own: a part of each kind, as docs/own_parts.md shows them."""
