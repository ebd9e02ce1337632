from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from tests.report.examples import step_record
from tropd.monitoring.display import LiveDisplay, Pace, PlainDisplay, make_display, phase_bar, shares, whole


def terminal(**environ: str) -> Console:
    environ = {"TERM": "xterm-256color", **environ}
    return Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False, _environ=environ)


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40, highlight=False, _environ={})


def text_of(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_gets_the_panel_and_a_pipe_gets_lines() -> None:
    assert isinstance(make_display(10, console=terminal()), LiveDisplay)
    assert isinstance(make_display(10, console=pipe()), PlainDisplay)


def test_a_terminal_that_cannot_redraw_gets_lines() -> None:
    assert isinstance(make_display(10, console=terminal(TERM="dumb")), PlainDisplay)


def test_a_step_is_one_plain_line_however_narrow_the_console() -> None:
    console = pipe()
    with make_display(10, console=console) as display:
        display.start({"method": "tropd"})
        display.update(step_record(3))
    assert text_of(console).splitlines() == [
        "method: tropd",
        "step 3 of 10  loss 0.5  reward 0.25  trust 90.0%  gradient 12.5  lr 1e-05  tokens/s 25  "
        "4 s (rollout 50%, score 25%, train 25%)  left 0:00:24",
    ]


def test_alarms_and_notes_arrive_whole_even_with_square_brackets() -> None:
    for console in (pipe(), terminal()):
        with make_display(10, console=console) as display:
            display.start({"student": "tiny [red]"})
            display.note("pip install 'tropd[data]'")
            display.update(step_record(0, alarms=("mismatch [bold]",)))
        for said in ("tiny [red]", "tropd[data]", "mismatch [bold]"):
            assert said in text_of(console)


def test_an_alarm_is_explained_once_and_counted_after_that() -> None:
    console = pipe()
    with make_display(10, console=console) as display:
        for step in range(3):
            display.update(step_record(step, alarms=("mismatch: a long story",)))
    alarms = [line for line in text_of(console).splitlines() if line.startswith("ALARM")]
    assert alarms[0].endswith("mismatch: a long story")
    assert [line.split(": ")[1] for line in alarms[1:]] == ["mismatch again (2 so far)", "mismatch again (3 so far)"]


def test_the_first_alarm_of_each_teacher_is_explained() -> None:
    console = pipe()
    with make_display(10, console=console) as display:
        for step in range(2):
            alarms = tuple(f"collapse: step {step}: teacher {name!r}: a long story" for name in ("a", "it's"))
            display.update(step_record(step, alarms=alarms))
    said = [line.partition(": ")[2] for line in text_of(console).splitlines() if line.startswith("ALARM")]
    assert said[:2] == [
        "collapse: step 0: teacher 'a': a long story",
        'collapse: step 0: teacher "it\'s": a long story',
    ]
    assert said[2:] == [
        "collapse of teacher 'a' again (2 so far)",
        'collapse of teacher "it\'s" again (2 so far)',
    ]


def test_the_panel_keeps_the_last_evaluation_and_counts_alarms_that_it_no_longer_shows() -> None:
    console = terminal()
    with make_display(10, console=console) as display:
        display.start({})
        display.update(step_record(0, evaluation={"gsm8k": 0.412}, alarms=tuple(f"alarm-{i}" for i in range(5))))
        console.file.truncate(0)
        display.update(step_record(1))
    shown = text_of(console)
    assert "gsm8k 0.412" in shown and "(step 0)" in shown
    assert "alarm-1" not in shown and "alarm-2" in shown and "alarm-4" in shown
    assert "and 2 earlier alarms" in shown


def test_a_number_that_is_not_finite_is_shown() -> None:
    for console in (pipe(), terminal(NO_COLOR="1")):
        with make_display(10, console=console) as display:
            display.update(step_record(0, loss=math.nan, gradient_norm=math.inf))
        shown = text_of(console)
        assert "nan" in shown and "inf" in shown


def test_an_exception_passes_through_and_the_cursor_comes_back() -> None:
    console = terminal()
    with pytest.raises(KeyError), make_display(10, console=console) as display:
        display.start({})
        raise KeyError("out of the loop")
    assert text_of(console).rindex("\x1b[?25h") > text_of(console).rindex("\x1b[?25l")


def test_closing_twice_is_closing_once() -> None:
    for console in (pipe(), terminal()):
        display = make_display(10, console=console)
        display.start({})
        display.close()
        once = text_of(console)
        display.close()
        assert text_of(console) == once


def test_no_color_means_no_colour() -> None:
    def cyan(console: Console) -> bool:
        with make_display(10, console=console) as display:
            display.update(step_record(0))
        return "\x1b[36m" in text_of(console)

    assert cyan(terminal())
    assert not cyan(terminal(NO_COLOR="1"))


def test_time_left_is_the_mean_step_times_the_steps_that_remain() -> None:
    pace = Pace(total_steps=10)
    assert pace.left(step_record(4, seconds={"rollout": 2.0})).total_seconds() == 5 * 2
    assert pace.left(step_record(5, seconds={"rollout": 4.0})).total_seconds() == 4 * 3
    assert pace.left(step_record(9)).total_seconds() == 0


def test_the_total_is_what_the_record_says_or_else_the_sum() -> None:
    assert whole({"rollout": 2.0, "train": 1.0}) == 3.0
    assert whole({"rollout": 2.0, "train": 1.0, "total": 3.5}) == 3.5


def test_phases_come_in_the_order_of_a_step_and_share_what_was_spent() -> None:
    seconds = {"save": 1.0, "train": 2.0, "rollout": 5.0, "score": 0.0, "total": 99.0}
    assert shares(seconds) == {"rollout": 0.625, "train": 0.25, "save": 0.125}
    assert list(shares(seconds)) == ["rollout", "train", "save"]
    assert shares({}) == {}


@pytest.mark.parametrize("parts", [(1.0, 1.0, 1.0), (97.0, 1.0, 1.0), (0.3, 0.3, 7.1)])
def test_the_phases_fill_the_bar_exactly(parts: tuple[float, ...]) -> None:
    text = phase_bar(dict(zip(("rollout", "score", "sync"), parts, strict=True)), width=40).plain
    assert len(text.split(" ")[0]) == 40


def test_phases_are_told_apart_without_colour() -> None:
    text = phase_bar({"score": 1.0, "sync": 1.0}, width=8).plain
    assert text.startswith("SSSSssss ") and "S score 50%" in text and "s sync 50%" in text
