"""The statistics beyond the paper's: "signal" and its noise floor, tau="auto", "weight_change".

What each measures is compared with an independent implementation in test_oracle.py.
"""

import math

import pytest
import torch
from harness import feed

from grades_kernels import GradESAdamW, grades_adamw
from grades_kernels.backends.tasks import STATISTIC_CODES
from grades_kernels.freezing.statistics import STATISTICS
from grades_kernels.freezing.table import FreezeConfig, FreezeTable, Unit

NEXT_STEP = {"freeze_timing": "next_step"}


def noise_floor(beta1):
    """The mean of |m| / sqrt(v) for normal gradients and a second moment that has converged."""
    return math.sqrt(2 / math.pi * (1 - beta1) / (1 + beta1))


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
def test_signal_of_a_constant_gradient_is_one(betas):
    gradient = torch.linspace(-3, 5, 12).reshape(3, 4)
    seen = observe("signal", [gradient] * 6, betas=betas)
    assert math.isnan(seen[0])  # no moment yet
    assert seen[1:] == pytest.approx([1.0] * 5, rel=1e-5)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_signal_of_noise_is_the_noise_floor(beta1, scale):
    gradients = [scale * g for g in noise(150)]
    seen = observe("signal", gradients, betas=(beta1, 0.999), eps=1e-30)
    # 4096 elements of a normal variable: the standard error of the mean is about 1 %.
    assert sum(seen[-20:]) / 20 == pytest.approx(noise_floor(beta1), rel=0.03)


def test_noise_floor_is_018_for_the_default_beta():
    assert noise_floor(0.9) == pytest.approx(0.183, abs=5e-4)


def test_signal_is_not_divided_by_the_number_of_elements():
    gradients = noise(5)
    assert observe("signal", gradients, tau_per="element") == pytest.approx(
        observe("signal", gradients), nan_ok=True
    )


def test_auto_freezes_noise_and_keeps_what_still_learns():
    torch.manual_seed(0)
    w = torch.nn.ParameterDict({n: torch.nn.Parameter(torch.zeros(32, 32)) for n in ("a", "b")})
    opt = GradESAdamW(
        w.named_parameters(), statistic="signal", tau="auto", grace_steps=30, stop_grad=False
    )
    drift = torch.randn(32, 32)
    for _ in range(120):
        w["a"].grad = torch.randn(32, 32)
        w["b"].grad = torch.randn(32, 32) + drift
        opt.step()
    assert opt.frozen_units == ["a"]
    assert opt.freeze_events[0].tau == pytest.approx(1.1 * noise_floor(0.9))


def test_auto_follows_beta1():
    # new behaviour: a reading shows a changed group after the next step
    _, opt = monitored("signal", tau="auto")
    for beta1 in (0.9, 0.5):
        opt.param_groups[0]["betas"] = (beta1, 0.999)
        feed(opt, 1.0)
        assert opt.report().units[0].tau == pytest.approx(1.1 * noise_floor(beta1))


@pytest.mark.parametrize("statistic", ["change", "norm", "momentum", "weight_change"])
def test_auto_needs_signal(statistic):
    with pytest.raises(ValueError, match=r"tau='auto' needs statistic='signal'.*tau=0\.0"):
        monitored(statistic, tau="auto", **NEXT_STEP)


def test_weight_change_is_what_the_update_moved():
    w, opt = monitored("weight_change", (8, 8), lr=0.01, **NEXT_STEP)
    for g in noise(4, (8, 8)):
        before = w.detach().clone()
        feed(opt, g)
        moved = (w.detach().double() - before.double()).abs().sum().item()
        assert opt.statistics()["w"] == pytest.approx(moved, rel=1e-6)


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
    assert opt.statistics()["w"] != pytest.approx(1.0, rel=1e-5)


def test_the_functional_form_refuses_weight_change_before_the_update():
    unit = Unit("w", "weight_change", 1.0, 4)
    columns = [[torch.zeros(2, 2)] for _ in range(4)]
    table = FreezeTable(FreezeConfig(grace_steps=0), [unit])
    hyper = {"beta1": 0.9, "beta2": 0.999, "lr": 0.1, "weight_decay": 0.0, "eps": 1e-8}
    flags = {"amsgrad": False, "maximize": False}
    with pytest.raises(ValueError, match=r"unit 'w' measures 'weight_change'.*next_step"):
        grades_adamw(*columns, [], [torch.tensor(0.0)], units=[unit], table=table, **hyper, **flags)


def test_every_statistic_has_the_code_of_its_position():
    assert list(STATISTIC_CODES) == list(STATISTICS)
    assert list(STATISTIC_CODES.values()) == list(range(1, len(STATISTICS) + 1))
