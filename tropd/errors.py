"""Everything that tropd raises on purpose.

    TropdError
      ConfigError(ValueError)          settings, arguments or files that do not fit together
        OutOfRange                     a number outside its field's range
        EvidenceError                  log-probabilities, ids or rewards that are missing or impossible
          TopKLeftOut                  a teacher's top-k that was not requested for a row
        VocabularyError                student and teacher with different tokens
      DataError(ValueError)            a data set, a row or a grader
      EngineError(RuntimeError)        the engine that writes the student's tokens
        EngineTimeout, EngineOutOfSync
      TeacherError(RuntimeError)       the teacher
        TeacherUnavailable, TeacherRefused
      ServerError(RuntimeError)        an inference server; a teacher or an engine turns it into its own error
        ServerUnavailable, ServerGarbled, ServerRefused
      CheckpointError(RuntimeError)    saving, loading, exporting
      ProcessLost(RuntimeError)        another process of the run has ended
      TrainingDiverged(RuntimeError)   a loss or gradient that is not finite, or an alarm that stops the run
      Interrupted                      a signal stopped the run after a step; everything is saved

A message is a sentence with a subject and has three parts: what was asked, what there is, what to do.  The command line
prints the message alone and exits with code 2; a traceback means a defect of tropd.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from signal import Signals


class TropdError(Exception):
    """The base class: `except TropdError` catches every error that tropd raises on purpose, and nothing else."""


class ConfigError(TropdError, ValueError):
    """Raised where settings, arguments or files do not fit together."""


class OutOfRange(ConfigError):
    """Raised where a number lies outside the range of its field; `section` is the path of the table around it."""

    def __init__(self, section: str, message: str) -> None:
        super().__init__(section, message)
        self.section, self.message = section, message

    def __str__(self) -> str:
        return ".".join(filter(None, (self.section, self.message)))


class EvidenceError(ConfigError):
    """Raised where log-probabilities, ids or rewards that a term reads are missing, or cannot be right."""


class TopKLeftOut(EvidenceError):
    """Raised where a term reads the teacher's top-k of a row for which it was not requested."""


class VocabularyError(ConfigError):
    """Raised where student and teacher do not have the same tokens."""


class DataError(TropdError, ValueError):
    """Raised where a data set, a row or a grader cannot be used."""


class EngineError(TropdError, RuntimeError):
    """Raised where the engine that writes the student's tokens fails."""


class EngineTimeout(EngineError):
    """Raised where the engine does not answer in time."""


class EngineOutOfSync(EngineError):
    """Raised where the engine does not compute with the student's current weights."""


class TeacherError(TropdError, RuntimeError):
    """Raised where the teacher fails."""


class TeacherUnavailable(TeacherError):
    """Raised where the teacher does not answer."""


class TeacherRefused(TeacherError):
    """Raised where the teacher answers that it cannot do what it was asked."""


class BudgetSpent(TeacherError):
    """Raised where the teacher may cost no more."""


class ServerError(TropdError, RuntimeError):
    """Raised where an inference server fails."""


class ServerUnavailable(ServerError):
    """Raised where a server gives no answer, or none now: the same request may succeed later, or on another server."""

    def __init__(self, message: str, *, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds
        """How long the server asks its clients to wait, if it says so."""


class ServerGarbled(ServerError):
    """Raised where a server's answer cannot be right."""


class ServerRefused(ServerError):
    """Raised where a server refuses a request."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class CheckpointError(TropdError, RuntimeError):
    """Raised where a checkpoint cannot be written, read or exported."""


class ProcessLost(TropdError, RuntimeError):
    """Raised where another process of the run has ended."""


class TrainingDiverged(TropdError, RuntimeError):
    """Raised where a loss or a gradient is not finite, or an alarm stops the run."""


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
