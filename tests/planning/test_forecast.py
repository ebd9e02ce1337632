"""A forecast counts what the models' configurations say, scales as arithmetic does, and refuses what is unknown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.small_runs import run_of, save_model, write_models
from tests.tiny import tiny_model
from tropd.cli.main import main
from tropd.config.models import LoraConfig
from tropd.config.stages import ParallelConfig
from tropd.errors import ConfigError
from tropd.methods import METHODS
from tropd.planning import DEVICES, Device, make_forecast, read_cluster

SLOW_MEMORY = Device(name="slow memory", memory=1e12, operations=1e30, bandwidth=1e3)
SLOW_UNITS = Device(name="slow units", memory=1e12, operations=1e3, bandwidth=1e30)
SLOW_DISK = Device(name="slow disk", memory=1e12, operations=1e30, bandwidth=1e30, disk=1.0)
SLOW_CPU = Device(name="slow cpu", memory=1e12, operations=1e3, bandwidth=1e3, kind="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(write_models(tmp_path_factory.mktemp("world")), rollout={"max_new_tokens": 10})  # one micro-batch


def test_memory_is_the_models_own(run):
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(run.student.path)
    assert make_forecast(run, SLOW_CPU).need.student == 4 * sum(p.numel() for p in student.parameters())


def test_arithmetic_is_spread_over_devices_and_what_each_reads_is_not(run):
    run = replace(run, parallel=ParallelConfig(student="replicated"))
    one, two = (make_forecast(run, SLOW_UNITS, n).seconds for n in (1, 2))
    assert all(one[phase] == pytest.approx(2 * two[phase]) for phase in one)
    one, two = (make_forecast(run, SLOW_MEMORY, n).seconds for n in (1, 2))
    assert one["train"] == two["train"] and one["score"] == two["score"]


def test_training_takes_three_forward_passes_of_arithmetic_and_an_adapter_two(run):
    forecast = make_forecast(run, SLOW_UNITS)  # student and teacher have the same size
    assert forecast.seconds["train"] * 0.35 == pytest.approx(3 * forecast.seconds["score"] * 0.5)
    lora = replace(run, student=replace(run.student, lora=LoraConfig(rank=1)))
    adapted = make_forecast(lora, SLOW_UNITS)
    assert 2 < adapted.seconds["train"] * 0.35 / (forecast.seconds["score"] * 0.5) < 2.4
    again = replace(run, student=replace(run.student, gradient_checkpointing=True))
    assert 3 < make_forecast(again, SLOW_UNITS).seconds["train"] * 0.35 / (forecast.seconds["score"] * 0.5) < 4
    shares = replace(run, optimizer=replace(run.optimizer, num_updates=2))  # halves of the batch, measured before
    assert make_forecast(shares, SLOW_UNITS).seconds["train"] == pytest.approx(forecast.seconds["train"])
    assert make_forecast(shares, SLOW_UNITS).seconds["measure"] == pytest.approx(forecast.seconds["score"])


def test_teacher_servers_score_with_the_teachers_size(run, tmp_path):
    save_model(tmp_path / "large", tiny_model("qwen3", seed=2, tied=True, width=64))
    large = replace(run, teacher=replace(run.teacher, path=str(tmp_path / "large")))
    inside, away = (make_forecast(r, SLOW_UNITS) for r in (large, with_servers(large, teachers=1)))
    assert away.need.teacher == 0 < inside.need.teacher
    assert away.seconds["score"] == inside.seconds["score"] > 2 * make_forecast(run, SLOW_UNITS).seconds["score"]


def test_prefixes_are_written_by_the_teacher_once_and_not_by_the_student(run):
    opd = make_forecast(replace(run, method=METHODS["opd"]()), SLOW_UNITS)
    tropd = make_forecast(run, SLOW_UNITS)  # a prefix of 0.4 x 10 tokens, one text for the two rollouts of a prompt
    assert opd.texts.by_teacher == 0 and "prefix" not in opd.seconds
    assert opd.texts.written == 6 * 10 and tropd.texts.written == 6 * (10 - tropd.texts.prefix)
    assert 0 < tropd.texts.prefix <= 4 and tropd.texts.by_teacher == 3
    later = make_forecast(replace(run, steps=2000), SLOW_UNITS).texts  # all prompts are answered after seven steps
    assert later.by_teacher == pytest.approx(20 / 2000, rel=0.1)


def with_servers(run, writers=0, teachers=0, staleness=0):
    urls = tuple(f"http://127.0.0.1:{port}" for port in range(1, 99))
    rollout = replace(run.rollout, servers=urls[:writers], staleness=staleness)
    return replace(run, rollout=rollout, teacher=replace(run.teacher, servers=urls[50 : 50 + teachers]))


@pytest.mark.parametrize(("writers", "teachers"), [(1, 0), (2, 0), (1, 1), (3, 2)])
@pytest.mark.parametrize("device", [SLOW_UNITS, SLOW_MEMORY, SLOW_DISK, DEVICES["h100"]], ids=lambda d: d.name)
def test_a_step_is_the_sum_of_its_phases_or_the_longer_side_and_what_cannot_overlap(run, device, writers, teachers):
    now, ahead = (make_forecast(with_servers(run, writers, teachers, s), device, 2) for s in (0, 1))
    seconds = now.seconds
    assert seconds == ahead.seconds and set(seconds) == {"prefix", "write", "score", "train", "sync"}
    assert now.step_seconds == pytest.approx(sum(seconds.values()))
    if teachers:
        servers, own, alone = seconds["prefix"] + seconds["write"] + seconds["score"], seconds["train"], 0.0
    else:
        servers, own, alone = seconds["write"], seconds["score"] + seconds["train"], seconds["prefix"]
    assert ahead.step_seconds == pytest.approx(max(servers, own) + alone + seconds["sync"])
    assert own + seconds["sync"] <= ahead.step_seconds * (1 + 1e-9) and ahead.step_seconds <= now.step_seconds
    assert now.step_seconds - ahead.step_seconds == pytest.approx(now.saved) and now.saved == ahead.saved


@pytest.mark.parametrize("device", [SLOW_UNITS, SLOW_MEMORY, DEVICES["h100"]], ids=lambda d: d.name)
def test_more_servers_are_never_slower_but_in_taking_their_weights(run, device):
    forecast = make_forecast(with_servers(run, 1, 1, 1), replace(device, disk=float("inf")))
    for staleness in (0, 1):
        for few, many in (((1, 1), (2, 1)), ((2, 1), (2, 2)), ((2, 2), (5, 3)), ((5, 3), (6, 3))):
            assert forecast.step_with(*many, staleness) <= forecast.step_with(*few, staleness)
    one, two = (make_forecast(with_servers(run, n), SLOW_DISK).seconds["sync"] for n in (1, 2))
    assert two == pytest.approx(1.5 * one)  # written once, read by each


@pytest.mark.parametrize("teachers", [0, 1])
def test_the_fewest_servers_that_keep_the_trainer_busy(run, teachers):
    forecast = make_forecast(with_servers(run, 1, teachers, 1), SLOW_UNITS, 6)
    writers, asked = forecast.busy
    servers, own, _ = forecast.split(writers, asked)
    assert servers <= own and (asked > 0) == (teachers > 0)
    one_less = [(w, writers + asked - 1 - w) for w in range(1, writers + asked - 1)] if teachers else [(writers - 1, 0)]
    assert one_less and one_less[0][0] > 0
    for fewer in one_less:
        servers, own, _ = forecast.split(*fewer)
        assert servers > own


def test_no_number_of_servers_is_enough_where_one_answer_takes_too_long(run, capsys, tmp_path, monkeypatch):
    asked = with_servers(run, 1, 1, 1)
    assert make_forecast(asked, SLOW_MEMORY).busy is None  # each token of an answer reads all the weights
    (tmp_path / "run.toml").write_text(asked.dump())
    monkeypatch.setitem(DEVICES, "slow", SLOW_MEMORY)
    assert main(["plan", str(tmp_path / "run.toml"), "--cluster", "slow"]) == 0
    assert "No number of servers" in capsys.readouterr().out


def test_a_tiny_models_step_takes_what_starting_its_operations_and_handling_its_tokens_take(run):
    """Two layers of width 32: no device is so fast that a step takes microseconds."""
    endless = Device(name="endless", memory=1e12, operations=1e30, bandwidth=1e30, launch=1.0, token=0.0)
    opd = replace(run, method=METHODS["opd"]())
    seconds = make_forecast(opd, endless).seconds
    started = seconds["score"]  # one forward pass
    assert started == 50 * (2 + 2)
    assert seconds["train"] == 5 * started and seconds["write"] == 10 * started  # 10 tokens, one batch
    halves = make_forecast(replace(opd, rollout=replace(opd.rollout, max_batch=3)), endless).seconds
    assert halves["write"] == 2 * seconds["write"]
    replayed = make_forecast(with_servers(opd, 1), replace(endless, disk=float("inf"))).seconds
    assert replayed["write"] == seconds["write"] / 10
    many = replace(endless, launch=0.0, token=1.0)
    forecast = make_forecast(opd, many)
    assert forecast.seconds["score"] == forecast.texts.read and forecast.seconds["train"] == 2 * forecast.texts.read
    assert forecast.seconds["write"] == 6 * 10
    for device in DEVICES.values():
        assert make_forecast(run, device).step_seconds > 1e-3


def test_a_floor_changes_nothing_where_the_arithmetic_takes_longer(run):
    for device in (SLOW_UNITS, SLOW_MEMORY):
        free = replace(device, launch=0.0, token=0.0)
        assert make_forecast(run, device).seconds == make_forecast(run, free).seconds


def test_this_machine_says_what_it_takes_to_start_an_operation():
    here = read_cluster("here")[0]
    assert 0 < here.launch < 1e-2 and 0 < here.token < 1e-2


def test_a_plan_for_gpus_is_made_in_their_precision(run):
    there = make_forecast(replace(run, device="auto"), DEVICES["h100"])
    here = make_forecast(run, SLOW_CPU)
    assert here.need.student == 2 * there.need.student and here.need.masters == 0 < there.need.masters


def test_what_does_not_fit_is_said_with_an_exit_code(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "run.toml").write_text(run.dump())
    assert main(["plan", str(tmp_path / "run.toml"), "--cluster", "2xh100", "--dollars-per-hour", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 x h100" in said and "$" in said
    monkeypatch.setitem(DEVICES, "toy", Device(name="toy", memory=1.0, operations=1e9, bandwidth=1e9))
    assert main(["plan", str(tmp_path / "run.toml"), "--cluster", "toy"]) == 1
    assert "too small" in capsys.readouterr().out


def test_what_writing_ahead_would_save_is_said(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no cell is broken
    for staleness, words in ((0, "would save"), (1, "for the next step")):
        asked = with_servers(run, 2, 2, staleness)
        (tmp_path / "run.toml").write_text(asked.dump())
        assert main(["plan", str(tmp_path / "run.toml"), "--cluster", "h100", "--dollars-per-hour", "2"]) == 0
        said = capsys.readouterr().out
        assert words in said and "2 rollout servers" in said and "5 devices" in said
    rollout = replace(run.rollout, servers=("http://127.0.0.1:1",), servers_sleep=True)
    (tmp_path / "run.toml").write_text(replace(run, rollout=rollout).dump())
    assert main(["plan", str(tmp_path / "run.toml"), "--cluster", "h100", "--dollars-per-hour", "2"]) == 0
    said = capsys.readouterr().out
    assert "nothing overlaps" in said and "1 devices" in said


def said_of(run, folder, capsys, device="h100"):
    (folder / "run.toml").write_text(run.dump())
    assert main(["plan", str(folder / "run.toml"), "--cluster", device]) == 0
    return capsys.readouterr().out


def test_servers_are_advised_only_where_the_student_writes_and_the_step_gets_shorter(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(DEVICES, "slow", SLOW_UNITS)
    rows = [{"prompt": f"{n}+1=", "answer": "1", "r": "1"} for n in range(5)]
    (tmp_path / "given.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = replace(run.data, path=str(tmp_path / "given.jsonl"), response_column="r")
    given = replace(run, method=METHODS["seqkd"](), data=data)
    nothing = said_of(given, tmp_path, capsys, "slow")
    assert "ahead" not in nothing and "busy" not in nothing
    served = said_of(with_servers(given, 1), tmp_path, capsys, "slow")
    assert "writes nothing in a step" in served and "ahead" not in served and "busy" not in served

    assert "would keep the trainer busy" in said_of(run, tmp_path, capsys, "slow")  # trainers write now
    monkeypatch.setitem(DEVICES, "slow", replace(SLOW_UNITS, disk=1.0))  # weights would be on their way for ever
    assert "busy" not in said_of(run, tmp_path, capsys, "slow")
    monkeypatch.setitem(DEVICES, "slow", SLOW_UNITS)
    rollout = replace(run.rollout, servers=("http://127.0.0.1:1",), servers_sleep=True)
    asleep = said_of(replace(run, rollout=rollout), tmp_path, capsys, "slow")
    assert "nothing overlaps" in asleep and "ahead" not in asleep and "busy" not in asleep


def test_lengths_that_training_refuses_are_refused_and_prompts_that_it_skips_are_told(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match="would refuse this run: .*answers of up to 5000 tokens leave no room"):
        make_forecast(replace(run, rollout=replace(run.rollout, max_new_tokens=5000)), SLOW_UNITS)
    rows = [{"prompt": "1+1=" * times, "answer": "2"} for times in (1, 2, 200)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    long = replace(run, data=replace(run.data, path=str(tmp_path / "long.jsonl")))
    assert "1 of 3 prompts" in " ".join(said_of(long, tmp_path, capsys).split())
    assert make_forecast(run, SLOW_UNITS).cautions == ()


def test_what_servers_hold_is_counted_where_they_are(run, tmp_path, capsys, monkeypatch):
    small = Device(name="small", memory=1.0, operations=1e12, bandwidth=1e12)
    forecast = make_forecast(with_servers(run, 1, 1), small)
    student = forecast.need.student
    assert forecast.served == {"rollout": student, "teacher": student} and make_forecast(run, small).served == {}
    rollout = replace(run.rollout, servers=("http://127.0.0.1:1",), servers_sleep=True, num_prompts=1, num_rollouts=1)
    beside = make_forecast(replace(run, rollout=rollout), small)
    assert beside.peak >= beside.need.weights + beside.need.moments + beside.need.masters + student
    (tmp_path / "run.toml").write_text(with_servers(run, 1, 1).dump())
    monkeypatch.setitem(DEVICES, "small", small)
    assert main(["plan", str(tmp_path / "run.toml"), "--cluster", "small"]) == 1
    assert "tensor-parallel-size" in capsys.readouterr().out


def test_sharding_divides_training_state_and_makes_devices_wait_for_their_layers(run):
    one, four = (make_forecast(run, DEVICES["h100"], n) for n in (1, 4))
    numbers = one.need.student / 2
    assert one.each == one.need and one.phases["train"].received == 0
    assert four.each.moments == pytest.approx(8 * numbers / 4, abs=1)
    assert four.each.gradients == four.each.masters == pytest.approx(4 * numbers / 4, abs=1)
    assert four.each.student == four.need.student > four.each.emptied > 0
    gathered = (2 * 2 + 4 + 2) * numbers * 3 / 4  # one micro-batch: weights twice, gradients; the whole for rollouts
    assert four.phases["train"].received == pytest.approx(gathered)
    slow = Device(name="slow link", memory=1e12, operations=1e30, bandwidth=1e30, link=1.0)
    assert make_forecast(run, slow, 4).seconds["train"] == pytest.approx(gathered)


def test_adapters_are_whole_on_every_device(run):
    lora = replace(run, student=replace(run.student, lora=LoraConfig(rank=2)))
    four = make_forecast(lora, DEVICES["h100"], 4)
    assert four.each.moments == four.need.moments and four.each.emptied == 0
    assert four.phases["train"].received == pytest.approx(2 * four.need.moments / 2 * 3 / 4)  # gradients in float32


@pytest.mark.parametrize("text", ["8xh99", "0xh100", "h100x8", ""])
def test_an_unknown_cluster_is_refused_with_what_is_known(text):
    with pytest.raises(ConfigError, match="h100"):
        read_cluster(text)


def test_this_machine_is_measured():
    device, number = read_cluster("here")
    assert number == 1 and device.operations > 1e6 and device.bandwidth > 1e6


def test_a_teacher_that_follows_is_said_and_writes_every_text_anew(tmp_path, capsys):
    folder = write_models(tmp_path)
    teacher = {"path": "start", "follow": {"rule": "ema"}}
    run = run_of(folder, steps=50, rollout={"max_new_tokens": 10}, teacher=teacher)
    still = run_of(folder, steps=50, rollout={"max_new_tokens": 10}, teacher={"path": "start"})
    moving, frozen = (make_forecast(x, SLOW_CPU) for x in (run, still))
    assert moving.need.teacher == frozen.need.teacher and moving.texts.by_teacher > frozen.texts.by_teacher
    (tmp_path / "run.toml").write_text(run.dump())
    assert main(["plan", str(tmp_path / "run.toml"), "--cluster", "8xh100"]) == 0
    said = capsys.readouterr().out
    assert "the teacher (ema): follows the student. Each holds the model a second time, with an average in" in said
