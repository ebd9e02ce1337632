"""Hidden states of student and teacher meet at the right token and layer, with the gradient of plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model.cases import rollouts_of
from tests.tiny import VOCAB, tiny_model
from tropd.config.stages import OptimizerConfig
from tropd.errors import EvidenceError
from tropd.model.forward import Forward
from tropd.model.layout import Arrangement
from tropd.model.optimizer import Optimizer
from tropd.model.tiling import Tiling
from tropd.objective import ForwardKL, HiddenMatch, NegativeLogLikelihood, Objective, ReverseKL, Term
from tropd.objective.context import Context
from tropd.objective.evidence import Needs
from tropd.objective.hidden import Layers, layer_map, layer_numbers
from tropd.objective.places import PositionBelow
from tropd.objective.selectors import STUDENT
from tropd.teachers.combined import whole_of
from tropd.teachers.local import LocalTeacher
from tropd.teachers.routed import Routed
from tropd.teachers.teacher import Teacher
from tropd.training.asked import check_evidence
from tropd.training.learner import ModelLearner
from tropd.training.scoring import score
from tropd.training.step import train_step
from tropd.types import Rollout

LENGTHS = [(3, 5), (1, 9), (6, 2), (4, 1)]
FAMILIES = ("qwen3", "gpt2", "gemma2", "gpt_neox")
SINGLE = 1e-5
"""Weights of terms and some norms are computed in single precision."""
TILING = Tiling(tokens_per_batch=24, tile_tokens=4)


def exact(family: str = "qwen3", seed: int = 0, layers: int = 3) -> Any:
    model = tiny_model(family, seed=seed, layers=layers, sharp=4.0).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradient_of(
    student: nn.Module, teacher: Teacher, objective: Objective, rollouts: Sequence[Rollout], tokens: int = 24
) -> tuple[float, dict[str, Tensor]]:
    """The step's loss and its gradient, as a run takes them: in micro-batches and tiles."""
    learner = ModelLearner(
        student,
        Optimizer(student, OptimizerConfig(learning_rate=1e-9, max_gradient_norm=1e9), 1),
        vocab_size=VOCAB,
        tiling=TILING,
        readers={"teacher": whole_of("teacher", teacher.forward)} if teacher.forward is not None else {},
    )
    found: dict[str, Tensor] = {}

    def keep(_: Any) -> None:
        found.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})

    batch = score(rollouts, objective, teacher, learner, seed=0, recall=False)
    sums = train_step(batch, objective, learner, Context(), tokens_per_micro_batch=tokens, watch=keep, teacher=teacher)
    return sums.loss, found


def states_of(model: Any, rollout: Rollout, layers: Layers) -> Tensor:
    """[L, T, H] from one call of the whole model: the states before each response token."""
    output = model.get_decoder()(input_ids=torch.tensor([rollout.token_ids]), output_hidden_states=True)
    every = [*output.hidden_states[1:-1], output.last_hidden_state]  # the last as the head reads it
    rows = slice(len(rollout.prompt.token_ids) - 1, len(rollout.token_ids) - 1)
    return torch.stack([every[i][0, rows] for i in layer_numbers(layers, len(every))])


def by_autograd(student: Any, teacher: Any, layers: Layers, rollouts: Sequence[Rollout], normalise: bool) -> Tensor:
    """The loss, one rollout at a time, from whole models alone."""
    total, num = torch.zeros((), dtype=torch.float64), sum(len(r.response_ids) for r in rollouts)
    for rollout in rollouts:
        s, t = states_of(student, rollout, layers), states_of(teacher, rollout, layers).detach()
        t = t[layer_map(len(s), len(t))]
        if normalise:
            s, t = s / s.norm(dim=-1, keepdim=True), t / t.norm(dim=-1, keepdim=True)
        total = total + ((s - t) ** 2).mean(-1).mean(0).sum() / num
    return total


def compare(student: Any, found: tuple[float, dict[str, Tensor]], plain: Tensor) -> None:
    names, parameters = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(plain, parameters, allow_unused=True)
    assert found[0] == pytest.approx(float(plain.detach()), rel=SINGLE)
    for name, expected in zip(names, gradients, strict=True):
        have = found[1].get(name)
        if expected is None:
            assert have is None or not bool(have.any()), name
        else:
            assert have is not None and float((have - expected).abs().max()) < SINGLE, name


@pytest.mark.parametrize("layers", ["last", "all", "even", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_a_hidden_match_is_that_of_autograd(family: str, layers: Layers) -> None:
    student, teacher, rollouts = exact(family), exact(family, seed=1, layers=4), rollouts_of(LENGTHS)
    objective = Objective(Term("states", STUDENT, HiddenMatch(layers)))
    found = gradient_of(student, LocalTeacher(teacher, vocab_size=VOCAB), objective, rollouts)
    compare(student, found, by_autograd(student, teacher, layers, rollouts, normalise=False))


def test_normalised_states_are_compared_after_division_by_their_norms() -> None:
    student, teacher, rollouts = exact(), exact(seed=1), rollouts_of(LENGTHS)
    objective = Objective(Term("states", STUDENT, HiddenMatch("all", normalise=True)))
    found = gradient_of(student, LocalTeacher(teacher, vocab_size=VOCAB), objective, rollouts)
    compare(student, found, by_autograd(student, teacher, "all", rollouts, normalise=True))


OTHERS = {"the fused head": NegativeLogLikelihood(), "tiles of distributions": ReverseKL(), "top-k": None}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])  # whose head is tiled in one way or the other
def test_one_backward_serves_the_states_and_every_path_of_the_head(family: str, name: str) -> None:
    """The gradient of both terms is the sum of what each gives alone, and so is the loss."""
    loss = OTHERS[name] or ForwardKL(support="teacher_top_k", top_k=5)
    states, other = Term("states", STUDENT & PositionBelow(4), HiddenMatch("all")), Term("other", STUDENT, loss)
    found = []
    for terms in ((states,), (other,), (states, other)):
        teacher = LocalTeacher(exact(family, seed=1), vocab_size=VOCAB)
        found.append(gradient_of(exact(family), teacher, Objective(*terms), rollouts_of(LENGTHS)))
    (one, first), (two, second), (both, joint) = found
    assert both == pytest.approx(one + two, rel=SINGLE)
    for key, gradient in joint.items():
        torch.testing.assert_close(gradient, first.get(key, 0.0) + second[key], rtol=0, atol=SINGLE)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_a_hidden_match_of_equal_models_is_zero_and_has_no_gradient(layers: Layers) -> None:
    student = exact()
    teacher = LocalTeacher(exact(), vocab_size=VOCAB)
    loss, gradients = gradient_of(
        student, teacher, Objective(Term("states", STUDENT, HiddenMatch(layers))), [*rollouts_of()]
    )
    assert loss < 1e-30  # the student's micro-batches have other shapes than the teacher's
    assert all(float(gradient.abs().max()) < 1e-15 for gradient in gradients.values())


def test_recomputed_layers_give_the_same_gradient() -> None:
    found = []
    for recompute in (False, True):
        student = exact()
        if recompute:
            getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
        teacher = LocalTeacher(exact(seed=1), vocab_size=VOCAB)
        terms = Term("states", STUDENT, HiddenMatch("all")), Term("other", STUDENT, ReverseKL())
        found.append(gradient_of(student, teacher, Objective(*terms), rollouts_of(LENGTHS)))
    (plain, gradients), (again, recomputed) = found
    assert plain == again
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["padded", "packed", "best"])
def test_states_of_several_layers_are_the_models_own_in_every_layout(layout: Arrangement) -> None:
    model, rollouts = exact(), rollouts_of([(3, 5), (1, 40), (6, 0), (4, 1)])
    hidden_NH, found = Forward(model, vocab_size=VOCAB, layout=layout).states(rollouts, ["states_all", "states_odd"])
    for name, layers in (("states_all", "all"), ("states_odd", "odd")):
        plain = torch.cat([states_of(model, r, layers) for r in rollouts], 1).transpose(0, 1)  # type: ignore[arg-type]
        torch.testing.assert_close(found[name], plain, rtol=0, atol=SINGLE)
    torch.testing.assert_close(found["states_all"][:, -1], hidden_NH, rtol=0, atol=0)
    assert not Forward(model, vocab_size=VOCAB).states([], ["states_all"])[1]["states_all"].numel()


def test_a_micro_batch_in_which_no_state_counts_still_has_a_backward_pass() -> None:
    student, teacher = exact(), LocalTeacher(exact(seed=1), vocab_size=VOCAB)
    where = STUDENT & PositionBelow(0)
    loss, gradients = gradient_of(student, teacher, Objective(Term("states", where, HiddenMatch())), rollouts_of())
    assert loss == 0.0 and not any(bool(gradient.any()) for gradient in gradients.values())


def test_a_server_or_several_models_are_refused_before_the_first_step() -> None:
    objective = Objective(Term("states", STUDENT, HiddenMatch()))

    class Server(Teacher):
        capabilities = Needs.SAMPLED | Needs.TOPK

    for teacher in (Server(), Routed({"a": LocalTeacher(exact(), vocab_size=VOCAB)})):
        with pytest.raises(EvidenceError, match="'states' of method 'm' needs HIDDEN"):
            check_evidence(objective, teacher, "m", grader=False)


def test_models_of_other_widths_are_refused_with_both_widths() -> None:
    student, teacher = exact(), LocalTeacher(tiny_model(width=64, seed=1).double(), vocab_size=VOCAB)
    with pytest.raises(EvidenceError, match="states of 32 and 64 numbers"):
        gradient_of(student, teacher, Objective(Term("states", STUDENT, HiddenMatch())), rollouts_of())


def test_layers_of_another_depth_are_matched_at_the_same_share_of_it() -> None:
    assert layer_map(4, 4) == [0, 1, 2, 3] and layer_map(1, 36) == [35]
    assert layer_map(28, 36)[0] == 0 and layer_map(28, 36)[-1] == 35
    assert layer_map(28, 36) == sorted(layer_map(28, 36)) and layer_map(3, 5) == [0, 2, 4]
    assert (layer_numbers("even", 5), layer_numbers("odd", 5)) == ([0, 2, 4], [1, 3])
