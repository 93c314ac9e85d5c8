import contextlib
import functools
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # `@triton.jit` reads this when a kernel is imported, which then runs on CPU tensors. Triton's
    # own functions are imported now: a test without the variable would import them otherwise.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import interpreter

        interpreter.speed_up()

FUSED = {"reference": False, "native": None, "triton": True}
"""Implementation -> the value of `fused` that selects it for CPU tensors in these tests."""


@pytest.fixture(scope="module", params=["reference", "native"])
def backend(request):
    """Run a test on both CPU implementations, and skip one that cannot run here."""
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is not in use")
    if request.param == "native":
        from grades_kernels.backends.native import why_not_loaded

        reason = why_not_loaded()
        if reason is not None:
            pytest.skip(reason)
    return request.param


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    """A job of this process alone, on loopback."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def without_plots(request, monkeypatch):
    """Draw no plot, which takes longer than a run, unless the test uses the fixture `plot`."""
    if "plot" not in request.fixturenames:
        from grades_kernels import FreezeReport

        monkeypatch.setattr(FreezeReport, "plot", lambda report, path: path)


@pytest.fixture
def plot():
    """Let `without_plots` draw the plot."""


def _with_room(function, /, **arguments):
    return function(**arguments)


# CPython has frames in chunks of 16 KiB. Where the calls of a loop go back and forth over the end
# of one, it maps and unmaps the next each time, which has taken half the time of a test of Triton's
# interpreter. This frame asks for so much that its chunk has 512 KiB to spare for those above it.
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=1 << 16)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    pyfuncitem.obj = functools.partial(_with_room, pyfuncitem.obj)
    return (yield)


def pytest_collection_modifyitems(items):
    """Run the slow tests first, and skip those marked `gpu` where there is no CUDA device."""
    items.sort(key=lambda item: "slow" not in item.keywords)  # the last ones keep no worker waiting
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
