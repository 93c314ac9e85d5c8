"""AdamW that freezes each weight matrix when it has converged (GradES, arXiv 2509.01842)."""

from .cut.cache import ActivationCache
from .cut.choose import choose_cut
from .cut.cut import Cut
from .freezing.param_groups import grades_param_groups
from .freezing.table import FreezeEvent
from .functional import grades_adamw
from .optimizer import GradESAdamW
from .report.calibration import Calibration, calibrate
from .report.report import FreezeReport

__version__ = "0.2.0.dev0"

__all__ = [
    "ActivationCache",
    "Calibration",
    "Cut",
    "FreezeEvent",
    "FreezeReport",
    "GradESAdamW",
    "calibrate",
    "choose_cut",
    "grades_adamw",
    "grades_param_groups",
]
