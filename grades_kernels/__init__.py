"""AdamW that freezes each weight matrix when it has converged (GradES, arXiv 2509.01842)."""

from .functional import grades_adamw
from .optimizer import GradESAdamW
from .report import FreezeEvent, FreezeReport
from .units import grades_param_groups

__version__ = "0.1.0"

__all__ = [
    "FreezeEvent",
    "FreezeReport",
    "GradESAdamW",
    "grades_adamw",
    "grades_param_groups",
]
