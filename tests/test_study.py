"""The two training benchmarks: they run, and their numbers mean what their columns say.

Contract: every method of the study starts from the same weights and sees the same batches; compute
counts the gradients that autograd really makes; a gap is the distance to the yardstick's line; the
setting that is picked must save something; forced cases of the training benchmark are frozen as
far as they say.
"""

import csv
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_training, harness, study
from grades_kernels import GradESAdamW

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return study.pretrain(study.QUICK_PRETRAINING)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# The study


def test_quick_study(results, capsys):
    study.main(["--quick"])
    assert {path.name for path in results.iterdir()} == {
        "study-quick-grid.csv",
        "study-quick-compare.csv",
        "study-quick-compute.png",
        "study-quick-time.png",
    }
    rows = study.read_rows(results / "study-quick-compare.csv")
    runs = study.group(rows, "task", "seed")
    assert set(runs) == {(task, seed) for task in ("text", "memorise") for seed in (0, 1)}
    for members in runs.values():
        by_name = {(row["method"], row["cooldown"]): row for row in members}
        assert len(by_name) == len(members)
        assert by_name["AdamW", 0]["compute"] == by_name["AdamW", 0]["time"] == 1
        for share in study.SHARES:
            assert by_name[f"planned {share:.0%}", 0]["compute"] == pytest.approx(share)
        for row in members:
            assert row["best_loss"] <= row["loss"] < math.log(256)
            assert 0 < row["compute"] <= 1
            assert row["steps"] <= row["planned"]
        ours = [row for row in members if row["backend"] not in ("torch fused",)]
        assert any(row["frozen"] == 1 for row in ours)
    assert "ramp_gap" in capsys.readouterr().out


def test_jobs_do_not_change_losses(results):
    """Two processes give the rows of one, but for the times."""
    keys = ("task", "seed", "method", "cooldown", "loss", "compute")
    found = []
    for jobs in ("1", "2"):
        study.main(["--quick", "--part", "grid", "--jobs", jobs])
        rows = rows_of(results / "study-quick-grid.csv")
        found.append([[row[key] for key in keys] for row in rows])
    assert found[0] == found[1]


def test_same_weights_and_batches(model):
    plan, task = study.QUICK, study.TASKS["noisy labels"]
    one, other = (study.Batches(task, "packages", plan) for _ in range(2))
    for step in range(plan.steps):
        for a, b in zip(one[step], other[step], strict=True):
            assert a.equal(b)
    assert not one.starts.equal(study.Batches(task, "packages", replace(plan, seed=1)).starts)
    for p, q in zip(model.parameters(), study.prepared(model, task, 0).parameters(), strict=True):
        assert p.equal(q) and p is not q


def test_noise_and_small_set():
    plan = study.QUICK
    clean, noisy, small = (
        study.Batches(study.TASKS[name], "packages", plan)
        for name in ("text", "noisy labels", "memorise")
    )
    wrong = (noisy.labels != clean.labels).float().mean().item()
    assert wrong == pytest.approx(study.NOISE, abs=0.01)
    assert small.starts.unique().numel() == study.MEMORISED
    inputs, labels = clean[0]
    assert inputs[:, 1:].equal(labels[:, :-1])


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "mm" in name:  # mm, addmm, bmm
            m, k = args[-2].shape[-2:]
            self.products += m * k * args[-1].shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [(), ("q_proj",), ("_proj",), ("_proj", "embed", "norm")])
def test_work_counts_what_autograd_does(model, frozen):
    """Against the products that torch really computes; attention's are counted by formula."""
    plan = study.QUICK
    model = study.prepared(model, study.TASKS["text"], 0)
    for name, p in model.named_parameters():
        if any(part in name for part in frozen):
            p.requires_grad_(False)
    tokens = torch.zeros(plan.batch, plan.length, dtype=torch.long)
    with Counting() as counting:
        model(tokens).sum().backward()
    per_token = counting.products / tokens.numel()
    attention = 6 * plan.layers * plan.length * plan.dim
    assert study.work(model, plan) - attention == pytest.approx(per_token)


def a_row(method, compute, loss, **more):
    row = {"stage": "grid", "task": "text", "seed": 5, "method": method, "cooldown": 0}
    return {**row, "quantile": 0.2, "alpha": 0.2, "compute": compute, "loss": loss, **more}


def test_gap_to_the_line():
    line = [a_row("planned 20%", 0.2, 2.0), a_row("planned 80%", 0.8, 1.4), a_row("AdamW", 1, 1.3)]
    rows = study.with_gaps([*line, a_row("signal", 0.5, 1.75), a_row("norm", 0.9, 1.3)])
    assert [row["gap"] for row in rows] == pytest.approx([0, 0, 0, 0.05, -0.05])


def test_pick_refuses_what_saves_nothing():
    line = [a_row("planned 20%", 0.2, 2.0), a_row("AdamW", 1, 1.0)]
    rows = [
        a_row("norm", 1.0, 0.9, cooldown=8),
        a_row("norm", 0.6, 1.5, cooldown=8, quantile=0.6),
        a_row("norm", 0.6, 1.6, cooldown=8, quantile=0.6, alpha=0.4),
    ]
    picked = study.pick([*line, *rows])
    assert [(m.quantile, m.alpha, m.cools) for m in picked] == [
        (0.6, 0.2, False),
        (0.6, 0.2, True),
    ]
    assert study.pick([*line, rows[0]])[0].quantile == 0.2  # nothing cheaper was tried


def test_early_stopping_is_a_part_of_adamw(model):
    plan, task = study.QUICK, "memorise"
    each = study.Study("compare", task, model, plan, [study.ADAMW, study.YARDSTICK[0]], {})
    early = next(row for row in each.rows() if row["method"] == "early stopping")
    validations = each.trainings[0].run.validations
    assert (early["steps"], early["loss"]) in [(n, round(x, 4)) for n, _, x in validations]
    assert early["compute"] == pytest.approx(early["steps"] / plan.steps)


def test_cuts_are_parts_of_adamw(model):
    plan = study.QUICK
    each = study.Study("compare", "text", model, plan, [study.ADAMW], {})
    cuts = [row for row in each.rows() if row["method"].startswith("cut")]
    validations = {steps: loss for steps, _, loss in each.trainings[0].run.validations}
    for share, row in zip(study.SHARES, cuts, strict=True):
        assert row["compute"] == pytest.approx(share)
        assert row["loss"] == round(validations[round(share * plan.steps)], 4)


def test_random_freezes_by_chance_alone(model):
    """Every unit freezes, between the grace period and the end of the span, and not at once."""
    plan, task = study.QUICK, study.TASKS["text"]
    method = study.Method("random", statistic="random", quantile=0.5, patience=1, max_frozen=1.0)
    batches = study.Batches(task, "packages", plan)
    observed = study.observe(model, task, plan)
    training = study.make_training(method, model, task, batches, observed)
    training.advance(plan.steps)
    steps = [event.step for event in training.optimizer.freeze_events]
    assert len(steps) == 14 and len(set(steps)) > 5
    assert min(steps) > 0.2 * plan.steps and max(steps) <= 0.7 * plan.steps + 1


def test_authors_callback(model):
    """It freezes what falls below tau, and stopping counts as frozen; absent, it is left out."""
    if study.callback_class() is None:
        assert not any(method.statistic == "callback" for method in study.grid())
        return
    plan, task = study.QUICK, study.TASKS["text"]
    settings = study.VARIANTS["authors' callback"]
    batches = study.Batches(task, "packages", plan)
    for tau, frozen in ((1e-30, 0.0), (1e30, 1.0)):
        method = study.Method("authors' callback", quantile=0.5, **settings)
        observed = {"weight_change": {"layers.0.attn.q_proj.weight": [tau]}}
        training = study.make_training(method, model, task, batches, observed)
        training.advance(plan.steps)
        assert training.shares[-1] == frozen


# The training benchmark

TINY = bench_training.SIZES["tiny"]
CPU = torch.device("cpu")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def test_quick_training(transformers, results, monkeypatch):
    names = ("AdamW, torch fused", "change, same_step", "100% frozen, stopped")
    cases = [case for case in bench_training.CASES if case.name in names]
    monkeypatch.setattr(bench_training, "CASES", cases)
    bench_training.main(["--device", "cpu", "--size", "tiny", "--repeats", "3", "--part", "step"])
    rows = {row["case"]: row for row in rows_of(results / "training-step-cpu.csv")}
    assert tuple(rows) == names
    adamw, change, frozen = rows.values()
    assert float(change["state_MB"]) > 1.4 * float(adamw["state_MB"])  # one more gradient
    assert float(frozen["grad_MB"]) < 0.2 * float(adamw["grad_MB"])
    assert adamw["backend"] == "torch fused" != change["backend"]
    assert (results / "training-step-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("case", bench_training.CASES, ids=lambda case: case.name)
def test_cases_are_what_they_say(transformers, case):
    training = bench_training.Training(case, TINY, CPU)
    n_frozen = round(7 * TINY.layers * (case.frozen or 0))
    stopped = [name for name, p in training.model.named_parameters() if not p.requires_grad]
    assert len(stopped) == n_frozen * case.stops
    if not isinstance(training.optimizer, GradESAdamW):
        assert n_frozen == 0
        return
    assert len(training.optimizer.frozen_units) == n_frozen
    n_units = 0 if case.frozen is None else 7 * TINY.layers
    assert len(training.optimizer.monitored_units) == n_units
    with pytest.raises(AssertionError):  # the check can fail
        training.check(n_frozen + 7)


def test_recompilations_are_counted():
    row = bench_training.compile_row(every=2)
    assert row["units"] == row["frozen"] == 28
    assert row["recompilations"] <= 6 and row["eager_steps"] == 0


@pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="torch.compile does not guard on requires_grad"
)
def test_eager_steps_are_noticed():
    """Past the limit torch runs the model as it is: the count must show it."""
    with torch._dynamo.config.patch(recompile_limit=2):
        assert bench_training.compile_row(every=2)["eager_steps"] > 0


def test_peer_is_skipped_where_missing(monkeypatch, capsys):
    import builtins

    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "grades":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert list(bench_training.peer_rows("tiny", TINY, CPU, rounds=1, steps=3)) == []
    assert "skipped" in capsys.readouterr().out


def test_peer(transformers):
    pytest.importorskip("grades")
    rows = list(bench_training.peer_rows("tiny", TINY, CPU, rounds=2, steps=4))
    assert [row["case"] for row in rows][:3] == ["AdamW", "AdamW again", "authors' callback"]
    assert rows[0]["ratio"] == 1 and all(row["step_ms"] > 0 for row in rows)
