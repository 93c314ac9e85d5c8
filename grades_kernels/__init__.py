"""AdamW that freezes each weight matrix when it has converged (GradES, arXiv 2509.01842)."""

from .calibration import Calibration, calibrate
from .functional import grades_adamw
from .optimizer import GradESAdamW
from .report import FreezeEvent, FreezeReport
from .units import grades_param_groups

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "FreezeEvent",
    "FreezeReport",
    "GradESAdamW",
    "calibrate",
    "grades_adamw",
    "grades_param_groups",
]
