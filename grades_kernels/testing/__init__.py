"""Compare an implementation on a device with the reference, for your own CI."""

from .comparison import Deviations, Validation, assert_matches_reference

__all__ = ["Deviations", "Validation", "assert_matches_reference"]
