"""torch's own table of AdamW inputs, so that a new torch version adds cases.

torch's module imports expecttest, which torch does not install. Without it the tests that read the
table are skipped.
"""

import pytest
from torch.optim import AdamW

try:
    from torch.testing._internal import common_optimizers
except ModuleNotFoundError as error:
    if error.name != "expecttest":
        raise
    ADAMW = common_optimizers = None
else:
    ADAMW = next(info for info in common_optimizers.optim_db if info.optim_cls is AdamW)

needs_torch_inputs = pytest.mark.skipif(
    ADAMW is None, reason="torch's table of optimizer inputs needs expecttest"
)
