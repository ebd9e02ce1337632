"""TrOPD's loss inside a loop of your own.  The student is its teacher with noise on the weights; nothing is downloaded.

python examples/borrow.py
"""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tropd import TrOPD, distillation_loss

VOCAB, PROMPT, RESPONSE, BATCH = 64, 4, 8, 16


def make_pair(noise: float = 0.1) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    teacher = LlamaForCausalLM(config).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for weight in student.parameters():
            weight += noise * torch.randn_like(weight)
    return student, teacher


def main(num_steps: int = 31) -> list[float]:
    student, teacher = make_pair()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    # Entry t of the logits speaks of token t + 1: ids and authors drop their first entry, logits their last.
    authors = torch.tensor([0] * PROMPT + [1] * RESPONSE).expand(BATCH, -1)[:, 1:]
    gaps = []
    for step in range(num_steps):
        prompts = torch.randint(VOCAB, (BATCH, PROMPT))
        mask = torch.ones_like(prompts)
        ids = student.generate(
            prompts, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=RESPONSE, pad_token_id=0
        )
        logits = student(ids).logits[:, :-1]
        with torch.no_grad():
            teacher_logits = teacher(ids).logits[:, :-1]
        output = distillation_loss(
            TrOPD(top_k=16, guidance=False),
            token_ids=ids[:, 1:],
            authors=authors,
            logits=logits,
            teacher_logits=teacher_logits,
            seed=step,
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        own, other = (x[:, PROMPT - 1 :].detach().log_softmax(-1) for x in (logits, teacher_logits))
        gaps.append(float((own.exp() * (own - other)).sum(-1).mean()))
        if step % 10 == 0:
            trusted = output.terms["trusted"].tokens / (BATCH * RESPONSE)
            print(f"step {step}  KL(student || teacher) per token {gaps[-1]:.3f}  trusted {trusted:.0%}")
    return gaps


if __name__ == "__main__":
    main()
