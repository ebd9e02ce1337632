"""On-policy distillation of language models that refuses to fail silently.

These names are stable:

    Run                        a run: Run(student=..., teacher=..., data=...), Run.load(path), Run.from_dict(values)
    StudentConfig, LoraConfig, TeacherConfig, ServerConfig, DataConfig, RolloutConfig, Sampling, OptimizerConfig,
    EvalConfig, RunEvalConfig, CheckpointConfig, AlarmConfig, ParallelConfig      its sections
    train, resume, evaluate    what is done with it
    TrOPD, OPD, ...            every method; METHODS lists them by name
    Method, Teacher, Briefing, Engine, RolloutPolicy, Decoding, Extra, Probe, Callback
                               what parts of your own inherit from
    WithColumn, WithSystem, WithFeedback, WithPeers, WithDemonstrations
                               what a reader is told and the student is not
    Grade                      what a grader gives that also has words
    Objective, Term            what a method is made of; `tropd.objective` has the pieces
    distillation_loss          a method's loss for a training loop of your own
    TropdError                 every refusal

Names are loaded when they are first asked for: `import tropd` costs nothing, and `import tropd.objective` needs torch
alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tropd.briefings.briefing import Briefing as Briefing
    from tropd.briefings.briefing import WithColumn as WithColumn
    from tropd.briefings.briefing import WithDemonstrations as WithDemonstrations
    from tropd.briefings.briefing import WithFeedback as WithFeedback
    from tropd.briefings.briefing import WithPeers as WithPeers
    from tropd.briefings.briefing import WithSystem as WithSystem
    from tropd.config.alarms import AlarmConfig as AlarmConfig
    from tropd.config.models import LoraConfig as LoraConfig
    from tropd.config.models import ServerConfig as ServerConfig
    from tropd.config.models import StudentConfig as StudentConfig
    from tropd.config.models import TeacherConfig as TeacherConfig
    from tropd.config.run import Run as Run
    from tropd.config.stages import CheckpointConfig as CheckpointConfig
    from tropd.config.stages import DataConfig as DataConfig
    from tropd.config.stages import EvalConfig as EvalConfig
    from tropd.config.stages import OptimizerConfig as OptimizerConfig
    from tropd.config.stages import ParallelConfig as ParallelConfig
    from tropd.config.stages import RolloutConfig as RolloutConfig
    from tropd.config.stages import RunEvalConfig as RunEvalConfig
    from tropd.data.graders import Grade as Grade
    from tropd.errors import TropdError as TropdError
    from tropd.evaluation.models import evaluate as evaluate
    from tropd.methods import *  # noqa: F403  # every method
    from tropd.methods import METHODS as METHODS
    from tropd.methods import Method as Method
    from tropd.methods.decoding import Decoding as Decoding
    from tropd.methods.extras import Extra as Extra
    from tropd.methods.policies import RolloutPolicy as RolloutPolicy
    from tropd.monitoring.callbacks import Callback as Callback
    from tropd.monitoring.probe import Probe as Probe
    from tropd.objective import Objective as Objective
    from tropd.objective import Term as Term
    from tropd.objective import distillation_loss as distillation_loss
    from tropd.rollout.engine import Engine as Engine
    from tropd.run.start import resume as resume
    from tropd.run.start import train as train
    from tropd.teachers.teacher import Teacher as Teacher
    from tropd.types import Sampling as Sampling
    from tropd.version import __version__ as __version__

_IN = {
    "config.alarms": ("AlarmConfig",),
    "config.models": ("LoraConfig", "ServerConfig", "StudentConfig", "TeacherConfig"),
    "config.run": ("Run",),
    "config.stages": (
        *("CheckpointConfig", "DataConfig", "OptimizerConfig", "ParallelConfig", "RolloutConfig"),
        *("EvalConfig", "RunEvalConfig"),
    ),
    "data.graders": ("Grade",),
    "errors": ("TropdError",),
    "evaluation.models": ("evaluate",),
    "methods": ("METHODS", "Method"),
    "briefings.briefing": (
        *("Briefing", "WithColumn", "WithDemonstrations", "WithFeedback", "WithPeers", "WithSystem"),
    ),
    "methods.decoding": ("Decoding",),
    "methods.extras": ("Extra",),
    "methods.policies": ("RolloutPolicy",),
    "monitoring.callbacks": ("Callback",),
    "monitoring.probe": ("Probe",),
    "objective": ("Objective", "Term", "distillation_loss"),
    "rollout.engine": ("Engine",),
    "run.start": ("resume", "train"),
    "teachers.teacher": ("Teacher",),
    "types": ("Sampling",),
    "version": ("__version__",),
}
_HOME = {name: f"tropd.{module}" for module, names in _IN.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name == "__all__":
        return __dir__()
    if not name.startswith("_"):
        methods = _methods()
        if name in methods:
            return methods[name]
        raise AttributeError(f"module 'tropd' has no attribute {name!r}; it has {', '.join(__dir__())}.")
    raise AttributeError(f"module 'tropd' has no attribute {name!r}.")


def __dir__() -> list[str]:
    return sorted([*_HOME, *_methods()])


def _methods() -> dict[str, Any]:
    """Every method by the name of its class."""
    methods = importlib.import_module("tropd.methods").METHODS
    return {cls.__name__: cls for cls in methods.values()}
