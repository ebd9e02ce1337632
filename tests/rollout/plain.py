"""Requests to answer, and what an engine should write for them, computed as plainly as possible."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from tests.tiny import VOCAB
from tropd.types import Completion, Request, Sampling

GREEDY = Sampling(temperature=0.0)
LENGTHS = (3, 17, 9, 9, 1, 30)
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7),
    Sampling(top_p=0.8),
    Sampling(top_k=3),
    Sampling(min_p=0.2),
    Sampling(temperature=1.5, top_k=6, top_p=0.9, min_p=0.05),
]


def some_prompts(lengths=LENGTHS, vocab: int = 256, seed: int = 0) -> list[tuple[int, ...]]:
    numbers = random.Random(seed)
    return [tuple(numbers.randrange(vocab) for _ in range(n)) for n in lengths]


def some_requests(num: int = 24, **changes) -> list[Request]:
    """Ragged prompts, ragged lengths, and a stop about every ninth token."""
    stop_ids = tuple(range(0, VOCAB, 9))
    first = Request(token_ids=(0,), max_new_tokens=1, seed=0, stop_ids=stop_ids)
    prompts = some_prompts() * (num // len(LENGTHS))
    return [replace(first, token_ids=p, max_new_tokens=20 + i, seed=i, **changes) for i, p in enumerate(prompts)]


@torch.no_grad()
def plain_logits(model, request: Request, completion: Completion, vocab_size: int = VOCAB) -> Tensor:
    """One forward without cache or padding: the logits that each new token was drawn from."""
    text = torch.tensor([request.token_ids + completion.token_ids])
    return model(text, use_cache=False).logits[0, len(request.token_ids) - 1 : -1, :vocab_size].float()


def plain_probs(logits_TV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is sampled from, token by token, written as plainly as possible."""
    probs_TV = torch.softmax(logits_TV.double() / sampling.temperature, -1)
    for probs in probs_TV:
        order = probs.argsort(descending=True).tolist()
        if sampling.top_k:
            probs[order[sampling.top_k :]] = 0.0
            probs /= probs.sum()
        mass = 0.0
        for token in order:
            if mass >= sampling.top_p:
                probs[token] = 0.0
            mass += float(probs[token])
        probs[probs < sampling.min_p * probs.max()] = 0.0
    return probs_TV / probs_TV.sum(-1, keepdim=True)


def count_forwards(model) -> list[torch.Size]:
    """The shape of the input of every forward pass from now on."""
    shapes: list[torch.Size] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    return shapes
