import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read by `@triton.jit`, so before the kernels are imported: they run on CPU tensors then.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
