"""How far a run has moved matrices from where they began: planted changes are found exactly, resumed runs agree."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.small_runs import write_models, write_run
from tests.tiny import tiny_model
from tropd.checkpoints import checkpoint as checkpoints
from tropd.config.models import LoraConfig
from tropd.config.run import Run
from tropd.errors import CheckpointError, ConfigError
from tropd.model.loading import add_adapter
from tropd.monitoring.change import Change, Spectrum, angle, similarity
from tropd.monitoring.display import Silent
from tropd.monitoring.probe import Weight
from tropd.objective.memory import Memory
from tropd.run.start import resume, train

MATRIX = "model.layers.0.mlp.down_proj.weight"


def basis(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Orthonormal columns."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(x).Q


def weights_of(model: nn.Module) -> dict[str, Weight]:
    return {n: Weight(value=p.detach(), gradient=None, laid=p.detach()) for n, p in model.named_parameters()}


def numbers_of(probe: Change, model: nn.Module, step: int = 1) -> dict[str, float]:
    probe.step = step
    return {
        name.split("/")[-1]: total / weight for name, (total, weight) in probe.after_update(weights_of(model)).items()
    }


def planted(directions: int = 16) -> tuple[Change, nn.Module, nn.Parameter]:
    """A probe of one matrix of a model in float64, as it begins."""
    model = tiny_model().double()
    probe = Change(matrices=[MATRIX], directions=directions)
    probe.begin(model, Memory())
    return probe, model, dict(model.named_parameters())[MATRIX]


def test_a_planted_change_has_its_stable_rank_size_and_directions() -> None:
    probe, model, matrix = planted(directions=4)
    rows, columns = matrix.shape
    strengths, right = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64) * 1e-3, basis(columns, 6, seed=1)
    change = basis(rows, 3) @ strengths.diag() @ right[:, :3].t()
    start = matrix.detach().clone()
    with torch.no_grad():
        matrix += change
    found = numbers_of(probe, model)
    assert found["stable_rank"] == pytest.approx((9 + 4 + 1) / 9, rel=1e-6)
    assert found["moved"] == pytest.approx(float(change.abs().sum() / start.abs().sum()), rel=1e-6)
    s0, s1 = torch.linalg.svdvals(start), torch.linalg.svdvals(start + change)
    assert found["drift"] == pytest.approx(float((s1 - s0).norm() / s0.norm()), rel=1e-5)
    kept = (start.bfloat16() == (start + change).bfloat16()).double().mean()
    assert found["unchanged_bf16"] == pytest.approx(float(kept)) and 0.05 < float(kept) < 0.999
    assert found["sim"] == pytest.approx(1.0), "the first look is compared with itself"
    with torch.no_grad():  # two of three directions stay, one is new: |V^T V'|^2 = 2 of 3
        new = torch.stack([right[:, 0], right[:, 1], right[:, 4]], 1)
        matrix.copy_(start + basis(rows, 3, seed=2) @ strengths.diag() @ new.t())
    assert numbers_of(probe, model, 2)["sim"] == pytest.approx(2 / 3, rel=1e-5)


def test_angles_between_the_first_directions_are_those_that_a_rotation_made() -> None:
    for degrees in (1e-3, 0.5, 10.0, 60.0):
        probe, model, matrix = planted(directions=2)
        rows, columns = matrix.shape
        left, right, turn = basis(rows, 3), basis(columns, 3, seed=1), math.radians(degrees)
        values = torch.tensor([5.0, 4.0, 1.0], dtype=torch.float64)
        turned = right.clone()
        turned[:, 1] = math.cos(turn) * right[:, 1] + math.sin(turn) * right[:, 2]
        turned[:, 2] = math.cos(turn) * right[:, 2] - math.sin(turn) * right[:, 1]
        with torch.no_grad():
            matrix.copy_(left @ values.diag() @ right.t())
            probe.begin(model, Memory())
            matrix.copy_(left @ values.diag() @ turned.t())
        found = numbers_of(probe, model)
        assert found["angle"] == pytest.approx(degrees, rel=1e-3)
        assert found["drift"] == pytest.approx(0.0, abs=1e-8), "a rotation changes no singular value"


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_a_spectrum_is_that_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    found = Spectrum.of(x, 3)
    torch.testing.assert_close(found.values, s)
    assert similarity(found.left_MK, u[:, :3]) == pytest.approx(1.0)
    assert similarity(found.right_NK, vh[:3].t()) == pytest.approx(1.0)
    assert angle(found.left_MK, u[:, :3]) < 1e-6 and angle(u[:, :3], u[:, 3:5]) == pytest.approx(90.0)


def test_where_nothing_has_changed_only_what_is_known_is_said() -> None:
    probe, model, _ = planted()
    found = numbers_of(probe, model)
    assert found == {"unchanged_bf16": 1.0, "moved": 0.0, "angle": pytest.approx(0.0, abs=1e-5), "drift": 0.0}
    assert list(probe.memory) == ["probe.change/start"]


def test_an_adapter_changes_the_matrix_that_it_is_added_to() -> None:
    model: Any = add_adapter(tiny_model(), LoraConfig(rank=4, alpha=8), 0)
    probe = Change(matrices=["*.down_proj.*"])
    probe.begin(model, Memory())
    assert MATRIX in probe.watched
    a, b = (
        dict(model.named_parameters())[f"base_model.model.{MATRIX[:-7]}.{x}.default.weight"]
        for x in ("lora_A", "lora_B")
    )
    with torch.no_grad():
        a.zero_()[:2, :2] = torch.eye(2)
        b.zero_()[:2, :2] = torch.diag(torch.tensor([2.0, 1.0]))
    found = {name: pair for name, pair in probe._of(MATRIX, probe.watched[MATRIX].now(weights_of(model))).items()}
    assert found["stable_rank"][0] == pytest.approx((4 + 1) / 4), "alpha / rank scales both"
    assert found["moved"][0] == pytest.approx(2 * (2.0 + 1.0), rel=1e-4)


def test_matrices_are_spread_over_the_model_or_named_and_never_the_embeddings() -> None:
    for count, pattern in ((3, None), (None, ["*layers.1.*"])):
        probe = Change(matrices=count or pattern or 1)
        probe.begin(tiny_model(), Memory())
        assert all("embed" not in name and "lm_head" not in name for name in probe.watched)
        assert len(probe.watched) == 3 if count else all("layers.1." in name for name in probe.watched)
    with pytest.raises(ConfigError, match="none has such a name. They are called model.layers.0"):
        Change(matrices=["*.nothing.*"]).begin(tiny_model(), Memory())
    for wrong in (0, True, "*.layers.0.*"):
        with pytest.raises(ConfigError, match="give a number, 1 or more, or a list of patterns"):
            Change(matrices=wrong)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def lines_of(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()[1:]]
    for line in lines:
        line.pop("seconds")
    return lines


def run(models: Path, directory: Path, probes: list[Any], **changes: Any) -> Path:
    optimizer = {"learning_rate": 1e-2}
    path = write_run(models, directory, "quick", probes=probes, optimizer=optimizer, **{"steps": 3, **changes})
    return train(Run.load(path), display=Silent())


def test_a_probe_moves_no_bit_and_a_run_that_goes_on_says_the_same(models: Path, tmp_path: Path) -> None:
    watched = run(models, tmp_path / "watched", [{"name": "change", "matrices": 2}])
    plain = run(models, tmp_path / "plain", [])
    a, b = (checkpoints.load(checkpoints.place_of(folder, 3)) for folder in (watched, plain))
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in b.weights)
    whole = lines_of(watched)
    found = [{n: x for n, x in line["probes"].items() if n.startswith("change/")} for line in whole]
    assert [len(numbers) for numbers in found] == [5, 6, 6] and found[1]["change/sim"] == pytest.approx(1.0)
    assert [
        {**line, "probes": {n: x for n, x in line["probes"].items() if n not in found[2]}} for line in whole
    ] == lines_of(plain)
    assert found[0]["change/moved"] < found[1]["change/moved"] < found[2]["change/moved"]
    for step in (2, 1):
        resume(watched, step=step, display=Silent())
        assert lines_of(watched) == whole


def test_a_run_goes_on_only_with_the_start_that_it_had(models: Path, tmp_path: Path) -> None:
    folder = run(models, tmp_path / "run", [{"name": "change", "matrices": 2}], steps=2)
    settings = (folder / "run.toml").read_text()
    (folder / "run.toml").write_text(settings.replace("matrices = 2", "matrices = 1"))
    with pytest.raises(CheckpointError, match="with other matrices or with another student"):
        resume(folder, step=1, display=Silent())
    plain = run(models, tmp_path / "plain", [], steps=2)
    (plain / "run.toml").write_text(
        "probes = ['change']\n" + (plain / "run.toml").read_text().replace("probes = []\n", "")
    )
    with pytest.raises(ConfigError, match="the checkpoint was made without the probe"):
        resume(plain, step=1, display=Silent())
