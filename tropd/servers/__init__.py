"""Inference servers of others, over their stock HTTP API: vLLM, SGLang, and whatever speaks OpenAI's.

    settings    how to reach them, and what is refused about that
    client      one server: one request, one answer within its limits
    pool        several: load by outstanding tokens, retries, a dead one is left out and tried again
    vllm        what vLLM is asked and how its answers are checked;  sglang likewise

Token ids go in and come out.  An answer is used whole or not at all: whatever is missing, of another shape or about
other tokens is an error here, so nothing behind this package ever guesses.
"""
