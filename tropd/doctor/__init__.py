"""Finds what will go wrong with a run before it happens.

examine(run) -> list[Check]         everything, with a few measured rollouts: `tropd doctor`
quick_checks(parts) -> list[str]    the checks without rollouts: at the start of every run
"""

from tropd.doctor.check import Check
from tropd.doctor.examination import examine, quick_checks

__all__ = ["Check", "examine", "quick_checks"]
