"""A package of somebody's own: a method, a grader and a teacher, as docs/own_parts.md shows them."""
