"""What a run will need: memory per device, time per step, servers, bytes; only from configurations and prompts.

    staleness 0    prefix + write + score + measure + train + sync, wherever each is carried out
    staleness 1    (prefix) + max(what servers do, what this process does) + sync

With staleness 1 servers work on the next batch while this one is trained: they write it, and if the teacher is on
servers too, they write its prefixes first and score it afterwards.  A teacher in this process writes its prefixes
before the servers can begin, and scores in the time of training.  The hand-over of weights never overlaps.  The shares
of the peak that devices reach are assumptions; docs/performance.md compares predictions with measured steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import torch

from tropd.config.run import Run
from tropd.doctor.cost import Need, need_of, parameters_of
from tropd.doctor.prompts import check_lengths
from tropd.doctor.readers import readers_said
from tropd.doctor.subject import Subject, read_subject
from tropd.errors import ConfigError
from tropd.planning.calls import Calls, calls_of
from tropd.planning.devices import Device
from tropd.planning.readers import reader_sizes
from tropd.planning.work import Phase, Size, Texts, at_once, phases_of, sizes_of, texts_of
from tropd.training.assembly import shards_student

BY_TEACHER = ("prefix", "score")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The forecast of a run on a cluster; seconds are per step.  Every server is one more device."""

    run: Run
    device: Device
    num_devices: int
    """Devices that train."""
    need: Need
    """Bytes on a single device."""
    each: Need
    """Bytes on each device that trains."""
    texts: Texts
    phases: dict[str, Phase]
    served: dict[str, float]
    """Bytes of the weights on a rollout server and on a teacher server, if there are any."""
    weights_bytes: float
    """Bytes of the weights that every rollout server gets after a step."""
    score_bytes: float
    """Bytes that the teacher's servers send in a step."""
    calls: Calls | None = None
    """What a teacher that only writes is asked for in a step."""
    cautions: tuple[str, ...] = ()
    """Notes on prompts that would be skipped."""

    @property
    def writers(self) -> int:
        """The number of rollout servers; if 0, the trainers write."""
        return len(self.run.rollout.servers)

    @property
    def teachers(self) -> int:
        """The number of teacher servers; if 0, the trainers hold the teacher, or an endpoint that nobody counts."""
        return 0 if self.run.teacher.only_writes else len(self.run.teacher.servers)

    @property
    def all_devices(self) -> int:
        """All devices; servers that sleep while the trainers train share the trainers' devices."""
        return self.num_devices + self.teachers + (0 if self.run.rollout.servers_sleep else self.writers)

    @property
    def asked_at_once(self) -> tuple[int, int]:
        """How many rollouts a server writes at the same time, and how many in all."""
        each = ceil(self.texts.by_student / max(self.writers, 1))
        return min(each, at_once(self.run, self.texts, self.run.rollout.server)), each

    @property
    def seconds(self) -> dict[str, float]:
        return self.seconds_with(self.writers, self.teachers)

    def seconds_with(self, writers: int, teachers: int) -> dict[str, float]:
        """Seconds by phase."""
        number = {"write": writers or self.num_devices}
        number |= {phase: teachers or self.num_devices for phase in BY_TEACHER}
        found = {n: p.seconds(self.device, number.get(n, self.num_devices)) for n, p in self.phases.items()}
        if writers:  # all read what was written once, from one disk
            found["sync"] = self.weights_bytes * (1 + writers) / self.device.disk
        return found

    def split(self, writers: int, teachers: int) -> tuple[float, float, float]:
        """Seconds of servers, of this process, and of work that overlaps with neither."""
        seconds = self.seconds_with(writers, teachers)
        away = {"write"} if writers else set()
        away |= set(BY_TEACHER) if teachers else set()
        between = {"sync"} if teachers or not writers else {"sync", "prefix"}  # before the servers can begin
        servers = sum(s for phase, s in seconds.items() if phase in away)
        own = sum(s for phase, s in seconds.items() if phase not in away | between)
        return servers, own, sum(s for phase, s in seconds.items() if phase in between)

    def step_with(self, writers: int, teachers: int, staleness: int) -> float:
        servers, own, between = self.split(writers, teachers)
        return (max(servers, own) if staleness else servers + own) + between

    @property
    def step_seconds(self) -> float:
        return self.step_with(self.writers, self.teachers, self.run.rollout.staleness)

    @property
    def run_seconds(self) -> float:
        return self.step_seconds * self.run.steps

    @property
    def saved(self) -> float:
        """Seconds per step that writing ahead saves, with the given servers."""
        servers, own, _ = self.split(self.writers, self.teachers)
        return min(servers, own) if self.writers else 0.0

    @cached_property
    def busy(self) -> tuple[int, int] | None:
        """The fewest rollout servers (and teacher servers, if any) that finish the next batch while this process
        trains; None if no number does."""
        most = self.texts.rollouts

        def keeps_up(writers: int, teachers: int) -> bool:
            servers, own, _ = self.split(writers, teachers)
            return servers <= own

        if not keeps_up(most, most if self.teachers else 0):
            return None
        if not self.teachers:
            return next(w for w in range(1, most + 1) if keeps_up(w, 0)), 0
        pairs = ((w, all - w) for all in range(2, 2 * most + 1) for w in range(1, all))
        return next((w, t) for w, t in pairs if keeps_up(w, t))

    @property
    def peak(self) -> float:
        """Bytes on each trainer, including the weights of a server that writes there and then sleeps."""
        each = self.each
        beside = self.served["rollout"] if self.run.rollout.servers_sleep else 0.0
        return max(each.peak, each.weights + each.moments + each.masters + beside)

    @property
    def fits(self) -> bool:
        return self.peak <= self.device.memory


def make_forecast(run: Run, device: Device, num_devices: int = 1) -> Forecast:
    """Make the forecast from the models' configurations and the prompts; no weights are read."""
    subject, refusals = read_subject(run)
    if subject is None or not subject.prompts:
        found = [str(check) for check in refusals] or ["there are no prompts"]
        raise ConfigError("a forecast needs the models' configurations and the prompts: " + " ".join(found))
    lengths = [check for check in check_lengths(subject) if check.level != "ok"]
    if any(check.level == "error" for check in lengths):
        raise ConfigError("training would refuse this run: " + " ".join(map(str, lengths)))
    where = torch.device(device.kind)
    texts, need = texts_of(run, subject), need_of(subject, where)
    numbers = parameters_of(run.all_teachers["default"]) if subject.teacher else 0
    student, teacher = sizes_of(subject, need, numbers, where)
    held = {"rollout": (run.rollout.servers, need.student), "teacher": (run.teacher.servers, numbers * teacher.width)}
    share = need_of(subject, where, num_devices)
    tied = subject.student.config.get_text_config().tie_word_embeddings
    weights = need.gradients if run.student.lora else need.student + (student.head * student.width if tied else 0)
    per_token = 8 + 12 * run.method.objective.teacher_top_k  # a log-probability, and ids with theirs
    return Forecast(
        run=run,
        device=device,
        num_devices=num_devices,
        need=need,
        each=_on_each(run, subject, share, student, num_devices, texts),
        texts=texts,
        phases=phases_of(run, texts, student, teacher, need, num_devices, reader_sizes(run, student, where)),
        served={name: float(size) for name, (servers, size) in held.items() if servers and size},
        weights_bytes=weights,
        calls=calls_of(run, texts),
        score_bytes=texts.answered * per_token if run.teacher.servers else 0.0,
        cautions=(*map(str, lengths), *readers_said(run, where)),
    )


def _on_each(run: Run, subject: Subject, share: Need, student: Size, number: int, texts: Texts) -> Need:
    """The need of each device.  A sharded student is whole while it writes; in training only the parts outside the
    layers are whole.  Its gradients and masters are float32."""
    if run.parallel.teacher == "sharded" and not (texts.by_teacher or texts.jointly):  # whole while it writes
        share = replace(share, teacher=ceil(share.teacher / number))
    if not shards_student(run, number):
        return share
    part = ceil(share.moments / 2 / number)
    tied = subject.student.config.get_text_config().tie_word_embeddings
    outside = student.head * student.width * (1 if tied else 2)
    return replace(
        share,
        gradients=part,
        masters=part,
        moments=ceil(share.moments / number),
        emptied=max(0, share.student - int(outside)),
    )
