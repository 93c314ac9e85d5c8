"""Every deliberate fault still finds its target; `python tests/mutations.py` runs them all."""

import pytest
from faults import FAULTS


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_something_and_can_be_taken_back(name):
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[name].apply(patch)
        assert patch._setattr or patch._setitem
