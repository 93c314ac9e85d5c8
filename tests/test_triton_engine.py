"""The engine around the Triton kernels: changes during a run, launches, checkpoints, dispatch."""

import copy
import functools
import gc
import importlib.util
import io
import math
import pickle
import threading
import weakref

import pytest
import torch
import triton_runs as tr
from harness import TIMINGS, snapshot
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from grades_kernels import GradESAdamW
from grades_kernels.backends.native import why_not_loaded
from grades_kernels.backends.select import why_not_triton
from grades_kernels.freezer import Freezer

pytestmark = [pytest.mark.gpu] if tr.CUDA else []


# Changes during a run -------------------------------------------------------------------------


def filled(value, *chosen, at):
    """At these steps some tensors have gradients filled with `value`, or none where it is None."""

    def act(run):
        if run.t + 1 in at:
            new = [None if value is None else torch.full_like(p, value) for p in run.params]
            return [new[i] if i in chosen else g for i, g in enumerate(tr.usual(run))]

    return act


without = functools.partial(filled, None)


def once(at, action):
    """`action(run)` before step `at`."""

    def act(run):
        if run.t + 1 == at:
            action(run)

    return act


def set_group(**values):
    return lambda run: run.opt.param_groups[0].update(values)


def add_group(run):
    run.params.append(nn.Parameter(torch.full((4, 6), 0.5, device=tr.DEVICE)))
    run.opt.add_param_group({"params": [run.params[-1]], "lr": 0.01, "statistic": "norm"})


def replace_data(run):
    for p in run.params:
        p.data = p.detach().clone()


def double(key, in_place=True):
    """Twice its value at another address: as `x.data = x.data.to(device)` does, or a new tensor.

    The old memory stays allocated, so that an engine that goes on with it differs.
    """

    def act(run):
        for state in run.opt.state.values():
            if key in state:
                run.old = state[key].data, getattr(run, "old", None)
                if in_place:
                    state[key].data = state[key].data * 2
                else:
                    state[key] = state[key] * 2

    return act


def scale_state(run):
    for state in run.opt.state.values():
        state["exp_avg"].mul_(0.5)
        state["step"].add_(3)


def load_other_moments(run):
    state_dict = copy.deepcopy(run.opt.state_dict())
    for entry in state_dict["state"].values():
        entry["exp_avg"].mul_(0.5)
    run.opt.load_state_dict(state_dict)


def scheduled(run):
    if run.t == 0:
        run.scheduler = torch.optim.lr_scheduler.OneCycleLR(run.opt, max_lr=0.1, total_steps=20)
    else:
        run.scheduler.step()


def in_place_lr(run):
    run.opt.param_groups[0]["lr"].mul_(0.9)


def lower_tau(run):
    run.opt.param_groups[0]["tau"] = 80.0 * 0.9**run.t


def same_buffers(run):
    """Gradients in a buffer of the user's, at the same address every step."""
    grads = tr.usual(run)
    run.buffer = getattr(run, "buffer", [torch.empty_like(g) for g in grads])
    for buffer, g in zip(run.buffer, grads, strict=True):
        buffer.copy_(g)
    return run.buffer


SIGNAL = {"statistic": "signal", "tau": 1.02}
GAIN = {"statistic": "gain", "tau": 2.5}


def negative_bit(run):
    """The usual gradients, negated in memory."""
    if run.t + 1 >= 3:
        return [torch._neg_view(-g) for g in tr.usual(run)]


SLOW = {"tau": 20.0}  # a later freeze, so that the change falls into the active phase
SCENARIOS = {
    "gradients with the negative bit": (SLOW, negative_bit),
    "a matrix without gradient": (SLOW, without(0, at=(3, 4))),
    "no gradient on the last step before a check": (SLOW, without(0, 1, at=(2,))),
    "no gradient anywhere": (SLOW, without(0, 1, 2, at=(4,))),
    "no gradient in the first step": (SLOW, without(0, 1, 2, at=(1,))),
    "a first gradient after the first check": (SLOW, without(1, at=range(1, 5))),
    "a bias with a late first gradient": (SLOW, without(2, at=range(1, 5))),
    "zero gradients": (SLOW, filled(0.0, 0, 1, at=(4, 5))),
    "gradients that are not finite": (SLOW, filled(math.inf, 0, at=(4,))),
    "gradients that are not numbers": ({**SLOW, "amsgrad": True}, filled(math.nan, 0, at=(4,))),
    "gradients at one address": (SLOW, same_buffers),
    "gradients that are not finite, signal": (SIGNAL, filled(math.inf, 0, at=(6,))),
    "gradients that are not finite, gain": (GAIN, filled(-math.inf, 0, at=(4,))),
    "zero gradients, signal": (SIGNAL, filled(0.0, 0, 1, at=(4, 5))),
    "a first gradient after the first check, signal": (SIGNAL, without(1, at=range(1, 5))),
    "tau lower": ({}, once(3, set_group(tau=5.0))),
    "tau higher": (SLOW, once(4, set_group(tau=500.0))),
    "a tau for every step": ({}, lower_tau),
    "a tau for every step, max_frozen": ({"max_frozen": 0.5}, lower_tau),
    "tau taken away": ({"tau": 1.0}, once(4, set_group(tau=None))),
    "tau comes late": ({"tau": None}, once(4, set_group(tau=50.0))),
    "another statistic": (SLOW, once(4, set_group(statistic="momentum"))),
    "change after norm": ({**SLOW, "statistic": "norm"}, once(4, set_group(statistic="change"))),
    "lr, betas and decay": (SLOW, once(3, set_group(lr=0.1, betas=(0.1, 0.7), weight_decay=0.5))),
    "maximize": (SLOW, once(3, set_group(maximize=True))),
    "another group": (SLOW, once(4, add_group)),
    "thaw of everything": ({}, once(6, lambda run: run.opt.thaw())),
    "thaw of one": ({}, once(5, lambda run: run.opt.thaw("group0.param1"))),
    "thaw while cooling": ({"cooldown": 3}, once(5, lambda run: run.opt.thaw())),
    "a checkpoint of its own": (SLOW, once(4, lambda r: r.opt.load_state_dict(r.opt.state_dict()))),
    "a checkpoint with other moments": (SLOW, once(4, load_other_moments)),
    "parameters with other storage": (SLOW, once(4, replace_data)),
    "other moments": (SLOW, once(4, double("exp_avg", in_place=False))),
    "other previous gradients": (SLOW, once(4, double("prev_grad", in_place=False))),
    "steps at other addresses": (SLOW, once(4, double("step"))),
    "moments at other addresses": (SLOW, once(4, double("exp_avg_sq"))),
    "prev_grad at other addresses": (SLOW, once(4, double("prev_grad"))),
    "state cleared": (SLOW, once(4, lambda run: run.opt.state.clear())),
    "state changed in place": (SLOW, once(4, scale_state)),
    "a scheduler": ({}, scheduled),
    "lr as a tensor": ({"lr": torch.tensor(0.03), "foreach": False}, in_place_lr),
    "lr as a tensor of one dimension": ({"lr": torch.tensor([0.03])}, in_place_lr),
    "betas as tensors": ({"betas": (torch.tensor(0.8), torch.tensor(0.97))}, lambda run: None),
    "total_steps exceeded": ({"total_steps": 4, "grace_steps": None}, lambda run: None),
}


@pytest.mark.filterwarnings("ignore:total_steps=4 is exceeded")
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_changes_during_a_run(name, timing):
    """Whatever the user changes between steps is honoured in the very next one."""
    options, act = SCENARIOS[name]
    tr.compare(act=act, **options, freeze_timing=timing)


@pytest.mark.skipif(tr.CUDA, reason="another backend serves the tensor on the CPU alone")
def test_a_parameter_that_becomes_a_view_with_gaps_is_served_elsewhere():
    """The kernels walk through memory, gaps included, so the backend is chosen anew."""
    ours, theirs = tr.both(**SLOW)
    for run in (ours, theirs):
        run.steps(3)
        p = run.params[0]
        run.around = torch.full((*p.shape, 2), 7.0)
        run.around[..., 0] = p.detach()
        p.data = run.around[..., 0]
    if why_not_loaded() is not None:
        with pytest.raises(RuntimeError, match="native op is not built"):
            ours.steps(1)
    else:
        ours.steps(2), theirs.steps(2)
        assert ours.opt.backend == "native"
        for p, q in zip(ours.params, theirs.params, strict=True):
            torch.testing.assert_close(p, q)
    assert ours.around[..., 1].eq(7.0).all()


@pytest.mark.parametrize("fused", [True, False], ids=["triton", "reference"])
def test_a_changed_tau_makes_nothing_anew(fused, monkeypatch):
    """Not even where it changes in every step: neither units nor engines."""
    run = tr.start(fused, tau=1.0).steps(3)
    table, engines, mapped = run.opt._freezer.table, run.opt._freezer.engines, []
    monkeypatch.setattr(Freezer, "map_units", lambda *args: mapped.append(args))
    for tau in (2.0, 30.0, 60.0):
        run.opt.param_groups[0]["tau"] = tau
        run.steps(1)
        assert {unit.tau for unit in run.opt._freezer.table.units} == {tau}
    assert run.opt._freezer.table is table and run.opt._freezer.engines is engines and not mapped
    taus = [(event.step, event.tau) for event in run.opt.freeze_events]
    assert taus == [(5, 30.0), (6, 60.0)]


# Launches -------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """The number of programs of each launch of `step_kernel`."""
    engine, launches = tr.module("triton_engine"), []
    kernel = engine.step_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid[0])
            return kernel[grid]

        def warmup(self, *args, grid, **options):
            kernel.warmup(*args, grid=grid, **options)

    monkeypatch.setattr(engine, "step_kernel", Counted())
    return launches


@pytest.mark.parametrize("n_matrices", [1, 7])
@pytest.mark.parametrize(
    ("timing", "expected"), [("same_step", [1, 1, 2, 2]), ("next_step", [1, 1, 1, 1])]
)
def test_launches_do_not_depend_on_the_number_of_matrices(timing, expected, n_matrices, launched):
    """One launch a step; a second one only for a check before the update."""
    run = tr.start(True, ((3, 3),) * n_matrices + ((4,),), tau=0.0, freeze_timing=timing)
    seen = []
    for _ in expected:
        launched.clear()
        run.steps(1)
        seen.append(len(launched))
    assert seen == expected


def test_launches_per_combination_of_dtypes(launched):
    """bf16 beside fp32 costs one launch more; a bias in fp32 joins the launch of the matrices."""
    params = [torch.ones(shape, device=tr.DEVICE) for shape in ((3, 3), (4, 4), (5,))]
    params = tr.mixed_dtypes(params, (torch.float32, torch.bfloat16, torch.float32))
    run = tr.start(params=params, tau=0.0, freeze_timing="next_step")
    for _ in range(4):
        launched.clear()
        run.steps(1)
        assert len(launched) == 2


def test_dropped_tensors_are_not_launched(launched):
    """From the step after its decision on, a frozen matrix has no program in any launch."""
    run = tr.start(True, ((4, 4096), (3, 5), (7,)), tau=1e9, grace_steps=1).steps(2)
    assert launched[-1] == 4 + 1 + 1
    run.steps(1)
    assert run.opt.all_frozen
    assert launched[-1] == 1


COMPILED = [
    {},
    {"tau": None},
    {"freeze_timing": "next_step", "check_every": 3, "statistic": "norm"},
    {"freeze_timing": "next_step", "amsgrad": True},
    {"check_every": 2, "stop_grad": False},
]


@pytest.mark.parametrize("options", COMPILED, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_no_step_waits_for_a_compiler(options, scaled, monkeypatch):
    """Every variant that a run launches is compiled when its engine takes the first step."""
    module, compiled, missing, messages = tr.module("triton_engine"), set(), [], []
    monkeypatch.setattr(module._logger, "info", lambda message, *args: messages.append(message))

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def variant(self, options):
            numbers = {key: str(x) for key, x in options.items() if key != "FIELDS"}
            return self.kernel.__name__, frozenset(numbers.items())

        def warmup(self, *args, grid, **options):
            compiled.add(self.variant(options))

        def __getitem__(self, grid):
            def launch(*args, **options):
                if self.variant(options) not in compiled:
                    missing.append(self.variant(options))
                self.kernel[grid](*args, **options)

            return launch

    for name in ("step_kernel", "decide_kernel"):
        monkeypatch.setattr(module, name, Recorded(getattr(module, name)))
    run = tr.start(True, ((3, 3), (4, 4), (5,)), **options)
    for _ in range(8):
        tr.scaled_step(run) if scaled else run.steps(1)
    assert not missing and compiled
    assert messages and all("compiling the Triton kernels" in message for message in messages)


def test_memory_of_tables_is_not_reused_while_another_stream_reads_it(monkeypatch):
    """The allocator knows of every stream that has read a table, when the table is replaced."""
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: recorded.append((x, s)))
    engine = tr.engine_of(tr.start(tau=0.0).steps(2))
    engine._use_on(engine.stream)
    assert not recorded
    engine._use_on("another stream")
    pointers = {x.data_ptr() for x, stream in recorded if stream == "another stream"}
    tables = engine.tables
    used = (tables.program_table, tables.tensor_table, tables.members, tables.partials)
    for x in (*used, tables.step_inputs, engine.results, engine.sums, engine.zero, engine.one):
        assert x.data_ptr() in pointers
    assert engine.mirror.data_ptr() not in pointers


def test_the_tables_are_built_twice_a_run(monkeypatch):
    """At the first step, and once more before the first check, with the previous gradients."""
    engine, built = tr.module("triton_engine"), []
    tables = engine.DeviceTables
    monkeypatch.setattr(engine, "DeviceTables", lambda *args: built.append(1) or tables(*args))
    tr.start(stop_grad=False, tau=0.0, grace_steps=3).steps(8)
    assert len(built) == 2


def test_frozen_tensors_give_their_memory_back():
    """Moments and previous gradients: an engine stores addresses, and nothing the tensors."""
    run = tr.start(stop_grad=True).steps(2)
    state = run.opt.state[run.params[1]]
    stored = [weakref.ref(state[key]) for key in ("exp_avg", "exp_avg_sq", "prev_grad")]
    engine = tr.engine_of(run.steps(1))
    run.steps(2)
    assert tr.engine_of(run) is engine and run.opt.frozen_units == ["group0.param1"]
    gc.collect()
    assert [tensor() for tensor in stored] == [None] * 3


def test_the_default_device_of_torch_does_not_matter():
    """torch.set_default_device, while tables are laid out and steps are taken."""
    ours, theirs = tr.both()
    for run in (ours, theirs):
        run.steps(1)
        for _ in range(5):
            grads = tr.usual(run)
            with torch.device("meta"):
                run.step(*grads)
    tr.assert_same(ours, theirs)


def test_the_state_may_be_made_in_inference_mode():
    """torch counts no versions of such tensors."""
    ours, theirs = tr.both()
    for run in (ours, theirs):
        grads = tr.usual(run)
        for _ in range(4):
            with torch.inference_mode():
                run.step(*grads)
    tr.assert_same(ours, theirs)


class Device:
    """Stands in for the event of a step: who waits for it lets other threads run."""

    def __init__(self):
        self.is_awaited, self.stepped = threading.Event(), threading.Event()

    def record(self):
        pass

    def synchronize(self):
        if threading.current_thread() is not threading.main_thread():
            self.is_awaited.set()
            self.stepped.wait(0.1)


@pytest.mark.parametrize("timing", TIMINGS)
def test_a_step_waits_for_a_reading_of_another_thread(timing):
    """Otherwise both would read back the same step, and it would count twice."""
    options = {"statistic": "norm", "grace_steps": 0, "patience": 2, "freeze_timing": timing}
    read, plain = tr.start(**options).steps(1), tr.start(**options).steps(7)

    def statistics():
        read.opt.statistics()
        order.append("read")

    for _ in range(6):
        tr.engine_of(read).mirrored = device = Device()
        order, reader = [], threading.Thread(target=statistics)
        reader.start()
        assert device.is_awaited.wait(5.0)
        read.steps(1)
        order.append("step")
        device.stepped.set()
        reader.join()
        assert order == ["read", "step"]
    tr.assert_same_bits(read, plain)


def test_gradients_without_memory_of_their_own_are_copied():
    """The result of a collective that is under way, which any use of it waits for."""
    ours, theirs = tr.both()
    for run in (ours, theirs):
        for t in range(1, 7):
            grads = [run.gradient(t, i, p) for i, p in enumerate(run.params)]
            run.step(*map(AsyncCollectiveTensor, grads))
    tr.assert_same(ours, theirs)


def test_the_default_dtype_of_torch_does_not_matter():
    """Partial sums are fp32: those of an fp16 table would overflow, and nothing would freeze."""
    run = tr.start(tau=1e9)
    torch.set_default_dtype(torch.float16)
    try:
        for g in (1e3, 2e3, 4e3):
            run.step(*[g] * 3)
        statistics = run.opt.statistics()
    finally:
        torch.set_default_dtype(torch.float32)
    sizes = {unit.name: unit.n_elements for unit in run.opt._freezer.table.units}
    assert statistics == {name: pytest.approx(2e3 * n) for name, n in sizes.items()}


def test_a_parameter_that_is_transposed_in_place_is_read_in_its_new_order():
    """The address stays, the strides do not."""
    ours, theirs = tr.both([(8, 8), (4, 4)], tau=0.0)
    for run in (ours, theirs):
        run.steps(3)
        for p in run.params:
            p.data = p.data.t()
        run.steps(3)
    for p, q in zip(ours.params, theirs.params, strict=True):
        tr.assert_close(p, q, 1e-5, "a parameter")


@pytest.mark.skipif(tr.CUDA, reason="there, kernels are compiled in other places too")
@pytest.mark.parametrize("interrupted", ["warmup", "run"])
def test_training_goes_on_after_an_interrupted_step(interrupted, monkeypatch):
    """Ctrl-C while the kernels are compiled, or before they are launched, loses that step alone."""
    ours, theirs = tr.both(tau=None)
    kernel = tr.module("triton_engine").step_kernel
    with monkeypatch.context() as patch:
        patch.setattr(type(kernel), interrupted, raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ours.step(*tr.usual(ours))
    ours.t = 0
    for run in (ours, theirs):
        run.steps(4)
    for p, q in zip(ours.params, theirs.params, strict=True):
        tr.assert_close(p, q, 1e-5, "a parameter")
    assert [own["step"].item() for own in ours.opt.state.values()] == [4.0] * len(ours.params)


def raising(error):
    def call(*args, **options):
        raise error

    return call


@pytest.mark.parametrize("fused", [True, False, None])
def test_a_step_between_forward_and_backward_is_an_error(fused):
    """As with torch's AdamW: autograd sees that a tensor which it saved has been overwritten."""
    run = tr.start(fused, [(4, 4)], tau=None)
    (p,) = run.params
    p.grad = torch.ones_like(p)
    loss = p.square().sum()
    run.opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def grow(run):
    (p,) = run.params
    p.grad, p.data = None, torch.ones(16, 8, device=tr.DEVICE)
    p.grad = torch.ones_like(p)


def moment_of_another_dtype(run):
    own = run.opt.state[run.params[0]]
    own["exp_avg"] = own["exp_avg"].bfloat16()


def wide_moments(run):
    own = run.opt.state[run.params[0]]
    own.update({key: own[key].double() for key in tr.MOMENTS})


def wide_gradient(run):
    (p,) = run.params
    p.grad, p.grad_dtype = None, None
    p.grad = torch.ones_like(p, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow, r"exp_avgs\[0\] is .* with shape \(8, 8\).*shape and order, \(16, 8\)"),
        (moment_of_another_dtype, r"exp_avg_sqs\[0\] is torch.float32.*read torch.bfloat16"),
        (wide_moments, r"the exp_avg of tensor 0 is torch.float64.*Use fused=False"),
        (wide_gradient, r"the gradient of tensor 0 is torch.float64.*Use fused=False"),
    ],
)
def test_what_the_kernels_cannot_read_is_an_error(change, message):
    """They would take other bytes for it, behind the end of a tensor too."""
    run = tr.start(True, [(8, 8)], tau=None)
    run.steps(1)
    change(run)
    before = run.params[0].detach().clone()
    with pytest.raises(ValueError, match=message):
        run.opt.step()
    assert torch.equal(run.params[0], before)


# Checkpoints, copies, another backend ---------------------------------------------------------


def continued(source, fused, options):
    """A new run that goes on from `source` by way of a saved checkpoint."""
    torch.save(source.opt.state_dict(), file := io.BytesIO())
    file.seek(0)
    run = tr.start(fused, **options)
    for p, q in zip(run.params, source.params, strict=True):
        p.data.copy_(q)
    run.opt.load_state_dict(torch.load(file, weights_only=True))
    run.t = source.t
    return run


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("options", [{"patience": 2}, {"cooldown": 3}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["from triton", "to triton"])
def test_checkpoints_cross_backends(first, options, at):
    """The other backend goes on from a checkpoint, with hits half counted, as if it had run from
    the start."""
    source = tr.start(first, **options).steps(at)
    if at == 3 and "patience" in options:
        source.opt.state_dict()
        assert [source.opt.state[p]["grades_hits"] for p in source.params[:2]] == [0, 1]
    run = continued(source, not first, options).steps(9 - at)
    source.steps(9 - at)
    tr.assert_same(*((source, run) if first else (run, source)))
    assert len(run.events) == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("at", [2, 3, 5])
def test_copies_in_the_middle_of_a_run(at, how):
    """A copy has its own tables: both go on to the same bits, and neither changes the other."""
    run = tr.start(patience=2).steps(at)
    twin = copy.copy(run)
    parts = run.opt, run.params
    copied = pickle.loads(pickle.dumps(parts)) if how == "pickle" else copy.deepcopy(parts)
    twin.opt, twin.params = copied
    assert twin.opt.param_groups[0]["params"][0] is twin.params[0] is not run.params[0]
    before = snapshot(run.opt)
    twin.steps(9 - at)
    tr.assert_same_bits(run, before)
    run.steps(9 - at)
    tr.assert_same_bits(twin, run)
    assert len(run.events) == 2


def test_changing_the_backend_between_steps():
    """fused may be switched in the group: the run goes on as if nothing had happened."""
    run, plain = tr.both(patience=2)
    for t in range(1, 9):
        run.opt.param_groups[0]["fused"] = t % 3 != 0
        run.steps(1), plain.steps(1)
    run.opt.param_groups[0]["fused"] = True
    tr.assert_same(run, plain)


# Dispatch -------------------------------------------------------------------------------------


def p_of(*shape, **options):
    return nn.Parameter(torch.zeros(*shape, **{"device": tr.DEVICE, **options}))


REFUSED = {
    "no torch.float64": lambda: [p_of(2, 2), p_of(2, 2, dtype=torch.float64)],
    "no torch.complex64": lambda: [p_of(2, 2, dtype=torch.complex64)],
    "view with gaps": lambda: [nn.Parameter(p_of(4, 4).detach()[:, ::2])],
    "of its own, or a view": lambda: [nn.Parameter(p_of(4).detach().expand(3, 4))],  # overlaps
    "devices of several kinds": lambda: [p_of(2, 2), p_of(2, 2, device="meta")],
    "do not run on 'meta'": lambda: [p_of(2, 2, device="meta")],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_why_not_triton_names_the_reason(reason):
    """fused=True is an error then, which names a way out."""
    assert reason in why_not_triton(REFUSED[reason](), interpret=True)
    if "meta" in reason or "kinds" in reason:
        with pytest.raises(RuntimeError, match=r"fused=True is not possible.*fused=None.*=False"):
            GradESAdamW(REFUSED[reason](), fused=True).step()  # known once it is no meta tensor
    for fused in (None, False):
        assert GradESAdamW(REFUSED[reason](), fused=fused).backend != "triton"


def test_a_unit_on_two_devices_is_refused():
    units = [[p_of(2, 3), p_of(3, 2, device="meta")]]
    reason = why_not_triton([p_of(2, 2)], interpret=True, units=units)
    assert reason == "the tensors of one unit are on several devices"


def test_the_interpreter_has_to_be_asked_for(monkeypatch):
    """By fused=True and by a variable that the reason names."""
    p = nn.Parameter(torch.zeros(2, 2))
    assert "TRITON_INTERPRET=1" in why_not_triton([p], interpret=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in why_not_triton([p], interpret=True)


@pytest.mark.parametrize("package", ["triton", "numpy"])
def test_without_a_package_another_backend_serves(package, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find_spec(name)
    )
    assert why_not_triton([p_of(2, 2)], interpret=True) == f"{package} is not installed"
    assert GradESAdamW([p_of(2, 2)]).backend != "triton"


def test_backend_names_what_runs():
    """fused=None is Triton on a CUDA device and never the interpreter."""
    monitored = {"fused": True, "tau": 1.0, "grace_steps": 0}
    for expected, options in (
        ("triton", {"fused": True}),
        ("triton", {"capturable": True, **monitored}),
        ("reference", {"capturable": True, "fused": True}),
        ("reference", {"foreach": True}),
        ("reference", {"differentiable": True}),
    ):
        assert GradESAdamW([p_of(2, 2)], **options).backend == expected
    assert (GradESAdamW([p_of(2, 2)]).backend == "triton") == tr.CUDA
    optimizer = GradESAdamW([p_of(2, 2)], **monitored)
    optimizer.param_groups[0]["fused"] = False
    assert optimizer.backend == "reference" == optimizer.report().backend


@pytest.mark.skipif(tr.CUDA, reason="CUDA tensors may be captured")
@pytest.mark.parametrize("tau", [50.0, None])
def test_capturable_on_the_cpu_is_refused_as_torch_refuses_it(tau):
    """An AssertionError that names the devices, before anything has changed."""
    run = tr.start(capturable=True, tau=tau)
    before = snapshot(run.opt)
    with pytest.raises(AssertionError, match="capturable=True"):
        run.steps(1)
    tr.assert_same_bits(run, before)
