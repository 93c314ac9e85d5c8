"""The deliberate faults of tests/mutations.py are replacements in source text, which moves on."""

import pytest
from mutations import FAULTS, ROOT, mutated


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_source(fault):
    assert mutated(fault) != (ROOT / fault.file).read_text()
