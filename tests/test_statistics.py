"""The statistics beyond the paper's: "signal" and its noise floor, tau="auto", "weight_change".

What each measures is compared with an independent implementation in test_oracle.py.
"""

import math

import pytest
import torch

from grades_kernels import GradESAdamW
from grades_kernels.freezing import noise_floor


def observe(statistic, gradients, *, lr=0.0, **options):
    """Statistics of one matrix that gets these gradients, one list entry per step."""
    w = torch.nn.Parameter(torch.ones(gradients[0].shape))
    opt = GradESAdamW(
        [("w", w)], lr, tau=options.pop("tau", 0.0), grace_steps=0, statistic=statistic, **options
    )
    seen = []
    for g in gradients:
        w.grad = g.clone()
        opt.step()
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
    w = torch.nn.Parameter(torch.zeros(4, 4))
    opt = GradESAdamW([("w", w)], statistic="signal", tau="auto", grace_steps=0)
    assert opt.report().units[0].tau == pytest.approx(1.1 * noise_floor(0.9))
    opt.param_groups[0]["betas"] = (0.5, 0.999)
    assert opt.report().units[0].tau == pytest.approx(1.1 * noise_floor(0.5))


@pytest.mark.parametrize("statistic", ["change", "norm", "momentum", "weight_change"])
def test_auto_needs_signal(statistic):
    with pytest.raises(ValueError, match=r"tau='auto' needs statistic='signal'.*tau=0\.0"):
        observe(statistic, noise(1), tau="auto", freeze_timing="next_step")


def test_weight_change_is_what_the_update_moved():
    w = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    opt = GradESAdamW(
        [("w", w)],
        lr=0.01,
        tau=0.0,
        grace_steps=0,
        statistic="weight_change",
        freeze_timing="next_step",
    )
    for g in noise(4, (8, 8)):
        before = w.detach().clone()
        w.grad = g
        opt.step()
        moved = (w.detach().double() - before.double()).abs().sum().item()
        assert opt.statistics()["w"] == pytest.approx(moved, rel=1e-6)


def test_weight_change_of_zero_is_no_evidence():
    """A learning rate of zero, the first step of a warm-up, says nothing about convergence."""
    seen = observe("weight_change", noise(3), lr=0.0, tau=1e9, freeze_timing="next_step")
    assert all(map(math.isnan, seen))


def test_weight_change_needs_next_step():
    with pytest.raises(ValueError, match="needs freeze_timing='next_step'"):
        observe("weight_change", noise(1))
    w = torch.nn.Parameter(torch.zeros(4, 4))
    opt = GradESAdamW([("w", w)], tau=0.0, grace_steps=0)
    with pytest.raises(ValueError, match="needs freeze_timing='next_step'"):
        opt.add_param_group(
            {"params": [("v", torch.nn.Parameter(torch.zeros(4, 4)))], "statistic": "weight_change"}
        )


def test_a_wrong_bias_correction_would_be_noticed(monkeypatch):
    """Negative control: without the corrections a constant gradient is not 1."""
    import grades_kernels.reference as reference

    wrong = {"sqrt": staticmethod(lambda x: 1.0), "inf": math.inf, "nan": math.nan}
    monkeypatch.setattr(reference, "math", type("", (), wrong))
    seen = observe("signal", [torch.ones(3, 4)] * 3, fused=False)
    assert seen[1:] != pytest.approx([1.0] * 2, rel=1e-5)


def test_the_functional_form_refuses_weight_change_before_the_update():
    from grades_kernels import grades_adamw
    from grades_kernels.freezing import FreezeRule, FreezeTable, Unit

    unit = Unit("w", "weight_change", 1.0, 4)
    columns = [[torch.zeros(2, 2)] for _ in range(4)]
    with pytest.raises(ValueError, match=r"unit 'w' measures 'weight_change'.*next_step"):
        grades_adamw(
            *columns,
            [],
            [torch.tensor(0.0)],
            units=[unit],
            table=FreezeTable(FreezeRule(grace_steps=0), [unit]),
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=0.1,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
