"""Inference servers of others, over their stock HTTP API: vLLM, SGLang, and whatever speaks OpenAI's.

    settings    how to reach them, and what is refused about that
    client      one server: one request, one answer within its limits
    pool        several: load by outstanding tokens, retries, a dead one is left out and tried again
    dialect     what every kind of server is asked for, and the sentence of a kind that cannot do it
    vllm        what vLLM is asked and how its answers are checked;  sglang and openai likewise
    dialects    which of them a run file means

Token ids go in and come out.  An answer is used whole or not at all: whatever is missing, of another shape or about
other tokens is an error here, so nothing behind this package ever guesses.
"""
