"""Callbacks for trainers, and the functions that they share. This package imports torch alone."""

from .shared import is_finished, measurements, release_under_ddp, save_report, unwrap_optimizer

__all__ = [
    "is_finished",
    "measurements",
    "release_under_ddp",
    "save_report",
    "unwrap_optimizer",
]
