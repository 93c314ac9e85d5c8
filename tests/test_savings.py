"""What freezing gives back: gradients stopped in waves, memory returned, and nothing lost by it."""

import concurrent.futures
import copy
import gc
import math
import multiprocessing
import warnings

import psutil
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import grades_kernels.optimizer as optimizer_module
from grades_kernels import FreezeReport, GradESAdamW
from grades_kernels.freezing import MAX_WAVES, FreezeRule, FreezeTable, Unit

MOMENTS = ("exp_avg", "exp_avg_sq")


class Blocks(nn.Module):
    """An embedding, blocks of two matrices and a norm, a head."""

    def __init__(self, n_blocks=3, width=4, reentrant=None):
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up_proj": nn.Linear(width, width, bias=False),
                    "down_proj": nn.Linear(width, width, bias=False),
                    "norm": nn.LayerNorm(width),
                }
            )
            for _ in range(n_blocks)
        )
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
            else:
                x = checkpoint(self.block, layer, x, use_reentrant=self.reentrant)
        return self.lm_head(x)


def build(n_blocks=3, reentrant=None, seed=0, **options):
    torch.manual_seed(seed)
    model = Blocks(n_blocks, reentrant=reentrant)
    options = {"tau": 0.0, "grace_steps": 0, "statistic": "norm", "fused": False, **options}
    return model, GradESAdamW(model.named_parameters(), lr=0.01, **options)


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(8, (2, 5), generator=generator)
    model(tokens).logsumexp(-1).mean().backward()


def train(model, opt, steps, first=0, clip=None):
    for step in range(first, first + steps):
        opt.zero_grad()
        backward(model, step)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()


def freeze(opt, *names):
    """Let the named units freeze at their next check, the others never."""
    for unit in opt._current_table().units:
        unit.tau = math.inf if unit.name in names else 0.0


def stopped(model):
    return [n for n, p in model.named_parameters() if not p.requires_grad]


# Waves


def table_of(n_units):
    rule = FreezeRule(grace_steps=0)
    return FreezeTable(rule, [Unit(f"u{k}", "norm", 1.0, 1) for k in range(n_units)])


@pytest.mark.parametrize("n_units", [1, 2, 5, 6, 7, 13, 28, 100, 224])
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_run_has_at_most_six_waves(n_units, at_once):
    table, waves = table_of(n_units), 0
    for k in range(0, n_units, at_once):
        for unit in table.units[k : k + at_once]:
            unit.frozen_at = k
        wave = table.wave()
        for unit in wave:
            unit.stopped_at = k
        waves += bool(wave)
    assert waves <= MAX_WAVES
    assert all(unit.stopped_at >= 0 for unit in table.units), "all frozen, all stopped"


def test_a_wave_waits_for_a_sixth_of_the_units():
    model, opt = build(n_blocks=6)  # 12 units: waves of 2
    freeze(opt, "layers.3.up_proj.weight")
    train(model, opt, 4)
    assert opt.frozen_units == ["layers.3.up_proj.weight"]
    assert stopped(model) == []
    freeze(opt, "layers.5.up_proj.weight")
    train(model, opt, 2)
    assert stopped(model) == ["layers.3.up_proj.weight", "layers.5.up_proj.weight"]


needs_guard = pytest.mark.skipif(
    not optimizer_module.COMPILE_SEES_WAVES,
    reason="before torch 2.12 torch.compile does not guard on requires_grad",
)


@needs_guard
def test_a_compiled_model_is_recompiled_at_most_six_times_and_never_runs_eagerly():
    """28 units that freeze one by one: one at a time would exhaust the limit of 8."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, opt = build(n_blocks=14)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    names = opt.monitored_units
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the recompile limit, or ours
        for step in range(len(names) + 2):
            train(compiled, opt, 1, first=step)
            freeze(opt, *names[: step + 1])
            before = counter.frame_count
    assert len(opt.frozen_units) == len(names) == len(stopped(model)) == 28
    assert counter.frame_count == before <= 1 + MAX_WAVES
    assert counter.frame_count > 3, "nothing was compiled"
    torch._dynamo.reset()


@needs_guard
def test_one_freeze_at_a_time_would_run_eagerly(monkeypatch):
    """Negative control of the test above: without waves the limit is exhausted."""
    monkeypatch.setattr(
        FreezeTable,
        "wave",
        lambda table: [u for u in table.units if u.frozen_at != -1 and u.stopped_at == -1],
    )
    with pytest.raises((AssertionError, UserWarning)):
        test_a_compiled_model_is_recompiled_at_most_six_times_and_never_runs_eagerly()


def test_a_compiler_that_cannot_see_freezes_is_announced(monkeypatch):
    """Once, and only where something has been compiled."""
    model, opt = build()
    monkeypatch.setattr(optimizer_module, "COMPILE_SEES_WAVES", False)
    for compiled in (False, True):
        monkeypatch.setattr(optimizer_module, "anything_compiled", lambda on=compiled: on)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            freeze(opt, *opt.monitored_units[: 2 + 2 * compiled])
            train(model, opt, 2)
        assert ["torch.compiler.reset()" in str(w.message) for w in caught] == [True] * compiled


def test_the_limit_of_torch_compile_is_announced(monkeypatch):
    model, opt = build()
    monkeypatch.setattr(optimizer_module, "COMPILE_SEES_WAVES", True)
    monkeypatch.setattr(optimizer_module, "recompilations_left", lambda waves: 2 - waves)
    with pytest.warns(UserWarning, match=r"near its limit: 1 times.*after 1 more.*recompile_limit"):
        freeze(opt, "layers.0.up_proj.weight")
        train(model, opt, 2)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_result_does_not_depend_on_when_the_host_learns(fused, monkeypatch):
    """Reading out of turn lets the host know earlier than by its fixed lag; nothing may change.

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
        return opt.freeze_events, [p.detach().clone() for p in model.parameters()]

    events, params = run(())
    assert events, "nothing froze"
    for read_at in (range(14), range(0, 14, 3), (5, 6)):
        other_events, other_params = run(read_at)
        assert other_events == events
        assert all(map(torch.equal, params, other_params))


# Memory


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
    freeze(opt, "layers.0.up_proj.weight", "layers.0.down_proj.weight")
    train(model, opt, 2, first=3)
    after = opt.report().memory
    assert after.released == 4 * n
    assert after.moments == before.moments - 2 * n
    assert after.prev_grads == before.prev_grads - n
    assert after.grads == before.grads - n


def process_sizes():
    """Bytes that this process holds after each of 7 steps, and what is claimed as released."""
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


def test_the_process_gets_smaller():
    """Bytes counted by the operating system, in a process that has nothing else to reuse."""
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
    opt.zero_grad()
    backward(model, 9)
    opt.step()
    # The first step of a bias correction that starts anew moves every element by about lr.
    moved = (thawed.detach() - frozen * (1 - 0.01 * 0.01)).abs()
    assert moved.median() == pytest.approx(0.01, rel=1e-3)


def test_a_checkpoint_of_released_state_loads_anywhere():
    model, opt = build(statistic="change")
    freeze(opt, "layers.0.up_proj.weight", "layers.2.up_proj.weight")
    train(model, opt, 4)
    whole, compact = opt.state_dict(), opt.state_dict(compact=True)
    shapes = [p.shape for p in model.parameters()]
    assert [s["exp_avg"].shape for s in whole["state"].values()] == shapes
    left_out = [k for k, s in compact["state"].items() if "exp_avg" not in s]
    assert len(left_out) == 2
    plain = torch.optim.AdamW(copy.deepcopy(model).parameters())
    plain.load_state_dict(whole)
    for saved in (whole, compact):
        other, resumed = build(statistic="change", seed=1)
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(saved))
        assert stopped(other) == stopped(model) != []
        assert resumed.report().memory.released == opt.report().memory.released > 0
        twin, twin_opt = copy.deepcopy((model, opt))
        for run in ((other, resumed), (twin, twin_opt)):
            for unit in run[1]._current_table().units:
                unit.tau = 0.0
            train(*run, 3, first=4, clip=0.1)
        assert all(map(torch.equal, other.parameters(), twin.parameters()))
        resumed.thaw()
        train(other, resumed, 2, first=7)


def test_a_compact_checkpoint_loads_where_gradients_may_not_be_stopped():
    model, opt = build()
    freeze(opt, "layers.0.up_proj.weight")
    train(model, opt, 4)
    other, resumed = build(stop_grad=False)
    resumed.load_state_dict(opt.state_dict(compact=True))
    assert resumed.frozen_units == ["layers.0.up_proj.weight"]
    assert stopped(other) == []
    assert resumed.report().memory.released == 0
    train(other, resumed, 2)


def test_running_out_of_memory_loses_nothing(monkeypatch):
    """The third tensor cannot be released: the first two are, and the next call does the rest."""
    model, opt = build(stop_grad=False)
    train(model, opt, 2)
    freeze(opt, *opt.monitored_units)
    train(model, opt, 1, first=2)
    weights = [p.detach().clone() for p in model.parameters()]
    calls = []

    def allocate(p, dtype=None):
        calls.append(p)
        if len(calls) == 5:
            raise MemoryError
        return torch.empty(0)

    with monkeypatch.context() as patch:
        patch.setattr(optimizer_module, "nothing_held", allocate)
        with pytest.raises(MemoryError):
            opt.apply_freezes()
    assert len(stopped(model)) == 2
    assert len(opt.frozen_units) == 6
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))  # the state is whole
    assert opt.apply_freezes(model) is model
    assert len(stopped(model)) == 6
    assert all(map(torch.equal, weights, model.parameters()))


# Where gradients may not be stopped


def test_reentrant_checkpointing_masks_only_and_says_so():
    model, opt = build(reentrant=True)
    freeze(opt, "layers.0.up_proj.weight")
    train(model, opt, 1)
    with pytest.warns(UserWarning, match="reentrant.*use_reentrant=False"):
        train(model, opt, 2, first=1)
    assert stopped(model) == []
    with pytest.raises(RuntimeError, match=r"apply_freezes.*use_reentrant=False"):
        opt.apply_freezes()


def test_reentrant_checkpointing_with_stop_grad_true_is_an_error():
    model, opt = build(reentrant=True, stop_grad=True)
    with pytest.raises(RuntimeError, match=r"stop_grad=True: .*reentrant"):
        freeze(opt, "layers.0.up_proj.weight")
        train(model, opt, 4)


@pytest.mark.parametrize("reentrant", [None, False])
def test_other_checkpointing_stops_gradients(reentrant):
    model, opt = build(reentrant=reentrant, stop_grad=True)
    freeze(opt, "layers.0.up_proj.weight")
    train(model, opt, 4)
    assert stopped(model) == ["layers.0.up_proj.weight"]


def test_stop_grad_false_waits_for_apply_freezes():
    model, opt = build(n_blocks=6, stop_grad=False)
    freeze(opt, "layers.0.up_proj.weight")
    train(model, opt, 3)
    assert stopped(model) == []
    assert opt.apply_freezes() is None
    assert stopped(model) == ["layers.0.up_proj.weight"], "without waiting for a wave"
    train(model, opt, 2, first=3)


# The end


def test_the_documented_loop_ends_before_a_backward_without_gradients():
    model, opt = build(tau=math.inf, grace_steps=2)
    for p in (*model.embed.parameters(), *model.lm_head.parameters()):
        p.requires_grad_(False)
    for layer in model.layers:
        layer["norm"].requires_grad_(False)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(10):
        opt.zero_grad()
        tokens = torch.randint(8, (2, 5), generator=torch.Generator().manual_seed(step))
        scaler.scale(model(tokens).logsumexp(-1).mean()).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        if opt.all_frozen:
            break
    assert step == 2
    opt.step()  # one more is harmless
    assert stopped(model) == [n for n, _ in model.named_parameters()]


# The prefix


def test_the_report_says_where_backward_stops(tmp_path):
    model, opt = build(n_blocks=3)
    lowest = ["layers.0.up_proj.weight", "layers.0.down_proj.weight"]
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
    assert "Lowest blocks with no matrix left to train: 1; backward stops above them" in str(report)
    assert FreezeReport.load(report.save(tmp_path / "report.json")) == report
    inputs = []
    model.layers[1]["up_proj"].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    train(model, opt, 1, first=3)
    assert not inputs[0].requires_grad, "backward does not reach the first block"


def test_a_raising_freeze_hook_loses_nothing():
    model, opt = build()
    twin, twin_opt = build()

    def hook(opt, events):
        raise KeyError("a user's mistake")

    handle = opt.register_freeze_hook(hook)
    for o in (opt, twin_opt):
        freeze(o, "layers.0.up_proj.weight")
    with pytest.raises(KeyError, match="a user's mistake"):
        train(model, opt, 1)
    handle.remove()
    train(model, opt, 3, first=1)
    train(twin, twin_opt, 4)
    assert opt.freeze_events == twin_opt.freeze_events
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


# Several processes


def ddp_run(find_unused, apply_at):
    """Weights and what still needs gradients after 8 steps of a DDP model on this rank's data."""
    from torch.nn.parallel import DistributedDataParallel

    model, opt = build(n_blocks=3)
    ddp = DistributedDataParallel(model, find_unused_parameters=find_unused)
    rank = torch.distributed.get_rank()
    first = ddp
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(8):
            if step == apply_at:
                ddp = opt.apply_freezes(ddp)
            freeze(opt, *(["layers.0.up_proj.weight", "layers.2.down_proj.weight"] if step else []))
            opt.zero_grad()
            backward(ddp, 2 * step + rank)
            opt.step()
    if ddp is not first:
        with pytest.raises(AttributeError, match=r"reducer|logger"):
            backward(first, 0)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return weights, stopped(model), opt.frozen_units, ddp is first


@pytest.mark.parametrize("find_unused", [False, True])
def test_ddp_stops_gradients_by_apply_freezes(find_unused):
    """The ranks stay alike, and nothing but the saving changes."""
    import ranks

    plain = ranks.run(2, ddp_run, find_unused, None)
    for _, still, frozen, same in plain:
        assert (still, len(frozen), same) == ([], 2, True)
    applied = ranks.run(2, ddp_run, find_unused, 5)
    for weights, still, frozen, same in applied:
        assert still == sorted(frozen) and len(still) == 2
        assert same is find_unused, "the wrapper is built anew only where it has to be"
        for name, want in plain[0][0].items():
            torch.testing.assert_close(weights[name], want, rtol=1e-6, atol=1e-7)
            assert torch.equal(weights[name], applied[0][0][name]), "ranks have drifted apart"


def ddp_thaws(find_unused):
    """Weights of a rank after a thaw, with the wrapper built anew and without."""
    from torch.nn.parallel import DistributedDataParallel

    model, opt = build(stop_grad=False)
    ddp = DistributedDataParallel(model, find_unused_parameters=find_unused)
    freeze(opt, "layers.0.up_proj.weight")
    train(ddp, opt, 2)
    ddp = opt.apply_freezes(ddp)
    freeze(opt)
    with pytest.warns(UserWarning, match=r"thaw\(\).*apply_freezes\(ddp_model\)"):
        opt.thaw()
    ddp = opt.apply_freezes(ddp)
    for step in range(3):
        opt.zero_grad()
        backward(ddp, 2 * step + torch.distributed.get_rank())
        opt.step()
    return [p.detach().clone() for p in model.parameters()], stopped(model)


@pytest.mark.parametrize("find_unused", [False, True])
def test_ddp_averages_again_what_was_thawed(find_unused):
    import ranks

    (ours, _), (theirs, still) = ranks.run(2, ddp_thaws, find_unused)
    assert still == []
    assert all(map(torch.equal, ours, theirs))


def ddp_warns():
    from torch.nn.parallel import DistributedDataParallel

    model, opt = build()
    ddp = DistributedDataParallel(model)
    freeze(opt, "layers.0.up_proj.weight")
    with pytest.warns(UserWarning, match=r"ddp_model = optimizer\.apply_freezes\(ddp_model\)"):
        train(ddp, opt, 3)
    assert stopped(model) == []
    with pytest.raises(RuntimeError, match=r"apply_freezes\(model\): DistributedDataParallel"):
        opt.apply_freezes()
    model, opt = build(stop_grad=True)
    with pytest.raises(RuntimeError, match=r"stop_grad=True: DistributedDataParallel"):
        train(DistributedDataParallel(model), opt, 1)
    return True


def test_ddp_masks_only_and_says_how_to_save():
    import ranks

    assert ranks.run(2, ddp_warns) == [True, True]
