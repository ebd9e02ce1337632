"""Supervised training of small models on a task's texts; the same seed gives the same bits on one thread."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tropd.testbeds.task import Lesson, Shape, Task, Training
from tropd.testbeds.tokenizer import BOS, EOS, PAD, num_rows, vocabulary_of
from tropd.types import key_of

IGNORED = -100
_KINSHIP = 0.4
"""Initial size of what related words share, much larger than other embeddings, so that training keeps it."""


def make_model(task: Task, shape: Shape, max_length: int, seed: int) -> Any:
    """A Llama with weights of variance 1/fan-in, from which small models learn much sooner than from 0.02."""
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary = vocabulary_of(task)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=num_rows(task),
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        pad_token_id=vocabulary[PAD],
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[EOS],
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                continue
            spread = 0.02 if "embed" in name or "lm_head" in name else weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                spread /= math.sqrt(2 * shape.layers)
            weight.normal_(0.0, spread, generator=generator)
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            assert isinstance(embeddings, nn.Embedding | nn.Linear)
            _relate(embeddings.weight, task, generator)
    return model


def _relate(weight_VH: Tensor, task: Task, generator: torch.Generator) -> None:
    """Set the embedding of a word with parts to the sum of the parts' vectors, so that related words learn together."""
    vectors: dict[str, Tensor] = {}
    for word in task.words:
        for part in task.parts(word):
            if part not in vectors:
                vectors[part] = torch.randn(weight_VH.shape[1], generator=generator)
    for word, row in vocabulary_of(task).items():
        if word in task.words and (parts := task.parts(word)):
            weight_VH[row] = _KINSHIP * torch.stack([vectors[part] for part in parts]).sum(0)


def fine_tune(model: nn.Module, task: Task, training: Training, seed: int) -> None:
    """Train in place on new texts; only answers are learnt."""
    rng = random.Random(seed)
    texts = _Texts(training.task if isinstance(training, Lesson) else task, training)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=training.weight_decay
    )
    model.train()
    device = next(model.parameters()).device
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _pace(step, training)
        ids_BT, labels_BT = (x.to(device) for x in texts.batch(rng))
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def _pace(step: int, training: Training) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / training.steps))
    return min(1.0, (step + 1) / training.warmup) * (0.05 + 0.95 * cosine)


class _Texts:
    """Batches of questions with answers, padded on the right."""

    def __init__(self, task: Task, training: Training) -> None:
        self.task, self.size = task, training.batch
        self.ids = vocabulary_of(task)
        self.shares = [share for share, _ in training.mix]
        self.styles = [style for _, style in training.mix]

    def batch(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        rows = [self._text(rng) for _ in range(self.size)]
        width = max(len(ids) for ids, _ in rows)
        pad = self.ids[PAD]
        ids_BT = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
        labels_BT = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
        return ids_BT, labels_BT

    def _text(self, rng: random.Random) -> tuple[list[int], list[int]]:
        problem = self.task.problem(rng)
        (style,) = rng.choices(self.styles, self.shares)
        answer = [*self.task.write(rng, problem, style), (EOS, True)]
        question = [self.ids[BOS], *(self.ids[word] for word in problem.question)]
        ids = [self.ids[word] for word, _ in answer]
        labels = [number if learnt else IGNORED for number, (_, learnt) in zip(ids, answer, strict=True)]
        return question + ids, [IGNORED] * len(question) + labels


def seed_of(seed: int, *parts: object) -> int:
    """A seed for torch, different for every name."""
    return key_of(seed, "testbed", *parts) % 2**63
