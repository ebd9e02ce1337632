"""Printing without control characters, which names of files, teachers and columns may hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from tropd.base.reading import printable


class PrintableConsole(Console):
    """rich's own colours and cursor movements pass; control characters in texts are shown as \\x1b."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text, lines=True), segment.style)

    def on_broken_pipe(self) -> None:
        """Let the command say how it ended; rich would leave with code 1 and no word."""
        raise


def tell(text: str) -> None:
    """Print text with its control characters escaped; line breaks stay."""
    print(printable(text, lines=True))
