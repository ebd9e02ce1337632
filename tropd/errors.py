"""Everything that tropd raises on purpose.

    TropdError
      ConfigError(ValueError)          the run cannot be what it says
        OutOfRange                     a number that its field cannot have
        EvidenceError                  a term reads what nobody supplied, or what cannot be right
          TopKLeftOut                  a row's top-k was not asked for, but a term reads it
        VocabularyError                student and teacher do not share tokens
      DataError(ValueError)            a dataset, a row or a grader
      EngineError(RuntimeError)        whoever writes tokens as the student
        EngineTimeout, EngineOutOfSync
      TeacherError(RuntimeError)       whoever judges tokens
        TeacherUnavailable, TeacherRefused
      ServerError(RuntimeError)        an inference server; teachers and engines say it in their own errors
        ServerUnavailable, ServerGarbled, ServerRefused
      CheckpointError(RuntimeError)    saving, loading, exporting
      ProcessLost(RuntimeError)        another process of the run has ended
      TrainingDiverged(RuntimeError)   a non-finite loss or gradient, or an alarm that stops the run
      Interrupted                      a signal stopped the run after a step; everything is saved

A message has three parts: what was asked, what there is, what to do.  The command line prints the message alone and
exits with code 2; a traceback means a defect of tropd.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from signal import Signals


class TropdError(Exception):
    """The root: `except TropdError` catches every refusal and nothing else."""


class ConfigError(TropdError, ValueError):
    """The run cannot be what it says."""


class OutOfRange(ConfigError):
    """The run cannot be what it says."""

    def __init__(self, section: str, message: str) -> None:
        super().__init__(section, message)
        self.section, self.message = section, message

    def __str__(self) -> str:
        return ".".join(filter(None, (self.section, self.message)))


class EvidenceError(ConfigError):
    """A term reads evidence that nobody supplied, or that cannot be right."""


class TopKLeftOut(EvidenceError):
    """A term reads the teacher's top-k of a row for which it was not asked."""


class VocabularyError(ConfigError):
    """Student and teacher do not share tokens."""


class DataError(TropdError, ValueError):
    """A dataset, a row of it, or a grader is not what it should be."""


class EngineError(TropdError, RuntimeError):
    """The engine that writes tokens as the student failed."""


class EngineTimeout(EngineError):
    """The engine did not answer in time."""


class EngineOutOfSync(EngineError):
    """The engine does not hold the weights that it should."""


class TeacherError(TropdError, RuntimeError):
    """The teacher failed."""


class TeacherUnavailable(TeacherError):
    """The teacher did not answer."""


class TeacherRefused(TeacherError):
    """The teacher answered, and what it said is no."""


class ServerError(TropdError, RuntimeError):
    """An inference server failed."""


class ServerUnavailable(ServerError):
    """No answer, not now, or cut off: the same request may succeed later, or elsewhere."""

    def __init__(self, message: str, *, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds
        """After which the server wishes to be asked again."""


class ServerGarbled(ServerError):
    """An answer that cannot be right."""


class ServerRefused(ServerError):
    """The server says no."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class CheckpointError(TropdError, RuntimeError):
    """A checkpoint cannot be written, read or exported."""


class ProcessLost(TropdError, RuntimeError):
    """Another process of the run has ended."""


class TrainingDiverged(TropdError, RuntimeError):
    """Training would go on with numbers that mean nothing."""


class MethodWarning(UserWarning):
    """A method was configured in a way that is known to work badly; the text says why."""


class Interrupted(TropdError):
    """A signal stopped the run after a step; everything is saved."""

    def __init__(self, directory: Path, step: int, signal: Signals) -> None:
        super().__init__(directory, step, signal)
        self.directory, self.step, self.signal = directory, step, signal

    def __str__(self) -> str:
        return f"{self.signal.name} stopped the run after step {self.step}. Go on with: tropd resume {self.directory}"


def require(package: str, extra: str, asked: str) -> None:
    """Refuse what was asked if the optional package that does it is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{asked} was asked for, and needs the package {package}, which is not installed here. "
            f"Install it with: pip install 'tropd[{extra}]'"
        )
