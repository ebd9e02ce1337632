"""The dialects by a run file's `kind`."""

from __future__ import annotations

from tropd.config.models import ServerConfig
from tropd.servers.dialect import Dialect
from tropd.servers.openai import OpenAI
from tropd.servers.sglang import SGLang
from tropd.servers.vllm import Vllm

DIALECTS: dict[str, Dialect] = {dialect.kind: dialect for dialect in (Vllm(), SGLang(), OpenAI())}


def dialect_of(settings: ServerConfig) -> Dialect:
    """The dialect of these settings."""
    return DIALECTS[settings.kind]
