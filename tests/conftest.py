import pytest
import torch


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
