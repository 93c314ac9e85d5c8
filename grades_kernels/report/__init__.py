"""The report of a run, and thresholds calculated from it. Imports neither rich nor matplotlib."""

from ..freezing.table import FreezeEvent
from .calibration import Calibration, calibrate
from .record import Memory, UnitReport
from .report import FreezeReport

__all__ = ["Calibration", "FreezeEvent", "FreezeReport", "Memory", "UnitReport", "calibrate"]
