"""What the hub's library says when the hub does not answer: one line, where it would print two for every attempt."""

from __future__ import annotations

import logging
import math
import re
import time

_AGAIN_SECONDS = 60.0
_FAILED = re.compile(r"(.+) thrown while requesting (\w+ (https?://[^/\s]+)\S*)", re.DOTALL)


class SaidOnce(logging.Filter):
    """Keeps the first of equal complaints about one host, until there have been none for a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        failed = _FAILED.fullmatch(text)
        if failed is None:
            return not text.startswith("Retrying in ")
        cause, request, host = failed.groups()
        before, now = self.last.get((cause, host), -math.inf), time.monotonic()
        self.last[cause, host] = now
        record.msg, record.args = (
            f"no answer from the Hugging Face hub: {cause} ({request}). Asking again for a while; with "
            "HF_HUB_OFFLINE=1 only what is on this machine is used, at once.",
            (),
        )
        return now - before > _AGAIN_SECONDS


_ONCE = SaidOnce()


def shorten() -> None:
    """Only a command line does this: whoever imports tropd sets up logging himself."""
    logging.getLogger("huggingface_hub.utils._http").addFilter(_ONCE)
