"""The two training benchmarks: they run, and every column has the meaning that its name states.

Every method of the study starts from the same weights and trains on the same batches; compute
counts the gradients that autograd really computes; a gap is the distance to the line of the planned
stops; a setting that is picked must save compute; each case of the training benchmark has as many
frozen units as its name states.
"""

import math
import sys
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


PLAN, TEXT = study.QUICK, study.TASKS["text"]


def test_the_quick_study_runs_and_its_rows_are_consistent(results, capsys):
    study.main(["--quick"])
    names = ("grid.csv", "compare.csv", "compute.png", "time.png")
    assert {path.name for path in results.iterdir()} == {f"study-quick-{x}" for x in names}
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
        assert any(row["frozen"] == 1 for row in members if row["backend"] != "torch fused")
    assert "ramp_gap" in capsys.readouterr().out

    def losses():
        keys = ("task", "seed", "method", "cooldown", "loss", "compute")
        rows = study.read_rows(results / "study-quick-grid.csv")
        return [[row[key] for key in keys] for row in rows]

    of_one_process = losses()
    study.main(["--quick", "--part", "grid", "--jobs", "2"])
    assert losses() == of_one_process


def batches(task, **changes):
    return study.Batches(study.TASKS[task], "packages", replace(PLAN, **changes))


def test_every_method_gets_the_same_weights_and_batches(model):
    one, other = batches("noisy labels"), batches("noisy labels")
    for step in range(PLAN.steps):
        for a, b in zip(one[step], other[step], strict=True):
            assert a.equal(b)
    assert not one.starts.equal(batches("noisy labels", seed=1).starts)
    for p, q in zip(model.parameters(), study.prepared(model, TEXT, 0).parameters(), strict=True):
        assert p.equal(q) and p is not q


def test_tasks_have_noisy_labels_or_few_examples():
    clean, noisy, small = map(batches, ["text", "noisy labels", "memorise"])
    wrong = (noisy.labels != clean.labels).float().mean().item()
    assert wrong == pytest.approx(study.NOISE, abs=0.01)
    assert small.starts.unique().numel() == study.MEMORISED
    inputs, labels = clean[0]
    assert inputs[:, 1:].equal(labels[:, :-1])


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the multiplications of matrix products."""

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
def test_work_counts_the_products_that_torch_computes(model, frozen):
    """Those of attention are counted by a formula."""
    model = study.prepared(model, TEXT, 0)
    for name, p in model.named_parameters():
        if any(part in name for part in frozen):
            p.requires_grad_(False)
    tokens = torch.zeros(PLAN.batch, PLAN.length, dtype=torch.long)
    with Counting() as counting:
        model(tokens).sum().backward()
    per_token = counting.products / tokens.numel()
    attention = 6 * PLAN.layers * PLAN.length * PLAN.dim
    assert study.work(model, PLAN) - attention == pytest.approx(per_token)


def a_row(method, compute, loss, **more):
    row = {"stage": "grid", "task": "text", "seed": 5, "method": method, "cooldown": 0}
    return {**row, "quantile": 0.2, "alpha": 0.2, "compute": compute, "loss": loss, **more}


def test_a_gap_is_the_distance_to_the_line_of_planned_stops():
    line = [a_row("planned 20%", 0.2, 2.0), a_row("planned 80%", 0.8, 1.4), a_row("AdamW", 1, 1.3)]
    rows = study.with_gaps([*line, a_row("signal", 0.5, 1.75), a_row("norm", 0.9, 1.3)])
    assert [row["gap"] for row in rows] == pytest.approx([0, 0, 0, 0.05, -0.05])


def test_no_setting_is_picked_that_saves_nothing_if_another_was_tried():
    line = [a_row("planned 20%", 0.2, 2.0), a_row("AdamW", 1, 1.0)]
    rows = [
        a_row("norm", 1.0, 0.9, cooldown=8),
        a_row("norm", 0.6, 1.5, cooldown=8, quantile=0.6),
        a_row("norm", 0.6, 1.6, cooldown=8, quantile=0.6, alpha=0.4),
    ]
    picked = study.pick([*line, *rows])
    cools = [m.cools for m in picked if (m.quantile, m.alpha) == (0.6, 0.2)]
    assert cools == [False, True] and len(picked) == 2
    assert study.pick([*line, rows[0]])[0].quantile == 0.2  # no cheaper setting was tried


def test_early_stopping_and_cuts_are_rows_of_the_run_of_adamw(model):
    methods = [study.ADAMW, study.YARDSTICK[0]]
    each = study.Study("compare", "memorise", model, PLAN, methods, {})
    rows = each.rows()
    losses = {steps: round(x, 4) for steps, _, x in each.trainings[0].run.validations}
    early = next(row for row in rows if row["method"] == "early stopping")
    assert early["loss"] == losses[early["steps"]]
    assert early["compute"] == pytest.approx(early["steps"] / PLAN.steps)
    cuts = [row for row in rows if row["method"].startswith("cut")]
    for share, row in zip(study.SHARES, cuts, strict=True):
        assert row["compute"] == pytest.approx(share)
        assert row["loss"] == losses[round(share * PLAN.steps)]


@pytest.mark.skipif(study.callback_class() is None, reason="the authors' package is missing")
@pytest.mark.parametrize(("tau", "frozen"), [(1e-30, 0.0), (1e30, 1.0)])
def test_the_authors_callback_freezes_below_tau(model, tau, frozen):
    """A run that it stops counts as frozen."""
    settings = study.VARIANTS["authors' callback"]
    method = study.Method("authors' callback", quantile=0.5, **settings)
    observed = {"weight_change": {"layers.0.attn.q_proj.weight": [tau]}}
    training = study.make_training(method, model, TEXT, batches("text"), observed)
    training.advance(PLAN.steps)
    assert training.shares[-1] == frozen


def test_without_the_authors_package_the_study_leaves_its_callback_out(monkeypatch):
    monkeypatch.setattr(study, "callback_class", lambda: None)
    assert not any(method.statistic == "callback" for method in study.grid())


TINY = bench_training.SIZES["tiny"]
CPU = torch.device("cpu")


def test_the_training_benchmark_measures_memory(results, monkeypatch):
    pytest.importorskip("transformers")
    names = ("AdamW, torch fused", "change, same_step", "100% frozen, stopped")
    cases = [case for case in bench_training.CASES if case.name in names]
    monkeypatch.setattr(bench_training, "CASES", cases)
    bench_training.main(["--device", "cpu", "--size", "tiny", "--repeats", "3", "--part", "step"])
    rows = {row["case"]: row for row in study.read_rows(results / "training-step-cpu.csv")}
    assert tuple(rows) == names
    adamw, change, frozen = rows.values()
    assert change["state_MB"] > 1.4 * adamw["state_MB"]  # one more gradient
    assert frozen["grad_MB"] < 0.2 * adamw["grad_MB"]
    assert adamw["backend"] == "torch fused" != change["backend"]
    assert (results / "training-step-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("case", bench_training.CASES, ids=lambda case: case.name)
def test_every_case_has_its_number_of_frozen_units(case):
    pytest.importorskip("transformers")
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


def test_recompilations_are_counted():
    row = bench_training.compile_row(every=2)
    assert row["units"] == row["frozen"] == 28
    assert row["recompilations"] <= 6 and row["eager_steps"] == 0


@pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="torch.compile does not guard on requires_grad"
)
def test_steps_that_run_eagerly_past_the_recompile_limit_are_counted():
    with torch._dynamo.config.patch(recompile_limit=2):
        assert bench_training.compile_row(every=2)["eager_steps"] > 0


def test_the_authors_package_is_skipped_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "grades", None)  # an import of it raises ImportError
    assert list(bench_training.peer_rows("tiny", TINY, CPU, rounds=1, steps=3)) == []
    assert "skipped" in capsys.readouterr().out


def test_the_authors_package_is_timed_beside_adamw():
    pytest.importorskip("transformers")
    pytest.importorskip("grades")
    rows = list(bench_training.peer_rows("tiny", TINY, CPU, rounds=2, steps=4))
    assert [row["case"] for row in rows][:3] == ["AdamW", "AdamW again", "authors' callback"]
    assert rows[0]["ratio"] == 1 and all(row["step_ms"] > 0 for row in rows)
