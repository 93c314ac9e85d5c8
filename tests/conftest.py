import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read by `@triton.jit`, so before the kernels are imported: they run on CPU tensors then.
    os.environ["TRITON_INTERPRET"] = "1"

FUSED = {"reference": False, "native": None, "triton": True}
"""The `fused` that chooses an implementation for CPU tensors here."""


@pytest.fixture(scope="module", params=["reference", "native"])
def backend(request):
    """Tests that ask for it run on both CPU implementations."""
    if request.param == "native":
        from grades_kernels.native import why_not_loaded

        reason = why_not_loaded()
        if reason is not None:
            pytest.skip(reason)
    return request.param


@pytest.fixture
def without_pictures(request, monkeypatch):
    """A picture takes longer than a run; a test that wants one asks for `picture`."""
    if "picture" not in request.fixturenames:
        from grades_kernels import FreezeReport

        monkeypatch.setattr(FreezeReport, "plot", lambda report, path: path)


@pytest.fixture
def picture():
    """Asks for the picture."""


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
