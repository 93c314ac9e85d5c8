"""Release: gradients in batches, memory at once, and nothing is lost by it."""

import concurrent.futures
import contextlib
import copy
import gc
import inspect
import math
import multiprocessing
import pickle
import warnings
import weakref
from functools import partial
from importlib.util import find_spec

import psutil
import pytest
import ranks
import torch
from harness import feed, values
from tiny import Recomputed, in_fabric
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from grades_kernels import FreezeReport, GradESAdamW, grades_param_groups
from grades_kernels.integrations import release_under_ddp
from grades_kernels.release import ReentrantDetector

MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_BATCHES = 6
UP = "layers.0.up_proj.weight"


class Blocks(nn.Module):
    """An embedding, blocks of two matrices and a norm, a head."""

    def __init__(self, n_blocks=3, width=4, reentrant=None):
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.layers = nn.ModuleList()
        for _ in range(n_blocks):
            up, down = (nn.Linear(width, width, bias=False) for _ in range(2))
            block = {"up_proj": up, "down_proj": down, "norm": nn.LayerNorm(width)}
            self.layers.append(nn.ModuleDict(block))
        self.lm_head = nn.Linear(width, 8)
        self.reentrant = reentrant

    @staticmethod
    def block(layer, x):
        return x + layer["down_proj"](layer["norm"](layer["up_proj"](x)).relu())

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            if self.reentrant is None:
                x = self.block(layer, x)
            elif self.reentrant == "by hand":
                x = Recomputed.apply(partial(self.block, layer), x)
            else:
                x = checkpoint(self.block, layer, x, use_reentrant=self.reentrant)
        return self.lm_head(x)


def build(n_blocks=3, reentrant=None, seed=0, tau=0.0, **options):
    """A model and its optimizer, one group per parameter, so that each matrix has its own tau."""
    torch.manual_seed(seed)
    model = Blocks(n_blocks, reentrant=reentrant)
    return model, optimizer_of(model, tau, **options)


def optimizer_of(model, tau=0.0, **options):
    options = {"grace_steps": 0, "statistic": "norm", "fused": False, **options}
    groups = [
        {"params": [(n, p)], "tau": tau if "_proj" in n else None}
        for n, p in model.named_parameters()
    ]
    return GradESAdamW(groups, lr=0.01, **options)


def loss_of(model, step):
    tokens = torch.randint(8, (2, 5), generator=torch.Generator().manual_seed(step))
    return model(tokens).logsumexp(-1).mean()


def train(model, opt, steps, first=0, clip=None):
    for step in range(first, first + steps):
        opt.zero_grad()
        loss_of(model, step).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()


def freeze(opt, *names):
    """Lets the named units freeze at their next check, the others never."""
    for group in opt.param_groups:
        if group["tau"] is not None:
            group["tau"] = math.inf if group["param_names"][0] in names else 0.0


def stopped(model):
    return [n for n, p in model.named_parameters() if not p.requires_grad]


@pytest.mark.parametrize("n_units", [1, 2, 5, 6, 7, 13, 28, 100])
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_run_releases_in_at_most_six_batches(n_units, at_once):
    params = [nn.Parameter(torch.ones(1, 1)) for _ in range(n_units)]
    groups = [{"params": [(f"u{k}", p)], "tau": 0.0} for k, p in enumerate(params)]
    opt = GradESAdamW(groups, grace_steps=0, statistic="norm", fused=False)
    released, batches = 0, 0
    for k in range(0, n_units + 2 * at_once, at_once):
        freeze(opt, *(f"u{j}" for j in range(k + at_once)))
        feed(opt, *[1.0] * n_units)
        before, released = released, sum(not p.requires_grad for p in params)
        batches += released > before
    assert batches <= MAX_BATCHES
    assert released == n_units, "all are frozen, so all are released"


def test_a_batch_waits_for_a_sixth_of_the_units():
    model, opt = build(n_blocks=6)  # 12 units: batches of 2
    freeze(opt, "layers.3.up_proj.weight")
    train(model, opt, 4)
    assert opt.frozen_units == ["layers.3.up_proj.weight"]
    assert stopped(model) == []
    freeze(opt, "layers.5.up_proj.weight")
    train(model, opt, 2)
    assert stopped(model) == ["layers.3.up_proj.weight", "layers.5.up_proj.weight"]


def train_compiled_while_units_freeze(release_each=False):
    """12 units freeze one by one; how often the model was compiled, before the last and after."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, opt = build(n_blocks=6)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    names = opt.monitored_units
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns at the limit of recompilations
        for step in range(len(names) + 2):
            train(compiled, opt, 1, first=step)
            freeze(opt, *names[: step + 1])
            if release_each:
                opt.apply_freezes()
            before = counter.frame_count
    assert len(opt.frozen_units) == len(names) == len(stopped(model)) == 12
    torch._dynamo.reset()
    return before, counter.frame_count


needs_guard = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="before torch 2.12 torch.compile does not guard on requires_grad",
)


@needs_guard
def test_a_compiled_model_is_recompiled_at_most_six_times_and_never_runs_eagerly():
    before, count = train_compiled_while_units_freeze()
    assert 3 < count == before <= 1 + MAX_BATCHES


@needs_guard
def test_releasing_one_unit_at_a_time_would_run_eagerly():
    """Negative control of the test above: without batches the limit of recompilations is hit."""
    with pytest.raises((AssertionError, UserWarning)):
        _, count = train_compiled_while_units_freeze(release_each=True)
        assert count <= 1 + MAX_BATCHES


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_result_does_not_depend_on_when_the_host_reads(fused, monkeypatch):
    """An exact reading gives decisions to the host before its fixed lag; nothing may change.

    Clipping by the global norm makes every weight depend on which gradients are there.
    """
    if fused:
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")

    def run(read_at):
        model, opt = build(statistic="momentum", tau=0.05, patience=2, fused=fused)
        for step in range(14):
            train(model, opt, 1, first=step, clip=0.1)
            if step in read_at:
                assert opt.statistics() and opt.report()
        return opt.freeze_events, values(model)

    events, params = run(())
    assert events, "nothing froze"
    for read_at in (range(14), range(0, 14, 3), (5, 6)):
        other_events, other_params = run(read_at)
        assert other_events == events
        assert all(map(torch.equal, params, other_params))


def test_frozen_units_return_all_their_memory():
    model, opt = build(statistic="change")
    train(model, opt, 3)
    before = opt.report().memory
    n = 2 * 16 * 4  # bytes of the two matrices of a block
    total = sum(p.numel() for p in model.parameters()) * 4
    assert before.moments == 2 * total
    assert before.grads == total
    assert before.prev_grads == 3 * n
    assert before.released == 0
    freeze(opt, UP, "layers.0.down_proj.weight")
    train(model, opt, 2, first=3)
    after = opt.report().memory
    assert after.released == 4 * n
    assert after.moments == before.moments - 2 * n
    assert after.prev_grads == before.prev_grads - n
    assert after.grads == before.grads - n


def process_sizes():
    """Bytes of this process after each of 7 steps, and those that are claimed as released."""
    process = psutil.Process()
    matrices = {f"m{k}": nn.Parameter(torch.ones(1024, 1024)) for k in range(8)}
    opt = GradESAdamW(list(matrices.items()), tau=math.inf, grace_steps=2, patience=3, fused=False)
    used = []
    for _ in range(7):
        for p in matrices.values():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
        opt.step()
        gc.collect()
        used.append(process.memory_info().rss)
    assert opt.all_frozen
    return used, opt.report().memory.released


def test_the_process_gets_smaller(monkeypatch):
    """Bytes counted by the operating system, in a process that has nothing else to reuse."""
    # Else glibc raises the size from which on freed memory goes back at once, to up to 32 MB.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**17))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        used, claimed = pool.submit(process_sizes).result(timeout=60)
    assert claimed == 4 * 8 * 4 * 1024**2
    assert max(used) - used[-1] > 0.8 * claimed


def test_moments_come_back_full_of_zeros_after_a_thaw():
    model, opt = build(statistic="change")
    train(model, opt, 3)
    name = "layers.1.up_proj.weight"
    freeze(opt, name)
    train(model, opt, 2, first=3)
    thawed = model.layers[1]["up_proj"].weight
    assert not thawed.requires_grad and opt.state[thawed]["exp_avg"].numel() == 0
    others = {n: p for n, p in model.named_parameters() if p is not thawed}
    before = copy.deepcopy({n: (p.detach(), dict(opt.state[p])) for n, p in others.items()})
    freeze(opt)
    opt.thaw(name)
    for n, p in others.items():
        assert torch.equal(p, before[n][0])
        assert all(torch.equal(opt.state[p][key], before[n][1][key]) for key in MOMENTS)
    assert thawed.requires_grad and opt.state[thawed]["step"] == 0
    assert opt.report().memory.released == 0
    frozen = thawed.detach().clone()
    train(model, opt, 1, first=9)
    # The first step of a bias correction that starts anew moves every element by about lr.
    moved = (thawed.detach() - frozen * (1 - 0.01 * 0.01)).abs()
    assert moved.median() == pytest.approx(0.01, rel=1e-3)


def test_a_checkpoint_of_released_state_loads_anywhere():
    model, opt = build(statistic="change")
    freeze(opt, UP, "layers.2.up_proj.weight")
    train(model, opt, 4)
    whole, compact = opt.state_dict(), opt.state_dict(compact=True)
    shapes = [p.shape for p in model.parameters()]
    assert [s["exp_avg"].shape for s in whole["state"].values()] == shapes
    left_out = [k for k, s in compact["state"].items() if "exp_avg" not in s]
    assert len(left_out) == 2
    plain = torch.optim.AdamW([{"params": [p]} for p in copy.deepcopy(model).parameters()])
    plain.load_state_dict(whole)
    for saved in (whole, compact):
        other, resumed = build(statistic="change", seed=1)
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(saved))
        assert stopped(other) == stopped(model) != []
        assert resumed.report().memory.released == opt.report().memory.released > 0
        twin, twin_opt = copy.deepcopy((model, opt))
        for run in ((other, resumed), (twin, twin_opt)):
            freeze(run[1])
            train(*run, 3, first=4, clip=0.1)
        assert all(map(torch.equal, other.parameters(), twin.parameters()))
        resumed.thaw()
        train(other, resumed, 2, first=7)


@pytest.mark.parametrize("of_adamw", [False, True])
def test_a_checkpoint_trains_what_another_optimizer_has_released(of_adamw):
    """As AdamW would: a run on the same model begins again at an earlier checkpoint."""
    model, opt = build(statistic="change")
    freeze(opt, UP)
    train(model, opt, 3)
    weights, saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    if of_adamw:
        saved = opt.adamw_state_dict()
    freeze(opt, UP, "layers.2.up_proj.weight", "layers.2.down_proj.weight")
    train(model, opt, 3, first=3)
    frozen_later = opt.frozen_units[1:]
    assert stopped(model) == opt.frozen_units != [UP]
    opt.thaw(frozen_later.pop())
    switched_off = model.layers[0]["down_proj"].weight, model.layers[2]["down_proj"].weight
    for p in switched_off:  # by the user, one of them after its release
        assert p.requires_grad
        p.requires_grad_(False)
    again = GradESAdamW(
        [{"params": own["params"], "param_names": own["param_names"]} for own in opt.param_groups],
        **{"tau": 0.0, "grace_steps": 0, "statistic": "change", "fused": False},
    )
    model.load_state_dict(weights)
    again.load_state_dict(copy.deepcopy(saved))
    assert not set(stopped(model)) & set(frozen_later)
    assert not any(p.requires_grad for p in switched_off)
    assert again.frozen_units == ([] if of_adamw else [UP])
    freeze(again)
    train(model, again, 1, first=3)
    params = dict(model.named_parameters())
    assert not any(torch.equal(params[name], weights[name]) for name in frozen_later)


def test_a_compact_checkpoint_loads_where_gradients_may_not_be_stopped():
    model, opt = build()
    freeze(opt, UP)
    train(model, opt, 4)
    other, resumed = build(stop_grad=False)
    resumed.load_state_dict(opt.state_dict(compact=True))
    assert resumed.frozen_units == [UP]
    assert stopped(other) == []
    assert resumed.report().memory.released == 0
    train(other, resumed, 2)


class OutOfMemory(TorchDispatchMode):
    """The allocation of an empty tensor number `at` fails: nothing is left of the memory."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == 0:
            self.left -= 1
            if self.left == 0:
                raise MemoryError
        return out


def test_running_out_of_memory_loses_nothing():
    """A tensor cannot be released: the ones before it are, and the next call does the rest."""
    model, opt = build(stop_grad=False)
    train(model, opt, 2)
    freeze(opt, *opt.monitored_units)
    train(model, opt, 1, first=2)
    weights = values(model)
    with pytest.raises(MemoryError), OutOfMemory(at=5):
        opt.apply_freezes()
    assert 0 < len(stopped(model)) < 6
    for p in model.parameters():
        released = {opt.state[p][key].numel() == 0 for key in MOMENTS}
        assert released == {not p.requires_grad}, "a unit is released wholly or not at all"
    assert len(opt.frozen_units) == 6
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))  # the state is whole
    assert opt.apply_freezes(model) is model
    assert len(stopped(model)) == 6
    assert all(map(torch.equal, weights, model.parameters()))


@pytest.mark.parametrize("reentrant", [True, "by hand"])
@pytest.mark.parametrize("stop_grad", ["auto", False])
def test_nothing_is_released_under_reentrant_checkpointing(stop_grad, reentrant):
    """A warning where it would happen by itself, an error of apply_freezes."""
    model, opt = build(reentrant=reentrant, stop_grad=stop_grad)
    freeze(opt, UP)
    warned = pytest.warns(UserWarning, match="reentrant.*use_reentrant=False")
    with warned if stop_grad else contextlib.nullcontext():
        train(model, opt, 3)
    with pytest.raises(RuntimeError, match=r"apply_freezes.*use_reentrant=False"):
        opt.apply_freezes()
    assert stopped(model) == []


def loaded(model, opt):
    other_model, other = build(reentrant=True)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    return other_model, other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("again", [loaded, lambda *pair: copy.deepcopy(pair)], ids=["load", "copy"])
def test_reentrant_checkpointing_is_found_again(again):
    """Before the first release after it, although a unit is frozen from the first step on."""
    model, opt = build(reentrant=True)
    freeze(opt, UP)
    train(model, opt, 3)
    model, opt = again(model, opt)
    train(model, opt, 3)
    assert opt.frozen_units == [UP] and stopped(model) == []


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpointing_is_found_around_a_unit_that_joins_later():
    model, opt = build(reentrant=True)
    joining = model.layers[0].up_proj.weight.requires_grad_(False)
    for group in opt.param_groups:
        if group["params"][0] is not joining:
            group["tau"] = None
    train(model, opt, 3)
    joining.requires_grad_(True)
    freeze(opt, UP)
    train(model, opt, 4)
    assert opt.frozen_units == [UP] and stopped(model) == []


def test_a_tensor_with_the_id_of_one_that_has_gone_is_observed():
    detector, seen = ReentrantDetector(), set()
    for _ in range(100):
        p = nn.Parameter(torch.ones(2, 2))
        seen.add(id(p))
        detector.observe([p])
        assert list(detector._handles) == [id(p)]
        p.sum().backward()
    assert len(seen) < 100


def test_a_matrix_without_a_gradient_is_freed_with_its_model():
    """No cycle of references: the memory is free without a garbage collection."""
    used, idle = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    opt = GradESAdamW([used, idle], tau=0.0, grace_steps=0)
    feed(opt, 1.0, None)
    left = weakref.ref(idle)
    gc.disable()
    try:
        del opt, used, idle
        assert left() is None
    finally:
        gc.enable()


def test_reentrant_checkpointing_with_stop_grad_true_is_an_error():
    model, opt = build(reentrant=True, stop_grad=True)
    with pytest.raises(RuntimeError, match=r"stop_grad=True: .*reentrant"):
        freeze(opt, UP)
        train(model, opt, 4)


@pytest.mark.parametrize("reentrant", [None, False])
def test_other_checkpointing_stops_gradients(reentrant):
    model, opt = build(reentrant=reentrant, stop_grad=True)
    freeze(opt, UP)
    train(model, opt, 4)
    assert stopped(model) == [UP]


@pytest.mark.parametrize("stop_grad", ["auto", True])
def test_compiled_autograd_meets_no_hooks(stop_grad):
    """It takes a second to compile each, and without them only the user knows what is safe."""
    model, opt = build(stop_grad=stop_grad)
    freeze(opt, UP)
    automatic = stop_grad == "auto"
    warned = pytest.warns(UserWarning, match=r"compiled autograd.*stop_grad=True")
    with torch._dynamo.config.patch(compiled_autograd=True):
        with warned if automatic else contextlib.nullcontext():
            train(model, opt, 3)
        assert all(not p._backward_hooks for p in model.parameters())
    assert opt.frozen_units == [UP] and stopped(model) == ([] if automatic else [UP])


def test_stop_grad_false_waits_for_apply_freezes():
    model, opt = build(n_blocks=6, stop_grad=False)
    freeze(opt, UP)
    train(model, opt, 3)
    assert stopped(model) == []
    assert opt.apply_freezes() is None
    assert stopped(model) == [UP], "without waiting for a batch"
    train(model, opt, 2, first=3)


def test_the_documented_loop_ends_before_a_backward_without_gradients():
    model, opt = build(tau=math.inf, grace_steps=2)
    for name, p in model.named_parameters():
        p.requires_grad_("_proj" in name)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(10):
        opt.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        if opt.all_frozen:
            break
    assert step == 2
    with pytest.warns(UserWarning, match="every parameter of this optimizer is frozen"):
        opt.step()  # one more is harmless
    assert stopped(model) == [n for n, _ in model.named_parameters()]


def test_the_report_says_where_backward_stops(tmp_path):
    model, opt = build(n_blocks=3)
    lowest = [UP, "layers.0.down_proj.weight"]
    assert opt.report().frozen_blocks == 0
    freeze(opt, *lowest, "layers.2.up_proj.weight")
    train(model, opt, 3)
    report = opt.report()
    assert report.frozen_blocks == 1
    below = ["embed.weight", "layers.0.norm.weight", "layers.0.norm.bias"]
    assert list(report.trained_below) == below
    assert "backward still passes through for embed.weight and 2 more" in str(report)
    for name in below:
        model.get_parameter(name).requires_grad_(False)
    report = opt.report()
    assert (report.frozen_blocks, report.trained_below) == (1, ())
    line = "Lowest monitored blocks with no matrix left to train: 1; backward stops above them"
    assert line in str(report)
    assert FreezeReport.load(report.save(tmp_path / "report.json")) == report
    inputs = []
    model.layers[1]["up_proj"].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    train(model, opt, 1, first=3)
    assert not inputs[0].requires_grad, "backward does not reach the first block"


def test_a_matrix_outside_of_the_blocks_is_none_of_them():
    names = ("layers.0.up_proj.weight", "projection.weight")
    params = [(name, nn.Parameter(torch.ones(4, 4))) for name in names]
    opt = GradESAdamW(params, tau=1e9, grace_steps=0, statistic="norm")
    feed(opt, 1.0, 1.0)
    assert opt.frozen_units == list(names) and opt.report().frozen_blocks == 1


def test_a_monitored_embedding_is_below_the_blocks_until_it_freezes():
    """With `monitor_all`; here its gradient does not stop."""
    embedding, up = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    groups = [
        {"params": [("embed.weight", embedding)], "monitor_all": True, "tau": 0.0},
        {"params": [("layers.0.up_proj.weight", up)], "tau": 1e9},
    ]
    opt = GradESAdamW(groups, grace_steps=0, statistic="norm", stop_grad=False)
    for tau, below in ((0.0, ("embed.weight",)), (1e9, ())):
        opt.param_groups[0]["tau"] = tau
        feed(opt, 1.0, 1.0)
        report = opt.report()
        assert (report.frozen_blocks, report.trained_below) == (1, below)


def test_of_two_stacks_none_is_the_lowest():
    stacks = nn.ModuleDict({
        name: nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
        for name in ("encoder", "decoder")
    })  # fmt: skip
    opt = GradESAdamW(stacks.named_parameters(), tau=0.0, grace_steps=0, statistic="norm")
    for unit in opt._freezer.table.units[:2]:
        unit.decide(0, 0.0)
    feed(opt, *[1.0] * 4)
    assert opt.frozen_units == ["encoder.0.weight", "encoder.1.weight"]
    assert opt.report().frozen_blocks == 0


def test_heads_beside_a_model_in_a_sequential_are_not_below_its_blocks():
    model = nn.Sequential(Blocks(2), nn.Linear(8, 8))
    opt = GradESAdamW(grades_param_groups(model, tau=math.inf), grace_steps=0, statistic="norm")
    train(model, opt, 1)
    norms = [f"0.layers.{k}.norm.{name}" for name in ("weight", "bias") for k in (0, 1)]
    report = opt.report()
    assert report.frozen_blocks == 2
    assert sorted(report.trained_below) == sorted(["0.embed.weight", *norms])


WITH_FABRIC = pytest.mark.skipif(find_spec("lightning") is None, reason="needs lightning")


@pytest.mark.parametrize("kind", ["", "find_unused", pytest.param("in Fabric", marks=WITH_FABRIC)])
@ranks.on_ranks(2)
def test_ddp_stops_gradients_by_apply_freezes(kind):
    """The ranks stay alike, and nothing but the saving changes."""

    def run(*how):
        """Weights, names of released tensors and events after 8 steps on this rank's data."""
        model, opt = build(n_blocks=3)
        ddp = DistributedDataParallel(model, find_unused_parameters=kind == "find_unused")
        if kind == "in Fabric":
            ddp = in_fabric(ddp)
        if release_under_ddp in how:
            release_under_ddp(opt, lambda: ddp)
        rank = torch.distributed.get_rank()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in range(8):
                if step in how:
                    assert opt.apply_freezes(ddp) is ddp
                freeze(opt, *([UP, "layers.2.down_proj.weight"] if step else []))
                train(ddp, opt, 1, first=2 * step + rank)
        return values(model), stopped(model), opt.freeze_events

    plain, still, expected = run()
    assert (still, len(expected)) == ([], 2)
    for how in ((3, 5), (release_under_ddp,)):
        weights, still, events = run(*how)
        assert still == sorted(event.unit for event in events) and len(still) == 2
        assert [e[:2] for e in events] == [e[:2] for e in expected]
        assert all(map(torch.equal, weights, plain))
        assert all(map(torch.equal, *ranks.gathered(weights))), "ranks have drifted apart"


@pytest.mark.parametrize("find_unused", [False, True])
@ranks.on_ranks(2)
def test_ddp_averages_again_what_was_thawed(find_unused):
    model, opt = build(stop_grad=False)
    ddp = DistributedDataParallel(model, find_unused_parameters=find_unused)
    freeze(opt, UP)
    train(ddp, opt, 2)
    ddp = opt.apply_freezes(ddp)
    freeze(opt)
    with pytest.warns(UserWarning, match=r"thaw\(\).*apply_freezes\(ddp_model\)"):
        opt.thaw()
    ddp = opt.apply_freezes(ddp)
    for step in range(3):
        train(ddp, opt, 1, first=2 * step + torch.distributed.get_rank())
    assert stopped(model) == []
    assert all(map(torch.equal, *ranks.gathered(values(model))))


@ranks.on_ranks(2)
def test_release_under_ddp_follows_thaws_and_checkpoints():
    """The wrapper always waits for tensors that need a gradient, and the ranks stay alike."""
    model, opt = build()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(None, allreduce_hook)
    release_under_ddp(opt, lambda: ddp)
    rank, seen = torch.distributed.get_rank(), []

    def step(n):
        for _ in range(n):
            train(ddp, opt, 1, first=2 * len(seen) + rank)
            seen.append(stopped(model))

    step(1)
    begun = copy.deepcopy(opt.state_dict())
    freeze(opt, UP)
    step(2)
    half = copy.deepcopy(opt.state_dict())
    freeze(opt)
    opt.thaw()
    step(1)
    for state in (half, begun):
        opt.load_state_dict(state)
        freeze(opt)
        step(2)
    assert all(map(torch.equal, *ranks.gathered(values(model)))) and len(ddp._comm_hooks) == 1
    assert seen == [[], [], [UP], [], [UP], [UP], [], []]


def power_sgd(ddp):
    state = PowerSGDState(None, 1, start_powerSGD_iter=2, min_compression_rate=1)
    ddp.register_comm_hook(state, powerSGD_hook)


def half_precision(ddp):
    ddp._register_builtin_comm_hook(torch.distributed.BuiltinCommHookType.FP16_COMPRESS)


@pytest.mark.parametrize("register", [power_sgd, half_precision])
@ranks.on_ranks(2)
def test_communication_hooks_with_a_state_and_of_torch_stay(register):
    """The buckets of a wrapper that is initialised anew have other sizes."""
    model, opt = build(n_blocks=3)
    ddp = DistributedDataParallel(model, bucket_cap_mb=1e-3)
    register(ddp)
    release_under_ddp(opt, lambda: ddp)
    for step in range(12):
        freeze(opt, *([UP] if step > 3 else []))
        train(ddp, opt, 1, first=2 * step + torch.distributed.get_rank())
    assert stopped(model) == [UP] and all(map(torch.equal, *ranks.gathered(values(model))))
    hook = ddp._get_ddp_logging_data()["comm_hook"]
    assert ("powerSGD" if register is power_sgd else "FP16_COMPRESS") in hook
    for _, state in ddp._comm_hooks:  # it compresses nothing until the buckets have their sizes
        assert state.iter < 10


@ranks.on_ranks(2)
def test_nothing_is_released_where_ranks_train_apart():
    """torch's averagers leave out tensors without a gradient: they would stay apart."""
    model, opt = build()
    ddp = DistributedDataParallel(model)
    alone, _ = torch.distributed.new_subgroups(1)
    ddp.register_comm_hook(
        PostLocalSGDState(None, alone, start_localSGD_iter=1), post_localSGD_hook
    )
    release_under_ddp(opt, lambda: ddp)
    freeze(opt, UP)
    with pytest.warns(UserWarning, match="post_localSGD_hook"):
        train(ddp, opt, 3)
    assert opt.frozen_units == [UP] and stopped(model) == []
    with pytest.raises(RuntimeError, match=r"apply_freezes\(model\): with post_localSGD_hook"):
        opt.apply_freezes(ddp)


SETTINGS = [
    {},
    {"bucket_cap_mb": 1e-3, "find_unused_parameters": True, "skip_all_reduce_unused_params": True},
    {"bucket_cap_mb_list": [1e-3, 2e-3], "gradient_as_bucket_view": True},
    {"batched_grad_copy": True, "static_graph": True, "broadcast_buffers": False},
]


def described(ddp):
    """All that a wrapper says of itself, but for times, objects and the model."""
    own = {k: x for k, x in vars(ddp).items() if isinstance(x, (bool, int, float, str, list))}
    logged = {k: x for k, x in ddp._get_ddp_logging_data().items() if "time" not in k}
    return logged | {k: x for k, x in own.items() if k != "_module_parameters"}


@pytest.mark.filterwarnings("ignore:.*broadcast_buffers:FutureWarning")
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda x: ",".join(x) or "defaults")
@ranks.on_ranks(2)
def test_a_wrapper_that_is_initialised_anew_has_its_settings_and_hooks(settings):
    """It is like one that is made for the tensors that are left."""
    known = inspect.signature(DistributedDataParallel).parameters
    settings = {name: x for name, x in settings.items() if name in known}  # of this torch
    model, opt = build()
    ddp, calls = DistributedDataParallel(model, **settings), []
    ddp.register_forward_hook(lambda *_: calls.append(ddp))
    ddp.eval()
    release_under_ddp(opt, lambda: ddp)
    freeze(opt, UP)
    train(ddp, opt, 3)
    assert stopped(model) == [UP] and len(calls) == 3 and not ddp.training
    model, _ = build()
    model.layers[0].up_proj.requires_grad_(False)
    fresh = DistributedDataParallel(model, **settings)
    fresh.eval()
    train(fresh, torch.optim.SGD(model.parameters()), 1)
    assert described(ddp) == described(fresh)


@ranks.on_ranks(2)
def test_a_wrapper_is_initialised_anew_within_no_sync():
    """Its gradients stay those of this rank, as Accelerate's LocalSGD wants them."""
    model, opt = build()
    ddp = DistributedDataParallel(model)
    release_under_ddp(opt, lambda: ddp)
    freeze(opt, UP)
    with ddp.no_sync():
        train(ddp, opt, 3, first=torch.distributed.get_rank())
        assert stopped(model) == [UP] and not ddp.require_backward_grad_sync
    assert ddp.require_backward_grad_sync


@ranks.on_ranks(2)
def test_a_wrapper_around_nothing_that_trains_can_be_used_again_after_a_thaw():
    model, opt = build(stop_grad=False)
    model.requires_grad_(False)
    for name in opt.monitored_units:
        model.get_parameter(name).requires_grad_(True)
    ddp = DistributedDataParallel(model)
    freeze(opt, *opt.monitored_units)
    train(ddp, opt, 2)
    assert opt.apply_freezes(ddp) is model
    freeze(opt)
    opt.thaw()
    assert opt.apply_freezes(ddp) is ddp
    train(ddp, opt, 1, first=torch.distributed.get_rank())
    assert all(map(torch.equal, *ranks.gathered(values(model))))


def delayed(model):
    first, last = next(model.named_parameters()), model.lm_head.weight
    return DistributedDataParallel(
        model, delay_all_reduce_named_params=[first], param_to_hook_all_reduce=last
    )


def mixed_precision(model):
    ddp = DistributedDataParallel(model)
    ddp.mixed_precision = object()  # the argument needs an accelerator
    return ddp


@pytest.mark.parametrize("wrap", [delayed, mixed_precision])
@ranks.on_ranks(2)
def test_a_wrapper_with_hooks_in_the_model_is_not_initialised_anew(wrap):
    model, opt = build()
    ddp = wrap(model)
    freeze(opt, UP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, opt, 2)
    with pytest.raises(RuntimeError, match=r"delay_all_reduce_named_params .* leave hooks"):
        opt.apply_freezes(ddp)
    assert stopped(model) == [] and hasattr(ddp, "reducer")


@ranks.on_ranks(2)
def test_apply_freezes_refuses_reentrant_checkpointing_under_ddp():
    model, opt = build(reentrant=True)
    ddp = DistributedDataParallel(model)
    freeze(opt, UP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(ddp, opt, 2)
    with pytest.raises(RuntimeError, match=r"apply_freezes.*use_reentrant=False"):
        opt.apply_freezes(ddp)
    assert stopped(model) == []


@ranks.on_ranks(2)
def test_the_last_tensors_are_not_released_under_ddp():
    """DDP refuses to wrap a model without any tensor that needs a gradient."""
    model, opt = build()
    for name, p in model.named_parameters():
        p.requires_grad_(name in opt.monitored_units)
    ddp = DistributedDataParallel(model)
    release_under_ddp(opt, lambda: ddp)
    before = stopped(model)
    freeze(opt, *opt.monitored_units)
    train(ddp, opt, 3)
    assert opt.all_frozen and stopped(model) == before


@ranks.on_ranks(2)
def test_a_job_of_one_rank_may_use_ddp_too():
    """It only masks, as the wrapper would go on waiting for the gradient."""
    group = torch.distributed.new_group([0])
    if torch.distributed.get_rank() == 1:
        return
    model, opt = build()
    opt.process_group = group
    freeze(opt, UP)
    with pytest.warns(UserWarning, match="release_under_ddp"):
        train(DistributedDataParallel(model, process_group=group), opt, 4)
    assert stopped(model) == []


@ranks.on_ranks(2)
def test_ddp_only_masks_and_warns_how_to_release():
    model, opt = build()
    ddp = DistributedDataParallel(model)
    freeze(opt, UP)
    with pytest.warns(UserWarning, match=r"ddp_model = optimizer\.apply_freezes\(ddp_model\)"):
        train(ddp, opt, 3)
    assert stopped(model) == []
    with pytest.raises(RuntimeError, match=r"apply_freezes\(model\): DistributedDataParallel"):
        opt.apply_freezes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the wrapper knows of all tensors that train again
        opt.thaw()
    model, opt = build(stop_grad=True)
    with pytest.raises(RuntimeError, match=r"stop_grad=True: DistributedDataParallel"):
        train(DistributedDataParallel(model), opt, 1)
    model = Blocks(3)
    opt = GradESAdamW(model.named_parameters(), fused=False, stop_grad=True)
    with pytest.warns(UserWarning, match="Without effect.*stop_grad=True"):
        train(DistributedDataParallel(model), opt, 1)


def matrices(*taus):
    """Matrices of ones with these thresholds, and their optimizer; the norm of ones is 16."""
    params = [nn.Parameter(torch.ones(4, 4)) for _ in taus]
    groups = [{"params": [p], "tau": tau} for p, tau in zip(params, taus, strict=True)]
    return *params, GradESAdamW(groups, grace_steps=0, statistic="norm", fused=False)


def test_moments_of_a_thaw_in_an_evaluation_can_be_updated():
    """Those made in `torch.inference_mode` could not."""
    w, opt = matrices(1e9)
    feed(opt, 1.0)
    feed(opt, 1.0)
    assert opt.frozen_units and not w.requires_grad
    opt.param_groups[0]["tau"] = 0.0
    with torch.inference_mode():
        opt.thaw()
    (before,) = values(opt)
    feed(opt, 1.0)
    assert not torch.equal(w, before)


def test_a_frozen_tensor_that_is_no_leaf_keeps_its_flag():
    """AdamW takes such tensors with `retain_grad`; torch forbids to change the flag."""
    leaf = torch.ones(4, 4, requires_grad=True)
    w = leaf * 2
    w.retain_grad()
    opt = GradESAdamW([w], tau=1e9, grace_steps=0, statistic="norm")
    for _ in range(3):
        feed(opt, 1.0)
    assert opt.frozen_units and w.requires_grad


def test_a_released_tensor_that_leaves_the_optimizer_is_free():
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    groups = [{"params": [p], "tau": tau} for p, tau in zip(params, (1e9, 0.0), strict=True)]
    opt = GradESAdamW(groups, statistic="norm", grace_steps=0)

    def train_with(*optimizers):
        sum(p.sum() for p in params).backward()
        for optimizer in optimizers:
            optimizer.step()

    train_with(opt)
    train_with(opt)
    assert not params[0].requires_grad
    del opt.param_groups[0], opt.state[params[0]]
    other = torch.optim.AdamW([params[0].requires_grad_(True)], weight_decay=0.0)
    train_with(opt, other)
    train_with(opt, other)
    assert (params[0] != 1).all()
    removed = weakref.ref(params.pop(0))
    del groups, other
    gc.collect()
    assert removed() is None


@pytest.mark.parametrize("swaps", [False, True])
def test_a_model_is_moved_and_loaded_after_a_release(swaps):
    """torch swaps the tensors of a module if asked to, and those of DTensors always."""
    model, opt = build()
    freeze(opt, UP)
    train(model, opt, 3)
    assert stopped(model) == [UP]
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        model.zero_grad()
        model.double().float()
        model.load_state_dict(build(seed=1)[0].state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    frozen = model.layers[0].up_proj.weight.clone()
    train(model, opt, 2)
    assert stopped(model) == [UP] and torch.equal(model.layers[0].up_proj.weight, frozen)
    nothing_frozen = build()[1].state_dict()
    optimizer_of(model).load_state_dict(nothing_frozen)
    assert stopped(model) == []


def test_a_copy_of_a_released_tensor_is_not_trained_by_a_checkpoint():
    """The user of the copy has frozen it."""
    model, opt = build()
    freeze(opt, UP)
    train(model, opt, 3)
    model = pickle.loads(pickle.dumps(model))
    fresh = GradESAdamW(model.named_parameters(), tau=0.0, grace_steps=0)
    fresh.load_state_dict(fresh.state_dict())
    assert stopped(model) == [UP]


def test_released_tensors_stay_without_gradients():
    """PEFT's `disable_adapter`, as in DPO, asks for the gradients of all adapters again."""
    a, b, opt = matrices(1e9, 0.0)
    opt.apply_freezes()
    for _ in range(3):
        for p in (a, b):
            p.requires_grad_(True)
        feed(opt, 1.0, 1.0)
        opt.apply_freezes()
    assert len(opt.frozen_units) == 1 and not a.requires_grad and a.grad is None
    assert b.requires_grad
    opt.thaw()
    opt.param_groups[0]["tau"] = 0.0
    opt.step()
    assert a.requires_grad
