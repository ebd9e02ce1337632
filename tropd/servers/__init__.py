"""Inference servers of others, over their stock HTTP API: vLLM, SGLang, and whatever speaks OpenAI's.

    settings    addresses and keys, and checks of them
    client      one server: one request, one answer within its limits
    pool        several: load by outstanding tokens, retries, a dead one is left out and tried again
    dialect     requests to every kind of server, and the error of a kind that cannot carry one out
    vllm        requests to vLLM, and checks of its answers;  sglang and openai likewise
    dialects    the dialect for a run file's `kind`

Token ids go in and come out.  An answer is used whole or not at all.  Anything missing, of another shape or about other
tokens is an error here, so no code behind this package has to guess.
"""
