"""The demo: text, runs, comparison and files; most tests read the results of one tiny job."""

import itertools
import json
import math
import sys
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from grades_kernels import FreezeReport, GradESAdamW
from grades_kernels.demo import job as demo
from grades_kernels.demo.model import Plan, Transformer, read_library
from grades_kernels.demo.output import compare
from grades_kernels.demo.run import Run, stop_early

TINY = Plan(
    steps=80, pretraining=0.5, dim=32, layers=2, heads=2, hidden=64, batch=4, length=32, windows=16
)


def run_job(plan, out):
    """A finished job, its runs by name, and its report read from the file."""
    result = demo.run_demo(plan, out)
    runs = {run["name"]: run for run in result["runs"]}
    report = FreezeReport.load(out / "report.json")
    return SimpleNamespace(plan=plan, out=out, result=result, runs=runs, report=report)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return run_job(TINY, tmp_path_factory.mktemp("job") / "new" / "folder")


def a_run(seconds=1.0, steps=100, planned=100, loss=1.0, frozen=None, n_units=0):
    run = Run("run", planned, n_units=n_units)
    run.step_seconds = [seconds] * steps
    run.frozen = frozen or [0] * steps
    run.validations = [(0, 0.0, 2.0), (steps, seconds * steps, loss)]
    return run


def test_the_job_writes_its_results_and_freezes_matrices_at_different_steps(job):
    assert json.loads((job.out / "runs.json").read_text()) == json.loads(json.dumps(job.result))
    for picture in ("report.png", "runs.png"):
        assert (job.out / picture).read_bytes().startswith(b"\x89PNG")
    assert job.report.total_steps == job.plan.steps and len(job.report.units) == 14
    assert len({event.decided_at for event in job.report.events}) >= 3


def test_runs_start_alike_and_see_the_same_batches(job):
    _, full, early, grades, same_steps = job.runs.values()
    assert early["losses"] == full["losses"][: early["steps"]]
    first = min(event.decided_at for event in job.report.events)
    # Equal up to rounding: the native op has not all bits of torch's AdamW.
    assert grades["losses"][:first] == pytest.approx(full["losses"][:first], rel=1e-4)
    assert grades["losses"] != full["losses"][: grades["steps"]]
    assert same_steps["planned"] == same_steps["steps"] == grades["steps"]
    assert len({run["validations"][0][2] for run in (full, early, grades, same_steps)}) == 1
    assert [step for step, _, _ in full["validations"]] == list(range(0, 81, 4))  # every 5 %


def test_the_plan_determines_the_report(job, tmp_path, without_plots):
    assert run_job(TINY, tmp_path / "again").report == job.report


def test_tau_follows_the_rule_in_the_output(job):
    grace, steps = job.plan.grace, job.plan.steps
    rows = [row for step, row in job.report.history if step <= grace]
    assert len(rows) == grace - grace // 2
    columns = zip(job.report.units, zip(*rows, strict=True), strict=True)
    typical = {unit.name: median(column) for unit, column in columns}
    assert job.result["typical"] == typical
    measured = [event for event in job.report.events if math.isfinite(event.statistic)]
    for event in measured:
        assert event.decided_at > grace
        assert event.step == event.decided_at + job.plan.cooldown
        # set after the step before; a run this short raises it at every step
        expected = typical[event.unit] * (0.85 + (event.decided_at - 1 - grace) / steps)
        assert event.tau == pytest.approx(expected)
    assert len({round(event.tau / typical[event.unit], 6) for event in measured}) > 1


def test_too_few_steps_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"steps=59 must be 60 or more"):
        demo.run_demo(replace(TINY, steps=59), tmp_path)


@pytest.mark.parametrize("module", ["rich.console", "matplotlib"])
def test_a_missing_package_is_an_error(module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'grades-kernels\[demo\]'"):
        demo.run_demo(TINY, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_model_is_causal_and_its_matrices_are_monitored():
    torch.manual_seed(0)
    model = Transformer(TINY)
    tokens = torch.randint(256, (2, TINY.length))
    changed = tokens.clone()
    changed[:, 20] += 1
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])
    optimizer = GradESAdamW(demo.make_groups(model), tau=0.0, grace_steps=1)
    kinds = [f"attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    expected = [f"layers.{i}.{kind}.weight" for i in range(2) for kind in kinds]
    assert sorted(optimizer.monitored_units) == sorted(expected)


def test_the_text_is_read_in_a_fixed_order(tmp_path):
    for i in reversed(range(9)):
        (tmp_path / f"m{i}.py").write_text(str(i) * 10_000)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "inside.py").write_text("not in the modules")
    text = read_library("modules", tmp_path)
    assert text.held_out.numpy().tobytes() == b"0" * 10_000 + b"8" * 10_000
    assert text.training.numpy().tobytes() == b"".join(b"%d" % i * 10_000 for i in range(1, 8))


def test_modules_and_packages_are_separate_and_required(tmp_path):
    for part in ("modules", "packages"):
        whole = torch.cat(read_library(part)).numpy().tobytes()
        assert (b"class JSONDecoder" in whole) == (part == "packages")
    with pytest.raises(FileNotFoundError, match=r"too little source .* \(0 files for 'packages'\)"):
        read_library("packages", tmp_path)


def test_validation_does_not_count_as_training_time(monkeypatch):
    """The clock advances by 1 s per reading, so every measured interval is 1 s."""
    ticks = itertools.count()
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(ticks)))
    model = Transformer(TINY)
    optimizer = torch.optim.AdamW(model.parameters())
    text = read_library("modules")
    run = demo.train(Run("run", 8), model, optimizer, text, TINY, Console(quiet=True))
    assert run.step_seconds == [1.0] * 8
    assert run.validation_seconds == len(run.validations) == 3  # before, after 4 and after 8 steps
    assert [seconds for _, seconds, _ in run.validations] == [0.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([1.0, 1.0, 1.0], False),  # two without gain
        ([1.0, 1.0, 1.0, 1.0], True),  # three
        ([1.0, 0.9996, 0.9992, 0.9988], False),  # every second one gains
        ([1.0, 0.9996, 0.9996, 0.9996], True),  # gains below delta
        ([1.0, 1.1, 1.1, 0.9, 1.0, 1.0], False),  # a gain resets the count
        ([1.0, 1.1, 1.1, 0.9, 1.0, 1.0, 0.8999], True),
    ],
)
def test_early_stopping_counts_validations_without_gain(losses, stops):
    run = Run("run", 100)
    run.validations = [(0, 0.0, 0.5)]  # precedes the training and does not count
    run.validations += [(5 * i, 0.0, loss) for i, loss in enumerate(losses, 1)]
    assert stop_early(run) == ("stopped early" if stops else None)


def test_step_times_before_and_after_freezing():
    run = Run("run", 12, n_units=4)
    run.step_seconds = [0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.4, 0.4, 0.2, 0.3, 0.1]
    run.frozen = [0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 4, 4]
    assert run.unfrozen_ms() == pytest.approx(500)  # steps 4 to 6
    assert run.frozen_ms() == pytest.approx(200)  # 10 to 12, after 2, 3 and 4 had frozen
    assert a_run().frozen_ms() is None


def labels(sentences):
    return [sentence.split(":")[0] for sentence in sentences]


def test_comparison_when_freezing_gains():
    frozen = [0] * 40 + [5] * 20
    grades = a_run(steps=60, loss=0.99, seconds=0.9, frozen=frozen, n_units=10)
    result = compare(a_run(), a_run(), grades, a_run(steps=60, planned=60))
    assert len(result.paid) == 5 and labels(result.did_not_pay) == ["Classic early stopping"]
    assert result.paid[:2] == [
        "Time in all: 54.0 s of training, AdamW 100.0 s: 1.85x, which is 1.67x by fewer steps "
        "times 1.11x per step.",
        "Stopping early: 60 of 100 steps, 1.67x fewer.",
    ]
    assert result.paid[2].startswith("Cheaper steps: 900.0 ms on average, AdamW 1000.0: 1.11x.")
    assert result.paid[-1] == (
        "Fair baseline: AdamW with its schedule planned for 60 steps ends at 1.0000, GradESAdamW, "
        "which did not know that number, at 0.9900 (-0.0100)."
    )


def test_comparison_when_freezing_loses():
    grades = a_run(loss=1.2, seconds=1.1, n_units=10)
    result = compare(a_run(), a_run(steps=50, loss=1.1), grades, a_run())
    assert result.paid == [] and len(result.did_not_pay) == 6
    assert "took 10.0% more time than AdamW's, the cost of measuring." in result.remark
    assert "(+0.2000)" in result.did_not_pay[-2]
    assert "50 of 100 steps, loss +0.1000" in result.did_not_pay[-1]


def test_a_gain_within_the_noise_does_not_count():
    """Two runs of equal steps differ by 20 %, so a step that is 10 % cheaper is no evidence."""
    grades = a_run(seconds=0.9, n_units=10)
    calm = compare(a_run(), a_run(), grades, a_run())
    noisy = compare(a_run(), a_run(seconds=1.2), grades, a_run())
    assert "Cheaper steps" in labels(calm.paid) and "Cheaper steps" in labels(noisy.did_not_pay)
    assert "20.0%" in noisy.remark and "trust the steps" in noisy.remark
    assert "trust the steps" not in calm.remark
    assert "took 10.0% less time than AdamW's, which is within that noise." in calm.remark
    slower = compare(a_run(), a_run(seconds=1.2), a_run(seconds=1.3, n_units=10), a_run())
    assert "took 30.0% more time than AdamW's, for which a busy machine may be" in slower.remark
    faster = compare(a_run(), a_run(), a_run(seconds=0.75, n_units=10), a_run())
    assert "25.0%" in faster.remark and "trust the steps" in faster.remark  # nothing was frozen


def test_losses_within_the_tolerance_count_as_equal():
    result = compare(a_run(), a_run(), a_run(loss=1.002, n_units=10), a_run())
    assert {"Quality", "Fair baseline"} <= set(labels(result.paid))
