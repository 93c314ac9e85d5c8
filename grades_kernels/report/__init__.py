"""The report of a run, to print, save, load and plot, and thresholds calculated from it.

Importing this package imports neither ``rich`` nor ``matplotlib``: only colours and pictures need
them.
"""

from ..freezing.table import FreezeEvent
from .calibration import Calibration, calibrate
from .record import Memory, UnitReport
from .report import FreezeReport

__all__ = ["Calibration", "FreezeEvent", "FreezeReport", "Memory", "UnitReport", "calibrate"]
