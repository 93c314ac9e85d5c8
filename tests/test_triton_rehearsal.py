"""The lines that only a CUDA device runs, on a stand-in for it: no first run ends at a typo.

The kernels go through Triton's interpreter and all memory is the CPU's, while events, streams,
pinned memory and the device's properties are stand-ins that record requests. The stand-in is as
late as a device may be: the copies and launches of a step wait in a queue until somebody waits for
an event, or another operation of PyTorch needs its turn.
"""

import contextlib
from types import SimpleNamespace

import pytest
import test_triton_engine as engine
import test_triton_parity as parity
import test_triton_scaling as scaling
import torch
import triton_runs as tr
from torch.utils._python_dispatch import TorchDispatchMode

from grades_kernels.freezing.config import TIMINGS

pytestmark = pytest.mark.skipif(tr.CUDA, reason="the device itself is there")


class Late(TorchDispatchMode):
    """A device that does everything in order, and nothing before it has to.

    Attributes:
        queue: What it has still to do: calls with their arguments.
        longest: The length that the queue had at most.
        events: All events.
    """

    def __init__(self):
        super().__init__()
        self.queue, self.longest, self.events = [], 0, []
        self.is_working = self.in_step = False

    def add(self, work, *args, **kwargs):
        if self.is_working:
            work(*args, **kwargs)
            return
        self.queue.append((work, args, kwargs))
        self.longest = max(self.longest, len(self.queue))

    def work(self, n):
        """Do the next `n` things."""
        self.is_working = True
        try:
            for work, args, kwargs in self.queue[:n]:
                work(*args, **kwargs)
        finally:
            del self.queue[:n]
            self.is_working = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.is_working and func.namespace != "profiler":  # of torch's Optimizer.step
            self.work(len(self.queue))
        return func(*args, **(kwargs or {}))

    def serve(self, engine, monkeypatch):
        """Take the launches and copies of the steps of `engine`, a module."""
        cls, copy, readable = engine.TritonEngine, torch.Tensor.copy_, engine._readable
        step, run = cls.step, cls._run

        def step_later(self_, *args):
            self.in_step = True
            try:
                step(self_, *args)
            finally:
                self.in_step = False

        def run_later(self_, *args, **options):
            if self_.only_compiles:
                run(self_, *args, **options)
            else:
                self.add(run, self_, *args, **options)

        def copy_later(to, *args, **options):
            if not self.in_step:
                return copy(to, *args, **options)
            self.add(copy, to, *args)
            return to

        def readable_later(*args, **options):
            read = readable(*args, **options)
            self.add(lambda read: None, read)  # the memory of gradients is free only then
            return read

        monkeypatch.setattr(cls, "step", step_later)
        monkeypatch.setattr(cls, "_run", run_later)
        monkeypatch.setattr(engine, "_readable", readable_later)
        monkeypatch.setattr(torch.Tensor, "copy_", copy_later)


class Event:
    """A CUDA event that was recorded before somebody waits for it."""

    def __init__(self, late):
        self.late = late
        self.n_recorded = self.n_reached = self.n_awaited = 0
        late.events.append(self)

    def record(self):
        self.n_recorded += 1
        self.late.add(self.reach, self.n_recorded)

    def reach(self, n):
        self.n_reached = n

    def synchronize(self):
        self.n_awaited += 1
        while self.n_reached < self.n_recorded:
            self.late.work(1)


@pytest.fixture
def device(monkeypatch, tmp_path):
    """The requests to the stand-in."""
    asked = SimpleNamespace(entered=[], pinned=[], streams=[], stream="a stream", current=0)
    is_cuda = ('device.type == "cuda"', "True")
    edits = {"triton_tables": is_cuda, "triton_engine": is_cuda}
    tr.use_edited_modules(monkeypatch, tmp_path, edits)
    asked.late = Late()
    asked.late.serve(tr.module("triton_engine"), monkeypatch)
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
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(asked.late))
    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: asked.current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: asked.stream)
    properties = SimpleNamespace(warp_size=32)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with asked.late:
        yield asked


RUNS = {
    "change, same step": lambda: tr.compare(),
    "change, next step": lambda: tr.compare(**tr.NEXT_STEP),
    "gain": lambda: parity.test_every_option_equals_the_reference("gain, eps large", False),
    "cooldown": lambda: parity.test_every_option_equals_the_reference("cooldown", False),
    "transposed": lambda: parity.test_layouts("transposed", "contiguous"),
    "overflow": lambda: scaling.test_an_overflow_writes_nothing(3, "same_step", True),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_the_stand_in_equals_the_reference(name, device):
    RUNS[name]()
    assert any(event.n_recorded for event in device.late.events) and True in device.pinned
    assert device.entered and not device.streams


@pytest.mark.filterwarnings("ignore:total_steps=4 is exceeded")
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("name", engine.SCENARIOS)
def test_changes_between_the_steps_of_a_late_device(name, timing, device):
    engine.test_changes_during_a_run(name, timing)


def test_results_are_awaited_only_after_they_were_asked_for(device):
    """One event for the results and one for each staging buffer; no step waits for its own."""
    run = tr.start(tau=0.0, **tr.NEXT_STEP)
    for _ in range(12):
        run.steps(1)
        assert all(event.n_awaited <= event.n_recorded for event in device.late.events)
    (mirrored,) = [event for event in device.late.events if event is tr.engine_of(run).mirrored]
    assert mirrored.n_recorded > 5 and mirrored.n_awaited == mirrored.n_recorded - 1
    run.opt.statistics()
    assert mirrored.n_awaited == mirrored.n_recorded


def run_alone(act=lambda engine: None, **options):
    """A run whose last steps have no other operation between them, beside the reference.

    The gradients stay as they are, so that of the statistics "momentum" falls.
    """
    runs = tr.both(statistic="momentum", **tr.NEXT_STEP, **options)
    for run in runs:
        run.steps(4)
    act(tr.engine_of(runs[0]))
    for run in runs:
        for k in range(12):
            run.opt.param_groups[0]["lr"] = 0.03 * 0.9**k
            run.opt.step()
            run.t += 1
    tr.assert_same(*runs)
    return runs[0]


def test_steps_of_a_late_device_find_what_was_meant_for_them(device):
    """Each of four staging buffers is written anew when the device has read it."""
    run_alone(tau=None, grace_steps=None)
    assert device.late.longest >= 4 * 4  # gradients, copy, event and launch of four steps


def test_decisions_of_a_late_device_are_awaited(device):
    run = run_alone(tau=20.0)
    assert run.events


@pytest.mark.parametrize("forgotten", ["staging", "results"])
def test_a_step_that_does_not_wait_for_a_late_device_is_noticed(forgotten, device):
    """Negative control."""

    def forget(engine):
        events = [staging.was_read for staging in engine.tables.ring]
        for event in events if forgotten == "staging" else [engine.mirrored]:
            event.synchronize = lambda: None

    tau = {"tau": None, "grace_steps": None} if forgotten == "staging" else {"tau": 20.0}
    with pytest.raises(AssertionError):
        run_alone(forget, **tau)


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
