"""The main job: deterministic text and events, honest comparison, results on disk.

One tiny job is run in this process and looked at from all sides. What it promises: the four runs
start from the same weights and see the same batches, so GradESAdamW equals AdamW bit for bit until
the first decision; validation is no training time; tau follows the rule that the output explains;
the same seed gives the same events; the verdict turns with the numbers.
"""

import builtins
import itertools
import json
import math
from dataclasses import replace
from statistics import median

import pytest
import torch

from grades_kernels import FreezeReport, GradESAdamW, demo, demo_output
from grades_kernels.demo import Plan, Run, Transformer

TINY = Plan(
    steps=80, pretraining=0.5, dim=32, layers=2, heads=2, hidden=64, batch=4, length=32, windows=16
)


class Job:
    """A finished job and what it left behind."""

    def __init__(self, plan, out):
        self.plan, self.out = plan, out
        self.result = demo.run_demo(plan, out)
        self.report = FreezeReport.load(out / "report.json")
        self.pretraining, self.full, self.early, self.grades, self.fair = self.result["runs"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return Job(TINY, tmp_path_factory.mktemp("job") / "new" / "folder")


def a_run(name="run", seconds=1.0, steps=100, planned=100, loss=1.0, frozen=None, n_units=0):
    run = Run(name, planned, n_units=n_units)
    run.step_seconds = [seconds] * steps
    run.frozen = frozen or [0] * steps
    run.validations = [(0, 0.0, 2.0), (steps, seconds * steps, loss)]
    return run


def as_bytes(text):
    return text.numpy().tobytes()


# The whole job


def test_files(job):
    assert json.loads((job.out / "runs.json").read_text()) == json.loads(json.dumps(job.result))
    for picture in ("report.png", "runs.png"):
        assert (job.out / picture).read_bytes().startswith(b"\x89PNG")
    assert job.report.total_steps == job.plan.steps


def test_matrices_freeze_one_by_one(job):
    steps = {event.decided_at for event in job.report.events}
    assert len(job.report.units) == 14
    assert len(steps) >= 3


def test_runs_are_comparable(job):
    assert job.early["losses"] == job.full["losses"][: job.early["steps"]]
    first = min(event.decided_at for event in job.report.events)
    # Equal up to rounding: the native op is not bit for bit what torch's AdamW computes.
    assert job.grades["losses"][:first] == pytest.approx(job.full["losses"][:first], rel=1e-4)
    assert job.grades["losses"] != job.full["losses"][: job.grades["steps"]]
    assert job.fair["planned"] == job.fair["steps"] == job.grades["steps"]
    assert len({run["validations"][0][2] for run in job.result["runs"][1:]}) == 1


def test_validation_every_5_percent(job):
    steps = [step for step, _, _ in job.full["validations"]]
    assert steps == list(range(0, 81, 4))


def test_same_seed_same_events(job, tmp_path):
    again = Job(job.plan, tmp_path / "again")
    assert again.report == job.report
    other = Job(replace(job.plan, seed=1), tmp_path / "other")
    assert other.report.events != job.report.events


def test_tau_follows_the_explained_rule(job):
    grace, steps = job.plan.grace, job.plan.steps
    rows = [row for step, row in job.report.history if step <= grace]
    assert len(rows) == grace - grace // 2
    typical = dict(
        zip(
            (unit.name for unit in job.report.units),
            map(median, zip(*rows, strict=True)),
            strict=True,
        )
    )
    assert job.result["typical"] == typical
    measured = [event for event in job.report.events if math.isfinite(event.statistic)]
    for event in measured:
        assert event.decided_at > grace
        assert event.step == event.decided_at + job.plan.cooldown
        # set after the step before; a run this short raises it at every step
        expected = typical[event.unit] * (0.85 + (event.decided_at - 1 - grace) / steps)
        assert event.tau == pytest.approx(expected)
    assert len({round(event.tau / typical[event.unit], 6) for event in measured}) > 1


def test_too_few_steps(tmp_path):
    with pytest.raises(ValueError, match=r"steps=59 must be 60 or more"):
        demo.run_demo(replace(TINY, steps=59), tmp_path)


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_package(package, monkeypatch, tmp_path):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'grades-kernels\[demo\]'"):
        demo.run_demo(TINY, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The model and its text


def test_model_is_causal_and_its_kinds_are_read_off():
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


def test_rotary_embedding_depends_on_distance_alone():
    rotary = Transformer(TINY).rotary
    query, key = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    queries = demo.rotate(query.expand(TINY.length, 16), rotary)
    keys = demo.rotate(key.expand(TINY.length, 16), rotary)
    scores = queries @ keys.T
    torch.testing.assert_close(scores[5, 2], scores[25, 22])
    assert not torch.isclose(scores[5, 2], scores[5, 3])


def test_text_is_read_in_a_fixed_order(tmp_path):
    for i in reversed(range(9)):
        (tmp_path / f"m{i}.py").write_text(str(i) * 10_000)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "inside.py").write_text("never in the modules")
    text = demo.read_library("modules", tmp_path)
    assert as_bytes(text.held_out) == b"0" * 10_000 + b"8" * 10_000
    assert as_bytes(text.training) == b"".join(b"%d" % i * 10_000 for i in range(1, 8))


def test_standard_library_is_there_in_two_parts():
    modules, packages = demo.read_library("modules"), demo.read_library("packages")
    assert torch.equal(modules.training, demo.read_library("modules").training)
    assert b"class JSONDecoder" not in as_bytes(torch.cat([modules.training, modules.held_out]))
    assert b"class JSONDecoder" in as_bytes(torch.cat([packages.training, packages.held_out]))


def test_missing_source_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"too little source .* \(0 files for 'packages'\)"):
        demo.read_library("packages", tmp_path)


# Parts of the training


def test_validation_is_no_training_time(monkeypatch):
    """On a clock that ticks once per reading every interval is 1 s, whoever measures it."""
    ticks = itertools.count()
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(ticks)))
    from rich.console import Console

    model = Transformer(TINY)
    optimizer = torch.optim.AdamW(model.parameters())
    text = demo.read_library("modules")
    run = demo.train(Run("run", 8), model, optimizer, text, TINY, Console(quiet=True))
    assert run.step_seconds == [1.0] * 8
    assert run.validation_seconds == len(run.validations) == 3  # before, after 4 and after 8 steps
    assert [seconds for _, seconds, _ in run.validations] == [0.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([1.0, 1.0, 1.0], False),
        ([1.0, 1.0, 1.0, 1.0], True),
        ([1.0, 0.9996, 0.9992, 0.9988], False),
        ([1.0, 0.9996, 0.9996, 0.9996], True),
        ([1.0, 1.1, 1.1, 0.9, 1.0, 1.0], False),
        ([1.0, 1.1, 1.1, 0.9, 1.0, 1.0, 0.8999], True),
    ],
    ids=["two-misses", "three-misses", "every-second-gains", "gain-below-delta", "reset", "again"],
)
def test_classic_early_stopping(losses, stops):
    run = Run("run", 100)
    run.validations = [(0, 0.0, 0.5)]  # before training: not compared with
    run.validations += [(5 * i, 0.0, loss) for i, loss in enumerate(losses, 1)]
    assert demo.stop_early(run) == ("stopped early" if stops else None)


def test_tau_rule():
    typical = {"a": 10.0, "b": 2.0}
    assert demo.taus_at(typical, 0.0) == {"a": 8.5, "b": 1.7}
    assert demo.taus_at(typical, 0.15) == {"a": 10.0, "b": 2.0}


def test_time_of_a_step_before_and_after_freezing():
    run = Run("run", 12, n_units=4)
    run.step_seconds = [0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.4, 0.4, 0.2, 0.3, 0.1]
    run.frozen = [0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 4, 4]
    assert run.unfrozen_ms() == pytest.approx(500)  # steps 4 to 6
    assert run.frozen_ms() == pytest.approx((200, 0.75))  # 10 to 12, after 2, 3 and 4 had frozen
    assert a_run().frozen_ms() is None


# The verdict


def starts_with(sentences):
    return [sentence.split(":")[0] for sentence in sentences]


def test_verdict_when_freezing_pays():
    frozen = [0] * 40 + [5] * 20
    grades = a_run(steps=60, loss=0.99, seconds=0.9, frozen=frozen, n_units=10)
    verdict = demo_output.judge(a_run(), a_run(), grades, a_run(steps=60, planned=60, loss=1.0))
    assert starts_with(verdict.did_not_pay) == ["Classic early stopping"]
    assert verdict.paid[:2] == [
        "Time in all: 54.0 s of training, AdamW 100.0 s: 1.85x, which is 1.67x by fewer steps "
        "times 1.11x per step.",
        "Stopping early: 60 of 100 steps, 1.67x fewer.",
    ]
    assert verdict.paid[2].startswith("Cheaper steps: 900.0 ms on average, AdamW 1000.0: 1.11x.")
    assert "better, without knowing" in verdict.paid[-1]


def test_verdict_when_nothing_pays():
    grades = a_run(loss=1.2, seconds=1.1, n_units=10)
    early = a_run(steps=50, loss=1.1)
    verdict = demo_output.judge(a_run(), early, grades, a_run())
    assert verdict.paid == []
    assert starts_with(verdict.did_not_pay) == [
        "Time in all",
        "Stopping early",
        "Cheaper steps",
        "Measuring",
        "Quality",
        "Fair yardstick",
        "Classic early stopping",
    ]
    assert "does better with AdamW" in verdict.did_not_pay[-2]
    assert "50 of 100 steps, loss +0.1000" in verdict.did_not_pay[-1]


def test_verdict_counts_noise_as_no_gain():
    """Two runs of the same steps differ by 20 %: a step that is 10 % cheaper shows nothing."""
    grades = a_run(seconds=0.9, n_units=10)
    calm = demo_output.judge(a_run(), a_run(), grades, a_run())
    noisy = demo_output.judge(a_run(), a_run(seconds=1.2), grades, a_run())
    assert "Cheaper steps" in starts_with(calm.paid)
    assert "Cheaper steps" in starts_with(noisy.did_not_pay)
    assert "20.0%" in noisy.remark
    assert "trust the steps" in noisy.remark
    assert "trust the steps" not in calm.remark


def test_verdict_calls_equal_losses_equal():
    grades = a_run(loss=1.002, n_units=10)
    verdict = demo_output.judge(a_run(), a_run(), grades, a_run())
    assert {"Quality", "Fair yardstick"} <= set(starts_with(verdict.paid))
    assert "as good, without knowing" in verdict.paid[-1]
