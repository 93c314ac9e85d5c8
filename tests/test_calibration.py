"""`calibrate`: in a run of the same gradients, the thresholds freeze the forecast share.

Small cases are calculated by hand; others are compared with real runs, from an observing run
through `grades_param_groups(taus=...)` to the frozen share.
"""

import math
import re
from dataclasses import replace

import pytest
import reports
import torch
from reports import NAN

from grades_kernels import GradESAdamW, calibrate, grades_param_groups


def observed(rows, kinds=("q_proj", "q_proj", "v_proj", "v_proj")):
    """A report of an observing run: `{step: statistics}`."""
    units = [
        reports.unit(f"layers.{k}.self_attn.{kind}.weight", layer=k, kind=kind, n=4, tau=0.0)
        for k, kind in enumerate(kinds)
    ]
    return reports.report(
        units, history=rows.items(), step=max(rows, default=0), total=None, grace=0
    )


FALLING = {
    1: (8.0, 9.0, 80.0, NAN),
    2: (4.0, 7.0, 40.0, 90.0),
    3: (5.0, 3.0, 60.0, NAN),
    4: (2.0, 6.0, 30.0, 70.0),
}


@pytest.mark.parametrize(
    ("arguments", "taus"),
    [
        # The least statistics are 2 and 3, 30 and 70.
        ({"share": 0.5}, (math.sqrt(2 * 3), math.sqrt(30 * 70))),
        ({"share": 1.0}, (3 * 1.01, 70 * 1.01)),
        ({"share": 0.01}, (math.sqrt(2 * 3), math.sqrt(30 * 70))),
        # The least of max(neighbours): min(8, 5, 5) = 5 and min(9, 7, 6) = 6; 60, and 90 (void
        # checks do not count).
        ({"share": 0.5, "patience": 2}, (math.sqrt(5 * 6), math.sqrt(60 * 90))),
        ({"share": 0.5, "by_step": 2}, (math.sqrt(4 * 7), math.sqrt(40 * 90))),
        ({"share": 1.0, "grace_steps": 3}, (6 * 1.01, 70 * 1.01)),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_thresholds_by_hand(arguments, taus):
    result = calibrate(observed(FALLING), **{"grace_steps": 0, **arguments})
    assert result.taus == pytest.approx({r"\bq_proj\b": taus[0], r"\bv_proj\b": taus[1]})


@pytest.mark.parametrize("per", ["kind", "unit", "all"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_negative_statistic_counts_as_zero(per, share):
    """As in a check: "gain" may be negative, a threshold may not."""
    rows = {t: (-8.0, 2.0 - t, 3.0, -1.0) for t in range(1, 5)}
    result = calibrate(observed(rows), share=share, per=per)
    assert all(0 < tau < 4 for tau in result.taus.values())
    assert result.forecast[-1][1] >= share


def test_by_default_the_second_half_counts():
    """In the first half, by default the grace period of the run to come, nothing freezes."""
    late = calibrate(observed(FALLING), share=0.5)
    assert late.taus == calibrate(observed(FALLING), share=0.5, grace_steps=2).taus
    assert [step for step, _ in late.forecast] == [3, 4]
    earlier = calibrate(observed(FALLING), by_step=2)
    assert earlier.taus == calibrate(observed(FALLING), by_step=2, grace_steps=1).taus


def test_per_all_gives_one_tau():
    result = calibrate(observed(FALLING), share=0.75, per="all", grace_steps=0)
    assert result.taus == pytest.approx({".": math.sqrt(30 * 70)})
    assert result.curves == {"all": (2.0, 3.0, 30.0, 70.0)}
    assert result.forecast == ((1, 0.5), (2, 0.75), (3, 0.75), (4, 0.75))


def test_per_unit_gives_the_same_fraction_of_each_median():
    """The critical values relative to the medians are 2/4.5, 3/6.5, 30/50 and 70/80."""
    result = calibrate(observed(FALLING), share=0.5, per="unit", grace_steps=0)
    fraction = math.sqrt(3 / 6.5 * 30 / 50)
    names = [f"^layers\\.{k}\\.self_attn\\.{kind}_proj\\.weight$" for k, kind in enumerate("qqvv")]
    expected = [fraction * scale for scale in (4.5, 6.5, 50, 80)]
    assert result.taus == pytest.approx(dict(zip(names, expected, strict=True)))
    assert result.forecast[-1] == (4, 0.5)
    text = str(result)
    assert text.startswith("To freeze 50% of all units by step 4 (patience 1)")
    kinds = text.partition("Thresholds by kind")[2].splitlines()[3:]
    assert [line.split() for line in kinds] == [
        ["q_proj", "2", "2.368..3.421"],
        ["v_proj", "2", "26.31..42.1"],
    ]


def test_equal_statistics_freeze_together():
    """tau is the next number above equal values."""
    result = calibrate(observed({1: (2.0, 2.0, 0.0, 0.0)}), share=0.5)
    assert list(result.taus.values()) == [math.nextafter(2.0, 3), math.nextafter(0.0, 1)]
    assert result.forecast == ((1, 1.0),)


def test_a_kind_that_is_part_of_another_gets_exact_names():
    r"""`\bc_proj\b` would also match the units of kind "attn.c_proj"."""
    report = observed({1: (1.0, 2.0)}, kinds=("c_proj", "attn.c_proj"))
    patterns = list(calibrate(report).taus)
    for pattern, unit in zip(patterns, report.units, strict=True):
        assert [u.name for u in report.units if re.search(pattern, u.name)] == [unit.name]


class Model(torch.nn.Module):
    """Six blocks with two kinds of matrices, and an embedding that is not monitored."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(3, 4)
        block = lambda: torch.nn.ModuleDict(  # noqa: E731
            {"q_proj": torch.nn.Linear(4, 4), "up_proj": torch.nn.Linear(4, 9)}
        )
        self.layers = torch.nn.ModuleList(block() for _ in range(6))


def run(steps, tau=0.0, taus=None, **options):
    """Train on gradients that depend only on the seed."""
    torch.manual_seed(0)
    model = Model()
    optimizer = GradESAdamW(grades_param_groups(model, tau=tau, taus=taus), **options)
    decays = [0.8 + 0.19 * torch.rand(()).item() for _ in model.parameters()]
    shares = {}
    for t in range(steps):
        for p, decay in zip(model.parameters(), decays, strict=True):
            noise = torch.randn(p.shape)
            p.grad = (1 + decay**t) * noise if t % 7 != 3 else torch.zeros_like(p)
        optimizer.step()
        shares[t + 1] = len(optimizer.frozen_units) / len(optimizer.monitored_units)
    return optimizer.report(), shares


@pytest.mark.parametrize("per", ["kind", "unit", "all"])
@pytest.mark.parametrize(
    ("share", "by_step", "patience", "check_every", "statistic"),
    [
        (0.5, 40, 1, 1, "change"),
        (1 / 3, 25, 3, 1, "norm"),
        (2 / 3, 30, 2, 2, "momentum"),
        (1.0, 40, 2, 1, "signal"),
    ],
)
def test_a_real_run_freezes_as_forecast(share, by_step, patience, check_every, statistic, per):
    """The share at every check equals the forecast, and the wanted share is frozen by `by_step`.

    With `per="kind"` the wanted share of each kind is frozen.
    """
    options = {"grace_steps": 4, "check_every": check_every, "statistic": statistic}
    report, _ = run(40, **options)
    result = calibrate(report, share, by_step, per=per, patience=patience, grace_steps=4)
    later, shares = run(40, taus=result.taus, patience=patience, **options)
    assert dict(result.forecast) == {step: shares[step] for step, _ in result.forecast}
    assert shares[by_step] == pytest.approx(share)
    if per == "kind":
        for kind in ("q_proj", "up_proj"):
            frozen = [0 < unit.frozen_at <= by_step for unit in later.units if unit.kind == kind]
            assert sum(frozen) / len(frozen) == pytest.approx(share)


@pytest.mark.parametrize("wrong", ["lower taus", "more patience"])
def test_lower_taus_or_more_patience_freeze_less(wrong):
    """Negative control of the comparison above."""
    options = {"grace_steps": 4, "statistic": "norm"}
    result = calibrate(run(40, **options)[0], 0.5, 30, patience=2, grace_steps=4)
    factor, patience = (0.7, 2) if wrong == "lower taus" else (1.0, 6)
    taus = {pattern: factor * tau for pattern, tau in result.taus.items()}
    _, shares = run(30, taus=taus, patience=patience, **options)
    assert shares[30] < 0.5


def test_text_has_the_forecast_and_the_threshold_of_every_share():
    text = str(calibrate(observed(FALLING), share=0.5, grace_steps=0))
    assert text.splitlines() == [
        "To freeze 50% of every kind of matrix by step 4 (patience 1)",
        "This would have frozen 50% of all units: 25% by step 2, 50% by step 4",
        "",
        'tau of "change" that freezes a share of the units',
        "kind    units    10%    25%    50%   75%   90%  100%    tau",
        "------  -----  -----  -----  -----  ----  ----  ----  -----",
        "q_proj      2  2.449  2.449  2.449  3.03  3.03  3.03  2.449",
        "v_proj      2  45.83  45.83  45.83  70.7  70.7  70.7  45.83",
    ]


def test_an_unreachable_share_is_a_dash_in_the_text_and_an_error_as_an_argument():
    report = observed({1: (1.0, NAN), 2: (2.0, NAN)}, kinds=("q_proj", "q_proj"))
    result = calibrate(report, share=0.5, grace_steps=0)
    assert str(result).splitlines()[-1].split() == ["q_proj", "2", *["1.01"] * 3, *"---", "1.01"]
    with pytest.raises(ValueError, match=r"share=0\.6 cannot be reached: only 1 of 2 units of"):
        calibrate(report, share=0.6, grace_steps=0)


@pytest.mark.parametrize("per", ["kind", "unit", "all"])
def test_plot_writes_a_picture(tmp_path, per):
    pytest.importorskip("matplotlib")
    result = calibrate(observed(FALLING), per=per)
    path = result.plot(tmp_path / "new" / "curve")
    assert path == tmp_path / "new" / "curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0}, r"Invalid share: 0 \(must be a number in \(0, 1\]\)"),
        ({"share": 1.5}, "Invalid share: 1.5"),
        ({"share": NAN}, "Invalid share: nan"),
        ({"share": True}, "Invalid share: True"),
        ({"per": "layer"}, r"Invalid per: 'layer' \(choose one of 'kind', 'unit', 'all'\)"),
        ({"patience": 0}, "Invalid patience: 0"),
        ({"patience": 5}, "only 0 of 2 units of 'q_proj' have 5 measurements in steps 3 to 4"),
        ({"by_step": "3"}, r"Invalid by_step: '3' \(must be an integer of at least 0"),
        ({"grace_steps": 0.5}, r"Invalid grace_steps: 0.5 \(must be an integer of at least 0"),
        ({"by_step": 5}, r"Invalid by_step: 5 \(the report's last measurement is of step 4"),
        ({"by_step": 0}, "no measurement in steps 1 to 0"),
        ({"grace_steps": 4}, "no measurement in steps 5 to 4"),
        ({"report": observed({}, kinds=())}, "the report has no monitored unit"),
        ({"report": observed({})}, "the report has no measurement: observe with tau=0.0"),
    ],
)
def test_errors_state_the_argument_or_the_missing_measurements(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(**{"report": observed(FALLING), **arguments})


def test_the_optimizer_in_place_of_its_report_is_an_error():
    with pytest.raises(TypeError, match=r"pass optimizer.report\(\)"):
        calibrate(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))


def test_units_of_two_statistics_need_a_tau_per_unit():
    report = observed(FALLING)
    units = (replace(report.units[0], criterion="norm"), *report.units[1:])
    report = replace(report, units=units)
    with pytest.raises(ValueError, match=r"'q_proj' has units of different statistics.*per='unit'"):
        calibrate(report)
    assert calibrate(report, per="unit").criterion == "norm/change"
