"""Flags on top of a default, by tyro, with tropd's own refusals as tropd says them: one sentence, not a box."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import tyro

from tropd.errors import ConfigError, OutOfRange, TropdError


def read_flags(target: Any, flags: Sequence[str], prog: str, **how: Any) -> Any:
    """What tyro makes of the flags: `default` as they change it, or a function called with them."""
    boxed = StringIO()
    try:
        with redirect_stderr(boxed):
            return tyro.cli(target, args=list(flags), prog=prog, **how)
    except SystemExit as stop:
        if not stop.code:
            raise
        if refusal := _refusal_behind(stop):
            raise refusal from None
        sys.stderr.write(boxed.getvalue())
        named = dict.fromkeys(flag for flag in flags if flag.startswith("--") and flag in boxed.getvalue())
        said = f"flags above are not understood{': ' * bool(named)}{', '.join(named)}"
        raise ConfigError(f"the {said}. `{prog} --help` lists those there are.") from None


def _refusal_behind(error: BaseException | None) -> TropdError | None:
    """What tropd said, with the whole path of the flag, which tyro knows."""
    where = ""
    while error is not None and not isinstance(error, TropdError):
        asked = getattr(error, "arg", "")
        where = asked.replace("-", "_") if isinstance(asked, str) else where
        error = error.__cause__ or error.__context__
    return OutOfRange(where, error.message) if where and isinstance(error, OutOfRange) else error
