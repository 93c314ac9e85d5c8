"""The statistics beyond the paper's: "signal" and tau="auto", "weight_change", "gain".

Their values are compared with an independent implementation in test_oracle.py.
"""

import copy
import math

import pytest
import torch
from conftest import FUSED
from harness import feed

from grades_kernels import GradESAdamW, grades_adamw
from grades_kernels.backends import reference
from grades_kernels.backends.tasks import UPDATE
from grades_kernels.freezing.table import STATISTICS, FreezeConfig, FreezeTable, Unit
from grades_kernels.report.tables import standard_error

NEXT_STEP = {"freeze_timing": "next_step"}
SLOPE = torch.linspace(-3, 5, 12).reshape(3, 4)


def monitored(statistic, shape=(4, 4), lr=0.0, **options):
    """A matrix of ones and its optimizer."""
    w = torch.nn.Parameter(torch.ones(shape))
    own = {"tau": 0.0, "grace_steps": 0, "statistic": statistic, **options}
    return w, GradESAdamW([("w", w)], lr, **own)


def observe(statistic, gradients, **options):
    """Statistics of one matrix that gets these gradients, one list entry per step."""
    _, opt = monitored(statistic, gradients[0].shape, **options)
    seen = []
    for g in gradients:
        feed(opt, g.clone())
        seen.append(opt.statistics()["w"])
    return seen


def noise(n_steps, shape=(64, 64), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(n_steps)]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
def test_signal_of_a_constant_gradient_grows_to_what_noise_would_lose(betas):
    seen = observe("signal", [SLOPE] * 6, betas=betas)
    assert all(map(math.isnan, seen[:2]))  # no moment yet, or one of a single gradient
    powers = [betas[0] ** t for t in range(2, 6)]
    lost = [(1 - betas[0]) / (1 + betas[0]) * (1 + x) / (1 - x) for x in powers]
    assert seen[2:] == pytest.approx([1 / rho for rho in lost], rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_signal_freezes_no_matrix_by_its_first_gradient(fused):
    """After a single gradient the ratio is 1 whatever it is, which is below the tau of "auto"."""
    params = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in "ab"]
    opt = GradESAdamW(params, statistic="signal", tau="auto", grace_steps=3, fused=fused)
    for t in range(12):
        feed(opt, 1.0, 1.0 if t > 5 else None)
    assert not opt.frozen_units
    opt.param_groups[0]["tau"] = 1e9
    opt.step()
    opt.param_groups[0]["tau"] = "auto"
    assert len(opt.frozen_units) == 2
    opt.thaw()
    for _ in range(4):
        feed(opt, 1.0, 1.0)
    assert not opt.frozen_units


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("density", [1.0, 0.02])
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_signal_of_noise_is_one(beta1, density, scale):
    """From the first steps on, and where most gradients are zero."""
    kept = torch.Generator().manual_seed(1)
    gradients = [
        scale * g * (torch.rand(g.shape, generator=kept) < density) for g in noise(100, (256, 128))
    ]
    seen = observe("signal", gradients, betas=(beta1, 0.999), eps=1e-30)
    late = sum(seen[-20:]) / 20
    # 655 gradients that are not zero have a standard error of 4 % each; 20 steps are not
    # independent.
    assert late == pytest.approx(1.0, rel=0.03 if density == 1.0 else 0.12)
    assert sum(seen[2:7]) / 5 == pytest.approx(1.0, rel=0.03 if density == 1.0 else 0.12)


def test_auto_freezes_noise_and_keeps_what_still_learns():
    torch.manual_seed(0)
    named = [(name, torch.nn.Parameter(torch.zeros(32, 32))) for name in "ab"]
    opt = GradESAdamW(named, statistic="signal", tau="auto", grace_steps=30, stop_grad=False)
    drift = torch.randn(32, 32)
    for _ in range(120):
        feed(opt, torch.randn(32, 32), torch.randn(32, 32) + drift)
    assert opt.frozen_units == ["a"]
    assert opt.freeze_events[0].tau == 1.2


@pytest.mark.parametrize("statistic", ["change", "norm", "momentum", "weight_change", "gain"])
def test_auto_needs_signal(statistic):
    with pytest.raises(ValueError, match=r"tau='auto' needs statistic='signal'.*tau=0\.0"):
        monitored(statistic, tau="auto", **NEXT_STEP)


def test_weight_change_of_zero_is_no_evidence():
    """A learning rate of zero, the first step of a warm-up, is no sign of convergence."""
    seen = observe("weight_change", noise(3), tau=1e9, **NEXT_STEP)
    assert all(map(math.isnan, seen))


def test_weight_change_needs_next_step():
    with pytest.raises(ValueError, match="needs freeze_timing='next_step'"):
        monitored("weight_change")
    _, opt = monitored("change")
    group = {"params": [("v", torch.nn.Parameter(torch.zeros(4, 4)))]}
    with pytest.raises(ValueError, match="needs freeze_timing='next_step'"):
        opt.add_param_group({**group, "statistic": "weight_change"})


def test_a_wrong_bias_correction_would_be_noticed():
    """Negative control: with corrections of a late step a constant gradient is not 1."""
    w, opt = monitored("signal", fused=False)
    feed(opt, 1.0)
    opt.state[w]["step"].fill_(1e6)
    feed(opt, 1.0)
    assert opt.statistics()["w"] != pytest.approx(1.0, rel=1e-2)


def quadratic(statistic, steps, **options):
    """A matrix that descends 0.5 * |w - 1|^2: its optimizer, and the loss before every step."""
    w = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.float64))
    own = {"tau": 0.0, "grace_steps": 0, "statistic": statistic, "weight_decay": 0.0, **options}
    opt, losses = GradESAdamW([("w", w)], **own), []
    for _ in range(steps):
        loss = 0.5 * (w - 1).square().sum()
        losses.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    return opt, losses


def test_gain_predicts_what_the_next_step_takes_from_the_loss():
    lr = 1e-4
    opt, losses = quadratic("gain", 12, lr=lr, betas=(0.5, 0.9))
    rows = dict(opt.report().history)
    for t in range(2, 11):
        assert losses[t - 1] - losses[t] == pytest.approx(lr * rows[t][0], rel=1e-3)


@pytest.mark.parametrize("maximize", [False, True])
def test_gain_of_noise_is_zero_within_its_standard_error(maximize):
    _, opt = monitored("gain", (64, 64), maximize=maximize)
    for g in noise(200, (64, 64)):
        feed(opt, g)
    values = [row[0] for _, row in opt.report().history]
    assert abs(sum(values)) / len(values) < 3 * standard_error(values)


def test_a_wrong_sign_of_the_gain_would_be_noticed():
    """Negative control: for maximize the same gradients gain as much, where noise would hide it."""
    for maximize in (False, True):
        assert observe("gain", [SLOPE] * 3, maximize=maximize)[-1] > 0


def test_a_negative_gain_freezes_where_tau_is_positive_alone():
    for tau, frozen in ((0.0, []), (1e-6, ["w"])):
        _, opt = monitored("gain", (3, 4), tau=tau, stop_grad=False)
        for g in (SLOPE, -0.01 * SLOPE):
            feed(opt, g.clone())
        assert opt.report().history[-1][1][0] < 0 and opt.frozen_units == frozen
        copied = copy.deepcopy(opt)
        copied.load_state_dict(copy.deepcopy(opt.state_dict()))
        for one in (opt, copied):  # -1 in the state is "not known yet"
            assert one.statistics() == {"w": 0.0}
            assert [event.statistic for event in one.freeze_events] == [0.0] * len(frozen)


def test_the_mean_gain_leaves_out_checks_after_a_freeze():
    """A frozen unit is measured no more, which is no gain of 0."""
    named = [(f"layers.{k}.up_proj.weight", torch.nn.Parameter(torch.zeros(3, 4))) for k in (0, 1)]
    opt = GradESAdamW(named, statistic="gain", tau=0.0, grace_steps=0, stop_grad=False)

    def mean():
        return float(str(opt.report()).split('Mean "gain"')[1].split("up_proj")[1].split()[0])

    for step in range(8):
        if step == 4:
            before = mean()
            opt._freezer.table.units[0].decide(4, 0.0)
        feed(opt, SLOPE.clone(), SLOPE.clone())
    assert opt.frozen_units == ["layers.0.up_proj.weight"]
    assert mean() == pytest.approx(before, rel=0.5)


def test_the_report_shows_the_mean_gain_and_its_standard_error():
    _, opt = monitored("gain", (8, 8))
    for g in noise(9, (8, 8)):
        feed(opt, g)
    values = [row[0] for _, row in opt.report().history]
    table = str(opt.report()).split('Mean "gain"')[1].split()
    assert f"{sum(values) / 8:.4g}" in table and f"{standard_error(values):.2g}" in table
    _, other = monitored("norm", (8, 8))
    feed(other, 1.0)
    assert 'Mean "gain"' not in str(other.report())


def test_monitor_all_makes_a_unit_of_every_floating_tensor():
    model = torch.nn.ModuleDict({
        "embed": torch.nn.Embedding(5, 4), "layers": torch.nn.ModuleList([torch.nn.Linear(4, 4)]),
        "norm": torch.nn.LayerNorm(4), "lm_head": torch.nn.Linear(4, 5, bias=False),
    })  # fmt: skip
    names = [name for name, _ in model.named_parameters()]
    group = {"params": list(model.named_parameters()), "tau": 0.0, "statistic": "gain"}
    opt = GradESAdamW([{**group, "monitor_all": True}], grace_steps=0)
    for _ in range(2):
        feed(opt, *[1.0] * len(names))
    assert opt.monitored_units == names and all(map(math.isfinite, opt.statistics().values()))
    opt.param_groups[0]["monitor_all"] = False
    opt.step()
    assert opt.monitored_units == ["layers.0.weight"]
    assert GradESAdamW([group], grace_steps=0).monitored_units == ["layers.0.weight"]


def test_the_functional_form_refuses_weight_change_before_the_update():
    unit = Unit("w", "weight_change", 1.0, 4)
    columns = [[torch.zeros(2, 2)] for _ in range(4)]
    table = FreezeTable(FreezeConfig(grace_steps=0), [unit])
    hyper = {"beta1": 0.9, "beta2": 0.999, "lr": 0.1, "weight_decay": 0.0, "eps": 1e-8}
    flags = {"amsgrad": False, "maximize": False}
    with pytest.raises(ValueError, match=r"unit 'w' measures 'weight_change'.*next_step"):
        grades_adamw(*columns, [], [torch.tensor(0.0)], units=[unit], table=table, **hyper, **flags)
    for other in (FreezeTable(FreezeConfig(grace_steps=0)), None):
        with pytest.raises(ValueError, match="unit 'w' is no row of the table"):
            step = torch.tensor(0.0)
            grades_adamw(*columns, [], [step], units=[unit], table=other, **hyper, **flags)


def test_every_statistic_has_the_code_of_its_position():
    codes = [statistic.code for statistic in STATISTICS.values()]
    assert codes == list(range(1, len(STATISTICS) + 1))


def test_sums_are_fp32_where_the_device_has_no_fp64():
    """As on Apple's GPUs, which refuse it."""

    class OfDevice:
        def __init__(self, kind):
            self.device = torch.device(kind)

        def sum(self, dtype):
            return dtype

    assert reference._sum(OfDevice("mps")) == torch.float32
    assert reference._sum(OfDevice("cuda")) == torch.float64


def test_a_tensor_that_is_not_measured_has_sums_of_zero(backend):
    """A check of its unit is void, whatever else is done to it."""
    params = [torch.nn.Parameter(torch.ones(3, 5)) for _ in range(3)]
    opt = GradESAdamW(params, tau=0.0, grace_steps=0, statistic="norm", fused=FUSED[backend])
    feed(opt, 2.0, 2.0, 2.0)
    [engine] = opt._freezer.engines
    assert engine.is_valid(opt.param_groups, opt.state, opt._freezer.table)
    tasks = [UPDATE, UPDATE | STATISTICS["norm"].code, 0]
    with torch.no_grad():
        sums = engine.run_tasks(engine.tensors, tasks, [1.0] * 3, None)
    assert sums.tolist() == [[0.0] * 3, [30.0, 0.0, 30.0], [0.0] * 3]
