"""The lines that only a CUDA device runs, on a stand-in for it: no first run ends at a typo.

The kernels go through Triton's interpreter and all memory is the CPU's, while events, streams,
pinned memory and the device's properties are stand-ins that record requests. What a
device does at its own time, such as finishing a copy after `step()` has returned, is not tested.
"""

import contextlib
from types import SimpleNamespace

import pytest
import test_triton_engine as engine
import test_triton_parity as parity
import test_triton_scaling as scaling
import torch
import triton_runs as tr

pytestmark = pytest.mark.skipif(tr.CUDA, reason="the device itself is there")


class Event:
    """A CUDA event that was recorded before somebody waits for it."""

    def __init__(self):
        self.n_recorded = self.n_awaited = 0
        EVENTS.append(self)

    def record(self):
        self.n_recorded += 1

    def synchronize(self):
        self.n_awaited += 1


EVENTS = []


@pytest.fixture
def device(monkeypatch, tmp_path):
    """The requests to the stand-in."""
    asked = SimpleNamespace(entered=[], pinned=[], streams=[], stream="a stream", current=0)
    is_cuda = ('device.type == "cuda"', "True")
    edits = {"triton_tables": is_cuda, "triton_engine": is_cuda}
    tr.use_edited_modules(monkeypatch, tmp_path, edits)
    EVENTS.clear()
    zeros = torch.zeros

    def unpinned(*args, pin_memory=False, **options):
        asked.pinned.append(pin_memory)
        return zeros(*args, **options)

    @contextlib.contextmanager
    def enter(device):
        asked.entered.append(device)
        yield

    monkeypatch.setattr(torch, "zeros", unpinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: asked.streams.append(s))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: asked.current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: asked.stream)
    properties = SimpleNamespace(warp_size=32)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return asked


RUNS = {
    "change, same step": lambda: tr.compare(),
    "change, next step": lambda: tr.compare(**tr.NEXT_STEP),
    "gain": lambda: parity.test_every_option_equals_the_reference("gain, eps large", False),
    "cooldown": lambda: parity.test_every_option_equals_the_reference("cooldown", False),
    "transposed": lambda: parity.test_layouts("transposed", "contiguous"),
    "state changed in place": lambda: engine.test_changes_during_a_run(
        "state changed in place", "same_step"
    ),
    "overflow": lambda: scaling.test_an_overflow_writes_nothing(3, "same_step", True),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_the_stand_in_equals_the_reference(name, device):
    RUNS[name]()
    assert any(event.n_recorded for event in EVENTS) and True in device.pinned
    assert device.entered and not device.streams


def test_results_are_awaited_only_after_they_were_asked_for(device):
    """One event for the results and one for each staging buffer; no step waits for its own."""
    run = tr.start(tau=0.0, **tr.NEXT_STEP)
    for _ in range(12):
        run.steps(1)
        assert all(event.n_awaited <= event.n_recorded for event in EVENTS)
    (mirrored,) = [event for event in EVENTS if event is tr.engine_of(run).mirrored]
    assert mirrored.n_recorded > 5 and mirrored.n_awaited == mirrored.n_recorded - 1
    run.opt.statistics()
    assert mirrored.n_awaited == mirrored.n_recorded


def test_another_stream_and_the_right_device_need_nothing_more(device):
    run = tr.start(tau=0.0).steps(3)
    device.stream, device.current, before = "another", None, len(device.entered)
    run.steps(2)
    assert set(device.streams) == {"another"}
    assert len(device.entered) == before  # the tensors' device is the current one


def test_a_stand_in_that_lacks_something_is_noticed(device, monkeypatch):
    """Negative control."""
    monkeypatch.delattr(Event, "record")
    with pytest.raises(AttributeError, match="record"):
        tr.compare()
