"""What a person watches while a run trains: a live panel in a terminal, one line per step anywhere else.

Both say the same numbers, taken from the step's record by `read_out`.  Nothing here catches an exception, and text is
never read as markup, so `pip install tropd[data]` in a note arrives whole.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tropd.base.terminal import PrintableConsole
from tropd.types import StepRecord

PHASES = {
    "rollout": "cyan",
    "score": "magenta",
    "train": "green",
    "sync": "blue",
    "record": "bright_black",
}
OTHER_PHASE = "white"
LAST_ALARMS = 3
_OF_A_TEACHER = re.compile(r"(\S+): step \d+: (teacher (['\"]).*?\3): ")


class Display(ABC):
    """Shows a run.  `with make_display(...) as display:` leaves the terminal as it was, whatever happens inside."""

    @abstractmethod
    def start(self, facts: Mapping[str, str]) -> None:
        """Show the facts of the run."""

    @abstractmethod
    def update(self, record: StepRecord) -> None:
        """Show one step's record."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Print a line that stays."""

    @abstractmethod
    def close(self) -> None:
        """Give the terminal back; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Silent(Display):
    """Shows nothing: of several processes only rank 0 prints."""

    def start(self, facts: Mapping[str, str]) -> None:
        pass

    def update(self, record: StepRecord) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Pace:
    """How long the rest will take, from the mean of the last 20 steps."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._seconds: deque[float] = deque(maxlen=20)

    def left(self, record: StepRecord) -> timedelta:
        """Counts this record, then estimates."""
        self._seconds.append(whole(record.seconds))
        remaining = max(self.total_steps - record.step - 1, 0)
        return timedelta(seconds=round(remaining * sum(self._seconds) / len(self._seconds)))


class PlainDisplay(Display):
    """One line per step, for logs and pipes."""

    def __init__(self, total_steps: int, console: Console) -> None:
        self.total_steps = total_steps
        self._console = console
        self._pace = Pace(total_steps)
        self._alarms: Counter[str] = Counter()

    def start(self, facts: Mapping[str, str]) -> None:
        for name, value in facts.items():
            self.note(f"{name}: {value}")

    def update(self, record: StepRecord) -> None:
        words = [f"{name} {value}" for name, value in read_out(record).items()]
        words.append(f"{whole(record.seconds):.3g} s ({phase_text(record.seconds)})")
        self.note("  ".join([f"step {record.step} of {self.total_steps}", *words, f"left {self._pace.left(record)}"]))
        for alarm in record.alarms:
            name = _kind_of(alarm)
            self._alarms[name] += 1
            times = self._alarms[name]
            self.note(f"ALARM at step {record.step}: " + (alarm if times == 1 else f"{name} again ({times} so far)"))

    def note(self, text: str) -> None:
        # soft_wrap: a line of a log stays one line, however narrow rich thinks that a file is.
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        pass


class LiveDisplay(Display):
    """A panel that is redrawn after each step, below whatever else is printed."""

    def __init__(self, total_steps: int, console: Console) -> None:
        self.total_steps = total_steps
        self._console = console
        self._pace = Pace(total_steps)
        self._evaluation = ""
        self._alarms: list[str] = []
        # Redrawn by `update` alone: exceptions in a drawing thread would be lost.
        self._live = Live(Text("waiting for the first step"), console=console, auto_refresh=False)

    def start(self, facts: Mapping[str, str]) -> None:
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(Text(name, style="dim"), Text(value))
        self._console.print(table)
        self._live.start(refresh=True)

    def update(self, record: StepRecord) -> None:
        if not self._live.is_started:
            self._live.start()
        if record.evaluation:
            self._evaluation = f"{evaluation_text(record.evaluation)}  (step {record.step})"
        self._alarms += [f"step {record.step}: {alarm}" for alarm in record.alarms]
        self._live.update(self._panel(record), refresh=True)

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def close(self) -> None:
        self._live.stop()

    def _panel(self, record: StepRecord) -> RenderableType:
        done = min(record.step + 1, self.total_steps)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {record.step} of {self.total_steps}", style="bold"),
            ProgressBar(total=max(self.total_steps, 1), completed=done, width=40),
            Text(f"left {self._pace.left(record)}"),
        )
        numbers = Text()
        for name, value in read_out(record).items():
            if name != "evaluation":  # has its own row, which stays until the next one
                numbers.append(f"{name} ", style="dim").append(f"{value}   ")
        rows = [head, numbers, phase_bar(record.seconds, width=40)]
        if self._evaluation:
            rows.append(Text("evaluation ", style="dim").append(self._evaluation, style="not dim"))
        rows += [Text(f"ALARM at {alarm}", style="bold red") for alarm in self._alarms[-LAST_ALARMS:]]
        if len(self._alarms) > LAST_ALARMS:
            rows.append(Text(f"and {len(self._alarms) - LAST_ALARMS} earlier alarms, all in the records", style="red"))
        return Group(*rows)


def make_display(total_steps: int, *, console: Console | None = None) -> Display:
    """A live panel where the console can redraw lines, else plain lines.  rich honours NO_COLOR in both."""
    console = console or PrintableConsole(highlight=False)
    redraws = console.is_terminal and not console.is_dumb_terminal
    return LiveDisplay(total_steps, console) if redraws else PlainDisplay(total_steps, console)


def read_out(record: StepRecord) -> dict[str, str]:
    """The numbers of a step that are shown, in reading order; absent ones are left out."""
    shown = {"loss": f"{record.loss:.4g}"}
    if "reward/mean" in record.probes:
        shown["reward"] = f"{record.probes['reward/mean']:.3g}"
    if record.evaluation:
        shown["evaluation"] = evaluation_text(record.evaluation)
    if "trust/share" in record.probes:
        shown["trust"] = f"{record.probes['trust/share']:.1%}"
    shown["gradient"] = f"{record.gradient_norm:.3g}"
    shown["lr"] = f"{record.learning_rate:.3g}"
    seconds = whole(record.seconds)
    if seconds > 0 and record.tokens:
        shown["tokens/s"] = f"{whole(record.tokens) / seconds:,.0f}"
    return shown


def _kind_of(alarm: str) -> str:
    """The alarm's name, and the teacher's where there are several."""
    of_teacher = _OF_A_TEACHER.match(alarm)
    return f"{of_teacher[1]} of {of_teacher[2]}" if of_teacher else alarm.partition(":")[0]


def evaluation_text(evaluation: Mapping[str, float]) -> str:
    """Scores with their intervals; the rest is in the records."""
    shown = []
    for name, score in evaluation.items():
        if "/" in name or name == "num_prompts":
            continue
        low, high = (evaluation.get(f"{name}/{end}") for end in ("low", "high"))
        interval = f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else ""
        shown.append(f"{name} {score:.4g}{interval}")
    return ", ".join(shown)


def whole(parts: Mapping[str, float]) -> float:
    """The part called total, else the sum of the parts."""
    return parts["total"] if "total" in parts else sum(parts.values())


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each phase's share of the named seconds, in the order of a step; phases that took no time are left out."""
    phases = [*PHASES, *(name for name in seconds if name not in PHASES and name != "total")]
    spent = {name: seconds[name] for name in phases if seconds.get(name, 0.0) > 0.0}
    everything = sum(spent.values())
    return {name: part / everything for name, part in spent.items()}


def phase_text(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares(seconds).items())


def phase_bar(seconds: Mapping[str, float], width: int) -> Text:
    """A bar of `width` letters, split among the phases, with what each letter means; needs no colour to be read."""
    bar, legend, letters = Text(), Text(f" {whole(seconds):.3g} s"), set[str]()
    reached, drawn = 0.0, 0
    for name, share in shares(seconds).items():
        style = PHASES.get(name, OTHER_PHASE)
        letter = name[0].lower() if name[0].upper() in letters else name[0].upper()
        letters.add(letter)
        reached += share
        cells = round(reached * width) - drawn  # rounded from the left end, so that the cells add up to the width
        drawn += cells
        bar.append(letter * cells, style=f"reverse {style}")
        legend.append(f"  {letter} {name} {share:.0%}", style=style)
    return bar.append_text(legend)
