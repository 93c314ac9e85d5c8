"""DTensors: a step works on the local shards, and no DTensor operation runs.

Uneven, empty and doubly cut shards, partial and replicated gradients: the result is that of one
process with plain tensors, bit for bit where torch's AdamW has it, and the decisions are the same.
"""

import contextlib
import datetime
import functools
import itertools
import math
import os
import time

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
    assert_same_here,
    backward,
    chooser,
    decisions,
    distance,
    dividing_tau,
    optimizer_of,
    parallel,
    random_options,
    same_on_all,
    train,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grades_kernels import GradESAdamW, distributed, freezer, grades_adamw, rank_errors
from grades_kernels.backends import native
from grades_kernels.freezing.table import STATISTICS
from grades_kernels.integrations import is_finished

pytestmark = pytest.mark.skipif(
    native.why_not_loaded() is not None, reason="the native op is not built"
)

SHARDED = [(size, kind) for size, kind in KINDS if kind not in ("ddp", "zero")]
# Four processes in Triton's interpreter take minutes on two cores.
MANY = "GRADES_DISTRIBUTED_RUNS" in os.environ
NAMES = itertools.cycle(OWN)  # four processes are slow on two cores, so each kind has one case
NEXT = {"grace_steps": 0, "freeze_timing": "next_step", "tau": 0.0}
# Imported while TRITON_INTERPRET is set (conftest.py), which is when the interpreter is chosen.
triton_kernels = pytest.importorskip("grades_kernels.backends.triton_kernels", exc_type=ImportError)
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not in use")
BACKENDS = ["native", pytest.param("triton", marks=on_cpu)]


@contextlib.contextmanager
def only(backend):
    """Options for this backend: fused=True is Triton where its interpreter is allowed."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "native":
            patch.delenv("TRITON_INTERPRET", raising=False)
        else:
            patch.setenv("TRITON_INTERPRET", "1")
        yield {"fused": backend != "reference", "foreach": None}


# A job and one process


def run_on(backend, kind, seed, own):
    """A run on one backend, with `fused=True` unless `own` says otherwise."""
    found = set()
    with only(backend) as options:
        watch = lambda step, net, optimizer: found.add(optimizer.backend)  # noqa: E731
        run = train(kind, seed, {**options, **own}, disturb=watch)
    assert found == {backend}
    return run


@pytest.mark.parametrize(
    ("size", "kind", "name", "backend"),
    [
        pytest.param(size, kind, name, "native", id=f"{size}-{kind}-{name}-native")
        for size, kind in SHARDED
        for name in (OWN if size == 2 else [next(NAMES)])
    ]
    + [
        pytest.param(size, kind, name, "triton", id=f"{size}-{kind}-{name}-triton", marks=on_cpu)
        for (size, kind), name in zip(SHARDED, NAMES, strict=False)
        if size == 2 or (MANY and kind in ("hsdp", "fsdp2+tp"))
    ],
)
def test_shards_decide_as_one_process(name, size, kind, backend):
    own = {**OWN[name], "grace_steps": 3, "stop_grad": False}
    own["tau"] = dividing_tau(3, own)
    alone, results = (
        run_on(backend, "alone", 3, own),
        ranks.run(size, run_on, backend, kind, 3, own),
    )
    assert_decides_as(alone, results)
    assert distance(results[0], alone) <= 4 * distance_of_plain_runs(size, kind) + 1e-6


@functools.cache
def distance_of_plain_runs(size, kind):
    plain = ranks.run(size, run_on, "native", kind, 3, {})[0]
    return distance(plain, run_on("native", "alone", 3, {}))


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


def tensors_of(dtype, backend):
    """Every way to place tensors of every shape on a 2-D mesh, and the same whole."""
    shapes = SHAPES[::2] if backend == "triton" else SHAPES  # the interpreter is slow
    mesh = init_device_mesh("cpu", (2, 2))
    cases = [
        (shape, way)
        for shape, way in itertools.product(shapes, WAYS)
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


def against(backend, adamw, dtype, grad_dtype):
    """The largest difference after three steps, in units of the last place of each value.

    From AdamW with `adamw`, else from the same backend with plain tensors.
    """
    mesh, plain, params = tensors_of(dtype, backend)
    worst = 0.0
    with only(backend) as options:
        optimizer = GradESAdamW(params, **ADAMW, **options)
        other = GradESAdamW(plain, **ADAMW, **options)
        if adamw:
            other = torch.optim.AdamW(plain, **ADAMW, foreach=False)
        for step in range(3):
            set_gradients(mesh, plain, params, step, grad_dtype)
            optimizer.step()
            other.step()
        assert optimizer.backend == backend
    for p, q in zip(params, plain, strict=True):
        ours, theirs = optimizer.state[p], other.state[q]
        pairs = [(p, q)] + [(ours[key], theirs[key]) for key in ("exp_avg", "exp_avg_sq")]
        for a, b in pairs:
            assert a.placements == p.placements
            a, b = whole(a).double(), b.detach().double()
            ulp = torch.finfo(dtype).eps * b.abs().max()
            worst = max(worst, ((a - b).abs().max() / ulp).item())
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_has_the_bits_of_adamw(dtype):
    """Quarters are exact, so a sum of four of them has the bits of the whole."""
    assert ranks.run(4, against, "reference", True, dtype, dtype) == [0.0] * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_have_the_bits_of_whole_tensors(grad_dtype, backend):
    """fp32 parameters, also with gradients of bf16."""
    assert ranks.run(4, against, backend, False, torch.float32, grad_dtype) == [0.0] * 4


@ranks.on_ranks(4, [True] * 4)
def test_the_functional_form_takes_dtensors():
    """It does the same as torch's own AdamW with the same DTensors."""
    mesh, plain, params = tensors_of(torch.float32, "reference")
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


@pytest.mark.parametrize(
    ("statistic", "backend"),
    [(statistic, backend) for statistic in STATISTICS for backend in ("reference", "native")]
    + [(statistic, "triton") for statistic in ("change", "signal")],  # slow in the interpreter
)
@ranks.on_ranks(4)
def test_statistics_of_shards_are_those_of_the_whole(statistic, backend):
    """Uneven and empty shards among them; a part of a tensor without evidence has none."""
    mesh, plain, params = tensors_of(torch.float32, backend)
    with only(backend) as options, pytest.MonkeyPatch.context() as patch:
        own = {**options, **NEXT, "statistic": statistic}
        n = sum(p.dim() > 1 for p in plain)  # vectors come last
        optimizers = GradESAdamW(params[:n], **own), GradESAdamW(plain[:n], **own)
        for optimizer in optimizers:
            if optimizer is optimizers[1]:
                patch.setattr(freezer, "in_a_job", lambda *_: False)
            for step in range(3):
                set_gradients(mesh, plain, params, step, torch.float32)
                optimizer.step()
            assert optimizer.backend == backend
        got, expected = (list(optimizer.statistics().values()) for optimizer in optimizers)
    assert_same_here([got, expected])
    assert len(got) == (12 if backend == "triton" else 24) and not any(map(math.isnan, expected))
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-7)


# Other effects of a step


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
    """The operations of a step on DTensors, and the messages to other ranks."""
    net = Net(1)
    model, mine = parallel("fsdp2", net)
    optimizer = make(net.parameters(), **own)
    for _ in backward(model, optimizer, 1, mine, last=4):
        with pytest.MonkeyPatch.context() as patch, Recorded() as recorded:
            sent = counted(patch, distributed.dist, "all_reduce")
            optimizer.step()
    return len(recorded.names), len(sent)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@ranks.on_ranks(2)
def test_a_step_runs_no_operation_on_dtensors(backend):
    """One all-reduce at a check, two on a device; torch's AdamW as control."""
    with only(backend) as options:
        own = {**ADAMW, **options}
        assert operations(GradESAdamW, own) == (0, 0)
        for statistic in ("change", "momentum"):
            checked = {**own, "tau": 0.0, "grace_steps": 0, "statistic": statistic}
            assert operations(GradESAdamW, checked) == (0, 2 if backend == "triton" else 1)
    assert operations(torch.optim.AdamW, {**ADAMW, "fused": True})[0] > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("timing", ["same_step", "next_step"])
@ranks.on_ranks(4)
def test_gradients_are_redistributed_once_and_only_where_they_differ(timing, backend):
    """Also in the step whose engine is made, and where a check reads them twice."""
    mesh, plain, params = tensors_of(torch.float32, backend)
    counts = []
    with only(backend) as options:
        own = {**options, **NEXT, "freeze_timing": timing, "statistic": "norm"}
        optimizer = GradESAdamW(params, **own)
        for step in range(3):
            set_gradients(mesh, plain, params, step, torch.float32)
            with pytest.MonkeyPatch.context() as patch:
                calls = counted(patch, DTensor, "redistribute")
                optimizer.step()
            counts.append(len(calls))
    misplaced = [p for p in params if p.grad.placements != p.placements]
    assert counts == [len(misplaced)] * 3
    assert 0 < len(misplaced) < len(params)


@pytest.mark.parametrize("fused", [None, False])
@ranks.on_ranks(2, [True] * 2)
def test_autograd_notices_the_update_of_a_dtensor(fused):
    """Which it had saved before the step."""
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["bf16", "bf16, fp32", "offload"])
@ranks.on_ranks(2, [(True, True, True)] * 2)
def test_policies_of_fsdp2(backend, name):
    """Events and weights of a fused backend are those of the reference."""
    runs = []
    policy = {
        "bf16": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)},
        "bf16, fp32": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }[name]
    for chosen in (backend, "reference"):
        net = Net(3)
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)), **policy)
        with only(chosen) as options:
            optimizer = optimizer_of(net, {**CHANGE, **options, "tau": 4.0})
            for _ in backward(net, optimizer, 3, slice(dist.get_rank(), None, 2), last=9):
                optimizer.step()
            assert optimizer.backend == chosen and optimizer.all_frozen
        events = [(e.step, e.unit) for e in optimizer.freeze_events]
        runs.append((events, [whole(p) for p in net.parameters()]))
    (events, ours), (expected, theirs) = runs
    pairs = zip(ours, theirs, strict=True)
    close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
    return events == expected, bool(events), close


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("gradient", "is a Tensor, the parameter a DTensor"),
        ("state", r"exp_avg is a torch\.Tensor"),
    ],
)
@ranks.on_ranks(2)
def test_plain_gradients_and_state_of_dtensors_are_errors(spoil, message):
    p, optimizer = sharded_over(init_device_mesh("cpu", (2,)), 0.0)
    if spoil == "gradient":
        with torch.no_grad():
            p.grad = torch.ones(4, 4)
    else:
        optimizer.state[p]["exp_avg"] = torch.ones(4, 4)
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@ranks.on_ranks(2, [True] * 2)
def test_moments_that_are_placed_otherwise_are_brought_back(backend):
    """As a checkpoint of one's own might have them; shards of other elements may have one shape."""
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for other in (False, True):
        torch.manual_seed(0)
        whole_grads = [torch.randn(4, 4) for _ in range(4)]
        p = nn.Parameter(cut(torch.ones(4, 4), mesh, [Shard(0)]))
        with only(backend) as options:
            optimizer = GradESAdamW([p], **options)
            for step, grad in enumerate(whole_grads):
                p.grad = cut(grad, mesh, [Shard(0)])
                if other and step == 2:
                    own = optimizer.state[p]
                    own["exp_avg"] = own["exp_avg"].redistribute(placements=[Shard(1)])
                    own["exp_avg_sq"] = own["exp_avg_sq"].redistribute(placements=[Replicate()])
                optimizer.step()
        results.append(whole(p))
    return torch.equal(*results)


# Random runs

RUNS = int(os.environ.get("GRADES_DISTRIBUTED_RUNS", "3"))


def random_shards(size, seed):
    """A random set-up: the kind of job, its options, and whether fused is None or True."""
    choice = chooser(seed)
    kinds = [kind for n, kind in SHARDED if n == size]
    own = {
        **random_options(choice, (1, 2, 3)),
        "stop_grad": choice("auto", False),
        "maximize": False,
        "amsgrad": choice(False, True),
    }
    own["tau"] = dividing_tau(seed, own)
    return choice(*kinds), {**own, "fused": choice(None, True), "foreach": None}


@pytest.mark.parametrize(
    ("size", "backend"),
    [(2, "native"), (4, "native"), pytest.param(2, "triton", marks=on_cpu)]
    + [pytest.param(4, "triton", marks=on_cpu)] * MANY,
)
def test_random_runs_decide_as_one_process(size, backend):
    """Same events at the same steps, and weights as near as those of another summation order."""
    n_events = 0
    for seed in range(RUNS if backend == "native" else RUNS // 3):
        kind, own = random_shards(size, seed)
        if backend == "triton":
            own["fused"] = True
        alone = run_on(backend, "alone", seed, own)
        results = ranks.run(size, run_on, backend, kind, seed, own)
        assert same_on_all(results), (seed, kind, own)
        assert decisions(results[0]) == decisions(alone), (seed, kind, own)
        assert distance(results[0], alone) <= 1e-4, (seed, kind, own)
        n_events += len(alone["events"])
    assert n_events >= RUNS // 3


def without_sum(backend, own):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            distributed.Ranks, "start_sum", lambda self, table, sums, shards: lambda: sums
        )
        patch.setattr(distributed.Ranks, "add_shards", lambda self, sums, shards: None)
        return run_on(backend, "fsdp2", 3, own)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_the_sum_over_shards_other_units_freeze(backend):
    """Negative control: each rank would compare its part of a matrix with tau."""
    own = {"statistic": "norm", "grace_steps": 3, "stop_grad": False}
    own["tau"] = dividing_tau(3, own)
    right, wrong = run_on(backend, "alone", 3, own), ranks.run(2, without_sum, backend, own)[0]
    assert right["events"]
    assert decisions(right) != decisions(wrong)


# Waiting for other ranks


def sharded_over(mesh, tau, **own):
    """An optimizer of one matrix with a gradient, sharded over a mesh, after its first step."""
    p = nn.Parameter(cut(torch.ones(4, 4), mesh, [Shard(0)]))
    p.grad = cut(torch.ones(4, 4), mesh, [Shard(0)])
    own = {**NEXT, "grace_steps": 1, "statistic": "norm", "tau": tau, **own}
    optimizer = GradESAdamW([p], **own)
    optimizer.step()
    return p, optimizer


def one_rank_first(timing, store):
    """Whether the step of rank 0 ends before that of rank 1 begins; the calls of a freeze hook."""
    p, optimizer = sharded_over(init_device_mesh("cpu", (2,)), 1e9, freeze_timing=timing)
    hooked = []
    optimizer.register_freeze_hook(lambda _, events: hooked.append([x.step for x in events]))
    key, is_first = f"{timing}/done", True
    if dist.get_rank() == 1:
        with contextlib.suppress(RuntimeError):  # not within a second
            store.wait([key], datetime.timedelta(seconds=1))
        is_first = store.check([key])
    optimizer.step()
    store.set(key, "")
    dist.barrier()
    after_step, weight = list(hooked), p.to_local().clone()
    optimizer.step()
    return is_first, after_step, hooked, torch.equal(p.to_local(), weight)


@ranks.on_ranks(2)
def test_next_step_waits_for_other_ranks_at_the_start_of_the_next_step():
    """The hook is called then; "same_step", the control, waits before its update."""
    store = dist.group.WORLD.get_group_store()
    assert one_rank_first("next_step", store) == (True, [], [[2]], True)
    is_first = dist.get_rank() == 0
    assert one_rank_first("same_step", store) == (is_first, [[2]], [[2]], True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("timing", ["same_step", "next_step"])
@ranks.on_ranks(2, [[3]] * 2)
def test_a_check_is_void_on_all_ranks_where_one_has_no_gradient(timing, backend):
    """The steps of the decisions where rank 1 has no gradient in step 2, the first check."""
    with only(backend) as options:
        own = {"freeze_timing": timing, **options}
        p, optimizer = sharded_over(init_device_mesh("cpu", (2,)), 1e9, **own)
        grad = p.grad
        for missing in (True, False):
            p.grad = None if missing and dist.get_rank() == 1 else grad
            optimizer.step()
    return [event.decided_at for event in optimizer.freeze_events]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("timing", ["same_step", "next_step"])
@ranks.on_ranks(2)
def test_a_run_goes_on_while_nothing_is_monitored(timing, backend):
    with only(backend) as options:
        own = {"freeze_timing": timing, **options}
        _, optimizer = sharded_over(init_device_mesh("cpu", (2,)), 0.0, **own)
        frozen = []
        for tau in (0.0, None, 1e9):
            optimizer.param_groups[0]["tau"] = tau
            optimizer.step()
            optimizer.step()
            frozen.append(len(optimizer.frozen_units))
    assert frozen == [0, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@ranks.on_ranks(2)
def test_is_finished_is_the_same_on_a_rank_that_reads_and_on_one_that_does_not(backend):
    """All stop after the same step, and none waits to know it."""
    with only(backend) as options:
        _, optimizer = sharded_over(init_device_mesh("cpu", (2,)), 1e9, **options)
        seen = []
        for _ in range(3):
            optimizer.step()
            assert dist.get_rank() == 1 or len(optimizer.freeze_events) == 1
            assert optimizer.all_frozen == (dist.get_rank() == 0 or bool(seen))
            seen.append(is_finished(optimizer))
    assert seen == [False, True, True]


@ranks.on_ranks(2)
def test_a_rank_that_is_waited_for_in_vain_is_named():
    """Rank 0 reads a check of which rank 1 has no part."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    dist.barrier()
    # DTensor's caches would put another mesh in place of this one if it had no name of its own.
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("missing",))
    _, optimizer = sharded_over(mesh, 0.0)
    optimizer.step()
    if dist.get_rank() == 1:
        return
    message = "step 3 of the optimizer failed on rank 0: rank 1 did not take part"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_errors, "REPORTED_WITHIN", datetime.timedelta(seconds=0.1))
        optimizer.step()
        with pytest.raises(RuntimeError, match=message):
            optimizer.report()


def ending(rank, folder, pipe):
    """A rank that ends after its last step, before the other has taken that step."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    _, optimizer = sharded_over(init_device_mesh("cpu", (2,)), 1e9)
    if rank == 0:
        store.wait(["rank 1 has taken its last step"], datetime.timedelta(seconds=30))
        time.sleep(0.5)  # so that it can end
    optimizer.step()
    if rank == 1:
        store.set("rank 1 has taken its last step", "")
    else:
        pipe.send([event.decided_at for event in optimizer.freeze_events])


def test_a_rank_that_ends_early_takes_part_in_the_last_check(tmp_path):
    ours, theirs = ranks.CONTEXT.Pipe()
    processes = [
        ranks.CONTEXT.Process(target=ending, args=(rank, str(tmp_path), theirs)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    theirs.close()
    assert ours.poll(60)
    assert ours.recv() == [2]
    for process in processes:
        process.join()
        assert process.exitcode == 0


@ranks.on_ranks(2)
def test_a_rank_that_reads_alone_finds_a_difference_without_the_others():
    """One after the other, each by reading."""
    _, optimizer = sharded_over(init_device_mesh("cpu", (2,)), 0.0)
    message = "table of rank 0 differs from that of rank 1, which has not reported"
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["tau"] = 1.0
        message = r"(?s)(?=.*rank 0: \(0\.0, )(?=.*rank 1: \(1\.0, )"
    optimizer.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_errors, "REPORTED_WITHIN", datetime.timedelta(seconds=0.1))
        if dist.get_rank() == 1:
            dist.barrier()
        with pytest.raises(RuntimeError, match=message):
            optimizer.statistics()
        if dist.get_rank() == 0:
            dist.barrier()


@ranks.on_ranks(2, [[], [2]])
def test_a_rank_that_leaves_the_job_decides_alone():
    """The step of the decision of a rank that goes on by itself, as often as its number."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    optimizer = GradESAdamW([p], **{**NEXT, "statistic": "norm", "tau": 0.0})
    optimizer.step()
    optimizer.process_group = groups[dist.get_rank()]
    optimizer.param_groups[0]["tau"] = 1e9
    for _ in range(dist.get_rank()):
        optimizer.step()
    return [event.decided_at for event in optimizer.freeze_events]
