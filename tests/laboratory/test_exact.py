"""The demonstration runs the real stages, gives the same numbers again, and says what the numbers say."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from tropd.cli.exact import demonstrate
from tropd.cli.main import main
from tropd.errors import ConfigError
from tropd.laboratory.exact import ARMS, Curve, Setting, divergences, make_tables, run_all, run_one, smallest_log_ratio
from tropd.laboratory.exact_report import findings, mean_of

TINY = Setting(
    num_prompts=2, vocab_size=8, max_new_tokens=5, num_rollouts=4, num_steps=4, num_seeds=2, learning_rates=(0.1,)
)


def test_a_run_measures_before_the_first_step_and_after_the_last():
    curve = run_one(("OPD", 0.1, 0, dataclasses.replace(TINY, num_steps=7, measure_every=3)))
    assert curve.steps == (0, 3, 6, 7)
    assert len(curve.gradient_norm) == 7
    assert (curve.reverse_kl[0], curve.forward_kl[0], curve.total_variation[0]) == divergences(
        *make_tables(TINY, 0, 0.1), TINY.max_new_tokens
    )


def test_every_arm_starts_from_the_same_pair_and_a_second_run_gives_the_same_numbers():
    once, again = list(run_all(TINY)), list(run_all(TINY))
    assert once == again
    assert [(c.arm, c.seed) for c in once] == [(arm, seed) for arm in ARMS for seed in range(2)]
    assert len({c.reverse_kl[0] for c in once}) == TINY.num_seeds
    assert len({c.reverse_kl[-1] for c in once}) == len(once)


def test_the_student_disagrees_strongly_where_it_goes_astray_and_little_elsewhere():
    near, far = (dataclasses.replace(Setting(), astray=share) for share in (0.0, 1.0))
    assert smallest_log_ratio(far) < -12.0 < -4.0 < smallest_log_ratio(near)
    gaps = [divergences(*make_tables(s, 0, 0.1), 12)[0] for s in (near, far)]
    assert gaps[1] > 5 * gaps[0]


def test_the_whole_demonstration_writes_what_it_shows(tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=120)
    curves = demonstrate(TINY, tmp_path / "exact", workers=1, figure=True, console=console)
    results = json.loads((tmp_path / "exact" / "results.json").read_text())
    assert [Curve(**{k: tuple(v) if isinstance(v, list) else v for k, v in c.items()}) for c in results["curves"]] == (
        curves
    )
    assert results["setting"]["num_steps"] == TINY.num_steps
    shown = " ".join(out.getvalue().split())
    assert all(" ".join(line.split()) in shown for line in results["findings"])
    assert "What this does not show" in shown and all(arm in shown for arm in ARMS)
    first = {p.name: p.read_bytes() for p in (tmp_path / "exact").iterdir()}
    assert first.keys() == {"results.json", "demo.svg", "demo.png"}
    demonstrate(TINY, tmp_path / "again", workers=1, figure=True, console=console)
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == first


def flat(arm: str, seed: int, reverse: tuple[float, ...], forward: tuple[float, ...]) -> Curve:
    return Curve(
        arm=arm,
        learning_rate=0.1,
        seed=seed,
        steps=(0, 1, 2),
        reverse_kl=reverse,
        forward_kl=forward,
        total_variation=(0.0,) * 3,
        gradient_norm=(1.0, 1.0),
    )


def test_the_findings_follow_the_numbers_whoever_wins():
    def told(ours: float, plain: float, spread: float) -> str:
        curves = []
        for arm in ARMS:
            last = ours if arm == "TrOPD" else plain
            for seed in range(3):
                end = last + spread * (seed if arm == "TrOPD" else -seed)
                curves.append(flat(arm, seed, (9.0, 1.0 if arm == "OPD" else 8.0, end), (9.0, 8.0, end)))
        return findings(curves)[1]

    assert "KL(student || teacher) is lower by 2 ± 0," in told(1.0, 3.0, 0.0)
    assert "OPD is ahead in KL(student || teacher) until step 1; its lowest is 1 at step 1." in told(1.0, 3.0, 0.0)
    assert "KL(student || teacher) is higher by 2 ± 0," in told(3.0, 1.0, 0.0)
    assert told(3.0, 1.0, 0.0).endswith("OPD is ahead in KL(student || teacher) to the last step.")
    assert "cannot be told apart" in told(2.0, 2.1, 1.0)


def test_an_interval_is_students_and_one_seed_has_none():
    assert str(mean_of([1.0])) == "1"
    # 1, 2, 3: deviation 1, t(2) = 4.303
    assert mean_of([1.0, 2.0, 3.0]).half_width == pytest.approx(4.303 / 3**0.5)


def test_a_setting_that_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="num_steps = 0 was asked for"):
        Setting(num_steps=0)
    with pytest.raises(ConfigError, match="vocab_size"):
        Setting(vocab_size=1)


def test_flags_that_cannot_run_exit_with_2(capsys):
    assert main(["exact", "--num-steps", "0"]) == 2
    assert main(["exact", "--workers", "-1"]) == 2
    assert "--workers is -1" in capsys.readouterr().err


def test_the_command_takes_the_setting_as_flags(tmp_path, capsys):
    flags = "--num-prompts 1 --vocab-size 4 --num-rollouts 2 --num-steps 1 --num-seeds 1 --learning-rates 0.1"
    threads = torch.get_num_threads()
    assert main(["exact", *flags.split(), "--workers", "1", "--no-figure", "--output", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    assert "one seed: no interval" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
