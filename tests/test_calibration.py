"""`calibrate`: the thresholds freeze, in a run of the same gradients, exactly what is forecast.

Small cases are worked out by hand; the whole way from an observing run through
`grades_param_groups(taus=...)` to the frozen share is compared with real runs.
"""

import math
import re
import sys
from dataclasses import replace

import pytest
import torch

from grades_kernels import FreezeReport, GradESAdamW, grades_param_groups
from grades_kernels.calibration import calibrate
from grades_kernels.report import UnitReport

NAN = math.nan


def observed(rows, kinds=("q_proj", "q_proj", "v_proj", "v_proj"), criterion="change"):
    """A report of an observing run: `{step: statistics}`."""
    units = tuple(
        UnitReport(
            f"layers.{k}.self_attn.{kind}.weight", k, kind, 4, criterion, 0.0, NAN, 0, -1, -1
        )
        for k, kind in enumerate(kinds)
    )
    last = max(rows, default=0)
    return FreezeReport(
        last, None, 0, units, (), tuple(rows.items()), 4 * len(units), backend="reference"
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
def test_by_hand(arguments, taus):
    result = calibrate(observed(FALLING), **arguments)
    assert result.taus == pytest.approx({r"\bq_proj\b": taus[0], r"\bv_proj\b": taus[1]})


def test_one_tau_for_all():
    result = calibrate(observed(FALLING), share=0.75, per="all")
    assert result.taus == pytest.approx({".": math.sqrt(30 * 70)})
    assert result.curves == {"all": (2.0, 3.0, 30.0, 70.0)}
    assert result.forecast == ((1, 0.5), (2, 0.75), (3, 0.75), (4, 0.75))


def test_one_tau_per_unit():
    """Each unit freezes at the same fraction of its own median: 2/4.5, 3/6.5, 30/50, 70/80."""
    result = calibrate(observed(FALLING), share=0.5, per="unit")
    fraction = math.sqrt(3 / 6.5 * 30 / 50)
    names = [f"^layers\\.{k}\\.self_attn\\.{kind}_proj\\.weight$" for k, kind in enumerate("qqvv")]
    expected = [fraction * scale for scale in (4.5, 6.5, 50, 80)]
    assert result.taus == pytest.approx(dict(zip(names, expected, strict=True)))
    assert result.forecast[-1] == (4, 0.5)
    assert "Thresholds by kind" in str(result)


def test_equal_statistics_freeze_together():
    """Between equal values there is no room: tau lies above them, by as little as there is."""
    result = calibrate(observed({1: (2.0, 2.0, 0.0, 0.0)}), share=0.5)
    assert list(result.taus.values()) == [math.nextafter(2.0, 3), math.nextafter(0.0, 1)]
    assert result.forecast == ((1, 1.0),)


def test_a_kind_that_is_part_of_another_gets_exact_names():
    """ "c_proj" would also find "attn.c_proj"; the patterns part the units nonetheless."""
    report = observed({1: (1.0, 2.0)}, kinds=("c_proj", "attn.c_proj"))
    patterns = list(calibrate(report).taus)
    for pattern, unit in zip(patterns, report.units, strict=True):
        assert [u.name for u in report.units if re.search(pattern, u.name)] == [unit.name]


class Model(torch.nn.Module):
    """Six blocks of two kinds, with an embedding that nothing monitors."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(3, 4)
        block = lambda: torch.nn.ModuleDict(  # noqa: E731
            {"q_proj": torch.nn.Linear(4, 4), "up_proj": torch.nn.Linear(4, 9)}
        )
        self.layers = torch.nn.ModuleList(block() for _ in range(6))


def run(steps, tau=0.0, taus=None, **options):
    """Train on gradients that depend on nothing but the seed."""
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
def test_a_real_run_freezes_what_is_forecast(share, by_step, patience, check_every, statistic, per):
    """The share at every check equals the forecast; by the wanted step it is the wanted one.

    Per kind the share holds within each kind.
    """
    options = {"grace_steps": 4, "check_every": check_every, "statistic": statistic}
    report, _ = run(40, **options)
    result = calibrate(report, share, by_step, per=per, patience=patience)
    later, shares = run(40, taus=result.taus, patience=patience, **options)
    assert dict(result.forecast) == {step: shares[step] for step, _ in result.forecast}
    assert shares[by_step] == pytest.approx(share)
    if per == "kind":
        for kind in ("q_proj", "up_proj"):
            frozen = [0 < unit.frozen_at <= by_step for unit in later.units if unit.kind == kind]
            assert sum(frozen) / len(frozen) == pytest.approx(share)


@pytest.mark.parametrize("wrong", ["lower taus", "more patience"])
def test_another_run_freezes_less(wrong):
    """Negative control: the comparison above notices other thresholds and another rule."""
    options = {"grace_steps": 4, "statistic": "norm"}
    result = calibrate(run(40, **options)[0], 0.5, 30, patience=2)
    factor, patience = (0.7, 2) if wrong == "lower taus" else (1.0, 6)
    taus = {pattern: factor * tau for pattern, tau in result.taus.items()}
    _, shares = run(30, taus=taus, patience=patience, **options)
    assert shares[30] < 0.5


def test_a_saved_report_calibrates_alike(tmp_path):
    report, _ = run(12, grace_steps=1)
    loaded = FreezeReport.load(report.save(tmp_path / "observed.json"))
    assert calibrate(loaded) == calibrate(report)


def test_text():
    """The curve as a table: one row per kind, the threshold of every share, the forecast."""
    text = str(calibrate(observed(FALLING), share=0.5))
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


def test_a_share_out_of_reach_is_shown_as_such():
    report = observed({1: (1.0, NAN), 2: (2.0, NAN)}, kinds=("q_proj", "q_proj"))
    result = calibrate(report, share=0.5)
    assert str(result).splitlines()[-1].split() == ["q_proj", "2", *["1.01"] * 3, *"---", "1.01"]
    with pytest.raises(ValueError, match=r"share=0\.6 cannot be reached: only 1 of 2 units of"):
        calibrate(report, share=0.6)


@pytest.mark.parametrize("per", ["kind", "unit", "all"])
def test_picture(tmp_path, per):
    pytest.importorskip("matplotlib")
    result = calibrate(observed(FALLING), per=per)
    path = result.plot(tmp_path / "new" / "curve")
    assert path == tmp_path / "new" / "curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'grades-kernels\[demo\]'"):
        calibrate(observed(FALLING)).plot(tmp_path / "curve.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0}, r"Invalid share: 0 \(must be a number in \(0, 1\]\)"),
        ({"share": 1.5}, "Invalid share: 1.5"),
        ({"share": NAN}, "Invalid share: nan"),
        ({"share": True}, "Invalid share: True"),
        ({"per": "layer"}, r"Invalid per: 'layer' \(choose one of 'kind', 'unit', 'all'\)"),
        ({"patience": 0}, "Invalid patience: 0"),
        ({"patience": 5}, "only 0 of 2 units of 'q_proj' have 5 measurements in steps 1 to 4"),
        ({"by_step": 5}, r"Invalid by_step: 5 \(the report's last measurement is of step 4"),
        ({"by_step": 0}, "no measurement in steps 1 to 0"),
        ({"grace_steps": 4}, "no measurement in steps 5 to 4"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(observed(FALLING), **arguments)


def test_reports_that_say_nothing():
    with pytest.raises(ValueError, match="the report has no monitored unit"):
        calibrate(observed({}, kinds=()))
    with pytest.raises(ValueError, match="no measurement in steps 1 to 0"):
        calibrate(observed({}))


def test_one_tau_for_two_statistics():
    """They share no scale; each unit by its own median does."""
    report = observed(FALLING)
    units = (replace(report.units[0], criterion="norm"), *report.units[1:])
    report = replace(report, units=units)
    with pytest.raises(ValueError, match=r"'q_proj' has units of different statistics.*per='unit'"):
        calibrate(report)
    assert calibrate(report, per="unit").criterion == "norm/change"
