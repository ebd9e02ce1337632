"""Any server with OpenAI's API and nothing more."""

from __future__ import annotations

from tropd.servers.dialect import Dialect


class OpenAI(Dialect):
    """Only chat: it names tokens by their texts, which do not identify a token id."""

    kind = "openai"
    no_scores = "an OpenAI-compatible server scores no token ids; it can write texts."
    no_texts = "an OpenAI-compatible server does not give token ids."
    no_weights = "weights can be given to vLLM servers only."
