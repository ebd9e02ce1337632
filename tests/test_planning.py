"""A plan counts what the models' configurations say, scales as arithmetic does, and refuses what it does not know."""

from __future__ import annotations

import pytest

from tests.integration.runs import prepare, run_in
from tropd import config_file
from tropd.cli import main
from tropd.errors import ConfigError
from tropd.planning import DEVICES, Device, make_plan, read_cluster

SLOW_MEMORY = Device(name="slow memory", memory=1e12, operations=1e30, bandwidth=1e3)
SLOW_UNITS = Device(name="slow units", memory=1e12, operations=1e3, bandwidth=1e30)


@pytest.fixture
def run(tmp_path):
    return run_in(prepare(tmp_path))


def test_memory_is_the_models_own(run, tmp_path):
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert make_plan(run, DEVICES["h100"]).need.student == 4 * sum(p.numel() for p in student.parameters())


def test_arithmetic_is_spread_over_devices_and_traffic_of_training_is_not(run):
    one, two = (make_plan(run, SLOW_UNITS, n).seconds for n in (1, 2))
    assert all(one[phase] == pytest.approx(2 * two[phase]) for phase in one)
    one, two = (make_plan(run, SLOW_MEMORY, n).seconds for n in (1, 2))
    assert one["train"] == two["train"]


def test_training_takes_three_forward_passes_of_arithmetic(run):
    plan = make_plan(run, SLOW_UNITS)  # student and teacher have the same size
    assert plan.seconds["train"] * 0.35 == pytest.approx(3 * plan.seconds["score"] * 0.5)


def test_what_does_not_fit_is_said_with_an_exit_code(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "run.toml").write_text(config_file.dump(run))
    assert main(["plan", str(tmp_path / "run.toml"), "--cluster", "2xh100", "--dollars-per-hour", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 x h100" in said and "$" in said
    monkeypatch.setitem(DEVICES, "toy", Device(name="toy", memory=1.0, operations=1e9, bandwidth=1e9))
    assert main(["plan", str(tmp_path / "run.toml"), "--cluster", "toy"]) == 1
    assert "too small" in capsys.readouterr().out


def test_sharding_divides_training_state_and_makes_devices_wait_for_their_layers(run):
    one, four = (make_plan(run, DEVICES["h100"], n) for n in (1, 4))
    assert one.sharded == one.need and one.gather_bytes == 0
    assert four.sharded.moments == pytest.approx(four.need.moments / 4, abs=1)
    assert four.sharded.student == four.need.student
    assert four.gather_bytes == pytest.approx(3 * four.need.student * 3 / 4)  # one micro-batch each
    slow = Device(name="slow link", memory=1e12, operations=1e30, bandwidth=1e30, link=1.0)
    assert make_plan(run, slow, 4).seconds["train"] == pytest.approx(four.gather_bytes)


@pytest.mark.parametrize("text", ["8xh99", "0xh100", "h100x8", ""])
def test_an_unknown_cluster_is_refused_with_what_is_known(text):
    with pytest.raises(ConfigError, match="h100"):
        read_cluster(text)


def test_this_machine_is_measured():
    device, number = read_cluster("here")
    assert number == 1 and device.operations > 1e6 and device.bandwidth > 1e6
