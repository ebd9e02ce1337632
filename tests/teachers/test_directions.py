"""A direction is added to a layer while its reader reads, and nobody else notices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from tests.model.cases import rollouts_of
from tests.teachers.test_combined import METHOD
from tests.tiny import tiny_model
from tests.told import write_world
from tropd.briefings.reader import Direction
from tropd.config.run import Run
from tropd.errors import CheckpointError, ConfigError
from tropd.model import hf
from tropd.model.origins import check_same
from tropd.objective.evidence import Needs
from tropd.teachers.directions import added
from tropd.teachers.local import LocalTeacher
from tropd.teachers.teacher import ScoreRequest
from tropd.training.assembly import Parts, load_parts
from tropd.training.scoring import asked_of, score
from tropd.training.source import Source

WIDTH = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "mixtures.py").write_text(METHOD)
    save_file({"d": direction()}, folder / "safe.safetensors")
    return folder


def direction() -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))


def steered(world: Path, **changes: Any) -> Run:
    values = {
        "student": {"path": str(world / "student"), "lora": {"rank": 2}},
        "teacher": {"path": "start"},
        "readers": {"safe": safe(world)},
        "data": {"path": str(world / "told.jsonl")},
        "method": {"name": "mixtures.py:Whole", "by": "safe"},
        "rollout": {"num_prompts": 2, "num_rollouts": 1, "max_new_tokens": 12},
        "steps": 1,
        "device": "cpu",
        **changes,
    }
    return Run.from_dict(values, folder=world).imported()


def safe(world: Path, **changes: Any) -> dict[str, Any]:
    where = {"file": str(world / "safe.safetensors"), "layer": 1, "strength": 0.7, **changes.pop("direction", {})}
    return {"path": "start", "direction": where, **changes}


def judged(parts: Parts, rollouts: Any) -> Any:
    objective = parts.run.method.objective
    as_read = {name: parts.briefer.as_read(name, rollouts) for name in asked_of(objective, parts.readers)}
    return score(rollouts, objective, parts.readers, parts.learner, seed=0, recall=False, as_read=as_read)


@contextmanager
def shifted(layer: Any, by: torch.Tensor) -> Iterator[None]:
    """The same by hand, around the layer's own forward."""
    forward = layer.forward

    def moved(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return (output[0] + by, *output[1:]) if isinstance(output, tuple) else output + by

    layer.forward = moved
    try:
        yield
    finally:
        del layer.forward


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "gpt2"])
def test_the_hidden_states_of_one_layer_move_for_every_token(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    numpy.save(tmp_path / "d.npy", direction().double().numpy())
    plain = LocalTeacher(model)
    asked = Direction(file=str(tmp_path / "d.npy"), layer=0, strength=0.7)
    hooked = plain.steered(added(asked, model, "safe"))
    request = ScoreRequest(rollouts_of([(3, 9)]), Needs.SAMPLED | Needs.FULL)
    before, found = plain.score(request)[0], hooked.score(request)[0]
    layers = hf.decoder_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    with shifted(layers[0], 0.7 * direction()):
        expected = plain.score(request)[0]
    assert torch.equal(found.full_logprobs_TV, expected.full_logprobs_TV)
    assert (found.logprobs_T - before.logprobs_T).abs().max() > 1e-2
    assert torch.equal(plain.score(request)[0].full_logprobs_TV, before.full_logprobs_TV)


def test_the_student_whose_weights_it_shares_never_sees_it(world: Path, tmp_path: Path) -> None:
    parts = load_parts(steered(world), tmp_path)
    assert parts.readers["safe"].forward.model is parts.model, "no second copy"
    rollouts = Source(parts).take(0).rollouts
    own = parts.learner.measure(rollouts, Needs.NOTHING, 0)["student_logprobs_N"]
    base = parts.teacher.score(ScoreRequest(rollouts))
    batch = judged(parts, rollouts)
    full = parts.learner.wholes["safe"](batch.tokens)
    assert torch.equal(parts.learner.measure(rollouts, Needs.NOTHING, 0)["student_logprobs_N"], own)
    again = parts.teacher.score(ScoreRequest(rollouts))
    assert all(torch.equal(a.logprobs_T, b.logprobs_T) for a, b in zip(base, again, strict=True))
    assert not any(module._forward_hooks for layer in hf.decoder_layers(parts.model) for module in layer.modules())
    theirs_N = full.gather(1, batch.tokens.token_ids_N[:, None])[:, 0]
    base_N = torch.cat([x.logprobs_T for x in base])
    assert (theirs_N - base_N).abs().max() > 1e-2
    torch.testing.assert_close(theirs_N, batch.tokens.of("safe").teacher_logprobs_N)


def test_strength_0_is_the_reader_without_it_to_the_last_bit(world: Path, tmp_path: Path) -> None:
    readers = {"safe": safe(world, direction={"strength": 0.0}), "plain": {"path": "teacher"}}
    parts = load_parts(steered(world, readers=readers), tmp_path)
    rollouts = Source(parts).take(0).rollouts
    request = ScoreRequest(rollouts, Needs.SAMPLED | Needs.FULL)
    safe_S, plain_S = parts.readers["safe"].score(request), parts.readers["plain"].score(request)
    assert parts.readers["plain"] is parts.teacher and parts.readers["safe"] is not parts.teacher
    for a, b in zip(safe_S, plain_S, strict=True):
        assert torch.equal(a.full_logprobs_TV, b.full_logprobs_TV) and torch.equal(a.logprobs_T, b.logprobs_T)


def test_a_teacher_with_a_direction_lends_no_plain_model_to_readers(world: Path, tmp_path: Path) -> None:
    """A reader of the path "teacher" reads with it; one of the same path, and without a direction, does not."""
    student = {"path": str(world / "student")}
    teacher = {"path": str(world / "teacher"), "direction": safe(world)["direction"]}
    readers = {"same": {}, "plain": {"path": str(world / "teacher")}}
    method = {"name": "mixtures.py:Whole", "by": "plain"}
    parts = load_parts(steered(world, student=student, teacher=teacher, readers=readers, method=method), tmp_path)
    rollouts = Source(parts).take(0).rollouts
    teacher_T, same_T, plain_T = (
        parts.readers[name].score(ScoreRequest(rollouts))[0].logprobs_T for name in ("teacher", "same", "plain")
    )
    assert torch.equal(teacher_T, same_T) and (teacher_T - plain_T).abs().max() > 1e-2


def test_a_resumed_run_notices_another_direction(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.npy"
    numpy.save(path, direction().numpy())
    run = steered(world, readers={"safe": safe(world, direction={"file": str(path)})})
    before = load_parts(run, tmp_path).origins
    assert set(before["readers.safe.direction"]) == {"own.npy"}
    check_same(before, load_parts(run, tmp_path).origins, tmp_path)
    numpy.save(path, -direction().numpy())
    with pytest.raises(CheckpointError, match="of the readers.safe.direction, own.npy changed"):
        check_same(before, load_parts(run, tmp_path).origins, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"direction": {"layer": 7}}, r"direction.layer = 7 was asked for reader 'safe', .* has 2 layers, 0 to 1"),
        ({"direction": {"layer": -1}}, "layer = -1"),
        (
            {"direction": {"file": "nowhere.npy"}},
            "there is no file nowhere.npy, which holds the direction",
        ),
        (
            {"direction": {"file": "{}/wide.npy"}},
            r"shape \(33,\) for reader 'safe', but .* have 32",
        ),
        ({"direction": {"file": "{}/two.safetensors"}}, "holds 2 tensors, and a direction is one"),
        ({"direction": {"file": "{}/odd.npy"}}, "not finite"),
        ({"direction": {"file": "{}/told.jsonl"}}, "the direction of reader 'safe' cannot be read from"),
        ({"servers": ["http://127.0.0.1:1"], "path": "elsewhere"}, "reader 'safe' has a direction, which is added to"),
        ({"direction": {"strength": "much"}}, "readers.safe.direction.strength"),
    ],
)
def test_a_direction_that_cannot_be_added_is_refused_before_the_run(
    world: Path, tmp_path: Path, changes: Any, said: str
) -> None:
    numpy.save(world / "wide.npy", numpy.zeros(33))
    numpy.save(world / "odd.npy", numpy.full(32, numpy.nan))
    save_file({"a": torch.zeros(32), "b": torch.zeros(32)}, world / "two.safetensors")
    if "file" in changes.get("direction", {}):
        changes = {"direction": {"file": changes["direction"]["file"].format(world)}}
    with pytest.raises(ConfigError, match=said):
        load_parts(steered(world, readers={"safe": safe(world, **changes)}), tmp_path)


def test_a_teacher_with_a_direction_writes_nothing(world: Path, tmp_path: Path) -> None:
    method = {"name": "tropd", "prefix": {"shape": "constant", "start": 0.4}}
    teacher = {"path": "start", "direction": safe(world)["direction"]}
    run = steered(world, readers={}, teacher=teacher, method=method)
    with pytest.raises(ConfigError, match="has a direction, with which it reads and cannot write"):
        load_parts(run, tmp_path)
