"""How exact half precision is: log-probabilities, the sign of the reward, and the gradient, against float64.

    python benchmarks/precision.py                   # V = 151,936, H = 256, N = 2048, logits of standard deviation 3
    python benchmarks/precision.py --sure 20         # half of the rows have a token at a logit of about 20
    python benchmarks/precision.py --sure 20 --sharing 4     # four such tokens, close together
    python benchmarks/precision.py --dtype float32

The reference reads the same (already rounded) weights and hidden states in float64.  A written token x has the reward
r = log p_T(x) - log p_S(x); a sign flips where the computed r and the exact one disagree, among those with |r| > .01.

ours     `read_rows` and `fused_loss`, whole vocabulary at once         lean   the same in tiles of --tile-vocab
wide     logits rounded to the model's precision, log-softmax in float32
narrow   logits and log-softmax in the model's precision

Gradient: TrOPD's loss with one plan, made from exact evidence, for everybody; the reference is autograd in float64.
Relative error is |g - g64| / |g64|, over the hidden states and over the head's weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from tropd.methods import TrOPD
from tropd.model.head import Head, tiles
from tropd.model.one_pass import fused_loss, read_rows, wanted
from tropd.objective.evidence import Needs, Tokens

Row = dict[str, float]
MEAN_ERROR, GRADIENT_ERROR = 2e-5, 5e-3


@dataclass
class Settings:
    vocabulary: int = 151_936
    width: int = 256
    tokens: int = 2048
    top_k: int = 64
    deviation: float = 3.0
    """Standard deviation of the logits."""
    sure: float = 0.0
    """The logit of the likeliest token in every other row; 0 for none such."""
    sharing: int = 1
    """How many tokens of such a row have about that logit."""
    distance: float = 0.1
    """Distance of the teacher's hidden states from the student's."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    tile: int = 256
    tile_vocab: int = 16_384
    seed: int = 0


@dataclass
class Model:
    """A head, the hidden states before it, and both in float64."""

    head: Head
    hidden_NH: Tensor
    exact_NH: Tensor = field(init=False)
    exact_VH: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.exact_NH, self.exact_VH = self.hidden_NH.double(), self.head.weight_VH.detach().double()


def make_models(s: Settings) -> tuple[Model, Model, Tensor]:
    """Student, teacher, and tokens drawn from the student."""
    g, dtype = torch.Generator().manual_seed(s.seed), getattr(torch, s.dtype)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, s.width, generator=g)

    student_NH, weight_VH = normal(s.tokens), s.deviation * normal(s.vocabulary) / s.width**0.5
    if s.sure:
        for n in range(0, s.tokens, 2):
            rows_KH = weight_VH[torch.randperm(s.vocabulary, generator=g)[: s.sharing]]
            missing_K = s.sure + 0.3 * torch.randn(s.sharing, generator=g) - rows_KH @ student_NH[n]
            student_NH[n] += rows_KH.t() @ torch.linalg.solve(rows_KH @ rows_KH.t(), missing_K)
    hidden = [student_NH, student_NH + s.distance * normal(s.tokens)]
    weights = [weight_VH, weight_VH + s.distance * s.deviation * normal(s.vocabulary) / s.width**0.5]
    models = []
    for hidden_NH, rows_VH in zip(hidden, weights, strict=True):
        module = nn.Linear(s.width, s.vocabulary, bias=False, dtype=dtype)
        with torch.no_grad():
            module.weight.copy_(rows_VH)
        models.append(Model(Head(module=module, vocab_size=s.vocabulary), hidden_NH.to(dtype)))
    student, teacher = models
    drawn = [torch.multinomial(p_CV.exp().float(), 1, generator=g) for _, p_CV in exact_tiles(student, s.tile)]
    return student, teacher, torch.cat(drawn).squeeze(1)


@torch.no_grad()
def exact_tiles(model: Model, tile: int) -> Iterator[tuple[slice, Tensor]]:
    for rows in tiles(len(model.exact_NH), tile):
        yield rows, (model.exact_NH[rows] @ model.exact_VH.t()).log_softmax(-1)


def exact(model: Model, ids_N: Tensor, s: Settings) -> Tensor:
    """log p of the written tokens."""
    return torch.cat([p_CV.gather(1, ids_N[rows, None]) for rows, p_CV in exact_tiles(model, s.tile)]).squeeze(1)


def read(model: Model, ids_N: Tensor, s: Settings, tile_vocab: int | None) -> Tensor:
    return read_rows(model.head, model.hidden_NH, ids_N[:, None], s.tile, tile_vocab=tile_vocab)["at"][:, 0]


@torch.no_grad()
def naive(model: Model, ids_N: Tensor, s: Settings, wide: bool) -> Tensor:
    found = []
    for rows in tiles(s.tokens, s.tile):
        logits_CV = model.head.logits(model.hidden_NH[rows])
        found.append((logits_CV.float() if wide else logits_CV).log_softmax(-1).gather(1, ids_N[rows, None]))
    return torch.cat(found).squeeze(1)


def log_probability_errors(student: Model, teacher: Model, ids_N: Tensor, s: Settings) -> dict[str, Row]:
    ways: dict[str, Callable[[Model], Tensor]] = {
        "ours": lambda model: read(model, ids_N, s, None),
        "lean": lambda model: read(model, ids_N, s, s.tile_vocab),
        "wide": lambda model: naive(model, ids_N, s, True),
        "narrow": lambda model: naive(model, ids_N, s, False),
    }
    exact_S, exact_T = exact(student, ids_N, s), exact(teacher, ids_N, s)
    exact_r = exact_T - exact_S
    clear = exact_r.abs() > 0.01
    rows = {}
    for name, way in ways.items():
        own, other = way(student).double(), way(teacher).double()
        error = torch.cat([own - exact_S, other - exact_T]).abs()
        flips = (other - own).sign() != exact_r.sign()
        rows[name] = {
            "mean": float(error.mean()),
            "max": float(error.max()),
            "above_0": float((torch.cat([own, other]) > 0).double().mean()),
            "bias": float(torch.cat([own - exact_S, other - exact_T]).mean()),
            "ratio_mean": float((other - own - exact_r).abs().mean()),
            "flips": float(flips[clear].double().mean()),
            "num_clear": float(clear.sum()),
        }
    return rows


def exact_tokens(student: Model, teacher: Model, ids_N: Tensor, s: Settings) -> Tokens:
    """What both models think, exactly."""
    best = [p_CV.topk(s.top_k) for _, p_CV in exact_tiles(teacher, s.tile)]
    own_N = exact(student, ids_N, s)
    return Tokens(
        token_ids_N=ids_N,
        authors_N=torch.ones_like(ids_N),
        sequences_N=torch.zeros_like(ids_N),
        positions_N=torch.arange(s.tokens),
        keys_S=torch.tensor([7]),
        num_actions_S=torch.tensor([s.tokens]),
        behavior_logprobs_N=own_N,
        student_logprobs_N=own_N,
        teacher_logprobs_N=exact(teacher, ids_N, s),
        teacher_topk_ids_NK=torch.cat([x.indices for x in best]),
        teacher_topk_logprobs_NK=torch.cat([x.values for x in best]),
        vocab_size=s.vocabulary,
    )


def gradient_errors(student: Model, teacher: Model, ids_N: Tensor, s: Settings) -> dict[str, Row]:
    tokens, objective = exact_tokens(student, teacher, ids_N, s), TrOPD(top_k=s.top_k, guidance=False).objective
    plan = objective.plan(tokens)
    ids_NM, view_of = wanted(tokens, Needs.SAMPLED | Needs.TOPK)

    def judge(rows: slice, logprobs_CM: Tensor) -> Tensor:
        return objective(tokens.rows(rows), view_of(logprobs_CM), plan.rows(rows)).loss

    exact_NH, exact_VH = student.exact_NH.clone().requires_grad_(), student.exact_VH.clone().requires_grad_()
    for rows in tiles(s.tokens, s.tile):
        logprobs_CV = (exact_NH[rows] @ exact_VH.t()).log_softmax(-1)
        judge(rows, logprobs_CV.gather(1, ids_NM[rows])).backward()
    found = {}
    for name, tile_vocab in (("ours", None), ("lean", s.tile_vocab)):
        hidden_NH, weight_VH = student.hidden_NH.clone().requires_grad_(), student.head.weight_VH
        weight_VH.grad = None
        fused_loss(student.head, hidden_NH, ids_NM, judge, s.tile, tile_vocab).backward()
        found[name] = {"hidden": off(hidden_NH.grad, exact_NH.grad), "weight": off(weight_VH.grad, exact_VH.grad)}
    shares = {name: float((weight_N != 0).double().mean()) for name, weight_N in plan.weights.items()}
    return {**found, "share of rows": shares}


def off(gradient: Tensor | None, reference: Tensor | None) -> float:
    assert gradient is not None and reference is not None
    return float((gradient.double() - reference).norm() / reference.norm())


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    student, teacher, ids_N = make_models(s)
    errors = log_probability_errors(student, teacher, ids_N, s)
    rows = f"logit sd {s.deviation:g}" + (f", {s.sharing} at {s.sure:g} in half of the rows" if s.sure else "")
    print(f"V={s.vocabulary} H={s.width} N={s.tokens} {s.dtype}, {rows}, CPU, torch {torch.__version__}")
    columns = f"{'mean error':>10} {'max':>9} {'bias':>9} {'above 0':>8} {'mean of r':>10} {'sign flips':>11}"
    print(f"{'log p(x)':8} {columns}")
    for name, row in errors.items():
        numbers = f"{row['mean']:10.1e} {row['max']:9.1e} {row['bias']:9.1e} {100 * row['above_0']:6.1f} %"
        print(f"{name:8} {numbers} {row['ratio_mean']:10.1e} {100 * row['flips']:9.2f} %  of {row['num_clear']:.0f}")
    gradients = gradient_errors(student, teacher, ids_N, s)
    shares = gradients.pop("share of rows")
    parts = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    print(f"{'gradient':8} {'hidden':>10} {'weight':>9}   share of rows: {parts}")
    for name, row in gradients.items():
        print(f"{name:8} {row['hidden']:10.1e} {row['weight']:9.1e}")
    for name, gradient in gradients.items():
        row = errors[name]
        reached = row["mean"] <= MEAN_ERROR and max(gradient.values()) <= GRADIENT_ERROR
        reached &= row["flips"] == row["above_0"] == 0
        goal = f"mean <= {MEAN_ERROR:g}, none above 0, no flips, gradient <= {GRADIENT_ERROR:g}"
        print(f"{name}: {goal}: {'reached' if reached else 'MISSED'}")
    print(json.dumps({"settings": asdict(s), "logprobs": errors, "gradients": gradients, "shares": shares}))


if __name__ == "__main__":
    main(tyro.cli(Settings))
