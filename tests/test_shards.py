"""DTensors on the fused backends: a step works on the local shards, and no DTensor operation runs.

Uneven, empty and doubly cut shards, partial and replicated gradients: the result is that of one
process with plain tensors, bit for bit where torch's AdamW has it, and the decisions are the same.
"""

import itertools
import math
import os

import pytest
import ranks
import torch
import torch.distributed as dist
from test_distributed import (
    ADAMW,
    CHANGE,
    KINDS,
    OWN,
    Net,
    assert_decides_as,
    backward,
    dividing_tau,
    optimizer_of,
    parallel,
    same_on_all,
    train,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grades_kernels import GradESAdamW, distributed, grades_adamw
from grades_kernels.backends import native
from grades_kernels.freezing.statistics import STATISTICS

pytestmark = pytest.mark.skipif(
    native.why_not_loaded() is not None, reason="the native op is not built"
)

SHARDED = [(size, kind) for size, kind in KINDS if kind not in ("ddp", "zero")]
NATIVE = {"fused": None, "foreach": None}
NEXT = {"grace_steps": 0, "freeze_timing": "next_step", "tau": 0.0}


# A job and one process


def native_run(kind, seed, own):
    """A run on the native op, though fused=True prefers the interpreter where it is allowed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        backends = set()
        run = train(kind, seed, own, disturb=lambda _, net, opt: backends.add(opt.backend))
    assert backends == {"native"}
    return run


@pytest.mark.parametrize(("size", "kind"), SHARDED)
@pytest.mark.parametrize("name", OWN)
def test_shards_on_the_native_op_decide_as_one_process(name, size, kind):
    own = {**OWN[name], "grace_steps": 3, "stop_grad": False}
    own["tau"] = dividing_tau(3, own)
    runs = [
        ranks.run(size, native_run, kind, 3, {**own, "fused": fused, "foreach": None})
        for fused in (None, True)
    ]
    alone = native_run("alone", 3, {**own, **NATIVE})
    assert_decides_as(alone, runs[0])
    assert repr(runs[0]) == repr(runs[1])
    expected = native_run("alone", 3, NATIVE)
    plain = ranks.run(size, native_run, kind, 3, NATIVE)[0]
    room = 4 * distance(plain, expected) + 1e-6
    assert distance(runs[0][0], alone) <= room


def distance(a, b):
    pairs = zip(a["values"], b["values"], strict=True)
    return max((torch.tensor(x) - torch.tensor(y)).abs().max().item() for x, y in pairs)


# The arithmetic of a step


WAYS = [
    (Replicate(), Replicate()),
    (Replicate(), Shard(0)),
    (Shard(0), Replicate()),
    (Shard(0), Shard(1)),
    (Shard(0), Shard(0)),
    (Shard(1), Shard(1)),
]
SHAPES = [(5, 3), (1, 3), (3, 1), (4, 4, 3), (7,)]


def cut(x, mesh, way):
    return distribute_tensor(x.clone(), mesh, way, src_data_rank=None)


def tensors_of(dtype):
    """Every way to place tensors of every shape on a 2-D mesh, and the same whole."""
    mesh = init_device_mesh("cpu", (2, 2))
    cases = [
        (shape, way)
        for shape, way in itertools.product(SHAPES, WAYS)
        if all(not x.is_shard() or x.dim < len(shape) for x in way)
    ]
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape, _ in cases]
    params = [
        nn.Parameter(cut(q.detach(), mesh, way)) for q, (_, way) in zip(plain, cases, strict=True)
    ]
    return mesh, plain, params


def set_gradients(mesh, plain, params, step, dtype):
    """New gradients; of the sharded tensors some are not summed up yet, and some are whole."""
    torch.manual_seed(step)
    for k, (p, q) in enumerate(zip(params, plain, strict=True)):
        p.grad_dtype = q.grad_dtype = dtype
        q.grad = torch.randn(q.shape, dtype=dtype)
        way = p.placements
        if k % 3 == 0:
            p.grad = DTensor.from_local(q.grad / 4, mesh, (Partial(), Partial()))
            continue
        p.grad = cut(q.grad, mesh, (Replicate(), Replicate()) if k % 3 == 1 else way)


def against(make, dtype, grad_dtype):
    """The largest difference after three steps, in units of the last place of each value."""
    mesh, plain, params = tensors_of(dtype)
    optimizer = GradESAdamW(params, **ADAMW, **{**NATIVE, **make[0]})
    other = make[1](plain)
    worst = 0.0
    for step in range(3):
        set_gradients(mesh, plain, params, step, grad_dtype)
        optimizer.step()
        other.step()
    for p, q in zip(params, plain, strict=True):
        pairs = [(p, q)] + [
            (optimizer.state[p][key], other.state[q][key]) for key in ("exp_avg", "exp_avg_sq")
        ]
        for a, b in pairs:
            assert a.placements == p.placements
            a, b = whole(a).double(), b.detach().double()
            ulp = torch.finfo(dtype).eps * b.abs().max()
            worst = max(worst, ((a - b).abs().max() / ulp).item())
    return optimizer.backend, worst


def reference_and_adamw(dtype):
    return against(
        ({"fused": False}, lambda q: torch.optim.AdamW(q, **ADAMW, foreach=False)), dtype, dtype
    )


def native_and_plain(dtype, grad_dtype):
    return against(({}, lambda q: GradESAdamW(q, **ADAMW, fused=None)), dtype, grad_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_has_the_bits_of_adamw(dtype):
    """Quarters are exact, so a sum of four of them has the bits of the whole."""
    assert ranks.run(4, reference_and_adamw, dtype) == [("reference", 0.0)] * 4


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_op_has_the_bits_of_whole_tensors(grad_dtype):
    """fp32 parameters, also with gradients of bf16."""
    answers = ranks.run(4, native_and_plain, torch.float32, grad_dtype)
    assert answers == [("native", 0.0)] * 4


def on_adamw():
    """What torch's own AdamW does with the same DTensors, and the functional form."""
    mesh, plain, params = tensors_of(torch.float32)
    ours, theirs = params, [nn.Parameter(p.detach().clone()) for p in params]
    columns = [[torch.zeros_like(p) for p in ours] for _ in range(2)]
    steps = [torch.zeros(()) for _ in ours]
    adamw = torch.optim.AdamW(theirs, **ADAMW, foreach=False)
    for step in range(2):
        set_gradients(mesh, plain, ours, step, torch.float32)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.redistribute(placements=p.placements)
        adamw.step()
        options = {"lr": ADAMW["lr"], "weight_decay": ADAMW["weight_decay"], "eps": 1e-8}
        options |= dict(zip(("beta1", "beta2"), ADAMW["betas"], strict=True))
        with torch.no_grad():
            grads = [p.grad for p in ours]
            grades_adamw(ours, grads, *columns, [], steps, fused=False, amsgrad=False,
                         maximize=False, **options)  # fmt: skip
    return all(torch.equal(whole(p), whole(q)) for p, q in zip(ours, theirs, strict=True))


def test_the_functional_form_takes_dtensors():
    assert ranks.run(4, on_adamw) == [True] * 4


def measured(statistic):
    mesh, plain, params = tensors_of(torch.float32)
    own = {**NATIVE, **NEXT, "statistic": statistic}
    optimizer = GradESAdamW(params[:24], **own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grades_kernels.freezer.in_a_job", lambda *_: False)
        alone = GradESAdamW(plain[:24], **own)
        for step in range(3):
            set_gradients(mesh, plain, params, step, torch.float32)
            alone.step()
    for step in range(3):
        set_gradients(mesh, plain, params, step, torch.float32)
        optimizer.step()
    return list(optimizer.statistics().values()), list(alone.statistics().values())


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_of_shards_are_those_of_the_whole(statistic):
    answers = ranks.run(4, measured, statistic)
    assert same_on_all(answers)
    got, expected = answers[0]
    assert len(got) == 24 and not any(map(math.isnan, expected))
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-7)


# What a step does besides


def counted(patch, owner, name):
    """A list that grows by one with every call of `owner.name`."""
    calls, real = [], getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


class Recorded(TorchDispatchMode):
    """The operations on DTensors while it is active."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations(make, own):
    """The operations of a step on DTensors, and what it sends to other ranks."""
    net = Net(1)
    model, mine = parallel("fsdp2", net)
    optimizer = make(net.parameters(), **own)
    for _ in backward(model, optimizer, 1, mine, last=4):
        with pytest.MonkeyPatch.context() as patch, Recorded() as recorded:
            sent = counted(patch, distributed.dist, "all_reduce")
            optimizer.step()
    return len(recorded.names), len(sent)


def no_dtensor_operations():
    own = {**ADAMW, **NATIVE, "tau": 0.0, "grace_steps": 0}
    return [
        operations(GradESAdamW, {**ADAMW, **NATIVE}),
        *(operations(GradESAdamW, {**own, "statistic": name}) for name in ("change", "momentum")),
        operations(GradESAdamW, {**own, "fused": False, "statistic": "norm"}),
        operations(torch.optim.AdamW, {**ADAMW, "fused": True}),
    ]


def test_a_step_runs_no_operation_on_dtensors():
    """Two all-reduces at a check, over the shards and over the ranks; torch's AdamW as control."""
    for *ours, theirs in ranks.run(2, no_dtensor_operations):
        assert ours == [(0, 0), (0, 2), (0, 2), (0, 2)]
        assert theirs[0] > 0


def redistributions(timing):
    mesh, plain, params = tensors_of(torch.float32)
    own = {**NATIVE, **NEXT, "freeze_timing": timing, "statistic": "norm"}
    optimizer, counts = GradESAdamW(params, **own), []
    for step in range(3):
        set_gradients(mesh, plain, params, step, torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            calls = counted(patch, DTensor, "redistribute")
            optimizer.step()
        counts.append(len(calls))
    misplaced = [p for p in params if p.grad.placements != p.placements]
    return counts, len(misplaced), len(params)


@pytest.mark.parametrize("timing", ["same_step", "next_step"])
def test_gradients_are_redistributed_once_and_only_where_they_differ(timing):
    """Also in the step whose engine is made, and where a check reads them twice."""
    for counts, n_misplaced, n in ranks.run(4, redistributions, timing):
        assert counts == [n_misplaced] * 3
        assert 0 < n_misplaced < n


def overwritten(fused):
    """Whether autograd notices that a DTensor which it has saved was overwritten by a step."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(cut(torch.ones(4, 4), mesh, [Shard(0)]))
    p.grad = cut(torch.ones(4, 4), mesh, [Shard(0)])
    loss = (p * p).sum()
    GradESAdamW([p], fused=fused).step()
    try:
        loss.backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


@pytest.mark.parametrize("fused", [None, False])
def test_autograd_notices_the_update_of_a_dtensor(fused):
    assert ranks.run(2, overwritten, fused) == [True, True]


def policies(name):
    """FSDP2 with a policy: events and weights of the native op and of the reference."""
    runs = []
    for fused in (None, False):
        net = Net(3)
        mesh = init_device_mesh("cpu", (2,))
        policy = {
            "bf16": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)},
            "bf16, fp32": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
            "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        }[name]
        fully_shard(net, mesh=mesh, **policy)
        optimizer = optimizer_of(net, {**CHANGE, "tau": 4.0, "fused": fused, "foreach": None})
        for _ in backward(net, optimizer, 3, slice(dist.get_rank(), None, 2)):
            optimizer.step()
        runs.append(
            (optimizer.backend, optimizer.freeze_events, [whole(p) for p in net.parameters()])
        )
    (backend, events, ours), (_, expected, theirs) = runs
    steps = [[(e.step, e.unit) for e in x] for x in (events, expected)]
    close = all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, theirs, strict=True)
    )
    return backend, steps[0] == steps[1], bool(events), close


@pytest.mark.parametrize("name", ["bf16", "bf16, fp32", "offload"])
def test_policies_of_fsdp2(name):
    assert ranks.run(2, policies, name) == [("native", True, True, True)] * 2


def errors():
    """What cannot be: a plain gradient of a DTensor, and plain state of one."""
    mesh = init_device_mesh("cpu", (2,))
    texts = []
    for spoil in ("gradient", "state"):
        p = nn.Parameter(cut(torch.ones(4, 4), mesh, [Shard(0)]))
        optimizer = GradESAdamW([p], tau=0.0, grace_steps=0)
        p.grad = cut(torch.ones(4, 4), mesh, [Shard(0)])
        optimizer.step()
        if spoil == "gradient":
            with torch.no_grad():
                p.grad = torch.ones(4, 4)
        else:
            optimizer.state[p]["exp_avg"] = torch.ones(4, 4)
        try:
            optimizer.step()
        except (RuntimeError, ValueError) as error:
            texts.append(str(error))
    return texts


def test_plain_gradients_and_state_of_dtensors_are_errors():
    for texts in ranks.run(2, errors):
        assert "is a Tensor, the parameter a DTensor" in texts[0]
        assert "exp_avg is a torch.Tensor" in texts[1]


def moved_moments():
    """Moments that another job has placed otherwise, as a checkpoint of one's own might."""
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for other in (False, True):
        torch.manual_seed(0)
        whole_grads = [torch.randn(4, 4) for _ in range(4)]
        p = nn.Parameter(cut(torch.ones(4, 4), mesh, [Shard(0)]))
        optimizer = GradESAdamW([p], fused=None)
        for step, grad in enumerate(whole_grads):
            p.grad = cut(grad, mesh, [Shard(0)])
            if other and step == 2:
                own = optimizer.state[p]
                own["exp_avg"] = own["exp_avg"].redistribute(placements=[Shard(1)])
                own["exp_avg_sq"] = own["exp_avg_sq"].redistribute(placements=[Replicate()])
            optimizer.step()
        results.append(whole(p))
    return torch.equal(*results)


def test_moments_that_are_placed_otherwise_are_brought_back():
    """Shards of other elements may have the same shape, as here."""
    assert ranks.run(2, moved_moments) == [True, True]


# Random runs

RUNS = int(os.environ.get("GRADES_DISTRIBUTED_RUNS", "6"))


def random_shards(size, seed):
    """A random set-up: the kind of job, its options, and whether fused is None or True."""
    generator = torch.Generator().manual_seed(seed)

    def choice(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    kinds = [kind for n, kind in SHARDED if n == size]
    own = {
        "statistic": choice(*[name for name in STATISTICS if name != "gain"]),
        "tau_per": choice("unit", "element"),
        "patience": choice(1, 1, 2),
        "check_every": choice(1, 1, 2),
        "cooldown": choice(0, 0, 2),
        "max_frozen": choice(1.0, 1.0, 0.5),
        "freeze_timing": choice("same_step", "next_step"),
        "grace_steps": choice(1, 2, 3),
        "stop_grad": choice("auto", False),
        "maximize": False,
        "amsgrad": choice(False, True),
    }
    if own["statistic"] == "weight_change":
        own["freeze_timing"] = "next_step"
    own["tau"] = dividing_tau(seed, own)
    return choice(*kinds), {**own, "fused": choice(None, True), "foreach": None}


@pytest.mark.parametrize("size", [2, 4])
def test_random_runs_decide_as_one_process(size):
    """Same events at the same steps, and the statistics of one process."""
    n_events = 0
    for seed in range(RUNS):
        kind, own = random_shards(size, seed)
        alone = native_run("alone", seed, own)
        results = ranks.run(size, native_run, kind, seed, own)
        assert same_on_all(results), (seed, kind, own)
        mine, theirs = (
            {e.unit: (e.decided_at, e.step, e.n_elements) for e in run["events"]}
            for run in (results[0], alone)
        )
        assert mine == theirs, (seed, kind, own)
        assert distance(results[0], alone) <= 1e-4, (seed, kind, own)
        n_events += len(mine)
    assert n_events >= RUNS


def without_sum(own):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed.Ranks, "sum_shards", lambda self, rows: rows)
        return native_run("fsdp2", 3, own)


def test_without_the_sum_over_shards_the_native_op_decides_otherwise():
    """Negative control: each rank would compare its part of a matrix with tau."""
    own = {"statistic": "norm", "grace_steps": 3, "stop_grad": False, **NATIVE}
    own["tau"] = dividing_tau(3, own)
    right, wrong = (native_run("alone", 3, own), ranks.run(2, without_sum, own)[0])
    assert right["events"] != wrong["events"]
