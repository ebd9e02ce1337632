"""Ways for a file to be wrong, whatever it should hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

DEEP = 100_000

Spoil = Callable[[Path], None]
"""Makes the file at a path wrong."""


def content(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(path: Path) -> None:
        before = path.read_bytes() if path.exists() else b"{}"
        path.unlink(missing_ok=True)  # it may be a link to a file that others read
        path.write_bytes(change(before))

    return spoil


def _instead(make: Callable[[Path], object]) -> Spoil:
    def spoil(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return spoil


KINDS: dict[str, Spoil] = {
    "fifo": _instead(os.mkfifo),
    "endless": _instead(lambda path: path.symlink_to("/dev/zero")),
    "random": _instead(lambda path: path.symlink_to("/dev/urandom")),
    "folder": _instead(lambda path: path.mkdir()),
    "loop": _instead(lambda path: path.symlink_to(path.name)),
}
"""What is no file at all."""

BYTES: dict[str, Spoil] = {
    "empty": content(lambda _: b""),
    "cut": content(lambda whole: whole[: whole.rfind(b"\n", 0, len(whole) * 2 // 3) + 4]),
    "noise": content(lambda _: bytes(range(256)) * 8),
    "zeros": content(lambda _: b"\0" * 4096),
    "utf16": content(lambda whole: whole.decode(errors="replace").encode("utf-16")),
}

JSON: dict[str, Spoil] = {
    "deep": content(lambda _: b"[" * DEEP),
    "deep object": content(lambda _: b'{"a":' * DEEP),
    "list": content(lambda _: b"[]\n"),
    "number": content(lambda _: b"3\n"),
    "long number": content(lambda _: b"9" * 5000 + b"\n"),
}

MISSING: dict[str, Spoil] = {"missing": lambda path: path.unlink()}
